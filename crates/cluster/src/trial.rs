//! Changes that are tried on a snapshot in place and undone, step by step or altogether.

use drumline_types::{Attempt, DeviceId, JobId};

use crate::snapshot::{ClusterError, Commitment, Held, Kept, Revision, Snapshot};
use crate::state::NodeAt;

/// A point in a trial to come back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(usize);

#[derive(Debug)]
enum Step {
    Committed(JobId),
    Released(Held),
    /// What was kept for the job before.
    Reserved(JobId, Option<Kept>),
}

/// Changes tried on a snapshot. Dropping it undoes them all; each costs what it changed.
#[derive(Debug)]
pub struct Trial<'a> {
    working: &'a mut Snapshot,
    /// Each step, and the revision before it.
    steps: Vec<(Revision, Step)>,
    /// Nodes that may be known for no other reason than what was undone.
    loose: Vec<NodeAt>,
}

impl<'a> Trial<'a> {
    pub(crate) fn new(working: &'a mut Snapshot) -> Self {
        working.trying = true;
        Self { working, steps: Vec::new(), loose: Vec::new() }
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
        let Some(held) = self.working.take(job) else { return false };
        self.steps.push((before, Step::Released(held)));
        true
    }

    /// Keeps devices for a job, as [`Snapshot::reserve`].
    ///
    /// # Errors
    /// As [`Snapshot::reserve`]; nothing is changed then.
    pub fn reserve(&mut self, job: &JobId, devices: Vec<DeviceId>) -> Result<(), ClusterError> {
        let before = self.working.revision();
        let was = self.working.let_go(job);
        match self.working.reserve(job, devices) {
            Ok(()) => {
                self.steps.push((before, Step::Reserved(job.clone(), was)));
                Ok(())
            }
            Err(error) => {
                if let Some(was) = was {
                    self.working.keep(job, was);
                }
                self.working.set_revision(before);
                Err(error)
            }
        }
    }

    /// Lets go of the devices that are kept for a job, as [`Snapshot::unreserve`]. Returns whether
    /// any were.
    pub fn unreserve(&mut self, job: &JobId) -> bool {
        let before = self.working.revision();
        let Some(kept) = self.working.let_go(job) else { return false };
        self.steps.push((before, Step::Reserved(job.clone(), Some(kept))));
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
            let Some((before, step)) = self.steps.pop() else { break };
            match step {
                Step::Committed(job) => {
                    if let Some(held) = self.working.take(&job) {
                        self.loose.extend(held.nodes());
                    }
                }
                Step::Released(was) => self.working.give_back(was),
                Step::Reserved(job, was) => {
                    if let Some(kept) = self.working.let_go(&job) {
                        self.loose.extend(kept.iter().map(|(_, at)| *at));
                    }
                    if let Some(kept) = was {
                        self.working.keep(&job, kept);
                    }
                }
            }
            self.working.set_revision(before);
        }
    }

    fn end(&mut self) {
        self.working.trying = false;
        for at in std::mem::take(&mut self.loose) {
            self.working.forget_if_empty(at);
        }
    }

    /// Ends the trial and keeps its changes.
    pub fn commit(mut self) {
        self.end();
        for (_, step) in std::mem::take(&mut self.steps) {
            match step {
                Step::Released(was) => self.working.settle_taken(&was),
                Step::Reserved(_, Some(kept)) => self.working.settle_let_go(&kept),
                Step::Committed(_) | Step::Reserved(_, None) => {}
            }
        }
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.rollback(Mark(0));
        self.end();
    }
}
