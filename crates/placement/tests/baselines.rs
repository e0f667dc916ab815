//! The published rules for the choice of a node, each on a fleet where it is told from the others.

use drumline_cluster::{Commitment, Device, Node, Slice, Snapshot};
use drumline_placement::{Constraints, Scoring, place};
use drumline_spec::{DeviceKind, Gang, Parallelism};
use drumline_types::{Attempt, Bytes, DeviceId};

/// Nodes of four devices each, of which jobs hold some: for each node the thousandths that each of
/// its jobs takes.
fn fleet(nodes: &[(&str, &[u32])]) -> Snapshot {
    let mut fleet = Snapshot::new();
    for (name, shares) in nodes {
        let device = Device::new(DeviceKind::Gpu, "H100", Bytes(80 << 30));
        fleet.upsert_node(Node::new(name.parse().unwrap(), vec![device; 4]));
        for (index, share_milli) in (0u32..).zip(shares.iter().copied()) {
            fleet
                .hold(Commitment {
                    job: format!("{name}-{index}").parse().unwrap(),
                    attempt: Attempt(1),
                    devices: vec![DeviceId { node: name.parse().unwrap(), index }],
                    slice: Slice { share_milli, ..Slice::default() },
                })
                .unwrap();
        }
    }
    fleet
}

fn chosen(fleet: &Snapshot, scoring: Scoring, ranks: u32, share_milli: u32) -> String {
    let gang =
        Gang { ranks, node_group: ranks, share_milli, device: DeviceKind::Gpu, ..Gang::default() };
    let split = Parallelism { data: ranks, ..Parallelism::SINGLE };
    let constraints = Constraints { scoring, ..Constraints::default() };
    place(fleet, &gang, split, &constraints).unwrap().devices[0].node.to_string()
}

#[test]
fn the_least_product_is_where_least_is_left() {
    let fleet = fleet(&[("idle", &[]), ("half", &[1000, 1000]), ("parts", &[500, 500, 500])]);
    assert_eq!(chosen(&fleet, Scoring::DotProduct, 1, 1000), "half");
    assert_eq!(chosen(&fleet, Scoring::DotProduct, 1, 500), "half");
}

#[test]
fn packing_takes_devices_in_use_then_nodes_in_use_then_idle_ones() {
    let all = fleet(&[("idle", &[]), ("half", &[1000, 1000]), ("parts", &[500])]);
    assert_eq!(chosen(&all, Scoring::GpuPacking, 1, 500), "parts");
    assert_eq!(chosen(&all, Scoring::GpuPacking, 1, 1000), "half");
    let idle = fleet(&[("idle", &[]), ("full", &[1000; 4])]);
    assert_eq!(chosen(&idle, Scoring::GpuPacking, 1, 500), "idle");
}

#[test]
fn fragmentation_grows_least_where_the_typical_gang_could_not_run_anyway() {
    // Gangs of four are typical: two free devices are of no use to them, four are.
    let mut all = fleet(&[("idle", &[]), ("half", &[1000, 1000]), ("full", &[])]);
    let devices = (0..4).map(|index| DeviceId { node: "full".parse().unwrap(), index }).collect();
    all.commit(&"typical".parse().unwrap(), Attempt(1), devices).unwrap();
    assert_eq!(chosen(&all, Scoring::FragmentationGradient, 1, 1000), "half");
    // A part that is left over is taken before a device is opened.
    let parts = fleet(&[("idle", &[]), ("parts", &[600, 1000, 1000, 1000])]);
    assert_eq!(chosen(&parts, Scoring::FragmentationGradient, 1, 400), "parts");
}
