//! The book-keeping of a snapshot against a plain map, under random changes.

use std::collections::BTreeMap;

use drumline_cluster::{Device, Node, Snapshot};
use drumline_spec::DeviceKind;
use drumline_types::{Attempt, Bytes, DeviceId, JobId, NodeName};
use proptest::prelude::*;

fn node(i: u32) -> NodeName {
    format!("node-{i}").parse().unwrap()
}

fn job(i: u32) -> JobId {
    format!("job-{i}").parse().unwrap()
}

fn machine(i: u32) -> Node {
    Node::new(node(i), vec![Device::new(DeviceKind::Gpu, "H100", Bytes(1)); 4])
}

#[derive(Debug, Clone)]
enum Change {
    Join(u32),
    Leave(u32),
    Commit(u32, Vec<(u32, u32)>),
    Release(u32),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0u32..4).prop_map(Change::Join),
        (0u32..4).prop_map(Change::Leave),
        (0u32..6, prop::collection::vec((0u32..4, 0u32..4), 1..4))
            .prop_map(|(job, devices)| Change::Commit(job, devices)),
        (0u32..6).prop_map(Change::Release),
    ]
}

fn apply(snapshot: &mut Snapshot, holders: &mut BTreeMap<(u32, u32), u32>, change: &Change) {
    match change {
        Change::Join(i) => snapshot.upsert_node(machine(*i)),
        Change::Leave(i) => {
            snapshot.remove_node(&node(*i));
        }
        Change::Commit(j, devices) => {
            let distinct: std::collections::BTreeSet<_> = devices.iter().collect();
            let legal = distinct.len() == devices.len()
                && devices.iter().all(|d| !holders.contains_key(d))
                && !holders.values().any(|holder| holder == j);
            let ids = devices.iter().map(|&(n, index)| DeviceId { node: node(n), index }).collect();
            let done = snapshot.commit(&job(*j), Attempt(1), ids);
            assert_eq!(done.is_ok(), legal, "{done:?}");
            if legal {
                holders.extend(devices.iter().map(|d| (*d, *j)));
            }
        }
        Change::Release(j) => {
            let held = snapshot.release(&job(*j)).is_some();
            assert_eq!(held, holders.values().any(|holder| holder == j));
            holders.retain(|_, holder| holder != j);
        }
    }
}

proptest! {
    #[test]
    fn every_device_has_the_holder_that_a_plain_map_says(
        changes in prop::collection::vec(change(), 0..60),
    ) {
        let mut snapshot = Snapshot::new();
        let mut holders = BTreeMap::new();
        for change in &changes {
            apply(&mut snapshot, &mut holders, change);
            for n in 0..4 {
                for index in 0..4 {
                    let holder = snapshot.holder(&DeviceId { node: node(n), index });
                    prop_assert_eq!(holder.cloned(), holders.get(&(n, index)).map(|j| job(*j)));
                }
            }
        }
    }

    #[test]
    fn a_trial_rolled_back_leaves_who_holds_what_as_it_was(
        before in prop::collection::vec(change(), 0..20),
        kept in prop::collection::vec(change(), 0..10),
        undone in prop::collection::vec(change(), 1..20),
    ) {
        let mut snapshot = Snapshot::new();
        let mut holders = BTreeMap::new();
        for change in &before {
            apply(&mut snapshot, &mut holders, change);
        }
        let mut trial = snapshot.trial();
        let step = |trial: &mut drumline_cluster::Trial, change: &Change| match change {
            Change::Commit(j, devices) => {
                let ids =
                    devices.iter().map(|&(n, index)| DeviceId { node: node(n), index }).collect();
                let _ = trial.place(&job(*j), Attempt(1), ids);
            }
            Change::Release(j) => {
                trial.evict(&job(*j));
            }
            Change::Join(_) | Change::Leave(_) => {}
        };
        for change in &kept {
            step(&mut trial, change);
        }
        let mark = trial.checkpoint();
        let expected: Vec<_> = trial.snapshot().commitments().cloned().collect();
        let free: Vec<Vec<u32>> =
            trial.snapshot().nodes().map(|n| n.free(DeviceKind::Gpu).collect()).collect();
        for change in &undone {
            step(&mut trial, change);
        }
        trial.rollback(mark);
        trial.commit();
        let after = snapshot;
        prop_assert_eq!(after.commitments().cloned().collect::<Vec<_>>(), expected);
        let free_after: Vec<Vec<u32>> =
            after.nodes().map(|n| n.free(DeviceKind::Gpu).collect()).collect();
        prop_assert_eq!(free_after, free);
    }
}

#[test]
fn a_device_that_its_node_no_longer_reports_stays_held() {
    let mut snapshot = Snapshot::new();
    snapshot.upsert_node(machine(0));
    let last = DeviceId { node: node(0), index: 3 };
    snapshot.commit(&job(0), Attempt(1), vec![last.clone()]).unwrap();
    snapshot.upsert_node(Node::new(node(0), Vec::new()));
    assert_eq!(snapshot.holder(&last), Some(&job(0)));
    snapshot.upsert_node(machine(0));
    assert_eq!(snapshot.node(&node(0)).unwrap().free(DeviceKind::Gpu).count(), 3);
}

#[test]
fn what_is_said_again_changes_no_revision() {
    let mut snapshot = Snapshot::new();
    snapshot.upsert_node(machine(0));
    let revision = snapshot.revision();
    snapshot.upsert_node(machine(0));
    assert_eq!(snapshot.revision(), revision);
}
