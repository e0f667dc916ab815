//! The auditor's own books: the same changes that the scheduler is told, folded in the plainest
//! way.

use std::collections::BTreeMap;

use drumline_cluster::{Change, Node, Request};
use drumline_spec::{DeviceKind, QueueSpec, WHOLE_DEVICE};
use drumline_types::{Attempt, DeviceId, JobId, NodeName, QueueName, Timestamp};

use crate::books::Books;

/// What is known of one machine, and what jobs hold on it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Machine {
    /// `None`: it left, or was never heard of.
    pub(crate) node: Option<Node>,
    /// Per device, thousandths held, by whom.
    pub(crate) held: BTreeMap<u32, BTreeMap<JobId, u32>>,
    cpu_milli: u64,
    memory: u64,
}

/// Where a job stands.
#[derive(Debug, Clone)]
pub(crate) enum Standing {
    Waiting {
        not_before: Timestamp,
    },
    Placed {
        devices: Vec<DeviceId>,
        /// What its queue is charged with, in thousandths by kind and model.
        charge: Vec<(DeviceKind, String, u64)>,
        started: Timestamp,
        leaving: bool,
    },
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) request: Request,
    pub(crate) attempt: Attempt,
    pub(crate) held: bool,
    pub(crate) standing: Standing,
    pub(crate) disrupted: Vec<Timestamp>,
}

/// Everything that the rules are about.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger {
    pub(crate) machines: BTreeMap<NodeName, Machine>,
    pub(crate) jobs: BTreeMap<JobId, Entry>,
    pub(crate) queues: BTreeMap<QueueName, QueueSpec>,
    /// What the jobs of each queue itself hold, in thousandths.
    pub(crate) used: BTreeMap<QueueName, BTreeMap<(DeviceKind, String), u64>>,
    /// Devices of the fleet, in whatever state.
    pub(crate) devices: BTreeMap<(DeviceKind, String), u64>,
}

impl Ledger {
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Node { node } => {
                self.node_gone(&node.name);
                for device in &node.devices {
                    *self.devices.entry((device.kind, device.model.clone())).or_default() += 1;
                }
                self.machines.entry(node.name.clone()).or_default().node = Some(*node.clone());
            }
            Change::NodeGone { node } => self.node_gone(node),
            Change::Queue { queue } => {
                self.queues.insert(queue.name.clone(), *queue.clone());
            }
            Change::QueueGone { queue } => {
                self.queues.remove(queue);
            }
            Change::Submitted { request, attempt, not_before } => {
                let standing = Standing::Waiting { not_before: *not_before };
                self.free(&request.job);
                let known = self.jobs.get(&request.job);
                let held = known.is_some_and(|entry| entry.held);
                let disrupted = known.map(|entry| entry.disrupted.clone()).unwrap_or_default();
                let (request, attempt) = (*request.clone(), *attempt);
                let entry = Entry { request, attempt, held, standing, disrupted };
                self.jobs.insert(entry.request.job.clone(), entry);
            }
            Change::Held { job, held } => {
                if let Some(entry) = self.jobs.get_mut(job) {
                    entry.held = *held;
                }
            }
            Change::Adopted { request, attempt, devices, started } => {
                self.free(&request.job);
                let entry = Entry {
                    request: *request.clone(),
                    attempt: *attempt,
                    held: false,
                    standing: Standing::Waiting { not_before: *started },
                    disrupted: Vec::new(),
                };
                self.jobs.insert(request.job.clone(), entry);
                self.give(&request.job, devices.clone(), *started);
            }
            // What is kept ready is checked in each cycle, wherever it comes from.
            Change::Running { .. } | Change::Checkpointed { .. } | Change::Spared { .. } => {}
            Change::Requeued { job, attempt, not_before } => {
                self.free(job);
                if let Some(entry) = self.jobs.get_mut(job) {
                    entry.attempt = *attempt;
                    entry.standing = Standing::Waiting { not_before: *not_before };
                }
            }
            Change::Ended { job } => {
                self.free(job);
                self.jobs.remove(job);
            }
        }
    }

    fn node_gone(&mut self, name: &NodeName) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        for device in machine.node.take().into_iter().flat_map(|node| node.devices) {
            if let Some(count) = self.devices.get_mut(&(device.kind, device.model)) {
                *count = count.saturating_sub(1);
            }
        }
        if machine.held.is_empty() {
            self.machines.remove(name);
        }
    }

    /// Puts a job on devices.
    pub(crate) fn give(&mut self, job: &JobId, devices: Vec<DeviceId>, started: Timestamp) {
        let Some(entry) = self.jobs.get_mut(job) else { return };
        let gang = &entry.request.gang;
        let mut charge: BTreeMap<(DeviceKind, String), u64> = BTreeMap::new();
        for (rank, device) in devices.iter().enumerate() {
            let machine = self.machines.entry(device.node.clone()).or_default();
            let held = machine.held.entry(device.index).or_default();
            *held.entry(job.clone()).or_default() += gang.share_milli;
            machine.cpu_milli += gang.cpu_milli;
            machine.memory += gang.memory.0;
            let known = machine.node.as_ref().and_then(|n| n.devices.get(device.index as usize));
            let class = match (known, gang.leader) {
                (Some(device), _) => (device.kind, device.model.clone()),
                (None, Some(kind)) if rank == 0 => (kind, String::new()),
                (None, _) => (gang.device, gang.models.first().cloned().unwrap_or_default()),
            };
            *charge.entry(class).or_default() += u64::from(gang.share_milli);
        }
        let used = self.used.entry(entry.request.settings.queue.clone()).or_default();
        for (class, amount) in &charge {
            *used.entry(class.clone()).or_default() += amount;
        }
        let charge = charge.into_iter().map(|((kind, model), n)| (kind, model, n)).collect();
        entry.standing = Standing::Placed { devices, charge, started, leaving: false };
    }

    /// Takes a job off its devices.
    fn free(&mut self, job: &JobId) {
        let Some(entry) = self.jobs.get_mut(job) else { return };
        let waiting = Standing::Waiting { not_before: Timestamp(0) };
        let was = std::mem::replace(&mut entry.standing, waiting);
        let Standing::Placed { devices, charge, .. } = was else {
            entry.standing = was;
            return;
        };
        let gang = &entry.request.gang;
        for device in devices {
            let Some(machine) = self.machines.get_mut(&device.node) else { continue };
            machine.cpu_milli = machine.cpu_milli.saturating_sub(gang.cpu_milli);
            machine.memory = machine.memory.saturating_sub(gang.memory.0);
            if let Some(held) = machine.held.get_mut(&device.index) {
                held.remove(job);
                if held.is_empty() {
                    machine.held.remove(&device.index);
                }
            }
            if machine.node.is_none() && machine.held.is_empty() {
                self.machines.remove(&device.node);
            }
        }
        if let Some(used) = self.used.get_mut(&entry.request.settings.queue) {
            for (kind, model, amount) in charge {
                if let Some(sum) = used.get_mut(&(kind, model)) {
                    *sum = sum.saturating_sub(amount);
                }
            }
        }
    }
}

impl Books for Ledger {
    fn node(&self, name: &NodeName) -> Option<&Node> {
        self.machines.get(name)?.node.as_ref()
    }

    fn left_milli(&self, device: &DeviceId) -> u32 {
        let Some(machine) = self.machines.get(&device.node) else { return 0 };
        let held: u32 = machine.held.get(&device.index).map_or(0, |held| held.values().sum());
        let external = |node: &Node| node.external.devices.get(&device.index).copied();
        let others = machine.node.as_ref().and_then(external).unwrap_or(0);
        WHOLE_DEVICE.saturating_sub(held.saturating_add(others))
    }

    fn holder(&self, device: &DeviceId) -> Option<JobId> {
        self.machines.get(&device.node)?.held.get(&device.index)?.keys().next().cloned()
    }

    fn cpu_left_milli(&self, node: &NodeName) -> u64 {
        let Some(machine) = self.machines.get(node) else { return 0 };
        let Some(node) = &machine.node else { return 0 };
        node.cpu_milli.saturating_sub(machine.cpu_milli.saturating_add(node.external.cpu_milli))
    }

    fn memory_left(&self, node: &NodeName) -> u64 {
        let Some(machine) = self.machines.get(node) else { return 0 };
        let Some(node) = &machine.node else { return 0 };
        node.memory.0.saturating_sub(machine.memory.saturating_add(node.external.memory.0))
    }
}
