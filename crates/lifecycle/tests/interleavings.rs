//! Properties over random orders of events: late, twice, for another attempt, or never.
//!
//! proptest prints the failing input, shrunk, and the seed under which it is found again.

mod support;

use std::collections::BTreeSet;

use drumline_lifecycle::{Action, Event, State, deadline, step};
use drumline_spec::JobSpec;
use drumline_types::{Attempt, Explanation, JobPhase, RankIndex, RankPhase, Reason, Timestamp};
use proptest::prelude::*;
use support::{Driver, command, ended, joined, killed, node, planned, report, service, training};

#[derive(Debug, Clone)]
enum Op {
    Plan,
    PlanOf(u32),
    Wait,
    Started { back: u32, rank: u32 },
    Running { back: u32, rank: u32 },
    Succeeded { back: u32, rank: u32 },
    Failed { back: u32, rank: u32, signal: bool, at: u64 },
    Join { back: u32, rank: u32 },
    Report { back: u32, rank: u32, step: u64, checkpoint: bool },
    NodeLost(u32),
    RankLost { back: u32, rank: u32 },
    Cancel,
    Evict { back: u32 },
    Hold(bool),
    Tick(u64),
    ToDeadline,
    Recovered,
    Again,
}

fn op() -> impl Strategy<Value = Op> {
    // Mostly the present attempt, at times one before or after it; rank 5 does not exist.
    let back = prop_oneof![8 => Just(1u32), 1 => Just(0), 1 => Just(2)];
    let at = (back, 0u32..6);
    prop_oneof![
        6 => Just(Op::Plan),
        1 => (0u32..6).prop_map(Op::PlanOf),
        1 => Just(Op::Wait),
        6 => at.clone().prop_map(|(back, rank)| Op::Started { back, rank }),
        6 => at.clone().prop_map(|(back, rank)| Op::Running { back, rank }),
        6 => at.clone().prop_map(|(back, rank)| Op::Succeeded { back, rank }),
        4 => (at.clone(), any::<bool>(), 0u64..100)
            .prop_map(|((back, rank), signal, at)| Op::Failed { back, rank, signal, at }),
        8 => at.clone().prop_map(|(back, rank)| Op::Join { back, rank }),
        3 => (at.clone(), 0u64..9, any::<bool>())
            .prop_map(|((back, rank), step, checkpoint)| Op::Report { back, rank, step, checkpoint }),
        1 => (0u32..3).prop_map(Op::NodeLost),
        1 => at.prop_map(|(back, rank)| Op::RankLost { back, rank }),
        1 => Just(Op::Cancel),
        2 => (0u32..3).prop_map(|back| Op::Evict { back }),
        2 => any::<bool>().prop_map(Op::Hold),
        3 => (0u64..70_000).prop_map(Op::Tick),
        2 => Just(Op::ToDeadline),
        1 => Just(Op::Recovered),
        3 => Just(Op::Again),
    ]
}

/// Watches what a careful observer of the fleet would.
struct Observer {
    live: BTreeSet<(Attempt, RankIndex)>,
    launched: u32,
}

impl Observer {
    /// Sees an event that was told about a rank.
    fn told(&mut self, event: &Event) {
        match event {
            Event::Status { attempt, rank, told } if told.phase.is_terminal() => {
                self.live.remove(&(*attempt, *rank));
            }
            Event::RankLost { attempt, rank, .. } => {
                self.live.remove(&(*attempt, *rank));
            }
            _ => {}
        }
    }

    fn node_lost(&mut self, before: &State, event: &Event) {
        if let Event::NodeLost { node, .. } = event {
            for rank in before.ranks.iter().filter(|rank| rank.device.node == *node) {
                self.live.remove(&(before.attempt, rank.rank));
            }
        }
    }

    fn check(&mut self, before: &State, after: &State, actions: &[Action]) {
        if before.phase.is_terminal() {
            assert_eq!(before, after, "a job that has ended stays as it is");
            assert!(actions.is_empty());
        }
        assert!(after.attempt >= before.attempt, "attempts only grow");
        if actions.contains(&Action::Launch) {
            assert!(self.live.is_empty(), "{:?} live at launch {}", self.live, after.attempt);
            assert_eq!(after.attempt.0, self.launched + 1);
            assert_eq!(before.phase, JobPhase::Pending);
            self.launched = after.attempt.0;
            self.live = after.ranks.iter().map(|rank| (after.attempt, rank.rank)).collect();
        }
        let durable = |state: &State| {
            let ends: Vec<_> = state.ranks.iter().map(|r| r.phase.is_terminal()).collect();
            (state.phase, state.attempt, state.why.clone(), state.restarts, ends, state.has_world())
        };
        if durable(before) != durable(after) && after.phase != JobPhase::Starting {
            assert!(actions.contains(&Action::Persist), "{before:?}\n->\n{after:?}\n{actions:?}");
        }
        assert_eq!(after.ending.is_some(), is_ending(after.phase));
        if after.phase == JobPhase::Pending || after.phase == JobPhase::Running {
            assert_eq!(after.ranks.is_empty(), after.phase == JobPhase::Pending);
        }
        if after.phase.is_terminal() {
            assert!(after.outcome.is_some() && after.finished.is_some());
            let success = after.phase == JobPhase::Succeeded;
            assert_eq!(after.outcome.as_ref().unwrap().success, success);
            let all = after.ranks.iter().all(|rank| rank.phase == RankPhase::Succeeded);
            assert!(!success || all, "succeeded with a rank that did not");
        }
        for (rank, was) in after.ranks.iter().zip(&before.ranks) {
            if before.attempt == after.attempt && was.phase.is_terminal() {
                assert_eq!((was.phase, &was.exit), (rank.phase, &rank.exit), "an end is an end");
            }
        }
    }
}

fn is_ending(phase: JobPhase) -> bool {
    matches!(phase, JobPhase::Restarting | JobPhase::Cancelling)
}

fn event(op: &Op, job: &Driver, last: &Event) -> Event {
    let attempt = |back: u32| (job.state.attempt.0 + 1).saturating_sub(back);
    match *op {
        Op::Plan => planned(&job.spec, job.state.attempt.0 + 1),
        Op::PlanOf(attempt) => planned(&job.spec, attempt),
        Op::Wait => Event::Waits(Explanation::new(Reason::WaitingForDevices, "needs 4")),
        Op::Started { back, rank } => support::status(attempt(back), rank, RankPhase::Started),
        Op::Running { back, rank } => support::status(attempt(back), rank, RankPhase::Running),
        Op::Succeeded { back, rank } => {
            ended(attempt(back), rank, RankPhase::Succeeded, Some(0), None, "", 5)
        }
        Op::Failed { back, rank, signal: true, at } => killed(attempt(back), rank, 9, at),
        Op::Failed { back, rank, at, .. } => {
            ended(attempt(back), rank, RankPhase::Failed, Some(1), None, "boom", at)
        }
        Op::Join { back, rank } => joined(attempt(back), rank),
        Op::Report { back, rank, step, checkpoint } => {
            report(attempt(back), rank, step, checkpoint.then_some(step))
        }
        Op::NodeLost(index) => Event::NodeLost { node: node(index), message: "gone".to_owned() },
        Op::RankLost { back, rank } => Event::RankLost {
            attempt: Attempt(attempt(back)),
            rank: RankIndex(rank),
            message: "gone".to_owned(),
        },
        Op::Hold(held) => Event::Held(held),
        Op::Evict { back } => Event::Evicted {
            attempt: Attempt(attempt(back)),
            why: Explanation::new(Reason::Preempted, "for a bigger one"),
        },
        Op::Cancel => Event::Cancel { user: "ada".to_owned() },
        Op::Tick(_) | Op::ToDeadline => Event::Tick,
        Op::Recovered => Event::Recovered,
        Op::Again => last.clone(),
    }
}

fn play(spec: JobSpec, ops: &[Op]) {
    let mut job = Driver::new(spec);
    let mut observer = Observer { live: BTreeSet::new(), launched: 0 };
    let mut last = Event::Tick;
    for op in ops {
        match op {
            Op::Tick(ms) => job.now += ms,
            Op::ToDeadline => {
                let due = deadline(&job.state, &job.spec);
                job.now = due.map_or(job.now, |due| due.0.max(job.now));
            }
            _ => {}
        }
        let event = event(op, &job, &last);
        let before = job.state.clone();
        observer.told(&event);
        observer.node_lost(&before, &event);
        job.feed(event.clone());
        let again = step(before.clone(), &job.spec, event.clone(), Timestamp(job.now));
        assert_eq!(again, (job.state.clone(), job.actions.clone()), "same input, same output");
        observer.check(&before, &job.state, &job.actions);
        last = event;
    }
    settle(job);
}

/// From wherever it is, a job whose agents answer comes to an end in a bounded number of rounds.
fn settle(mut job: Driver) {
    job.feed(Event::Held(false));
    for _ in 0..40 {
        if job.state.phase.is_terminal() {
            return;
        }
        if job.state.phase == JobPhase::Pending {
            job.run();
        }
        let attempt = job.state.attempt.0;
        for rank in 0..job.state.ranks.len() as u32 {
            job.feed(killed(attempt, rank, 15, 1));
        }
    }
    panic!("still {} after 40 rounds", job.state.phase);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_breaks_a_training_run(ops in proptest::collection::vec(op(), 1..120)) {
        play(training(2), &ops);
    }

    #[test]
    fn no_order_of_events_breaks_a_command(ops in proptest::collection::vec(op(), 1..120)) {
        play(command(2), &ops);
    }

    #[test]
    fn no_order_of_events_breaks_a_service(ops in proptest::collection::vec(op(), 1..120)) {
        play(service(2), &ops);
    }
}
