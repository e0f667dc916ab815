//! What a simulation found, in the shape that `--output json` prints.

mod csv;
mod html;
mod plot;
mod table;

use drumline_types::Reason;
use serde::Serialize;

use crate::measure::timeline::Point;
use crate::measure::{Cause, Share, Stats};
use crate::scenario::Scenario;

pub use csv::files;
pub use html::html;
pub use table::table;

/// Several policies on the same events.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The workload's name.
    pub workload: String,
    /// What was drawn was drawn from this.
    pub seed: u64,
    /// Machines.
    pub nodes: u64,
    /// Devices that hours are counted of.
    pub devices: u64,
    /// One entry per policy, in the order asked for.
    pub policies: Vec<PolicyReport>,
}

impl Report {
    /// Joins what several policies made of a scenario.
    #[must_use]
    pub fn new(scenario: &Scenario, policies: Vec<PolicyReport>) -> Self {
        let devices = scenario.nodes.iter().flat_map(|node| &node.devices);
        Self {
            workload: scenario.name.clone(),
            seed: scenario.seed,
            nodes: scenario.nodes.len() as u64,
            devices: devices.filter(|device| device.kind == scenario.counted).count() as u64,
            policies,
        }
    }
}

/// Why a simulation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Ending {
    /// Every job has ended.
    Done,
    /// The time that the workload lasts is over.
    Lasted,
    /// Jobs wait that will never start.
    Stuck,
    /// Jobs were still there after many times the time that the workload lasts.
    TimedOut,
    /// It was stopped from outside: the figures are of what had happened by then.
    Stopped,
}

impl Ending {
    /// Returns the words of a report.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Done => "every job has ended",
            Self::Lasted => "the time was over",
            Self::Stuck => "those that wait will never start",
            Self::TimedOut => "jobs made no progress",
            Self::Stopped => "stopped early; figures so far",
        }
    }
}

/// How many of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Jobs that arrived.
    pub arrived: u64,
    /// Jobs that ended.
    pub finished: u64,
    /// Jobs that held devices in the end.
    pub running: u64,
    /// Jobs that waited in the end.
    pub waiting: u64,
    /// Starts after the first.
    pub restarts: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Machines that failed.
    pub node_failures: u64,
    /// Devices that failed.
    pub device_failures: u64,
    /// Gangs that crashed of themselves.
    pub software_failures: u64,
}

/// Gangs that the scheduler asked to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Evictions {
    /// For a job of higher priority.
    pub preempted: u64,
    /// For the queue that lent the devices.
    pub reclaimed: u64,
    /// From devices that were kept ready for another gang.
    pub recalled: u64,
    /// So that a scattered gang fits.
    pub consolidated: u64,
    /// To start at another size.
    pub resized: u64,
    /// From what must be emptied.
    pub drained: u64,
}

impl Evictions {
    /// Returns all of them.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.preempted
            + self.reclaimed
            + self.recalled
            + self.consolidated
            + self.resized
            + self.drained
    }
}

/// Jobs that the whole fleet, idle, could not hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Impossible {
    /// How many.
    pub count: u64,
    /// The first of them, with why.
    pub names: Vec<String>,
}

/// Jobs of one size.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SizeReport {
    /// The size, in ranks.
    pub ranks: String,
    /// From arrival to the first start, in seconds.
    pub wait: Stats,
    /// From arrival to the end, in seconds.
    pub completion: Stats,
    /// Time in which they made progress that was kept, over time since their first start.
    pub effective_time: Option<f64>,
}

/// Device-hours by cause.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LostHours {
    /// The cause.
    pub cause: Cause,
    /// Device-hours.
    pub hours: f64,
    /// Over all device-hours that there were.
    pub share: f64,
}

/// A reason that waiting jobs were told.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ReasonShare {
    /// The reason.
    pub reason: Reason,
    /// Time for which jobs were told it, over all such time.
    pub share: f64,
}

/// What one policy made of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyReport {
    /// The policy.
    pub policy: String,
    /// Why it ended.
    pub ending: Ending,
    /// Virtual time, in hours.
    pub simulated_hours: f64,
    /// From the start to the end of the last job that ended, in hours.
    pub makespan_hours: f64,
    /// How many of each.
    #[serde(flatten)]
    pub counts: Counts,
    /// Jobs that can never start. They arrive like the others.
    pub impossible: Impossible,
    /// The first of the jobs that had not started in the end.
    pub never_started: Vec<String>,
    /// From arrival to the first start, in seconds.
    pub wait: Stats,
    /// From arrival to the end, in seconds.
    pub completion: Stats,
    /// The same by size.
    pub sizes: Vec<SizeReport>,
    /// Devices held over devices, mean.
    pub allocation: f64,
    /// Devices whose ranks work over devices, mean.
    pub utilization: f64,
    /// Idle devices on machines that hold something else, over idle devices, mean.
    pub fragmentation: f64,
    /// Effective training time ratio: time in which jobs made progress that was kept, over time
    /// since their first start, weighted by ranks.
    pub effective_time: Option<f64>,
    /// Where every device-hour went.
    pub device_hours: Vec<LostHours>,
    /// The sum of these: devices times time.
    pub capacity_hours: f64,
    /// Gangs that were asked to leave.
    pub evictions: Evictions,
    /// Jain's index of used over entitled hours.
    pub fairness: f64,
    /// Used against entitled hours by queue.
    pub queues: Vec<Share>,
    /// What waiting jobs were told.
    pub reasons: Vec<ReasonShare>,
    /// Looks of the scheduler.
    pub cycles: u64,
    /// Waiting jobs looked at in all of them.
    pub considered: u64,
    /// Means over time.
    pub timeline: Vec<Point>,
    /// Real time that it took, in seconds; the only figure that another run changes.
    pub seconds: f64,
}

/// Formats seconds for people.
pub(crate) fn seconds(seconds: f64) -> String {
    if seconds < 1.0 && seconds > 0.0 {
        format!("{:.0}ms", seconds * 1000.0)
    } else {
        drumline_types::units::format_duration_ms((seconds * 1000.0).round() as u64)
    }
}

/// Formats a part of one for people.
pub(crate) fn percent(part: f64) -> String {
    format!("{:.2}%", part * 100.0)
}

/// The rows of the summary: what it is, and its value for one policy.
pub(crate) fn summary(report: &PolicyReport) -> Vec<(&'static str, String)> {
    let hours = |hours: f64| seconds(hours * 3600.0);
    let stats =
        |stats: &Stats| [stats.mean, stats.p50, stats.p90, stats.p99].map(seconds).join(" / ");
    let counts = &report.counts;
    vec![
        ("jobs finished", format!("{} of {}", counts.finished, counts.arrived)),
        ("running, waiting", format!("{}, {}", counts.running, counts.waiting)),
        ("can never start", report.impossible.count.to_string()),
        ("wait: mean / p50 / p90 / p99", stats(&report.wait)),
        ("completion: mean / p50 / p90 / p99", stats(&report.completion)),
        ("makespan", hours(report.makespan_hours)),
        ("allocation", percent(report.allocation)),
        ("utilization", percent(report.utilization)),
        ("fragmentation of idle devices", percent(report.fragmentation)),
        ("effective training time", report.effective_time.map_or("-".to_owned(), percent)),
        ("fairness (Jain)", format!("{:.3}", report.fairness)),
        ("evictions", report.evictions.all().to_string()),
        ("  preempted", report.evictions.preempted.to_string()),
        ("  reclaimed", report.evictions.reclaimed.to_string()),
        ("  recalled", report.evictions.recalled.to_string()),
        ("  moved", report.evictions.consolidated.to_string()),
        ("  resized", report.evictions.resized.to_string()),
        (
            "failures: machines, devices, crashes",
            format!(
                "{}, {}, {}",
                counts.node_failures, counts.device_failures, counts.software_failures
            ),
        ),
        ("restarts", counts.restarts.to_string()),
        ("ended because", report.ending.words().to_owned()),
    ]
}
