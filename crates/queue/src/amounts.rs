//! What is told of a queue's use: what is short, its share, and its past.

use drumline_spec::DeviceKind;
use drumline_types::{QueueName, Timestamp};
use serde::{Deserialize, Serialize};

use crate::tree::QueueId;

/// Which quota is short, and by how much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Short {
    /// The queue on the path whose limit is met; the fleet where idle quota that is not lent is.
    pub queue: QueueId,
    /// The class that its quota names.
    pub class: String,
    /// What it uses, in thousandths.
    pub used: u64,
    /// What it may use with all that it may borrow.
    pub limit: u64,
    /// What the job needs.
    pub need: u64,
    /// What queues keep that do not lend it.
    pub kept: u64,
}

impl Short {
    /// Returns whether the job is more than the queue may ever use.
    #[must_use]
    pub fn outright(&self) -> bool {
        self.need > self.limit
    }
}

/// How much of what there is to share a queue has; the least goes first. Units of 2^-32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Share {
    /// Use beyond its quota, of its dominant class, over the fleet's devices of it, over its weight.
    pub borrowed: u64,
    /// All its use, likewise.
    pub used: u64,
}

/// What a queue has used lately, by kind and model; part of a saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The queue; `None`: the fleet.
    pub queue: Option<QueueName>,
    /// The moment that the means are of.
    pub at: Timestamp,
    /// Decayed mean use in thousandths, shifted left by 16 bits.
    pub mean: Vec<(DeviceKind, String, u64)>,
}
