//! What a tree of queues refuses, and what it says; small facts that other crates rely on.

mod support;

use drumline_queue::tree::DEPTH_MAX;
use drumline_queue::{Closed, Models, Place, QueueId, Short, Tree};
use drumline_spec::DeviceKind;
use drumline_types::Timestamp;
use support::{T, fleet, name, spec};

#[test]
fn a_tree_is_as_deep_as_it_may_be_and_no_deeper() {
    let mut tree = fleet(0);
    for depth in 1..=DEPTH_MAX {
        let parent = (depth > 1).then(|| format!("q{}", depth - 1));
        tree.set(spec(&format!("q{depth}"), parent.as_deref()), T).unwrap();
    }
    let last = format!("q{DEPTH_MAX}");
    let deeper = tree.set(spec("more", Some(&last)), T).unwrap_err();
    assert!(deeper.contains("deeper"), "{deeper}");
    assert!(tree.find(&name("more")).is_none());
    // Nor by a move of what has queues below it.
    tree.set(spec("top", None), T).unwrap();
    assert!(tree.set(spec("q1", Some("top")), T).unwrap_err().contains("deeper"));
    tree.remove(&name(&last), T).unwrap();
    tree.set(spec("q1", Some("top")), T).unwrap();
    assert_eq!(tree.path(tree.find(&name("q31")).unwrap()).count(), DEPTH_MAX);
}

#[test]
fn what_makes_no_tree_is_refused_and_changes_nothing() {
    let mut tree = fleet(0);
    tree.set(spec("a", None), T).unwrap();
    tree.set(spec("b", Some("a")), T).unwrap();
    let mut weightless = spec("c", None);
    weightless.weight = 0;
    for (wrong, why) in [
        (spec("a", Some("b")), "below itself, through b"),
        (spec("a", Some("a")), "below itself"),
        (spec("c", Some("nowhere")), "does not exist"),
        (weightless, "weight is 0"),
    ] {
        let told = tree.set(wrong, T).unwrap_err();
        assert!(told.contains(why), "{told}");
    }
    assert_eq!(tree.len(), 3);
    assert_eq!(tree.parent(tree.find(&name("a")).unwrap()), Some(QueueId::FLEET));
    assert_eq!(tree.parent(QueueId::FLEET), None);
}

#[test]
fn queues_are_told_parents_first_then_by_name() {
    let mut tree = fleet(0);
    assert!(tree.is_empty());
    for (queue, parent) in [("z", None), ("a", Some("z")), ("m", None), ("b", Some("m"))] {
        tree.set(spec(queue, parent), T).unwrap();
    }
    let told: Vec<&str> = tree.specs().iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(told, ["m", "z", "a", "b"]);
    assert!(!tree.is_empty());
}

#[test]
fn a_queue_takes_jobs_when_nothing_is_below_it_and_nobody_holds_it() {
    let mut tree = fleet(0);
    tree.set(spec("dept", None), T).unwrap();
    tree.set(spec("team", Some("dept")), T).unwrap();
    assert_eq!(tree.leaf(&name("dept")), Err(Closed::Inner(name("team"))));
    assert_eq!(tree.leaf(&name("team")), Ok(tree.find(&name("team")).unwrap()));
    let mut held = spec("dept", None);
    held.held = true;
    tree.set(held, T).unwrap();
    assert_eq!(tree.leaf(&name("team")), Err(Closed::Held(name("dept"))));
    assert_eq!(tree.leaf(&name("other")), Err(Closed::Missing));
}

#[test]
fn a_gang_of_the_limit_itself_is_not_more_than_the_limit() {
    let short = |need, limit| Short {
        queue: QueueId::FLEET,
        class: "gpu".to_owned(),
        used: 0,
        limit,
        need,
        kept: 0,
    };
    assert!(!short(7, 8).outright());
    assert!(!short(8, 8).outright());
    assert!(short(9, 8).outright());
}

#[test]
fn models_are_numbered_in_the_order_in_which_they_are_seen() {
    let mut models = Models::default();
    assert!(models.is_empty());
    let h100 = models.intern(DeviceKind::Gpu, "H100");
    let other = models.intern(DeviceKind::Cpu, "H100");
    assert_eq!(models.intern(DeviceKind::Gpu, "H100"), h100);
    assert_eq!((models.len(), models.is_empty()), (2, false));
    assert_eq!(models.name(h100), (DeviceKind::Gpu, "H100"));
    assert_eq!(models.name(other), (DeviceKind::Cpu, "H100"));
    assert_eq!((h100.index(), other.index()), (0, 1));
    // Those that are too many share the last number, which is nobody's own.
    for at in 2..65_540 {
        let last = models.intern(DeviceKind::Gpu, &at.to_string());
        assert_eq!(last.index(), at.min(65_535));
    }
    assert_eq!(models.len(), 65_535);
}

#[test]
fn a_model_that_is_new_is_counted_at_once_in_every_queue() {
    let mut tree = fleet(0);
    let mut q = spec("q", None);
    q.quota.extend([("b200".to_owned(), 4), ("gpu".to_owned(), 2)]);
    tree.set(q, T).unwrap();
    let at = tree.find(&name("q")).unwrap();
    let b200 = tree.model(DeviceKind::Gpu, "NVIDIA B200", T);
    assert_eq!(tree.nominal(at, b200), (4_000, "b200"));
    assert_eq!(tree.nominal(at, Tree::unknown(DeviceKind::Gpu)), (2_000, "gpu"));
    assert_eq!(tree.nominal(at, Tree::unknown(DeviceKind::Cpu)), (0, "cpu"));
    tree.charge(&name("q"), &vec![(b200, 1_000)], T);
    assert_eq!(tree.used(at, b200), 1_000);
}

#[test]
fn capacity_grows_and_shrinks_with_the_fleet() {
    let mut tree = fleet(0);
    let h100 = tree.models().iter().nth(2).unwrap().0;
    assert_eq!(tree.capacity(h100), 20_000);
    tree.resize(h100, 3_000, 0);
    assert_eq!(tree.capacity(h100), 17_000);
    tree.resize(h100, 1_000, 4_000);
    assert_eq!(tree.capacity(h100), 20_000);
    tree.resize(h100, 90_000, 0);
    assert_eq!(tree.capacity(h100), 0);
}

#[test]
fn what_is_supposed_leaves_no_trace() {
    let mut tree = fleet(1_000);
    tree.set(spec("q", None), T).unwrap();
    let at = tree.find(&name("q")).unwrap();
    let h100 = tree.models().iter().nth(2).unwrap().0;
    tree.charge(&name("q"), &vec![(h100, 2_000)], Timestamp(5));
    let before = tree.history();
    tree.suppose(at, &vec![(h100, 3_000)], true);
    assert_eq!(tree.used(at, h100), 5_000);
    tree.suppose(at, &vec![(h100, 3_000)], false);
    assert_eq!(tree.used(at, h100), 2_000);
    assert_eq!(tree.history(), before);
}

#[test]
fn a_change_of_queues_keeps_what_was_used_before() {
    let mut tree = fleet(1_000);
    tree.set(spec("dept", None), T).unwrap();
    tree.set(spec("q", Some("dept")), T).unwrap();
    let h100 = tree.models().iter().nth(2).unwrap().0;
    tree.charge(&name("q"), &vec![(h100, 8_000)], T);
    let mean = |tree: &Tree, queue: Option<&str>| {
        let history = tree.history();
        let of = history.iter().find(|h| h.queue.as_ref().map(|q| q.as_str()) == queue).unwrap();
        (of.at, of.mean.first().map_or(0, |(.., mean)| mean >> 16))
    };
    // Another queue is made a half-life later, then one goes another half-life later.
    tree.set(spec("other", None), Timestamp(1_000)).unwrap();
    for queue in [None, Some("dept"), Some("q")] {
        assert_eq!(mean(&tree, queue), (Timestamp(1_000), 4_000), "{queue:?}");
    }
    tree.remove(&name("other"), Timestamp(2_000)).unwrap();
    for queue in [None, Some("dept"), Some("q")] {
        assert_eq!(mean(&tree, queue), (Timestamp(2_000), 6_000), "{queue:?}");
    }
    // One that is new begins with nothing.
    tree.set(spec("new", None), Timestamp(3_000)).unwrap();
    assert_eq!(mean(&tree, Some("new")), (Timestamp(3_000), 0));
}

#[test]
fn each_order_is_what_it_says() {
    let job = |name: &str| std::sync::Arc::new(name.parse().unwrap());
    let shortest =
        |name: &str, ms: Option<u64>, at: u64| Place::by_length(job(name), ms, Timestamp(at));
    assert!(shortest("b", Some(5), 9) < shortest("a", Some(6), 1));
    assert!(shortest("b", Some(5), 1) < shortest("a", Some(5), 2));
    assert!(shortest("b", Some(5), 9) < shortest("a", None, 1), "who says nothing goes last");
    let arrival = |name: &str, at: u64| Place::by_arrival(job(name), Timestamp(at));
    assert!(arrival("b", 1) < arrival("a", 2));
    assert!(arrival("a", 1) < arrival("b", 1));
    assert_eq!(arrival("b", 1).job().as_str(), "b");
    // A step of priority is worth so much waiting, and of equals who came first is first.
    let aged =
        |name: &str, priority, at| Place::by_priority(job(name), priority, Timestamp(at), 100);
    assert!(aged("b", 0, 100) < aged("a", 1, 300));
    assert!(aged("b", 0, 100) < aged("a", 1, 200), "of equals the first to come");
    assert!(aged("a", 1, 199) < aged("b", 0, 100));
    assert!(aged("b", -1, 0) < aged("a", -1, 1));
}

#[test]
fn a_change_of_queues_keeps_what_is_held_of_every_model() {
    let mut tree = fleet(0);
    tree.set(spec("q", None), T).unwrap();
    let all: Vec<_> = tree.models().iter().map(|(model, ..)| (model, 1_000)).collect();
    tree.charge(&name("q"), &all, T);
    tree.set(spec("other", None), T).unwrap();
    let at = tree.find(&name("q")).unwrap();
    assert!(all.iter().all(|(model, amount)| tree.used(at, *model) == *amount));
}
