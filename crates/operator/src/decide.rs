//! The one place where the operator meets the decision core: changes in, a checked plan out.
//!
//! Each look starts from what the API server shows, with a scheduler that remembers nothing: an
//! operator that has just started decides the same as one that has run for a month. What needs a
//! memory (ends of jobs for the sake of others, resizing) is switched off.

use drumline_audit::{CheckedJob, check};
use drumline_cluster::{Change, Node, Request};
use drumline_scheduler::{Options, Scheduler};
use drumline_spec::{DeviceKind, Gang, JobSpec, QueueSpec, WHOLE_DEVICE};
use drumline_types::{Attempt, DeviceId, Explanation, JobId, QueueName, Reason, Timestamp};

/// A gang that holds devices.
#[derive(Debug, Clone)]
pub struct Holding {
    /// What it asked for.
    pub request: Request,
    /// Its attempt.
    pub attempt: Attempt,
    /// What it holds, in rank order.
    pub devices: Vec<DeviceId>,
    /// When the attempt was launched.
    pub started: Timestamp,
}

/// A gang that wants devices.
#[derive(Debug, Clone)]
pub struct Wanting {
    /// What it asks for.
    pub request: Request,
    /// The attempt that would start.
    pub attempt: Attempt,
    /// It may not start before this moment.
    pub not_before: Timestamp,
}

/// Everything that a decision depends on.
#[derive(Debug, Clone, Default)]
pub struct Scene {
    /// The nodes, with what others use of them.
    pub nodes: Vec<Node>,
    /// The queues beside `default`.
    pub queues: Vec<QueueSpec>,
    /// Who holds devices.
    pub holding: Vec<Holding>,
    /// Who wants some.
    pub wanting: Vec<Wanting>,
}

/// Who starts now, and why the others wait.
#[derive(Debug, Default)]
pub struct Decision {
    /// Checked plans: these may be launched.
    pub start: Vec<CheckedJob>,
    /// Everyone else.
    pub wait: Vec<(JobId, Explanation)>,
    /// When the passing of time alone may change it.
    pub wake: Option<Timestamp>,
}

/// Decides over all jobs that wait, at `now`.
#[must_use]
pub fn decide(scene: Scene, now: Timestamp) -> Decision {
    let options = Options { preemption: false, consolidation: false, ..Options::default() };
    let mut scheduler = Scheduler::new(options);
    let mut apply = |change: Change, what: &str| {
        if let Err(error) = scheduler.apply(change, now) {
            tracing::error!(%error, "the scheduler refuses {what}");
        }
    };
    for node in scene.nodes {
        apply(Change::Node { node: Box::new(node) }, "a node");
    }
    for queue in parents_first(scene.queues) {
        apply(Change::Queue { queue: Box::new(queue) }, "a queue");
    }
    for held in scene.holding {
        let Holding { request, attempt, devices, started } = held;
        let request = Box::new(request);
        apply(Change::Adopted { request, attempt, devices, started }, "a gang that runs");
    }
    for wanting in scene.wanting {
        let Wanting { request, attempt, not_before } = wanting;
        let request = Box::new(request);
        apply(Change::Submitted { request, attempt, not_before }, "a job that waits");
    }
    let before = scheduler.fleet().clone();
    let cycle = scheduler.cycle(now);
    let mut decision = Decision { start: Vec::new(), wait: cycle.told, wake: cycle.wake };
    match check(&before, &cycle.plan) {
        Ok(checked) => decision.start = checked.jobs().collect(),
        Err(violations) => {
            // A plan that breaks a rule is a bug: nothing of it is carried out.
            let first = violations.first().map(ToString::to_string).unwrap_or_default();
            tracing::error!(violations = violations.len(), %first, "a plan failed its audit");
            for job in &cycle.plan.jobs {
                let message = format!("the plan for it failed its audit: {first}");
                let why = Explanation::new(Reason::NotYetConsidered, message);
                decision.wait.push((job.job.clone(), why));
            }
        }
    }
    decision
}

/// A queue is only accepted once its parent is there.
fn parents_first(queues: Vec<QueueSpec>) -> Vec<QueueSpec> {
    let mut left = queues;
    let mut sorted: Vec<QueueSpec> = Vec::new();
    loop {
        let (ready, later): (Vec<_>, Vec<_>) = left.into_iter().partition(|queue| {
            let is_there = |parent: &QueueName| sorted.iter().any(|other| other.name == *parent);
            queue.parent.as_ref().is_none_or(is_there)
        });
        let is_stuck = ready.is_empty();
        sorted.extend(ready);
        left = later;
        if is_stuck {
            // Those without a parent are refused, each with its reason.
            sorted.extend(left);
            return sorted;
        }
    }
}

/// Returns what the decision core needs to know of a job.
#[must_use]
pub fn request(job: &JobId, spec: &JobSpec, created_ms: u64, cpu_device_milli: u64) -> Request {
    Request {
        job: job.clone(),
        gang: gang(spec, cpu_device_milli),
        split: spec.parallelism(),
        settings: spec.settings.clone(),
        submitted: Timestamp(created_ms),
    }
}

/// Returns the gang as pods make it: whole devices, the wanted size, and for a CPU device its
/// processor time, so that node and kubelet count the same.
#[must_use]
pub fn gang(spec: &JobSpec, cpu_device_milli: u64) -> Gang {
    let mut gang = spec.gang();
    gang.share_milli = WHOLE_DEVICE;
    gang.elastic = None;
    gang.leader = None;
    if gang.device == DeviceKind::Cpu {
        gang.cpu_milli = gang.cpu_milli.max(cpu_device_milli);
    }
    gang
}
