//! When a gang must be looked at again although nothing happened.

use drumline_spec::{JobSpec, Work};
use drumline_types::{JobPhase, Timestamp};

use crate::state::State;

/// Wait before stopping is asked for again, in milliseconds; it doubles with each time.
const STOP_AGAIN_MS: u64 = 15_000;
/// The longest such wait.
const STOP_AGAIN_MAX_MS: u64 = 60_000;

/// Returns the moment at which [`crate::Event::Tick`] may change something; `None`: never.
#[must_use]
pub fn deadline(state: &State, spec: &JobSpec) -> Option<Timestamp> {
    match state.phase {
        JobPhase::Pending => (state.not_before > Timestamp(0)).then_some(state.not_before),
        JobPhase::Starting => {
            state.launched.map(|launched| launched.plus_ms(spec.settings.start_timeout_ms))
        }
        JobPhase::Running => stall(state, spec),
        JobPhase::Restarting | JobPhase::Cancelling => {
            let ending = state.ending.as_ref()?;
            let doublings = ending.asks.saturating_sub(1).min(8);
            let wait = (STOP_AGAIN_MS << doublings).min(STOP_AGAIN_MAX_MS);
            Some(ending.asked.plus_ms(wait))
        }
        JobPhase::Succeeded | JobPhase::Failed | JobPhase::Cancelled => None,
    }
}

/// Returns when a running gang counts as stalled.
///
/// A training run must finish steps. A service may have nothing to do, but each of its ranks must
/// report. A command tells nothing of itself, so nothing is asked of it.
fn stall(state: &State, spec: &JobSpec) -> Option<Timestamp> {
    let timeout = spec.settings.stall_timeout_ms;
    if timeout == 0 {
        return None;
    }
    let since = state.progressed.or(state.running)?;
    match spec.work {
        Work::TrainingJob(_) => Some(since.plus_ms(timeout)),
        Work::ModelService(_) => {
            let live = state.ranks.iter().filter(|rank| !rank.phase.is_terminal());
            let running = state.running?;
            let oldest = live.map(|rank| rank.reported.unwrap_or(running).max(running)).min()?;
            // After a restart of the control plane nothing was heard yet.
            Some(oldest.max(state.progressed.unwrap_or(running)).plus_ms(timeout))
        }
        Work::CommandJob(_) => None,
    }
}
