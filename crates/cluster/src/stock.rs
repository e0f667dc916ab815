//! What the fleet has of one device model, whatever its state, for those who ask why they wait.

use std::collections::BTreeMap;

use drumline_spec::DeviceKind;
use drumline_types::Bytes;

use crate::node::{Health, Ineligible, Node};

/// The devices of one model.
#[derive(Debug, Clone)]
pub struct Stock {
    kind: DeviceKind,
    model: String,
    memory: Bytes,
    all: u64,
    by_all: Vec<u32>,
    closed: BTreeMap<Ineligible, u64>,
    failed: BTreeMap<String, u64>,
    pub(crate) grown: u64,
}

impl Stock {
    pub(crate) fn new(kind: DeviceKind, model: &str, memory: Bytes) -> Self {
        Self {
            kind,
            model: model.to_owned(),
            memory,
            all: 0,
            by_all: Vec::new(),
            closed: BTreeMap::new(),
            failed: BTreeMap::new(),
            grown: 0,
        }
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Returns the model's name.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Returns the memory of one device, as the first that was seen has it.
    #[must_use]
    pub fn memory(&self) -> Bytes {
        self.memory
    }

    /// Returns the devices there are, in whatever state.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.all
    }

    /// Returns how many nodes have 0, 1, 2 ... of them, in whatever state.
    #[must_use]
    pub fn by_all(&self) -> &[u32] {
        &self.by_all
    }

    /// Returns the healthy devices on nodes that take no work from anybody, by cause.
    #[must_use]
    pub fn closed(&self) -> &BTreeMap<Ineligible, u64> {
        &self.closed
    }

    /// Returns the devices that have failed, by evidence.
    #[must_use]
    pub fn failed(&self) -> &BTreeMap<String, u64> {
        &self.failed
    }

    /// Counts a node's devices of this model in (`sign` 1) or out (-1).
    pub(crate) fn count(&mut self, node: &Node, sign: i64) {
        let (mut all, mut healthy) = (0u32, 0i64);
        for device in &node.devices {
            if device.kind != self.kind || device.model != self.model {
                continue;
            }
            all += 1;
            match &device.health {
                Health::Healthy => healthy += 1,
                Health::Failed(evidence) => add(&mut self.failed, evidence.clone(), sign),
            }
        }
        // A closed node is told by what an administrator sees first; taints depend on the gang.
        let closed = match node.ineligible() {
            Some(Ineligible::Tainted) | None => None,
            closed => closed,
        };
        if let Some(cause) = closed
            && healthy > 0
        {
            add(&mut self.closed, cause, sign * healthy);
        }
        self.all = (self.all as i64 + sign * i64::from(all)) as u64;
        let at = all as usize;
        if self.by_all.len() <= at {
            self.by_all.resize(at + 1, 0);
        }
        self.by_all[at] = (i64::from(self.by_all[at]) + sign) as u32;
    }
}

fn add<K: Ord>(map: &mut BTreeMap<K, u64>, key: K, by: i64) {
    let entry = map.entry(key);
    match entry {
        std::collections::btree_map::Entry::Occupied(mut held) => {
            let left = *held.get() as i64 + by;
            if left == 0 {
                held.remove();
            } else {
                *held.get_mut() = left as u64;
            }
        }
        std::collections::btree_map::Entry::Vacant(empty) => {
            empty.insert(by as u64);
        }
    }
}
