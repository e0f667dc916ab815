//! Why a gang was not placed: one reason, with the numbers that led to it.

use std::collections::BTreeMap;

use drumline_cluster::{Health, Ineligible};
use drumline_spec::Gang;
use drumline_types::{Explanation, Reason};

use crate::choose::Fleet;

/// What the fleet has of one kind of device, seen by a gang with groups of one size.
#[derive(Debug, Default)]
struct Census {
    /// Devices of the kind, whatever their state, and the gang's ranks that they could hold.
    all: u64,
    all_room: u64,
    /// The ranks that the healthy devices of the nodes that take new work could hold if idle.
    eligible_room: u64,
    /// Free devices on nodes that take new work, and the ranks that they could hold now.
    free: u64,
    free_room: u64,
    free_nodes: u64,
    most_free: u32,
    busy: u64,
    failed: BTreeMap<String, u64>,
    closed: BTreeMap<Ineligible, u64>,
}

/// Explains why a gang does not fit on what the fleet has left.
pub(crate) fn explain(fleet: &Fleet<'_>, gang: &Gang) -> Explanation {
    let group = gang.node_group.max(1);
    let census = census(fleet, gang, group);
    let need = u64::from(gang.ranks);
    let kind = gang.device.as_str();
    let reason = if census.all == 0 {
        Reason::NoMatchingDevice
    } else if census.all_room < need {
        Reason::ExceedsCluster
    } else if census.eligible_room < need {
        Reason::NodesNotReady
    } else if census.free >= need {
        Reason::TopologyDoesNotFit
    } else {
        Reason::WaitingForDevices
    };
    let mut message = format!("needs {need} {kind} devices");
    if group > 1 {
        message += &format!(" in groups of {group} on one node");
    }
    if reason == Reason::NoMatchingDevice {
        message += &format!("; no node has {kind} devices");
        return Explanation::new(reason, message);
    }
    if reason == Reason::ExceedsCluster {
        message += &format!("; the fleet has {} and could hold {}", census.all, census.all_room);
    }
    message += &format!("; {} free on {} nodes", census.free, census.free_nodes);
    if census.free > 0 {
        message += &format!(", at most {} on one", census.most_free);
    }
    message += &excluded(&census);
    if census.free_room > 0 {
        message += &format!("; would fit with {} ranks", census.free_room);
    }
    Explanation::new(reason, message)
}

fn excluded(census: &Census) -> String {
    let mut causes = Vec::new();
    if census.busy > 0 {
        causes.push(format!("{} busy", census.busy));
    }
    for (cause, devices) in &census.closed {
        causes.push(format!("{devices} on nodes {cause}"));
    }
    for (evidence, devices) in &census.failed {
        causes.push(format!("{devices} failed ({evidence})"));
    }
    if causes.is_empty() { String::new() } else { format!("; not eligible: {}", causes.join(", ")) }
}

fn census(fleet: &Fleet<'_>, gang: &Gang, group: u32) -> Census {
    let mut census = Census::default();
    // Ranks that fit into whole groups; a last, smaller group is counted by `held` below.
    let whole = |devices: u32| u64::from(devices / group * group);
    for view in &fleet.nodes {
        let node = view.state.node();
        let of_kind = node.devices.iter().filter(|d| d.kind == gang.device);
        let mut all = 0u32;
        for device in of_kind {
            all += 1;
            if let Health::Failed(evidence) = &device.health {
                *census.failed.entry(evidence.clone()).or_default() += 1;
            }
        }
        let usable = view.state.usable(gang.device).count() as u32;
        census.all += u64::from(all);
        census.all_room += whole(all);
        if let Some(cause) = node.ineligible() {
            if usable > 0 {
                *census.closed.entry(cause).or_default() += u64::from(usable);
            }
            continue;
        }
        let free = view.free(gang.device);
        census.eligible_room += whole(usable);
        census.busy += u64::from(usable - free);
        census.free += u64::from(free);
        census.free_room += whole(free);
        census.free_nodes += u64::from(free > 0);
        census.most_free = census.most_free.max(free);
    }
    // A gang whose last group is smaller still needs a whole group's room in `choose`.
    let padded = u64::from(gang.ranks.div_ceil(group)) * u64::from(group);
    let held = |room: u64| if room >= padded { room.max(u64::from(gang.ranks)) } else { room };
    census.all_room = held(census.all_room);
    census.eligible_room = held(census.eligible_room);
    census
}
