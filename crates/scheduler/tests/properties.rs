//! Random clusters and workloads: what must hold after every step.

mod support;

use std::collections::{BTreeMap, BTreeSet};

use drumline_cluster::Change;
use drumline_placement::{Cycle, EvictionCause};
use drumline_scheduler::{Options, Saved, Scheduler, Stands};
use drumline_types::{JobId, Reason, Timestamp};
use proptest::prelude::*;
use support::play::{NODES, QUEUES, Step, play, step, world};
use support::{Job, MINUTE, Queue, World};

fn invariants(world: &World, cycle: &Cycle, before: &Saved) -> Result<(), TestCaseError> {
    let saved = world.scheduler.save();
    let fleet = world.scheduler.fleet();
    let tree = world.scheduler.queues();
    for (id, job) in &saved.jobs {
        let held = fleet.commitment(id).map_or(0, |held| held.devices.len() as u32);
        let gang = &job.request.gang;
        let (least, most) = match gang.elastic {
            Some(elastic) => (elastic.least, elastic.most),
            None => (gang.ranks, gang.ranks),
        };
        match &job.stands {
            Stands::Waiting { .. } => prop_assert_eq!(held, 0, "{} waits and holds devices", id),
            Stands::Placed { .. } => {
                prop_assert!(held >= least && held <= most, "{} holds {}", id, held);
            }
        }
    }
    let used = |queue: &str| -> u64 {
        let queue = tree.find(&queue.parse().unwrap()).unwrap();
        tree.models().iter().map(|(model, ..)| tree.used(queue, model)).sum()
    };
    prop_assert!(used("limited") <= 6_000, "the borrowing limit is broken: {}", used("limited"));
    let all: u64 = QUEUES.iter().map(|queue| used(queue)).sum();
    let held: usize = fleet.commitments().map(|held| held.devices.len()).sum();
    prop_assert_eq!(all, held as u64 * 1000, "what is charged is what is held");
    let mut seen = BTreeSet::new();
    for eviction in &cycle.evictions {
        prop_assert!(seen.insert(&eviction.job), "{} is evicted twice", eviction.job);
        let job = &before.jobs[&eviction.job];
        prop_assert!(job.request.settings.preemptible);
        let Stands::Placed { started, leaving: None, .. } = &job.stands else {
            return Err(TestCaseError::fail(format!("{} has nothing to leave", eviction.job)));
        };
        let ran = world.now - started.0;
        prop_assert!(ran >= job.request.settings.min_runtime_ms);
        let Some(beneficiary) = &eviction.beneficiary else { continue };
        prop_assert!(saved.holds.contains_key(beneficiary), "nothing is kept for {}", beneficiary);
        let claimant = &saved.jobs[beneficiary].request.settings;
        let victim = &job.request.settings;
        if eviction.cause == EvictionCause::Consolidated {
            prop_assert!(claimant.priority >= victim.priority);
            prop_assert!(saved.holds.contains_key(&eviction.job), "it has no place to go to");
        } else if eviction.cause == EvictionCause::Recalled {
            prop_assert!(claimant.priority >= victim.priority);
        } else if claimant.queue == victim.queue {
            prop_assert!(claimant.priority > victim.priority);
        }
    }
    // A device is kept for one job at most, and never for one that runs whole.
    let mut kept = BTreeMap::new();
    for (job, hold) in &saved.holds {
        for device in &hold.devices {
            prop_assert_eq!(kept.insert(device, job), None);
        }
    }
    Ok(())
}

/// Compares part by part, so that a difference can be read.
fn same_state(a: &Saved, b: &Saved) -> Result<(), TestCaseError> {
    let (a, b) = (serde_json::to_value(a).unwrap(), serde_json::to_value(b).unwrap());
    for (part, value) in a.as_object().unwrap() {
        prop_assert_eq!(value, &b[part], "{} is not the same when it is saved again", part);
    }
    Ok(())
}

fn comparable(mut cycle: Cycle) -> Cycle {
    // Revisions count the changes of one process.
    cycle.plan.parent = drumline_cluster::Revision(0);
    cycle
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_step_keeps_the_rules_and_a_restored_scheduler_decides_the_same(
        steps in prop::collection::vec(step(), 1..60)
    ) {
        let mut world = world();
        let mut twin: Option<Scheduler> = None;
        let mut submitted = 0;
        for step in &steps {
            let changes = play(&mut world, step, &mut submitted);
            if let Some(twin) = &mut twin {
                for change in changes {
                    twin.apply(change, Timestamp(world.now)).unwrap();
                }
            }
            if matches!(step, Step::Reload) {
                let json = serde_json::to_string(&world.scheduler.save()).unwrap();
                let saved: Saved = serde_json::from_str(&json).unwrap();
                prop_assert_eq!(&saved, &world.scheduler.save());
                let restored = Scheduler::restore(saved.clone()).unwrap();
                same_state(&restored.save(), &saved)?;
                twin = Some(restored);
            }
            let before = world.scheduler.save();
            let cycle = world.decide();
            invariants(&world, &cycle, &before)?;
            if let Some(twin) = &mut twin {
                let same = twin.cycle(Timestamp(world.now));
                prop_assert_eq!(comparable(same), comparable(cycle));
            }
        }
    }

    #[test]
    fn no_job_that_fits_the_idle_fleet_starves(
        steps in prop::collection::vec(step(), 1..40)
    ) {
        let mut world = world();
        let mut submitted = 0;
        for step in &steps {
            play(&mut world, step, &mut submitted);
            world.decide();
        }
        // Whoever is held is let go, whatever failed works again, and no new job comes.
        for id in world.scheduler.save().jobs.keys() {
            world.apply(Change::Held { job: id.clone(), held: false });
        }
        for node in NODES {
            world.node(node, 4, "H100");
        }
        for _ in 0..submitted * 3 + 10 {
            world.wait(120 * MINUTE);
            play(&mut world, &Step::Leave, &mut submitted);
            world.decide();
            let running = world.scheduler.save();
            let first = running.jobs.iter().find(|(_, job)| {
                matches!(job.stands, Stands::Placed { leaving: None, .. })
            });
            if let Some((id, _)) = first {
                world.apply(Change::Ended { job: id.clone() });
            }
        }
        for id in world.scheduler.save().jobs.keys() {
            let why = world.scheduler.explain(id, Timestamp(world.now)).unwrap();
            let never = [Reason::ExceedsCluster, Reason::ExceedsQuota, Reason::TopologyDoesNotFit];
            prop_assert!(never.contains(&why.reason), "{} still waits: {}", id, why);
        }
    }

    #[test]
    fn a_reservation_is_never_delayed_while_estimates_hold(
        jobs in prop::collection::vec((0u64..30, 1u32..17, 1u64..60), 1..40)
    ) {
        let mut world = World::new().nodes("r1/a r1/b r2/c r2/d", 4);
        let mut ends: BTreeSet<(u64, JobId)> = BTreeSet::new();
        let mut promised: BTreeMap<JobId, u64> = BTreeMap::new();
        let mut arrivals: Vec<(u64, u32, u64)> =
            jobs.iter().map(|&(at, ranks, minutes)| (at * MINUTE, ranks, minutes)).collect();
        arrivals.sort_unstable();
        let mut next = 0;
        loop {
            let arrival = arrivals.get(next).map(|job| job.0);
            let end = ends.first().map(|(at, _)| *at);
            let Some(now) = [arrival, end].into_iter().flatten().min() else { break };
            world.now = now;
            while let Some((at, id)) = ends.first().cloned() {
                if at > now { break; }
                ends.pop_first();
                world.apply(Change::Ended { job: id });
            }
            while let Some(&(at, ranks, minutes)) = arrivals.get(next) {
                if at > now { break; }
                world.submit(Job::named(&format!("job-{next}"), ranks).takes(minutes * MINUTE));
                next += 1;
            }
            let cycle = world.decide();
            for job in &cycle.plan.jobs {
                let at: usize = job.job.as_str()[4..].parse().unwrap();
                ends.insert((now + arrivals[at].2 * MINUTE, job.job.clone()));
                if let Some(start) = promised.get(&job.job) {
                    prop_assert!(now <= *start, "{} was promised {} and got {}", job.job, start, now);
                }
            }
            for (job, hold) in world.scheduler.save().holds {
                if let drumline_scheduler::Keep::Reserved { start } = hold.keep {
                    let first = *promised.entry(job.clone()).or_insert(start.0);
                    prop_assert!(start.0 <= first, "{} moves from {} to {}", job, first, start.0);
                }
            }
        }
        prop_assert!(world.scheduler.counts() == (0, 0), "everybody ran");
    }

    /// As for devices: who is first in line for its queue's quota starts when it was told first, or
    /// before, whoever fills the gap.
    #[test]
    fn a_wait_for_quota_is_never_prolonged_by_those_behind_while_estimates_hold(
        jobs in prop::collection::vec((0u64..30, 1u32..9, 1u64..60), 1..40)
    ) {
        let mut world = World::new().nodes("a b c d", 4);
        world.queue(Queue::named("team").quota("gpu", 8).borrows("gpu", 0));
        let mut ends: BTreeSet<(u64, JobId)> = BTreeSet::new();
        let mut promised: BTreeMap<JobId, u64> = BTreeMap::new();
        let mut arrivals = jobs.clone();
        arrivals.sort_unstable();
        let mut next = 0;
        loop {
            let arrival = arrivals.get(next).map(|job| job.0 * MINUTE);
            let end = ends.first().map(|(at, _)| *at);
            let Some(now) = [arrival, end].into_iter().flatten().min() else { break };
            world.now = now;
            while let Some((at, id)) = ends.first().cloned() {
                if at > now { break; }
                ends.pop_first();
                world.apply(Change::Ended { job: id });
            }
            while let Some(&(at, ranks, minutes)) = arrivals.get(next) {
                if at * MINUTE > now { break; }
                let job = Job::named(&format!("job-{next:02}"), ranks).queue("team");
                world.submit(job.takes(minutes * MINUTE));
                next += 1;
            }
            let cycle = world.decide();
            for job in &cycle.plan.jobs {
                let at: usize = job.job.as_str()[4..].parse().unwrap();
                ends.insert((now + arrivals[at].2 * MINUTE, job.job.clone()));
                if let Some(start) = promised.get(&job.job) {
                    prop_assert!(now <= *start, "{} was promised {} and got {}", job.job, start, now);
                }
            }
            for id in world.scheduler.save().jobs.keys() {
                if let Some((start, _)) = world.scheduler.estimated_start(id, Timestamp(now)) {
                    let first = *promised.entry(id.clone()).or_insert(start.0);
                    prop_assert!(start.0 <= first, "{} moves from {} to {}", id, first, start.0);
                }
            }
        }
        prop_assert!(world.scheduler.counts() == (0, 0), "everybody ran");
    }

    #[test]
    fn a_queue_gains_nothing_by_splitting_its_jobs(
        size in 1u32..5, weight in 1u32..4, nodes in 1usize..5
    ) {
        let allocated = |split: bool| {
            let mut world = World::new();
            for at in 0..nodes {
                world.node(&format!("r1/n{at}"), 8, "H100");
            }
            world.queue(Queue::named("mine"));
            world.queue(Queue::named("other").weight(weight));
            let total = 8 * nodes as u32;
            let (jobs, ranks) = if split { (total, 1) } else { (total / size, size) };
            for at in 0..jobs {
                world.submit(Job::named(&format!("mine-{at}"), ranks).queue("mine"));
            }
            for at in 0..total {
                world.submit(Job::named(&format!("other-{at}"), 1).queue("other"));
            }
            let cycle = world.decide();
            let mine = cycle.plan.jobs.iter().filter(|job| job.job.as_str().starts_with("mine"));
            mine.map(|job| job.assignments.len() as u32).sum::<u32>()
        };
        let (whole, split) = (allocated(false), allocated(true));
        prop_assert!(split <= whole + size && whole <= split + size, "{whole} whole, {split} split");
    }
}

#[test]
fn the_same_changes_lead_to_the_same_decisions() {
    let run = || {
        let mut world = World::with(Options::default()).nodes("r1/a r1/b r2/c", 4);
        let mut all = Vec::new();
        for at in 0..40u32 {
            world.submit(Job::named(&format!("job-{at}"), at % 7 + 1).priority(at as i32 % 3));
            world.wait(MINUTE);
            all.push(world.decide());
            if at % 3 == 0 {
                world.all_leave();
            }
        }
        all
    };
    assert_eq!(run(), run());
}
