//! A small world around the scheduler: a cluster in, decisions out, every cycle checked.
#![allow(dead_code)]

pub(crate) mod play;

use std::collections::BTreeMap;

use drumline_audit::Auditor;
use drumline_cluster::{Change, Device, Health, Node, Request};
use drumline_placement::{Cycle, Eviction};
use drumline_scheduler::{Options, Scheduler};
use drumline_spec::{
    DeviceKind, DisruptionBudget, Elastic, Gang, GangSettings, Parallelism, QueueSpec, Reclaim,
    TopologyRule,
};
use drumline_types::{Attempt, Bytes, JobId, Timestamp};

pub(crate) const MINUTE: u64 = 60_000;

/// A job to submit.
#[derive(Debug, Clone)]
pub(crate) struct Job(pub(crate) Request);

impl Job {
    /// A gang of `gpus` ranks in queue `default`.
    pub(crate) fn named(name: &str, gpus: u32) -> Self {
        Self(Request {
            job: name.parse().unwrap(),
            gang: Gang { ranks: gpus, device: DeviceKind::Gpu, ..Gang::default() },
            split: Parallelism { data: gpus, ..Parallelism::SINGLE },
            settings: GangSettings::default(),
            submitted: Timestamp(0),
        })
    }

    pub(crate) fn queue(mut self, queue: &str) -> Self {
        self.0.settings.queue = queue.parse().unwrap();
        self
    }

    pub(crate) fn priority(mut self, priority: i32) -> Self {
        self.0.settings.priority = priority;
        self
    }

    /// Consecutive ranks that share a node.
    pub(crate) fn groups(mut self, of: u32) -> Self {
        self.0.gang.node_group = of;
        let data = self.0.gang.ranks / of;
        self.0.split = Parallelism { tensor: of, data, ..Parallelism::SINGLE };
        self
    }

    pub(crate) fn takes(mut self, ms: u64) -> Self {
        self.0.settings.expected_ms = Some(ms);
        self
    }

    pub(crate) fn in_one(mut self, level: &str) -> Self {
        let rule = TopologyRule { ranks: 0, level: level.to_owned(), required: true };
        self.0.gang.topology.push(rule);
        self
    }

    pub(crate) fn model(mut self, model: &str) -> Self {
        self.0.gang.models.push(model.to_owned());
        self
    }

    pub(crate) fn elastic(mut self, least: u32, most: u32) -> Self {
        self.0.gang.elastic = Some(Elastic { least, most, step: 1 });
        self
    }

    /// Devices kept ready beside it.
    pub(crate) fn spares(mut self, devices: u32) -> Self {
        self.0.gang.spares = devices;
        self
    }

    pub(crate) fn not_preemptible(mut self) -> Self {
        self.0.settings.preemptible = false;
        self
    }

    pub(crate) fn min_runtime(mut self, ms: u64) -> Self {
        self.0.settings.min_runtime_ms = ms;
        self
    }

    pub(crate) fn disruptions(mut self, count: u32, per_ms: u64) -> Self {
        self.0.settings.disruptions = Some(DisruptionBudget { count, per_ms });
        self
    }
}

/// A queue to make.
#[derive(Debug, Clone)]
pub(crate) struct Queue(pub(crate) QueueSpec);

impl Queue {
    pub(crate) fn named(name: &str) -> Self {
        Self(QueueSpec::open(name.parse().unwrap()))
    }

    pub(crate) fn below(mut self, parent: &str) -> Self {
        self.0.parent = Some(parent.parse().unwrap());
        self
    }

    pub(crate) fn quota(mut self, class: &str, devices: u32) -> Self {
        self.0.quota.insert(class.to_owned(), devices);
        self
    }

    pub(crate) fn borrows(mut self, class: &str, devices: u32) -> Self {
        let limit = self.0.borrowing_limit.get_or_insert_default();
        limit.insert(class.to_owned(), devices);
        self
    }

    pub(crate) fn lends(mut self, class: &str, devices: u32) -> Self {
        self.0.lending_limit.get_or_insert_default().insert(class.to_owned(), devices);
        self
    }

    pub(crate) fn weight(mut self, weight: u32) -> Self {
        self.0.weight = weight;
        self
    }

    pub(crate) fn reclaim(mut self, reclaim: Reclaim) -> Self {
        self.0.reclaim = reclaim;
        self
    }
}

/// The scheduler, the time, and what it decided.
pub(crate) struct World {
    pub(crate) scheduler: Scheduler,
    pub(crate) now: u64,
    /// Evictions that have not been carried out yet.
    pub(crate) leaving: Vec<Eviction>,
    pub(crate) attempts: BTreeMap<JobId, u32>,
    pub(crate) auditor: Auditor,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        Self {
            scheduler: Scheduler::new(options),
            now: 0,
            leaving: Vec::new(),
            attempts: BTreeMap::new(),
            auditor: Auditor::new(),
        }
    }

    /// Adds nodes: each as `rack/name`, with so many GPUs.
    pub(crate) fn nodes(mut self, names: &str, gpus: usize) -> Self {
        for name in names.split_whitespace() {
            self.node(name, gpus, "H100");
        }
        self
    }

    pub(crate) fn node(&mut self, path: &str, gpus: usize, model: &str) {
        let (rack, name) = path.split_once('/').unwrap_or(("r1", path));
        let device = || Device::new(DeviceKind::Gpu, model, Bytes(80 << 30));
        let devices = (0..gpus).map(|_| device()).collect();
        let node = Node::new(name.parse().unwrap(), devices).within("rack", rack);
        self.apply(Change::Node { node: Box::new(node) });
    }

    pub(crate) fn queue(&mut self, queue: Queue) {
        self.apply(Change::Queue { queue: Box::new(queue.0) });
    }

    pub(crate) fn apply(&mut self, change: Change) {
        self.auditor.apply(&change);
        self.scheduler.apply(change, Timestamp(self.now)).unwrap();
    }

    pub(crate) fn submit(&mut self, mut job: Job) {
        job.0.submitted = Timestamp(self.now);
        self.attempts.insert(job.0.job.clone(), 1);
        let request = Box::new(job.0);
        self.apply(Change::Submitted { request, attempt: Attempt(1), not_before: Timestamp(0) });
    }

    pub(crate) fn end(&mut self, job: &str) {
        self.apply(Change::Ended { job: job.parse().unwrap() });
    }

    pub(crate) fn wait(&mut self, ms: u64) {
        self.now += ms;
    }

    /// A node is gone with everything on it: the attempts that were on it are over.
    pub(crate) fn lose(&mut self, node: &str) {
        let name = node.parse().unwrap();
        self.apply(Change::NodeGone { node: name });
    }

    /// A device fails.
    pub(crate) fn fail(&mut self, node: &str, device: usize) {
        let state = self.scheduler.fleet().node(&node.parse().unwrap()).unwrap();
        let mut node = state.node().clone();
        node.devices[device].health = Health::Failed("Xid 79".to_owned());
        self.apply(Change::Node { node: Box::new(node) });
    }

    /// A job's attempt is over, and it waits for the next.
    pub(crate) fn crash(&mut self, job: &str) {
        let job: JobId = job.parse().unwrap();
        let next = self.attempts.entry(job.clone()).or_insert(1);
        *next += 1;
        let (attempt, not_before) = (Attempt(*next), Timestamp(0));
        self.apply(Change::Requeued { job, attempt, not_before });
    }

    /// The nodes that a job holds devices of.
    pub(crate) fn on(&self, job: &str) -> Vec<String> {
        let held = self.scheduler.fleet().commitment(&job.parse().unwrap());
        let mut nodes: Vec<String> =
            held.iter().flat_map(|h| &h.devices).map(|d| d.node.to_string()).collect();
        nodes.dedup();
        nodes
    }

    /// What is kept ready for a job, and to whom it is lent.
    pub(crate) fn spares(&self, job: &str) -> Vec<String> {
        let spares = self.scheduler.spares(&job.parse().unwrap());
        let one = |(device, to): (drumline_types::DeviceId, Option<JobId>)| match to {
            Some(to) => format!("{device} lent to {to}"),
            None => device.to_string(),
        };
        spares.into_iter().map(one).collect()
    }

    /// Everyone who was asked to leave has left.
    pub(crate) fn all_leave(&mut self) {
        for eviction in std::mem::take(&mut self.leaving) {
            let next = self.attempts.entry(eviction.job.clone()).or_insert(1);
            *next += 1;
            let attempt = Attempt(*next);
            let not_before = Timestamp(0);
            self.apply(Change::Requeued { job: eviction.job, attempt, not_before });
        }
    }

    /// One cycle, audited.
    pub(crate) fn decide(&mut self) -> Cycle {
        let before = self.scheduler.fleet().clone();
        let cycle = self.scheduler.cycle(Timestamp(self.now));
        if let Err(violations) = drumline_audit::check(&before, &cycle.plan) {
            panic!("the plan breaks rules: {violations:#?}");
        }
        let fleet = self.scheduler.fleet();
        let kept = |device: &drumline_types::DeviceId| {
            fleet.node(&device.node)?.reserved(device.index).cloned()
        };
        if let Err(violations) = self.auditor.check(&cycle, kept) {
            panic!("the cycle breaks rules: {violations:#?}");
        }
        self.leaving.extend(cycle.evictions.iter().cloned());
        cycle
    }

    /// One cycle, as lines: `start NAME on NODE xN ...`, `evict NAME (cause, for NAME)`.
    pub(crate) fn cycle(&mut self) -> Vec<String> {
        let cycle = self.decide();
        lines(&cycle)
    }

    /// Why a job waits.
    pub(crate) fn why(&self, job: &str) -> String {
        self.scheduler
            .explain(&job.parse().unwrap(), Timestamp(self.now))
            .map_or_else(|| "does not wait".to_owned(), |why| why.to_string())
    }
}

pub(crate) fn lines(cycle: &Cycle) -> Vec<String> {
    let mut lines = Vec::new();
    for eviction in &cycle.evictions {
        let cause = format!("{:?}", eviction.cause).to_lowercase();
        let size = eviction.resize_to.map_or(String::new(), |size| format!(" to {size}"));
        let whom = eviction.beneficiary.as_ref().map_or("nobody", |job| job.as_str());
        lines.push(format!("{} is {cause}{size} for {whom}", eviction.job));
    }
    for job in &cycle.plan.jobs {
        let mut nodes: BTreeMap<&str, u32> = BTreeMap::new();
        for assignment in &job.assignments {
            *nodes.entry(assignment.device.node.as_str()).or_default() += 1;
        }
        let nodes: Vec<String> = nodes.iter().map(|(node, n)| format!("{node} x{n}")).collect();
        lines.push(format!("{} starts on {}", job.job, nodes.join(", ")));
    }
    lines
}
