//! Plans over random fleets: the audit accepts what `placement` makes and refuses what is spoiled.

use std::collections::BTreeSet;

use drumline_audit::{Violation, check};
use drumline_cluster::{Device, Health, Node, Snapshot, Taint};
use drumline_mesh::Coords;
use drumline_placement::{Constraints, JobPlan, Misfit, Plan, Seed, place};
use drumline_spec::{DeviceKind, Gang, Parallelism};
use drumline_types::{Attempt, Bytes, DeviceId, JobId, RankIndex};
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

/// A gang of tensor groups, and its split.
type Job = (JobId, Gang, Parallelism);

/// Jobs from their tensor sizes and numbers of groups.
fn jobs(sizes: &[(u32, u32)]) -> Vec<Job> {
    let job = |(i, &(tensor, groups)): (usize, &(u32, u32))| {
        let gang = Gang {
            ranks: tensor * groups,
            node_group: tensor,
            device: DeviceKind::Gpu,
            ..Gang::default()
        };
        let split = Parallelism { tensor, pipeline: groups, data: 1 };
        (format!("job-{i}").parse().unwrap(), gang, split)
    };
    sizes.iter().enumerate().map(job).collect()
}

/// Who did not fit, and why.
type Waits = Vec<(Gang, Misfit)>;

/// Places one job after the other on what those before it leave.
fn plan(snapshot: &Snapshot, jobs: &[Job], seed: Seed) -> (Plan, Waits) {
    let mut plan = Plan { parent: snapshot.revision(), jobs: Vec::new() };
    let (mut fleet, mut waits) = (snapshot.clone(), Vec::new());
    let constraints = Constraints { seed, ..Constraints::default() };
    for (job, gang, split) in jobs {
        match place(&fleet, gang, *split, &constraints) {
            Ok(placed) => {
                fleet.hold(placed.commitment(job, Attempt(1))).unwrap();
                plan.jobs.push(JobPlan::new(job, Attempt(1), gang, placed));
            }
            Err(misfit) => waits.push((gang.clone(), *misfit)),
        }
    }
    (plan, waits)
}

fn case() -> impl Strategy<Value = (Snapshot, Vec<Job>)> {
    let machines = prop::collection::vec(machine(), 1..8);
    let sizes = prop::collection::vec((1u32..5, 1u32..5), 1..8);
    (machines, sizes).prop_map(|(machines, sizes)| (fleet(&machines), jobs(&sizes)))
}

proptest! {
    #[test]
    fn the_audit_accepts_every_plan_and_no_gang_is_partial(
        (snapshot, jobs) in case(),
        seed in 0u64..4,
    ) {
        let (plan, waits) = plan(&snapshot, &jobs, Seed(seed));
        let checked = check(&snapshot, &plan);
        prop_assert!(checked.is_ok(), "{:?}", checked.unwrap_err());
        prop_assert_eq!(plan.jobs.len() + waits.len(), jobs.len());
        let mut devices = BTreeSet::new();
        for job in &plan.jobs {
            prop_assert_eq!(job.assignments.len(), job.gang.ranks as usize);
            for assignment in &job.assignments {
                prop_assert!(devices.insert(&assignment.device), "{} twice", assignment.device);
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_plan((snapshot, jobs) in case(), seed in 0u64..4) {
        let first = plan(&snapshot, &jobs, Seed(seed));
        prop_assert_eq!(plan(&snapshot.clone(), &jobs, Seed(seed)), first);
    }

    #[test]
    fn a_job_waits_only_when_it_fits_nowhere((snapshot, jobs) in case()) {
        let (plan, waits) = plan(&snapshot, &jobs, Seed(0));
        let mut after = snapshot.clone();
        for job in &plan.jobs {
            let devices = job.assignments.iter().map(|a| a.device.clone()).collect();
            after.commit(&job.job, job.attempt, devices).unwrap();
        }
        for (gang, why) in waits {
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
        (snapshot, jobs) in case(),
        spoil in 0usize..8,
        pick in 0usize..100,
    ) {
        let good = plan(&snapshot, &jobs, Seed(1)).0;
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
    let mut plan = plan(&snapshot, &jobs(&[(2, 1)]), Seed(0)).0;
    let second = &mut plan.jobs[0].assignments[1].device;
    let other = if second.node.as_str() == "node-0" { "node-1" } else { "node-0" };
    second.node = other.parse().unwrap();
    let violations = check(&snapshot, &plan).unwrap_err();
    assert!(matches!(violations.as_slice(), [Violation::GroupSplit { .. }]), "{violations:?}");
}

#[test]
fn a_job_that_holds_devices_is_not_planned_again() {
    let mut snapshot = two_nodes();
    let first = plan(&snapshot, &jobs(&[(2, 1)]), Seed(0)).0;
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
