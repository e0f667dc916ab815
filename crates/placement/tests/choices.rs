//! Which of the places that would do is taken, against the rule worked out by hand on small random
//! fleets; and that nothing but the fleet decides it.

mod support;

use std::collections::BTreeMap;

use drumline_cluster::{NodeState, Snapshot};
use drumline_placement::{Constraints, Placed, Scoring, Seed, place};
use drumline_spec::{Gang, Parallelism, WHOLE_DEVICE};
use drumline_types::NodeName;
use proptest::prelude::*;
use support::{Machine, SCORINGS, fleet, fleet_of, gang, machine, rooms};

fn put(fleet: &Snapshot, gang: &Gang, scoring: Scoring, seed: u64) -> Option<Placed> {
    let split = Parallelism { data: gang.ranks, ..Parallelism::SINGLE };
    let constraints = Constraints { scoring, seed: Seed(seed), ..Constraints::default() };
    place(fleet, gang, split, &constraints).ok()
}

/// Ranks by node, in the order in which the nodes first appear.
fn by_node(placed: &Placed) -> Vec<(&NodeName, u32)> {
    let mut nodes: Vec<(&NodeName, u32)> = Vec::new();
    for device in &placed.devices {
        match nodes.iter_mut().find(|(node, _)| **node == device.node) {
            Some((_, ranks)) => *ranks += 1,
            None => nodes.push((&device.node, 1)),
        }
    }
    nodes
}

/// The free whole devices on a node that takes work of a gang.
fn free(state: &NodeState, gang: &Gang) -> u32 {
    if state.node().ineligible_for(&gang.tolerations).is_some() {
        return 0;
    }
    (0..state.node().devices.len() as u32).filter(|&index| state.is_free(index)).count() as u32
}

/// The domain of a node: 0 for its rack, 1 for its spine, 2 for the fleet.
fn domain(state: &NodeState, out: usize) -> String {
    let topology = &state.node().topology;
    topology.iter().rev().nth(out).map_or_else(String::new, |domain| domain.name.clone())
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 600,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_order_in_which_nodes_are_heard_decides_nothing(
        machines in prop::collection::vec(machine(), 2..7),
        order in Just((0usize..6).collect::<Vec<_>>()).prop_shuffle(),
        gang in gang(),
        scoring in prop::sample::select(SCORINGS.to_vec()),
        seed in prop::sample::select(vec![0, 7, u64::MAX]),
    ) {
        let one = fleet(&machines);
        let order: Vec<usize> = order.into_iter().filter(|at| *at < machines.len()).collect();
        let other = fleet_of(&machines, &order);
        prop_assert_eq!(put(&one, &gang, scoring, seed), put(&other, &gang, scoring, seed));
    }

    #[test]
    fn what_fits_one_node_goes_where_least_is_left_over(
        machines in prop::collection::vec(machine(), 1..7),
        gang in gang(),
        scoring in prop::sample::select(vec![Scoring::Drumline, Scoring::BestFit]),
        seed in 0u64..3,
    ) {
        let gang = Gang { node_group: gang.ranks, cpu_milli: 0, topology: Vec::new(), ..gang };
        let fleet = fleet(&machines);
        let Some(placed) = put(&fleet, &gang, scoring, seed) else { return Ok(()) };
        let nodes = by_node(&placed);
        prop_assert_eq!(nodes.len(), 1);
        let rooms: BTreeMap<NodeName, u32> = rooms(&fleet, &gang).into_iter().collect();
        let fits = |state: &&NodeState| {
            state.node().ineligible_for(&gang.tolerations).is_none()
                && rooms[&state.node().name] >= gang.ranks
        };
        let state = fleet.node(nodes[0].0).unwrap();
        if gang.share_milli == WHOLE_DEVICE {
            let least = fleet.nodes().filter(fits).map(|state| free(state, &gang)).min();
            prop_assert_eq!(Some(free(state, &gang)), least);
            // Of several, one in the rack where least is free.
            let in_rack = |state: &NodeState| -> u32 {
                let there = fleet.nodes().filter(|s| domain(s, 0) == domain(state, 0));
                there.map(|s| free(s, &gang)).sum()
            };
            let in_spine = |state: &NodeState| -> u32 {
                let there = fleet.nodes().filter(|s| domain(s, 1) == domain(state, 1));
                there.map(|s| free(s, &gang)).sum()
            };
            let as_good = |s: &&NodeState| fits(s) && Some(free(s, &gang)) == least;
            if scoring == Scoring::Drumline && gang.tolerations.is_empty() {
                let best = fleet.nodes().filter(as_good).map(|s| (in_spine(s), in_rack(s))).min();
                prop_assert_eq!(Some((in_spine(state), in_rack(state))), best);
            }
        } else if gang.ranks == 1 {
            // A part of a device that others use, the smallest that will do, before a whole one.
            let left = |state: &NodeState| {
                let parts = (0..state.node().devices.len() as u32).map(|i| state.left_milli(i));
                parts.filter(|&left| left >= gang.share_milli).min()
            };
            let best = fleet.nodes().filter(fits).filter_map(left).min();
            prop_assert_eq!(Some(state.left_milli(placed.devices[0].index)), best);
        } else {
            let least = fleet.nodes().filter(fits).map(|s| rooms[&s.node().name]).min();
            prop_assert_eq!(Some(rooms[nodes[0].0]), least);
        }
    }

    #[test]
    fn a_gang_stays_in_the_innermost_domain_that_holds_it_where_least_is_free(
        machines in prop::collection::vec(machine(), 1..7),
        ranks in 2u32..12,
        group in 1u32..4,
        seed in 0u64..3,
    ) {
        let gang = Gang { ranks, node_group: group, device: drumline_spec::DeviceKind::Gpu, ..Gang::default() };
        let fleet = fleet(&machines);
        let Some(placed) = put(&fleet, &gang, Scoring::Drumline, seed) else { return Ok(()) };
        let nodes = by_node(&placed);
        if nodes.len() == 1 {
            return Ok(());
        }
        prop_assert!(fleet.nodes().all(|s| free(s, &gang) < ranks), "a node holds it: {placed:?}");
        let need = (ranks / group, ranks % group);
        for out in 0..3 {
            // What each domain holds: groups, the ranks beside them on one node, and what is free.
            let mut domains: BTreeMap<String, (u32, u32, u32)> = BTreeMap::new();
            for state in fleet.nodes() {
                let free = free(state, &gang);
                let of = domains.entry(domain(state, out)).or_default();
                *of = (of.0 + free / group, of.1.max(free % group), of.2 + free);
            }
            let holds = |(full, tail, _): &(u32, u32, u32)| (*full, *tail) >= need;
            let least = domains.values().filter(|d| holds(d)).map(|(.., free)| *free).min();
            let Some(least) = least else { continue };
            let of = |node: &NodeName| domain(fleet.node(node).unwrap(), out);
            let first = of(nodes[0].0);
            prop_assert!(nodes.iter().all(|(node, _)| of(node) == first), "{placed:?}");
            prop_assert_eq!(domains[&first].2, least);
            // In a rack, the fewest nodes; and the last part where least is left over.
            if out == 0 && group == 1 {
                let there = fleet.nodes().filter(|s| domain(s, 0) == first);
                let mut rooms: Vec<u32> = there.map(|s| free(s, &gang)).collect();
                rooms.sort_unstable_by_key(|&room| std::cmp::Reverse(room));
                let mut left = ranks;
                let fewest = rooms.iter().take_while(|&&room| {
                    let needed = left > 0;
                    left = left.saturating_sub(room);
                    needed
                });
                let fewest = fewest.count();
                prop_assert_eq!(nodes.len(), fewest);
                let filled = rooms[..fewest - 1].iter().sum::<u32>();
                let rest = ranks - filled;
                let best = rooms[fewest - 1..].iter().filter(|&&room| room >= rest).min();
                let state = |node: &NodeName| free(fleet.node(node).unwrap(), &gang);
                let partly = nodes.iter().find(|(node, ranks)| state(node) > *ranks);
                let taken = partly.map_or(rest, |(node, _)| state(node));
                prop_assert_eq!(Some(&taken), best);
            }
            return Ok(());
        }
        prop_assert!(false, "nobody holds it: {placed:?}");
    }

    #[test]
    fn nodes_are_filled_in_the_order_of_the_rule(
        machines in prop::collection::vec(machine(), 1..7),
        ranks in 1u32..12,
        cores in 0u64..2,
        scoring in prop::sample::select(vec![Scoring::FirstFit, Scoring::BestFit]),
    ) {
        let gang = Gang {
            ranks,
            cpu_milli: cores * 1000,
            device: drumline_spec::DeviceKind::Gpu,
            ..Gang::default()
        };
        let fleet = fleet(&machines);
        let Some(placed) = put(&fleet, &gang, scoring, 0) else { return Ok(()) };
        let room = |state: &NodeState| {
            let cores = state.cpu_left_milli().checked_div(gang.cpu_milli).unwrap_or(99);
            free(state, &gang).min(cores as u32)
        };
        let mut rooms: Vec<(NodeName, u32)> =
            fleet.nodes().map(|s| (s.node().name.clone(), room(s))).filter(|r| r.1 > 0).collect();
        rooms.sort();
        if scoring == Scoring::BestFit {
            if rooms.iter().any(|(_, room)| *room >= ranks) {
                prop_assert_eq!(by_node(&placed).len(), 1);
                return Ok(());
            }
            rooms.sort_by_key(|(_, room)| *room);
        } else if ranks == 1 {
            prop_assert_eq!(by_node(&placed), vec![(&rooms[0].0, 1)]);
            return Ok(());
        }
        let mut left = ranks;
        let mut wanted = Vec::new();
        for (node, room) in &rooms {
            let part = left.min(*room);
            left -= part;
            if part > 0 {
                wanted.push((node, part));
            }
        }
        let found = by_node(&placed);
        if scoring == Scoring::FirstFit {
            prop_assert_eq!(found, wanted);
        } else {
            // Of nodes that hold as much any may be first.
            let sizes = |parts: &[(&NodeName, u32)]| parts.iter().map(|p| p.1).collect::<Vec<_>>();
            prop_assert_eq!(sizes(&found), sizes(&wanted));
        }
    }
}

#[test]
fn a_draw_is_the_same_for_the_same_seed_and_reaches_every_node() {
    let machines: Vec<Machine> = (0..4)
        .map(|rack| Machine { rack, devices: 4, failed: 9, held: 0, state: 5, cores: 4 })
        .collect();
    let fleet = fleet(&machines);
    for (ranks, scoring) in [(1, Scoring::Random), (6, Scoring::Random), (1, Scoring::Drumline)] {
        let gang = Gang { ranks, device: drumline_spec::DeviceKind::Gpu, ..Gang::default() };
        let mut first: Vec<String> = (0..64)
            .map(|seed| {
                let placed = put(&fleet, &gang, scoring, seed).unwrap();
                assert_eq!(put(&fleet, &gang, scoring, seed).as_ref(), Some(&placed));
                placed.devices[0].node.to_string()
            })
            .collect();
        first.sort();
        first.dedup();
        assert_eq!(first.len(), 4, "{scoring:?}");
    }
}

#[test]
fn of_domains_that_are_as_full_the_one_with_the_faster_links_is_taken() {
    use drumline_cluster::{Device, Node};
    let device = || Device::new(drumline_spec::DeviceKind::Gpu, "H100", drumline_types::Bytes(1));
    let node = |name: &str, rack: &str, gpus: usize, link: u32| {
        let devices = (0..gpus).map(|_| device()).collect();
        Node::new(name.parse().unwrap(), devices).within("rack", rack).linked(link)
    };
    let gang = Gang { ranks: 6, device: drumline_spec::DeviceKind::Gpu, ..Gang::default() };
    let rack = |fleet: &Snapshot, seed: u64| {
        let placed = put(fleet, &gang, Scoring::Drumline, seed).unwrap();
        domain(fleet.node(&placed.devices[0].node).unwrap(), 0)
    };
    // A rack is as fast as its slowest node; of two that say nothing either may be taken.
    let nodes = [
        node("a", "r1", 4, 12_500),
        node("b", "r1", 4, 50_000),
        node("c", "r2", 4, 25_000),
        node("d", "r2", 4, 50_000),
        node("e", "r3", 4, 0),
        node("f", "r3", 4, 0),
    ];
    let mut fleet = Snapshot::new();
    for node in &nodes {
        fleet.upsert_node(node.clone());
    }
    for seed in 0..16 {
        assert_eq!(rack(&fleet, seed), "r2", "seed {seed}");
    }
    // The slow node of the other rack is replaced.
    fleet.upsert_node(node("a", "r1", 4, 50_000));
    for seed in 0..16 {
        assert_eq!(rack(&fleet, seed), "r1", "seed {seed}");
    }
    // How full a domain is goes before how fast it is.
    fleet.upsert_node(node("e", "r3", 3, 0));
    for seed in 0..16 {
        assert_eq!(rack(&fleet, seed), "r3", "seed {seed}");
    }
    fleet.remove_node(&"a".parse().unwrap());
    fleet.remove_node(&"e".parse().unwrap());
    assert_eq!(rack(&fleet, 0), "r2");
}
