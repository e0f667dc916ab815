//! What a leftover will finally be wasted: a table by time, GPU model, cores at hand and remainder.

use crate::openb::fleet::Node;
use crate::openb::input::{GPUS_MAX, WHOLE};
use crate::openb::policy::drumline::Tuning;
use crate::openb::policy::fill::{Fill, PARTS};
use crate::openb::policy::rest::Rest;
use crate::openb::typical::Typical;

/// Where the periods start, in GPU demand that has arrived over capacity. Finer where the fleet
/// fills up and what remains of a device changes its prospects quickly.
pub const PERIODS: [f64; 10] = [0.0, 0.4, 0.6, 0.7, 0.8, 0.86, 0.92, 0.97, 1.03, 1.15];
/// Most idle devices on a node that the table tells apart.
const IDLE_MAX: usize = 8;

/// Returns the period that a moment is in.
#[must_use]
pub fn period(arrived: f64) -> usize {
    PERIODS.partition_point(|&start| start <= arrived).max(1) - 1
}

/// The cells of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// Thousandths of a core per device at which the next column starts.
    cores: Vec<f64>,
    models: usize,
}

/// Kinds of device within a cell of the grid: partly used by remainder, then idle by number.
const KINDS: usize = PARTS + IDLE_MAX + 1;
/// Levels of free cores that the table tells apart, of nodes with and without an idle device.
const CORE_LEVELS: usize = 33;
/// Thousandths of a core in one level.
const CORE_STEP: i32 = 4_000;
/// The place that [`Grid::visit`] gives to a node's free cores.
pub const CORES: usize = GPUS_MAX;

impl Grid {
    /// Chooses columns where typical pods begin to fit, and fills gaps of more than a fifth.
    #[must_use]
    pub fn new(typical: &[Typical], models: usize) -> Self {
        let mut steps: Vec<f64> = typical
            .iter()
            .filter(|t| t.shape.gpus > 0)
            .map(|t| f64::from(t.shape.cpu_milli) / f64::from(t.shape.gpus))
            .filter(|&cores| cores >= 500.0)
            .collect();
        steps.extend([1_000.0, 32_000.0]);
        steps.sort_by(f64::total_cmp);
        let mut cores: Vec<f64> = Vec::new();
        for step in steps {
            match cores.last().copied() {
                Some(last) if step < last * 1.03 => {}
                Some(mut last) => {
                    while step > last * 1.2 {
                        last *= 1.15;
                        cores.push(last);
                    }
                    if step >= last * 1.03 {
                        cores.push(step);
                    }
                }
                None => cores.push(step),
            }
        }
        Self { cores, models }
    }

    /// Returns the number of cells.
    #[must_use]
    pub fn len(&self) -> usize {
        self.devices() + PERIODS.len() * self.models * CORE_LEVELS * 2
    }

    /// Returns the number of cells for devices; those for free cores follow.
    fn devices(&self) -> usize {
        PERIODS.len() * self.stride()
    }

    /// Returns how many cells a period has for devices: the same device one period earlier is so
    /// many cells before.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.models * self.columns() * KINDS
    }

    /// Returns whether there is no cell.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn columns(&self) -> usize {
        self.cores.len() + 1
    }

    fn column(&self, cores: f64) -> usize {
        self.cores.partition_point(|&edge| edge <= cores)
    }

    /// Returns the least cores per device of a column.
    fn floor(&self, column: usize) -> f64 {
        if column == 0 { 0.0 } else { self.cores[column - 1] }
    }

    /// Calls `each` with (place, cell) for every device of a node that has something left, and
    /// with [`CORES`] for its free cores.
    pub fn visit(&self, node: &Node, period: usize, mut each: impl FnMut(usize, usize)) {
        let idle = node.idle();
        let cores = f64::from(node.cpu);
        // An idle device shares the cores with its like; what is partly used gets what they leave.
        let per_idle = self.column(cores / idle.max(1) as f64);
        let per_part = self.column(if idle > 0 {
            cores / (idle as f64 + 0.5)
        } else {
            let open = node.devices().iter().filter(|&&left| left >= OPEN_MILLI).count();
            cores / (0.5 + 0.5 * open.max(1) as f64)
        });
        let model = node.model.trailing_zeros() as usize;
        let level = ((node.cpu.max(0) / CORE_STEP) as usize).min(CORE_LEVELS - 1);
        let level = level + CORE_LEVELS * usize::from(idle > 0);
        each(CORES, self.devices() + (period * self.models + model) * CORE_LEVELS * 2 + level);
        for (place, &left) in node.devices().iter().enumerate() {
            if left == WHOLE {
                each(place, self.cell(period, model, per_idle, PARTS + idle.min(IDLE_MAX)));
            } else if left > 0 {
                let part = usize::from(left) * PARTS / usize::from(WHOLE);
                each(place, self.cell(period, model, per_part, part));
            }
        }
    }

    fn cell(&self, period: usize, model: usize, column: usize, kind: usize) -> usize {
        ((period * self.models + model) * self.columns() + column) * KINDS + kind
    }
}

/// A remainder below this is hardly ever used, and leaves its cores to others.
const OPEN_MILLI: u16 = 160;

/// Sums of what became of the devices that were seen in a cell.
#[derive(Debug, Clone)]
pub struct Sums {
    grid: Grid,
    /// (Weight, weighted sum of thousandths finally wasted) per cell.
    cells: Vec<(f64, f64)>,
    /// What a device is taken to waste before any was seen, per cell of one period.
    guesses: Vec<f64>,
}

impl Sums {
    /// Starts with nothing seen, and guesses.
    #[must_use]
    pub fn new(grid: Grid, typical: &[Typical], tuning: &Tuning) -> Self {
        let cells = vec![(0.0, 0.0); grid.len()];
        let fill = Fill::new(typical, grid.models);
        let mut guesses = Vec::with_capacity(grid.models * grid.columns() * KINDS);
        for model in 0..grid.models {
            for column in 0..grid.columns() {
                guesses.extend(fill.wasted(model, tuning.fill_cores * grid.floor(column)));
                let barred = barred(typical, model, grid.floor(column));
                guesses.extend([tuning.caution * barred * f64::from(WHOLE); KINDS - PARTS]);
            }
        }
        Self { grid, cells, guesses }
    }

    /// Returns the cells.
    #[must_use]
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// Adds one device that was in `cell` and finally wasted so much.
    pub fn add(&mut self, cell: usize, wasted_milli: f32) {
        self.cells[cell].0 += 1.0;
        self.cells[cell].1 += f64::from(wasted_milli);
    }

    /// Lets everything seen so far count for `keep` times as much.
    pub fn fade(&mut self, keep: f64) {
        for cell in &mut self.cells {
            cell.0 *= keep;
            cell.1 *= keep;
        }
    }

    /// Estimates each cell: its own mean, drawn towards the mean over all models, and that towards
    /// the guess, each with the weight of so many devices as the tuning says.
    #[must_use]
    pub fn estimate(&self, typical: &[Typical], tuning: &Tuning) -> Worth {
        let grid = self.grid.clone();
        let mut tenths = vec![0; grid.len()];
        for period in 0..PERIODS.len() {
            for column in 0..grid.columns() {
                for kind in 0..KINDS {
                    let pull = if kind < PARTS { tuning.fill_pull } else { tuning.pull };
                    let cells = (0..grid.models).map(|m| grid.cell(period, m, column, kind));
                    let (mut weight, mut sum) = (0.0, 0.0);
                    for cell in cells.clone() {
                        weight += self.cells[cell].0;
                        sum += self.cells[cell].1;
                    }
                    for (model, cell) in cells.enumerate() {
                        let guess = self.guesses[grid.cell(0, model, column, kind)];
                        let pooled = (sum + pull * guess) / (weight + pull);
                        let (own, own_sum) = self.cells[cell];
                        tenths[cell] = to_tenths((own_sum + pull * pooled) / (own + pull));
                    }
                }
            }
        }
        for (cell, (weight, sum)) in self.cells.iter().enumerate().skip(grid.devices()) {
            tenths[cell] = to_tenths(sum / (weight + tuning.pull));
        }
        Worth::new(grid, &tenths, typical)
    }
}

/// Returns the thousandths of a core that typical pods ask for with each GPU, 0 without any.
#[must_use]
pub fn cores_per_gpu(typical: &[Typical]) -> f64 {
    let with_gpus = || typical.iter().filter(|t| t.shape.gpus > 0);
    let cores: f64 = with_gpus().map(|t| t.share * f64::from(t.shape.cpu_milli)).sum();
    let gpus: f64 = with_gpus().map(|t| t.share * t.shape.gpu_total() as f64).sum();
    if gpus > 0.0 { cores * f64::from(WHOLE) / gpus } else { 0.0 }
}

/// Returns the share of typical pods with GPUs that an idle device of this model, with so many
/// thousandths of a core, could not hold.
fn barred(typical: &[Typical], model: usize, cores_milli: f64) -> f64 {
    let (mut all, mut barred) = (0.0, 0.0);
    for Typical { shape, share } in typical.iter().filter(|t| t.shape.gpus > 0) {
        all += share;
        let cores = f64::from(shape.cpu_milli) / f64::from(shape.gpus);
        let fits = shape.models & (1 << model) != 0 && cores_milli >= ENOUGH * cores;
        barred += if fits { 0.0 } else { *share };
    }
    if all > 0.0 { barred / all } else { 0.0 }
}

/// The part of its cores with which a pod is taken to fit: the node's other devices leave some.
const ENOUGH: f64 = 0.7;

/// What is kept for a workload: the thousandths of a GPU that a device is expected to waste.
#[derive(Debug, Clone)]
pub struct Worth {
    grid: Grid,
    wasted: Vec<f32>,
    rest: Rest,
    cores_per_gpu: f64,
}

/// What is kept is whole tenths, so that what is read back is what was learned.
const TENTHS: f32 = 10.0;

fn to_tenths(milli: f64) -> i32 {
    (milli * f64::from(TENTHS)).round() as i32
}

impl Worth {
    /// Takes the values of the cells, in tenths of a thousandth of a GPU.
    #[must_use]
    pub fn new(grid: Grid, tenths: &[i32], typical: &[Typical]) -> Self {
        let wasted = tenths.iter().map(|&tenths| tenths as f32 / TENTHS).collect();
        Self { grid, wasted, rest: Rest::new(typical), cores_per_gpu: cores_per_gpu(typical) }
    }

    /// Returns the values of the cells, in tenths of a thousandth of a GPU.
    #[must_use]
    pub fn tenths(&self) -> Vec<i32> {
        self.wasted.iter().map(|&milli| to_tenths(f64::from(milli))).collect()
    }

    /// Returns the cells.
    #[must_use]
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// Returns the thousandths of a core that typical pods ask for with each GPU.
    #[must_use]
    pub fn cores_per_gpu(&self) -> f64 {
        self.cores_per_gpu
    }

    /// Returns what the typical shapes would leave of a node, each by itself.
    #[must_use]
    pub fn rest(&self, node: &Node) -> f64 {
        self.rest.left(node)
    }

    /// Returns the thousandths of a GPU that a node is expected to waste in the end.
    #[must_use]
    pub fn wasted(&self, node: &Node, period: usize) -> f64 {
        let mut sum = 0.0;
        self.grid.visit(node, period, |_, cell| sum += f64::from(self.wasted[cell]));
        sum
    }
}
