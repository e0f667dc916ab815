//! Small fleets in, decisions and reasons out.

use drumline_cluster::{Device, Health, Node, Snapshot};
use drumline_placement::{Constraints, Misfit, Placed, Seed, place};
use drumline_spec::{DeviceKind, Gang, Parallelism, TopologyRule};
use drumline_types::{Attempt, Bytes, DeviceId, Reason};

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

/// Looks for a place for `groups` tensor groups of `tensor` ranks each.
fn seek(fleet: &Snapshot, (tensor, groups): (u32, u32), seed: u64) -> Result<Placed, Box<Misfit>> {
    let gang = Gang {
        ranks: tensor * groups,
        node_group: tensor,
        device: DeviceKind::Gpu,
        ..Gang::default()
    };
    let split = Parallelism { tensor, pipeline: groups, data: 1 };
    place(fleet, &gang, split, &Constraints { seed: Seed(seed), ..Constraints::default() })
}

fn devices(placed: &Placed) -> String {
    placed.devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_gang_takes_the_node_that_it_fills_best() {
    let fleet = fleet(&["a r1 ........", "b r1 #####...", "c r2 ####...."]);
    assert_eq!(devices(&seek(&fleet, (3, 1), 0).unwrap()), "b/5 b/6 b/7");
}

#[test]
fn a_gang_too_big_for_a_node_stays_in_one_rack() {
    let fleet = fleet(&["a r1 ....", "b r2 ....", "c r2 ..##", "d r1 #..."]);
    let placed = seek(&fleet, (2, 3), 0).unwrap();
    // r1 has room for 2 + 1 groups and r2 for 2 + 1: both hold it, and either is whole.
    let in_first = |device: &DeviceId| ["a", "d"].contains(&device.node.as_str());
    let racks: std::collections::BTreeSet<bool> = placed.devices.iter().map(in_first).collect();
    assert_eq!(racks.len(), 1, "{}", devices(&placed));
}

#[test]
fn a_rack_that_it_fills_goes_before_a_rack_with_more_room() {
    let fleet = fleet(&["a r1 ....", "b r1 ....", "c r2 ....", "d r2 ..##"]);
    assert_eq!(devices(&seek(&fleet, (1, 6), 3).unwrap()), "c/0 c/1 c/2 c/3 d/0 d/1");
}

#[test]
fn two_gangs_that_could_each_hold_half_do_not() {
    let mut fleet = fleet(&["a r1 ....", "b r1 ...."]);
    let first = seek(&fleet, (1, 6), 0).unwrap();
    assert_eq!(first.devices.len(), 6);
    fleet.hold(first.commitment(&"first".parse().unwrap(), Attempt(1))).unwrap();
    assert_eq!(seek(&fleet, (1, 6), 0).unwrap_err().reason(), Reason::WaitingForDevices);
}

#[test]
fn every_wait_has_its_reason_and_its_numbers() {
    let full = ["a r1 ##..", "b r1 .#x.", "c r2 .... !"];
    type Case<'a> = (&'a [&'a str], (u32, u32), Reason, &'a str);
    let cases: [Case<'_>; 8] = [
        (
            // Whole groups alone count: one on each of the first two, none on the others.
            &["a r1 ......", "b r1 ......", "c r2 ...", "d r2 ..#"],
            (4, 4),
            Reason::ExceedsCluster,
            "needs 16 gpu devices in groups of 4 on one node; the fleet has 18 and could hold 8; \
             17 free on 4 nodes, at most 6 on one; not eligible: 1 busy; would fit with 8 ranks",
        ),
        (
            &["a r1 ......", "b r1 ##....", "c r2 ..##", "d r2 ###."],
            (2, 7),
            Reason::WaitingForDevices,
            "needs 14 gpu devices in groups of 2 on one node; 13 free on 4 nodes, at most 6 on one; \
             not eligible: 7 busy; would fit with 12 ranks",
        ),
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
        let why = seek(&fleet(lines), size, 0).unwrap_err().explanation();
        assert_eq!((why.reason, why.message.as_str()), (reason, message));
    }
}

#[test]
fn a_gang_that_must_share_a_rack_waits_while_its_devices_are_scattered() {
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
