//! What queues exist, what each may use, and what each uses now.

use std::collections::BTreeMap;

use drumline_spec::DeviceKind;
use drumline_types::QueueName;
use serde::{Deserialize, Serialize};

/// What one queue may use at most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct QueueLimits {
    /// Devices per kind; a kind that is not named has no limit.
    pub devices: BTreeMap<DeviceKind, u32>,
}

/// The queues that exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Queues {
    /// When true, a queue that is not named exists too, without limits.
    any: bool,
    named: BTreeMap<QueueName, QueueLimits>,
}

impl Queues {
    /// Returns a set in which every queue exists without limits.
    #[must_use]
    pub fn open() -> Self {
        Self { any: true, named: BTreeMap::new() }
    }

    /// Returns a set in which only these queues exist.
    #[must_use]
    pub fn named(queues: impl IntoIterator<Item = (QueueName, QueueLimits)>) -> Self {
        Self { any: false, named: queues.into_iter().collect() }
    }

    /// Returns whether the queue exists.
    #[must_use]
    pub fn exists(&self, queue: &QueueName) -> bool {
        self.any || self.named.contains_key(queue)
    }

    /// Returns the most devices of `kind` that the queue may use; `None`: no limit.
    #[must_use]
    pub fn limit(&self, queue: &QueueName, kind: DeviceKind) -> Option<u32> {
        self.named.get(queue)?.devices.get(&kind).copied()
    }
}

/// The devices that the jobs of each queue hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage(BTreeMap<(QueueName, DeviceKind), u32>);

impl Usage {
    /// Counts `devices` more of `kind` as used by the queue.
    pub fn add(&mut self, queue: &QueueName, kind: DeviceKind, devices: u32) {
        let used = self.0.entry((queue.clone(), kind)).or_default();
        *used = used.saturating_add(devices);
    }

    /// Returns how many devices of `kind` the queue uses.
    #[must_use]
    pub fn of(&self, queue: &QueueName, kind: DeviceKind) -> u32 {
        self.0.get(&(queue.clone(), kind)).copied().unwrap_or(0)
    }
}
