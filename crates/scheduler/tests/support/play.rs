//! Random things that happen to a small world: jobs, ends, failures, time.

use drumline_cluster::{Change, Health};
use drumline_scheduler::Stands;
use drumline_types::{Attempt, JobId, Timestamp};
use proptest::prelude::*;

use super::{Job, MINUTE, Queue, World};

/// One thing that happens; numbers pick among what there is.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Submit { queue: usize, ranks: u32, priority: i32, flags: u16, minutes: Option<u64> },
    End(usize),
    Crash(usize),
    Hold(usize),
    Checkpoint(usize),
    Fail { node: usize, device: usize },
    Cordon(usize),
    Lose(usize),
    Wait(u64),
    Leave,
    Reload,
}

pub(crate) const QUEUES: [&str; 5] = ["default", "one", "two", "deep", "limited"];
pub(crate) const NODES: [&str; 6] = ["r1/a", "r1/b", "r1/c", "r2/d", "r2/e", "r2/f"];

pub(crate) fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..QUEUES.len(), 1u32..13, 0i32..4, any::<u16>(), prop::option::of(1u64..60)).prop_map(
            |(queue, ranks, priority, flags, minutes)| Step::Submit {
                queue, ranks, priority: priority * 600, flags, minutes
            }
        ),
        3 => any::<usize>().prop_map(Step::End),
        1 => any::<usize>().prop_map(Step::Crash),
        1 => any::<usize>().prop_map(Step::Hold),
        1 => any::<usize>().prop_map(Step::Checkpoint),
        1 => (0..NODES.len(), 0usize..4)
            .prop_map(|(node, device)| Step::Fail { node, device }),
        1 => (0..NODES.len()).prop_map(Step::Cordon),
        1 => (0..NODES.len()).prop_map(Step::Lose),
        3 => (1u64..40).prop_map(Step::Wait),
        2 => Just(Step::Leave),
        1 => Just(Step::Reload),
    ]
}

pub(crate) fn world() -> World {
    let mut world = World::new().nodes(&NODES.join(" "), 4);
    world.queue(Queue::named("dept").quota("gpu", 14));
    world.queue(Queue::named("one").below("dept").quota("gpu", 6).lends("gpu", 4));
    world.queue(Queue::named("two").below("dept").quota("gpu", 8).weight(2));
    world.queue(Queue::named("half").below("dept"));
    world.queue(Queue::named("deep").below("half").borrows("gpu", 5));
    world.queue(Queue::named("limited").quota("gpu", 4).borrows("gpu", 2));
    world
}

fn job(
    at: usize,
    queue: usize,
    ranks: u32,
    priority: i32,
    flags: u16,
    minutes: Option<u64>,
) -> Job {
    let mut job = Job::named(&format!("job-{at}"), ranks).queue(QUEUES[queue]).priority(priority);
    if let Some(minutes) = minutes {
        job = job.takes(minutes * MINUTE);
    }
    if flags & 1 > 0 && ranks.is_multiple_of(2) {
        job = job.groups(2);
    }
    if flags & 2 > 0 {
        job = job.in_one("rack");
    }
    if flags & 12 == 12 {
        job = job.not_preemptible();
    }
    if flags & 16 > 0 && flags & 1 == 0 {
        job = job.elastic(1.max(ranks / 2), ranks * 2);
    }
    if flags & 96 == 96 {
        job = job.min_runtime(20 * MINUTE);
    }
    if flags & 128 > 0 {
        job = job.disruptions(1, 120 * MINUTE);
    }
    if flags & 768 == 768 {
        job = job.spares(if flags & 1 > 0 { 2 } else { 1 + u32::from(flags >> 10) % 4 });
    }
    job
}

/// What the world does with a step. Returns the changes, so that a twin can be given the same.
pub(crate) fn play(world: &mut World, step: &Step, submitted: &mut usize) -> Vec<Change> {
    let saved = world.scheduler.save();
    let pick = |at: usize, running: bool| -> Option<JobId> {
        let those: Vec<&JobId> = saved
            .jobs
            .iter()
            .filter(|(_, job)| matches!(job.stands, Stands::Placed { .. }) == running)
            .map(|(id, _)| id)
            .collect();
        (!those.is_empty()).then(|| those[at % those.len()].clone())
    };
    let next = |world: &mut World, job: &JobId| {
        let next = world.attempts.entry(job.clone()).or_insert(1);
        *next += 1;
        Attempt(*next)
    };
    let requeued =
        |job: JobId, attempt, ms| Change::Requeued { job, attempt, not_before: Timestamp(ms) };
    let name = |at: usize| NODES[at].split_once('/').unwrap().1.parse().unwrap();
    let mut changes = Vec::new();
    match step {
        Step::Submit { queue, ranks, priority, flags, minutes } => {
            let mut job = job(*submitted, *queue, *ranks, *priority, *flags, *minutes).0;
            *submitted += 1;
            job.submitted = Timestamp(world.now);
            let (attempt, not_before) = (Attempt(1), Timestamp(0));
            changes.push(Change::Submitted { request: Box::new(job), attempt, not_before });
        }
        Step::End(at) => changes.extend(pick(*at, true).map(|job| Change::Ended { job })),
        Step::Crash(at) => {
            if let Some(job) = pick(*at, true) {
                let attempt = next(world, &job);
                changes.push(requeued(job, attempt, world.now + MINUTE));
            }
        }
        Step::Hold(at) => {
            if let Some(job) = pick(*at, false) {
                let held = !saved.jobs[&job].held;
                changes.push(Change::Held { job, held });
            }
        }
        Step::Checkpoint(at) => {
            changes.extend(pick(*at, true).map(|job| Change::Checkpointed { job }));
        }
        Step::Fail { node, device } => {
            if let Some(state) = world.scheduler.fleet().node(&name(*node)) {
                let mut node = Box::new(state.node().clone());
                let health = &mut node.devices[*device].health;
                *health = match health {
                    Health::Healthy => Health::Failed("Xid 79".to_owned()),
                    Health::Failed(_) => Health::Healthy,
                };
                changes.push(Change::Node { node });
            }
        }
        Step::Cordon(at) => {
            if let Some(state) = world.scheduler.fleet().node(&name(*at)) {
                let mut node = Box::new(state.node().clone());
                node.cordoned = !node.cordoned;
                changes.push(Change::Node { node });
            }
        }
        Step::Lose(at) => {
            let mut fresh = World::new();
            fresh.node(NODES[*at], 4, "H100");
            let node = fresh.scheduler.fleet().node(&name(*at)).unwrap().node().clone();
            changes.push(match world.scheduler.fleet().node(&name(*at)) {
                Some(_) => Change::NodeGone { node: name(*at) },
                None => Change::Node { node: Box::new(node) },
            });
        }
        Step::Wait(minutes) => world.wait(minutes * MINUTE),
        Step::Leave => {
            for eviction in std::mem::take(&mut world.leaving) {
                let there = saved.jobs.get(&eviction.job).is_some_and(|job| {
                    matches!(&job.stands, Stands::Placed { leaving: Some(_), .. })
                });
                if there {
                    let attempt = next(world, &eviction.job);
                    changes.push(requeued(eviction.job, attempt, 0));
                }
            }
        }
        Step::Reload => {}
    }
    for change in &changes {
        world.apply(change.clone());
    }
    changes
}
