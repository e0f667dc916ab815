//! A workload in words: the fleet, who submits what and when, and what fails.
//!
//! [`Workload`] is the shape of a workload file. Durations carry their unit (`30s`, `4h`, `30d`).

mod check;
mod fleet;
mod generate;
mod presets;
mod values;

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

pub use fleet::nodes;
pub use generate::Generator;
pub use presets::{PRESETS, Preset};
pub use values::{Count, Duration, Part, Rate};

/// A whole workload.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    /// Its name in reports.
    pub name: String,
    /// One sentence about it.
    #[serde(default)]
    pub about: String,
    /// How long jobs arrive.
    pub lasts: Duration,
    /// What happens then.
    #[serde(default)]
    pub after: After,
    /// The scheduler looks at most once in this time.
    #[serde(default = "second")]
    pub cycle: Duration,
    /// The machines.
    pub fleet: Vec<NodeGroup>,
    /// When jobs arrive.
    pub arrivals: Arrivals,
    /// The queues; none: one queue `default` without limits.
    #[serde(default)]
    pub queues: Vec<Queue>,
    /// What arrives.
    pub classes: Spanned<Vec<Class>>,
    /// What fails, and how long it takes to mend.
    #[serde(default)]
    pub failures: Failures,
    /// How jobs leave when they are asked to.
    #[serde(default)]
    pub eviction: EvictionRules,
}

/// What happens when no more jobs arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum After {
    /// Those that are there run to their end.
    #[default]
    Drain,
    /// The simulation ends.
    Stop,
}

/// Machines of one kind.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeGroup {
    /// How many.
    pub nodes: Count,
    /// GPUs of each.
    pub devices: Count,
    /// The GPUs' model.
    pub model: String,
    /// Memory of a GPU, in GiB.
    #[serde(default = "eighty")]
    pub device_memory_gib: Count,
    /// Cores of a machine.
    #[serde(default = "cores")]
    pub cpus: Count,
    /// Main memory of a machine, in GiB.
    #[serde(default = "memory")]
    pub memory_gib: Count,
    /// The levels of the network above a machine, outermost first.
    #[serde(default = "none")]
    pub levels: Spanned<Vec<Level>>,
}

/// One level of the network.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// Its name.
    pub name: String,
    /// Machines in one domain of it.
    pub nodes: Count,
    /// What a device can send to another in one domain of it, in megabytes per second; 0: not known.
    #[serde(default, rename = "linkMbPerSecond")]
    pub link_mb_per_s: u32,
}

/// How arrivals are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Process {
    /// Independent of each other.
    #[default]
    Poisson,
    /// Poisson with more by day than by night.
    Diurnal,
    /// The same gap after each.
    Even,
    /// All at the start.
    AtOnce,
}

/// When jobs arrive. `jobs` or `load` says how many; with both, durations are stretched so that
/// as many jobs make that load.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Arrivals {
    /// How they are spread.
    #[serde(default)]
    pub process: Process,
    /// How many arrive.
    pub jobs: Option<Count>,
    /// GPU time asked for over GPU time there is, while jobs arrive.
    pub load: Option<Rate>,
    /// The part by which the diurnal rate rises by day and falls by night.
    #[serde(default = "half")]
    pub swing: Part,
    /// Jobs that come together, of one class and size, on average.
    #[serde(default = "one")]
    pub batch: Count,
}

/// A queue.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Queue {
    /// Its name.
    pub name: Spanned<String>,
    /// The queue above it.
    pub parent: Option<Spanned<String>>,
    /// Devices that it may always use, by model or kind.
    #[serde(default)]
    pub quota: BTreeMap<String, u32>,
    /// Its part of what is to spare.
    #[serde(default = "one")]
    pub weight: Count,
    /// Devices that it may borrow; not named: all that are idle.
    pub borrowing_limit: Option<BTreeMap<String, u32>>,
    /// Devices that it lends; not named: all that are idle.
    pub lending_limit: Option<BTreeMap<String, u32>>,
}

/// Jobs of one kind.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Class {
    /// Its name; jobs are named after it.
    pub name: Spanned<String>,
    /// Its part of all jobs, against the other classes'.
    #[serde(default = "part_one")]
    pub share: Rate,
    /// The queues that it is submitted to, each as often; none: `default`.
    #[serde(default)]
    pub queues: Vec<Spanned<String>>,
    /// Higher goes first.
    #[serde(default)]
    pub priority: i32,
    /// Numbers of ranks, each with its weight.
    pub sizes: Spanned<Vec<(Count, Rate)>>,
    /// Consecutive ranks that share a machine; smaller gangs share one whole.
    #[serde(default = "one")]
    pub node_group: Count,
    /// Thousandths of a GPU that each rank gets, each with its weight; none: whole GPUs.
    #[serde(default = "none")]
    pub shares: Spanned<Vec<(Count, Rate)>>,
    /// GPU models that will do, the preferred first; none: any.
    #[serde(default)]
    pub models: Vec<String>,
    /// Cores of each rank.
    #[serde(default)]
    pub cpus: Rate,
    /// Main memory of each rank, in GiB.
    #[serde(default)]
    pub memory_gib: Rate,
    /// How long it works.
    pub duration: Length,
    /// What the scheduler is told about that.
    #[serde(default)]
    pub estimate: Estimate,
    /// How its work is saved; not named: not at all.
    pub checkpoint: Option<Checkpoint>,
    /// Time from launch until the ranks work.
    #[serde(default = "start")]
    pub start: Duration,
    /// The same for every later attempt.
    #[serde(default = "restart")]
    pub restart: Duration,
    /// Where the ranks had better be, or must be.
    #[serde(default)]
    pub topology: Vec<Rule>,
    /// The sizes that it can live with, as parts of the wanted one.
    pub elastic: Option<Sizes>,
    /// Whether it may be preempted.
    #[serde(default = "yes")]
    pub preemptible: bool,
    /// Time from its start in which it is left alone.
    #[serde(default)]
    pub min_runtime: Duration,
    /// Devices kept ready beside it.
    #[serde(default)]
    pub spares: u32,
}

/// How long jobs work.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Length {
    /// Half of them are shorter.
    pub median: Duration,
    /// How much they differ: the deviation of the logarithm; 0: all the same.
    #[serde(default)]
    pub sigma: Rate,
    /// From the median on, a Pareto tail with this exponent instead; smaller is heavier.
    pub tail: Option<Rate>,
    /// None is shorter.
    #[serde(default = "second")]
    pub least: Duration,
    /// None is longer.
    #[serde(default = "month")]
    pub most: Duration,
}

/// What the scheduler is told about a duration.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Estimate {
    /// How far it is off: the deviation of the logarithm; 0: exact.
    pub sigma: Rate,
    /// The part of jobs that say nothing.
    pub missing: Part,
}

impl Default for Estimate {
    fn default() -> Self {
        Self { sigma: Rate(0.0), missing: Part(0.0) }
    }
}

/// How work is saved.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// A duration, or `auto`: the interval that loses least at the workload's failure rates.
    pub every: values::Every,
    /// Time that the ranks stand still for it.
    #[serde(default)]
    pub cost: Duration,
}

/// Where ranks belong together.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The level, or `node`.
    pub level: Spanned<String>,
    /// Consecutive ranks that it is about; 0: all.
    #[serde(default)]
    pub ranks: u32,
    /// Whether the gang waits rather than break it.
    #[serde(default)]
    pub required: bool,
}

/// Sizes as parts of the wanted one.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// The smallest.
    pub least: Part,
    /// The greatest, at least 1.
    pub most: Rate,
}

/// What fails, and how long it takes to mend.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Failures {
    /// Failures of a whole machine, per machine and day.
    pub node_per_day: Rate,
    /// Failures of a device, per device and day.
    pub device_per_day: Rate,
    /// Crashes of a running gang that no machine is to blame for, per machine it uses and day.
    pub software_per_node_day: Rate,
    /// Mean time until a machine is back.
    pub node_repair: Duration,
    /// Mean time until a device is back.
    pub device_repair: Duration,
    /// Time until a failure is noticed and the gang taken down.
    pub detect: Duration,
    /// Wait before a gang that failed may start again.
    pub backoff: Duration,
    /// The part of machines that fail more often.
    pub lemons: Part,
    /// How much more often.
    pub lemon_factor: Rate,
}

impl Default for Failures {
    fn default() -> Self {
        Self {
            node_per_day: Rate(0.0),
            device_per_day: Rate(0.0),
            software_per_node_day: Rate(0.0),
            node_repair: Duration(4 * 3_600_000),
            device_repair: Duration(12 * 3_600_000),
            detect: Duration(30_000),
            backoff: Duration(0),
            lemons: Part(0.0),
            lemon_factor: Rate(1.0),
        }
    }
}

/// How jobs leave when they are asked to.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvictionRules {
    /// Time that a job is given: it saves its work if a checkpoint takes no longer, and may end
    /// its work if that takes no longer.
    pub grace: Duration,
    /// Time that a job which cannot save needs to leave.
    pub exit: Duration,
    /// Whether jobs save their work when they are asked to leave.
    pub saves: bool,
}

impl Default for EvictionRules {
    fn default() -> Self {
        Self { grace: Duration(30_000), exit: Duration(2_000), saves: true }
    }
}

fn none<T>() -> Spanned<Vec<T>> {
    Spanned::new(0..0, Vec::new())
}
const fn second() -> Duration {
    Duration(1000)
}
const fn month() -> Duration {
    Duration(30 * 86_400_000)
}
const fn start() -> Duration {
    Duration(30_000)
}
const fn restart() -> Duration {
    Duration(120_000)
}
const fn one() -> Count {
    Count(1)
}
const fn eighty() -> Count {
    Count(80)
}
const fn cores() -> Count {
    Count(128)
}
const fn memory() -> Count {
    Count(2048)
}
const fn half() -> Part {
    Part(0.5)
}
const fn part_one() -> Rate {
    Rate(1.0)
}
const fn yes() -> bool {
    true
}
