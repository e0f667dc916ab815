//! What a gang may ask for beside ranks: models in an order, a leader, sizes; and what a place
//! becomes: a plan, and what is held.

use drumline_cluster::{Device, Health, Node, Snapshot, Taint};
use drumline_mesh::Mesh;
use drumline_placement::{Constraints, JobPlan, Placed, Scoring, Seed, place, try_place};
use drumline_spec::{DeviceKind, Elastic, Gang, Parallelism, Toleration, TopologyRule};
use drumline_types::{Attempt, Bytes, Reason};

/// A node: its name, zone and rack, GPUs of a model with so much memory, CPU devices, and cores.
fn node(path: &str, (gpus, model, memory): (usize, &str, u64), cpus: usize, cores: u64) -> Node {
    let parts: Vec<&str> = path.split('/').collect();
    let [zone, rack, name] = parts[..] else { panic!("zone/rack/name is wanted: {path}") };
    let mut devices = vec![Device::new(DeviceKind::Gpu, model, Bytes(memory << 30)); gpus];
    devices.extend(vec![Device::new(DeviceKind::Cpu, "EPYC", Bytes(8 << 30)); cpus]);
    let mut node =
        Node::new(name.parse().unwrap(), devices).within("zone", zone).within("rack", rack);
    node.cpu_milli = cores * 1000;
    node.memory = Bytes(64 << 30);
    node
}

fn fleet(nodes: impl IntoIterator<Item = Node>) -> Snapshot {
    let mut fleet = Snapshot::new();
    for node in nodes {
        fleet.upsert_node(node);
    }
    fleet
}

fn gpus(ranks: u32) -> Gang {
    Gang { ranks, device: DeviceKind::Gpu, ..Gang::default() }
}

fn copies(data: u32) -> Parallelism {
    Parallelism { data, ..Parallelism::SINGLE }
}

fn put(fleet: &Snapshot, gang: &Gang) -> Result<Vec<String>, Reason> {
    let found = place(fleet, gang, copies(gang.ranks), &Constraints::default());
    found
        .map(|placed| placed.devices.iter().map(ToString::to_string).collect())
        .map_err(|misfit| misfit.reason())
}

fn whole(level: &str) -> TopologyRule {
    TopologyRule { ranks: 0, level: level.to_owned(), required: true }
}

#[test]
fn models_are_tried_in_the_order_of_preference_and_else_the_smallest_first() {
    let fleet = fleet([
        node("z/r1/a", (4, "H100", 80), 0, 0),
        node("z/r1/b", (4, "A100", 40), 0, 0),
        node("z/r1/c", (8, "B200", 180), 0, 0),
    ]);
    assert_eq!(put(&fleet, &gpus(1)).unwrap(), ["b/0"]);
    let of = |models: &[&str], ranks| Gang {
        models: models.iter().map(|model| (*model).to_owned()).collect(),
        ..gpus(ranks)
    };
    assert_eq!(put(&fleet, &of(&["H100", "A100"], 1)).unwrap(), ["a/0"]);
    assert_eq!(put(&fleet, &of(&["A100", "H100"], 1)).unwrap(), ["b/0"]);
    // Never of two models; the first that holds it.
    assert_eq!(put(&fleet, &of(&["H100", "B200"], 5)).unwrap()[0], "c/0");
    assert_eq!(put(&fleet, &of(&["H100", "A100"], 5)), Err(Reason::ExceedsCluster));
    assert_eq!(put(&fleet, &of(&["L4"], 1)), Err(Reason::NoMatchingDevice));
    // An elastic gang takes the model on which it is as big as it wants, else the biggest.
    let elastic = |models: &[&str], ranks, most| Gang {
        elastic: Some(Elastic { least: 1, most, step: 1 }),
        ..of(models, ranks)
    };
    assert_eq!(put(&fleet, &elastic(&["H100", "B200"], 4, 8)).unwrap().len(), 4);
    assert_eq!(put(&fleet, &elastic(&["H100", "B200"], 6, 8)).unwrap().len(), 8);
    assert_eq!(
        put(&fleet, &elastic(&["H100", "A100"], 6, 8)).unwrap(),
        ["a/0", "a/1", "a/2", "a/3"]
    );
}

#[test]
fn what_mig_has_divided_is_had_by_name_alone() {
    let instance = "A100-SXM4-80GB-MIG-1g.10gb";
    let mut mixed = node("z/r1/a", (1, "A100-SXM4-80GB", 80), 0, 0);
    mixed.devices.extend(vec![Device::new(DeviceKind::Gpu, instance, Bytes(10 << 30)); 7]);
    let fleet = fleet([mixed]);
    // The smallest would come first.
    assert_eq!(put(&fleet, &gpus(1)).unwrap(), ["a/0"]);
    assert_eq!(put(&fleet, &gpus(2)), Err(Reason::ExceedsCluster));
    let named = Gang { models: vec![instance.to_owned()], ..gpus(7) };
    assert_eq!(put(&fleet, &named).unwrap().len(), 7);
}

#[test]
fn an_elastic_gang_changes_its_copies_and_never_splits_one() {
    let fleet = fleet([node("z/r1/a", (7, "H100", 80), 0, 0)]);
    let split = Parallelism { tensor: 2, pipeline: 1, data: 4 };
    let elastic = Some(Elastic { least: 2, most: 8, step: 1 });
    let gang = Gang { elastic, ..gpus(8) };
    let at_most = |most| {
        let bounds = Constraints { most, ..Constraints::default() };
        try_place(&fleet, &gang, split, &bounds).map(|p| (p.devices.len(), p.split))
    };
    assert_eq!(at_most(None), Some((6, Parallelism { data: 3, ..split })));
    assert_eq!(at_most(Some(5)), Some((4, Parallelism { data: 2, ..split })));
    assert_eq!(at_most(Some(1)), None);
    // The size that it wants is legal, whatever the step, and keeps the split that it came with.
    let odd = Gang { elastic: Some(Elastic { least: 4, most: 8, step: 4 }), ..gpus(6) };
    let placed = try_place(&fleet, &odd, Parallelism { data: 3, ..split }, &Constraints::default());
    let placed = placed.unwrap();
    assert_eq!((placed.devices.len(), placed.split.data), (6, 3));
}

#[test]
fn what_cannot_be_is_brought_into_what_can() {
    let fleet = fleet([node("z/r1/a", (2, "H100", 80), 0, 0)]);
    let none = Gang { ranks: 0, node_group: 0, share_milli: 0, ..gpus(1) };
    assert_eq!(put(&fleet, &none).unwrap(), ["a/0"]);
    let more = Gang { share_milli: 2_000, node_group: 9, ..gpus(2) };
    assert_eq!(put(&fleet, &more).unwrap(), ["a/0", "a/1"]);
}

#[test]
fn parts_of_devices_go_where_the_least_is_left_over() {
    let mut fleet = fleet([node("z/r1/a", (3, "H100", 80), 0, 0)]);
    let hold = |fleet: &mut Snapshot, name: &str, gang: &Gang| {
        let placed = place(fleet, gang, copies(gang.ranks), &Constraints::default()).unwrap();
        fleet.hold(placed.commitment(&name.parse().unwrap(), Attempt(1))).unwrap();
        placed.devices.iter().map(|device| device.index).collect::<Vec<_>>()
    };
    let share = |share_milli, ranks| Gang { share_milli, node_group: ranks, ..gpus(ranks) };
    assert_eq!(hold(&mut fleet, "one", &share(600, 1)), [0]);
    assert_eq!(hold(&mut fleet, "two", &share(700, 1)), [1]);
    // 400, 300 and 1000 are left.
    assert_eq!(hold(&mut fleet, "three", &share(350, 1)), [0]);
    // Several of one gang may share a device: 300 and 1000 are left.
    assert_eq!(hold(&mut fleet, "four", &share(300, 3)), [1, 2, 2]);
    assert_eq!(put(&fleet, &share(500, 1)), Err(Reason::WaitingForDevices));
    assert_eq!(put(&fleet, &share(400, 1)).unwrap(), ["a/2"]);
}

#[test]
fn a_leader_is_beside_its_workers_or_as_near_as_can_be() {
    let led = |ranks, rules: &[&str]| Gang {
        leader: Some(DeviceKind::Cpu),
        topology: rules.iter().map(|level| whole(level)).collect(),
        ..gpus(ranks)
    };
    let h100 = (4, "H100", 80);
    // On the node of the workers, if it has a CPU device.
    let near = fleet([node("z1/r1/a", h100, 1, 0), node("z1/r1/b", (0, "", 0), 4, 0)]);
    assert_eq!(put(&near, &led(5, &[])).unwrap(), ["a/4", "a/0", "a/1", "a/2", "a/3"]);
    // Else in the rack, else in the zone, else anywhere; where there are several, the fullest.
    let mut apart = fleet([
        node("z1/r1/a", h100, 0, 0),
        node("z1/r1/b", (0, "", 0), 2, 0),
        node("z1/r1/c", (0, "", 0), 1, 0),
        node("z1/r2/d", (0, "", 0), 1, 0),
        node("z2/r3/e", (0, "", 0), 1, 0),
    ]);
    for (leader, rules, gone) in [
        ("c/0", &[][..], None),
        ("b/0", &["rack"], Some("c")),
        ("d/0", &[], Some("b")),
        ("d/0", &["zone"], None),
        ("e/0", &[], Some("d")),
    ] {
        if let Some(gone) = gone {
            apart.remove_node(&gone.parse().unwrap());
        }
        assert_eq!(put(&apart, &led(5, rules)).unwrap()[0], leader, "{rules:?}");
    }
    // A rule for the whole gang binds the leader.
    assert_eq!(put(&apart, &led(5, &["zone"])), Err(Reason::WaitingForDevices));
    assert_eq!(put(&apart, &led(5, &["rack"])), Err(Reason::WaitingForDevices));
    assert_eq!(put(&apart, &led(5, &["node"])), Err(Reason::WaitingForDevices));
    apart.remove_node(&"e".parse().unwrap());
    assert_eq!(put(&apart, &led(5, &[])), Err(Reason::WaitingForDevices));
}

#[test]
fn workers_go_where_their_leader_can_be() {
    let led = |rules: &[&str]| Gang {
        leader: Some(DeviceKind::Cpu),
        topology: rules.iter().map(|level| whole(level)).collect(),
        ..gpus(3)
    };
    // The fullest node, rack and zone would be taken, but only the other has a CPU device.
    let fleet = fleet([
        node("z1/r1/a", (2, "H100", 80), 0, 0),
        node("z1/r1/b", (3, "H100", 80), 0, 0),
        node("z2/r2/c", (8, "H100", 80), 2, 0),
        node("z2/r2/d", (8, "H100", 80), 0, 0),
    ]);
    for rules in [&["node"][..], &["rack"], &["zone"], &["rack", "zone"]] {
        assert_eq!(put(&fleet, &led(rules)).unwrap(), ["c/8", "c/0", "c/1"], "{rules:?}");
    }
    // As a wish, or without one, the workers stay and the leader is elsewhere.
    assert_eq!(put(&fleet, &led(&[])).unwrap()[1..], ["a/0", "a/1"]);
    // Of a leader alone there is nothing to be near to.
    let alone = Gang { leader: Some(DeviceKind::Cpu), ..gpus(1) };
    assert_eq!(put(&fleet, &alone).unwrap(), ["c/8"]);
}

#[test]
fn a_leader_of_the_kind_of_its_workers_gets_another_device() {
    let fleet = fleet([node("z/r/a", (3, "H100", 80), 0, 0)]);
    let led = |ranks| Gang { leader: Some(DeviceKind::Gpu), ..gpus(ranks) };
    let mut devices = put(&fleet, &led(3)).unwrap();
    devices.sort();
    assert_eq!(devices, ["a/0", "a/1", "a/2"]);
    assert_eq!(put(&fleet, &led(4)), Err(Reason::WaitingForDevices));
}

#[test]
fn cores_and_memory_bind_ranks_and_leader_alike() {
    let with = |ranks, cores: u64, gib: u64, leader| Gang {
        cpu_milli: cores * 1000,
        memory: Bytes(gib << 30),
        leader,
        ..gpus(ranks)
    };
    let one = |cores| fleet([node("z/r/a", (4, "H100", 80), 2, cores)]);
    assert_eq!(put(&one(4), &with(4, 1, 16, None)).unwrap().len(), 4);
    assert_eq!(put(&one(3), &with(4, 1, 0, None)), Err(Reason::WaitingForDevices));
    assert_eq!(put(&one(4), &with(4, 1, 17, None)), Err(Reason::WaitingForDevices));
    // Four workers and a leader need five cores.
    assert_eq!(put(&one(4), &with(5, 1, 0, Some(DeviceKind::Cpu))), Err(Reason::WaitingForDevices));
    assert_eq!(put(&one(5), &with(5, 1, 0, Some(DeviceKind::Cpu))).unwrap().len(), 5);
    // The fullest node by devices has too few cores: the other is taken.
    let two = fleet([node("z/r/a", (2, "H100", 80), 0, 1), node("z/r/b", (4, "H100", 80), 0, 8)]);
    let pair = Gang { node_group: 2, ..with(2, 1, 0, None) };
    assert_eq!(put(&two, &pair).unwrap(), ["b/0", "b/1"]);
    // So it is with racks, under every scoring: the one without cores is passed over.
    let racks =
        fleet([node("z/r1/a", (3, "H100", 80), 0, 3), node("z/r2/b", (3, "H100", 80), 0, 0)]);
    let gang = Gang { topology: vec![whole("rack")], ..with(2, 1, 0, None) };
    for scoring in [Scoring::Drumline, Scoring::DotProduct, Scoring::FirstFit, Scoring::Random] {
        for seed in 0..8 {
            let bounds = Constraints { scoring, seed: Seed(seed), ..Constraints::default() };
            let placed = place(&racks, &gang, copies(2), &bounds).unwrap();
            assert_eq!(placed.devices[0].node.as_str(), "a", "{scoring:?} {seed}");
        }
    }
    let spread = with(5, 1, 0, None);
    assert_eq!(put(&two, &spread).unwrap().len(), 5);
    assert_eq!(put(&two, &with(6, 1, 0, None)), Err(Reason::WaitingForDevices));
}

#[test]
fn wishes_are_given_up_the_last_first() {
    let wish = |level: &str| TopologyRule { required: false, ..whole(level) };
    let h100 = (4, "H100", 80);
    let fleet = fleet([
        node("z1/r1/a", h100, 0, 0),
        node("z1/r2/b", h100, 0, 0),
        node("z2/r3/c", (5, "H100", 80), 0, 0),
        node("z2/r3/d", (5, "H100", 80), 0, 0),
    ]);
    let zone_of = |gang: &Gang| {
        let devices = put(&fleet, gang).unwrap();
        let in_first = devices.iter().filter(|d| d.starts_with('a') || d.starts_with('b')).count();
        (in_first, devices.len() - in_first)
    };
    let asks = |ranks, rules: &[&str]| Gang {
        topology: rules.iter().map(|level| wish(level)).collect(),
        ..gpus(ranks)
    };
    // The innermost domain that holds it would do without a wish too: a rack goes before a zone.
    assert_eq!(zone_of(&asks(8, &["rack"])), (0, 8));
    // A wish that cannot be had is given up; the others are kept.
    assert_eq!(zone_of(&asks(10, &["zone", "node"])), (0, 10));
    assert_eq!(put(&fleet, &asks(18, &["zone", "node"])).unwrap().len(), 18);
    let nowhere = asks(2, &["pod"]);
    assert_eq!(put(&fleet, &nowhere).unwrap().len(), 2, "a wish for a level that nobody names");
    let required = Gang { topology: vec![whole("pod")], ..gpus(2) };
    let misfit = place(&fleet, &required, copies(2), &Constraints::default()).unwrap_err();
    assert_eq!(
        (misfit.reason(), misfit.to_string().as_str()),
        (Reason::ExceedsCluster, "needs 2 gpu devices; no node says which pod it is in")
    );
}

#[test]
fn every_rank_of_a_plan_has_its_place_in_the_mesh() {
    let fleet = fleet([node("z/r/a", (8, "H100", 80), 0, 0)]);
    let split = Parallelism { tensor: 2, pipeline: 2, data: 2 };
    let gang = Gang { node_group: 2, ..gpus(8) };
    let placed: Placed = place(&fleet, &gang, split, &Constraints::default()).unwrap();
    let job = "job".parse().unwrap();
    let plan = JobPlan::new(&job, Attempt(3), &gang, placed.clone());
    assert_eq!((&plan.job, plan.attempt, plan.split), (&job, Attempt(3), split));
    let mesh = Mesh::new(split);
    for (rank, assignment) in (0u32..).zip(&plan.assignments) {
        assert_eq!(assignment.rank.0, rank);
        assert_eq!(assignment.coords, mesh.coords(rank));
        assert_eq!(assignment.device, placed.devices[rank as usize]);
    }
    assert_eq!(plan.commitment(), placed.commitment(&job, Attempt(3)));
    assert_eq!(plan.commitment().devices, placed.devices);
}

#[test]
fn a_gang_that_is_kept_from_a_domain_by_its_rules_is_kept_from_it_under_every_scoring() {
    let fleet = fleet([
        node("z1/r1/a", (4, "H100", 80), 0, 0),
        node("z1/r2/b", (4, "H100", 80), 0, 0),
        node("z2/r3/c", (4, "H100", 80), 0, 0),
        node("z2/r3/d", (4, "H100", 80), 0, 0),
    ]);
    for scoring in [Scoring::Drumline, Scoring::Random, Scoring::FirstFit, Scoring::BestFit] {
        for seed in 0..8 {
            let gang = Gang { topology: vec![whole("rack")], ..gpus(6) };
            let bounds = Constraints { scoring, seed: Seed(seed), ..Constraints::default() };
            let placed = place(&fleet, &gang, copies(6), &bounds).unwrap();
            assert!(placed.devices.iter().all(|d| ["c", "d"].contains(&d.node.as_str())));
        }
    }
}

#[test]
fn no_more_copies_are_taken_than_are_allowed_now() {
    let fleet = fleet([node("z1/r1/a", (8, "H100", 80), 0, 0)]);
    let gang = Gang { elastic: Some(Elastic { least: 2, most: 8, step: 2 }), ..gpus(8) };
    let split = Parallelism { data: 8, ..Parallelism::SINGLE };
    for (most, expected) in [(Some(4), 4), (Some(5), 4), (Some(8), 8), (None, 8)] {
        let constraints = Constraints { most, ..Constraints::default() };
        let placed = place(&fleet, &gang, split, &constraints).unwrap();
        assert_eq!(
            (placed.devices.len(), placed.split.data),
            (expected, expected as u32),
            "{most:?}"
        );
    }
    // The wanted size is one of them, though no step leads to it.
    let odd = Gang { elastic: Some(Elastic { least: 2, most: 8, step: 4 }), ..gpus(6) };
    let split = Parallelism { data: 6, ..Parallelism::SINGLE };
    for (most, expected) in [(Some(5), 4), (Some(6), 6), (Some(7), 6), (Some(8), 8)] {
        let constraints = Constraints { most, ..Constraints::default() };
        let placed = place(&fleet, &odd, split, &constraints).unwrap();
        assert_eq!(placed.devices.len(), expected, "{most:?}");
    }
}

#[test]
fn what_has_failed_since_counts_as_what_may_come_back() {
    let mut four = node("z1/r1/a", (4, "H100", 80), 0, 0);
    let mut fleet = fleet([four.clone()]);
    for device in &mut four.devices[..2] {
        device.health = Health::Failed("Xid 79".to_owned());
    }
    fleet.upsert_node(four);
    let together = Gang { node_group: 3, ..gpus(3) };
    assert_eq!(put(&fleet, &together), Err(Reason::NodesNotReady), "two are left on the node");
}

#[test]
fn workers_that_would_just_fit_are_not_what_is_missing() {
    let fleet = fleet([node("z1/r1/a", (4, "H100", 80), 0, 0)]);
    let gang = Gang { leader: Some(DeviceKind::Cpu), ..gpus(5) };
    let split = Parallelism { data: 5, ..Parallelism::SINGLE };
    let misfit = place(&fleet, &gang, split, &Constraints::default()).unwrap_err();
    assert!(misfit.leader && !misfit.short_of_cpu_or_memory, "{misfit:?}");
    assert!(misfit.to_string().contains("none for the leader"), "{misfit}");
}

#[test]
fn a_wish_alone_is_granted_where_it_can_be() {
    // The fewest nodes are 3 + 1; pairs on a node are 2 + 2.
    let sizes = [("z1/r1/a", 3), ("z1/r1/b", 1), ("z1/r1/c", 2), ("z1/r1/d", 2)];
    let fleet = fleet(sizes.map(|(path, gpus)| node(path, (gpus, "H100", 80), 0, 0)));
    let pairs = |required| Gang {
        topology: vec![TopologyRule { ranks: 2, level: "node".to_owned(), required }],
        ..gpus(4)
    };
    let together = |gang: &Gang| {
        let placed = put(&fleet, gang).unwrap();
        placed.chunks(2).all(|pair| pair[0].split('/').next() == pair[1].split('/').next())
    };
    assert!(together(&pairs(true)));
    assert!(together(&pairs(false)));
    assert!(!together(&gpus(4)), "nobody asked for pairs");
}

#[test]
fn nodes_that_name_no_rack_are_filled_beside_racks() {
    let bare = |name: &str| {
        let device = Device::new(DeviceKind::Gpu, "H100", Bytes(80 << 30));
        Node::new(name.parse().unwrap(), vec![device; 2]).within("zone", "z1")
    };
    let fleet = fleet([node("z1/r1/a", (2, "H100", 80), 0, 0), bare("x"), bare("y"), bare("z")]);
    for ranks in [2u32, 3, 4, 6, 8] {
        for rules in [&[][..], &["zone"]] {
            let rules = rules.iter().map(|level| whole(level)).collect();
            let gang = Gang { node_group: 2, topology: rules, ..gpus(ranks) };
            let mut placed = put(&fleet, &gang).unwrap();
            placed.sort();
            placed.dedup();
            assert_eq!(placed.len(), ranks as usize, "{placed:?}");
        }
    }
    let nine = Gang { node_group: 2, ..gpus(9) };
    assert_eq!(put(&fleet, &nine), Err(Reason::ExceedsCluster));
}

#[test]
fn groups_stay_on_their_nodes_and_the_smaller_one_comes_last() {
    let sized = |sizes: &[(&str, usize)]| {
        let one = |&(name, gpus): &(&str, usize)| {
            node(&format!("z1/r1/{name}"), (gpus, "H100", 80), 0, 0)
        };
        fleet(sizes.iter().map(one))
    };
    let pairs = |ranks| Gang { node_group: 2, ..gpus(ranks) };
    let nodes = |fleet: &Snapshot, ranks| -> Vec<String> {
        let placed = put(fleet, &pairs(ranks)).unwrap();
        placed.iter().map(|device| device.split_once('/').unwrap().0.to_owned()).collect()
    };
    // By name, but for the one with the smaller group.
    assert_eq!(nodes(&sized(&[("a", 2), ("b", 2), ("c", 2)]), 6), ["a", "a", "b", "b", "c", "c"]);
    assert_eq!(nodes(&sized(&[("c", 2), ("b", 2), ("a", 2)]), 6), ["a", "a", "b", "b", "c", "c"]);
    assert_eq!(nodes(&sized(&[("a", 1), ("b", 2)]), 3), ["b", "b", "a"]);
    assert_eq!(nodes(&sized(&[("a", 1), ("b", 2), ("c", 2)]), 5), ["b", "b", "c", "c", "a"]);
    // No node is left for it: it goes beside a whole one, and that one comes last.
    assert_eq!(nodes(&sized(&[("a", 3), ("b", 2)]), 5), ["b", "b", "a", "a", "a"]);
    assert_eq!(nodes(&sized(&[("a", 2), ("b", 5)]), 7), ["a", "a", "b", "b", "b", "b", "b"]);
}

#[test]
fn a_leader_gets_a_device_of_its_kind_that_takes_its_work() {
    let led = Gang { leader: Some(DeviceKind::Cpu), ..gpus(3) };
    let roomy = node("z1/r1/a", (4, "H100", 80), 1, 0);
    assert_eq!(put(&fleet([roomy.clone()]), &led).unwrap(), ["a/4", "a/0", "a/1"]);
    // A rule for runs of ranks does not bind the leader, who is in none.
    let pairs = TopologyRule { ranks: 2, level: "node".to_owned(), required: true };
    let apart = fleet([node("z1/r1/a", (2, "H100", 80), 0, 0), node("z1/r1/b", (0, "", 0), 1, 0)]);
    let paired = Gang { topology: vec![pairs], ..led.clone() };
    assert_eq!(put(&apart, &paired).unwrap(), ["b/0", "a/0", "a/1"]);
    // Not a GPU that is left over, and not a CPU device on a node that refuses the gang.
    let alone = node("z1/r1/a", (4, "H100", 80), 0, 0);
    let mut closed = node("z1/r1/b", (0, "", 0), 4, 0);
    closed.taints.push(Taint { key: "reserved".to_owned(), value: "x".to_owned() });
    let both = fleet([alone, closed]);
    assert_eq!(put(&both, &led), Err(Reason::WaitingForDevices));
    let tolerations = vec![Toleration { key: "reserved".to_owned(), value: None }];
    let tolerant = Gang { tolerations, ..led };
    assert_eq!(put(&both, &tolerant).unwrap(), ["b/0", "a/0", "a/1"]);
}
