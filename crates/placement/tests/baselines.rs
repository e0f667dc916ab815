//! The published rules for the choice of a node, each on a fleet where it is told from the others.

use drumline_cluster::{Commitment, Device, Node, NodeState, Slice, Snapshot};
use drumline_placement::{Constraints, Scoring, place};
use drumline_spec::{DeviceKind, Gang, Parallelism};
use drumline_types::{Attempt, Bytes, DeviceId};
use proptest::prelude::*;

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

/// What each device of a node has left, for a gang that may use all of it.
fn left(state: &NodeState) -> Vec<u32> {
    let mut left: Vec<u32> = (0..4).map(|index| state.left_milli(index)).collect();
    left.sort_unstable();
    left
}

fn ranks_on(left: &[u32], share: u32) -> u32 {
    left.iter().map(|left| left / share).sum()
}

/// What is of no use to `ranks` ranks of a share.
fn fragments(left: &[u32], share: u32, ranks: u32) -> i64 {
    let useful = ranks_on(left, share) >= ranks;
    left.iter().filter(|&&left| !useful || left < share).map(|&left| i64::from(left)).sum()
}

/// The cost of a node, from the published rules.
fn cost(fleet: &Snapshot, state: &NodeState, scoring: Scoring, share: u32, ranks: u32) -> i64 {
    let mut left = left(state);
    let sum: u32 = left.iter().sum();
    match scoring {
        Scoring::DotProduct => {
            let whole = 4_000.0;
            let part = f64::from(sum) / whole * (f64::from(share * ranks) / whole);
            (part * 1e6) as i64
        }
        Scoring::GpuPacking => {
            let in_use: u32 = left.iter().filter(|&&l| l < 1000).map(|l| l / share).sum();
            let idle = left.iter().all(|&left| left == 1000);
            let rank = i64::from(in_use < ranks) + i64::from(in_use < ranks && idle);
            rank * 1_000_000 + i64::from(sum)
        }
        _ => {
            let mut typical = vec![(share, ranks)];
            for held in fleet.commitments() {
                typical.push((held.slice.share_milli, held.devices.len() as u32));
            }
            let all = |left: &[u32]| -> i64 {
                typical.iter().map(|&(share, ranks)| fragments(left, share, ranks)).sum()
            };
            let before = all(&left);
            let mut ranks = ranks;
            for device in &mut left {
                while ranks > 0 && *device >= share {
                    *device -= share;
                    ranks -= 1;
                }
            }
            all(&left) - before
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 400,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_node_that_is_taken_costs_least(
        shares in prop::collection::vec(
            prop::collection::vec(prop::sample::select(vec![250u32, 400, 600, 1000]), 0..5), 1..6),
        ranks in 1u32..4,
        share in prop::sample::select(vec![300u32, 500, 1000, 1000]),
        which in 0usize..3,
    ) {
        const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
        let scoring =
            [Scoring::DotProduct, Scoring::GpuPacking, Scoring::FragmentationGradient][which];
        let nodes: Vec<(&str, &[u32])> =
            NAMES.into_iter().zip(shares.iter().map(|held| &held[..held.len().min(4)])).collect();
        let all = fleet(&nodes);
        let fits = |state: &&NodeState| ranks_on(&left(state), share) >= ranks;
        let of = |state: &NodeState| cost(&all, state, scoring, share, ranks);
        let Some(least) = all.nodes().filter(fits).map(of).min() else { return Ok(()) };
        let taken = chosen(&all, scoring, ranks, share);
        let taken = all.node(&taken.parse().unwrap()).unwrap();
        prop_assert_eq!(of(taken), least, "{} is taken", taken.node().name);
    }
}

#[test]
fn nodes_of_a_wide_gang_are_filled_cheapest_first() {
    let all = fleet(&[("idle", &[]), ("half", &[1000, 1000]), ("most", &[1000, 1000, 1000])]);
    let gang = Gang { ranks: 6, device: DeviceKind::Gpu, ..Gang::default() };
    let split = Parallelism { data: 6, ..Parallelism::SINGLE };
    for (scoring, first) in
        [(Scoring::DotProduct, "most"), (Scoring::GpuPacking, "most"), (Scoring::BestFit, "most")]
    {
        let constraints = Constraints { scoring, ..Constraints::default() };
        let placed = place(&all, &gang, split, &constraints).unwrap();
        let mut nodes: Vec<&str> = placed.devices.iter().map(|d| d.node.as_str()).collect();
        nodes.dedup();
        assert_eq!(nodes, [first, "half", "idle"], "{scoring:?}");
    }
}

#[test]
fn a_node_with_fewer_cores_left_has_the_lesser_product() {
    let mut all = fleet(&[("few", &[]), ("many", &[])]);
    for (name, cores) in [("few", 100), ("many", 100)] {
        let mut node = all.node(&name.parse().unwrap()).unwrap().node().clone();
        node.cpu_milli = cores * 1000;
        node.external.cpu_milli = if name == "few" { 90_000 } else { 0 };
        all.upsert_node(node);
    }
    let gang = Gang { cpu_milli: 4_000, device: DeviceKind::Gpu, ..Gang::default() };
    let constraints = Constraints { scoring: Scoring::DotProduct, ..Constraints::default() };
    let placed = place(&all, &gang, Parallelism::SINGLE, &constraints).unwrap();
    assert_eq!(placed.devices[0].node.as_str(), "few");
}
