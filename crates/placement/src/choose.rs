//! The choice of devices for one gang: the fewest nodes, the smallest domain, the least waste.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use drumline_cluster::{NodeState, Snapshot};
use drumline_spec::{DeviceKind, Gang};
use drumline_types::DeviceId;

use crate::plan::Seed;

/// The free devices of the fleet while a plan is made.
#[derive(Debug)]
pub struct Fleet<'a> {
    pub(crate) nodes: Vec<NodeView<'a>>,
}

/// One node's free devices while a plan is made.
#[derive(Debug)]
pub(crate) struct NodeView<'a> {
    pub(crate) state: &'a NodeState,
    /// Decides among equal nodes.
    tie: u64,
    /// Free devices per kind, the greatest index first, so that the smallest is taken from the
    /// end. Empty when the node takes no new work.
    free: BTreeMap<DeviceKind, Vec<u32>>,
}

impl NodeView<'_> {
    pub(crate) fn free(&self, kind: DeviceKind) -> u32 {
        self.free.get(&kind).map_or(0, |indices| indices.len() as u32)
    }
}

impl<'a> Fleet<'a> {
    /// Reads the free devices from a snapshot.
    #[must_use]
    pub fn new(snapshot: &'a Snapshot, seed: Seed) -> Self {
        let view = |(at, state): (usize, &'a NodeState)| {
            let mut free: BTreeMap<DeviceKind, Vec<u32>> = BTreeMap::new();
            if state.node().ineligible().is_none() {
                for kind in [DeviceKind::Cpu, DeviceKind::Gpu] {
                    let mut indices: Vec<u32> = state.free(kind).collect();
                    indices.reverse();
                    free.insert(kind, indices);
                }
            }
            NodeView { state, tie: mix(seed.0 ^ mix(at as u64)), free }
        };
        Self { nodes: snapshot.nodes().enumerate().map(view).collect() }
    }
}

/// Takes the devices of a gang, in rank order, or none at all.
pub(crate) fn choose(fleet: &mut Fleet<'_>, gang: &Gang) -> Option<Vec<DeviceId>> {
    let group = gang.node_group.max(1);
    let groups = gang.ranks.div_ceil(group);
    let domain = smallest_domain(fleet, gang.device, group, groups)?;
    let nodes = fewest_nodes(fleet, domain, gang.device, group, groups);
    let mut devices = Vec::with_capacity(gang.ranks as usize);
    for (at, groups_here) in nodes {
        let node = &mut fleet.nodes[at];
        let name = &node.state.node().name;
        let free = node.free.entry(gang.device).or_default();
        // The last group of a gang may be smaller than the others.
        let wanted = (groups_here * group).min(gang.ranks - devices.len() as u32);
        let taken = free.split_off(free.len() - wanted as usize);
        devices.extend(taken.into_iter().rev().map(|index| DeviceId { node: name.clone(), index }));
    }
    Some(devices)
}

/// Returns the nodes of the innermost domain that holds the gang; of several, the one with the
/// least room left afterwards. A node by itself is the innermost domain, the fleet the outermost.
fn smallest_domain(
    fleet: &Fleet<'_>,
    kind: DeviceKind,
    group: u32,
    groups: u32,
) -> Option<Vec<usize>> {
    let room = |at: usize| fleet.nodes[at].free(kind) / group;
    let single = (0..fleet.nodes.len())
        .filter(|&at| room(at) >= groups)
        .min_by_key(|&at| (fleet.nodes[at].free(kind), fleet.nodes[at].tie));
    if let Some(at) = single {
        return Some(vec![at]);
    }
    let depth = fleet.nodes.iter().map(|n| n.state.node().topology.len()).max().unwrap_or(0);
    for level in (0..=depth).rev() {
        let mut domains: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for at in (0..fleet.nodes.len()).filter(|&at| room(at) > 0) {
            let path = &fleet.nodes[at].state.node().topology;
            if path.len() >= level {
                domains.entry(&path[..level]).or_default().push(at);
            }
        }
        let best = domains
            .into_values()
            .map(|nodes| (nodes.iter().map(|&at| u64::from(room(at))).sum::<u64>(), nodes))
            .filter(|(total, _)| *total >= u64::from(groups))
            .min_by_key(|(total, nodes)| {
                (*total, nodes.iter().map(|&at| fleet.nodes[at].tie).min())
            });
        if let Some((_, nodes)) = best {
            return Some(nodes);
        }
    }
    None
}

/// Divides the groups over the fewest nodes of a domain: the roomiest first, and for the rest the
/// node that it fills best. Returns (node, groups) with neighbours in the topology beside each
/// other, so that successive pipeline stages are near.
fn fewest_nodes(
    fleet: &Fleet<'_>,
    mut nodes: Vec<usize>,
    kind: DeviceKind,
    group: u32,
    groups: u32,
) -> Vec<(usize, u32)> {
    let room = |at: usize| fleet.nodes[at].free(kind) / group;
    nodes.sort_by_key(|&at| (Reverse(room(at)), fleet.nodes[at].free(kind), fleet.nodes[at].tie));
    let mut chosen = Vec::new();
    let mut left = groups;
    let mut next = 0;
    while left > 0 && next < nodes.len() {
        let last = (next..nodes.len())
            .filter(|&i| room(nodes[i]) >= left)
            .min_by_key(|&i| (fleet.nodes[nodes[i]].free(kind), fleet.nodes[nodes[i]].tie));
        let i = last.unwrap_or(next);
        let here = room(nodes[i]).min(left);
        chosen.push((nodes[i], here));
        left -= here;
        next += 1;
    }
    chosen.sort_by(|(a, _), (b, _)| {
        let place = |at: usize| &fleet.nodes[at].state.node().topology;
        place(*a).cmp(place(*b)).then(a.cmp(b))
    });
    chosen
}

/// Mixes the bits of a number (the finalizer of SplitMix64).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
