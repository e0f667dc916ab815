//! What is free of one device model on the nodes that take work alike, counted in every domain.

use std::collections::BTreeSet;

use drumline_spec::Toleration;

use crate::node::Taint;
use crate::state::NodeAt;
use crate::topology::{DomainAt, Topology};

/// What one domain has.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    nodes: u32,
    free: u64,
    usable: u64,
    /// Nodes by how many whole devices they have free; index 0 counts too.
    by_free: Vec<u32>,
    /// Nodes by how many healthy devices they have, free or not.
    by_usable: Vec<u32>,
    /// The nodes right in this domain (not in one below): free devices, key, node.
    order: BTreeSet<(u32, u64, NodeAt)>,
}

impl Counts {
    /// Returns the whole devices that nobody uses.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Returns the healthy devices, used or not.
    #[must_use]
    pub fn usable(&self) -> u64 {
        self.usable
    }

    /// Returns the number of nodes.
    #[must_use]
    pub fn nodes(&self) -> u32 {
        self.nodes
    }

    /// Returns how many nodes have 0, 1, 2 ... whole devices free.
    #[must_use]
    pub fn by_free(&self) -> &[u32] {
        &self.by_free
    }

    /// Returns how many nodes have 0, 1, 2 ... healthy devices.
    #[must_use]
    pub fn by_usable(&self) -> &[u32] {
        &self.by_usable
    }

    /// Returns the nodes right in this domain: free devices, key, node; ascending.
    #[must_use]
    pub fn order(&self) -> &BTreeSet<(u32, u64, NodeAt)> {
        &self.order
    }

    fn count(&mut self, there: Amount, sign: i64) {
        let add = |list: &mut Vec<u32>, at: u32| {
            let at = at as usize;
            if list.len() <= at {
                list.resize(at + 1, 0);
            }
            list[at] = (i64::from(list[at]) + sign) as u32;
        };
        self.nodes = (i64::from(self.nodes) + sign) as u32;
        self.free = (self.free as i64 + sign * i64::from(there.free)) as u64;
        self.usable = (self.usable as i64 + sign * i64::from(there.usable)) as u64;
        add(&mut self.by_free, there.free);
        add(&mut self.by_usable, there.usable);
    }
}

/// What one node has of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Amount {
    pub(crate) free: u32,
    pub(crate) usable: u32,
}

/// The devices of one model on the nodes with one set of taints that take new work.
#[derive(Debug, Clone)]
pub struct Pool {
    model: u32,
    taints: Vec<Taint>,
    counts: Vec<Counts>,
    /// Devices that are used in part: what is left of them in thousandths, the node's key, node,
    /// index.
    partial: BTreeSet<(u32, u64, NodeAt, u32)>,
}

static NOTHING: Counts = Counts {
    nodes: 0,
    free: 0,
    usable: 0,
    by_free: Vec::new(),
    by_usable: Vec::new(),
    order: BTreeSet::new(),
};

impl Pool {
    pub(crate) fn new(model: u32, taints: Vec<Taint>) -> Self {
        Self { model, taints, counts: Vec::new(), partial: BTreeSet::new() }
    }

    /// Returns the number of the model in [`crate::Snapshot::stock`].
    #[must_use]
    pub fn model(&self) -> u32 {
        self.model
    }

    /// Returns the taints of its nodes, sorted.
    #[must_use]
    pub fn taints(&self) -> &[Taint] {
        &self.taints
    }

    /// Returns whether a gang with these tolerations may use it.
    #[must_use]
    pub fn open_to(&self, tolerations: &[Toleration]) -> bool {
        self.taints.iter().all(|taint| taint.tolerated(tolerations))
    }

    /// Returns what a domain has.
    #[must_use]
    pub fn counts(&self, at: DomainAt) -> &Counts {
        self.counts.get(at.index()).unwrap_or(&NOTHING)
    }

    /// Returns the devices that are used in part: thousandths left, key, node, index; ascending.
    #[must_use]
    pub fn partial(&self) -> &BTreeSet<(u32, u64, NodeAt, u32)> {
        &self.partial
    }

    pub(crate) fn partial_mut(&mut self) -> &mut BTreeSet<(u32, u64, NodeAt, u32)> {
        &mut self.partial
    }

    /// Counts a node anew: `was` is what it was counted with, `is` what it has now.
    pub(crate) fn shift(
        &mut self,
        topology: &Topology,
        place: DomainAt,
        node: (u64, NodeAt),
        was: Option<Amount>,
        is: Option<Amount>,
    ) {
        for at in topology.path(place) {
            if self.counts.len() <= at.index() {
                self.counts.resize_with(at.index() + 1, Counts::default);
            }
            let counts = &mut self.counts[at.index()];
            if let Some(was) = was {
                counts.count(was, -1);
            }
            if let Some(is) = is {
                counts.count(is, 1);
            }
        }
        let order = &mut self.counts[place.index()].order;
        if let Some(was) = was {
            order.remove(&(was.free, node.0, node.1));
        }
        if let Some(is) = is {
            order.insert((is.free, node.0, node.1));
        }
    }
}
