//! Placing on small random fleets, against a search that tries everything.

use std::collections::{BTreeMap, BTreeSet};

use drumline_cluster::{Commitment, Device, Health, Node, Slice, Snapshot, Taint};
use drumline_placement::{Constraints, Placed, Scoring, Seed, place};
use drumline_spec::{DeviceKind, Elastic, Gang, Parallelism, Toleration, TopologyRule};
use drumline_types::{Attempt, Bytes, DeviceId, NodeName};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Machine {
    rack: u32,
    devices: u32,
    failed: u32,
    held: u32,
    state: u32,
    cores: u64,
}

fn machine() -> impl Strategy<Value = Machine> {
    (0u32..4, 0u32..5, 0u32..8, 0u32..4, 0u32..10, 0u64..6).prop_map(
        |(rack, devices, failed, held, state, cores)| Machine {
            rack,
            devices,
            failed,
            held,
            state,
            cores,
        },
    )
}

fn name(i: usize) -> NodeName {
    format!("node-{i}").parse().unwrap()
}

fn fleet(machines: &[Machine]) -> Snapshot {
    let mut fleet = Snapshot::new();
    for (i, machine) in machines.iter().enumerate() {
        let device = Device::new(DeviceKind::Gpu, "H100", Bytes(1));
        let mut devices = vec![device; machine.devices as usize];
        if machine.failed < machine.devices {
            devices[machine.failed as usize].health = Health::Failed("Xid 79".to_owned());
        }
        let mut node = Node::new(name(i), devices)
            .within("spine", format!("s{}", machine.rack / 2))
            .within("rack", format!("r{}", machine.rack));
        node.ready = machine.state != 0;
        node.cordoned = machine.state == 1;
        node.cpu_milli = machine.cores * 1000;
        if machine.state == 2 {
            node.taints.push(Taint { key: "reserved".to_owned(), value: "x".to_owned() });
        }
        fleet.upsert_node(node);
        if machine.held > 0 && machine.devices > 0 {
            let devices = (0..machine.held.min(machine.devices))
                .map(|index| DeviceId { node: name(i), index });
            let (job, devices) = (format!("old-{i}").parse().unwrap(), devices.collect());
            let share_milli = if machine.cores % 2 == 0 { 1000 } else { 400 };
            let slice = Slice { share_milli, ..Slice::default() };
            fleet.hold(Commitment { job, attempt: Attempt(1), devices, slice }).unwrap();
        }
    }
    fleet
}

fn gang() -> impl Strategy<Value = Gang> {
    let rule = (0u32..7, 0usize..3, any::<bool>()).prop_map(|(ranks, level, required)| {
        TopologyRule { ranks, level: ["node", "rack", "spine"][level].to_owned(), required }
    });
    (
        1u32..9,
        1u32..4,
        prop::collection::vec(rule, 0..3),
        any::<bool>(),
        prop::sample::select(vec![1000u32, 1000, 600, 300]),
        0u64..2,
    )
        .prop_map(|(ranks, group, topology, tolerates, share_milli, cores)| Gang {
            ranks,
            node_group: group,
            device: DeviceKind::Gpu,
            topology,
            share_milli,
            cpu_milli: cores * 1000,
            tolerations: tolerates
                .then(|| Toleration { key: "reserved".to_owned(), value: None })
                .into_iter()
                .collect(),
            ..Gang::default()
        })
}

/// Ranks that each node could hold.
fn rooms(fleet: &Snapshot, gang: &Gang) -> Vec<(NodeName, u32)> {
    let room = |state: &drumline_cluster::NodeState| {
        let node = state.node();
        if node.ineligible_for(&gang.tolerations).is_some() {
            return 0;
        }
        let devices: u32 = (0u32..)
            .zip(&node.devices)
            .filter(|(_, device)| device.health == Health::Healthy)
            .map(|(index, _)| (1000 - state.used_milli(index)) / gang.share_milli)
            .sum();
        let cores = node.cpu_milli.checked_div(gang.cpu_milli).unwrap_or(99);
        devices.min(cores as u32)
    };
    fleet.nodes().map(|state| (state.node().name.clone(), room(state))).collect()
}

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
    let nodes: Vec<Node> = fleet.nodes().map(|state| state.node().clone()).collect();
    let place = |node: usize, level: &str| match level {
        "node" => nodes[node].name.to_string(),
        _ => nodes[node].topology.iter().find(|d| d.level == level).unwrap().name.clone(),
    };
    // A level that no node names cannot be kept to.
    let known = !nodes.is_empty() || gang.topology.iter().all(|rule| !rule.required);
    known && fits(gang, ranks, &mut rooms(fleet, gang), &place, &mut Vec::new())
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

const SCORINGS: [Scoring; 7] = [
    Scoring::Drumline,
    Scoring::Random,
    Scoring::FirstFit,
    Scoring::BestFit,
    Scoring::DotProduct,
    Scoring::GpuPacking,
    Scoring::FragmentationGradient,
];

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
