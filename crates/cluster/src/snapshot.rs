//! The fleet at one moment, kept up to date by small changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumline_spec::DeviceKind;
use drumline_types::{Attempt, DeviceId, JobId, NodeName};
use serde::{Deserialize, Serialize};

use crate::node::{Health, Node};
use crate::trial::Trial;

/// Counts the changes of a snapshot. A plan names the revision that it was made from.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// Why a change was refused. The snapshot is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// A device is held by another job.
    #[error("{device} is held by {holder}, so {job} cannot have it")]
    Held {
        /// The device asked for.
        device: DeviceId,
        /// Who asked.
        job: JobId,
        /// Who has it.
        holder: JobId,
    },
    /// The job holds devices already.
    #[error("{job} holds devices of attempt {attempt} already")]
    Committed {
        /// The job.
        job: JobId,
        /// The attempt that holds them.
        attempt: Attempt,
    },
    /// The same device is named twice.
    #[error("{device} is named twice for {job}")]
    Twice {
        /// The device.
        device: DeviceId,
        /// The job.
        job: JobId,
    },
}

/// The devices that one attempt of a job holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commitment {
    /// The job.
    pub job: JobId,
    /// The attempt that they are held for.
    pub attempt: Attempt,
    /// The devices, in rank order.
    pub devices: Vec<DeviceId>,
}

/// A node and who holds its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState {
    node: Arc<Node>,
    /// Per device index. May be longer than the node's devices: a job may hold a device that the
    /// node no longer reports.
    holders: Vec<Option<JobId>>,
}

impl NodeState {
    /// Returns the machine.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Returns who holds the device at `index`.
    #[must_use]
    pub fn holder(&self, index: u32) -> Option<&JobId> {
        self.holders.get(index as usize).and_then(Option::as_ref)
    }

    /// Returns the indices of the healthy devices of `kind` that nobody holds, ascending, whether
    /// or not the node takes new work.
    pub fn free(&self, kind: DeviceKind) -> impl Iterator<Item = u32> + '_ {
        self.usable(kind).filter(|&index| self.holder(index).is_none())
    }

    /// Returns the indices of the healthy devices of `kind`, held or not, ascending.
    pub fn usable(&self, kind: DeviceKind) -> impl Iterator<Item = u32> + '_ {
        (0u32..)
            .zip(&self.node.devices)
            .filter(move |(_, device)| device.kind == kind && device.health == Health::Healthy)
            .map(|(index, _)| index)
    }

    fn slot(&mut self, index: u32) -> &mut Option<JobId> {
        let index = index as usize;
        if self.holders.len() <= index {
            self.holders.resize(index + 1, None);
        }
        &mut self.holders[index]
    }
}

/// The fleet at one moment: nodes, their devices and who holds them.
///
/// A clone shares everything until one side changes, so that a decision can keep the snapshot it
/// was made on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    revision: Revision,
    /// Sorted by name: the order of every walk over the fleet.
    nodes: Vec<Arc<NodeState>>,
    commitments: Arc<BTreeMap<JobId, Commitment>>,
    /// Devices held on nodes that are not part of the fleet at present.
    absent: Arc<BTreeMap<DeviceId, JobId>>,
}

impl Snapshot {
    /// Returns an empty fleet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns how many changes led here.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Returns every node, by name.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = &NodeState> + Clone {
        self.nodes.iter().map(AsRef::as_ref)
    }

    /// Returns the node of this name.
    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&NodeState> {
        self.find(name).ok().map(|at| self.nodes[at].as_ref())
    }

    /// Returns every commitment, by job.
    pub fn commitments(&self) -> impl ExactSizeIterator<Item = &Commitment> {
        self.commitments.values()
    }

    /// Returns what a job holds.
    #[must_use]
    pub fn commitment(&self, job: &JobId) -> Option<&Commitment> {
        self.commitments.get(job)
    }

    /// Returns who holds a device, also when its node is not part of the fleet at present.
    #[must_use]
    pub fn holder(&self, device: &DeviceId) -> Option<&JobId> {
        match self.node(&device.node) {
            Some(state) => state.holder(device.index),
            None => self.absent.get(device),
        }
    }

    /// Adds a node, or replaces what is known about it. Who holds its devices stays.
    pub fn upsert_node(&mut self, node: Node) {
        match self.find(&node.name) {
            Ok(at) => {
                if *self.nodes[at].node == node {
                    return;
                }
                Arc::make_mut(&mut self.nodes[at]).node = Arc::new(node);
            }
            Err(at) => {
                let mut state = NodeState { node: Arc::new(node), holders: Vec::new() };
                let held: Vec<DeviceId> = self
                    .absent
                    .range(DeviceId { node: state.node.name.clone(), index: 0 }..)
                    .take_while(|(device, _)| device.node == state.node.name)
                    .map(|(device, _)| device.clone())
                    .collect();
                for device in held {
                    let absent = Arc::make_mut(&mut self.absent);
                    *state.slot(device.index) = absent.remove(&device);
                }
                self.nodes.insert(at, Arc::new(state));
            }
        }
        self.revision.0 += 1;
    }

    /// Takes a node out of the fleet. What jobs hold on it stays held until they release it, and
    /// is found again when the node comes back.
    pub fn remove_node(&mut self, name: &NodeName) -> Option<Node> {
        let state = self.nodes.remove(self.find(name).ok()?);
        for (index, holder) in (0u32..).zip(&state.holders) {
            if let Some(job) = holder {
                let device = DeviceId { node: name.clone(), index };
                Arc::make_mut(&mut self.absent).insert(device, job.clone());
            }
        }
        self.revision.0 += 1;
        Some(Node::clone(&state.node))
    }

    /// Gives devices to a job. A device of a node that is not known is accepted: after a restart
    /// of the control plane the jobs are read before their nodes are heard.
    ///
    /// # Errors
    /// [`ClusterError`] when a device is held or named twice, or the job holds devices already.
    pub fn commit(
        &mut self,
        job: &JobId,
        attempt: Attempt,
        devices: Vec<DeviceId>,
    ) -> Result<(), ClusterError> {
        if let Some(held) = self.commitments.get(job) {
            return Err(ClusterError::Committed { job: job.clone(), attempt: held.attempt });
        }
        let mut seen = std::collections::BTreeSet::new();
        for device in &devices {
            if !seen.insert(device) {
                return Err(ClusterError::Twice { device: device.clone(), job: job.clone() });
            }
            if let Some(holder) = self.holder(device) {
                return Err(ClusterError::Held {
                    device: device.clone(),
                    job: job.clone(),
                    holder: holder.clone(),
                });
            }
        }
        for device in &devices {
            self.set_holder(device, Some(job.clone()));
        }
        let commitment = Commitment { job: job.clone(), attempt, devices };
        Arc::make_mut(&mut self.commitments).insert(job.clone(), commitment);
        self.revision.0 += 1;
        Ok(())
    }

    /// Takes back everything that a job holds.
    pub fn release(&mut self, job: &JobId) -> Option<Commitment> {
        if !self.commitments.contains_key(job) {
            return None;
        }
        let commitment = Arc::make_mut(&mut self.commitments).remove(job)?;
        for device in &commitment.devices {
            self.set_holder(device, None);
        }
        self.revision.0 += 1;
        Some(commitment)
    }

    /// Starts to try changes that may be undone. This snapshot stays as it is.
    #[must_use]
    pub fn trial(&self) -> Trial {
        Trial::new(self.clone())
    }

    fn set_holder(&mut self, device: &DeviceId, holder: Option<JobId>) {
        if let Ok(at) = self.find(&device.node) {
            *Arc::make_mut(&mut self.nodes[at]).slot(device.index) = holder;
        } else if let Some(job) = holder {
            Arc::make_mut(&mut self.absent).insert(device.clone(), job);
        } else {
            Arc::make_mut(&mut self.absent).remove(device);
        }
    }

    fn find(&self, name: &NodeName) -> Result<usize, usize> {
        self.nodes.binary_search_by(|state| state.node.name.cmp(name))
    }
}
