//! Learns what leftovers are worth, by filling the fleet again and again with typical pods.
//!
//! Each filling places pods drawn from the typical distribution with the policy as it stands.
//! Every device is looked at when a period starts, and again when the filling is over: the mean of
//! what was finally wasted, over all devices in the same cell, is what the next round goes by.
//! A device that only filled because it took a pod that would have filled another one instead has
//! saved nothing: each pod therefore has a price, the chance that one more of its shape still finds
//! a place late, times its size, and charges a part of it to the device that it lands on.

use crate::openb::fleet::Node;
use crate::openb::input::{GPUS_MAX, Shape, WHOLE};
use crate::openb::policy::drumline::{Dispatcher, Tuning};
use crate::openb::policy::frag::candidates;
use crate::openb::policy::placer::Placed;
use crate::openb::policy::worth::{Grid, PERIODS, Sums, Worth, cores_per_gpu};
use crate::openb::rng::Rng;
use crate::openb::typical::Typical;

/// Demand over capacity at which a filling ends.
const FILL_TO: f64 = 1.3;
/// Demand over capacity from which pods that still find a place set the price of their shape.
const LATE: f64 = 1.1;

/// The shares of pods with 8, 4 and 2 whole GPUs that are too rare to be typical.
const RARE: [(u8, f64); 3] = [(8, 0.005), (4, 0.002), (2, 0.002)];

/// The shapes to draw from, the rare ones included.
struct Draw {
    shapes: Vec<Shape>,
    cumulative: Vec<f64>,
    price: Vec<f64>,
}

/// Learns what leftovers on these nodes are worth under typical pods.
#[must_use]
pub fn learn(nodes: &[Node], typical: &[Typical], tuning: &Tuning) -> Worth {
    let models = nodes.iter().map(|n| n.model.trailing_zeros() as usize + 1).max().unwrap_or(1);
    let mut sums = Sums::new(Grid::new(typical, models));
    let mut draw = Draw::new(typical);
    let mut worth = sums.estimate(typical, tuning.pull, tuning.caution);
    let no_gpus = nodes.iter().all(|node| node.gpus == 0);
    if no_gpus || draw.shapes.iter().all(|shape| shape.gpus == 0) {
        return worth;
    }
    let grid = sums.grid().clone();
    for round in 0..tuning.rounds {
        // Each filling has its own random numbers, and the results are added in their order: the
        // outcome does not depend on the number of threads.
        let fillings: Vec<Filling> = std::thread::scope(|scope| {
            let (draw, worth, grid) = (&draw, &worth, &grid);
            let started: Vec<_> = (0..tuning.fillings)
                .map(|i| {
                    let rng = Rng::stream(tuning.seed, (round * tuning.fillings + i) as u64);
                    scope.spawn(move || fill(nodes.to_vec(), draw, worth, grid, tuning, rng))
                })
                .collect();
            let joined = started.into_iter().map(|thread| thread.join());
            joined.map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        sums.fade(tuning.keep);
        let mut late = vec![(0.0, 0.0); draw.shapes.len()];
        for filling in fillings {
            for (cell, wasted) in filling.seen {
                sums.add(cell as usize, wasted);
            }
            for (sum, (tried, placed)) in late.iter_mut().zip(filling.late) {
                sum.0 += tried;
                sum.1 += placed;
            }
        }
        for (id, (tried, placed)) in late.into_iter().enumerate() {
            let price = placed / (tried + 1.0) * draw.shapes[id].gpu_total() as f64;
            draw.price[id] = 0.5 * (draw.price[id] + price);
        }
        worth = sums.estimate(typical, tuning.pull, tuning.caution);
    }
    worth
}

/// What one filling of the fleet showed.
struct Filling {
    /// (Cell, thousandths finally wasted, prices charged included) of every device seen.
    seen: Vec<(u32, f32)>,
    /// Per shape, the pods that came late and those of them that found a place.
    late: Vec<(f64, f64)>,
}

impl Draw {
    fn new(typical: &[Typical]) -> Self {
        let mut entries: Vec<(Shape, f64)> = typical.iter().map(|t| (t.shape, t.share)).collect();
        let cores = cores_per_gpu(typical);
        if cores > 0.0 {
            for (gpus_each, share) in RARE {
                let cpu_milli = (cores * f64::from(gpus_each)) as i32;
                let gpu_milli = WHOLE;
                let shape = Shape { cpu_milli, gpu_milli, gpus: gpus_each, models: u32::MAX };
                entries.push((shape, share));
            }
        }
        let mut sum = 0.0;
        let cumulative = entries
            .iter()
            .map(|(_, share)| {
                sum += share;
                sum
            })
            .collect();
        let price = vec![0.0; entries.len()];
        Self { shapes: entries.into_iter().map(|(shape, _)| shape).collect(), cumulative, price }
    }

    fn next(&self, rng: &mut Rng) -> usize {
        let whole = self.cumulative.last().copied().unwrap_or(1.0);
        let at = rng.unit() * whole;
        self.cumulative.partition_point(|&c| c < at).min(self.shapes.len() - 1)
    }
}

/// Fills the fleet once.
fn fill(
    mut nodes: Vec<Node>,
    draw: &Draw,
    worth: &Worth,
    grid: &Grid,
    tuning: &Tuning,
    mut rng: Rng,
) -> Filling {
    rng.shuffle(&mut nodes);
    let mut late = vec![(0.0, 0.0); draw.shapes.len()];
    let mut charged = vec![[0.0f32; GPUS_MAX]; nodes.len()];
    let mut looks = Vec::with_capacity(PERIODS.len());
    let mut dispatcher = Dispatcher::new(nodes, worth, tuning, &draw.shapes);
    while dispatcher.arrived() < FILL_TO {
        while PERIODS.get(looks.len()).is_some_and(|&start| dispatcher.arrived() >= start) {
            looks.push((dispatcher.nodes().to_vec(), charged.clone()));
        }
        let id = draw.next(&mut rng);
        let astray = rng.unit() < tuning.explore;
        let strayed =
            astray.then(|| stray(dispatcher.nodes(), &draw.shapes[id], &mut rng)).flatten();
        let placed = match strayed {
            Some((node, device)) => Some(dispatcher.put(id, node, device)),
            None => dispatcher.place(id, 0),
        };
        if dispatcher.arrived() > LATE {
            late[id].0 += 1.0;
            late[id].1 += f64::from(u8::from(placed.is_some()));
        }
        if let Some(placed) = placed {
            charge(&mut charged, &dispatcher, placed, draw.price[id], draw.shapes[id].gpus);
        }
    }
    let last = dispatcher.nodes();
    let mut seen = Vec::new();
    for (period, (before, charged_before)) in looks.iter().enumerate() {
        for (at, node) in before.iter().enumerate() {
            grid.visit(node, period, |device, cell| {
                let price = charged[at][device] - charged_before[at][device];
                let wasted = f32::from(last[at].gpu[device]);
                seen.push((cell as u32, wasted + tuning.price_weight as f32 * price));
            });
        }
    }
    Filling { seen, late }
}

/// Charges a pod's price to the devices that it took.
fn charge(
    charged: &mut [[f32; GPUS_MAX]],
    dispatcher: &Dispatcher<'_>,
    placed: Placed,
    price: f64,
    gpus: u8,
) {
    let after = &dispatcher.nodes()[placed.node].gpu;
    for (device, left) in after.iter().enumerate() {
        if *left < placed.before[device] {
            charged[placed.node][device] += (price / f64::from(gpus.max(1))) as f32;
        }
    }
}

/// Chooses any node that the pod fits on, and any device.
fn stray(nodes: &[Node], shape: &Shape, rng: &mut Rng) -> Option<(usize, usize)> {
    let start = rng.below(nodes.len());
    let at = (0..nodes.len()).map(|i| (start + i) % nodes.len()).find(|&i| nodes[i].fits(shape))?;
    let devices: Vec<u8> = candidates(&nodes[at], shape).collect();
    Some((at, usize::from(devices[rng.below(devices.len())])))
}
