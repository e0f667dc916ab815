//! Placing on small random fleets, against a search that tries everything.

mod support;

use std::collections::{BTreeMap, BTreeSet};

use drumline_cluster::{Health, Node, Snapshot};
use drumline_placement::{Constraints, Placed, Seed, place};
use drumline_spec::{Elastic, Gang, Parallelism};
use drumline_types::{Attempt, NodeName};
use proptest::prelude::*;
use support::{SCORINGS, fleet, gang, machine, rooms};

/// Whether ranks from `rank` on can be given nodes, all rules kept: every way is tried.
fn fits(
    gang: &Gang,
    ranks: u32,
    rooms: &mut [(NodeName, u32)],
    place: &dyn Fn(usize, &str) -> String,
    chosen: &mut Vec<usize>,
) -> bool {
    let rank = chosen.len() as u32;
    if rank == ranks {
        return true;
    }
    for node in 0..rooms.len() {
        if rooms[node].1 == 0 {
            continue;
        }
        let same = |first: u32, level: &str| {
            first == rank || place(chosen[first as usize], level) == place(node, level)
        };
        let group = rank / gang.node_group * gang.node_group;
        let kept = same(group, "node")
            && gang.topology.iter().filter(|rule| rule.required).all(|rule| {
                let first = rank.checked_div(rule.ranks).unwrap_or(0) * rule.ranks;
                same(first, &rule.level)
            });
        if kept {
            rooms[node].1 -= 1;
            chosen.push(node);
            if fits(gang, ranks, rooms, place, chosen) {
                return true;
            }
            chosen.pop();
            rooms[node].1 += 1;
        }
    }
    false
}

fn fits_somehow(fleet: &Snapshot, gang: &Gang, ranks: u32) -> bool {
    fits_in(fleet, gang, ranks, None)
}

/// As [`fits_somehow`], on the nodes of one rack alone.
fn fits_in(fleet: &Snapshot, gang: &Gang, ranks: u32, rack: Option<&str>) -> bool {
    let nodes: Vec<Node> = fleet.nodes().map(|state| state.node().clone()).collect();
    let place = |node: usize, level: &str| match level {
        "node" => nodes[node].name.to_string(),
        _ => nodes[node].topology.iter().find(|d| d.level == level).unwrap().name.clone(),
    };
    // A level that no node names cannot be kept to.
    let known = !nodes.is_empty() || gang.topology.iter().all(|rule| !rule.required);
    let mut rooms = rooms(fleet, gang);
    for (node, (_, room)) in nodes.iter().zip(&mut rooms) {
        let there = |domain: &drumline_cluster::Domain| rack.is_none_or(|r| domain.name == r);
        if !node.topology.iter().any(there) {
            *room = 0;
        }
    }
    known && fits(gang, ranks, &mut rooms, &place, &mut Vec::new())
}

fn assert_legal(fleet: &Snapshot, gang: &Gang, placed: &Placed) {
    let ranks = placed.devices.len();
    let mut held = fleet.clone();
    held.hold(placed.commitment(&"new".parse().unwrap(), Attempt(1))).unwrap();
    let mut cpu: BTreeMap<&NodeName, u64> = BTreeMap::new();
    let state = |at: usize| fleet.node(&placed.devices[at].node).unwrap();
    for at in 0..ranks {
        let device = &placed.devices[at];
        let node = state(at).node();
        assert_eq!(node.ineligible_for(&gang.tolerations), None);
        assert_eq!(node.devices[device.index as usize].health, Health::Healthy);
        *cpu.entry(&device.node).or_default() += gang.cpu_milli;
        assert!(cpu[&device.node] <= node.cpu_milli);
        let group = at / gang.node_group as usize * gang.node_group as usize;
        assert_eq!(placed.devices[group].node, device.node, "{placed:?}");
        for rule in gang.topology.iter().filter(|rule| rule.required) {
            let first = at.checked_div(rule.ranks as usize).unwrap_or(0) * rule.ranks as usize;
            let domain = |at: usize| match rule.level.as_str() {
                "node" => state(at).node().name.to_string(),
                level => {
                    let topology = &state(at).node().topology;
                    topology.iter().find(|domain| domain.level == level).unwrap().name.clone()
                }
            };
            assert_eq!(domain(first), domain(at), "{rule:?} {placed:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_gang_is_placed_exactly_when_some_way_keeps_every_rule(
        machines in prop::collection::vec(machine(), 0..6),
        gang in gang(),
        scoring in prop::sample::select(SCORINGS.to_vec()),
        seed in 0u64..4,
    ) {
        let fleet = fleet(&machines);
        let split = Parallelism { data: gang.ranks, ..Parallelism::SINGLE };
        let constraints = Constraints { scoring, seed: Seed(seed), ..Constraints::default() };
        let placed = place(&fleet, &gang, split, &constraints);
        prop_assert_eq!(&place(&fleet.clone(), &gang, split, &constraints), &placed);
        match placed {
            Ok(placed) => {
                prop_assert_eq!(placed.devices.len(), gang.ranks as usize);
                assert_legal(&fleet, &gang, &placed);
            }
            Err(misfit) => {
                prop_assert!(!fits_somehow(&fleet, &gang, gang.ranks), "{}", misfit);
            }
        }
    }

    #[test]
    fn within_a_domain_it_is_placed_as_if_there_were_no_other(
        machines in prop::collection::vec(machine(), 1..6),
        gang in gang(),
        scoring in prop::sample::select(SCORINGS.to_vec()),
        which in 0usize..4,
    ) {
        let fleet = fleet(&machines);
        let topology = fleet.topology();
        let racks = topology.at_level(topology.level("rack").unwrap());
        let at = racks[which % racks.len()];
        let rack = topology.place(at).name().to_owned();
        let split = Parallelism { data: gang.ranks, ..Parallelism::SINGLE };
        let constraints = Constraints { scoring, within: Some(at), ..Constraints::default() };
        let fits = fits_in(&fleet, &gang, gang.ranks, Some(&rack));
        match place(&fleet, &gang, split, &constraints) {
            Ok(placed) => {
                assert_legal(&fleet, &gang, &placed);
                let there = |device: &drumline_types::DeviceId| {
                    let node = fleet.node(&device.node).unwrap().node();
                    node.topology.iter().any(|domain| domain.name == rack)
                };
                prop_assert!(placed.devices.iter().all(there), "{placed:?}");
            }
            // What must be in one domain of a wider level is in one, and may be told not to fit.
            Err(misfit) => prop_assert!(!fits, "{}", misfit),
        }
    }

    #[test]
    fn an_elastic_gang_gets_the_greatest_size_that_fits(
        machines in prop::collection::vec(machine(), 1..5),
        gang in gang(),
        least in 1u32..4,
        step in 1u32..3,
    ) {
        let fleet = fleet(&machines);
        let most = gang.ranks.max(least);
        let elastic = Elastic { least, most, step };
        let gang = Gang { elastic: Some(elastic), ranks: most, node_group: 1, ..gang };
        let split = Parallelism { data: gang.ranks, ..Parallelism::SINGLE };
        let legal: BTreeSet<u32> =
            (least..=most).filter(|n| n % step == 0).chain([gang.ranks]).collect();
        let greatest = legal.into_iter().rev().find(|size| fits_somehow(&fleet, &gang, *size));
        match place(&fleet, &gang, split, &Constraints::default()) {
            Ok(placed) => {
                prop_assert_eq!(Some(placed.devices.len() as u32), greatest);
                prop_assert_eq!(placed.split.world_size() as usize, placed.devices.len());
                assert_legal(&fleet, &gang, &placed);
            }
            Err(misfit) => prop_assert_eq!(greatest, None, "{}", misfit),
        }
    }
}
