//! Changes that are tried on a snapshot in place and undone, step by step or altogether.

use drumline_types::{Attempt, DeviceId, JobId};

use crate::snapshot::{ClusterError, Commitment, Revision, Snapshot};

/// A point in a trial to come back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(usize);

#[derive(Debug)]
enum Step {
    Committed(JobId),
    Released(Commitment),
    /// What was kept for the job before.
    Reserved(JobId, Option<Vec<DeviceId>>),
}

/// Changes tried on a snapshot. Dropping it undoes them all; each costs what it changed.
#[derive(Debug)]
pub struct Trial<'a> {
    working: &'a mut Snapshot,
    /// Each step, and the revision before it.
    steps: Vec<(Revision, Step)>,
}

impl<'a> Trial<'a> {
    pub(crate) fn new(working: &'a mut Snapshot) -> Self {
        working.trying = true;
        Self { working, steps: Vec::new() }
    }

    /// Returns the fleet with the changes so far.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        self.working
    }

    /// Gives whole devices to a job, as [`Snapshot::commit`].
    ///
    /// # Errors
    /// As [`Snapshot::commit`]; nothing is changed then.
    pub fn place(
        &mut self,
        job: &JobId,
        attempt: Attempt,
        devices: Vec<DeviceId>,
    ) -> Result<(), ClusterError> {
        let slice = crate::snapshot::Slice::default();
        self.hold(Commitment { job: job.clone(), attempt, devices, slice })
    }

    /// Gives devices or parts of them to a job, as [`Snapshot::hold`].
    ///
    /// # Errors
    /// As [`Snapshot::hold`]; nothing is changed then.
    pub fn hold(&mut self, commitment: Commitment) -> Result<(), ClusterError> {
        let (before, job) = (self.working.revision(), commitment.job.clone());
        self.working.hold(commitment)?;
        self.steps.push((before, Step::Committed(job)));
        Ok(())
    }

    /// Takes back what a job holds. Returns whether it held anything.
    pub fn evict(&mut self, job: &JobId) -> bool {
        let before = self.working.revision();
        let Some(commitment) = self.working.release(job) else { return false };
        self.steps.push((before, Step::Released(commitment)));
        true
    }

    /// Keeps devices for a job, as [`Snapshot::reserve`].
    ///
    /// # Errors
    /// As [`Snapshot::reserve`]; nothing is changed then.
    pub fn reserve(&mut self, job: &JobId, devices: Vec<DeviceId>) -> Result<(), ClusterError> {
        let (before, was) = (self.working.revision(), self.working.reservation(job));
        self.working.reserve(job, devices)?;
        self.steps.push((before, Step::Reserved(job.clone(), was)));
        Ok(())
    }

    /// Lets go of the devices that are kept for a job, as [`Snapshot::unreserve`].
    pub fn unreserve(&mut self, job: &JobId) -> Option<Vec<DeviceId>> {
        let before = self.working.revision();
        let kept = self.working.unreserve(job)?;
        self.steps.push((before, Step::Reserved(job.clone(), Some(kept.clone()))));
        Some(kept)
    }

    /// Returns the present point, to come back to.
    #[must_use]
    pub fn checkpoint(&self) -> Mark {
        Mark(self.steps.len())
    }

    /// Undoes every change since `mark`, the last one first.
    pub fn rollback(&mut self, mark: Mark) {
        while self.steps.len() > mark.0 {
            let Some((before, step)) = self.steps.pop() else { break };
            let undone = match step {
                Step::Committed(job) => {
                    self.working.release(&job);
                    Ok(())
                }
                Step::Released(was) => self.working.hold(was),
                Step::Reserved(job, Some(kept)) => self.working.reserve(&job, kept),
                Step::Reserved(job, None) => {
                    self.working.unreserve(&job);
                    Ok(())
                }
            };
            debug_assert!(undone.is_ok(), "undoing in reverse order always fits");
            self.working.set_revision(before);
        }
    }

    /// Ends the trial and keeps its changes.
    pub fn commit(mut self) {
        self.working.trying = false;
        for (_, step) in std::mem::take(&mut self.steps) {
            match step {
                Step::Released(was) => self.working.grow_at(&was.devices),
                Step::Reserved(_, Some(kept)) => self.working.grow_at(&kept),
                Step::Committed(_) | Step::Reserved(_, None) => {}
            }
        }
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.rollback(Mark(0));
        self.working.trying = false;
    }
}
