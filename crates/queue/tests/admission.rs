//! Who is admitted, in which order, and why the others wait.

use drumline_queue::{Admission, QueueLimits, Queues, Usage, Waiting, admit};
use drumline_spec::{DeviceKind, Gang, GangSettings, Parallelism, RestartPolicy};
use drumline_types::{Attempt, Reason, Timestamp};
use proptest::prelude::*;

const NOW: Timestamp = Timestamp(10_000);

fn job(name: &str, queue: &str, ranks: u32, priority: i32, submitted: u64) -> Waiting {
    Waiting {
        job: name.parse().unwrap(),
        attempt: Attempt(1),
        gang: Gang { ranks, node_group: 1, device: DeviceKind::Gpu, ..Gang::default() },
        split: Parallelism { tensor: 1, pipeline: 1, data: ranks },
        settings: GangSettings {
            queue: queue.parse().unwrap(),
            priority,
            restarts: RestartPolicy { limit: 0, backoff_ms: 0 },
            stall_timeout_ms: 0,
            start_timeout_ms: 1000,
            ..GangSettings::default()
        },
        submitted: Timestamp(submitted),
        held: false,
        not_before: Timestamp(0),
    }
}

fn queues(limit: u32) -> Queues {
    let limits = QueueLimits { devices: [(DeviceKind::Gpu, limit)].into() };
    Queues::named([("a".parse().unwrap(), limits.clone()), ("b".parse().unwrap(), limits)])
}

fn names(admission: &Admission) -> Vec<&str> {
    admission.admitted.iter().map(|a| a.waiting().job.as_str()).collect()
}

fn reason(admission: &Admission, name: &str) -> Option<Reason> {
    admission.refused.iter().find(|(job, _)| job.as_str() == name).map(|(_, why)| why.reason)
}

#[test]
fn priority_goes_first_then_arrival() {
    let waiting =
        [job("late", "a", 1, 0, 9), job("early", "a", 1, 0, 1), job("urgent", "a", 1, 5, 99)];
    let admission = admit(&Queues::open(), &Usage::default(), &waiting, NOW);
    assert_eq!(names(&admission), ["urgent", "early", "late"]);
}

#[test]
fn a_job_that_waits_for_quota_is_not_overtaken_in_its_queue() {
    let mut usage = Usage::default();
    usage.add(&"a".parse().unwrap(), DeviceKind::Gpu, 5);
    let waiting = [
        job("never", "a", 9, 0, 0),
        job("big", "a", 4, 0, 1),
        job("small", "a", 1, 0, 2),
        job("other", "b", 8, 0, 3),
    ];
    let admission = admit(&queues(8), &usage, &waiting, NOW);
    assert_eq!(names(&admission), ["other"]);
    assert_eq!(reason(&admission, "never"), Some(Reason::ExceedsQuota));
    assert_eq!(reason(&admission, "big"), Some(Reason::WaitingForQuota));
    assert_eq!(reason(&admission, "small"), Some(Reason::WaitingForQuota));
}

#[test]
fn a_held_a_lost_and_a_resting_job_say_so() {
    let held = Waiting { held: true, ..job("held", "a", 1, 0, 0) };
    let rests = Waiting { not_before: Timestamp(12_000), ..job("rests", "a", 1, 0, 0) };
    let waiting = [held, rests, job("lost", "nowhere", 1, 0, 0)];
    let admission = admit(&queues(8), &Usage::default(), &waiting, NOW);
    assert_eq!(reason(&admission, "held"), Some(Reason::Held));
    assert_eq!(reason(&admission, "rests"), Some(Reason::BackingOff));
    assert_eq!(reason(&admission, "lost"), Some(Reason::QueueMissing));
    let (_, why) = &admission.refused[1];
    assert_eq!(why.message, "there is no queue nowhere");
}

proptest! {
    #[test]
    fn no_queue_ever_exceeds_its_limit_and_every_job_gets_one_answer(
        jobs in prop::collection::vec((0u32..2, 1u32..12, 0i32..3, 0u64..5), 0..30),
        used in 0u32..12,
    ) {
        let waiting: Vec<Waiting> = jobs
            .iter()
            .enumerate()
            .map(|(i, &(queue, ranks, priority, at))| {
                job(&format!("job-{i}"), if queue == 0 { "a" } else { "b" }, ranks, priority, at)
            })
            .collect();
        let mut usage = Usage::default();
        usage.add(&"a".parse().unwrap(), DeviceKind::Gpu, used);
        let admission = admit(&queues(10), &usage, &waiting, NOW);
        prop_assert_eq!(admission.admitted.len() + admission.refused.len(), waiting.len());
        for (queue, start) in [("a", used), ("b", 0)] {
            let charged: u32 = admission
                .admitted
                .iter()
                .filter(|a| a.waiting().settings.queue.as_str() == queue)
                .map(|a| a.waiting().gang.ranks)
                .sum();
            prop_assert!(charged == 0 || start + charged <= 10);
        }
    }

    #[test]
    fn the_order_in_which_jobs_are_listed_changes_nothing(
        jobs in prop::collection::vec((1u32..5, 0i32..3, 0u64..3), 0..12),
        rotation in 0usize..12,
    ) {
        let mut waiting: Vec<Waiting> = jobs
            .iter()
            .enumerate()
            .map(|(i, &(ranks, priority, at))| job(&format!("job-{i}"), "a", ranks, priority, at))
            .collect();
        let straight = admit(&queues(8), &Usage::default(), &waiting, NOW);
        let by = rotation.min(waiting.len());
        waiting.rotate_left(by);
        prop_assert_eq!(admit(&queues(8), &Usage::default(), &waiting, NOW), straight);
    }
}
