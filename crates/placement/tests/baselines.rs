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
fn packing_takes_a_node_in_use_before_a_smaller_idle_one() {
    let mut all = fleet(&[("large", &[1000])]);
    let device = Device::new(DeviceKind::Gpu, "H100", Bytes(80 << 30));
    all.upsert_node(Node::new("small".parse().unwrap(), vec![device; 2]));
    assert_eq!(chosen(&all, Scoring::GpuPacking, 1, 1000), "large");
    assert_eq!(chosen(&all, Scoring::GpuPacking, 2, 1000), "large");
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

/// What one job of a node takes: thousandths of a device, cores, and GiB.
type Held = (u32, u64, u64);

const CORES: u64 = 16;
const GIB: u64 = 16;

fn ask(share_milli: u32, cores: u64, gib: u64) -> Slice {
    Slice { share_milli, cpu_milli: cores * 1000, memory: Bytes(gib << 30) }
}

/// As [`fleet`], with cores and memory.
fn full_fleet(nodes: &[Vec<Held>]) -> Snapshot {
    let mut fleet = Snapshot::new();
    for (number, held) in nodes.iter().enumerate() {
        let name = format!("n{number}");
        let device = Device::new(DeviceKind::Gpu, "H100", Bytes(80 << 30));
        let mut node = Node::new(name.parse().unwrap(), vec![device; 4]);
        node.cpu_milli = CORES * 1000;
        node.memory = Bytes(GIB << 30);
        fleet.upsert_node(node);
        for (index, &(share, cores, gib)) in (0u32..).zip(held) {
            let devices = vec![DeviceId { node: name.parse().unwrap(), index }];
            let (job, slice) = (format!("{name}-{index}").parse().unwrap(), ask(share, cores, gib));
            fleet.hold(Commitment { job, attempt: Attempt(1), devices, slice }).unwrap();
        }
    }
    fleet
}

/// What is left of a node: devices, cores, GiB.
#[derive(Clone)]
struct Rest(Vec<u32>, u64, u64);

impl Rest {
    fn of(held: &[Held]) -> Self {
        let mut devices: Vec<u32> =
            (0..4).map(|index| 1000 - held.get(index).map_or(0, |held| held.0)).collect();
        devices.sort_unstable();
        let cores: u64 = held.iter().map(|held| held.1).sum();
        let gib: u64 = held.iter().map(|held| held.2).sum();
        Self(devices, CORES - cores, GIB - gib)
    }

    fn fits(&self, (share, cores, gib): Held, ranks: u32) -> bool {
        let many = u64::from(ranks);
        ranks_on(&self.0, share) >= ranks && self.1 >= cores * many && self.2 >= gib * many
    }

    fn wasted(&self, ask: Held, ranks: u32) -> i64 {
        let useful = self.fits(ask, ranks);
        self.0.iter().filter(|&&left| !useful || left < ask.0).map(|&left| i64::from(left)).sum()
    }

    fn take(&mut self, ask: Held, ranks: u32) {
        let mut left = ranks;
        for device in &mut self.0 {
            while left > 0 && *device >= ask.0 {
                *device -= ask.0;
                left -= 1;
            }
        }
        self.1 -= ask.1 * u64::from(ranks);
        self.2 -= ask.2 * u64::from(ranks);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 1000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn cores_and_memory_count_in_every_rule(
        nodes in prop::collection::vec(prop::collection::vec(
            (prop::sample::select(vec![250u32, 400, 1000]), 0u64..4, 0u64..4), 0..5), 2..6),
        ranks in 1u32..4,
        wanted in (prop::sample::select(vec![300u32, 500, 1000]), 0u64..5, 0u64..5),
        gradient in any::<bool>(),
    ) {
        let nodes: Vec<Vec<Held>> =
            nodes.into_iter().map(|held| held[..held.len().min(4)].to_vec()).collect();
        let all = full_fleet(&nodes);
        let mut typical: Vec<(Held, u32)> = vec![(wanted, ranks)];
        typical.extend(nodes.iter().flatten().map(|&held| (held, 1)));
        let cost = |rest: &Rest| -> i64 {
            if gradient {
                let waste = |rest: &Rest| -> i64 {
                    typical.iter().map(|&(ask, ranks)| rest.wasted(ask, ranks)).sum()
                };
                let before = waste(rest);
                let mut after = rest.clone();
                after.take(wanted, ranks);
                waste(&after) - before
            } else {
                let part = |amount: u64, of: u64| amount as f64 / of as f64;
                let ranks = u64::from(ranks);
                let left: u64 = rest.0.iter().map(|&left| u64::from(left)).sum();
                let devices = part(left, 4000) * part(u64::from(wanted.0) * ranks, 4000);
                let cores = part(rest.1, CORES) * part(wanted.1 * ranks, CORES);
                ((devices + cores) * 1e6) as i64
            }
        };
        let rests: Vec<Rest> = nodes.iter().map(|held| Rest::of(held)).collect();
        let fitting = rests.iter().filter(|rest| rest.fits(wanted, ranks));
        let Some(least) = fitting.map(&cost).min() else { return Ok(()) };
        let slice = ask(wanted.0, wanted.1, wanted.2);
        let gang = Gang {
            ranks,
            node_group: ranks,
            share_milli: slice.share_milli,
            cpu_milli: slice.cpu_milli,
            memory: slice.memory,
            device: DeviceKind::Gpu,
            ..Gang::default()
        };
        let scoring =
            if gradient { Scoring::FragmentationGradient } else { Scoring::DotProduct };
        let split = Parallelism { data: ranks, ..Parallelism::SINGLE };
        let constraints = Constraints { scoring, ..Constraints::default() };
        let placed = place(&all, &gang, split, &constraints).unwrap();
        let taken: usize = placed.devices[0].node.as_str()[1..].parse().unwrap();
        prop_assert!(rests[taken].fits(wanted, ranks));
        prop_assert_eq!(cost(&rests[taken]), least, "n{} is taken", taken);
    }
}
