//! What every kind of work shares: how many ranks, on which devices, in which split.

use drumline_types::QueueName;
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

/// The gang that a job needs: all of it at once, or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gang {
    /// Number of ranks, at least 1. One device each.
    pub ranks: u32,
    /// Consecutive ranks that must share a node: the tensor group.
    pub node_group: u32,
    /// The kind of device that each rank gets.
    pub device: DeviceKind,
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
}
