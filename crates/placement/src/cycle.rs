//! What one look of the scheduler at the fleet decides: starts, evictions, and what it says to
//! those who wait.

use drumline_types::{Attempt, DeviceId, Explanation, JobId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::plan::Plan;

/// Why a running gang is asked to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EvictionCause {
    /// A job of higher priority needs its devices.
    Preempted,
    /// The queue that lent the devices needs them back.
    Reclaimed,
    /// It runs on devices that were kept ready for a gang, which needs them now.
    Recalled,
    /// It moves, so that a gang that is scattered otherwise fits.
    Consolidated,
    /// It starts again at another size.
    Resized,
    /// It runs on a device or node that must be emptied.
    Drained,
}

/// One gang that is asked to leave. It keeps its devices until a
/// [`drumline_cluster::Change::Requeued`] or `Ended` says that it is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eviction {
    /// The gang that leaves.
    pub job: JobId,
    /// Its attempt.
    pub attempt: Attempt,
    /// Why.
    pub cause: EvictionCause,
    /// The job that gets the devices; `None` for a resize or drain.
    pub beneficiary: Option<JobId>,
    /// Its next size in ranks, when that changes.
    pub resize_to: Option<u32>,
    /// One line of evidence for the victim's owner.
    pub message: String,
}

/// The devices that are kept ready beside one gang that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spares {
    /// The gang.
    pub job: JobId,
    /// The devices; some may be lent.
    pub devices: Vec<DeviceId>,
}

/// What one cycle decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cycle {
    /// The moment that it was decided for.
    pub now: Timestamp,
    /// The gangs that start.
    pub plan: Plan,
    /// The gangs that leave.
    pub evictions: Vec<Eviction>,
    /// Waiting jobs whose explanation is not the one told last, in the order of their ids.
    pub told: Vec<(JobId, Explanation)>,
    /// Every device that is kept ready after it, by the gang that it is kept for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spares: Vec<Spares>,
    /// When the passing of time alone may change a decision: a backoff, a reservation, a cool-down.
    pub wake: Option<Timestamp>,
    /// Waiting jobs that were looked at (the others cannot have become placeable).
    pub considered: u64,
}
