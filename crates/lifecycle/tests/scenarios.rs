//! What a gang does, told as short stories.

mod support;

use drumline_lifecycle::{Action, Event, deadline};
use drumline_types::{Explanation, JobPhase, RankPhase, Reason, Timestamp};
use support::{
    Driver, command, ended, id, joined, killed, node, planned, report, service, status, training,
};

#[test]
fn a_gang_that_finishes_has_succeeded_once_its_last_rank_has() {
    let mut job = Driver::new(training(3));
    job.run();
    assert!(job.has(|a| matches!(a, Action::SendWorld { nodes } if nodes.len() == 2)));
    for rank in 0..3 {
        job.feed(status(1, rank, RankPhase::Succeeded));
        assert_eq!(job.state.phase, JobPhase::Running, "rank {rank}");
        assert!(!job.has(|a| matches!(a, Action::Stop { .. })));
    }
    job.feed(status(1, 3, RankPhase::Succeeded));
    assert_eq!(job.state.phase, JobPhase::Succeeded);
    assert!(job.has(|a| matches!(a, Action::Forget { .. })));
    assert!(job.state.outcome.as_ref().unwrap().success);
}

#[test]
fn a_failing_rank_takes_the_gang_down_and_the_next_attempt_waits_for_all_ends() {
    let mut job = Driver::new(command(3));
    job.run();
    job.feed(ended(1, 2, RankPhase::Failed, Some(3), None, "boom", 10));
    assert_eq!(job.state.phase, JobPhase::Restarting);
    assert!(job.has(|a| matches!(a, Action::Stop { nodes, .. } if nodes.len() == 2)));
    for rank in [0, 1] {
        job.feed(killed(1, rank, 15, 20));
        assert_eq!(job.state.phase, JobPhase::Restarting);
    }
    job.feed(killed(1, 3, 15, 20));
    assert_eq!(job.state.phase, JobPhase::Pending);
    assert_eq!((job.state.restarts, job.state.fruitless), (1, 1));
    let failure = job.state.first_failure.clone().unwrap();
    assert_eq!((failure.exit.rank.0, failure.exit.code), (2, Some(3)));
    assert_eq!(failure.exit.message, "boom");
    assert!(job.state.ranks.is_empty());
    // The delay holds, then attempt 2 goes.
    let early = planned(&job.spec.clone(), 2);
    job.feed(early);
    assert_eq!(job.state.phase, JobPhase::Pending);
    job.run();
    assert_eq!(job.state.attempt.0, 2);
}

#[test]
fn restarts_without_progress_are_counted_and_their_delay_doubles() {
    let mut job = Driver::new(training(3));
    let mut delays = Vec::new();
    while !job.state.phase.is_terminal() {
        job.run();
        let attempt = job.state.attempt.0;
        job.feed(ended(attempt, 0, RankPhase::Failed, Some(1), None, "no data", job.now));
        job.stop_the_rest();
        delays.push(job.state.not_before.since_ms(Timestamp(job.now)));
    }
    assert_eq!(job.state.phase, JobPhase::Failed);
    assert_eq!(job.state.why.reason, Reason::RestartsExhausted);
    assert_eq!(job.state.restarts, 3);
    assert_eq!(delays[..3], [1000, 2000, 4000]);
    let outcome = job.state.outcome.unwrap();
    assert!(outcome.message.contains("no data"), "{}", outcome.message);
}

#[test]
fn a_newer_checkpoint_makes_the_next_restart_free() {
    let mut job = Driver::new(training(1));
    for round in 1..=5u32 {
        job.run();
        job.feed(report(round, 0, u64::from(round), Some(u64::from(round))));
        assert!(job.has(|a| matches!(a, Action::Persist)));
        job.feed(killed(round, 1, 9, job.now));
        job.stop_the_rest();
        assert_eq!(job.state.phase, JobPhase::Pending, "round {round}");
        assert_eq!((job.state.restarts, job.state.fruitless), (round, 0));
        assert_eq!(job.state.not_before.0, job.now, "progress needs no delay");
    }
}

#[test]
fn an_old_checkpoint_told_again_is_no_progress() {
    let mut job = Driver::new(training(1));
    for _ in 0..2 {
        job.run();
        let attempt = job.state.attempt.0;
        job.feed(report(attempt, 0, 5, Some(5)));
        job.feed(killed(attempt, 1, 9, job.now));
        job.stop_the_rest();
    }
    assert_eq!((job.state.restarts, job.state.fruitless), (2, 1));
}

#[test]
fn a_limit_of_zero_forbids_any_restart() {
    let mut job = Driver::new(command(0));
    job.run();
    job.feed(ended(1, 0, RankPhase::Failed, Some(1), None, "", 5)).stop_the_rest();
    assert_eq!(job.state.phase, JobPhase::Failed);
    assert_eq!(job.state.why.reason, Reason::RankFailed);
}

#[test]
fn a_minute_of_running_is_progress_of_a_service() {
    for (ran_ms, fruitless) in [(59_000, 1), (60_000, 0)] {
        let mut job = Driver::new(service(3));
        job.run();
        job.now += ran_ms;
        job.feed(killed(1, 0, 11, job.now)).stop_the_rest();
        assert_eq!(job.state.fruitless, fruitless, "{ran_ms}");
    }
}

#[test]
fn a_service_never_ends_by_itself() {
    let mut job = Driver::new(service(3));
    job.run();
    job.feed(status(1, 0, RankPhase::Succeeded));
    assert_eq!(job.state.phase, JobPhase::Restarting);
    job.feed(killed(1, 1, 15, 5));
    assert_eq!(job.state.phase, JobPhase::Pending);
    let failure = job.state.first_failure.unwrap();
    assert_eq!((failure.exit.rank.0, failure.exit.code), (0, Some(0)));
}

#[test]
fn the_first_failing_rank_is_the_cause_and_not_the_first_that_was_heard() {
    let gone = "rank 1 of the group is gone during all_reduce";
    // (events as heard, the rank that failed first)
    let f = RankPhase::Failed;
    let cases: Vec<(&str, Vec<Event>, u32)> = vec![
        (
            "a follower is heard before the killed rank",
            vec![
                ended(1, 0, f, Some(1), None, gone, 101),
                killed(1, 1, 9, 100),
                killed(1, 2, 15, 110),
                killed(1, 3, 15, 110),
            ],
            1,
        ),
        (
            "a follower is heard before an error that was written a little later",
            vec![
                ended(1, 3, f, Some(1), None, gone, 101),
                ended(1, 1, f, Some(101), None, "out of memory", 115),
                killed(1, 0, 15, 120),
                killed(1, 2, 9, 120),
            ],
            1,
        ),
        (
            "ranks that our stop killed are no cause",
            vec![
                ended(1, 2, f, Some(2), None, "bad data", 100),
                killed(1, 0, 15, 120),
                killed(1, 1, 9, 130),
                killed(1, 3, 15, 130),
            ],
            2,
        ),
        (
            "a rank that a signal ended before anything else is, although its news came late",
            vec![
                ended(1, 2, f, Some(2), None, "lost contact", 100),
                killed(1, 0, 9, 90),
                killed(1, 1, 9, 130),
                killed(1, 3, 15, 130),
            ],
            0,
        ),
        (
            "only followers: the earliest",
            vec![
                ended(1, 2, f, Some(1), None, gone, 105),
                ended(1, 0, f, Some(1), None, "Connection reset by peer (os error 104)", 104),
                killed(1, 1, 15, 130),
                killed(1, 3, 15, 130),
            ],
            0,
        ),
        (
            "a lost node goes before those who noticed",
            vec![
                ended(1, 0, f, Some(1), None, gone, 100),
                killed(1, 1, 15, 110),
                Event::NodeLost { node: node(1), message: "silent for 10s".to_owned() },
            ],
            2,
        ),
    ];
    for (name, events, first) in cases {
        let mut job = Driver::new(training(3));
        job.run();
        job.now = 5_000;
        for event in events {
            job.feed(event);
        }
        assert_eq!(job.state.phase, JobPhase::Pending, "{name}");
        assert_eq!(job.state.first_failure.unwrap().exit.rank.0, first, "{name}");
    }
}

#[test]
fn the_error_that_a_rank_reported_is_kept_with_its_end() {
    let mut job = Driver::new(training(0));
    job.run();
    let report = drumline_lifecycle::Report { error: "loss is NaN".into(), ..Default::default() };
    let (attempt, rank) = (job.state.attempt, job.state.ranks[1].rank);
    job.feed(Event::Reported { attempt, rank, report });
    job.feed(ended(1, 1, RankPhase::Failed, Some(1), None, "last log line", 5)).stop_the_rest();
    assert_eq!(job.state.first_failure.unwrap().exit.message, "loss is NaN");
}

#[test]
fn a_lost_node_restarts_the_gang_and_a_node_whose_ranks_have_finished_does_not() {
    let lost = |index| Event::NodeLost { node: node(index), message: "agent gone".to_owned() };
    let mut job = Driver::new(training(3));
    job.run();
    for rank in [2, 3] {
        job.feed(status(1, rank, RankPhase::Succeeded));
    }
    assert_eq!(job.state.ranks[2].device.node, node(1));
    job.feed(lost(1));
    assert_eq!(job.state.phase, JobPhase::Running, "its ranks had finished");
    job.feed(lost(0));
    assert_eq!(job.state.phase, JobPhase::Pending);
    assert_eq!(job.state.restarts, 1);
    assert!(job.state.why.message.contains("agent gone"), "{}", job.state.why);
}

#[test]
fn the_watchdog_ends_a_run_without_steps_and_says_where_each_rank_stood() {
    let mut job = Driver::new(training(3));
    job.run();
    job.wait(59_000);
    job.feed(report(1, 0, 1, None));
    let due = deadline(&job.state, &job.spec).unwrap();
    assert_eq!(due.0, job.now + 60_000);
    job.wait(59_999);
    assert_eq!(job.state.phase, JobPhase::Running);
    job.wait(1);
    assert_eq!(job.state.phase, JobPhase::Restarting);
    assert_eq!(job.state.why.reason, Reason::Stalled);
    assert!(job.state.why.message.contains("rank 0 step 1"), "{}", job.state.why);
    assert!(job.state.why.message.contains("rank 3 step 0"), "{}", job.state.why);
    job.stop_the_rest();
    assert!(job.state.why.message.contains("no step was finished"), "{}", job.state.why);
}

#[test]
fn finishing_ranks_give_the_others_their_full_time() {
    let mut job = Driver::new(training(3));
    job.run();
    for rank in 0..3 {
        job.now += 50_000;
        job.feed(status(1, rank, RankPhase::Succeeded));
        job.wait(0);
        assert_eq!(job.state.phase, JobPhase::Running, "rank {rank}");
    }
    job.wait(60_000);
    assert_eq!(job.state.phase, JobPhase::Restarting, "the last one hangs");
}

#[test]
fn a_service_whose_rank_no_longer_reports_is_taken_down() {
    let mut job = Driver::new(service(3));
    job.run();
    for _ in 0..40 {
        job.now += 2_000;
        job.feed(report(1, 0, 0, None)).feed(report(1, 1, 0, None)).wait(0);
    }
    assert_eq!(job.state.phase, JobPhase::Running, "nothing to do is no stall");
    for _ in 0..30 {
        job.now += 2_000;
        job.feed(report(1, 0, 0, None)).wait(0);
    }
    assert_eq!(job.state.why.reason, Reason::Stalled);
}

#[test]
fn a_service_is_judged_by_its_leader_and_has_time_to_load() {
    let mut job = Driver::new(service(3));
    let plan = planned(&job.spec.clone(), 1);
    job.feed(plan);
    for rank in 0..2 {
        let Event::Joined { attempt, rank: index, mut join } = joined(1, rank) else {
            unreachable!()
        };
        if rank == 0 {
            "http://127.0.0.1:1".clone_into(&mut join.inference_url);
        }
        job.feed(Event::Joined { attempt, rank: index, join });
    }
    // Loading: the minute of the watchdog and the minute of a start.
    job.wait(119_999);
    assert_eq!(job.state.phase, JobPhase::Running);
    for _ in 0..40 {
        job.now += 2_000;
        job.feed(report(1, 0, 0, None)).wait(0);
    }
    assert_eq!(job.state.phase, JobPhase::Running, "rank 1 has nothing to report");
    job.wait(60_000);
    assert_eq!(job.state.why.reason, Reason::Stalled);
}

#[test]
fn ranks_that_do_not_join_in_time_are_named() {
    let mut job = Driver::new(training(3));
    let plan = planned(&job.spec.clone(), 1);
    job.feed(plan);
    for rank in 0..3 {
        job.feed(status(1, rank, RankPhase::Started)).feed(joined(1, rank));
    }
    job.wait(29_999);
    assert_eq!(job.state.phase, JobPhase::Starting);
    job.wait(1);
    assert_eq!(job.state.why.reason, Reason::RendezvousTimedOut);
    assert!(job.state.why.message.ends_with("rank 3 not started"), "{}", job.state.why);
}

#[test]
fn a_join_that_is_repeated_gets_the_world_again_on_its_node_only() {
    let mut job = Driver::new(training(3));
    job.run();
    job.feed(joined(1, 3));
    assert_eq!(job.actions, vec![Action::SendWorld { nodes: vec![node(1)] }]);
    job.feed(joined(7, 3));
    assert_eq!(job.actions, vec![]);
}

fn evicted(attempt: u32) -> Event {
    let why = Explanation::new(Reason::Preempted, "for train-big, priority 200");
    Event::Evicted { attempt: drumline_types::Attempt(attempt), why }
}

#[test]
fn an_evicted_gang_waits_again_with_nothing_counted_against_it() {
    let mut job = Driver::new(command(3));
    job.run();
    job.feed(evicted(1));
    assert_eq!(job.state.phase, JobPhase::Restarting);
    assert!(job.has(|a| matches!(a, Action::Stop { nodes, .. } if nodes.len() == 2)));
    for rank in 0..4 {
        job.feed(killed(1, rank, 15, 20));
    }
    assert_eq!(job.state.phase, JobPhase::Pending);
    assert_eq!(job.state.why.reason, Reason::Preempted);
    assert_eq!((job.state.restarts, job.state.fruitless, job.state.evictions), (0, 0, 1));
    assert!(job.state.first_failure.is_none(), "nothing failed");
    job.run();
    assert_eq!(job.state.attempt.0, 2);
}

#[test]
fn a_gang_that_is_finishing_is_not_evicted() {
    let mut job = Driver::new(command(3));
    job.run();
    job.feed(status(1, 0, RankPhase::Succeeded));
    job.feed(evicted(1));
    assert_eq!(job.state.phase, JobPhase::Running);
}

#[test]
fn a_gang_whose_ranks_all_finished_when_it_was_evicted_has_succeeded() {
    let mut job = Driver::new(command(3));
    job.run();
    job.feed(evicted(1));
    for rank in 0..4 {
        job.feed(status(1, rank, RankPhase::Succeeded));
    }
    assert_eq!(job.state.phase, JobPhase::Succeeded);
}

#[test]
fn cancelling_waits_for_the_ranks_to_end() {
    let cancel = || Event::Cancel { user: "ada".to_owned() };
    let mut pending = Driver::new(training(3));
    pending.feed(cancel());
    assert_eq!(pending.state.phase, JobPhase::Cancelled);

    let mut job = Driver::new(training(3));
    job.run().feed(cancel());
    assert_eq!(job.state.phase, JobPhase::Cancelling);
    assert!(job.has(|a| matches!(a, Action::Stop { grace_ms: 10_000, .. })));
    job.feed(cancel());
    assert_eq!(job.actions, vec![]);
    for rank in 0..4 {
        job.feed(status(1, rank, RankPhase::Succeeded));
    }
    assert_eq!(job.state.phase, JobPhase::Cancelled);
    assert!(job.state.why.message.contains("ada"));

    let mut failing = Driver::new(training(3));
    failing.run().feed(killed(1, 0, 9, 1)).feed(cancel()).stop_the_rest();
    assert_eq!(failing.state.phase, JobPhase::Cancelled, "a restart was under way");
    assert_eq!(failing.state.restarts, 0);
}

#[test]
fn a_stop_that_is_not_obeyed_is_asked_for_again() {
    let mut job = Driver::new(command(3));
    job.run().feed(killed(1, 0, 9, 1));
    let mut waits = Vec::new();
    for _ in 0..4 {
        let due = deadline(&job.state, &job.spec).unwrap();
        waits.push(due.0 - job.now);
        job.now = due.0;
        job.feed(Event::Tick);
        assert!(job.has(|a| matches!(a, Action::Stop { grace_ms: 0, .. })));
    }
    assert_eq!(waits, [15_000, 30_000, 60_000, 60_000]);
}

#[test]
fn a_waiting_job_says_why_and_is_written_only_when_that_changes() {
    let mut job = Driver::new(command(3));
    let why = |n: u32| Explanation::new(Reason::WaitingForDevices, format!("needs {n}"));
    job.feed(Event::Waits(why(4)));
    assert!(job.has(|a| matches!(a, Action::Record(_))) && job.has(|a| *a == Action::Persist));
    job.feed(Event::Waits(why(4)));
    assert_eq!(job.actions, vec![]);
    job.feed(Event::Waits(why(2)));
    assert_eq!(job.actions, vec![Action::Persist], "the evidence changed, not the reason");
}

#[test]
fn after_recovery_an_ending_gang_is_stopped_again_and_a_running_one_is_left_alone() {
    let mut job = Driver::new(training(3));
    job.run();
    let stored = serde_json::to_string(&job.state).unwrap();
    job.state = serde_json::from_str(&stored).unwrap();
    job.now += 3_600_000;
    job.feed(Event::Recovered);
    assert_eq!(job.actions, vec![]);
    job.wait(59_999);
    assert_eq!(job.state.phase, JobPhase::Running, "the watchdog starts anew");
    job.feed(killed(1, 2, 9, 1));
    job.feed(Event::Recovered);
    assert!(job.has(|a| matches!(a, Action::Stop { grace_ms: 0, .. })));
}

#[test]
fn a_state_is_stored_and_read_back_as_it_was() {
    let mut job = Driver::new(training(3));
    job.run();
    let stored = serde_json::to_string(&job.state).unwrap();
    let mut read: drumline_lifecycle::State = serde_json::from_str(&stored).unwrap();
    read.progressed = job.state.progressed;
    assert_eq!(read, job.state);
    assert_eq!(read.job, id());
    assert!(!format!("{read:?}").contains("secret-of-attempt"), "secrets are not shown");
}

#[test]
fn a_device_that_fails_ends_the_attempt_and_is_held_against_nobody() {
    let mut job = Driver::new(command(1));
    for round in 1..=3u32 {
        job.run();
        let device = job.state.ranks[2].device.clone();
        let message = "Xid 79: the GPU has fallen off the bus; reboot the node".to_owned();
        let failed = Event::DeviceFailed { device, message };
        job.feed(failed.clone());
        assert_eq!(job.state.phase, JobPhase::Restarting);
        assert_eq!(job.state.why.reason, Reason::DeviceFailed);
        assert!(
            job.state.why.message.contains("rank 2 on") && job.state.why.message.contains("79")
        );
        assert!(job.has(|a| matches!(a, Action::Stop { nodes, .. } if nodes.len() == 2)));
        // Told again at every heartbeat.
        job.feed(failed);
        assert!(job.actions.is_empty(), "{:?}", job.actions);
        job.stop_the_rest();
        // One restart is allowed: without this rule the second failure would be the end.
        assert_eq!((job.state.phase, job.state.restarts), (JobPhase::Pending, round));
        assert_eq!(job.state.fruitless, 0);
        assert_eq!(job.state.not_before.0, job.now, "other devices need no delay");
        assert!(job.state.why.message.contains("Xid 79"), "{}", job.state.why.message);
    }
}

#[test]
fn a_device_of_somebody_else_or_of_a_rank_that_ended_changes_nothing() {
    let mut job = Driver::new(command(1));
    job.run();
    let message = "lost".to_owned();
    let device = drumline_types::DeviceId { node: node(9), index: 0 };
    job.feed(Event::DeviceFailed { device, message: message.clone() });
    assert_eq!(job.state.phase, JobPhase::Running);
    let device = job.state.ranks[3].device.clone();
    job.feed(status(1, 3, RankPhase::Succeeded));
    job.feed(Event::DeviceFailed { device, message: message.clone() });
    assert_eq!(job.state.phase, JobPhase::Running, "its work was done");
    // Restarts that are not allowed stay so.
    let mut job = Driver::new(command(0));
    job.run();
    let device = job.state.ranks[0].device.clone();
    job.feed(Event::DeviceFailed { device, message }).stop_the_rest();
    assert_eq!((job.state.phase, job.state.why.reason), (JobPhase::Failed, Reason::DeviceFailed));
}
