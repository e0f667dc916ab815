//! The one place where the operator meets the decision core: what the API server shows becomes the
//! changes since the last look, and what the core decides leaves it audited, or not at all.
//!
//! The desk lasts for one term of leadership. What it remembers beside what is shown (whom it asked
//! to leave and for whom, reservations, cool-downs) may be lost with it: the next leader adopts what
//! runs and decides anew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drumline_audit::{Auditor, CheckedJob};
use drumline_cluster::{Change, Node, Request};
use drumline_placement::{Eviction, EvictionCause, Seed};
use drumline_scheduler::{Options, Scheduler};
use drumline_spec::{DeviceKind, Gang, JobSpec, QueueSpec, WHOLE_DEVICE};
use drumline_types::{
    Attempt, DeviceId, Explanation, JobId, NodeName, QueueName, Reason, Timestamp,
};

/// A gang that holds devices.
#[derive(Debug, Clone)]
pub struct Holding {
    /// What it asked for.
    pub request: Request,
    /// Its attempt.
    pub attempt: Attempt,
    /// What it holds, in rank order.
    pub devices: Arc<[DeviceId]>,
    /// When the attempt was launched.
    pub started: Timestamp,
    /// Whether every rank runs.
    pub is_running: bool,
    /// The step of its newest checkpoint.
    pub checkpoint: Option<u64>,
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

/// What a decision depends on, as the API server shows it: of nodes what has changed, of jobs
/// everything.
#[derive(Debug, Clone, Default)]
pub struct Scene {
    /// Nodes that may have changed, with what others use of them.
    pub nodes: Vec<Node>,
    /// Nodes that are gone.
    pub gone: Vec<NodeName>,
    /// The queues that exist.
    pub queues: Vec<QueueSpec>,
    /// Who holds devices.
    pub holding: Vec<Holding>,
    /// Who wants some.
    pub wanting: Vec<Wanting>,
    /// Jobs that are neither, for the moment, and keep what they have.
    pub between: BTreeSet<JobId>,
}

/// Who starts, who leaves, and when to look again.
#[derive(Debug, Default)]
pub struct Decision {
    /// Checked plans: these may be launched.
    pub start: Vec<CheckedJob>,
    /// Who is asked to leave, and why.
    pub leave: Vec<(JobId, Attempt, Explanation)>,
    /// When the passing of time alone may change it.
    pub wake: Option<Timestamp>,
}

/// What the core was last told of a job.
#[derive(Debug, Clone, PartialEq)]
enum Known {
    Waiting { request: Request, attempt: Attempt, not_before: Timestamp },
    Holding { request: Request, attempt: Attempt, is_running: bool, checkpoint: Option<u64> },
}

/// The scheduler, its auditor, and what both were told.
pub struct Desk {
    scheduler: Scheduler,
    /// Keeps books of its own, from the same changes.
    auditor: Auditor,
    nodes: BTreeMap<NodeName, Node>,
    queues: BTreeMap<QueueName, QueueSpec>,
    jobs: BTreeMap<JobId, Known>,
    /// Why each job waits, as it was last told.
    waits: BTreeMap<JobId, Explanation>,
    wake: Option<Timestamp>,
}

impl Desk {
    /// Returns the desk of a new term of leadership.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let options = Options { seed: Seed(seed), ..Options::default() };
        Self {
            scheduler: Scheduler::new(options),
            auditor: Auditor::new(),
            nodes: BTreeMap::new(),
            queues: BTreeMap::new(),
            jobs: BTreeMap::new(),
            waits: BTreeMap::new(),
            wake: None,
        }
    }

    /// Returns why a job waits.
    #[must_use]
    pub fn wait_of(&self, job: &JobId) -> Option<&Explanation> {
        self.waits.get(job)
    }

    fn apply(&mut self, change: Change, now: Timestamp) -> bool {
        match self.scheduler.apply(change.clone(), now) {
            Ok(()) => {
                self.auditor.apply(&change);
                true
            }
            Err(error) => {
                tracing::error!(%error, "the scheduler refuses what the API server shows");
                false
            }
        }
    }

    /// Tells the core what has changed, and lets it decide.
    #[must_use]
    pub fn look(&mut self, scene: Scene, now: Timestamp) -> Decision {
        let shown: BTreeSet<JobId> = (scene.holding.iter().map(|held| &held.request.job))
            .chain(scene.wanting.iter().map(|wanting| &wanting.request.job))
            .chain(&scene.between)
            .cloned()
            .collect();
        // Those that are gone first: what they held is free for the others.
        let gone: Vec<JobId> =
            self.jobs.keys().filter(|job| !shown.contains(job)).cloned().collect();
        for job in gone {
            self.jobs.remove(&job);
            self.waits.remove(&job);
            self.apply(Change::Ended { job }, now);
        }
        let (back, new): (Vec<_>, Vec<_>) = (scene.wanting.into_iter())
            .partition(|w| matches!(self.jobs.get(&w.request.job), Some(Known::Holding { .. })));
        for wanting in back {
            self.see_wanting(wanting, now);
        }
        self.see_nodes(scene.nodes, scene.gone, now);
        self.see_queues(scene.queues, now);
        for held in scene.holding {
            self.see_holding(held, now);
        }
        for wanting in new {
            self.see_wanting(wanting, now);
        }
        if !self.scheduler.dirty() && self.wake.is_none_or(|at| at > now) {
            return Decision { wake: self.wake, ..Decision::default() };
        }
        self.decide(now)
    }

    fn see_nodes(&mut self, nodes: Vec<Node>, gone: Vec<NodeName>, now: Timestamp) {
        for node in nodes {
            if self.nodes.get(&node.name) != Some(&node) {
                self.nodes.insert(node.name.clone(), node.clone());
                self.apply(Change::Node { node: Box::new(node) }, now);
            }
        }
        for node in gone {
            if self.nodes.remove(&node).is_some() {
                self.apply(Change::NodeGone { node }, now);
            }
        }
    }

    fn see_queues(&mut self, queues: Vec<QueueSpec>, now: Timestamp) {
        let default = QueueName::default_queue();
        let mut wanted: BTreeMap<QueueName, QueueSpec> =
            queues.into_iter().map(|queue| (queue.name.clone(), queue)).collect();
        // There is always a default queue, open unless somebody says otherwise.
        wanted.entry(default.clone()).or_insert_with(|| QueueSpec::open(default));
        // Children before their parents.
        let mut gone: Vec<QueueSpec> = (self.queues.values())
            .filter(|queue| !wanted.contains_key(&queue.name))
            .cloned()
            .collect();
        while !gone.is_empty() {
            let parents: BTreeSet<QueueName> =
                gone.iter().filter_map(|queue| queue.parent.clone()).collect();
            let before = gone.len();
            gone.retain(|queue| {
                let is_leaf = !parents.contains(&queue.name);
                if is_leaf {
                    self.queues.remove(&queue.name);
                    self.apply(Change::QueueGone { queue: queue.name.clone() }, now);
                }
                !is_leaf
            });
            if gone.len() == before {
                break;
            }
        }
        let changed =
            wanted.into_values().filter(|queue| self.queues.get(&queue.name) != Some(queue));
        for queue in parents_first(changed.collect()) {
            if self.apply(Change::Queue { queue: Box::new(queue.clone()) }, now) {
                self.queues.insert(queue.name.clone(), queue);
            }
        }
    }

    fn see_holding(&mut self, held: Holding, now: Timestamp) {
        let Holding { request, attempt, devices, started, is_running, checkpoint } = held;
        let job = request.job.clone();
        let same = match self.jobs.get(&job) {
            Some(Known::Holding { request: was, attempt: then, is_running, checkpoint })
                if *then == attempt && *was == request =>
            {
                Some((*is_running, *checkpoint))
            }
            _ => None,
        };
        let (was_running, was_checkpoint) = match same {
            Some(was) => was,
            // Also a gang whose queue or priority has changed: it holds what it held.
            None => {
                let request = Box::new(request.clone());
                let devices = devices.to_vec();
                let adopted = Change::Adopted { request, attempt, devices, started };
                if !self.apply(adopted, now) {
                    return;
                }
                self.waits.remove(&job);
                (false, None)
            }
        };
        if is_running && !was_running {
            self.apply(Change::Running { job: job.clone() }, now);
        }
        if checkpoint > was_checkpoint && is_running {
            self.apply(Change::Checkpointed { job: job.clone() }, now);
        }
        self.jobs.insert(job, Known::Holding { request, attempt, is_running, checkpoint });
    }

    fn see_wanting(&mut self, wanting: Wanting, now: Timestamp) {
        let Wanting { request, attempt, not_before } = wanting;
        let job = request.job.clone();
        let next = Known::Waiting { request: request.clone(), attempt, not_before };
        match self.jobs.get(&job) {
            Some(known) if *known == next => return,
            Some(Known::Holding { request: was, .. }) => {
                let is_same = *was == request;
                self.apply(Change::Requeued { job: job.clone(), attempt, not_before }, now);
                if !is_same {
                    let request = Box::new(request);
                    self.apply(Change::Submitted { request, attempt, not_before }, now);
                }
            }
            _ => {
                let request = Box::new(request);
                self.apply(Change::Submitted { request, attempt, not_before }, now);
            }
        }
        self.jobs.insert(job, next);
    }

    fn decide(&mut self, now: Timestamp) -> Decision {
        let cycle = self.scheduler.cycle(now);
        self.wake = cycle.wake;
        let fleet = self.scheduler.fleet();
        let kept = |device: &DeviceId| fleet.node(&device.node)?.reserved(device.index).cloned();
        let checked = self.auditor.check(&cycle, kept);
        self.waits.extend(cycle.told.iter().cloned());
        let mut decision = Decision { wake: cycle.wake, ..Decision::default() };
        match checked {
            Ok(checked) => {
                for start in checked.jobs() {
                    self.started(start.plan().job.clone(), start.plan().attempt);
                    decision.start.push(start);
                }
                decision.leave = cycle.evictions.iter().map(leaves).collect();
            }
            Err(violations) => {
                // A plan that breaks a rule is a bug: nothing of it is carried out.
                let first = violations.first().map(ToString::to_string).unwrap_or_default();
                tracing::error!(violations = violations.len(), %first, "a plan failed its audit");
                let message = format!("the plan for it failed its audit: {first}");
                let why = Explanation::new(Reason::NotYetConsidered, message);
                self.scheduler.reject(&cycle, &why);
                let starts = cycle.plan.jobs.iter().map(|job| (job.job.clone(), why.clone()));
                self.waits.extend(starts);
            }
        }
        decision
    }

    /// The core has given devices to a job: it is told of them no second time.
    fn started(&mut self, job: JobId, attempt: Attempt) {
        self.waits.remove(&job);
        if let Some(Known::Waiting { request, .. }) = self.jobs.get(&job) {
            let request = request.clone();
            let held = Known::Holding { request, attempt, is_running: false, checkpoint: None };
            self.jobs.insert(job, held);
        }
    }
}

fn leaves(eviction: &Eviction) -> (JobId, Attempt, Explanation) {
    let reason = match eviction.cause {
        EvictionCause::Preempted => Reason::Preempted,
        EvictionCause::Reclaimed | EvictionCause::Recalled => Reason::Reclaimed,
        EvictionCause::Consolidated | EvictionCause::Resized | EvictionCause::Drained => {
            Reason::Moved
        }
    };
    let why = Explanation::new(reason, eviction.message.clone());
    (eviction.job.clone(), eviction.attempt, why)
}

/// A queue is only accepted once its parent is there.
fn parents_first(queues: Vec<QueueSpec>) -> Vec<QueueSpec> {
    let mut left = queues;
    let mut sorted: Vec<QueueSpec> = Vec::new();
    loop {
        let waiting: BTreeSet<QueueName> = left.iter().map(|queue| queue.name.clone()).collect();
        let (ready, later): (Vec<_>, Vec<_>) = left
            .into_iter()
            .partition(|queue| queue.parent.as_ref().is_none_or(|name| !waiting.contains(name)));
        let is_stuck = ready.is_empty();
        sorted.extend(ready);
        left = later;
        if is_stuck {
            // Parents in a circle are refused, each with its reason.
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

/// Returns the gang as pods make it: whole devices, and for a CPU device its processor time, so
/// that node and kubelet count the same.
#[must_use]
pub fn gang(spec: &JobSpec, cpu_device_milli: u64) -> Gang {
    let mut gang = spec.gang();
    gang.share_milli = WHOLE_DEVICE;
    gang.leader = None;
    if gang.device == DeviceKind::Cpu {
        gang.cpu_milli = gang.cpu_milli.max(cpu_device_milli);
    }
    gang
}
