//! Queues: who may use how much, who lends to whom, and who may take back.

use std::collections::BTreeMap;

use drumline_types::QueueName;
use serde::{Deserialize, Serialize};

/// What quota is counted in: a device model such as `h100`, or a kind (`gpu`, `cpu`) for every
/// device whose model has no entry of its own in that queue.
pub type DeviceClass = String;

/// Whose jobs a queue may end to get back what it lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub enum Reclaim {
    /// Nobody's: it waits.
    Never,
    /// Borrowers' jobs of a lower priority than the job that needs the devices.
    LowerPriority,
    /// Any borrower's.
    #[default]
    Any,
}

/// One queue, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSpec {
    /// Its name, unique in the fleet.
    pub name: QueueName,
    /// The queue above it; `None`: a root. A queue with children takes no jobs of its own.
    pub parent: Option<QueueName>,
    /// Devices that it may always use, per class; a class that is named nowhere on the way to the
    /// root has no limit.
    pub quota: BTreeMap<DeviceClass, u32>,
    /// Its part of what its parent has to spare, against its siblings'.
    pub weight: u32,
    /// Devices beyond its quota that it may borrow; `None`: whatever is idle.
    pub borrowing_limit: Option<BTreeMap<DeviceClass, u32>>,
    /// Devices of its quota that others may borrow; `None`: all that are idle.
    pub lending_limit: Option<BTreeMap<DeviceClass, u32>>,
    /// Whether a job may end jobs of lower priority in the same queue.
    pub preempt_within: bool,
    /// Whose jobs it may end to get its quota back.
    pub reclaim: Reclaim,
    /// While true, nothing of it starts.
    pub held: bool,
}

impl QueueSpec {
    /// Returns a root queue without limits.
    #[must_use]
    pub fn open(name: QueueName) -> Self {
        Self {
            name,
            parent: None,
            quota: BTreeMap::new(),
            weight: 1,
            borrowing_limit: None,
            lending_limit: None,
            preempt_within: true,
            reclaim: Reclaim::Any,
            held: false,
        }
    }
}
