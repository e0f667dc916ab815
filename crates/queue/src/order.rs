//! The order of the jobs of one queue.

use std::sync::Arc;

use drumline_types::{JobId, Timestamp};

/// A job's place in its queue; the least goes first. It does not change while the job waits, so
/// that a queue is a sorted set and never sorted again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    first: i128,
    then: u64,
    job: Arc<JobId>,
}

impl Place {
    /// Priority, then arrival, then name. With ageing a step of priority is worth `ageing_ms` of
    /// waiting: a job is overtaken only by those that were submitted less than `ageing_ms` times the
    /// difference in priority after it.
    #[must_use]
    pub fn by_priority(
        job: Arc<JobId>,
        priority: i32,
        submitted: Timestamp,
        ageing_ms: u64,
    ) -> Self {
        let first = if ageing_ms == 0 {
            -i128::from(priority)
        } else {
            i128::from(submitted.0) - i128::from(priority) * i128::from(ageing_ms)
        };
        Self { first, then: submitted.0, job }
    }

    /// Arrival, then name.
    #[must_use]
    pub fn by_arrival(job: Arc<JobId>, submitted: Timestamp) -> Self {
        Self { first: 0, then: submitted.0, job }
    }

    /// The shortest expected run first, then arrival; who says nothing goes last.
    #[must_use]
    pub fn by_length(job: Arc<JobId>, expected_ms: Option<u64>, submitted: Timestamp) -> Self {
        let first = i128::from(expected_ms.unwrap_or(u64::MAX));
        Self { first, then: submitted.0, job }
    }

    /// Returns the job.
    #[must_use]
    pub fn job(&self) -> &Arc<JobId> {
        &self.job
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str, priority: i32, submitted: u64, ageing: u64) -> Place {
        let job = Arc::new(name.parse().unwrap());
        Place::by_priority(job, priority, Timestamp(submitted), ageing)
    }

    #[test]
    fn priority_goes_first_then_arrival_then_name() {
        assert!(place("b", 5, 9, 0) < place("a", 0, 1, 0));
        assert!(place("b", 0, 1, 0) < place("a", 0, 2, 0));
        assert!(place("a", 0, 1, 0) < place("b", 0, 1, 0));
    }

    #[test]
    fn who_waits_long_enough_is_overtaken_by_nobody() {
        assert!(place("urgent", 3, 299, 100) < place("old", 0, 0, 100));
        assert!(place("old", 0, 0, 100) < place("urgent", 3, 301, 100));
    }
}
