//! What running gangs lose by a claim, against what it wins: when a claim waits, and for how long
//! at most.

mod support;

use drumline_cluster::Change;
use drumline_scheduler::Options;
use drumline_types::Timestamp;
use proptest::prelude::*;
use support::{Job, MINUTE, Queue, World};

const NOTHING: [&str; 0] = [];

/// The longest that a claim waits for its price to fall.
fn patience() -> u64 {
    Options::default().patience_ms
}

#[test]
fn who_starts_soon_by_itself_takes_nothing() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("low", 4).takes(65 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.wait(60 * MINUTE);
    world.submit(Job::named("high", 4).takes(30 * MINUTE).priority(5));
    assert_eq!(world.cycle(), NOTHING, "an hour of work for a wait of five minutes");
    world.wait(5 * MINUTE);
    world.end("low");
    assert_eq!(world.cycle(), ["high starts on a x4"]);
}

#[test]
fn who_would_wait_longer_than_the_others_lose_takes_at_once() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("low", 4).takes(300 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.wait(60 * MINUTE);
    world.submit(Job::named("high", 4).takes(30 * MINUTE).priority(5));
    assert_eq!(world.cycle(), ["low is preempted for high"]);
}

#[test]
fn a_saved_gang_loses_little_and_leaves_at_once() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("low", 4).takes(65 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.wait(60 * MINUTE);
    world.apply(Change::Checkpointed { job: "low".parse().unwrap() });
    world.submit(Job::named("high", 4).takes(30 * MINUTE).priority(5));
    assert_eq!(world.cycle(), ["low is preempted for high"]);
}

#[test]
fn a_claim_to_quota_is_enforced_after_a_while_at_any_price() {
    let mut world = World::new().nodes("a", 4);
    world.queue(Queue::named("mine").quota("gpu", 4));
    world.queue(Queue::named("theirs").quota("gpu", 0));
    world.submit(Job::named("lent", 4).queue("theirs").takes(150 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.wait(100 * MINUTE);
    world.submit(Job::named("owner", 4).queue("mine").takes(30 * MINUTE));
    let cycle = world.decide();
    assert!(cycle.evictions.is_empty(), "fifty minutes of wait for a hundred of work");
    let mut waited = 0;
    while waited < patience() {
        let cycle = world.decide();
        assert!(cycle.evictions.is_empty(), "{waited}");
        let wake = cycle.wake.expect("it says when to look again").0;
        waited += wake - world.now;
        world.now = wake;
    }
    assert_eq!(waited, patience());
    assert_eq!(world.cycle(), ["lent is reclaimed for owner"]);
}

#[test]
fn a_higher_band_takes_at_once_whatever_it_costs() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("batch", 4).takes(65 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.wait(60 * MINUTE);
    world.submit(Job::named("urgent", 4).takes(MINUTE).priority(1000));
    assert_eq!(world.cycle(), ["batch is preempted for urgent"]);
}

#[test]
fn who_waits_for_quota_that_is_soon_given_back_takes_nothing() {
    let mut world = World::new().nodes("a b", 4);
    world.queue(Queue::named("dept").quota("gpu", 4).borrows("gpu", 0));
    world.queue(Queue::named("one").below("dept").quota("gpu", 4));
    world.submit(Job::named("low", 4).queue("one").takes(65 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.wait(60 * MINUTE);
    world.submit(Job::named("high", 2).queue("one").takes(30 * MINUTE).priority(5));
    assert_eq!(world.cycle(), NOTHING);
    world.wait(5 * MINUTE);
    world.end("low");
    assert_eq!(world.cycle().len(), 1);
}

#[test]
fn a_gang_that_was_disrupted_makes_up_for_it_before_it_is_again() {
    let mut world = World::new().nodes("a", 4);
    world.submit(Job::named("low", 4).takes(300 * MINUTE));
    assert_eq!(world.cycle().len(), 1);
    world.wait(20 * MINUTE);
    world.submit(Job::named("high", 4).takes(MINUTE).priority(5));
    assert_eq!(world.cycle(), ["low is preempted for high"]);
    world.all_leave();
    assert_eq!(world.cycle(), ["high starts on a x4"]);
    world.wait(MINUTE);
    world.end("high");
    assert_eq!(world.cycle(), ["low starts on a x4"]);
    // Twenty minutes of work and a restart were lost: so long it is left alone.
    let lost = 20 * MINUTE + Options::default().restart_cost_ms;
    world.wait(patience());
    world.submit(Job::named("again", 4).takes(MINUTE).priority(5));
    let cycle = world.decide();
    assert!(cycle.evictions.is_empty());
    let from = 21 * MINUTE + lost;
    assert_eq!(cycle.wake, Some(Timestamp(from)));
    world.now = from;
    assert_eq!(world.cycle(), ["low is preempted for again"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn guaranteed_quota_is_had_within_a_bound_whatever_runs_there(
        lent in prop::collection::vec((1u32..6, 10u64..600, 0u64..20), 4..12),
        wait in 0u64..300,
        ranks in 1u32..7,
    ) {
        let mut world = World::new().nodes("a b c", 4);
        world.queue(Queue::named("mine").quota("gpu", 6));
        world.queue(Queue::named("theirs").quota("gpu", 6));
        let mut left = 12;
        for (at, (ranks, minutes, least)) in lent.iter().enumerate() {
            // All of them run: one that waited would have devices reserved.
            if *ranks > left {
                continue;
            }
            left -= ranks;
            let job = Job::named(&format!("lent-{at}"), *ranks).queue("theirs");
            world.submit(job.takes(minutes * MINUTE).min_runtime(least * MINUTE));
        }
        world.cycle();
        world.wait(wait * MINUTE);
        world.submit(Job::named("owner", ranks).queue("mine").takes(30 * MINUTE));
        let owner = "owner".parse().unwrap();
        let begin = world.now;
        // Nobody ends by itself: all estimates are too low.
        let bound = patience() + 20 * MINUTE + 2 * MINUTE;
        while world.scheduler.fleet().commitment(&owner).is_none() {
            prop_assert!(world.now - begin <= bound, "{}", world.why("owner"));
            world.cycle();
            world.all_leave();
            world.wait(MINUTE);
        }
    }
}
