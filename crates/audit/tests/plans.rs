//! Plans over random fleets: the audit accepts what `placement` makes and refuses what is spoiled.

use std::collections::BTreeSet;

use drumline_audit::{Violation, check};
use drumline_cluster::{Device, Health, Node, Snapshot, Taint};
use drumline_mesh::Coords;
use drumline_placement::{Plan, Seed, plan};
use drumline_queue::{Admitted, Queues, Usage, Waiting, admit};
use drumline_spec::{DeviceKind, Gang, GangSettings, Parallelism, RestartPolicy};
use drumline_types::{Attempt, Bytes, DeviceId, RankIndex, Timestamp};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Machine {
    rack: u32,
    devices: u32,
    failed: u32,
    held: u32,
    state: u32,
}

fn machine() -> impl Strategy<Value = Machine> {
    (0u32..3, 0u32..9, 0u32..8, 0u32..4, 0u32..8).prop_map(
        |(rack, devices, failed, held, state)| Machine { rack, devices, failed, held, state },
    )
}

fn fleet(machines: &[Machine]) -> Snapshot {
    let mut snapshot = Snapshot::new();
    for (i, machine) in machines.iter().enumerate() {
        let name: drumline_types::NodeName = format!("node-{i}").parse().unwrap();
        let mut devices =
            vec![Device::new(DeviceKind::Gpu, "H100", Bytes(1)); machine.devices as usize];
        devices.push(Device::new(DeviceKind::Cpu, "share", Bytes(1)));
        if machine.failed < machine.devices {
            devices[machine.failed as usize].health = Health::Failed("Xid 79".to_owned());
        }
        let mut node =
            Node::new(name.clone(), devices).within("rack", format!("r{}", machine.rack));
        node.ready = machine.state != 0;
        node.cordoned = machine.state == 1;
        if machine.state == 2 {
            node.taints.push(Taint { key: "reserved".to_owned(), value: String::new() });
        }
        snapshot.upsert_node(node);
        let held = (0..machine.held.min(machine.devices))
            .map(|index| DeviceId { node: name.clone(), index })
            .collect();
        snapshot.commit(&format!("old-{i}").parse().unwrap(), Attempt(1), held).unwrap();
    }
    snapshot
}

fn admitted(jobs: &[(u32, u32)]) -> Vec<Admitted> {
    let waiting: Vec<Waiting> = jobs
        .iter()
        .enumerate()
        .map(|(i, &(tensor, groups))| Waiting {
            job: format!("job-{i}").parse().unwrap(),
            attempt: Attempt(1),
            gang: Gang {
                ranks: tensor * groups,
                node_group: tensor,
                device: DeviceKind::Gpu,
                ..Gang::default()
            },
            split: Parallelism { tensor, pipeline: groups, data: 1 },
            settings: GangSettings {
                queue: "default".parse().unwrap(),
                priority: 0,
                restarts: RestartPolicy { limit: 0, backoff_ms: 0 },
                stall_timeout_ms: 0,
                start_timeout_ms: 1000,
                ..GangSettings::default()
            },
            submitted: Timestamp(i as u64),
            held: false,
            not_before: Timestamp(0),
        })
        .collect();
    admit(&Queues::open(), &Usage::default(), &waiting, Timestamp(0)).admitted
}

fn case() -> impl Strategy<Value = (Snapshot, Vec<Admitted>)> {
    let machines = prop::collection::vec(machine(), 1..8);
    let jobs = prop::collection::vec((1u32..5, 1u32..5), 1..8);
    (machines, jobs).prop_map(|(machines, jobs)| (fleet(&machines), admitted(&jobs)))
}

proptest! {
    #[test]
    fn the_audit_accepts_every_plan_and_no_gang_is_partial(
        (snapshot, admitted) in case(),
        seed in 0u64..4,
    ) {
        let plan = plan(&snapshot, &admitted, Seed(seed));
        let checked = check(&snapshot, &plan);
        prop_assert!(checked.is_ok(), "{:?}", checked.unwrap_err());
        prop_assert_eq!(plan.jobs.len() + plan.waiting.len(), admitted.len());
        let mut devices = BTreeSet::new();
        for job in &plan.jobs {
            prop_assert_eq!(job.assignments.len(), job.gang.ranks as usize);
            for assignment in &job.assignments {
                prop_assert!(devices.insert(&assignment.device), "{} twice", assignment.device);
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_plan((snapshot, admitted) in case(), seed in 0u64..4) {
        let first = plan(&snapshot, &admitted, Seed(seed));
        prop_assert_eq!(plan(&snapshot.clone(), &admitted, Seed(seed)), first);
    }

    #[test]
    fn a_job_waits_only_when_it_fits_nowhere((snapshot, admitted) in case()) {
        let plan = plan(&snapshot, &admitted, Seed(0));
        let mut after = snapshot.clone();
        for job in &plan.jobs {
            let devices = job.assignments.iter().map(|a| a.device.clone()).collect();
            after.commit(&job.job, job.attempt, devices).unwrap();
        }
        for (job, why) in &plan.waiting {
            let gang = &admitted.iter().find(|a| a.waiting().job == *job).unwrap().waiting().gang;
            let room: usize = after
                .nodes()
                .filter(|n| n.node().ineligible().is_none())
                .map(|n| n.free(gang.device).count() / gang.node_group as usize)
                .sum();
            prop_assert!(room * (gang.node_group as usize) < gang.ranks as usize, "{}", why);
        }
    }

    #[test]
    fn a_plan_that_is_spoiled_is_refused(
        (snapshot, admitted) in case(),
        spoil in 0usize..8,
        pick in 0usize..100,
    ) {
        let good = plan(&snapshot, &admitted, Seed(1));
        prop_assume!(!good.jobs.is_empty());
        let mut bad = good.clone();
        let at = pick % bad.jobs.len();
        spoil_plan(&mut bad, at, pick, spoil, &snapshot);
        prop_assert!(check(&snapshot, &good).is_ok());
        prop_assert!(check(&snapshot, &bad).is_err(), "spoilt by {}", spoil);
    }
}

fn spoil_plan(plan: &mut Plan, at: usize, pick: usize, how: usize, snapshot: &Snapshot) {
    let job = &mut plan.jobs[at];
    let rank = pick % job.assignments.len();
    match how {
        0 => {
            job.assignments.remove(rank);
        }
        1 => job.assignments[rank].rank = RankIndex(job.gang.ranks),
        2 => job.assignments[rank].device.index = 99,
        3 => job.assignments[rank].device.node = "elsewhere".parse().unwrap(),
        4 => plan.parent = drumline_cluster::Revision(plan.parent.0 + 1),
        5 => job.assignments[rank].coords = Coords { tensor: 9, pipeline: 9, data: 9 },
        6 => {
            let again = job.clone();
            plan.jobs.push(again);
        }
        // The node's CPU device is its last.
        _ => {
            let node = snapshot.node(&job.assignments[rank].device.node).unwrap().node();
            job.assignments[rank].device.index = node.devices.len() as u32 - 1;
        }
    }
}

fn two_nodes() -> Snapshot {
    let machine = Machine { rack: 0, devices: 4, failed: 9, held: 0, state: 7 };
    fleet(&[machine.clone(), machine])
}

#[test]
fn a_tensor_group_over_two_nodes_is_named_with_both() {
    let snapshot = two_nodes();
    let mut plan = plan(&snapshot, &admitted(&[(2, 1)]), Seed(0));
    let second = &mut plan.jobs[0].assignments[1].device;
    let other = if second.node.as_str() == "node-0" { "node-1" } else { "node-0" };
    second.node = other.parse().unwrap();
    let violations = check(&snapshot, &plan).unwrap_err();
    assert!(matches!(violations.as_slice(), [Violation::GroupSplit { .. }]), "{violations:?}");
}

#[test]
fn a_job_that_holds_devices_is_not_planned_again() {
    let mut snapshot = two_nodes();
    let first = plan(&snapshot, &admitted(&[(2, 1)]), Seed(0));
    let devices = first.jobs[0].assignments.iter().map(|a| a.device.clone()).collect();
    snapshot.commit(&first.jobs[0].job, Attempt(1), devices).unwrap();
    let mut again = first.clone();
    again.parent = snapshot.revision();
    let violations = check(&snapshot, &again).unwrap_err();
    assert!(
        matches!(violations.as_slice(), [Violation::JobHoldsDevices { .. }, ..]),
        "{violations:?}"
    );
    let mut stale = first.clone();
    stale.jobs.clear();
    assert!(matches!(check(&snapshot, &stale).unwrap_err().as_slice(), [Violation::Stale { .. }]));
}
