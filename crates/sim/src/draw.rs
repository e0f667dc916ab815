//! Seeded random numbers, and the distributions that workloads are drawn from.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// One stream of random numbers. Streams of one seed with different purposes have nothing in
/// common.
#[derive(Debug, Clone)]
pub struct Draw(ChaCha8Rng);

impl Draw {
    /// Starts the stream of a seed for a purpose.
    #[must_use]
    pub fn new(seed: u64, purpose: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(purpose);
        Self(rng)
    }

    /// Returns a number from 0 (included) to 1 (excluded).
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns a whole number below `bound`; 0 when that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.0.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// Returns an exponentially distributed number.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// Returns a normally distributed number of mean 0 and deviation 1 (Box and Muller 1958).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Returns a log-normally distributed number: half of them are below `median`.
    pub fn log_normal(&mut self, median: f64, sigma: f64) -> f64 {
        median * (sigma * self.normal()).exp()
    }

    /// Returns a Pareto-distributed number of at least `least`.
    pub fn pareto(&mut self, least: f64, alpha: f64) -> f64 {
        least * (1.0 - self.unit()).powf(-1.0 / alpha)
    }

    /// Returns the place of a weight, drawn in proportion to the weights; 0 when all are 0.
    pub fn pick(&mut self, weights: impl Iterator<Item = f64> + Clone) -> usize {
        let mut at = self.unit() * weights.clone().sum::<f64>();
        let mut last = 0;
        for (place, weight) in weights.enumerate() {
            if weight > 0.0 {
                last = place;
                if at < weight {
                    return place;
                }
                at -= weight;
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_and_purpose_give_one_stream() {
        let list = |seed, purpose| -> Vec<u64> {
            let mut draw = Draw::new(seed, purpose);
            (0..8).map(|_| draw.below(1 << 40)).collect()
        };
        assert_eq!(list(1, 2), list(1, 2));
        assert_ne!(list(1, 2), list(1, 3));
        assert_ne!(list(1, 2), list(2, 2));
    }

    #[test]
    fn distributions_have_the_means_they_should() {
        let mut draw = Draw::new(7, 0);
        let n = 100_000;
        let mean = |sum: f64| sum / f64::from(n);
        let exponential = mean((0..n).map(|_| draw.exponential(3.0)).sum());
        assert!((exponential - 3.0).abs() < 0.05, "{exponential}");
        let normal = mean((0..n).map(|_| draw.normal()).sum());
        assert!(normal.abs() < 0.02, "{normal}");
        let below = (0..n).filter(|_| draw.log_normal(5.0, 1.5) < 5.0).count() as f64;
        assert!((below / f64::from(n) - 0.5).abs() < 0.01, "{below}");
        let pareto = mean((0..n).map(|_| draw.pareto(1.0, 3.0)).sum());
        assert!((pareto - 1.5).abs() < 0.05, "{pareto}");
        let second = (0..n).filter(|_| draw.pick([1.0, 3.0].into_iter()) == 1).count() as f64;
        assert!((second / f64::from(n) - 0.75).abs() < 0.01, "{second}");
    }
}
