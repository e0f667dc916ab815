//! Spares: kept beside a gang, lent meanwhile, taken back at once; a cluster in, decisions out.

mod support;

use drumline_cluster::Change;
use drumline_scheduler::Scheduler;
use drumline_types::{Attempt, Timestamp};
use support::{Job, MINUTE, Queue, World};

#[test]
fn a_gang_that_loses_a_node_starts_on_its_spares_and_who_ran_there_leaves() {
    let mut world = World::new().nodes("a b c", 4);
    world.submit(Job::named("gang", 8).spares(4).not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    let (on, spares) = (world.on("gang"), world.spares("gang"));
    let spare = ["a", "b", "c"].into_iter().find(|node| !on.contains(&(*node).to_owned())).unwrap();
    assert_eq!(spares, (0..4).map(|at| format!("{spare}/{at}")).collect::<Vec<_>>());
    // Work that can be ended at once uses them meanwhile; other work waits.
    world.submit(Job::named("firm", 2).not_preemptible());
    world.submit(Job::named("guest", 2));
    assert_eq!(world.cycle(), [format!("guest starts on {spare} x2")]);
    assert_eq!(world.spares("gang").iter().filter(|s| s.contains("lent to guest")).count(), 2);
    assert!(world.why("firm").starts_with("WaitingForDevices"), "{}", world.why("firm"));
    world.lose(&on[1]);
    assert_eq!(world.cycle(), ["guest is recalled for gang"]);
    world.crash("gang");
    assert_eq!(world.cycle(), Vec::<String>::new(), "the guest has not left yet");
    assert!(world.why("gang").contains("guest leave"), "{}", world.why("gang"));
    world.all_leave();
    assert_eq!(world.cycle().len(), 1);
    let mut now = world.on("gang");
    now.sort();
    let mut wanted = vec![on[0].clone(), spare.to_owned()];
    wanted.sort();
    assert_eq!(now, wanted);
    assert_eq!(world.spares("gang"), Vec::<String>::new(), "nothing is left to keep");
    // What comes back goes to those who wait, as they stand before it.
    world.node(&on[1], 4, "H100");
    assert_eq!(world.cycle().len(), 2);
    assert_eq!(world.spares("gang"), Vec::<String>::new());
}

#[test]
fn spares_are_kept_again_when_devices_are_idle() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("gang", 4).spares(4));
    assert_eq!(world.cycle().len(), 1);
    let first = world.on("gang");
    world.lose(&first[0]);
    world.crash("gang");
    assert_eq!(world.cycle().len(), 1);
    assert_ne!(world.on("gang"), first);
    assert_eq!(world.spares("gang"), Vec::<String>::new());
    world.node("c", 4, "H100");
    world.cycle();
    assert_eq!(world.spares("gang"), ["c/0", "c/1", "c/2", "c/3"]);
}

#[test]
fn spares_apart_and_beside_the_gang_are_found_in_one_go() {
    let mut world = World::new().nodes("a b", 4).nodes("c", 2);
    world.submit(Job::named("gang", 6).spares(4));
    assert_eq!(world.cycle().len(), 1);
    let spares = world.spares("gang");
    assert_eq!(spares.len(), 4, "two of a node of their own, two beside the gang: {spares:?}");
    // A restored scheduler has no reason to look again.
    let restored = Scheduler::restore(world.scheduler.save()).unwrap().save();
    assert_eq!(restored, world.scheduler.save());
}

#[test]
fn a_spare_is_not_lent_out_of_the_quota_that_its_queue_keeps() {
    let mut world = World::new().nodes("a b c", 4);
    world.queue(Queue::named("firm").quota("gpu", 6).lends("gpu", 4));
    world.queue(Queue::named("free"));
    world.submit(Job::named("big", 10).queue("free"));
    world.submit(Job::named("own", 1).queue("firm").spares(1));
    assert_eq!(world.cycle().len(), 2);
    assert_eq!(world.spares("own").len(), 1);
    // Its queue keeps two devices: the one in use and the spare.
    world.submit(Job::named("guest", 1).queue("free"));
    assert_eq!(world.cycle(), Vec::<String>::new());
    assert!(world.why("guest").contains("1 kept"), "{}", world.why("guest"));
    // A guest of the queue itself may have it.
    world.submit(Job::named("kin", 1).queue("firm"));
    assert_eq!(world.cycle().len(), 1);
}

#[test]
fn who_has_quota_only_on_lent_spares_gets_no_place_elsewhere() {
    for (quota, starts) in [(9, false), (10, true)] {
        let mut world = World::new().nodes("a b c d", 4);
        world.queue(Queue::named("guest").quota("gpu", 0));
        world.queue(Queue::named("team").quota("gpu", quota).borrows("gpu", 0));
        world.submit(Job::named("gang", 4).queue("team").spares(2).not_preemptible());
        world.cycle();
        world.submit(Job::named("half", 2).queue("guest").groups(2).not_preemptible());
        world.submit(Job::named("long", 4).queue("guest").groups(4).not_preemptible());
        world.cycle();
        world.submit(Job::named("big", 8).queue("guest").groups(4));
        world.cycle();
        // Beside the gang and its spares the team has quota for three or for four. What is free is
        // reserved for one who would borrow, and gives way in the end.
        world.submit(Job::named("kin", 4).queue("team").groups(4));
        assert_eq!(world.cycle(), Vec::<String>::new());
        world.wait(11 * MINUTE);
        assert_eq!(world.cycle().len(), usize::from(starts), "{}", world.why("kin"));
    }
}

#[test]
fn a_place_that_is_gone_is_not_kept_for_a_gang_that_rests() {
    let mut world = World::new().nodes("a b c", 4);
    world.submit(Job::named("gang", 4).spares(4));
    world.cycle();
    let job = "gang".parse().unwrap();
    let not_before = Timestamp(MINUTE);
    world.apply(Change::Requeued { job, attempt: Attempt(2), not_before });
    world.cycle();
    let kept = |world: &World| {
        let holds = world.scheduler.save().holds.into_values();
        holds.flat_map(|hold| hold.devices).map(|device| device.node).collect::<Vec<_>>()
    };
    let place = kept(&world);
    assert_eq!(place.len(), 4, "its place is kept while it rests");
    world.lose(place[0].as_str());
    world.cycle();
    assert_eq!(kept(&world), []);
}

#[test]
fn a_device_that_fails_is_replaced_while_the_attempt_still_ends() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("gang", 4).spares(2).not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    let first = world.on("gang");
    world.submit(Job::named("small", 2).not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    assert_eq!(world.spares("gang").len(), 2);
    world.fail(&first[0], 1);
    assert_eq!(world.cycle(), Vec::<String>::new(), "nobody has to leave for one device");
    world.submit(Job::named("thief", 2).priority(9).not_preemptible());
    assert_eq!(world.cycle(), Vec::<String>::new(), "its place is kept for it");
    world.crash("gang");
    assert_eq!(world.cycle().len(), 1);
    let held = world.scheduler.fleet().commitment(&"gang".parse().unwrap()).unwrap();
    let stayed = held.devices.iter().filter(|device| device.node.as_str() == first[0]).count();
    assert_eq!((held.devices.len(), stayed), (4, 3));
}

#[test]
fn a_crash_without_a_loss_comes_back_to_its_own_devices() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("gang", 4).spares(4).not_preemptible());
    world.submit(Job::named("guest", 4));
    assert_eq!(world.cycle().len(), 2);
    let first = world.on("gang");
    world.crash("gang");
    assert_eq!(world.cycle().len(), 1);
    assert_eq!(world.on("gang"), first, "and the guest stays on the spares");
    assert_eq!(world.spares("gang"), Vec::<String>::new());
}

#[test]
fn spares_are_on_nodes_of_their_own_in_the_domain_of_the_gang() {
    let mut world = World::new().nodes("r1/a r1/b r2/c r2/d r2/e", 4);
    // The first rack holds the gang, but not its spares.
    world.submit(Job::named("gang", 8).spares(4).in_one("rack"));
    assert_eq!(world.cycle(), ["gang starts on c x4, d x4"]);
    assert_eq!(world.spares("gang"), ["e/0", "e/1", "e/2", "e/3"]);
    world.submit(Job::named("small", 2).spares(2).in_one("rack"));
    assert_eq!(world.cycle().len(), 1);
    let spares = world.spares("small");
    let held = world.scheduler.fleet().commitment(&"small".parse().unwrap()).unwrap();
    let node = held.devices[0].node.to_string();
    assert_eq!(spares.len(), 2);
    assert!(spares.iter().all(|spare| !spare.starts_with(&node)), "{spares:?} beside {node}");
}

#[test]
fn a_better_claim_takes_spares_for_good() {
    let mut world = World::new().nodes("a b", 4);
    world.queue(Queue::named("mine").quota("gpu", 4));
    world.queue(Queue::named("theirs").quota("gpu", 4));
    world.submit(Job::named("gang", 4).spares(4).queue("mine"));
    assert_eq!(world.cycle().len(), 1);
    assert_eq!(world.spares("gang").len(), 4);
    // Within its own quota, it does not depend on what others keep beyond theirs.
    world.submit(Job::named("rightful", 3).queue("theirs").not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    assert_eq!(world.on("rightful").len(), 1);
    assert_eq!(world.spares("gang").len(), 1, "{:?}", world.spares("gang"));
    let first = world.on("gang");
    world.lose(&first[0]);
    world.crash("gang");
    assert_eq!(world.cycle(), Vec::<String>::new(), "it is not asked to leave for it");
    assert!(world.why("gang").contains("needs 4"), "{}", world.why("gang"));
}

#[test]
fn spares_count_in_the_quota_of_their_queue() {
    let mut world = World::new().nodes("a b c", 4);
    world.queue(Queue::named("team").quota("gpu", 8).borrows("gpu", 0));
    world.submit(Job::named("gang", 4).spares(4).queue("team").not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    assert_eq!(world.spares("gang").len(), 4);
    world.submit(Job::named("firm", 2).queue("team").not_preemptible());
    assert_eq!(world.cycle(), Vec::<String>::new());
    assert!(world.why("firm").starts_with("WaitingForQuota"), "{}", world.why("firm"));
    world.queue(Queue::named("team").quota("gpu", 10).borrows("gpu", 0));
    assert_eq!(world.cycle().len(), 1);
    assert_eq!(world.on("firm").len(), 1);
    assert_eq!(world.spares("gang").len(), 4);
}

#[test]
fn a_saved_state_keeps_spares_and_decides_the_same() {
    let mut world = World::new().nodes("a b c", 4);
    world.submit(Job::named("gang", 8).spares(4));
    world.cycle();
    world.submit(Job::named("guest", 3));
    world.cycle();
    let json = serde_json::to_string(&world.scheduler.save()).unwrap();
    let mut twin = Scheduler::restore(serde_json::from_str(&json).unwrap()).unwrap();
    world.wait(MINUTE);
    let node = world.on("gang").remove(0);
    let gone = drumline_cluster::Change::NodeGone { node: node.parse().unwrap() };
    twin.apply(gone, Timestamp(world.now)).unwrap();
    world.lose(&node);
    let (ours, theirs) = (world.decide(), twin.cycle(Timestamp(world.now)));
    assert_eq!(ours.evictions, theirs.evictions);
    assert_eq!(support::lines(&theirs), ["guest is recalled for gang"]);
}

/// Spares as a control plane that has just started is told of them: before any node is heard.
fn told_again(world: &World, gang: &str, guest: Option<&str>) -> World {
    let saved = world.scheduler.save();
    let mut again = World::new();
    for name in std::iter::once(gang).chain(guest) {
        let id = name.parse().unwrap();
        let devices = world.scheduler.fleet().commitment(&id).unwrap().devices.clone();
        let request = Box::new(saved.jobs[&id].request.clone());
        let (attempt, started) = (Attempt(1), Timestamp(0));
        again.attempts.insert(id, 1);
        again.apply(Change::Adopted { request, attempt, devices, started });
    }
    let job = gang.parse().unwrap();
    let devices = world.scheduler.kept_ready(&job);
    assert!(!devices.is_empty());
    again.apply(Change::Spared { job, devices });
    again
}

#[test]
fn spares_from_before_a_restart_are_kept_again_as_their_nodes_are_heard() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("gang", 4).spares(4).not_preemptible());
    assert_eq!(world.cycle().len(), 1);
    world.submit(Job::named("guest", 2));
    assert_eq!(world.cycle().len(), 1);
    let (own, spare) = (world.on("gang").remove(0), world.on("guest").remove(0));
    let before = world.spares("gang");
    let mut again = told_again(&world, "gang", Some("guest"));
    // Somebody waits for devices that are free, and firm.
    again.submit(Job::named("firm", 2).not_preemptible());
    assert_eq!(again.cycle(), Vec::<String>::new());
    assert_eq!(again.spares("gang"), Vec::<String>::new());
    assert_eq!(again.scheduler.kept_ready(&"gang".parse().unwrap()).len(), 4);
    again.node(&spare, 4, "H100");
    assert_eq!(again.cycle(), Vec::<String>::new(), "its spares are not given away");
    assert_eq!(again.spares("gang"), before);
    // Other nodes do not tempt it.
    again.node("c", 2, "H100");
    assert_eq!(again.cycle(), ["firm starts on c x2"]);
    again.node(&own, 4, "H100");
    assert_eq!(again.cycle(), Vec::<String>::new());
    assert_eq!(again.spares("gang"), before);
    // From now on it is as ever.
    again.lose(&own);
    assert_eq!(again.cycle(), ["guest is recalled for gang"]);
}

#[test]
fn a_node_of_spares_that_does_not_come_back_is_waited_for_for_a_while_only() {
    let mut world = World::new().nodes("a b", 4);
    world.submit(Job::named("gang", 4).spares(4));
    assert_eq!(world.cycle().len(), 1);
    let own = world.on("gang").remove(0);
    let mut again = told_again(&world, "gang", None);
    again.node(&own, 4, "H100");
    again.node("c", 4, "H100");
    let cycle = again.decide();
    assert_eq!(again.spares("gang"), Vec::<String>::new());
    let wake = cycle.wake.expect("it says until when it waits");
    // Saved and restored meanwhile, it waits as before.
    let saved = again.scheduler.save();
    assert_eq!(Scheduler::restore(saved.clone()).unwrap().save(), saved);
    again.now = wake.0;
    again.decide();
    assert_eq!(again.spares("gang"), ["c/0", "c/1", "c/2", "c/3"]);
}

#[test]
fn a_spare_that_is_no_longer_fit_is_not_kept_again() {
    let mut world = World::new().nodes("r1/a r1/b", 4);
    world.submit(Job::named("gang", 4).spares(4).in_one("rack"));
    assert_eq!(world.cycle().len(), 1);
    let (own, spare) = (world.on("gang").remove(0), world.spares("gang").remove(0));
    let spare = spare.split('/').next().unwrap().to_owned();
    for (rack, model, kept) in [("r1", "H100", 4), ("r2", "H100", 0), ("r1", "A100", 0)] {
        let mut again = told_again(&world, "gang", None);
        again.node(&format!("r1/{own}"), 4, "H100");
        again.cycle();
        again.node(&format!("{rack}/{spare}"), 4, model);
        again.cycle();
        assert_eq!(again.spares("gang").len(), kept, "{rack} {model}");
    }
}
