//! Draws the jobs of a workload, one after the other in the order of their arrival.

use drumline_spec::{
    DeviceKind, Elastic, Gang, GangSettings, Parallelism, RestartPolicy, TopologyRule, WHOLE_DEVICE,
};
use drumline_types::{Bytes, JobId, QueueName};

use crate::draw::Draw;
use crate::job::{Job, Saves};
use crate::workload::values::{Count, Every, Rate};
use crate::workload::{Class, Failures, Process, Workload};

const ARRIVALS: u64 = 1;
const SHAPES: u64 = 2;
const SAMPLE: u64 = 3;
const DAY_MS: f64 = 86_400_000.0;
/// Jobs that the load is estimated from.
const SAMPLED: u32 = 40_000;

/// The jobs of a workload.
#[derive(Debug, Clone)]
pub struct Generator {
    workload: Workload,
    arrivals: Draw,
    shapes: Draw,
    /// Mean time between two submissions, in milliseconds.
    gap: f64,
    /// Durations are stretched by this.
    stretch: f64,
    limit: u64,
    drawn: u64,
    at: f64,
    /// The class and size of the batch that arrives, and how many are left of it.
    batch: Option<(usize, u32, u32)>,
}

impl Generator {
    /// Starts to draw the jobs of a workload.
    #[must_use]
    pub fn new(workload: &Workload, seed: u64) -> Self {
        let lasts = workload.lasts.0 as f64;
        let capacity = capacity_milli(workload) as f64 * lasts;
        let arrivals = &workload.arrivals;
        let (count, stretch) = match (arrivals.jobs, arrivals.load) {
            (Some(jobs), None) => (f64::from(jobs.0), 1.0),
            (None, Some(load)) => (load.0 * capacity / mean_use(workload, seed, 1.0), 1.0),
            (Some(jobs), Some(load)) => {
                let target = load.0 * capacity / f64::from(jobs.0);
                (f64::from(jobs.0), stretch(workload, seed, target))
            }
            (None, None) => (0.0, 1.0),
        };
        let count = count.clamp(0.0, f64::from(u32::MAX));
        Self {
            arrivals: Draw::new(seed, ARRIVALS),
            shapes: Draw::new(seed, SHAPES),
            gap: lasts / count.max(1.0) * f64::from(arrivals.batch.0),
            stretch,
            limit: match arrivals.jobs {
                Some(jobs) => u64::from(jobs.0),
                None if arrivals.process == Process::AtOnce => count as u64,
                None => u64::MAX,
            },
            drawn: 0,
            at: 0.0,
            batch: None,
            workload: workload.clone(),
        }
    }

    /// Moves the time on to the next submission.
    fn step(&mut self) {
        let gap = self.gap;
        self.at += match self.workload.arrivals.process {
            Process::AtOnce => 0.0,
            Process::Even => gap,
            Process::Poisson => self.arrivals.exponential(gap),
            Process::Diurnal => {
                // Least at midnight, when the simulation starts.
                let phase = std::f64::consts::TAU * (self.at / DAY_MS - 0.25);
                let swing = self.workload.arrivals.swing.0.min(0.95);
                self.arrivals.exponential(gap) / (1.0 + swing * phase.sin())
            }
        };
    }
}

impl Iterator for Generator {
    type Item = Job;

    fn next(&mut self) -> Option<Job> {
        if self.drawn >= self.limit {
            return None;
        }
        let (class, ranks) = match self.batch.take() {
            Some((class, ranks, left)) => {
                self.batch = (left > 1).then_some((class, ranks, left - 1));
                (class, ranks)
            }
            None => {
                self.step();
                let classes = self.workload.classes.get_ref();
                let class = self.shapes.pick(classes.iter().map(|class| class.share.0));
                let ranks = pick(&mut self.shapes, classes[class].sizes.get_ref(), 1);
                let mean = f64::from(self.workload.arrivals.batch.0);
                if mean > 1.0 {
                    // Geometric, with this mean.
                    let more = self.shapes.exponential(1.0) / -(1.0 - 1.0 / mean).ln();
                    self.batch = (more >= 1.0).then_some((class, ranks, more as u32));
                }
                (class, ranks)
            }
        };
        // Where the number is given, chance may carry the last ones past the end: they still come.
        if self.limit == u64::MAX && self.at >= self.workload.lasts.0 as f64 {
            return None;
        }
        self.drawn += 1;
        let class = &self.workload.classes.get_ref()[class];
        let work_ms = duration(&mut self.shapes, class, self.stretch);
        let id = format!("{}-{:07}", class.name.get_ref(), self.drawn);
        let failures = &self.workload.failures;
        Some(Job {
            // The class's name was checked to make legal ids.
            id: id.parse::<JobId>().ok()?,
            arrives: self.at as u64,
            gang: gang(&mut self.shapes, class, ranks),
            split: split(class, ranks),
            settings: settings(&mut self.shapes, class, work_ms),
            work_ms,
            start_ms: class.start.0,
            restart_ms: class.restart.0,
            saves: saves(class, ranks, failures, &self.workload),
        })
    }
}

/// Returns the GPU thousandths of the fleet.
fn capacity_milli(workload: &Workload) -> u64 {
    let devices = |g: &crate::workload::NodeGroup| u64::from(g.nodes.0) * u64::from(g.devices.0);
    workload.fleet.iter().map(devices).sum::<u64>() * u64::from(WHOLE_DEVICE)
}

/// Returns the mean GPU time of a job, in thousandths of a GPU times milliseconds.
fn mean_use(workload: &Workload, seed: u64, stretch: f64) -> f64 {
    let mut draw = Draw::new(seed, SAMPLE);
    let classes = workload.classes.get_ref();
    let mut sum = 0.0;
    for _ in 0..SAMPLED {
        let class = &classes[draw.pick(classes.iter().map(|class| class.share.0))];
        let ranks = pick(&mut draw, class.sizes.get_ref(), 1);
        let work = duration(&mut draw, class, stretch) as f64;
        let share = pick(&mut draw, class.shares.get_ref(), WHOLE_DEVICE);
        sum += f64::from(ranks) * f64::from(share) * work;
    }
    (sum / f64::from(SAMPLED)).max(1.0)
}

/// Finds the stretch of durations that makes the mean use this.
fn stretch(workload: &Workload, seed: u64, target: f64) -> f64 {
    let mut stretch = 1.0;
    for _ in 0..12 {
        // Bounds on durations bend the curve, so that one step is not enough.
        stretch *= (target / mean_use(workload, seed, stretch)).clamp(0.01, 100.0);
    }
    stretch
}

fn pick(draw: &mut Draw, choices: &[(Count, Rate)], default: u32) -> u32 {
    if choices.is_empty() {
        return default;
    }
    let at = draw.pick(choices.iter().map(|(_, weight)| weight.0));
    choices.get(at).map_or(default, |(value, _)| value.0)
}

fn duration(draw: &mut Draw, class: &Class, stretch: f64) -> u64 {
    let length = &class.duration;
    let median = length.median.0 as f64;
    let drawn = draw.log_normal(median, length.sigma.0);
    let drawn = match length.tail {
        // Above the median the tail takes over.
        Some(alpha) if drawn > median => draw.pareto(median, alpha.0.max(0.1)),
        _ => drawn,
    };
    (drawn * stretch).clamp(length.least.0.max(1) as f64, length.most.0.max(1) as f64) as u64
}

fn node_group(class: &Class, ranks: u32) -> u32 {
    class.node_group.0.min(ranks)
}

fn split(class: &Class, ranks: u32) -> Parallelism {
    let tensor = node_group(class, ranks);
    Parallelism { tensor, pipeline: 1, data: ranks / tensor.max(1) }
}

fn gang(draw: &mut Draw, class: &Class, ranks: u32) -> Gang {
    let group = node_group(class, ranks);
    let sizes = |part: f64| ((f64::from(ranks) * part / f64::from(group)) as u32).max(1) * group;
    Gang {
        ranks,
        node_group: group,
        device: DeviceKind::Gpu,
        models: class.models.clone(),
        share_milli: pick(draw, class.shares.get_ref(), WHOLE_DEVICE),
        cpu_milli: (class.cpus.0 * 1000.0) as u64,
        memory: Bytes((class.memory_gib.0 * (1u64 << 30) as f64) as u64),
        topology: class
            .topology
            .iter()
            .filter(|rule| rule.ranks == 0 || ranks.is_multiple_of(rule.ranks))
            .map(|rule| TopologyRule {
                ranks: rule.ranks,
                level: rule.level.get_ref().clone(),
                required: rule.required,
            })
            .collect(),
        elastic: class.elastic.map(|elastic| Elastic {
            least: sizes(elastic.least.0),
            most: sizes(elastic.most.0),
            step: group,
        }),
        spares: class.spares,
        ..Gang::default()
    }
}

fn settings(draw: &mut Draw, class: &Class, work_ms: u64) -> GangSettings {
    let missing = draw.unit() < class.estimate.missing.0;
    let told = draw.log_normal(work_ms as f64, class.estimate.sigma.0);
    let queue = match class.queues.as_slice() {
        [] => None,
        queues => queues.get(draw.below(queues.len() as u64) as usize),
    };
    let queue = queue.and_then(|queue| queue.get_ref().parse::<QueueName>().ok());
    GangSettings {
        queue: queue.unwrap_or_else(QueueName::default_queue),
        priority: class.priority,
        restarts: RestartPolicy { limit: u32::MAX, backoff_ms: 0 },
        expected_ms: (!missing).then_some((told as u64).max(1000)),
        min_runtime_ms: class.min_runtime.0,
        preemptible: class.preemptible,
        ..GangSettings::default()
    }
}

/// Returns how a job saves its work. `auto` is the interval of Young (1974): the square root of
/// twice the cost times the mean time between the failures that end the gang.
fn saves(class: &Class, ranks: u32, failures: &Failures, workload: &Workload) -> Option<Saves> {
    const LEAST_MS: f64 = 60_000.0;
    const MOST_MS: f64 = 4.0 * 3_600_000.0;
    let checkpoint = class.checkpoint.as_ref()?;
    let cost_ms = checkpoint.cost.0;
    let every_ms = match checkpoint.every {
        Every::Fixed(every) => every.0,
        Every::Auto => {
            let devices = workload.fleet.first().map_or(1, |group| group.devices.0);
            let nodes = f64::from(ranks.div_ceil(devices));
            let lemons = failures.lemons.0;
            let factor = 1.0 - lemons + lemons * failures.lemon_factor.0;
            let per_node = failures.node_per_day.0 * factor + failures.software_per_node_day.0;
            let per_day = nodes * per_node + f64::from(ranks) * failures.device_per_day.0 * factor;
            let between = if per_day > 0.0 { DAY_MS / per_day } else { f64::INFINITY };
            (2.0 * cost_ms.max(1000) as f64 * between).sqrt().clamp(LEAST_MS, MOST_MS) as u64
        }
    };
    Some(Saves { every_ms, cost_ms })
}
