//! What every kind of work shares: how many ranks, on which devices, in which split.

use drumline_types::{Bytes, QueueName};
use serde::{Deserialize, Serialize};

/// The kind of device that a rank runs on.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A CPU device: a share of a node's cores.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Gpu,
}

impl DeviceKind {
    /// Returns the word used in manifests, APIs and labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
        }
    }
}

/// How a model is split over ranks. Rank order is tensor, pipeline, data, innermost first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parallelism {
    /// Ranks that share each layer's matrices.
    pub tensor: u32,
    /// Stages that the layers are divided into.
    pub pipeline: u32,
    /// Copies of the model that share the batch.
    pub data: u32,
}

impl Parallelism {
    /// The split of one rank.
    pub const SINGLE: Self = Self { tensor: 1, pipeline: 1, data: 1 };

    /// Returns the number of ranks.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        self.tensor * self.pipeline * self.data
    }
}

/// How often and how fast a gang is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// Restarts allowed without progress in between; 0 forbids any.
    pub limit: u32,
    /// Wait before the first restart without progress, in milliseconds; it doubles with each.
    pub backoff_ms: u64,
}

/// A range of consecutive ranks that belong together in the topology.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TopologyRule {
    /// Every run of this many consecutive ranks (0 to n-1, n to 2n-1, ...) is inside one domain of
    /// `level`. 0: the whole gang.
    pub ranks: u32,
    /// The level, as nodes name it (`rack`, `zone`, ...), or `node`.
    pub level: String,
    /// True: the gang waits rather than break the rule. False: the fewest domains that can be had.
    pub required: bool,
}

/// The sizes that a gang may run at, in ranks. Its wanted size is [`Gang::ranks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Elastic {
    /// The smallest size that is worth starting.
    pub least: u32,
    /// The greatest size that it can use.
    pub most: u32,
    /// Sizes are multiples of this: the ranks of one copy of the model.
    pub step: u32,
}

/// A taint that a gang endures.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Toleration {
    /// The taint's key.
    pub key: String,
    /// The taint's value; `None`: any.
    pub value: Option<String>,
}

/// The whole of a device, in thousandths.
pub const WHOLE_DEVICE: u32 = 1000;

/// The gang that a job needs: all of it at once, or nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Gang {
    /// Number of ranks, at least 1. One device each.
    pub ranks: u32,
    /// Consecutive ranks that must share a node: the tensor group.
    pub node_group: u32,
    /// The kind of device that each rank gets.
    pub device: DeviceKind,
    /// The kind of device that rank 0 gets, where it only leads.
    pub leader: Option<DeviceKind>,
    /// Device models that will do, the preferred first. Empty: any whole one. A gang gets
    /// devices of one model.
    pub models: Vec<String>,
    /// The share of its device that each rank gets, in thousandths, at most [`WHOLE_DEVICE`].
    pub share_milli: u32,
    /// Processor time that each rank gets, in thousandths of a core.
    pub cpu_milli: u64,
    /// Main memory that each rank gets.
    pub memory: Bytes,
    /// Where ranks must, or had better, be together; outermost wish first.
    pub topology: Vec<TopologyRule>,
    /// The sizes that it may run at; `None`: only its own.
    pub elastic: Option<Elastic>,
    /// Devices to keep ready beside the gang for when one of its own fails; lent meanwhile to jobs
    /// that can be ended at once.
    pub spares: u32,
    /// Taints that it endures.
    pub tolerations: Vec<Toleration>,
}

impl Default for Gang {
    /// One rank on one whole CPU device, wherever.
    fn default() -> Self {
        Self {
            ranks: 1,
            node_group: 1,
            device: DeviceKind::Cpu,
            leader: None,
            models: Vec::new(),
            share_milli: WHOLE_DEVICE,
            cpu_milli: 0,
            memory: Bytes(0),
            topology: Vec::new(),
            elastic: None,
            spares: 0,
            tolerations: Vec::new(),
        }
    }
}

/// How often a job may be disrupted by the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisruptionBudget {
    /// At most this many disruptions ...
    pub count: u32,
    /// ... within this time, in milliseconds.
    pub per_ms: u64,
}

/// Scheduling settings that every kind of work has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GangSettings {
    /// The queue that pays.
    pub queue: QueueName,
    /// Higher goes first.
    pub priority: i32,
    /// Restarts of the gang.
    pub restarts: RestartPolicy,
    /// Longest time between two finished steps before the watchdog ends the attempt, in
    /// milliseconds. 0: no watchdog.
    pub stall_timeout_ms: u64,
    /// Longest time from launch until every rank has joined, in milliseconds.
    pub start_timeout_ms: u64,
    /// How long the job is expected to run in all, in milliseconds; it may be wrong.
    #[serde(default)]
    pub expected_ms: Option<u64>,
    /// Time from its start in which it is not preempted, reclaimed or moved, in milliseconds.
    #[serde(default)]
    pub min_runtime_ms: u64,
    /// Whether it may be preempted at all.
    #[serde(default = "yes")]
    pub preemptible: bool,
    /// How often it may be disrupted; `None`: no limit.
    #[serde(default)]
    pub disruptions: Option<DisruptionBudget>,
}

impl Default for GangSettings {
    /// The settings of a manifest that names none.
    fn default() -> Self {
        Self {
            queue: QueueName::default_queue(),
            priority: 0,
            restarts: RestartPolicy { limit: 3, backoff_ms: 1000 },
            stall_timeout_ms: 0,
            start_timeout_ms: 60_000,
            expected_ms: None,
            min_runtime_ms: 0,
            preemptible: true,
            disruptions: None,
        }
    }
}

const fn yes() -> bool {
    true
}
