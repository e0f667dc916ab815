//! When a gang must be looked at again although nothing happened.

use drumline_spec::{JobSpec, Work};
use drumline_types::{JobPhase, Timestamp};

use crate::state::{RankState, State};

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
/// A training run must finish steps. A service may have nothing to do, but its leaders, which
/// report from the loop that all ranks step in, must go on reporting. A command tells nothing of
/// itself, so nothing is asked of it.
fn stall(state: &State, spec: &JobSpec) -> Option<Timestamp> {
    let timeout = spec.settings.stall_timeout_ms;
    if timeout == 0 {
        return None;
    }
    let since = state.progressed.or(state.running)?;
    match spec.work {
        Work::TrainingJob(_) => Some(since.plus_ms(timeout)),
        Work::ModelService(_) => {
            let leads = |rank: &&RankState| {
                rank.join.as_ref().is_some_and(|join| !join.inference_url.is_empty())
            };
            let live = || state.ranks.iter().filter(|rank| !rank.phase.is_terminal());
            let has_leader = live().any(|rank| leads(&rank));
            let watched = live().filter(|rank| !has_leader || leads(rank));
            let heard = watched.filter_map(|rank| rank.reported).min();
            Some(match heard {
                // After a restart of the control plane what was heard before counts no more.
                Some(heard) => heard.max(since).plus_ms(timeout),
                // Weights are still being loaded: that may take as long as a start.
                None => since.plus_ms(timeout).plus_ms(spec.settings.start_timeout_ms),
            })
        }
        Work::CommandJob(_) => None,
    }
}
