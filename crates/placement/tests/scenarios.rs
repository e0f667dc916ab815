//! Small fleets in, decisions and reasons out.

use drumline_cluster::{Device, Health, Node, Snapshot};
use drumline_placement::{Plan, Seed, plan};
use drumline_queue::{Admitted, Queues, Usage, Waiting, admit};
use drumline_spec::{DeviceKind, Gang, GangSettings, Parallelism, RestartPolicy};
use drumline_types::{Attempt, Bytes, DeviceId, Reason, Timestamp};

/// A fleet written as one line per node: name, rack, one letter per device (`.` free, `#` held,
/// `x` failed), and `!` when it is cordoned.
fn fleet(lines: &[&str]) -> Snapshot {
    let mut snapshot = Snapshot::new();
    for line in lines {
        let mut words = line.split_whitespace();
        let (name, rack, devices) =
            (words.next().unwrap(), words.next().unwrap(), words.next().unwrap_or(""));
        let device = |letter| {
            let mut device = Device::new(DeviceKind::Gpu, "H100", Bytes(80 << 30));
            if letter == 'x' {
                device.health = Health::Failed("Xid 79".to_owned());
            }
            device
        };
        let mut node = Node::new(name.parse().unwrap(), devices.chars().map(device).collect())
            .within("rack", rack);
        node.cordoned = words.next() == Some("!");
        snapshot.upsert_node(node);
        let held: Vec<DeviceId> = (0u32..)
            .zip(devices.chars())
            .filter(|(_, letter)| *letter == '#')
            .map(|(index, _)| DeviceId { node: name.parse().unwrap(), index })
            .collect();
        if !held.is_empty() {
            snapshot.commit(&format!("held-{name}").parse().unwrap(), Attempt(1), held).unwrap();
        }
    }
    snapshot
}

/// Jobs as (tensor, groups).
fn jobs(sizes: &[(u32, u32)]) -> Vec<Admitted> {
    let job = |(i, &(tensor, groups)): (usize, &(u32, u32))| Waiting {
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
    };
    let waiting: Vec<Waiting> = sizes.iter().enumerate().map(job).collect();
    admit(&Queues::open(), &Usage::default(), &waiting, Timestamp(0)).admitted
}

fn placed(plan: &Plan) -> Vec<String> {
    plan.jobs
        .iter()
        .map(|job| {
            let devices: Vec<_> = job.assignments.iter().map(|a| a.device.to_string()).collect();
            format!("{}: {}", job.job, devices.join(" "))
        })
        .collect()
}

#[test]
fn a_gang_takes_the_node_that_it_fills_best() {
    let fleet = fleet(&["a r1 ........", "b r1 #####...", "c r2 ####...."]);
    let plan = plan(&fleet, &jobs(&[(3, 1)]), Seed(0));
    assert_eq!(placed(&plan), ["job-0: b/5 b/6 b/7"]);
}

#[test]
fn a_gang_too_big_for_a_node_stays_in_one_rack() {
    let fleet = fleet(&["a r1 ....", "b r2 ....", "c r2 ..##", "d r1 #..."]);
    let plan = plan(&fleet, &jobs(&[(2, 3)]), Seed(0));
    // r1 has room for 2 + 1 groups and r2 for 2 + 1: both hold it, and either is whole.
    let racks: std::collections::BTreeSet<bool> = plan.jobs[0]
        .assignments
        .iter()
        .map(|a| ["a", "d"].contains(&a.device.node.as_str()))
        .collect();
    assert_eq!(racks.len(), 1, "{:?}", placed(&plan));
}

#[test]
fn a_rack_that_it_fills_goes_before_a_rack_with_more_room() {
    let fleet = fleet(&["a r1 ....", "b r1 ....", "c r2 ....", "d r2 ..##"]);
    let plan = plan(&fleet, &jobs(&[(1, 6)]), Seed(3));
    assert_eq!(placed(&plan), ["job-0: c/0 c/1 c/2 c/3 d/0 d/1"]);
}

#[test]
fn two_gangs_that_could_each_hold_half_do_not() {
    let fleet = fleet(&["a r1 ....", "b r1 ...."]);
    let plan = plan(&fleet, &jobs(&[(1, 6), (1, 6)]), Seed(0));
    assert_eq!(plan.jobs.len(), 1);
    assert_eq!(plan.jobs[0].assignments.len(), 6);
    let (job, why) = &plan.waiting[0];
    assert_eq!((job.as_str(), why.reason), ("job-1", Reason::WaitingForDevices));
}

#[test]
fn every_wait_has_its_reason_and_its_numbers() {
    let full = ["a r1 ##..", "b r1 .#x.", "c r2 .... !"];
    type Case<'a> = (&'a [&'a str], (u32, u32), Reason, &'a str);
    let cases: [Case<'_>; 6] = [
        (
            &full,
            (1, 5),
            Reason::WaitingForDevices,
            "needs 5 gpu devices; 4 free on 2 nodes, at most 2 on one; not eligible: 3 busy, \
             4 on nodes cordoned, 1 failed (Xid 79); would fit with 4 ranks",
        ),
        (
            &full,
            (4, 1),
            Reason::TopologyDoesNotFit,
            "needs 4 gpu devices in groups of 4 on one node; 4 free on 2 nodes, at most 2 on one; \
             not eligible: 3 busy, 4 on nodes cordoned, 1 failed (Xid 79)",
        ),
        (
            &full,
            (1, 9),
            Reason::NodesNotReady,
            "needs 9 gpu devices; 4 free on 2 nodes, at most 2 on one; not eligible: 3 busy, \
             4 on nodes cordoned, 1 failed (Xid 79); would fit with 4 ranks",
        ),
        (
            &full,
            (8, 1),
            Reason::ExceedsCluster,
            "needs 8 gpu devices in groups of 8 on one node; the fleet has 12 and could hold 0; \
             4 free on 2 nodes, at most 2 on one; not eligible: 3 busy, 4 on nodes cordoned, \
             1 failed (Xid 79)",
        ),
        (
            &["a r1"],
            (1, 1),
            Reason::NoMatchingDevice,
            "needs 1 gpu devices; no node has gpu devices",
        ),
        (
            &["a r1 ####"],
            (1, 1),
            Reason::WaitingForDevices,
            "needs 1 gpu devices; 0 free on 0 nodes; not eligible: 4 busy",
        ),
    ];
    for (lines, size, reason, message) in cases {
        let plan = plan(&fleet(lines), &jobs(&[size]), Seed(0));
        let (_, why) = &plan.waiting[0];
        assert_eq!((why.reason, why.message.as_str()), (reason, message));
    }
}

#[test]
fn a_gang_that_must_share_a_rack_waits_while_its_devices_are_scattered() {
    use drumline_placement::{Constraints, place};
    use drumline_spec::TopologyRule;

    let rule = |required| TopologyRule { ranks: 0, level: "rack".to_owned(), required };
    let gang = |required| Gang {
        ranks: 8,
        node_group: 2,
        device: DeviceKind::Gpu,
        models: vec!["H100".to_owned()],
        topology: vec![rule(required)],
        ..Gang::default()
    };
    let split = Parallelism { tensor: 2, pipeline: 1, data: 4 };
    let bounds = Constraints::default();
    let scattered = fleet(&["a r1 ....", "b r1 ..##", "c r2 ....", "d r2 x.##", "e r3 .... !"]);
    let why = place(&scattered, &gang(true), split, &bounds).unwrap_err().explanation();
    assert_eq!(
        (why.reason, why.message.as_str()),
        (
            Reason::TopologyDoesNotFit,
            "needs 8 H100 devices in groups of 2 on one node, all in one rack; 11 free on 4 nodes, \
             at most 4 on one, largest rack 3 x 2; not eligible: 4 busy, 4 on nodes cordoned, \
             1 failed (Xid 79); would fit with 6 ranks"
        )
    );
    // As a wish it is given up, and the gang goes to as few domains as can be.
    assert_eq!(place(&scattered, &gang(false), split, &bounds).unwrap().devices.len(), 8);
    let together = fleet(&["a r1 ....", "b r1 ....", "c r2 ....", "d r2 x.##"]);
    let placed = place(&together, &gang(true), split, &bounds).unwrap();
    assert!(placed.devices.iter().all(|device| ["a", "b"].contains(&device.node.as_str())));
}
