//! What waiting jobs are told, against what is so.

mod support;

use drumline_cluster::DomainAt;
use drumline_placement::{Constraints, Cycle, place};
use drumline_scheduler::{Keep, Saved, SavedJob, Stands};
use drumline_types::{JobId, Reason, Timestamp};
use proptest::prelude::*;
use support::play::{play, step, world};
use support::{Job, MINUTE, World};

/// Returns the number that stands before some words.
fn before(message: &str, words: &str) -> Option<u64> {
    message.split_once(words)?.0.rsplit(' ').next()?.parse().ok()
}

/// Returns the number that stands after some words.
fn after(message: &str, words: &str) -> Option<u64> {
    message.split_once(words)?.1.split(' ').next()?.parse().ok()
}

/// Checks one waiting job's reason against the state after a cycle.
fn agrees(world: &World, saved: &Saved, id: &JobId, job: &SavedJob) -> Result<(), TestCaseError> {
    let now = Timestamp(world.now);
    let why = world.scheduler.explain(id, now);
    let Stands::Waiting { not_before, .. } = &job.stands else {
        prop_assert!(why.is_none(), "{} runs, and is told {:?}", id, why);
        return Ok(());
    };
    let why = why.ok_or_else(|| TestCaseError::fail(format!("{id} waits for nothing")))?;
    let (gang, queue) = (&job.request.gang, &job.request.settings.queue);
    let fleet = world.scheduler.fleet();
    let free: u64 = fleet
        .pools()
        .filter(|(_, pool)| fleet.stock(pool.model()).kind() == gang.device)
        .map(|(_, pool)| pool.counts(DomainAt::ROOT).free())
        .sum();
    let fits_now = place(fleet, gang, job.request.split, &Constraints::default()).is_ok();
    let kept = saved.holds.get(id).map(|hold| hold.keep);
    match why.reason {
        Reason::Held => {
            let tree = world.scheduler.queues();
            let held = saved.queues.iter().any(|spec| spec.held && tree.find(queue).is_some());
            prop_assert!(job.held || held, "{}: {}", id, why);
        }
        Reason::BackingOff => prop_assert!(*not_before > now && !job.held, "{}: {}", id, why),
        Reason::WaitingForPreempted => {
            prop_assert!(matches!(kept, Some(Keep::Nominated { .. })), "{}: {}", id, why);
        }
        Reason::WaitingForQuota | Reason::ExceedsQuota => {
            prop_assert!(!job.held && *not_before <= now, "{}: {}", id, why);
        }
        Reason::QueueMissing => {
            prop_assert!(world.scheduler.queues().leaf(queue).is_err(), "{}: {}", id, why);
        }
        Reason::WaitingForDevices
        | Reason::TopologyDoesNotFit
        | Reason::ExceedsCluster
        | Reason::NodesNotReady
        | Reason::NoMatchingDevice => {
            // What nobody holds and nobody keeps is never enough for it.
            let least = gang.elastic.map_or(gang.ranks, |elastic| elastic.least.max(1));
            prop_assert!(!fits_now, "{} would fit: {}", id, why);
            let told_free = before(&why.message, " free on ");
            // What is kept for itself is free for it alone.
            let agrees = kept.is_some() || told_free.is_none_or(|told| told == free);
            prop_assert!(agrees, "{} are free: {}", free, why);
            let fits = after(&why.message, "would fit with ");
            prop_assert!(fits.is_none_or(|fits| fits < u64::from(least)), "{}: {}", id, why);
        }
        other => return Err(TestCaseError::fail(format!("{id}: {other:?} while it waits"))),
    }
    Ok(())
}

/// Checks what a cycle says against what it does.
fn told(world: &World, cycle: &Cycle) -> Result<(), TestCaseError> {
    for (id, why) in &cycle.told {
        let starts = cycle.plan.jobs.iter().any(|job| job.job == *id);
        prop_assert!(!starts, "{} starts, and is told {}", id, why);
        let full = world.scheduler.explain(id, Timestamp(world.now));
        let full = full.ok_or_else(|| TestCaseError::fail(format!("{id} is told {why}")))?;
        // What starts later in the same cycle may leave too few devices where they were scattered.
        let of_devices = |reason| {
            matches!(
                reason,
                Reason::WaitingForDevices
                    | Reason::TopologyDoesNotFit
                    | Reason::ExceedsCluster
                    | Reason::NodesNotReady
                    | Reason::NoMatchingDevice
            )
        };
        let agree = full.reason == why.reason
            || full.reason == Reason::WaitingForPreempted
            || (of_devices(full.reason) && of_devices(why.reason));
        prop_assert!(agree, "{}: {} but told {}", id, full, why);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_reason_never_contradicts_what_is_decided(
        steps in prop::collection::vec(step(), 1..60)
    ) {
        let mut world = world();
        let mut submitted = 0;
        for step in &steps {
            play(&mut world, step, &mut submitted);
            let mut cycle = world.decide();
            told(&world, &cycle)?;
            // What a cycle leaves over or frees, the next ones decide.
            for round in 0..8 {
                if round > 1 && !world.scheduler.dirty() {
                    break;
                }
                cycle = world.decide();
                told(&world, &cycle)?;
            }
            let saved = world.scheduler.save();
            for (id, job) in &saved.jobs {
                agrees(&world, &saved, id, job)?;
            }
        }
    }
}

/// The example that explanations were asked for with, as near as this fleet can be to it.
#[test]
fn the_evidence_names_what_is_needed_free_not_eligible_and_when_it_starts() {
    let mut world = World::new().nodes("r1/a r1/b r1/c r1/d", 8);
    world.submit(Job::named("job-812", 8).takes(25 * MINUTE).not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    // The other racks have three nodes each, one of them with a device that has failed.
    for node in ["r2/e", "r2/f", "r2/g", "r3/h", "r3/i", "r3/j"] {
        world.node(node, 8, "H100");
    }
    world.fail("e", 0);
    world.fail("h", 0);
    world.submit(Job::named("wide", 32).groups(8).in_one("rack"));
    assert_eq!(world.cycle(), Vec::<String>::new());
    let why = world.why("wide");
    assert!(
        why.contains("needs 32 gpu devices in groups of 8 on one node, all in one rack"),
        "{why}"
    );
    assert!(why.contains("failed (Xid 79)") && why.contains("8 busy"), "{why}");
    assert!(why.contains("largest rack 3 x 8") && why.contains("would fit with 24 ranks"), "{why}");
    assert!(why.contains("estimated start in 25m00s, when job-812 ends"), "{why}");
}
