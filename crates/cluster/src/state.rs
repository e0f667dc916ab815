//! A node and who holds what on it.

use std::sync::Arc;

use drumline_spec::{DeviceKind, WHOLE_DEVICE};
use drumline_types::{Bytes, JobId, NodeName};

use crate::node::{Health, Node};
use crate::pool::Amount;
use crate::snapshot::Slice;
use crate::topology::DomainAt;

/// A node's number. Numbers are reused, and say nothing about order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeAt(pub(crate) u32);

impl NodeAt {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// One device's holders.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Thousandths that jobs hold.
    pub(crate) held_milli: u32,
    pub(crate) first: Option<Arc<JobId>>,
    /// The other holders of parts, in the order of their arrival; with no first, nobody.
    pub(crate) more: Vec<Arc<JobId>>,
    pub(crate) reserved: Option<Arc<JobId>>,
}

impl Slot {
    pub(crate) fn add(&mut self, job: Arc<JobId>, share_milli: u32) {
        self.held_milli += share_milli;
        if self.first.is_none() {
            self.first = Some(job);
        } else {
            self.more.push(job);
            // Sorted, so that it does not matter who came first.
            if let Some(first) = &mut self.first {
                self.more.sort();
                if self.more[0] < *first {
                    std::mem::swap(first, &mut self.more[0]);
                    self.more.sort();
                }
            }
        }
    }

    pub(crate) fn remove(&mut self, job: &JobId, share_milli: u32) {
        self.held_milli = self.held_milli.saturating_sub(share_milli);
        if self.first.as_deref() == Some(job) {
            self.first = if self.more.is_empty() { None } else { Some(self.more.remove(0)) };
        } else if let Some(at) = self.more.iter().position(|held| **held == *job) {
            self.more.remove(at);
        }
    }

    fn is_empty(&self) -> bool {
        self.first.is_none() && self.reserved.is_none()
    }
}

/// The devices of one model on one node.
#[derive(Debug, Clone)]
pub(crate) struct Lane {
    pub(crate) pool: u32,
    pub(crate) counted: Option<Amount>,
}

/// A node and who holds its devices.
#[derive(Debug, Clone)]
pub struct NodeState {
    pub(crate) node: Arc<Node>,
    /// False: the node left (or was never heard), and jobs hold devices on it.
    pub(crate) present: bool,
    /// Per device index. May be longer than the node's devices: a job may hold a device that the
    /// node no longer reports.
    pub(crate) slots: Vec<Slot>,
    pub(crate) cpu_milli: u64,
    pub(crate) memory: u64,
    pub(crate) place: DomainAt,
    pub(crate) key: u64,
    pub(crate) lanes: Vec<Lane>,
    /// Per device of the node, its place in `lanes`.
    pub(crate) lane_of: Vec<u16>,
}

impl NodeState {
    pub(crate) fn absent(name: NodeName, key: u64) -> Self {
        Self {
            node: Arc::new(Node::new(name, Vec::new())),
            present: false,
            slots: Vec::new(),
            cpu_milli: 0,
            memory: 0,
            place: DomainAt::ROOT,
            key,
            lanes: Vec::new(),
            lane_of: Vec::new(),
        }
    }

    /// Returns the machine.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Returns whether it is part of the fleet at present.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.present
    }

    /// Returns the domain that it is in.
    #[must_use]
    pub fn place(&self) -> DomainAt {
        self.place
    }

    /// Returns a number made from its name: the same in every history.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Returns who holds the device at `index`; of several, the first by name.
    #[must_use]
    pub fn holder(&self, index: u32) -> Option<&JobId> {
        self.slots.get(index as usize)?.first.as_deref()
    }

    /// Returns everybody who holds a part of the device at `index`, by name; a job that holds
    /// several parts is named as often.
    pub fn holders(&self, index: u32) -> impl Iterator<Item = &JobId> {
        self.slots.get(index as usize).into_iter().flat_map(|slot| {
            slot.first.iter().map(AsRef::as_ref).chain(slot.more.iter().map(AsRef::as_ref))
        })
    }

    /// Returns the job that the device at `index` is kept for.
    #[must_use]
    pub fn reserved(&self, index: u32) -> Option<&JobId> {
        self.slots.get(index as usize)?.reserved.as_deref()
    }

    /// Returns the thousandths of the device at `index` that are in use, by whomever; may be more
    /// than the whole when others took what was held already.
    #[must_use]
    pub fn used_milli(&self, index: u32) -> u32 {
        let held = self.slots.get(index as usize).map_or(0, |slot| slot.held_milli);
        let external = self.node.external.devices.get(&index).copied().unwrap_or(0);
        held.saturating_add(external)
    }

    /// Returns the thousandths of the device at `index` that nobody uses; 0 when it has failed or
    /// the node does not report it.
    #[must_use]
    pub fn left_milli(&self, index: u32) -> u32 {
        match self.node.devices.get(index as usize) {
            Some(device) if device.health == Health::Healthy => {
                WHOLE_DEVICE.saturating_sub(self.used_milli(index))
            }
            _ => 0,
        }
    }

    /// Returns the processor time that nobody uses, in thousandths of a core.
    #[must_use]
    pub fn cpu_left_milli(&self) -> u64 {
        let used = self.cpu_milli.saturating_add(self.node.external.cpu_milli);
        self.node.cpu_milli.saturating_sub(used)
    }

    /// Returns the main memory that nobody uses.
    #[must_use]
    pub fn memory_left(&self) -> Bytes {
        let used = self.memory.saturating_add(self.node.external.memory.0);
        Bytes(self.node.memory.0.saturating_sub(used))
    }

    /// Returns how many ranks' processor time and memory are left.
    #[must_use]
    pub fn ranks_left(&self, slice: &Slice) -> u32 {
        let cpu = self.cpu_left_milli().checked_div(slice.cpu_milli).unwrap_or(u64::MAX);
        let memory = self.memory_left().0.checked_div(slice.memory.0).unwrap_or(u64::MAX);
        u32::try_from(cpu.min(memory)).unwrap_or(u32::MAX)
    }

    /// Returns the indices of the healthy devices of `kind` that nobody uses any part of,
    /// ascending, whether or not the node takes new work.
    pub fn free(&self, kind: DeviceKind) -> impl Iterator<Item = u32> + '_ {
        self.usable(kind).filter(|&index| self.used_milli(index) == 0)
    }

    /// Returns the indices of the healthy devices of `kind`, held or not, ascending.
    pub fn usable(&self, kind: DeviceKind) -> impl Iterator<Item = u32> + '_ {
        (0u32..)
            .zip(&self.node.devices)
            .filter(move |(_, device)| device.kind == kind && device.health == Health::Healthy)
            .map(|(index, _)| index)
    }

    /// Returns the devices in pool number `pool`, ascending; see [`crate::Snapshot::pools`].
    pub fn in_pool(&self, pool: u32) -> impl Iterator<Item = u32> + '_ {
        (0u32..)
            .zip(&self.lane_of)
            .filter(move |(_, lane)| {
                self.lanes.get(usize::from(**lane)).is_some_and(|lane| lane.pool == pool)
            })
            .map(|(index, _)| index)
    }

    /// Returns the whole devices of pool number `pool` that nobody uses and that are kept for
    /// nobody.
    #[must_use]
    pub fn free_in_pool(&self, pool: u32) -> u32 {
        let lane = self.lanes.iter().find(|lane| lane.pool == pool);
        lane.and_then(|lane| lane.counted).map_or(0, |amount| amount.free)
    }

    /// Returns whether the device is whole, healthy, and kept for nobody.
    #[must_use]
    pub fn is_free(&self, index: u32) -> bool {
        self.left_milli(index) == WHOLE_DEVICE && self.reserved(index).is_none()
    }

    /// Returns whether the node takes new work from those who tolerate its taints.
    #[must_use]
    pub fn open(&self) -> bool {
        self.present && self.node.ready && !self.node.cordoned
    }

    /// Counts what the lane at `at` has now.
    pub(crate) fn amount(&self, at: usize) -> Option<Amount> {
        if !self.open() {
            return None;
        }
        let mut amount = Amount::default();
        for (index, lane) in (0u32..).zip(&self.lane_of) {
            if usize::from(*lane) != at {
                continue;
            }
            let healthy = self.node.devices[index as usize].health == Health::Healthy;
            amount.usable += u32::from(healthy);
            amount.free += u32::from(healthy && self.is_free(index));
        }
        Some(amount)
    }

    /// Returns what is left of a device that is used in part and may be shared further.
    pub(crate) fn part_left(&self, index: u32) -> Option<u32> {
        let left = self.left_milli(index);
        let part = self.open() && left > 0 && left < WHOLE_DEVICE;
        (part && self.reserved(index).is_none()).then_some(left)
    }

    pub(crate) fn slot(&mut self, index: u32) -> &mut Slot {
        let index = index as usize;
        if self.slots.len() <= index {
            self.slots.resize(index + 1, Slot::default());
        }
        &mut self.slots[index]
    }

    pub(crate) fn unheld(&self) -> bool {
        self.slots.iter().all(Slot::is_empty)
    }
}

/// The number that no other comes before, to search an order by.
pub const NODE_FIRST: NodeAt = NodeAt(0);
