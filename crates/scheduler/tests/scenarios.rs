//! The known hard cases: a cluster in, decisions out.

mod support;

use drumline_cluster::{Change, Health};
use drumline_scheduler::{Options, Scheduler};
use drumline_types::{Attempt, Timestamp};
use support::{Job, MINUTE, Queue, World};

#[test]
fn two_gangs_that_could_each_hold_half_do_not_deadlock() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("left", 6));
    world.submit(Job::named("right", 6));
    assert_eq!(world.cycle(), ["left starts on a x4, b x2"]);
    for _ in 0..3 {
        world.wait(MINUTE);
        assert_eq!(world.cycle(), Vec::<String>::new());
        assert_eq!(world.scheduler.fleet().commitments().len(), 1, "who waits holds nothing");
    }
    world.end("left");
    assert_eq!(world.cycle(), ["right starts on a x4, b x2"]);
}

#[test]
fn a_preemptor_that_could_not_fit_preempts_nobody_and_blocks_nobody() {
    let mut world = World::new().nodes("r1/a r2/b", 4);
    world.submit(Job::named("low-a", 4));
    world.submit(Job::named("fixed-b", 3).not_preemptible());
    assert_eq!(world.cycle().len(), 2);
    // Whoever is evicted, no rack has eight devices.
    world.submit(Job::named("wide", 6).priority(9).in_one("rack"));
    world.submit(Job::named("small", 1));
    assert_eq!(world.cycle(), ["small starts on b x1"]);
    for _ in 0..3 {
        world.wait(MINUTE);
        assert_eq!(world.cycle(), Vec::<String>::new(), "it does not spin");
    }
}

#[test]
fn a_preemptor_gets_what_was_freed_for_it_whoever_else_waits() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("low", 4));
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("high", 2).priority(5));
    assert_eq!(world.cycle(), ["low is preempted for high"]);
    world.submit(Job::named("rival", 4).priority(5));
    world.all_leave();
    assert_eq!(world.cycle(), ["high starts on a x2"]);
    assert!(world.why("rival").contains("would fit with 2"), "{}", world.why("rival"));
}

#[test]
fn the_victim_that_loses_least_goes() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("fresh-checkpoint", 2));
    world.submit(Job::named("old-work", 2));
    assert_eq!(world.cycle().len(), 2);
    world.wait(600 * MINUTE);
    world.apply(Change::Checkpointed { job: "fresh-checkpoint".parse().unwrap() });
    world.submit(Job::named("high", 2).priority(5));
    assert_eq!(world.cycle(), ["fresh-checkpoint is preempted for high"]);
}

#[test]
fn victims_come_from_one_rack_where_one_will_do() {
    let mut world = World::new().nodes("r1/a r1/b r2/c r2/d", 4);
    for name in ["one", "two", "three", "four"] {
        world.submit(Job::named(name, 4));
    }
    assert_eq!(world.cycle().len(), 4);
    world.submit(Job::named("high", 8).priority(5).in_one("rack"));
    let decided = world.cycle();
    assert_eq!(decided.len(), 2, "{decided:?}");
    world.all_leave();
    let started = world.cycle();
    assert!(
        started == ["high starts on a x4, b x4"] || started == ["high starts on c x4, d x4"],
        "{started:?}"
    );
}

#[test]
fn who_may_not_be_disrupted_is_left_alone_until_it_may() {
    let mut world = World::new().nodes("a", 2);
    world.submit(Job::named("young", 2).min_runtime(10 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.wait(MINUTE);
    world.submit(Job::named("high", 2).priority(5));
    let cycle = world.decide();
    assert!(cycle.evictions.is_empty());
    assert_eq!(cycle.wake, Some(Timestamp(10 * MINUTE)), "it says when to look again");
    world.wait(9 * MINUTE);
    assert_eq!(world.cycle(), ["young is preempted for high"]);
}

#[test]
fn a_disruption_budget_is_kept() {
    let mut world = World::new().nodes("a", 2);
    world.submit(Job::named("low", 2).disruptions(1, 60 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("high", 2).priority(5));
    assert_eq!(world.cycle(), ["low is preempted for high"]);
    world.all_leave();
    assert_eq!(world.cycle(), ["high starts on a x2"]);
    world.wait(10 * MINUTE);
    world.end("high");
    assert_eq!(world.cycle(), ["low starts on a x2"]);
    world.wait(10 * MINUTE);
    world.submit(Job::named("again", 2).priority(5));
    assert_eq!(world.cycle(), Vec::<String>::new());
    world.wait(40 * MINUTE);
    assert_eq!(world.cycle(), ["low is preempted for again"]);
}

#[test]
fn an_elastic_gang_shrinks_before_anyone_is_evicted() {
    let mut world = World::new().nodes("a", 8);
    world.submit(Job::named("stretch", 6).elastic(2, 6));
    world.submit(Job::named("rigid", 2));
    assert_eq!(world.cycle().len(), 2);
    world.submit(Job::named("high", 2).priority(5));
    assert_eq!(world.cycle(), ["stretch is preempted to 4 for high"]);
    world.all_leave();
    let mut started = world.cycle();
    started.sort();
    assert_eq!(started, ["high starts on a x2", "stretch starts on a x4"]);
}

#[test]
fn an_elastic_gang_grows_when_devices_are_idle_and_it_gains_by_it() {
    let mut world = World::new().nodes("a", 8);
    world.submit(Job::named("other", 5));
    world.submit(Job::named("stretch", 4).elastic(2, 8).takes(600 * MINUTE));
    assert_eq!(world.cycle(), ["other starts on a x5", "stretch starts on a x3"]);
    world.wait(10 * MINUTE);
    assert_eq!(world.cycle(), Vec::<String>::new());
    world.end("other");
    // Ten minutes of work would be lost, and hours with five more devices are won.
    assert_eq!(world.cycle(), ["stretch is resized to 8 for nobody"]);
    world.all_leave();
    assert_eq!(world.cycle(), ["stretch starts on a x8"]);
    assert_eq!(world.cycle(), Vec::<String>::new());
}

#[test]
fn an_elastic_gang_grows_only_if_that_pays_for_two_restarts() {
    // Ten minutes of work and a restart of one, twice, on four devices: 88 device-minutes. Four
    // more devices have to win more than that before the end.
    for (left, grows) in [(12, false), (22, false), (23, true)] {
        let mut world = World::new().nodes("a", 8);
        world.submit(Job::named("other", 4));
        world.submit(Job::named("stretch", 4).elastic(2, 8).takes((10 + left) * MINUTE));
        assert_eq!(world.cycle().len(), 2);
        world.wait(10 * MINUTE);
        world.end("other");
        let cycle = world.cycle();
        assert_eq!(cycle == ["stretch is resized to 8 for nobody"], grows, "{left}: {cycle:?}");
        assert_eq!(cycle.is_empty(), !grows, "{left}: {cycle:?}");
    }
}

#[test]
fn a_gang_whose_work_is_safe_grows_for_less() {
    let mut world = World::new().nodes("a", 8);
    world.submit(Job::named("other", 4));
    world.submit(Job::named("stretch", 4).elastic(2, 8).takes(13 * MINUTE));
    assert_eq!(world.cycle().len(), 2);
    world.wait(10 * MINUTE);
    world.apply(Change::Checkpointed { job: "stretch".parse().unwrap() });
    world.end("other");
    // Two restarts of a minute on four devices, for three minutes with four more.
    assert_eq!(world.cycle(), ["stretch is resized to 8 for nobody"]);
}

#[test]
fn an_elastic_gang_starts_at_the_size_that_fits() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("runs", 1));
    world.submit(Job::named("stretch", 4).elastic(2, 8));
    let decided = world.cycle();
    assert_eq!(decided, ["runs starts on a x1", "stretch starts on a x3"]);
}

#[test]
fn a_gang_that_needs_one_rack_waits_when_free_devices_are_scattered() {
    let mut world = World::new().nodes("r1/a r1/b r2/c r2/d", 4);
    for name in ["w", "x", "y", "z"] {
        world.submit(Job::named(name, 3).not_preemptible());
    }
    assert_eq!(world.cycle().len(), 4);
    world.submit(Job::named("together", 4).in_one("rack"));
    assert_eq!(world.cycle(), Vec::<String>::new());
    let why = world.why("together");
    assert!(why.starts_with("TopologyDoesNotFit"), "{why}");
    assert!(why.contains("4 free"), "{why}");
    assert!(why.contains("in one rack"), "{why}");
}

#[test]
fn gangs_are_moved_only_when_each_finds_a_place_and_less_is_lost_than_won() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("one", 1).takes(500 * MINUTE));
    world.submit(Job::named("three", 3).takes(500 * MINUTE));
    world.submit(Job::named("two", 2).takes(500 * MINUTE));
    assert_eq!(world.cycle().len(), 3);
    world.end("three");
    world.wait(MINUTE);
    // Five are free, three beside `one`: a gang of four on one node fits nowhere.
    world.submit(Job::named("whole", 4).groups(4));
    assert_eq!(world.cycle(), ["one is consolidated for whole"]);
    world.all_leave();
    let mut started = world.cycle();
    started.sort();
    assert_eq!(started.len(), 2, "{started:?}");
    assert!(started[1].starts_with("whole starts on"), "{started:?}");
}

#[test]
fn moves_are_sought_where_the_fewest_devices_lack() {
    // On each node somebody is in the way; on `c` it is one device, elsewhere two or three.
    let mut world = World::new();
    for (node, held) in [("a", 3), ("b", 2), ("c", 1), ("d", 2)] {
        world.node(node, 4, "H100");
        for at in 0..held {
            world.submit(Job::named(&format!("{node}-{at}"), 1).takes(500 * MINUTE));
        }
        let rest = Job::named(&format!("{node}-rest"), 4 - held);
        world.submit(rest.takes(500 * MINUTE));
        assert_eq!(world.cycle().len(), held as usize + 1);
    }
    for node in ["a", "b", "c", "d"] {
        world.end(&format!("{node}-rest"));
    }
    world.submit(Job::named("whole", 4).groups(4));
    assert_eq!(world.cycle(), ["c-0 is consolidated for whole"]);
    world.all_leave();
    assert_eq!(world.cycle().len(), 2);
    assert_eq!(world.on("whole"), ["c"]);
}

#[test]
fn who_may_not_be_moved_keeps_only_its_own_node_from_being_emptied() {
    let mut world = World::new();
    for (node, held) in [("a", 2), ("b", 1)] {
        world.node(node, 4, "H100");
        let stays = Job::named(&format!("{node}-stays"), held).takes(500 * MINUTE);
        world.submit(if node == "b" { stays.not_preemptible() } else { stays });
        world.submit(Job::named(&format!("{node}-rest"), 4 - held).takes(500 * MINUTE));
        assert_eq!(world.cycle().len(), 2);
    }
    world.end("a-rest");
    world.end("b-rest");
    world.submit(Job::named("whole", 4).groups(4));
    assert_eq!(world.cycle(), ["a-stays is consolidated for whole"]);
}

#[test]
fn moves_make_room_in_one_rack() {
    let mut world = World::new();
    for node in ["r1/a", "r1/b", "r2/c", "r2/d"] {
        world.node(node, 4, "H100");
    }
    // Eight are free, four in each rack: two on every node.
    for at in 0..8 {
        world.submit(Job::named(&format!("one-{at}"), 2).takes(500 * MINUTE));
    }
    assert_eq!(world.cycle().len(), 8);
    let mut seen = std::collections::BTreeSet::new();
    for at in 0..8 {
        let name = format!("one-{at}");
        if seen.insert(world.on(&name)) {
            world.end(&name);
        }
    }
    world.submit(Job::named("together", 6).in_one("rack"));
    let moved = world.cycle();
    assert_eq!(moved.len(), 1, "{moved:?}");
    assert!(moved[0].ends_with("is consolidated for together"), "{moved:?}");
    world.all_leave();
    assert_eq!(world.cycle().len(), 2);
}

#[test]
fn moves_empty_several_nodes_for_a_gang_of_groups() {
    let mut world = World::new().nodes("a b c d e f", 4);
    for at in 0..6 {
        world.submit(Job::named(&format!("one-{at}"), 1).takes(500 * MINUTE));
        world.submit(Job::named(&format!("rest-{at}"), 3).takes(500 * MINUTE));
        assert_eq!(world.cycle().len(), 2);
    }
    for at in 0..6 {
        world.end(&format!("rest-{at}"));
    }
    world.submit(Job::named("groups", 12).groups(4));
    assert_eq!(world.cycle().len(), 3, "three nodes are emptied");
    world.all_leave();
    let started = world.cycle();
    assert_eq!(started.len(), 4, "{started:?}");
    assert_eq!(world.on("groups").len(), 3);
}

#[test]
fn nobody_is_moved_who_would_lose_more_than_is_won() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("one", 1).takes(500 * MINUTE));
    world.submit(Job::named("three", 3).takes(500 * MINUTE));
    world.submit(Job::named("two", 2).takes(500 * MINUTE));
    assert_eq!(world.cycle().len(), 3);
    world.end("three");
    // Nearly done and never saved: to wait for it costs less.
    world.wait(499 * MINUTE);
    world.submit(Job::named("whole", 4).groups(4));
    assert_eq!(world.cycle(), Vec::<String>::new());
}

#[test]
fn a_member_that_finished_is_not_missed() {
    // A gang's members end one by one; only the end of the attempt is news here, and until then
    // nothing is started again or evicted for it.
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("gang", 8));
    assert_eq!(world.cycle().len(), 1);
    world.apply(Change::Running { job: "gang".parse().unwrap() });
    for _ in 0..3 {
        world.wait(MINUTE);
        assert_eq!(world.cycle(), Vec::<String>::new());
    }
    world.end("gang");
    assert_eq!(world.scheduler.fleet().commitments().len(), 0);
    assert_eq!(world.cycle(), Vec::<String>::new());
}

#[test]
fn nothing_of_an_older_attempt_holds_devices() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("gang", 8));
    assert_eq!(world.cycle().len(), 1);
    let job = "gang".parse().unwrap();
    let (attempt, not_before) = (Attempt(2), Timestamp(MINUTE));
    world.apply(Change::Requeued { job, attempt, not_before });
    assert_eq!(world.scheduler.fleet().commitments().len(), 0, "all of it is free at once");
    let cycle = world.decide();
    assert_eq!(cycle.wake, Some(Timestamp(MINUTE)));
    assert_eq!(world.why("gang"), "BackingOff: attempt 2 starts in 1m00s");
    world.wait(MINUTE);
    assert_eq!(world.cycle(), ["gang starts on a x4, b x4"]);
}

#[test]
fn identical_jobs_are_tried_once() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("runs", 2));
    assert_eq!(world.cycle().len(), 1);
    for at in 0..500 {
        world.submit(Job::named(&format!("big-{at}"), 4));
    }
    assert_eq!(world.decide().considered, 1);
    world.wait(MINUTE);
    assert_eq!(world.decide().considered, 0, "nothing was freed: nothing is tried");
    for at in 0..500 {
        assert!(world.why(&format!("big-{at}")).starts_with("WaitingForDevices"));
    }
}

#[test]
fn a_big_gang_gets_a_reservation_and_small_ones_start_around_it() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("job-812", 4).takes(25 * MINUTE));
    assert_eq!(world.cycle(), ["job-812 starts on b x4"]);
    world.submit(Job::named("big", 8));
    world.wait(1);
    world.submit(Job::named("short", 2).takes(20 * MINUTE));
    world.submit(Job::named("long", 2).takes(30 * MINUTE));
    world.submit(Job::named("unknown", 1));
    assert_eq!(world.cycle(), ["short starts on a x2"]);
    let why = world.why("big");
    assert!(why.contains("estimated start in 24m59s, when job-812 ends"), "{why}");
    assert!(world.why("long").contains("kept for jobs that were there before"));
    world.wait(20 * MINUTE);
    world.end("short");
    world.wait(5 * MINUTE);
    assert_eq!(world.cycle(), Vec::<String>::new());
    world.end("job-812");
    assert_eq!(world.cycle(), ["big starts on a x4, b x4"]);
}

#[test]
fn an_estimate_that_was_wrong_is_corrected() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("runs", 4).takes(20 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("next", 4));
    world.cycle();
    assert!(world.why("next").contains("estimated start in 20m00s"), "{}", world.why("next"));
    world.wait(40 * MINUTE);
    world.cycle();
    let why = world.why("next");
    assert!(why.contains("estimated start in 10m00s, when runs ends"), "{why}");
}

#[test]
fn a_node_that_fails_takes_its_place_out_of_a_reservation() {
    let mut world = World::new().nodes("a b c", 4);
    for (name, minutes) in [("one", 10), ("two", 20), ("three", 30)] {
        world.submit(Job::named(name, 4).takes(minutes * MINUTE));
    }
    assert_eq!(world.cycle().len(), 3);
    world.submit(Job::named("big", 8));
    world.cycle();
    assert!(world.why("big").contains("in 20m00s, when two ends"), "{}", world.why("big"));
    let fleet = world.scheduler.fleet();
    let held = fleet.commitment(&"one".parse().unwrap()).unwrap();
    let mut node = fleet.node(&held.devices[0].node).unwrap().node().clone();
    node.devices[0].health = Health::Failed("Xid 79".to_owned());
    world.apply(Change::Node { node: Box::new(node) });
    world.cycle();
    assert!(world.why("big").contains("in 30m00s, when three ends"), "{}", world.why("big"));
}

#[test]
fn higher_bands_go_first_between_queues_but_never_over_quota() {
    let mut world = World::new().nodes("a", 4);
    world.queue(Queue::named("mine").quota("gpu", 2));
    world.queue(Queue::named("theirs").quota("gpu", 1));
    world.submit(Job::named("low-1", 2).queue("mine"));
    world.submit(Job::named("low-2", 2).queue("mine"));
    assert_eq!(world.cycle().len(), 2);
    world.wait(MINUTE);
    // Four of two are borrowed: a higher band takes those, though it would borrow too.
    world.submit(Job::named("high", 2).queue("theirs").priority(1000));
    assert_eq!(world.cycle(), ["low-1 is preempted for high"]);
    world.all_leave();
    assert_eq!(world.cycle(), ["high starts on a x2"]);
    world.submit(Job::named("higher", 2).queue("theirs").priority(5000));
    // What is left of `mine` is its quota: only its own queue's lower job can be taken.
    assert_eq!(world.cycle(), ["high is preempted for higher"]);
}

#[test]
fn a_preview_says_where_and_to_whose_cost_and_keeps_nothing() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("low", 4));
    assert_eq!(world.cycle().len(), 1);
    let before = world.scheduler.save();
    let asked = Job::named("asked", 2).priority(3).0;
    let cycle = world.scheduler.preview(&[asked], Timestamp(0));
    assert_eq!(support::lines(&cycle), ["low is preempted for asked"]);
    assert_eq!(cycle.told.len(), 1);
    assert_eq!(world.scheduler.save(), before);
}

#[test]
fn a_rejected_cycle_is_taken_back() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("low", 2));
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("high", 3).priority(5));
    world.submit(Job::named("small", 1).priority(9));
    // The auditor refuses: its books stay as they were.
    let cycle = world.scheduler.cycle(Timestamp(world.now));
    assert_eq!((cycle.plan.jobs.len(), cycle.evictions.len()), (1, 1));
    let why = drumline_types::Explanation::new(drumline_types::Reason::NotYetConsidered, "refused");
    world.scheduler.reject(&cycle, &why);
    assert_eq!(world.scheduler.fleet().commitments().len(), 1);
    assert_eq!(world.why("small"), "NotYetConsidered: refused");
    world.wait(MINUTE);
    assert!(!world.cycle().is_empty());
}

#[test]
fn a_saved_state_that_contradicts_itself_is_refused() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("runs", 4));
    world.cycle();
    let mut saved = world.scheduler.save();
    saved.commitments.clear();
    assert!(Scheduler::restore(saved).is_err());
    assert!(Scheduler::restore(Scheduler::new(Options::default()).save()).is_ok());
}
