//! Changes that are tried on a snapshot and may be undone, step by step or altogether.

use drumline_types::{Attempt, DeviceId, JobId};

use crate::snapshot::{ClusterError, Commitment, Snapshot};

/// A point in a trial to come back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(usize);

#[derive(Debug, Clone)]
enum Step {
    Committed(JobId),
    Released(Commitment),
}

/// Changes tried on a copy of a snapshot. Dropping it undoes them all.
#[derive(Debug, Clone)]
pub struct Trial {
    working: Snapshot,
    steps: Vec<Step>,
}

impl Trial {
    pub(crate) fn new(working: Snapshot) -> Self {
        Self { working, steps: Vec::new() }
    }

    /// Returns the fleet with the changes so far.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.working
    }

    /// Gives devices to a job, as [`Snapshot::commit`].
    ///
    /// # Errors
    /// As [`Snapshot::commit`]; nothing is changed then.
    pub fn place(
        &mut self,
        job: &JobId,
        attempt: Attempt,
        devices: Vec<DeviceId>,
    ) -> Result<(), ClusterError> {
        self.working.commit(job, attempt, devices)?;
        self.steps.push(Step::Committed(job.clone()));
        Ok(())
    }

    /// Takes back what a job holds. Returns whether it held anything.
    pub fn evict(&mut self, job: &JobId) -> bool {
        let Some(commitment) = self.working.release(job) else { return false };
        self.steps.push(Step::Released(commitment));
        true
    }

    /// Returns the present point, to come back to.
    #[must_use]
    pub fn checkpoint(&self) -> Mark {
        Mark(self.steps.len())
    }

    /// Undoes every change since `mark`, the last one first.
    pub fn rollback(&mut self, mark: Mark) {
        while self.steps.len() > mark.0 {
            match self.steps.pop() {
                Some(Step::Committed(job)) => {
                    self.working.release(&job);
                }
                Some(Step::Released(was)) => {
                    let Commitment { job, attempt, devices } = was;
                    let undone = self.working.commit(&job, attempt, devices);
                    debug_assert!(undone.is_ok(), "undoing in reverse order always fits");
                }
                None => break,
            }
        }
    }

    /// Ends the trial and returns the fleet with its changes.
    #[must_use]
    pub fn commit(self) -> Snapshot {
        self.working
    }
}
