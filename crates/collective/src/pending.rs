//! Reductions that were started and not yet waited for.

use crate::CollectiveError;

/// The most calls of one group that may be under way.
pub const STARTED_MAX: u64 = 64;

/// A reduction under way: what [`crate::Collective::start_all_reduce`] returns.
///
/// It makes progress only inside these calls, on the thread that makes them: no thread of its own
/// takes a core from those that compute. It holds no data either; every call gets the same values
/// again, which nobody may change in between. Dropped before its end, it is cancelled: the group is
/// aborted, since its peers would wait for the rest.
pub trait Pending: Send {
    /// Moves what can be moved now, without waiting; returns whether the reduction is complete and
    /// `data` holds its result. Does nothing while an earlier one is not.
    ///
    /// # Errors
    /// [`CollectiveError`] when a peer is gone or out of step, or `data` has another length than
    /// was started.
    fn poll(&mut self, data: &mut [f32]) -> Result<bool, CollectiveError>;

    /// Returns once the reduction is complete.
    ///
    /// # Errors
    /// As [`Pending::poll`]; [`CollectiveError::TimedOut`] when there is no progress within the
    /// deadline; [`CollectiveError::Mismatch`] when an earlier one has not ended.
    fn wait(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;
}

/// Whose turn it is among the started calls of one group.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    started: u64,
    finished: u64,
}

impl Turns {
    /// Returns the ticket of one more call.
    pub(crate) fn start(&mut self, op: &'static str) -> Result<u64, CollectiveError> {
        if self.started - self.finished >= STARTED_MAX {
            return Err(CollectiveError::Mismatch {
                op,
                expected: format!("at most {STARTED_MAX} started calls under way"),
                got: "one more".to_owned(),
            });
        }
        self.started += 1;
        Ok(self.started - 1)
    }

    pub(crate) fn is_turn(&self, ticket: u64) -> bool {
        self.finished == ticket
    }

    /// Refuses to wait for a call before an earlier one: nobody would move that one on.
    pub(crate) fn check_turn(&self, op: &'static str, ticket: u64) -> Result<(), CollectiveError> {
        if self.is_turn(ticket) {
            return Ok(());
        }
        Err(CollectiveError::Mismatch {
            op,
            expected: "earlier started calls to have ended".to_owned(),
            got: format!("{} that have not", ticket.saturating_sub(self.finished)),
        })
    }

    /// Refuses a call of another kind while one is under way: their data would mix.
    pub(crate) fn check_none(&self, op: &'static str) -> Result<(), CollectiveError> {
        self.check_turn(op, self.started)
    }

    pub(crate) fn finish(&mut self) {
        self.finished += 1;
    }
}
