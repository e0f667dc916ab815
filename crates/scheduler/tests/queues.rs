//! Queues and order: a cluster in, decisions out.

mod support;

use drumline_scheduler::{Options, Order};
use drumline_spec::Reclaim;
use drumline_types::Timestamp;
use support::{Job, MINUTE, Queue, World};

#[test]
fn priority_goes_first_then_arrival() {
    let mut world = World::new().nodes("a", 2);
    world.submit(Job::named("first", 1));
    world.wait(1);
    world.submit(Job::named("second", 1));
    world.submit(Job::named("urgent", 1).priority(5));
    assert_eq!(world.cycle(), ["urgent starts on a x1", "first starts on a x1"]);
    assert!(world.why("second").starts_with("WaitingForDevices"), "{}", world.why("second"));
}

#[test]
fn who_waits_long_enough_goes_before_a_higher_priority() {
    let options = Options { ageing_ms: MINUTE, preemption: false, ..Options::default() };
    let mut world = World::with(options).nodes("a", 1);
    world.submit(Job::named("old", 1));
    world.wait(6 * MINUTE);
    world.submit(Job::named("urgent", 1).priority(5));
    assert_eq!(world.cycle(), ["old starts on a x1"]);
}

#[test]
fn a_queue_borrows_what_is_idle_and_gives_it_back() {
    let mut world = World::new().nodes("a", 8);
    world.queue(Queue::named("team-a").quota("gpu", 4));
    world.queue(Queue::named("team-b").quota("gpu", 4));
    for name in ["b1", "b2", "b3", "b4"] {
        world.submit(Job::named(name, 2).queue("team-b"));
        world.wait(MINUTE);
    }
    assert_eq!(world.cycle().len(), 4, "all of it starts: nobody else is there");
    world.submit(Job::named("mine", 3).queue("team-a"));
    let decided = world.cycle();
    assert_eq!(decided, ["b1 is reclaimed for mine", "b2 is reclaimed for mine"]);
    assert!(world.why("mine").starts_with("WaitingForPreempted"), "{}", world.why("mine"));
    assert_eq!(world.cycle(), Vec::<String>::new(), "nothing more is asked while they leave");
    world.all_leave();
    assert_eq!(world.cycle(), ["mine starts on a x3"]);
    // One device is idle, and whoever gave two back has no claim to more.
    assert!(world.why("b1").starts_with("WaitingForDevices"), "{}", world.why("b1"));
    assert_eq!(world.cycle(), Vec::<String>::new());
}

#[test]
fn two_queues_within_their_quota_take_nothing_from_each_other() {
    let mut world = World::new().nodes("a", 8);
    world.queue(Queue::named("team-a").quota("gpu", 4));
    world.queue(Queue::named("team-b").quota("gpu", 4));
    world.submit(Job::named("a1", 6).queue("team-a"));
    assert_eq!(world.cycle(), ["a1 starts on a x6"]);
    world.submit(Job::named("b1", 4).queue("team-b"));
    assert_eq!(world.cycle(), ["a1 is reclaimed for b1"]);
    world.all_leave();
    assert_eq!(world.cycle(), ["b1 starts on a x4"]);
    // It would need to borrow again, and the lender is at home: no mutual reclaim, ever.
    for _ in 0..5 {
        world.wait(10 * MINUTE);
        assert_eq!(world.cycle(), Vec::<String>::new());
    }
    assert!(world.why("a1").starts_with("WaitingForDevices"), "{}", world.why("a1"));
}

#[test]
fn a_lender_that_keeps_some_finds_it_idle() {
    let mut world = World::new().nodes("a", 8);
    world.queue(Queue::named("team-a").quota("gpu", 4).lends("gpu", 1));
    for at in 0..8 {
        world.submit(Job::named(&format!("x{at}"), 1));
    }
    assert_eq!(world.cycle().len(), 5);
    assert!(world.why("x7").contains("kept by queues that do not lend"), "{}", world.why("x7"));
    world.submit(Job::named("mine", 3).queue("team-a"));
    assert_eq!(world.cycle(), ["mine starts on a x3"]);
}

#[test]
fn a_borrowing_limit_is_kept_and_told() {
    let mut world = World::new().nodes("a", 8);
    world.queue(Queue::named("team").quota("gpu", 2).borrows("gpu", 1));
    world.submit(Job::named("one", 2).queue("team"));
    world.submit(Job::named("two", 2).queue("team"));
    world.submit(Job::named("huge", 4).queue("team").priority(9));
    assert_eq!(world.cycle(), ["one starts on a x2"]);
    assert_eq!(
        world.why("two"),
        "WaitingForQuota: needs 2 gpu devices; queue team uses 2 of 3, so 1 are left; estimated \
         start in 1h00m, when one ends"
    );
    assert_eq!(
        world.why("huge"),
        "ExceedsQuota: needs 4 gpu devices; queue team may use 3 at most"
    );
}

#[test]
fn quota_of_a_model_is_apart_from_that_of_the_kind() {
    let mut world = World::new().nodes("a b", 2);
    world.node("c", 2, "NVIDIA A100-SXM4-80GB");
    let queue = Queue::named("team").quota("a100", 1).quota("gpu", 2);
    world.queue(queue.borrows("a100", 0).borrows("gpu", 0));
    for name in ["x1", "x2", "x3", "x4"] {
        world.submit(Job::named(name, 1).queue("team"));
    }
    world.submit(Job::named("y", 1).queue("team").model("a100"));
    let decided = world.cycle();
    assert_eq!(decided.len(), 3, "{decided:?}");
    assert_eq!(decided.iter().filter(|line| line.contains("on c x1")).count(), 1, "{decided:?}");
}

#[test]
fn instances_are_given_and_charged_by_their_own_name() {
    let mut world = World::new().nodes("a", 2);
    world.node("c", 3, "NVIDIA A100-SXM4-80GB MIG 1g.10gb");
    let queue = Queue::named("team").quota("1g.10gb", 2).quota("a100", 0).quota("gpu", 2);
    world.queue(queue.borrows("1g.10gb", 0).borrows("a100", 0).borrows("gpu", 0));
    for name in ["x1", "x2"] {
        world.submit(Job::named(name, 1).queue("team"));
    }
    for name in ["y1", "y2"] {
        world.submit(Job::named(name, 1).queue("team").model("1g.10gb"));
    }
    let decided = world.cycle();
    let on = |node: &str| -> Vec<&str> {
        let mark = format!("on {node} x1");
        let there = decided.iter().filter(|line| line.contains(&mark));
        there.filter_map(|line| line.split(' ').next()).collect()
    };
    assert_eq!((on("a"), on("c")), (vec!["x1", "x2"], vec!["y1", "y2"]), "{decided:?}");
    // An instance is free, but it is no whole device, and no A100.
    world.submit(Job::named("x3", 1).queue("team"));
    world.submit(Job::named("z", 1).queue("team").model("a100"));
    assert_eq!(world.cycle(), [""; 0]);
}

#[test]
fn spare_devices_are_divided_by_weight() {
    let mut world = World::new().nodes("a b c", 8);
    world.queue(Queue::named("one").weight(1));
    world.queue(Queue::named("two").weight(2));
    for at in 0..24 {
        world.submit(Job::named(&format!("one-{at}"), 1).queue("one"));
        world.submit(Job::named(&format!("two-{at}"), 1).queue("two"));
    }
    let decided = world.cycle();
    assert_eq!(decided.iter().filter(|line| line.starts_with("one")).count(), 8);
    assert_eq!(decided.iter().filter(|line| line.starts_with("two")).count(), 16);
}

#[test]
fn who_has_used_much_lately_goes_after_who_has_not() {
    let mut world = World::new().nodes("a", 4);
    world.queue(Queue::named("busy"));
    world.queue(Queue::named("new"));
    world.submit(Job::named("long", 4).queue("busy"));
    assert_eq!(world.cycle(), ["long starts on a x4"]);
    world.wait(600 * MINUTE);
    world.end("long");
    for at in 0..4 {
        world.submit(Job::named(&format!("b{at}"), 1).queue("busy"));
        world.submit(Job::named(&format!("n{at}"), 1).queue("new"));
    }
    let decided = world.cycle();
    assert!(decided[..2].iter().all(|line| line.starts_with('n')), "{decided:?}");
    assert!(decided.iter().filter(|line| line.starts_with('n')).count() >= 3, "{decided:?}");
}

#[test]
fn a_held_queue_starts_nothing_and_says_so() {
    let mut world = World::new().nodes("a", 4);
    let mut above = Queue::named("dept");
    above.0.held = true;
    world.queue(above);
    world.queue(Queue::named("team").below("dept"));
    world.submit(Job::named("x", 1).queue("team"));
    world.submit(Job::named("inner", 1).queue("dept"));
    world.submit(Job::named("lost", 1).queue("nowhere"));
    assert_eq!(world.cycle(), Vec::<String>::new());
    assert_eq!(world.why("x"), "Held: queue dept is held");
    assert_eq!(
        world.why("inner"),
        "QueueMissing: queue dept has queues below it, such as team; jobs name one of those"
    );
    assert_eq!(world.why("lost"), "QueueMissing: there is no queue nowhere");
    world.queue(Queue::named("dept"));
    assert_eq!(world.cycle(), ["x starts on a x1"]);
}

#[test]
fn a_queue_that_cannot_be_is_refused() {
    use drumline_cluster::Change;
    let mut world = World::new();
    let mut refused = |queue: Queue| {
        let change = Change::Queue { queue: Box::new(queue.0) };
        world.scheduler.apply(change, Timestamp(0)).unwrap_err().to_string()
    };
    assert_eq!(
        refused(Queue::named("a").below("b")),
        "queue a: its parent b does not exist; create that queue first"
    );
    assert_eq!(
        refused(Queue::named("default").below("default")),
        "queue default: it would be below itself, through default"
    );
    let mut none = Queue::named("none");
    none.0.weight = 0;
    assert!(refused(none).contains("weight is 0"));
}

#[test]
fn a_quota_above_is_shared_by_those_below() {
    let mut world = World::new().nodes("a", 8);
    world.queue(Queue::named("dept").quota("gpu", 4).borrows("gpu", 0));
    world.queue(Queue::named("one").below("dept"));
    world.queue(Queue::named("two").below("dept"));
    for at in 0..4 {
        world.submit(Job::named(&format!("one-{at}"), 1).queue("one"));
        world.submit(Job::named(&format!("two-{at}"), 1).queue("two"));
    }
    let decided = world.cycle();
    assert_eq!(decided.len(), 4, "{decided:?}");
    assert_eq!(decided.iter().filter(|line| line.starts_with("one")).count(), 2);
}

#[test]
fn a_job_that_waits_for_quota_is_not_overtaken_in_its_queue() {
    let mut world = World::new().nodes("a b", 8);
    world.queue(Queue::named("team").quota("gpu", 8).borrows("gpu", 0));
    world.submit(Job::named("runs", 5).queue("team"));
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("big", 4).queue("team"));
    world.wait(1);
    world.submit(Job::named("small", 1).queue("team"));
    assert_eq!(world.cycle(), Vec::<String>::new());
    assert_eq!(
        world.why("small"),
        "WaitingForQuota: queue team has big first in line for its quota"
    );
    // Nor in the next cycle, when nobody looks at the big one again.
    world.wait(1);
    world.submit(Job::named("other", 1).queue("team"));
    assert_eq!(world.cycle(), Vec::<String>::new());
}

#[test]
fn short_jobs_fill_the_gap_before_one_that_waits_for_quota_and_long_ones_do_not() {
    let mut world = World::new().nodes("a b", 8);
    world.queue(Queue::named("team").quota("gpu", 8).borrows("gpu", 0));
    world.submit(Job::named("runs", 5).queue("team").takes(30 * MINUTE));
    world.submit(Job::named("stays", 1).queue("team").takes(90 * MINUTE));
    assert_eq!(world.cycle().len(), 2);
    world.wait(1);
    world.submit(Job::named("big", 4).queue("team"));
    world.wait(1);
    world.submit(Job::named("long", 1).queue("team").takes(60 * MINUTE));
    world.submit(Job::named("unsaid", 1).queue("team"));
    world.submit(Job::named("short", 1).queue("team").takes(10 * MINUTE));
    assert_eq!(world.cycle(), ["short starts on b x1"]);
    let why = world.why("big");
    assert_eq!(
        why,
        "WaitingForQuota: needs 4 gpu devices; queue team uses 6 of 8, so 2 are left; estimated \
         start in 29m59s, when runs ends"
    );
    assert!(world.why("long").contains("big first in line"), "{}", world.why("long"));
    assert!(world.why("unsaid").contains("big first in line"), "{}", world.why("unsaid"));
    world.wait(30 * MINUTE);
    world.end("short");
    world.end("runs");
    assert!(world.cycle().contains(&"big starts on b x4".to_owned()));
}

#[test]
fn a_job_that_exceeds_its_queues_limit_keeps_nobody_waiting() {
    let mut world = World::new().nodes("a", 8);
    world.queue(Queue::named("team").quota("gpu", 4).borrows("gpu", 0));
    world.submit(Job::named("never", 5).queue("team"));
    world.wait(1);
    world.submit(Job::named("small", 1).queue("team"));
    assert_eq!(world.cycle(), ["small starts on a x1"]);
    assert!(world.why("never").starts_with("ExceedsQuota"), "{}", world.why("never"));
}

#[test]
fn a_held_and_a_resting_job_say_so_and_wait() {
    use drumline_cluster::Change;
    use drumline_types::Attempt;
    let mut world = World::new().nodes("a", 8);
    world.submit(Job::named("held", 1));
    world.apply(Change::Held { job: "held".parse().unwrap(), held: true });
    let request = Box::new(Job::named("rests", 1).0);
    let (attempt, not_before) = (Attempt(1), Timestamp(2_000));
    world.apply(Change::Submitted { request, attempt, not_before });
    let cycle = world.decide();
    assert_eq!((cycle.plan.jobs.len(), cycle.wake), (0, Some(Timestamp(2_000))));
    assert_eq!(world.why("held"), "Held: held by a user");
    assert_eq!(world.why("rests"), "BackingOff: attempt 1 starts in 2s");
    world.wait(2_000);
    assert_eq!(world.cycle(), ["rests starts on a x1"]);
}

#[test]
fn a_reservation_of_who_borrows_gives_way_to_who_stays_within_its_quota() {
    let mut world = World::new().nodes("a b", 4);
    world.queue(Queue::named("owns").quota("gpu", 8));
    world.queue(Queue::named("guests").quota("gpu", 0));
    world.submit(Job::named("runs", 4).queue("owns").takes(60 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    // Four are free, and kept for a gang that would borrow all eight.
    world.submit(Job::named("guest", 8).queue("guests").takes(60 * MINUTE));
    assert_eq!(world.cycle(), Vec::<String>::new());
    assert!(world.why("guest").contains("estimated start in 1h"), "{}", world.why("guest"));
    // It would not be gone in time, and after a while it need not be.
    world.submit(Job::named("owner", 4).queue("owns").takes(90 * MINUTE));
    let cycle = world.decide();
    assert!(cycle.plan.jobs.is_empty());
    let patience = drumline_scheduler::Options::default().patience_ms;
    assert_eq!(cycle.wake.map(|at| at.0), Some(patience));
    world.wait(patience);
    assert_eq!(world.cycle().len(), 1);
    assert_eq!(world.on("owner").len(), 1);
    // The gang that gave way reserves anew.
    assert!(world.scheduler.dirty());
    assert_eq!(world.cycle(), Vec::<String>::new());
    assert!(world.why("guest").contains("estimated start in 1h30m"), "{}", world.why("guest"));
}

#[test]
fn what_borrowers_hold_and_what_is_reserved_for_them_is_taken_together() {
    let mut world = World::new().nodes("a b", 4);
    world.queue(Queue::named("owns").quota("gpu", 8));
    world.queue(Queue::named("guests").quota("gpu", 0));
    world.submit(Job::named("guest", 4).queue("guests").takes(60 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    let (on, free) = match world.on("guest")[0].as_str() {
        "a" => ("a", "b"),
        _ => ("b", "a"),
    };
    world.submit(Job::named("big", 8).queue("guests").takes(60 * MINUTE));
    assert_eq!(world.cycle(), Vec::<String>::new());
    // Neither what the guest holds nor what is reserved is enough alone.
    world.submit(Job::named("owner", 8).queue("owns").takes(90 * MINUTE));
    let cycle = world.decide();
    assert!(cycle.evictions.is_empty(), "{cycle:?}");
    let patience = drumline_scheduler::Options::default().patience_ms;
    assert_eq!(cycle.wake.map(|at| at.0), Some(patience));
    world.wait(patience);
    assert_eq!(world.cycle(), ["guest is reclaimed for owner"]);
    assert!(world.why("big").contains("WaitingFor"), "{}", world.why("big"));
    world.all_leave();
    let starts = world.cycle();
    assert_eq!(starts, [format!("owner starts on {} x4, {} x4", on.min(free), on.max(free))]);
}

#[test]
fn a_reservation_within_quota_gives_way_to_nobody() {
    let mut world = World::new().nodes("a b", 4);
    world.queue(Queue::named("one").quota("gpu", 8));
    world.queue(Queue::named("two").quota("gpu", 8));
    world.submit(Job::named("runs", 4).queue("two").takes(60 * MINUTE).not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("big", 8).queue("one").takes(60 * MINUTE));
    assert_eq!(world.cycle(), Vec::<String>::new());
    world.submit(Job::named("late", 4).queue("two").takes(90 * MINUTE));
    assert_eq!(world.cycle(), Vec::<String>::new());
    assert!(world.why("late").contains("kept for jobs"), "{}", world.why("late"));
}

#[test]
fn a_job_that_would_borrow_itself_waits_for_the_reservation_of_a_borrower() {
    let mut world = World::new().nodes("a b", 4);
    world.queue(Queue::named("owns").quota("gpu", 4));
    world.queue(Queue::named("guests").quota("gpu", 0));
    world.submit(Job::named("runs", 4).queue("owns").takes(60 * MINUTE).not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("guest", 8).queue("guests").takes(60 * MINUTE));
    assert_eq!(world.cycle(), Vec::<String>::new());
    world.submit(Job::named("more", 4).queue("owns").takes(90 * MINUTE));
    assert_eq!(world.cycle(), Vec::<String>::new());
}

#[test]
fn baselines_order_as_they_say() {
    let shortest = Options { order: Order::ShortestFirst, ..Options::default() };
    let mut world = World::with(shortest).nodes("a", 1);
    world.submit(Job::named("long", 1).takes(9 * MINUTE));
    world.submit(Job::named("short", 1).takes(MINUTE));
    assert_eq!(world.cycle(), ["short starts on a x1"]);
    let fifo = Options { order: Order::Fifo, backfill: false, ..Options::default() };
    let mut world = World::with(fifo).nodes("a", 4);
    world.submit(Job::named("runs", 2));
    assert_eq!(world.cycle().len(), 1);
    world.wait(1);
    world.submit(Job::named("big", 4));
    world.wait(1);
    world.submit(Job::named("small", 1).priority(9));
    assert_eq!(world.cycle(), Vec::<String>::new(), "the first blocks those behind it");
}

#[test]
fn a_lower_priority_may_be_reclaimed_only_by_a_higher_one_where_the_queue_says_so() {
    let mut world = World::new().nodes("a", 4);
    world.queue(Queue::named("meek").quota("gpu", 4).reclaim(Reclaim::LowerPriority));
    world.submit(Job::named("guest", 4).priority(5));
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("same", 4).queue("meek").priority(5));
    assert_eq!(world.cycle(), Vec::<String>::new());
    world.submit(Job::named("higher", 4).queue("meek").priority(6));
    assert_eq!(world.cycle(), ["guest is reclaimed for higher"]);
}
