//! A job that waits for devices, before and after it is admitted.

use std::cmp::{Ordering, Reverse};

use drumline_spec::{Gang, GangSettings, Parallelism};
use drumline_types::{Attempt, JobId, Timestamp};
use serde::{Deserialize, Serialize};

/// A job that waits for devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The job.
    pub job: JobId,
    /// The attempt that would start.
    pub attempt: Attempt,
    /// The gang that it needs, all or nothing.
    pub gang: Gang,
    /// How the ranks divide the work; its world size is the gang's number of ranks.
    pub split: Parallelism,
    /// Queue and priority.
    pub settings: GangSettings,
    /// When it was submitted. A restart keeps the first time, so that it does not queue again.
    pub submitted: Timestamp,
    /// Whether a user asked for it to be held.
    pub held: bool,
    /// It may not start before this moment: the delay before a restart.
    pub not_before: Timestamp,
}

impl Waiting {
    /// Compares by the order of admission: priority, then arrival, then name.
    #[must_use]
    pub fn order(&self, other: &Self) -> Ordering {
        let key = |w: &Self| (Reverse(w.settings.priority), w.submitted);
        key(self).cmp(&key(other)).then_with(|| self.job.cmp(&other.job))
    }
}

/// A job whose queue lets it have devices now. Only [`crate::admit`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted(Waiting);

impl Admitted {
    pub(crate) fn new(waiting: Waiting) -> Self {
        Self(waiting)
    }

    /// Returns what waited.
    #[must_use]
    pub fn waiting(&self) -> &Waiting {
        &self.0
    }
}
