//! Small random fleets and gangs, and what each node of them could hold.
#![allow(dead_code)]

use drumline_cluster::{Commitment, Device, Health, Node, Slice, Snapshot, Taint};
use drumline_placement::Scoring;
use drumline_spec::{DeviceKind, Gang, Toleration, TopologyRule};
use drumline_types::{Attempt, Bytes, DeviceId, NodeName};
use proptest::prelude::*;

#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) rack: u32,
    pub(crate) devices: u32,
    pub(crate) failed: u32,
    pub(crate) held: u32,
    pub(crate) state: u32,
    pub(crate) cores: u64,
}

pub(crate) fn machine() -> impl Strategy<Value = Machine> {
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

pub(crate) fn name(i: usize) -> NodeName {
    format!("node-{i}").parse().unwrap()
}

pub(crate) fn fleet(machines: &[Machine]) -> Snapshot {
    fleet_of(machines, &(0..machines.len()).collect::<Vec<_>>())
}

/// The fleet of these machines, heard in this order.
pub(crate) fn fleet_of(machines: &[Machine], order: &[usize]) -> Snapshot {
    let mut fleet = Snapshot::new();
    for &i in order {
        let machine = &machines[i];
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
            let share_milli = if machine.cores.is_multiple_of(2) { 1000 } else { 400 };
            let slice = Slice { share_milli, ..Slice::default() };
            fleet.hold(Commitment { job, attempt: Attempt(1), devices, slice }).unwrap();
        }
    }
    fleet
}

pub(crate) fn gang() -> impl Strategy<Value = Gang> {
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
pub(crate) fn rooms(fleet: &Snapshot, gang: &Gang) -> Vec<(NodeName, u32)> {
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

pub(crate) const SCORINGS: [Scoring; 7] = [
    Scoring::Drumline,
    Scoring::Random,
    Scoring::FirstFit,
    Scoring::BestFit,
    Scoring::DotProduct,
    Scoring::GpuPacking,
    Scoring::FragmentationGradient,
];
