//! The step function: one event in, the new state and what to do out.

use drumline_spec::{JobKind, JobSpec};
use drumline_types::{
    Attempt, DeviceId, Explanation, JobPhase, NodeName, Outcome, RankExit, RankIndex, RankPhase,
    Reason, Timestamp,
};

use drumline_audit::CheckedJob;

use crate::deadline::deadline;
use crate::event::{Action, Event, Note, Report, Severity, Told};
use crate::state::{Join, RankState, Rendezvous, State};

/// Takes one event. The same state, spec, event and time give the same answer.
#[must_use]
pub fn step(state: State, spec: &JobSpec, event: Event, now: Timestamp) -> (State, Vec<Action>) {
    if state.phase.is_terminal() {
        return (state, Vec::new());
    }
    let mut step = Step { state, spec, now, actions: Vec::new() };
    match event {
        Event::Planned { plan, rendezvous } => step.planned(&plan, rendezvous),
        Event::Waits(why) => step.waits(why),
        Event::Status { attempt, rank, told } => step.status(attempt, rank, told),
        Event::Joined { attempt, rank, join } => step.joined(attempt, rank, join),
        Event::Reported { attempt, rank, report } => step.reported(attempt, rank, report),
        Event::NodeLost { node, message } => step.node_lost(&node, &message),
        Event::DeviceFailed { device, message } => step.device_failed(&device, &message),
        Event::RankLost { attempt, rank, message } => step.rank_lost(attempt, rank, &message),
        Event::Held(held) => step.held(held),
        Event::Evicted { attempt, why } => step.evicted(attempt, why),
        Event::Cancel { user } => step.cancel(&user),
        Event::Tick => step.tick(),
        Event::Recovered => step.recovered(),
    }
    (step.state, step.actions)
}

/// One step under way.
pub(crate) struct Step<'a> {
    pub(crate) state: State,
    pub(crate) spec: &'a JobSpec,
    pub(crate) now: Timestamp,
    pub(crate) actions: Vec<Action>,
}

impl Step<'_> {
    pub(crate) fn persist(&mut self) {
        if !self.actions.contains(&Action::Persist) {
            self.actions.push(Action::Persist);
        }
    }

    pub(crate) fn note(&mut self, severity: Severity, reason: &str, message: String) {
        self.actions.push(Action::Record(Note {
            at: self.now,
            severity,
            reason: reason.to_owned(),
            message,
            attempt: self.state.attempt,
        }));
    }

    /// Whether an event is about the attempt that is under way.
    fn is_current(&self, attempt: Attempt) -> bool {
        attempt == self.state.attempt && self.state.phase.holds_devices()
    }

    fn planned(&mut self, plan: &CheckedJob, rendezvous: Rendezvous) {
        let (plan, wanted) = (plan.plan(), self.spec.parallelism());
        let expected = self.state.attempt.next();
        if self.state.phase != JobPhase::Pending
            || plan.job != self.state.job
            || plan.attempt != expected
            || self.state.held
            || self.now < self.state.not_before
        {
            return;
        }
        let state = &mut self.state;
        state.attempt = expected;
        state.phase = JobPhase::Starting;
        state.launched = Some(self.now);
        state.running = None;
        state.progressed = None;
        state.checkpoint_at_launch = state.checkpoint.as_ref().map(|checkpoint| checkpoint.step);
        state.rendezvous = rendezvous;
        state.split = Some(plan.split).filter(|split| *split != wanted);
        state.ranks = plan
            .assignments
            .iter()
            .map(|assignment| RankState {
                rank: assignment.rank,
                coords: assignment.coords,
                device: assignment.device.clone(),
                phase: RankPhase::Launching,
                pid: 0,
                join: None,
                step: 0,
                position: String::new(),
                reported: None,
                error: String::new(),
                exit: None,
                ended: None,
                after_stop: false,
                lost: false,
            })
            .collect();
        let ranks = state.ranks.len();
        let nodes = state.nodes().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let message = format!("attempt {expected}: {ranks} ranks on {nodes}");
        state.why = Explanation::new(Reason::StartingRanks, message.clone());
        self.persist();
        self.note(Severity::Info, "Launched", message);
        self.actions.push(Action::Launch);
    }

    fn waits(&mut self, why: Explanation) {
        if self.state.phase != JobPhase::Pending || self.state.why == why {
            return;
        }
        let changed = self.state.why.reason != why.reason;
        // The time left changes all the while; it was told when the delay began.
        if !changed && why.reason == Reason::BackingOff {
            return;
        }
        if changed {
            self.note(Severity::Info, why.reason.token(), why.message.clone());
        }
        self.state.why = why;
        self.persist();
    }

    fn held(&mut self, held: bool) {
        if self.state.phase != JobPhase::Pending || self.state.held == held {
            return;
        }
        self.state.held = held;
        let (word, message) =
            if held { ("Held", "held back by a user") } else { ("Released", "let go by a user") };
        self.note(Severity::Info, word, message.to_owned());
        self.persist();
    }

    fn status(&mut self, attempt: Attempt, rank: RankIndex, told: Told) {
        if !self.is_current(attempt) {
            return;
        }
        let stopping = self.state.ending.is_some();
        let Some(known) = self.state.rank_mut(rank) else { return };
        if known.phase.is_terminal() {
            return;
        }
        if told.pid != 0 {
            known.pid = told.pid;
        }
        if told.phase.is_terminal() {
            known.phase = told.phase;
            known.exit = Some(RankExit { rank, ..told.exit });
            known.ended = Some(told.at);
            known.after_stop = stopping;
            self.ended(rank);
        } else if told.phase > known.phase {
            // A native rank runs once its whole world is known, whatever its agent thinks.
            let joins = self.spec.kind() != JobKind::CommandJob;
            known.phase = if joins { told.phase.min(RankPhase::Started) } else { told.phase };
            if !joins {
                self.see_whether_all_run();
            }
        }
    }

    fn joined(&mut self, attempt: Attempt, rank: RankIndex, join: Join) {
        if !self.is_current(attempt) || self.state.ending.is_some() {
            return;
        }
        let known_world = self.state.has_world();
        let Some(known) = self.state.rank_mut(rank) else { return };
        if known.phase.is_terminal() {
            return;
        }
        if known_world {
            // Asked again: the answer was lost with a control plane or a stream.
            if known.join.as_ref() == Some(&join) {
                let nodes = vec![known.device.node.clone()];
                self.actions.push(Action::SendWorld { nodes });
            }
            return;
        }
        known.join = Some(join);
        known.phase = known.phase.max(RankPhase::Started);
        if self.state.has_world() {
            for rank in &mut self.state.ranks {
                if !rank.phase.is_terminal() {
                    rank.phase = RankPhase::Running;
                }
            }
            self.see_whether_all_run();
            if self.state.phase == JobPhase::Running {
                // Also where all were said to run before the last has joined.
                self.persist();
            }
            let nodes = self.state.nodes();
            self.actions.push(Action::SendWorld { nodes });
        }
    }

    /// Moves a starting gang to running once every rank runs, or has already finished.
    fn see_whether_all_run(&mut self) {
        let runs =
            |rank: &RankState| matches!(rank.phase, RankPhase::Running | RankPhase::Succeeded);
        if self.state.phase != JobPhase::Starting || !self.state.ranks.iter().all(runs) {
            return;
        }
        self.state.phase = JobPhase::Running;
        self.state.running = Some(self.now);
        self.state.started = self.state.started.or(Some(self.now));
        self.state.progressed = Some(self.now);
        let ranks = self.state.ranks.len();
        let took = self.now.since_ms(self.state.launched.unwrap_or(self.now));
        let message = format!("all {ranks} ranks run, {took} ms after the launch");
        self.state.why = Explanation::new(Reason::StartingRanks, message.clone());
        self.persist();
        self.note(Severity::Info, "Running", message);
    }

    fn reported(&mut self, attempt: Attempt, rank: RankIndex, report: Report) {
        if !self.is_current(attempt) {
            return;
        }
        let (now, trains) = (self.now, self.spec.kind() == JobKind::TrainingJob);
        let Some(known) = self.state.rank_mut(rank) else { return };
        // A report that was overtaken by the rank's end still tells why it ended, or of a
        // checkpoint.
        if !report.error.is_empty() && known.error.is_empty() {
            known.error = report.error;
        }
        if !known.phase.is_terminal() {
            known.reported = Some(now);
            known.position = report.position;
            if report.step > known.step {
                known.step = report.step;
                if trains {
                    self.state.progressed = Some(now);
                }
            }
        }
        if let Some(checkpoint) = report.checkpoint {
            let newest = self.state.checkpoint.as_ref().map(|checkpoint| checkpoint.step);
            if Some(checkpoint.step) > newest {
                self.state.checkpoint = Some(checkpoint);
                self.persist();
            }
        }
    }

    fn node_lost(&mut self, node: &NodeName, message: &str) {
        let lost: Vec<RankIndex> = self
            .state
            .ranks
            .iter()
            .filter(|rank| rank.device.node == *node && !rank.phase.is_terminal())
            .map(|rank| rank.rank)
            .collect();
        if !lost.is_empty() && self.state.phase.holds_devices() {
            let ranks = lost.len();
            self.note(
                Severity::Warning,
                Reason::NodeLost.token(),
                format!("node {node} is given up with {ranks} ranks: {message}"),
            );
        }
        for rank in lost {
            self.lose(rank, message);
        }
    }

    /// Ends the attempt when one of its ranks still runs on the device.
    fn device_failed(&mut self, device: &DeviceId, message: &str) {
        if self.state.ending.is_some() || !self.state.phase.holds_devices() {
            return;
        }
        let held = |rank: &&RankState| rank.device == *device && !rank.phase.is_terminal();
        let Some(rank) = self.state.ranks.iter().find(held) else { return };
        let message = format!("rank {} on {device}: {message}", rank.rank);
        self.take_down(Explanation::new(Reason::DeviceFailed, message));
    }

    fn rank_lost(&mut self, attempt: Attempt, rank: RankIndex, message: &str) {
        if self.is_current(attempt) {
            self.lose(rank, message);
        }
    }

    fn lose(&mut self, rank: RankIndex, message: &str) {
        if !self.state.phase.holds_devices() {
            return;
        }
        let (stopping, now) = (self.state.ending.is_some(), self.now);
        let Some(known) = self.state.rank_mut(rank) else { return };
        if known.phase.is_terminal() {
            return;
        }
        known.phase = RankPhase::Failed;
        known.lost = true;
        known.exit = Some(RankExit { rank, code: None, signal: None, message: message.to_owned() });
        known.ended = Some(now);
        known.after_stop = stopping;
        self.ended(rank);
    }

    /// Deals with the end of one rank.
    fn ended(&mut self, rank: RankIndex) {
        self.persist();
        if self.state.ending.is_some() {
            self.settle();
            return;
        }
        let Some(ended) = self.state.rank(rank).cloned() else { return };
        let serves = self.spec.kind() == JobKind::ModelService;
        if ended.phase == RankPhase::Failed || serves {
            let why = crate::cause::explain(&ended);
            self.take_down(why);
        } else if self.state.has_ended_ranks() {
            self.succeed();
        } else {
            // Finishing is progress: the others get their full time.
            self.state.progressed = Some(self.now);
            self.see_whether_all_run();
        }
    }

    pub(crate) fn succeed(&mut self) {
        let ranks = self.state.ranks.len();
        let message = format!("all {ranks} ranks exited with code 0");
        self.state.phase = JobPhase::Succeeded;
        self.state.started = self.state.started.or(Some(self.now));
        self.state.finished = Some(self.now);
        self.state.why = Explanation::new(Reason::Completed, message.clone());
        self.state.outcome =
            Some(Outcome { success: true, message: message.clone(), first_failure: None });
        self.persist();
        self.note(Severity::Info, Reason::Completed.token(), message);
        self.forget();
    }

    fn tick(&mut self) {
        let due = deadline(&self.state, self.spec).is_some_and(|at| at <= self.now);
        if !due {
            return;
        }
        match self.state.phase {
            JobPhase::Starting => self.take_down_late_start(),
            JobPhase::Running => self.take_down_stalled(),
            JobPhase::Restarting | JobPhase::Cancelling => self.stop_again(),
            // A pending job whose delay is over is simply planned.
            JobPhase::Pending | JobPhase::Succeeded | JobPhase::Failed | JobPhase::Cancelled => {}
        }
    }

    /// Does again what a control plane may have died before doing. Everything here is harmless to
    /// repeat; launches are repeated towards agents that do not know of them, once they say hello.
    fn recovered(&mut self) {
        if self.state.phase == JobPhase::Running {
            self.state.progressed = Some(self.now);
        }
        if self.state.ending.is_some() {
            self.stop_again();
            self.settle();
        }
    }
}
