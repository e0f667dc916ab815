//! The numbers and words of a reason: counted a second time, by hand, on small random fleets; and
//! each branch of the reason and of its line.

mod support;

use std::collections::BTreeMap;

use drumline_cluster::{Ineligible, NodeState, Snapshot};
use drumline_placement::{Constraints, Misfit, place};
use drumline_spec::{DeviceKind, Gang, Parallelism, WHOLE_DEVICE};
use drumline_types::Reason;
use proptest::prelude::*;
use support::{fleet, gang, machine};

/// What a node could hold: devices that count, ranks by devices alone, and ranks.
fn node_room(state: &NodeState, gang: &Gang, idle: bool) -> (u64, u64, u64) {
    let node = state.node();
    if node.ineligible_for(&gang.tolerations).is_some() {
        return (0, 0, 0);
    }
    let share = gang.share_milli;
    let healthy: Vec<u32> = state.usable(DeviceKind::Gpu).collect();
    let whole = healthy.iter().filter(|&&index| idle || state.is_free(index)).count() as u64;
    let by_devices: u64 = match (idle, share) {
        (_, WHOLE_DEVICE) => whole,
        (true, share) => whole * u64::from(WHOLE_DEVICE / share),
        (false, share) => healthy.iter().map(|&i| u64::from(state.left_milli(i) / share)).sum(),
    };
    let cores = if idle { node.cpu_milli } else { state.cpu_left_milli() };
    let cores = cores.checked_div(gang.cpu_milli).unwrap_or(u64::MAX);
    let by_devices = if share < WHOLE_DEVICE { by_devices.min(cores) } else { by_devices };
    (whole, by_devices, by_devices.min(cores))
}

/// The most ranks that a place holds: each node on its own, or in groups in one domain.
fn most(rooms: &[(String, u64)], gang: &Gang) -> u64 {
    let group = u64::from(gang.node_group);
    if gang.node_group >= gang.ranks {
        return rooms.iter().map(|(_, room)| *room).max().unwrap_or(0);
    }
    let mut domains: BTreeMap<&String, (u64, u64)> = BTreeMap::new();
    for (domain, room) in rooms {
        let of = domains.entry(domain).or_default();
        *of = (of.0 + room / group * group, of.1.max(room % group));
    }
    domains.values().map(|(full, tail)| full + tail).max().unwrap_or(0)
}

fn by_hand(fleet: &Snapshot, gang: &Gang) -> Misfit {
    let level = gang.topology.first().map(|rule| rule.level.clone());
    let of = |choose: fn((u64, u64, u64)) -> u64, idle: bool| -> Vec<(String, u64)> {
        let one = |state: &NodeState| {
            let domains = &state.node().topology;
            let of_level = domains.iter().find(|domain| Some(&domain.level) == level.as_ref());
            let domain = of_level.map_or_else(String::new, |domain| domain.name.clone());
            (domain, choose(node_room(state, gang, idle)))
        };
        fleet.nodes().map(one).collect()
    };
    let sum = |rooms: &[(String, u64)]| rooms.iter().map(|(_, room)| room).sum::<u64>();
    let mut misfit = Misfit {
        need: gang.ranks,
        group: gang.node_group,
        kind: gang.device,
        wanted: level.iter().map(|level| format!("all in one {level}")).collect(),
        ..Misfit::default()
    };
    for state in fleet.nodes() {
        let node = state.node();
        let healthy = state.usable(DeviceKind::Gpu).count() as u64;
        let all = node.devices.len() as u64;
        misfit.all += all;
        if all > healthy {
            *misfit.failed.entry("Xid 79".to_owned()).or_default() += all - healthy;
        }
        if let Some(cause) = node.ineligible_for(&gang.tolerations)
            && healthy > 0
        {
            *misfit.closed.entry(cause).or_default() += healthy;
        }
        let per_device = u64::from(WHOLE_DEVICE / gang.share_milli);
        let group = u64::from(gang.node_group);
        misfit.all_room += all * per_device / group * group;
    }
    if misfit.all == 0 {
        return misfit;
    }
    let free = of(|(whole, ..)| whole, false);
    misfit.free = sum(&free);
    misfit.busy = sum(&of(|(whole, ..)| whole, true)) - misfit.free;
    misfit.free_nodes = free.iter().filter(|(_, free)| *free > 0).count() as u64;
    misfit.most_free = free.iter().map(|(_, free)| *free).max().unwrap_or(0) as u32;
    misfit.room = most(&of(|(.., room)| room, false), gang);
    misfit.idle_room = most(&of(|(.., room)| room, true), gang);
    let by_devices = most(&of(|(_, by_devices, _)| by_devices, false), gang);
    let ranks = u64::from(gang.ranks);
    misfit.short_of_cpu_or_memory = by_devices >= ranks && misfit.room < ranks;
    if gang.node_group < gang.ranks {
        misfit.largest = level.map(|level| (level, misfit.room));
    }
    misfit
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 1500,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_numbers_of_a_reason_are_those_of_the_fleet(
        machines in prop::collection::vec(machine(), 1..6),
        gang in gang(),
    ) {
        let ranks = gang.ranks;
        let whole = |rule: &drumline_spec::TopologyRule| rule.required && rule.level != "node";
        let topology = gang.topology.iter().find(|rule| whole(rule)).cloned();
        let topology = topology.map(|rule| drumline_spec::TopologyRule { ranks: 0, ..rule });
        let topology = topology.into_iter().collect();
        let gang = Gang { node_group: gang.node_group.min(ranks), topology, ..gang };
        let fleet = fleet(&machines);
        let split = Parallelism { data: ranks, ..Parallelism::SINGLE };
        if let Err(misfit) = place(&fleet, &gang, split, &Constraints::default()) {
            prop_assert_eq!(*misfit, by_hand(&fleet, &gang));
        }
    }
}

/// A fleet of 24 devices: 8 free on 2 nodes, 12 busy, 2 cordoned, 2 failed. Ten are needed.
fn ten() -> Misfit {
    Misfit {
        need: 10,
        group: 1,
        kind: DeviceKind::Gpu,
        all: 24,
        all_room: 24,
        idle_room: 20,
        room: 8,
        free: 8,
        free_nodes: 2,
        most_free: 5,
        busy: 12,
        closed: [(Ineligible::Cordoned, 2)].into(),
        failed: [("Xid 79".to_owned(), 2)].into(),
        ..Misfit::default()
    }
}

#[test]
fn each_reason_has_its_case() {
    use Reason::{
        ExceedsCluster, NoMatchingDevice, NodesNotReady, TopologyDoesNotFit, WaitingForDevices,
    };
    let unknown = || Some("pod".to_owned());
    for (misfit, reason) in [
        (ten(), WaitingForDevices),
        (Misfit { all: 0, ..ten() }, NoMatchingDevice),
        (Misfit { unknown_level: unknown(), ..ten() }, ExceedsCluster),
        (Misfit { unknown_level: unknown(), leader: true, ..ten() }, ExceedsCluster),
        // Enough of everything but one thing.
        (Misfit { leader: true, free: 10, room: 10, ..ten() }, WaitingForDevices),
        (Misfit { short_of_cpu_or_memory: true, free: 10, ..ten() }, WaitingForDevices),
        (Misfit { free: 10, ..ten() }, TopologyDoesNotFit),
        (Misfit { free: 9, ..ten() }, WaitingForDevices),
        // Closed and failed nodes may come back.
        (Misfit { idle_room: 10, ..ten() }, WaitingForDevices),
        (Misfit { idle_room: 9, ..ten() }, NodesNotReady),
        (Misfit { idle_room: 6, ..ten() }, NodesNotReady),
        (Misfit { idle_room: 5, ..ten() }, ExceedsCluster),
        (Misfit { all_room: 10, ..ten() }, WaitingForDevices),
        (Misfit { all_room: 9, ..ten() }, ExceedsCluster),
        // Groups of four: the last of ten ranks needs a place for four.
        (Misfit { group: 4, all_room: 12, ..ten() }, WaitingForDevices),
        (Misfit { group: 4, all_room: 8, ..ten() }, ExceedsCluster),
        // Eight ranks in groups of four need no third group.
        (Misfit { group: 4, need: 8, all_room: 8, free: 7, ..ten() }, WaitingForDevices),
        (Misfit { group: 0, all_room: 10, ..ten() }, WaitingForDevices),
    ] {
        assert_eq!(misfit.reason(), reason, "{misfit:?}");
    }
}

#[test]
fn each_part_of_the_line_is_there_when_it_says_something() {
    let rest = "; not eligible: 12 busy, 2 on nodes cordoned, 2 failed (Xid 79)";
    let h100 = || vec!["H100".to_owned(), "A100".to_owned()];
    let wanted = || vec!["all in one rack".to_owned(), "each 2 in one leaf".to_owned()];
    let rack = |ranks| Some(("rack".to_owned(), ranks));
    let nobody = || Misfit { busy: 0, closed: BTreeMap::new(), failed: BTreeMap::new(), ..ten() };
    for (misfit, line) in [
        (
            ten(),
            format!("needs 10 gpu devices; 8 free on 2 nodes, at most 5 on one{rest}; would fit with 8 ranks"),
        ),
        (
            Misfit { models: h100(), wanted: wanted(), ..ten() },
            format!(
                "needs 10 H100 or A100 devices, all in one rack, each 2 in one leaf; 8 free on 2 \
                 nodes, at most 5 on one{rest}; would fit with 8 ranks"
            ),
        ),
        (Misfit { all: 0, ..ten() }, "needs 10 gpu devices; no node has gpu devices".to_owned()),
        (
            Misfit { unknown_level: Some("pod".to_owned()), ..ten() },
            "needs 10 gpu devices; no node says which pod it is in".to_owned(),
        ),
        (
            Misfit { free: 0, free_nodes: 0, room: 0, ..nobody() },
            "needs 10 gpu devices; 0 free on 0 nodes".to_owned(),
        ),
        (
            Misfit { room: 10, leader: true, ..nobody() },
            "needs 10 gpu devices; 8 free on 2 nodes, at most 5 on one, but none for the leader"
                .to_owned(),
        ),
        (
            Misfit { short_of_cpu_or_memory: true, room: 0, ..nobody() },
            "needs 10 gpu devices; 8 free on 2 nodes, at most 5 on one, too little processor time \
             or memory beside them"
                .to_owned(),
        ),
        // What the fleet could hold is bounded by groups and by what is closed.
        (
            Misfit { idle_room: 3, all_room: 30, room: 0, ..ten() },
            format!(
                "needs 10 gpu devices; the fleet has 24 and could hold 7; 8 free on 2 nodes, at \
                 most 5 on one{rest}"
            ),
        ),
        (
            Misfit { all_room: 5, room: 0, ..ten() },
            format!(
                "needs 10 gpu devices; the fleet has 24 and could hold 5; 8 free on 2 nodes, at \
                 most 5 on one{rest}"
            ),
        ),
        // Groups are told as such where they are whole; only whole ones would fit.
        (
            Misfit { group: 4, largest: rack(8), ..nobody() },
            "needs 10 gpu devices in groups of 4 on one node; 8 free on 2 nodes, at most 5 on one, \
             largest rack 2 x 4; would fit with 8 ranks"
                .to_owned(),
        ),
        (
            Misfit { group: 4, room: 7, largest: rack(7), ..nobody() },
            "needs 10 gpu devices in groups of 4 on one node; 8 free on 2 nodes, at most 5 on one, \
             largest rack 7; would fit with 4 ranks"
                .to_owned(),
        ),
        (
            Misfit { group: 1, room: 8, largest: rack(8), ..nobody() },
            "needs 10 gpu devices; 8 free on 2 nodes, at most 5 on one, largest rack 8; would fit \
             with 8 ranks"
                .to_owned(),
        ),
        (
            Misfit { group: 4, room: 3, ..nobody() },
            "needs 10 gpu devices in groups of 4 on one node; 8 free on 2 nodes, at most 5 on one"
                .to_owned(),
        ),
    ] {
        assert_eq!(misfit.to_string(), line);
        assert_eq!(misfit.explanation().message, line);
        assert_eq!(misfit.explanation().reason, misfit.reason());
    }
}
