//! The place of a leader: rank 0 on a device of another kind, as near its workers as can be.

use std::collections::BTreeMap;

use drumline_cluster::{DomainAt, NodeAt, Pool, Slice, Snapshot};
use drumline_spec::{DeviceKind, Gang};
use drumline_types::{DeviceId, NodeName};

use crate::devices::pick;
use crate::fill::Part;

/// Where no leader can be, so that its workers must go elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nowhere {
    Anywhere,
    Inside(DomainAt),
    On(NodeAt),
}

/// Returns a device for the leader of workers on `parts` and `devices`.
pub(crate) fn near(
    fleet: &Snapshot,
    gang: &Gang,
    kind: DeviceKind,
    parts: &[Part],
    devices: &[DeviceId],
) -> Result<DeviceId, Nowhere> {
    let mut taken: BTreeMap<&NodeName, Vec<u32>> = BTreeMap::new();
    for device in devices {
        taken.entry(&device.node).or_default().push(device.index);
    }
    let spot = |pool: u32, node: NodeAt| {
        let state = fleet.at(node);
        let here = taken.get(&state.node().name).map_or(&[][..], Vec::as_slice);
        if (state.ranks_left(&Slice::of(gang)) as usize) <= here.len() {
            return None;
        }
        let index = pick(state, pool, gang.share_milli, 1, here).first().copied()?;
        Some(DeviceId { node: state.node().name.clone(), index })
    };
    let open = |(_, pool): &(u32, &Pool)| {
        fleet.stock(pool.model()).kind() == kind && pool.open_to(&gang.tolerations)
    };
    let pools: Vec<u32> = fleet.pools().filter(open).map(|(at, _)| at).collect();
    let on = |node: NodeAt| pools.iter().find_map(|pool| spot(*pool, node));
    if let Some(found) = parts.iter().find_map(|part| on(part.node)) {
        return Ok(found);
    }
    let topology = fleet.topology();
    let whole = gang.topology.iter().filter(|rule| rule.required && rule.ranks == 0);
    let first = parts.first();
    let mut limit = DomainAt::ROOT;
    for rule in whole {
        if let (Some(first), "node") = (first, rule.level.as_str()) {
            return Err(Nowhere::On(first.node));
        }
        if let (Some(first), Some(level)) = (first, topology.level(&rule.level))
            && let Some(domain) = topology.above(fleet.at(first.node).place(), level)
            && topology.place(domain).depth() > topology.place(limit).depth()
        {
            limit = domain;
        }
    }
    let start = first.map_or(DomainAt::ROOT, |first| fleet.at(first.node).place());
    for domain in topology.path(start) {
        let found = pools
            .iter()
            .flat_map(|pool| fleet.nodes_in(*pool, domain).into_iter().map(move |n| (*pool, n)))
            .filter_map(|(pool, node)| Some((fleet.at(node), spot(pool, node)?)))
            .min_by_key(|(state, device)| {
                let free: u32 = pools.iter().map(|pool| state.free_in_pool(*pool)).sum();
                (free, state.key(), device.index)
            });
        if let Some((_, device)) = found {
            return Ok(device);
        }
        if domain == limit {
            break;
        }
    }
    Err(if limit == DomainAt::ROOT { Nowhere::Anywhere } else { Nowhere::Inside(limit) })
}
