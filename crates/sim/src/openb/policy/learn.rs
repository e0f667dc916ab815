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
use crate::openb::policy::worth::{Grid, PERIODS, Sums, Worth};
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
    let mut rng = Rng::new(tuning.seed);
    let mut worth = sums.estimate(typical, tuning.pull, tuning.caution);
    let no_gpus = nodes.iter().all(|node| node.gpus == 0);
    if no_gpus || draw.shapes.iter().all(|shape| shape.gpus == 0) {
        return worth;
    }
    for _ in 0..tuning.rounds {
        sums.fade(tuning.keep);
        let mut late = vec![(0.0, 0.0); draw.shapes.len()];
        for _ in 0..tuning.fillings {
            let mut order = nodes.to_vec();
            rng.shuffle(&mut order);
            fill(order, &draw, &worth, tuning, &mut rng, &mut sums, &mut late);
        }
        for (id, (tried, placed)) in late.into_iter().enumerate() {
            let price = placed / (tried + 1.0) * draw.shapes[id].gpu_total() as f64;
            draw.price[id] = 0.5 * (draw.price[id] + price);
        }
        worth = sums.estimate(typical, tuning.pull, tuning.caution);
    }
    worth
}

impl Draw {
    fn new(typical: &[Typical]) -> Self {
        let mut entries: Vec<(Shape, f64)> = typical.iter().map(|t| (t.shape, t.share)).collect();
        let (mut cores, mut gpus) = (0.0, 0.0);
        for Typical { shape, share } in typical.iter().filter(|t| t.shape.gpus > 0) {
            cores += share * f64::from(shape.cpu_milli);
            gpus += share * shape.gpu_total() as f64 / f64::from(WHOLE);
        }
        if gpus > 0.0 {
            for (gpus_each, share) in RARE {
                let cpu_milli = (cores / gpus * f64::from(gpus_each)) as i32;
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

/// Fills the fleet once and adds what became of each device.
fn fill(
    nodes: Vec<Node>,
    draw: &Draw,
    worth: &Worth,
    tuning: &Tuning,
    rng: &mut Rng,
    sums: &mut Sums,
    late: &mut [(f64, f64)],
) {
    let mut charged = vec![[0.0f32; GPUS_MAX]; nodes.len()];
    let mut seen = Vec::with_capacity(PERIODS.len());
    let mut dispatcher = Dispatcher::new(nodes, worth, tuning, &draw.shapes);
    while dispatcher.arrived() < FILL_TO {
        while PERIODS.get(seen.len()).is_some_and(|&start| dispatcher.arrived() >= start) {
            seen.push((dispatcher.nodes().to_vec(), charged.clone()));
        }
        let id = draw.next(rng);
        let astray = rng.unit() < tuning.explore;
        let strayed = astray.then(|| stray(dispatcher.nodes(), &draw.shapes[id], rng)).flatten();
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
    let grid = sums.grid().clone();
    for (period, (before, charged_before)) in seen.iter().enumerate() {
        for (at, node) in before.iter().enumerate() {
            grid.visit(node, period, |device, cell| {
                let price = charged[at][device] - charged_before[at][device];
                let wasted = f64::from(last[at].gpu[device]);
                sums.add(cell, wasted + tuning.price_weight * f64::from(price));
            });
        }
    }
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
