//! The end of an attempt: stop what runs, wait until it has ended, find the cause, decide what is
//! next.

use drumline_types::{
    Attempt, Explanation, JobPhase, Outcome, RankPhase, Reason, format_duration_ms,
};

use crate::cause;
use crate::event::{Action, Severity};
use crate::policy::{self, Next};
use crate::state::{Ending, Failure, RankState};
use crate::step::Step;

/// Time between SIGTERM and SIGKILL when an attempt has failed, in milliseconds. Short: what the
/// ranks did since the last checkpoint is lost anyway.
pub(crate) const FAILED_GRACE_MS: u64 = 2_000;
/// The same when a user cancels: there may be something to tidy up.
pub(crate) const CANCEL_GRACE_MS: u64 = 10_000;
/// The longest account of where ranks stood, in ranks.
const POSITIONS_MAX: usize = 16;

impl Step<'_> {
    /// Ends the present attempt because of `why`.
    pub(crate) fn take_down(&mut self, why: Explanation) {
        self.note(Severity::Warning, why.reason.token(), why.message.clone());
        self.state.why = why.clone();
        self.state.phase = JobPhase::Restarting;
        self.state.ending = Some(Ending { why, ..Ending::asked_at(self.now) });
        self.persist();
        self.stop(FAILED_GRACE_MS);
        self.settle();
    }

    /// Ends the present attempt because the scheduler needs its devices. Nothing has failed: the
    /// job waits again, and no restart is counted against it.
    pub(crate) fn evicted(&mut self, attempt: Attempt, why: Explanation) {
        let live = matches!(self.state.phase, JobPhase::Starting | JobPhase::Running);
        if attempt != self.state.attempt || !live || self.state.ending.is_some() {
            return;
        }
        // A gang whose first ranks have finished is about to leave by itself, with its work done.
        if self.state.ranks.iter().any(|rank| rank.phase == RankPhase::Succeeded) {
            return;
        }
        self.note(Severity::Warning, why.reason.token(), why.message.clone());
        self.state.why = why.clone();
        self.state.phase = JobPhase::Restarting;
        self.state.evictions = self.state.evictions.saturating_add(1);
        self.state.ending = Some(Ending { why, evicted: true, ..Ending::asked_at(self.now) });
        self.persist();
        self.stop(CANCEL_GRACE_MS);
        self.settle();
    }

    fn wait_again(&mut self, why: Explanation, wait_ms: u64) {
        self.state.phase = JobPhase::Pending;
        self.state.not_before = self.now.plus_ms(wait_ms);
        self.state.ranks.clear();
        self.state.running = None;
        self.state.progressed = None;
        self.state.why = why;
        self.persist();
    }

    pub(crate) fn take_down_late_start(&mut self) {
        let timeout = format_duration_ms(self.spec.settings.start_timeout_ms);
        let late = self.list(|rank| match rank.phase {
            RankPhase::Launching => Some("not started".to_owned()),
            RankPhase::Started if rank.join.is_none() => Some("not joined".to_owned()),
            _ => None,
        });
        let message = format!("not every rank joined within {timeout}: {late}");
        self.take_down(Explanation::new(Reason::RendezvousTimedOut, message));
    }

    pub(crate) fn take_down_stalled(&mut self) {
        let timeout = format_duration_ms(self.spec.settings.stall_timeout_ms);
        let stood = self.list(|rank| {
            let place = if rank.position.is_empty() { "position not told" } else { &rank.position };
            (!rank.phase.is_terminal()).then(|| format!("step {}, {place}", rank.step))
        });
        let message = format!("no step was finished within {timeout}; {stood}");
        self.take_down(Explanation::new(Reason::Stalled, message));
    }

    fn list(&self, tell: impl Fn(&RankState) -> Option<String>) -> String {
        let told: Vec<String> = self
            .state
            .ranks
            .iter()
            .filter_map(|rank| tell(rank).map(|what| format!("rank {} {what}", rank.rank)))
            .collect();
        let more = told.len().saturating_sub(POSITIONS_MAX);
        let mut text = told[..told.len() - more].join("; ");
        if more > 0 {
            text += &format!("; and {more} more");
        }
        text
    }

    pub(crate) fn cancel(&mut self, user: &str) {
        let by = if user.is_empty() { "a user" } else { user };
        let why = Explanation::new(Reason::CancelledByUser, format!("cancelled by {by}"));
        if self.state.phase == JobPhase::Cancelling {
            return;
        }
        self.note(Severity::Info, why.reason.token(), why.message.clone());
        self.state.why = why.clone();
        self.persist();
        if self.state.phase.holds_devices() {
            self.state.phase = JobPhase::Cancelling;
            self.state.ending = Some(Ending { why, cancelled: true, ..Ending::asked_at(self.now) });
            self.stop(CANCEL_GRACE_MS);
            self.settle();
        } else {
            self.finish(JobPhase::Cancelled, why, None);
        }
    }

    fn stop(&mut self, grace_ms: u64) {
        if !self.state.has_ended_ranks() {
            let (attempt, nodes) = (self.state.attempt, self.state.nodes());
            self.actions.push(Action::Stop { attempt, grace_ms, nodes });
        }
    }

    /// Asks again, and without grace: the first time was long ago.
    pub(crate) fn stop_again(&mut self) {
        if self.state.has_ended_ranks() {
            return;
        }
        let live = self
            .list(|rank| (!rank.phase.is_terminal()).then(|| format!("on {}", rank.device.node)));
        if let Some(ending) = &mut self.state.ending {
            ending.asked = self.now;
            ending.asks = ending.asks.saturating_add(1);
        }
        self.note(Severity::Warning, "StillStopping", format!("asked again to end: {live}"));
        self.stop(0);
    }

    /// Once every rank of an attempt that is being taken down has ended: what is next.
    pub(crate) fn settle(&mut self) {
        let Some(ending) = self.state.ending.clone() else { return };
        if !self.state.has_ended_ranks() {
            return;
        }
        if ending.cancelled {
            self.forget();
            self.finish(JobPhase::Cancelled, ending.why, None);
            return;
        }
        if ending.evicted {
            if self.state.ranks.iter().all(|rank| rank.phase == RankPhase::Succeeded) {
                self.state.ending = None;
                self.succeed();
                return;
            }
            self.forget();
            self.state.ending = None;
            self.wait_again(ending.why, 0);
            return;
        }
        // What was seen first need not be what happened first.
        let first = cause::first(&self.state).cloned();
        let why = match (&first, ending.why.reason) {
            (_, Reason::Stalled | Reason::RendezvousTimedOut | Reason::DeviceFailed)
            | (None, _) => ending.why,
            (Some(rank), _) => cause::explain(rank),
        };
        if let Some(rank) = &first
            && why != self.state.why
        {
            let message = format!("the first to fail was rank {}: {}", rank.rank, why.message);
            self.note(Severity::Warning, why.reason.token(), message);
        }
        let first = first.map(|rank| Failure {
            exit: cause::evidence(&rank),
            node: rank.device.node,
            attempt: self.state.attempt,
        });
        self.forget();
        self.state.ending = None;
        if first.is_some() {
            self.state.first_failure.clone_from(&first);
        }
        let next = match policy::next(&self.state, self.spec, self.now) {
            // No fault of the job, and the next attempt is elsewhere: nothing is held against it.
            Next::GiveUp | Next::Restart { .. }
                if why.reason == Reason::DeviceFailed && self.spec.settings.restarts.limit > 0 =>
            {
                Next::Restart { fruitless: self.state.fruitless, wait_ms: 0 }
            }
            next => next,
        };
        match next {
            Next::GiveUp => {
                let limit = self.spec.settings.restarts.limit;
                let message = match limit {
                    0 => format!("{}; restarts are not allowed", why.message),
                    _ => format!("{}; all {limit} restarts are used up", why.message),
                };
                let reason = if limit == 0 { why.reason } else { Reason::RestartsExhausted };
                self.finish(JobPhase::Failed, Explanation::new(reason, message), first);
            }
            Next::Restart { fruitless, wait_ms } => {
                let next = self.state.attempt.next();
                let wait = format_duration_ms(wait_ms);
                let message = format!("attempt {next} starts in {wait}: {}", why.message);
                self.state.restarts += 1;
                self.state.fruitless = fruitless;
                let why = Explanation::new(Reason::BackingOff, message.clone());
                self.wait_again(why, wait_ms);
                self.note(Severity::Info, "Restarting", message);
            }
        }
    }

    pub(crate) fn forget(&mut self) {
        let (attempt, nodes) = (self.state.attempt, self.state.nodes());
        if !nodes.is_empty() {
            self.actions.push(Action::Forget { attempt, nodes });
        }
    }

    fn finish(&mut self, phase: JobPhase, why: Explanation, first: Option<Failure>) {
        self.state.phase = phase;
        self.state.ending = None;
        self.state.finished = Some(self.now);
        self.state.outcome = Some(Outcome {
            success: false,
            message: why.message.clone(),
            first_failure: first.map(|failure| failure.exit),
        });
        if phase == JobPhase::Failed {
            self.note(Severity::Error, why.reason.token(), why.message.clone());
        }
        self.state.why = why;
        self.persist();
    }
}
