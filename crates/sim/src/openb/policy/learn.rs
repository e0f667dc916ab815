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
use crate::openb::policy::frag::{Fgd, candidates};
use crate::openb::policy::placer::{Placed, Placer};
use crate::openb::policy::worth::{CORES, Grid, PERIODS, Sums, Worth, cores_per_gpu};
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
    /// What a pod of the shape charges the devices that it takes, in thousandths of a GPU.
    price: Vec<f64>,
    /// What a pod of the shape without GPUs credits the node that it lands on.
    credit: Vec<f64>,
}

/// Learns what leftovers on these nodes are worth under typical pods.
#[must_use]
pub fn learn(nodes: &[Node], typical: &[Typical], tuning: &Tuning) -> Worth {
    let models = nodes.iter().map(|n| n.model.trailing_zeros() as usize + 1).max().unwrap_or(1);
    let mut sums = Sums::new(Grid::new(typical, models), typical, tuning);
    let mut draw = Draw::new(typical);
    let mut worth = sums.estimate(typical, tuning);
    let no_gpus = nodes.iter().all(|node| node.gpus == 0);
    if no_gpus || draw.shapes.iter().all(|shape| shape.gpus == 0) {
        return worth;
    }
    let grid = sums.grid().clone();
    let mut room = Room::new(nodes, typical, &draw, tuning);
    let mut tried: Vec<Worth> = Vec::new();
    for round in 0..tuning.rounds {
        let first = round * tuning.fillings;
        let fillings = fill_all(nodes, &draw, &worth, &grid, tuning, |i| {
            Rng::stream(tuning.seed, (first + i) as u64)
        });
        sums.fade(tuning.keep);
        room.adjust(fillings.iter().map(|f| f.no_gpu), tuning);
        if round >= tuning.rounds / 3 {
            tried.push(worth);
        }
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
            let (shape, found) = (&draw.shapes[id], placed / (tried + 1.0));
            draw.price[id] = 0.5 * (draw.price[id] + found * shape.gpu_total() as f64);
            if shape.gpus == 0 && tried > 0.0 {
                // Room is worth something only for pods that would not find other room.
                let lost = 1.0 - placed / tried;
                let credit = lost * room.worth_per_core * f64::from(shape.cpu_milli);
                draw.credit[id] = 0.5 * (draw.credit[id] + credit);
            }
        }
        worth = sums.estimate(typical, tuning);
    }
    // Where all pods without GPUs find room, what was learned last is best. Elsewhere their room
    // and the GPUs are at odds, and the last round need not have met both.
    if !room.scarce {
        return worth;
    }
    choose(worth, tried, nodes, &draw, tuning, &room)
}

/// Chooses what wastes least of that which places enough pods without GPUs, each tried on the
/// arrivals that fragmentation gradient descent was tried on, and with no pod astray.
fn choose(
    last: Worth,
    others: Vec<Worth>,
    nodes: &[Node],
    draw: &Draw,
    tuning: &Tuning,
    room: &Room,
) -> Worth {
    let straight = Tuning { explore: 0.0, ..tuning.clone() };
    let mark = |worth: &Worth| {
        let fillings = fill_all(nodes, draw, worth, worth.grid(), &straight, |i| {
            Rng::stream(!tuning.seed, i as u64)
        });
        let short = room.short(fillings.iter().map(|f| f.no_gpu), tuning.room_spare).max(0.0);
        (short, fillings.iter().map(|f| f.wasted).sum::<f64>())
    };
    let mut best = (mark(&last), last);
    for worth in others {
        let marked = mark(&worth);
        if marked < best.0 {
            best = (marked, worth);
        }
    }
    best.1
}

/// Fills the fleet as often as the tuning says, on all cores.
///
/// Each filling has its own random numbers and the results are in order: the outcome does not
/// depend on the number of threads.
fn fill_all(
    nodes: &[Node],
    draw: &Draw,
    worth: &Worth,
    grid: &Grid,
    tuning: &Tuning,
    rng: impl Fn(usize) -> Rng,
) -> Vec<Filling> {
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..tuning.fillings)
            .map(|i| {
                let rng = rng(i);
                scope.spawn(move || fill(nodes.to_vec(), draw, worth, grid, tuning, rng))
            })
            .collect();
        let joined = started.into_iter().map(|thread| thread.join());
        joined.map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// What one filling of the fleet showed.
struct Filling {
    /// (Cell, thousandths finally wasted, prices charged included) of every device seen.
    seen: Vec<(u32, f32)>,
    /// Per shape, the pods that came late and those of them that found a place.
    late: Vec<(f64, f64)>,
    /// The pods without GPUs.
    no_gpu: Tally,
    /// Thousandths of a GPU left.
    wasted: f64,
}

/// Counts pods without GPUs.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    pods: f64,
    pods_placed: f64,
    cores: f64,
    cores_placed: f64,
}

impl Tally {
    fn count(&mut self, shape: &Shape, placed: bool) {
        if shape.gpus == 0 {
            let (cores, placed) = (f64::from(shape.cpu_milli), f64::from(u8::from(placed)));
            self.pods += 1.0;
            self.pods_placed += placed;
            self.cores += cores;
            self.cores_placed += cores * placed;
        }
    }

    /// Returns the shares that were placed, of pods and of cores.
    fn shares(&self) -> (f64, f64) {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 1.0 };
        (share(self.pods_placed, self.pods), share(self.cores_placed, self.cores))
    }

    fn add(self, other: Self) -> Self {
        Self {
            pods: self.pods + other.pods,
            pods_placed: self.pods_placed + other.pods_placed,
            cores: self.cores + other.cores,
            cores_placed: self.cores_placed + other.cores_placed,
        }
    }
}

/// What room for pods without GPUs is worth.
///
/// GPUs could be filled at the expense of such pods. They shall not fare worse than under
/// fragmentation gradient descent, so the worth rises from nothing until in the fillings they do
/// not.
struct Room {
    /// Thousandths of a GPU for each thousandth of a core.
    worth_per_core: f64,
    /// The least shares of pods and of cores to place.
    least: (f64, f64),
    /// GPUs over cores of the fleet.
    exchange: f64,
    /// Some pods without GPUs found no place.
    scarce: bool,
}

impl Room {
    fn new(nodes: &[Node], typical: &[Typical], draw: &Draw, tuning: &Tuning) -> Self {
        let mut tally = Tally::default();
        for i in 0..tuning.fillings {
            let mut rng = Rng::stream(!tuning.seed, i as u64);
            let mut order = nodes.to_vec();
            rng.shuffle(&mut order);
            let capacity: f64 = order.iter().map(|n| n.gpu_left() as f64).sum();
            let mut arrived = 0.0;
            let fgd = Fgd::new(typical.to_vec());
            let mut placer = Placer::new(order, fgd, draw.shapes.len());
            while arrived < FILL_TO * capacity {
                let id = draw.next(&mut rng);
                // As in a filling, where it decides on going astray: the arrivals are the same.
                rng.unit();
                arrived += draw.shapes[id].gpu_total() as f64;
                let placed = placer.place(id, &draw.shapes[id], 0).is_some();
                tally.count(&draw.shapes[id], placed);
            }
        }
        let cores: f64 = nodes.iter().map(|n| f64::from(n.cpu)).sum();
        let gpus: f64 = nodes.iter().map(|n| n.gpu_left() as f64).sum();
        let exchange = if cores > 0.0 { gpus / cores } else { 0.0 };
        let least = tally.shares();
        let worth_per_core = tuning.room_start * exchange;
        Self { worth_per_core, least, exchange, scarce: least.0 < 1.0 }
    }

    /// Returns by how much too small a share was placed, if it is to be so much above the least.
    fn short(&self, tallies: impl Iterator<Item = Tally>, above: f64) -> f64 {
        let (pods, cores) = tallies.fold(Tally::default(), Tally::add).shares();
        // All of them placed cannot be bettered, whatever the margin asks for.
        let wanted = |least: f64| (least + above).min(1.0);
        (wanted(self.least.0) - pods).max(wanted(self.least.1) - cores)
    }

    /// Follows what a round placed.
    fn adjust(&mut self, tallies: impl Iterator<Item = Tally> + Clone, tuning: &Tuning) {
        let placed = tallies.clone().fold(Tally::default(), Tally::add);
        self.scarce |= placed.pods_placed < placed.pods;
        let step = tuning.room_step * self.short(tallies, tuning.room_margin) * self.exchange;
        self.worth_per_core = (self.worth_per_core + step).max(0.0);
    }
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
        let (price, credit) = (vec![0.0; entries.len()], vec![0.0; entries.len()]);
        let shapes = entries.into_iter().map(|(shape, _)| shape).collect();
        Self { shapes, cumulative, price, credit }
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
    let mut no_gpu = Tally::default();
    let mut charged = vec![[0.0f32; GPUS_MAX + 1]; nodes.len()];
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
        no_gpu.count(&draw.shapes[id], placed.is_some());
        if dispatcher.arrived() > LATE {
            late[id].0 += 1.0;
            late[id].1 += f64::from(u8::from(placed.is_some()));
        }
        if let Some(placed) = placed {
            charge(&mut charged, &dispatcher, placed, draw.price[id], draw.shapes[id].gpus);
            charged[placed.node][CORES] -= draw.credit[id] as f32;
        }
    }
    let last = dispatcher.nodes();
    let mut seen = Vec::new();
    for (period, (before, charged_before)) in looks.iter().enumerate() {
        for (at, node) in before.iter().enumerate() {
            grid.visit(node, period, |device, cell| {
                let charged = charged[at][device] - charged_before[at][device];
                let cost = match last[at].gpu.get(device) {
                    Some(&left) => f32::from(left) + tuning.price_weight as f32 * charged,
                    None => charged,
                };
                seen.push((cell as u32, cost));
            });
        }
    }
    let wasted = last.iter().map(|node| node.gpu_left() as f64).sum();
    Filling { seen, late, no_gpu, wasted }
}

/// Charges a pod's price to the devices that it took.
fn charge(
    charged: &mut [[f32; GPUS_MAX + 1]],
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
