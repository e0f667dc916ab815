//! The tree of queues: limits on the way to the root, lending, shares, and what is borrowed.

use drumline_queue::{Charge, Closed, QueueId, Tree};
use drumline_spec::{DeviceKind, QueueSpec};
use drumline_types::{QueueName, Timestamp};
use proptest::prelude::*;

const T: Timestamp = Timestamp(0);

fn queue(name: &str, parent: Option<&str>, quota: Option<u32>) -> QueueSpec {
    let mut spec = QueueSpec::open(name.parse().unwrap());
    spec.parent = parent.map(|parent| parent.parse().unwrap());
    spec.quota.extend(quota.map(|devices| ("gpu".to_owned(), devices)));
    spec
}

fn name(name: &str) -> QueueName {
    name.parse().unwrap()
}

/// A fleet of 20 GPUs; `dept` (quota 12, borrows 4) over `a` (6, lends 2) and `b` (6); `c` (8).
fn tree() -> (Tree, Vec<QueueId>) {
    let mut tree = Tree::new(0);
    let gpu = tree.model(DeviceKind::Gpu, "H100", T);
    tree.resize(gpu, 0, 20_000);
    let mut dept = queue("dept", None, Some(12));
    dept.borrowing_limit = Some([("gpu".to_owned(), 4)].into());
    let mut a = queue("a", Some("dept"), Some(6));
    a.lending_limit = Some([("gpu".to_owned(), 2)].into());
    for spec in [dept, a, queue("b", Some("dept"), Some(6)), queue("c", None, Some(8))] {
        tree.set(spec, T).unwrap();
    }
    let leaves = ["a", "b", "c"].iter().map(|leaf| tree.leaf(&name(leaf)).unwrap()).collect();
    (tree, leaves)
}

fn gpus(tree: &Tree, devices: u64) -> Charge {
    let gpu = tree.models().iter().find(|(_, _, name)| *name == "H100").unwrap().0;
    vec![(gpu, devices * 1000)]
}

#[test]
fn what_one_keeps_nobody_else_gets() {
    let (mut tree, leaves) = tree();
    // Sixteen for the department, of which `a` keeps four.
    assert!(tree.check(leaves[1], &gpus(&tree, 12)).is_ok());
    let short = tree.check(leaves[1], &gpus(&tree, 13)).unwrap_err();
    assert_eq!(tree.spec(short.queue).name, name("dept"));
    assert_eq!((short.kept, short.limit, short.outright()), (4_000, 16_000, false));
    // And at the fleet: 20, less the four.
    assert!(tree.check(leaves[2], &gpus(&tree, 16)).is_ok());
    let short = tree.check(leaves[2], &gpus(&tree, 17)).unwrap_err();
    assert_eq!(short.queue, QueueId::FLEET);
    assert!(tree.check(leaves[0], &gpus(&tree, 16)).is_ok(), "its own are not kept from it");
}

#[test]
fn only_who_has_borrowed_gives_back_and_only_to_who_has_not() {
    let (mut tree, leaves) = tree();
    let (nine, four) = (gpus(&tree, 9), gpus(&tree, 4));
    tree.charge(&name("b"), &nine, T);
    assert!(tree.may_reclaim(leaves[0], &four, leaves[1], &nine), "b uses 9 of 6");
    assert!(!tree.may_reclaim(leaves[2], &four, leaves[1], &nine), "dept uses 9 of 12");
    let seven = gpus(&tree, 7);
    assert!(!tree.may_reclaim(leaves[0], &seven, leaves[1], &nine), "a would borrow itself");
    assert!(!tree.may_reclaim(leaves[1], &four, leaves[1], &nine), "nobody from itself");
}

#[test]
fn a_queue_that_is_deleted_is_charged_again_when_it_is_back() {
    let (mut tree, leaves) = tree();
    tree.charge(&name("c"), &gpus(&tree, 5), T);
    tree.remove(&name("c"), T).unwrap();
    assert_eq!(tree.leaf(&name("c")), Err(Closed::Missing));
    assert!(tree.remove(&name("dept"), T).unwrap_err().contains("is below it"));
    tree.set(queue("c", None, Some(8)), T).unwrap();
    let model = gpus(&tree, 1)[0].0;
    assert_eq!(tree.used(tree.leaf(&name("c")).unwrap(), model), 5_000);
    let _ = leaves;
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn limits_hold_after_every_start_and_an_end_undoes_it(
        steps in prop::collection::vec((0usize..3, 1u64..9, any::<bool>(), 0u64..5), 1..60)
    ) {
        let (mut tree, leaves) = tree();
        let fresh = tree.clone();
        let names = [name("a"), name("b"), name("c")];
        let mut held: Vec<(usize, Charge)> = Vec::new();
        let mut now = 0;
        for (leaf, devices, end, ms) in steps {
            now += ms;
            if end && !held.is_empty() {
                let (leaf, charge) = held.remove(devices as usize % held.len());
                tree.release(&names[leaf], &charge, Timestamp(now));
                continue;
            }
            let charge = gpus(&tree, devices);
            // Counted by hand: what the department counts for, what the fleet, and what is kept.
            let counts = |held: &[(usize, Charge)]| -> (u64, u64, bool) {
                let used = |leaf: usize| -> u64 {
                    held.iter().filter(|(at, _)| *at == leaf).map(|(_, charge)| charge[0].1).sum()
                };
                let dept = used(0).max(4_000) + used(1);
                (dept, dept + used(2), used(0) < 4_000)
            };
            let before = counts(&held);
            held.push((leaf, charge.clone()));
            let after = counts(&held);
            let dept = after.0 <= 16_000 || after.0 == before.0;
            let fleet = after.1 <= 20_000 || after.1 == before.1 || !after.2;
            prop_assert_eq!(tree.check(leaves[leaf], &charge).is_ok(), dept && fleet);
            if dept && fleet {
                tree.charge(&names[leaf], &charge, Timestamp(now));
            } else {
                held.pop();
            }
        }
        for (leaf, charge) in held.drain(..) {
            tree.release(&names[leaf], &charge, Timestamp(now));
        }
        for leaf in &leaves {
            for devices in 1..21 {
                let charge = gpus(&tree, devices);
                prop_assert_eq!(tree.check(*leaf, &charge), fresh.clone().check(*leaf, &charge));
            }
        }
    }

    #[test]
    fn a_share_grows_with_use_and_falls_with_weight(
        used in 0u64..20, more in 1u64..5, weight in 1u32..9
    ) {
        let share = |devices: u64, weight: u32| {
            let mut tree = Tree::new(0);
            let gpu = tree.model(DeviceKind::Gpu, "H100", T);
            tree.resize(gpu, 0, 24_000);
            let mut spec = queue("q", None, Some(3));
            spec.weight = weight;
            tree.set(spec, T).unwrap();
            tree.charge(&name("q"), &gpus(&tree, devices), T);
            tree.share(tree.leaf(&name("q")).unwrap(), T)
        };
        prop_assert!(share(used, weight) < share(used + more, weight));
        prop_assert!(share(used, weight + 1) <= share(used, weight));
        if used <= 3 {
            prop_assert_eq!(share(used, weight).borrowed, 0, "quota is nobody else's business");
        }
    }
}
