//! What the remainder of a device would waste if the pods that suit it best came along.
//!
//! A policy that only knows what became of remainders so far fills each at once with whatever
//! comes, and never finds out that waiting pays. So a remainder is valued by its best filling
//! instead: the typical shares that leave least of it, each at its price. A price is what one more
//! pod of that size would add to the whole fleet. It comes from the fluid limit of the fleet, in
//! which pods are divisible: large pods arrive until no whole device is left; of the small ones
//! at least those that came until then, and at most all that ever come, are packed into the
//! devices that remain and into what the large ones leave. Cores and models play no part in the prices; they limit
//! the fillings.

use crate::openb::fleet::affinity;
use crate::openb::input::{Shape, WHOLE};
use crate::openb::typical::Typical;

/// Parts of a device that fillings are computed in.
pub const PARTS: usize = 100;
/// Thousandths of a GPU in one part.
const PART_MILLI: u16 = WHOLE / PARTS as u16;
/// A share above this is large: what it leaves is too small for a second of its size.
const LARGE_MILLI: u16 = 2 * WHOLE / 3;
/// GPU demand over capacity that arrives in all.
const ARRIVES: f64 = 1.3;
/// Part of the fleet that is allocated when no whole device is left, some small remainders apart.
const FULL: f64 = 0.97;
/// Steps of the descent that finds the prices.
const STEPS: usize = 6_000;
/// The first step's length, in thousandths of a GPU.
const STEP_MILLI: f64 = 40.0;
/// After so many steps they are half as long, then a third, and so on.
const STEPS_TO_HALF: f64 = 50.0;
/// Of prices that explain the packing alike the smaller are taken: this many thousandths of a GPU
/// weigh as much as a demand that is missed by itself.
const DOUBT_MILLI: f64 = 500.0;
/// Most cores that a filling may use, in thousandths; more make no difference.
const CORES_MAX: f64 = 40_000.0;

/// One typical shape that takes a small share of a device.
#[derive(Debug, Clone, Copy)]
struct Item {
    parts: usize,
    milli: f64,
    cores: usize,
    models: u32,
    price: f64,
}

/// The fillings of remainders by typical shapes.
#[derive(Debug, Clone)]
pub struct Fill {
    items: Vec<Item>,
}

impl Fill {
    /// Finds the prices of the typical shapes, on a fleet of so many GPU models.
    ///
    /// Shapes that only some models take are left out, if there are others: what they would fill
    /// on one model they lack on the next.
    #[must_use]
    pub fn new(typical: &[Typical], models: usize) -> Self {
        let prices = Prices::find(typical);
        let small = typical.iter().map(|t| &t.shape).filter(|s| is_small(s));
        let mut items: Vec<Item> = small
            .map(|s| Item {
                parts: parts(s.gpu_milli),
                milli: f64::from(s.gpu_milli),
                cores: (s.cpu_milli.max(0) as usize).div_ceil(1000),
                models: s.models,
                price: prices.of(s.gpu_milli),
            })
            .collect();
        let anywhere = |item: &Item| item.models.trailing_ones() as usize >= models;
        if items.iter().any(anywhere) {
            items.retain(anywhere);
        }
        Self { items }
    }

    /// Returns what the best filling wastes, in thousandths of a GPU, of a remainder of each
    /// number of parts (below [`PARTS`]) on a device of this model with so many thousandths of a
    /// core.
    #[must_use]
    pub fn wasted(&self, model: usize, cores_milli: f64) -> Vec<f64> {
        let cores = (cores_milli.clamp(0.0, CORES_MAX) / 1000.0) as usize;
        let items: Vec<&Item> = self
            .items
            .iter()
            .filter(|i| i.models & (1 << model) != 0 && i.cores <= cores)
            .collect();
        // best[left * (cores + 1) + at]: the most that a remainder earns with so many cores.
        let width = cores + 1;
        let mut best = vec![0.0f64; PARTS * width];
        for left in 1..PARTS {
            for at in 0..width {
                let earns = items
                    .iter()
                    .filter(|i| i.parts <= left && i.cores <= at)
                    .map(|i| i.milli - i.price + best[(left - i.parts) * width + at - i.cores]);
                best[left * width + at] = earns.fold(0.0, f64::max);
            }
        }
        (0..PARTS).map(|p| milli_of(p) - best[p * width + cores]).collect()
    }
}

fn is_small(shape: &Shape) -> bool {
    affinity(shape) == Some(0) && shape.gpu_milli <= LARGE_MILLI
}

fn milli_of(parts: usize) -> f64 {
    (parts * usize::from(PART_MILLI)) as f64
}

fn parts(milli: u16) -> usize {
    usize::from(milli.div_ceil(PART_MILLI))
}

/// The prices of small shares, by parts of a device.
#[derive(Debug)]
struct Prices {
    milli: Vec<f64>,
}

impl Prices {
    fn of(&self, milli: u16) -> f64 {
        self.milli[parts(milli)]
    }

    /// Descends the dual of the packing, in devices per device of the fleet, and takes the mean
    /// over the later half of the steps.
    fn find(typical: &[Typical]) -> Self {
        let mut milli = vec![0.0f64; PARTS + 1];
        let packing = Packing::new(typical);
        let sizes = packing.sizes();
        let mut sum = milli.clone();
        for step in 0..STEPS {
            let used = packing.used(&sizes, &milli);
            let length = STEP_MILLI / (1.0 + step as f64 / STEPS_TO_HALF);
            for &p in &sizes {
                let (least, most) = packing.supply(p);
                if milli[p] != 0.0 || used[p] < least || used[p] > most {
                    let supply = if milli[p] >= 0.0 { most } else { least };
                    let weight = (packing.small[p] * packing.held).sqrt();
                    let lacking = (used[p] - supply) / weight - milli[p] / DOUBT_MILLI;
                    let next = (milli[p] + length * lacking).min(milli_of(p));
                    milli[p] = if milli[p] * next < 0.0 { 0.0 } else { next };
                }
                if step >= STEPS / 2 {
                    sum[p] += milli[p];
                }
            }
        }
        let steps = (STEPS - STEPS / 2) as f64;
        Self { milli: sum.into_iter().map(|s| s / steps).collect() }
    }
}

/// The fluid limit of the fleet: amounts per device, sizes in parts of a device.
struct Packing {
    /// Small pods by size that arrive while demand of the fleet's capacity arrives.
    small: Vec<f64>,
    /// What these ask for, in devices.
    held: f64,
    /// Arrived demand over capacity when no whole device is left.
    until: f64,
    /// Devices left to small pods, by what is free of them.
    bins: Vec<(usize, f64)>,
}

impl Packing {
    fn new(typical: &[Typical]) -> Self {
        let demand: f64 = typical.iter().map(|t| t.share * t.shape.gpu_total() as f64).sum();
        let rate = if demand > 0.0 { f64::from(WHOLE) / demand } else { 0.0 };
        let (mut small, mut left) = (vec![0.0f64; PARTS + 1], vec![0.0f64; PARTS + 1]);
        for Typical { shape, share } in typical {
            let size = parts(shape.gpu_milli);
            if is_small(shape) {
                small[size] += share * rate;
            } else {
                left[PARTS - size] += share * rate * f64::from(shape.gpus);
            }
        }
        let held: f64 = small.iter().enumerate().map(|(p, n)| n * p as f64 / PARTS as f64).sum();
        let large: f64 = left[..PARTS].iter().sum();
        let until = FULL / (large + held).max(FULL / ARRIVES);
        let mut bins = vec![(PARTS, (1.0 - large * until).max(0.0))];
        bins.extend((1..PARTS).map(|p| (p, left[p] * until)).filter(|bin| bin.1 > 0.0));
        Self { small, held, until, bins }
    }

    fn sizes(&self) -> Vec<usize> {
        (1..=PARTS).filter(|&p| self.small[p] > 0.0).collect()
    }

    /// Returns the fewest and the most pods of a size that are packed.
    fn supply(&self, size: usize) -> (f64, f64) {
        (self.small[size] * self.until, self.small[size] * ARRIVES)
    }

    /// Returns how many pods of each size fill the devices best at these prices.
    fn used(&self, sizes: &[usize], prices: &[f64]) -> Vec<f64> {
        // What so much room earns, and the size to begin with.
        let mut best = [(0.0f64, 0usize); PARTS + 1];
        for room in 1..=PARTS {
            for &p in sizes.iter().take_while(|&&p| p <= room) {
                let earns = milli_of(p) - prices[p] + best[room - p].0;
                if earns > best[room].0 + 1e-9 {
                    best[room] = (earns, p);
                }
            }
        }
        let mut used = vec![0.0; PARTS + 1];
        for &(size, count) in &self.bins {
            let mut room = size;
            while best[room].1 > 0 {
                used[best[room].1] += count;
                room -= best[room].1;
            }
        }
        used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typical(pods: &[(u16, i32, f64)]) -> Vec<Typical> {
        let typical = |&(gpu_milli, cpu_milli, share)| Typical {
            shape: Shape { cpu_milli, gpu_milli, gpus: 1, models: u32::MAX },
            share,
        };
        pods.iter().map(typical).collect()
    }

    fn wasted(pods: &[(u16, i32, f64)], left_milli: usize, cores_milli: f64) -> f64 {
        Fill::new(&typical(pods), 1).wasted(0, cores_milli)[left_milli * PARTS / 1000]
    }

    #[test]
    fn a_remainder_wastes_what_the_best_filling_leaves() {
        let pods = [(1000, 4000, 0.7), (600, 4000, 0.1), (300, 4000, 0.2)];
        for (left, expected) in [(400, 100.0), (300, 0.0), (200, 200.0), (700, 100.0)] {
            let wasted = wasted(&pods, left, 30_000.0);
            assert!((wasted - expected).abs() < 60.0, "{left}: {wasted}");
        }
    }

    #[test]
    fn a_remainder_without_cores_is_all_wasted() {
        let pods = [(1000, 4000, 0.7), (500, 4000, 0.3)];
        assert_eq!(wasted(&pods, 500, 3_900.0), 500.0);
        assert!(wasted(&pods, 500, 4_000.0) < 60.0);
    }

    #[test]
    fn a_pod_that_finds_room_anyway_saves_nothing() {
        // Every tenth large pod's remainder could take one of the few pods of 150.
        let pods = [(850, 4000, 0.5), (1000, 4000, 0.49), (150, 4000, 0.01)];
        assert!(wasted(&pods, 150, 30_000.0) > 140.0);
        let pods = [(850, 4000, 0.05), (1000, 4000, 0.45), (150, 4000, 0.5)];
        assert!(wasted(&pods, 150, 30_000.0) < 30.0);
    }

    #[test]
    fn shapes_for_some_models_count_only_where_there_are_no_others() {
        let mut pods = typical(&[(1000, 4000, 0.7), (500, 4000, 0.3)]);
        pods[1].shape.models = 0b01;
        let fill = Fill::new(&pods, 2);
        assert!(fill.wasted(0, 30_000.0)[50] < 60.0);
        assert_eq!(fill.wasted(1, 30_000.0)[50], 500.0);
        pods.extend(typical(&[(300, 4000, 0.1)]));
        assert!(Fill::new(&pods, 2).wasted(0, 30_000.0)[50] > 150.0);
    }
}
