//! Whether an attempt that failed is followed by another, and when.

use drumline_spec::{JobSpec, Work};
use drumline_types::Timestamp;

use crate::state::State;

/// A service or command that ran for so long has made progress, in milliseconds.
pub const PROGRESS_RUN_MS: u64 = 60_000;
/// The longest wait before a restart, in milliseconds.
pub const BACKOFF_MAX_MS: u64 = 300_000;

/// What follows an attempt that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another attempt, after a wait.
    Restart {
        /// Restarts since the last progress, this one included.
        fruitless: u32,
        /// The wait, in milliseconds.
        wait_ms: u64,
    },
    /// Nothing: every allowed restart is used up.
    GiveUp,
}

/// Decides what follows the present attempt, which ended without success at `now`.
///
/// Only restarts without progress count against the limit, so that a long run on an unreliable
/// fleet goes on, and a crash loop ends. A limit of 0 forbids any restart.
#[must_use]
pub fn next(state: &State, spec: &JobSpec, now: Timestamp) -> Next {
    let policy = spec.settings.restarts;
    if policy.limit == 0 {
        return Next::GiveUp;
    }
    if has_progressed(state, spec, now) {
        return Next::Restart { fruitless: 0, wait_ms: 0 };
    }
    let fruitless = state.fruitless + 1;
    if fruitless > policy.limit {
        return Next::GiveUp;
    }
    let doublings = (fruitless - 1).min(32);
    let wait_ms = policy.backoff_ms.saturating_mul(1 << doublings).min(BACKOFF_MAX_MS);
    Next::Restart { fruitless, wait_ms: wait_ms.max(policy.backoff_ms.min(BACKOFF_MAX_MS)) }
}

/// Returns whether the present attempt brought the job on: a newer complete checkpoint for a
/// training run, a minute of running for the others.
#[must_use]
pub fn has_progressed(state: &State, spec: &JobSpec, now: Timestamp) -> bool {
    match spec.work {
        Work::TrainingJob(_) => {
            state.checkpoint.as_ref().map(|checkpoint| checkpoint.step) > state.checkpoint_at_launch
        }
        Work::ModelService(_) | Work::CommandJob(_) => {
            state.running.is_some_and(|since| now.since_ms(since) >= PROGRESS_RUN_MS)
        }
    }
}
