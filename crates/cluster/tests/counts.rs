//! The counts of a fleet against a plain count of its nodes, under random changes.

use std::collections::BTreeMap;

use drumline_cluster::{Commitment, Device, DomainAt, Health, Node, Slice, Snapshot, Taint};
use drumline_spec::{DeviceKind, WHOLE_DEVICE};
use drumline_types::{Attempt, Bytes, DeviceId, JobId, NodeName};
use proptest::prelude::*;

fn name(i: u32) -> NodeName {
    format!("node-{i}").parse().unwrap()
}

fn job(i: u32) -> JobId {
    format!("job-{i}").parse().unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    /// Node, rack, devices, the failed one, and a state: 0 not ready, 1 cordoned, 2 tainted.
    Join(u32, u32, u32, u32, u32),
    Leave(u32),
    Hold(u32, u32, Vec<(u32, u32)>),
    Release(u32),
    Reserve(u32, Vec<(u32, u32)>),
    Unreserve(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let devices = || prop::collection::vec((0u32..5, 0u32..4), 1..4);
    prop_oneof![
        3 => (0u32..5, 0u32..3, 0u32..5, 0u32..9, 0u32..6)
            .prop_map(|(n, rack, devices, failed, state)| Step::Join(n, rack, devices, failed, state)),
        1 => (0u32..5).prop_map(Step::Leave),
        4 => (0u32..6, 0usize..3, devices())
            .prop_map(|(job, share, devices)| Step::Hold(job, [1000, 500, 250][share], devices)),
        2 => (0u32..6).prop_map(Step::Release),
        1 => (0u32..6, devices()).prop_map(|(job, devices)| Step::Reserve(job, devices)),
        1 => (0u32..6).prop_map(Step::Unreserve),
    ]
}

fn machine(n: u32, rack: u32, devices: u32, failed: u32, state: u32) -> Node {
    let model = |i: u32| if i % 3 == 2 { "A100" } else { "H100" };
    let device = |i: u32| {
        let mut device = Device::new(DeviceKind::Gpu, model(i), Bytes(1));
        if i == failed {
            device.health = Health::Failed("Xid 79".to_owned());
        }
        device
    };
    let mut node = Node::new(name(n), (0..devices).map(device).collect());
    if rack < 2 {
        node = node.within("zone", "z").within("rack", format!("r{rack}"));
    }
    (node.ready, node.cordoned) = (state != 0, state != 1);
    node.cordoned = state == 1;
    if state == 2 {
        node.taints.push(Taint { key: "reserved".to_owned(), value: String::new() });
    }
    node
}

fn ids(devices: &[(u32, u32)]) -> Vec<DeviceId> {
    devices.iter().map(|&(n, index)| DeviceId { node: name(n), index }).collect()
}

fn apply(fleet: &mut Snapshot, step: &Step) {
    match step {
        Step::Join(n, rack, devices, failed, state) => {
            fleet.upsert_node(machine(*n, *rack, *devices, *failed, *state));
        }
        Step::Leave(n) => {
            fleet.remove_node(&name(*n));
        }
        Step::Hold(j, share_milli, devices) => {
            let slice = Slice { share_milli: *share_milli, cpu_milli: 10, memory: Bytes(3) };
            let devices = ids(devices);
            let _ = fleet.hold(Commitment { job: job(*j), attempt: Attempt(1), devices, slice });
        }
        Step::Release(j) => {
            fleet.release(&job(*j));
        }
        Step::Reserve(j, devices) => {
            let _ = fleet.reserve(&job(*j), ids(devices));
        }
        Step::Unreserve(j) => {
            fleet.unreserve(&job(*j));
        }
    }
}

/// Per model, taints and domain: nodes by free devices, nodes by healthy ones, parts left.
type Counted = BTreeMap<(String, bool, String), (Vec<u32>, Vec<u32>)>;

fn plain(fleet: &Snapshot) -> Counted {
    let mut counted = Counted::new();
    for state in fleet.nodes() {
        let node = state.node();
        if !node.ready || node.cordoned {
            continue;
        }
        for model in ["A100", "H100"] {
            let of: Vec<u32> = (0u32..)
                .zip(&node.devices)
                .filter(|(_, d)| d.model == model)
                .map(|(i, _)| i)
                .collect();
            if of.is_empty() {
                continue;
            }
            let healthy = |i: &&u32| node.devices[**i as usize].health == Health::Healthy;
            let unused =
                |i: &&u32| state.holders(**i).count() == 0 && state.reserved(**i).is_none();
            let usable = of.iter().filter(healthy).count();
            let free = of.iter().filter(healthy).filter(unused).count();
            let mut path = String::new();
            let mut paths = vec![path.clone()];
            for domain in &node.topology {
                path += &format!("/{}={}", domain.level, domain.name);
                paths.push(path.clone());
            }
            for path in paths {
                let key = (model.to_owned(), node.taints.is_empty(), path);
                let entry = counted.entry(key).or_default();
                for (list, at) in [(&mut entry.0, free), (&mut entry.1, usable)] {
                    list.resize(list.len().max(at + 1), 0);
                    list[at] += 1;
                }
            }
        }
    }
    counted
}

fn indexed(fleet: &Snapshot) -> Counted {
    let mut counted = Counted::new();
    let topology = fleet.topology();
    for (number, pool) in fleet.pools() {
        let model = fleet.stock(pool.model()).model().to_owned();
        let mut open = vec![(DomainAt::ROOT, String::new())];
        while let Some((at, path)) = open.pop() {
            for child in topology.place(at).children() {
                let place = topology.place(child);
                let level = topology.level_name(place.level());
                open.push((child, format!("{path}/{level}={}", place.name())));
            }
            let counts = pool.counts(at);
            let trim = |list: &[u32]| {
                let end = list.iter().rposition(|n| *n > 0).map_or(0, |at| at + 1);
                list[..end].to_vec()
            };
            if counts.nodes() > 0 {
                let each = (trim(counts.by_free()), trim(counts.by_usable()));
                counted.insert((model.clone(), pool.open_to(&[]), path), each);
                let sum = |list: &[u32]| (0u64..).zip(list).map(|(d, n)| d * u64::from(*n)).sum();
                let (free, usable): (u64, u64) = (sum(counts.by_free()), sum(counts.by_usable()));
                assert_eq!((counts.free(), counts.usable()), (free, usable));
            }
            for (free, key, node) in counts.order() {
                let state = fleet.at(*node);
                assert_eq!((state.free_in_pool(number), state.key()), (*free, *key));
            }
        }
        for (left, _, node, index) in pool.partial() {
            assert_eq!(fleet.at(*node).left_milli(*index), *left);
        }
        let parts: usize = fleet
            .nodes()
            .filter(|state| state.node().ready && !state.node().cordoned)
            .flat_map(|state| state.in_pool(number).map(move |index| (state, index)))
            .filter(|(state, index)| {
                (1..WHOLE_DEVICE).contains(&state.left_milli(*index))
                    && state.reserved(*index).is_none()
            })
            .count();
        assert_eq!(pool.partial().len(), parts);
    }
    counted
}

proptest! {
    #[test]
    fn every_domain_is_counted_as_its_nodes_are(steps in prop::collection::vec(step(), 0..50)) {
        let mut fleet = Snapshot::new();
        for step in &steps {
            apply(&mut fleet, step);
            prop_assert_eq!(indexed(&fleet), plain(&fleet));
        }
    }

    #[test]
    fn a_trial_that_is_dropped_was_never_there(
        before in prop::collection::vec(step(), 0..30),
        tried in prop::collection::vec(step(), 0..20),
    ) {
        let mut fleet = Snapshot::new();
        before.iter().for_each(|step| apply(&mut fleet, step));
        let (was, counts) = (fleet.clone(), indexed(&fleet));
        let grown = fleet.grown(DeviceKind::Gpu, &[]);
        let mut trial = fleet.trial();
        for step in &tried {
            match step {
                Step::Hold(j, share_milli, devices) => {
                    let slice = Slice { share_milli: *share_milli, ..Slice::default() };
                    let (job, devices) = (job(*j), ids(devices));
                    let _ = trial.hold(Commitment { job, attempt: Attempt(1), devices, slice });
                }
                Step::Release(j) => { trial.evict(&job(*j)); }
                Step::Reserve(j, devices) => { let _ = trial.reserve(&job(*j), ids(devices)); }
                Step::Unreserve(j) => { trial.unreserve(&job(*j)); }
                Step::Join(..) | Step::Leave(_) => {}
            }
        }
        drop(trial);
        prop_assert_eq!(indexed(&fleet), counts);
        prop_assert_eq!(fleet.grown(DeviceKind::Gpu, &[]), grown);
        prop_assert!(fleet == was);
    }

    #[test]
    fn a_gang_that_did_not_fit_may_fit_only_when_something_has_grown(
        before in prop::collection::vec(step(), 0..30),
        next in step(),
    ) {
        let mut fleet = Snapshot::new();
        before.iter().for_each(|step| apply(&mut fleet, step));
        let free = |fleet: &Snapshot| -> u64 {
            fleet.pools().map(|(_, pool)| pool.counts(DomainAt::ROOT).free()).sum()
        };
        let (was, grown) = (free(&fleet), fleet.grown(DeviceKind::Gpu, &[]));
        apply(&mut fleet, &next);
        prop_assert!(free(&fleet) <= was || fleet.grown(DeviceKind::Gpu, &[]) > grown);
    }

    #[test]
    fn a_fleet_read_back_from_its_parts_is_the_same_fleet(
        steps in prop::collection::vec(step(), 0..40),
    ) {
        let mut fleet = Snapshot::new();
        steps.iter().for_each(|step| apply(&mut fleet, step));
        let mut back = Snapshot::new();
        for held in fleet.commitments() {
            back.hold(held.clone()).unwrap();
        }
        for (job, devices) in fleet.reservations() {
            back.reserve(job, devices).unwrap();
        }
        for state in fleet.nodes().collect::<Vec<_>>().into_iter().rev() {
            back.upsert_node(state.node().clone());
        }
        prop_assert_eq!(indexed(&back), indexed(&fleet));
        for (a, b) in fleet.nodes().zip(back.nodes()) {
            let left = |state: &drumline_cluster::NodeState| {
                let parts: Vec<u32> = (0..5).map(|index| state.left_milli(index)).collect();
                (parts, state.cpu_left_milli(), state.memory_left(), state.key())
            };
            prop_assert_eq!(left(a), left(b));
        }
    }
}
