//! The tree of queues against a second one that works out everything anew, on random trees with
//! quota by model and by kind, borrowing, lending, and random use.

mod support;

use drumline_queue::{Candidate, Charge, Tree, Turn};
use drumline_spec::QueueSpec;
use drumline_types::{QueueName, Timestamp};
use proptest::prelude::*;
use support::{At, Books, MODELS, T, fleet, id, name, spec};

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// A queue's entries: class, quota, what it may borrow, and what it lends.
type Entries = Vec<(usize, u32, Option<u32>, Option<u32>)>;

/// What happens: use begins, use ends, a queue is taken away or put back.
type Step = (usize, usize, u64, usize, u64, u8);

fn queue() -> impl Strategy<Value = (Option<usize>, Entries, u32)> {
    let entry = (0usize..5, 0u32..9, prop::option::of(0u32..6), prop::option::of(0u32..9));
    (prop::option::of(0usize..6), prop::collection::vec(entry, 0..4), 1u32..4)
}

/// The n-th queue may be below any of those before it.
fn make(at: usize, (parent, entries, weight): &(Option<usize>, Entries, u32)) -> QueueSpec {
    const CLASSES: [&str; 5] = ["gpu", "cpu", "h100", "a100", "mi300"];
    let parent = parent.filter(|parent| *parent < at).map(|parent| NAMES[parent]);
    let mut spec = spec(NAMES[at], parent);
    spec.weight = *weight;
    for (class, quota, borrow, lend) in entries {
        let class = CLASSES[*class].to_owned();
        spec.quota.insert(class.clone(), *quota);
        if let Some(borrow) = borrow {
            spec.borrowing_limit.get_or_insert_default().insert(class.clone(), *borrow);
        }
        if let Some(lend) = lend {
            spec.lending_limit.get_or_insert_default().insert(class, *lend);
        }
    }
    spec
}

fn charge(tree: &Tree, model: usize, amount: u64, other: usize) -> Charge {
    let ids: Vec<_> = tree.models().iter().map(|(model, ..)| model).collect();
    let mut charge = vec![(ids[model], amount * 250)];
    if other != model {
        charge.push((ids[other], 1_000));
    }
    charge.sort();
    charge
}

fn same(tree: &mut Tree, books: &Books, tried: &Charge) -> Result<(), TestCaseError> {
    let mut all: Vec<At<'_>> = books.specs.keys().map(Some).collect();
    all.push(None);
    prop_assert_eq!(tree.len(), all.len());
    prop_assert_eq!(tree.is_empty(), books.specs.is_empty());
    for &queue in &all {
        let at = id(tree, queue);
        for (model, ..) in tree.models().clone().iter() {
            prop_assert_eq!(tree.used(at, model), books.used(queue, model.index()));
            let class = books.class_of(queue, model.index());
            let nominal = books.nominal(queue, &class);
            prop_assert_eq!(tree.nominal(at, model), (nominal, class.as_str()));
        }
        prop_assert_eq!(tree.within(at, tried), books.within(queue, tried));
        prop_assert_eq!(tree.borrows(at, tried), books.borrows(queue, tried));
        let Some(queue) = queue else { continue };
        let way: Vec<_> = tree.path(at).map(|q| tree.spec(q).name.clone()).collect();
        prop_assert_eq!(
            way.iter().map(Some).chain([None]).collect::<Vec<_>>(),
            books.way(Some(queue))
        );
        let named = way.iter().any(|q| {
            books.specs[q].quota.keys().any(|class| !["cpu", "gpu"].contains(&class.as_str()))
        });
        prop_assert_eq!(tree.names_models(at), named);
        let share = tree.share(at, T);
        prop_assert_eq!((share.borrowed, share.used), books.share(queue));
        let found = tree.check(at, tried).map_err(|short| {
            let of = (short.queue != drumline_queue::QueueId::FLEET)
                .then(|| tree.spec(short.queue).name.clone());
            (of, short.class, short.limit, short.need, short.used, short.kept)
        });
        prop_assert_eq!(found, books.check(queue, tried));
        for other in books.specs.keys() {
            let b = id(tree, Some(other));
            let fork = tree.fork(at, b);
            let fork = fork.map(|(x, y)| (&tree.spec(x).name, &tree.spec(y).name));
            prop_assert_eq!(fork, books.fork(queue, other));
            let may = tree.may_reclaim(at, tried, b, tried);
            prop_assert_eq!(may, books.may_reclaim(queue, tried, other, tried));
        }
    }
    Ok(())
}

/// The queue whose turn it is, by the rule alone: at each level the first claim, each child
/// standing for the first job of its own first child.
fn next_by_rule<'a>(
    tree: &Tree,
    books: &'a Books,
    queue: At<'a>,
    candidates: &'a [(QueueName, Candidate)],
) -> Option<(&'a QueueName, &'a Candidate)> {
    let children = books.children(queue);
    if children.is_empty() {
        let queue = queue?;
        return candidates.iter().find(|(name, _)| name == queue).map(|(name, c)| (name, c));
    }
    let of_child = |child: &'a QueueName| {
        let (leaf, candidate) = next_by_rule(tree, books, Some(child), candidates)?;
        let borrows = !books.within(Some(child), &candidate.charge);
        let claim =
            (borrows, -i64::from(candidate.band), books.share(child), id(tree, Some(child)));
        Some((claim, leaf, candidate))
    };
    let found = children.into_iter().filter_map(of_child).min_by_key(|(claim, ..)| *claim)?;
    Some((found.1, found.2))
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 64,
        ..ProptestConfig::default()
    })]

    #[test]
    fn both_trees_say_the_same_after_every_step(
        queues in prop::collection::vec(queue(), 1..6),
        steps in prop::collection::vec(
            (0usize..6, 2usize..5, 1u64..30, 2usize..5, 0u64..9, 0u8..12), 1..24),
    ) {
        let mut tree = fleet(0);
        let mut books = Books::default();
        for (at, queue) in queues.iter().enumerate() {
            let spec = make(at, queue);
            prop_assert_eq!(tree.set(spec.clone(), T), Ok(()));
            books.specs.insert(spec.name.clone(), spec);
        }
        let mut running: Vec<(QueueName, Charge)> = Vec::new();
        let steps: Vec<Step> = steps;
        for (queue, model, amount, other, which, what) in steps {
            let at = queue % queues.len();
            let queue = name(NAMES[at]);
            let wanted = charge(&tree, model, amount, other);
            match what {
                // An end.
                0..=2 if !running.is_empty() => {
                    let (queue, held) = running.remove(which as usize % running.len());
                    tree.release(&queue, &held, T);
                    books.charge(&queue, &held, false);
                }
                // A queue goes, or comes back; what its jobs hold is remembered meanwhile.
                3 => {
                    let inner = !books.children(Some(&queue)).is_empty();
                    if books.specs.contains_key(&queue) {
                        prop_assert_eq!(tree.remove(&queue, T).is_err(), inner);
                        if !inner {
                            books.specs.remove(&queue);
                        }
                    } else {
                        let spec = make(at, &queues[at]);
                        let orphan =
                            spec.parent.as_ref().is_some_and(|p| !books.specs.contains_key(p));
                        prop_assert_eq!(tree.set(spec.clone(), T).is_err(), orphan);
                        if !orphan {
                            books.specs.insert(queue, spec);
                        }
                    }
                }
                _ => {
                    tree.charge(&queue, &wanted, T);
                    books.charge(&queue, &wanted, true);
                    running.push((queue, wanted.clone()));
                }
            }
            same(&mut tree, &books, &wanted)?;
        }
    }

    #[test]
    fn the_turn_goes_to_the_first_claim_of_each_level(
        queues in prop::collection::vec(queue(), 1..6),
        jobs in prop::collection::vec((2usize..5, 1u64..30, -2i32..3), 6),
        starts in 1usize..12,
    ) {
        let mut tree = fleet(0);
        let mut books = Books::default();
        for (at, queue) in queues.iter().enumerate() {
            let spec = make(at, queue);
            tree.set(spec.clone(), T).unwrap();
            books.specs.insert(spec.name.clone(), spec);
        }
        let mut turn = Turn::new(&tree, T);
        let mut candidates: Vec<(QueueName, Candidate)> = Vec::new();
        for queue in books.specs.keys().filter(|q| books.children(Some(q)).is_empty()) {
            let (model, amount, band) = jobs[candidates.len()];
            let charge = charge(&tree, model, amount, model);
            let candidate = Candidate { charge: charge.into(), band };
            turn.set(&tree, id(&tree, Some(queue)), Some(candidate.clone()));
            candidates.push((queue.clone(), candidate));
        }
        for _ in 0..starts {
            let next = turn.next(&tree).map(|queue| tree.spec(queue).name.clone());
            let by_rule = next_by_rule(&tree, &books, None, &candidates);
            prop_assert_eq!(next.as_ref(), by_rule.map(|(queue, _)| queue));
            let Some((queue, candidate)) = by_rule else { break };
            let (queue, charge) = (queue.clone(), candidate.charge.clone());
            // Its job starts, and now and then it has no other.
            tree.charge(&queue, &charge, T);
            books.charge(&queue, &charge, true);
            let leaf = id(&tree, Some(&queue));
            if charge[0].1 % 750 == 0 {
                candidates.retain(|(name, _)| *name != queue);
                turn.set(&tree, leaf, None);
            } else {
                turn.touch(&tree, leaf);
            }
        }
    }

    #[test]
    fn past_use_decays_as_the_half_life_says(
        steps in prop::collection::vec((0u64..4_000, 0u64..9, any::<bool>()), 1..20),
        half_life in 500u64..3_000,
        saved_at in 0usize..20,
    ) {
        let mut tree = fleet(half_life);
        tree.set(spec("dept", None), T).unwrap();
        tree.set(spec("q", Some("dept")), T).unwrap();
        let h100 = tree.models().iter().nth(2).unwrap().0;
        let (mut now, mut used, mut mean) = (0u64, 0u64, 0f64);
        for (at, (ms, devices, more)) in steps.into_iter().enumerate() {
            now += ms;
            mean = used as f64 + (mean - used as f64) * 0.5f64.powf(ms as f64 / half_life as f64);
            let devices = if more { devices } else { devices.min(used / 1000) };
            let charge = vec![(h100, devices * 1000)];
            if more {
                tree.charge(&name("q"), &charge, Timestamp(now));
                used += devices * 1000;
            } else {
                tree.release(&name("q"), &charge, Timestamp(now));
                used -= devices * 1000;
            }
            if at == saved_at {
                // Remembered by another tree, in which all else is in place.
                let mut other = fleet(half_life);
                other.set(spec("dept", None), Timestamp(now)).unwrap();
                other.set(spec("q", Some("dept")), Timestamp(now)).unwrap();
                other.charge(&name("q"), &vec![(h100, used)], Timestamp(now));
                other.remember(tree.history());
                prop_assert_eq!(other.history(), tree.history());
                tree = other;
            }
            // A look later sees what has decayed until then.
            let later = 700;
            let then = used as f64 + (mean - used as f64) * 0.5f64.powf(700.0 / half_life as f64);
            let recent = (used as f64 + then) / 2.0;
            // One class with 32 GPUs in all; weight 1.
            let wanted = recent / 32_000.0;
            for queue in ["q", "dept"] {
                let queue = tree.find(&name(queue)).unwrap();
                let found = tree.share(queue, Timestamp(now + later)).used as f64 / 2f64.powi(32);
                prop_assert!((found - wanted).abs() < 2e-3, "{found} is not {wanted} at {now}");
            }
        }
        prop_assert_eq!(MODELS.len(), tree.models().len());
    }
}
