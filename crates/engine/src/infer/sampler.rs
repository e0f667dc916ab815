//! How tokens are chosen, and their scores.

use drumline_tensor::Draw;
use drumline_tensor::sampling::argmax;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0: always the likeliest. Otherwise logits are divided by it.
    pub temperature: f32,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: u32,
    /// Only the likeliest tokens that together have this probability; 1: all.
    pub top_p: f32,
    /// Same seed, same tokens, whatever else is in the batch.
    pub seed: u64,
    /// How many of the likeliest tokens are reported with each chosen one; none: no scores.
    pub logprobs: Option<u8>,
}

impl Sampling {
    /// Always the likeliest token, without scores.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, logprobs: None };
}

/// A token and the logarithm of the probability that the model gives it (at temperature 1, before
/// any cut).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// The token.
    pub token: u32,
    /// Its log-probability, in nats.
    pub logprob: f32,
}

impl Sampling {
    /// Returns how the `index`-th token of a completion is drawn.
    #[must_use]
    pub fn draw(&self, index: u64) -> Draw {
        let Self { temperature, top_k, top_p, seed, .. } = *self;
        Draw { temperature, top_k, top_p, point: point(seed, index) }
    }
}

/// Returns the score of `token` and of the `count` likeliest tokens, best first.
#[must_use]
pub fn scores(logits: &[f32], token: u32, count: usize) -> (f32, Vec<TokenScore>) {
    let max = logits[argmax(logits) as usize];
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    let logprob = |t: u32| (f64::from(logits[t as usize] - max) - sum.ln()) as f32;
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    let order =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let count = count.min(tokens.len());
    if count > 0 && count < tokens.len() {
        tokens.select_nth_unstable_by(count - 1, order);
    }
    tokens.truncate(count);
    tokens.sort_unstable_by(order);
    let best = tokens.into_iter().map(|t| TokenScore { token: t, logprob: logprob(t) }).collect();
    (logprob(token), best)
}

/// A uniform number over 2^64 from seed and counter (splitmix64's finaliser, twice).
fn point(seed: u64, index: u64) -> u64 {
    let mix = |z: u64| {
        let z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    mix(mix(seed) ^ index.wrapping_mul(0xD134_2543_DE82_EF95))
}

#[cfg(test)]
mod tests {
    use drumline_tensor::sampling::choose;

    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, 2.0, -1.0];

    fn counts(s: Sampling, draws: u64) -> [u64; 5] {
        let mut counts = [0; 5];
        for i in 0..draws {
            counts[choose(&s.draw(i), &LOGITS) as usize] += 1;
        }
        counts
    }

    #[test]
    fn zero_temperature_takes_the_first_of_the_likeliest() {
        assert_eq!(choose(&Sampling::GREEDY.draw(9), &LOGITS), 1);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let s = Sampling { temperature: 1.0, seed: 4, ..Sampling::GREEDY };
        let total: f64 = LOGITS.iter().map(|x| f64::from(*x).exp()).sum();
        for (token, count) in counts(s, 20_000).into_iter().enumerate() {
            let p = f64::from(LOGITS[token]).exp() / total;
            assert!((count as f64 / 20_000.0 - p).abs() < 0.015, "token {token}: {count}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let hot = Sampling { temperature: 1.0, seed: 4, ..Sampling::GREEDY };
        let [a, b, c, d, e] = counts(Sampling { top_k: 2, ..hot }, 2000);
        assert!(a == 0 && c == 0 && e == 0 && b > 800 && d > 800);
        // The two likeliest have 0.73 together, the third brings it to 0.86.
        let [a, _, c, _, e] = counts(Sampling { top_p: 0.8, ..hot }, 2000);
        assert!(a == 0 && e == 0 && c > 100);
        let [_, b, _, _, _] = counts(Sampling { top_p: 1e-6, ..hot }, 100);
        assert_eq!(b, 100);
    }

    #[test]
    fn seeds_and_counters_give_different_draws_and_the_same_again() {
        let s = |seed| Sampling { temperature: 1.0, seed, ..Sampling::GREEDY };
        let draw = |seed| (0..40).map(|i| choose(&s(seed).draw(i), &LOGITS)).collect::<Vec<_>>();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn scores_are_logarithms_of_probabilities() {
        let (own, best) = scores(&LOGITS, 2, 3);
        let total: f64 = LOGITS.iter().map(|x| f64::from(*x).exp()).sum();
        assert!((f64::from(own) - (1.0 - total.ln())).abs() < 1e-6);
        assert_eq!(best.iter().map(|s| s.token).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(best[2].logprob, own);
    }
}
