//! One small cluster, one cycle that is right, and everything that could be wrong with it.

use drumline_audit::{Auditor, Violation};
use drumline_cluster::{Change, Device, Health, Node, Request, Revision, Snapshot, Taint};
use drumline_mesh::Mesh;
use drumline_placement::{Assignment, Cycle, Eviction, EvictionCause, JobPlan, Plan, Spares};
use drumline_spec::{
    DeviceKind, Elastic, Gang, GangSettings, Parallelism, QueueSpec, TopologyRule,
    gang::DisruptionBudget,
};
use drumline_types::{Attempt, Bytes, DeviceId, Explanation, JobId, RankIndex, Reason, Timestamp};

const NOW: Timestamp = Timestamp(1_000_000);

fn id(name: &str) -> JobId {
    name.parse().unwrap()
}

fn device(text: &str) -> DeviceId {
    let (node, index) = text.split_once('/').unwrap();
    DeviceId { node: node.parse().unwrap(), index: index.parse().unwrap() }
}

/// Nodes a and b in rack r1, c in rack r2: four H100 each, and one CPU device; d has A100.
fn machines() -> Vec<Node> {
    let node = |name: &str, rack: &str, model: &str| {
        let mut devices = vec![Device::new(DeviceKind::Gpu, model, Bytes(80)); 4];
        devices.push(Device::new(DeviceKind::Cpu, "cpu", Bytes(1)));
        let mut node = Node::new(name.parse().unwrap(), devices).within("rack", rack);
        (node.cpu_milli, node.memory) = (8000, Bytes(1000));
        node
    };
    vec![
        node("a", "r1", "NVIDIA H100"),
        node("b", "r1", "NVIDIA H100"),
        node("c", "r2", "NVIDIA H100"),
        node("d", "r2", "NVIDIA A100"),
    ]
}

fn gang(ranks: u32) -> Gang {
    Gang { ranks, device: DeviceKind::Gpu, ..Gang::default() }
}

fn request(job: &str, queue: &str, priority: i32, gang: Gang) -> Request {
    Request {
        job: id(job),
        split: Parallelism { data: gang.ranks, ..Parallelism::SINGLE },
        gang,
        settings: GangSettings {
            queue: queue.parse().unwrap(),
            priority,
            ..GangSettings::default()
        },
        submitted: Timestamp(0),
    }
}

fn plan(request: &Request, devices: &[&str]) -> JobPlan {
    let ranks = devices.len() as u32;
    let split = Parallelism { data: ranks, ..Parallelism::SINGLE };
    let mesh = Mesh::new(split);
    let assign = |(rank, text): (u32, &&str)| Assignment {
        rank: RankIndex(rank),
        coords: mesh.coords(rank),
        device: device(text),
    };
    JobPlan {
        job: request.job.clone(),
        attempt: Attempt(1),
        gang: Gang { ranks, ..request.gang.clone() },
        split,
        assignments: (0u32..).zip(devices).map(assign).collect(),
    }
}

fn cycle(jobs: Vec<JobPlan>, evictions: Vec<Eviction>) -> Cycle {
    Cycle {
        now: NOW,
        plan: Plan { parent: Revision(0), jobs },
        evictions,
        told: Vec::new(),
        spares: Vec::new(),
        wake: None,
        considered: 0,
    }
}

/// An auditor of the machines, with these jobs waiting and those running.
fn auditor(waiting: &[&Request], running: &[(&Request, &[&str])]) -> Auditor {
    let mut auditor = Auditor::new();
    for node in machines() {
        auditor.apply(&Change::Node { node: Box::new(node) });
    }
    for request in waiting {
        let request = Box::new(Request::clone(request));
        auditor.apply(&Change::Submitted {
            request,
            attempt: Attempt(1),
            not_before: Timestamp(0),
        });
    }
    for (request, devices) in running {
        let devices = devices.iter().map(|text| device(text)).collect();
        let request = Box::new(Request::clone(request));
        let (attempt, started) = (Attempt(1), Timestamp(0));
        auditor.apply(&Change::Adopted { request, attempt, devices, started });
    }
    auditor
}

fn nobody(_: &DeviceId) -> Option<JobId> {
    None
}

fn found(auditor: &Auditor, cycle: &Cycle, kept: &[(&str, &str)]) -> Vec<String> {
    let kept = |device: &DeviceId| {
        let found = kept.iter().find(|(text, _)| *text == device.to_string());
        found.map(|(_, job)| id(job))
    };
    match auditor.clone().check(cycle, kept) {
        Ok(_) => Vec::new(),
        Err(found) => found
            .iter()
            .map(|violation| {
                let text = format!("{violation:?}");
                text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
            })
            .collect(),
    }
}

#[test]
fn a_cycle_that_is_right_is_taken_as_done() {
    let job = request("job", "default", 0, gang(2));
    let mut auditor = auditor(&[&job], &[]);
    let right = cycle(vec![plan(&job, &["a/0", "a/1"])], Vec::new());
    assert_eq!(auditor.check(&right, nobody).unwrap().plan(), &right.plan);
    // What was given is gone.
    let again = auditor.check(&right, nobody).unwrap_err();
    assert!(matches!(again.as_slice(), [Violation::JobHoldsDevices { .. }, ..]), "{again:?}");
    auditor.apply(&Change::Requeued {
        job: id("job"),
        attempt: Attempt(2),
        not_before: Timestamp(0),
    });
    let stale = auditor.check(&right, nobody).unwrap_err();
    assert!(matches!(stale.as_slice(), [Violation::WrongAttempt { .. }]), "{stale:?}");
}

#[test]
fn every_spoiled_start_is_found_and_named() {
    let rack = TopologyRule { ranks: 0, level: "rack".to_owned(), required: true };
    let pairs = TopologyRule { ranks: 2, level: "rack".to_owned(), required: true };
    let elastic = Elastic { least: 2, most: 4, step: 2 };
    let plain = gang(4);
    let grouped = Gang { node_group: 2, ..gang(4) };
    let in_rack = Gang { topology: vec![rack.clone()], ..gang(4) };
    let in_pairs = Gang { topology: vec![pairs], ..gang(4) };
    let led = Gang { leader: Some(DeviceKind::Cpu), topology: vec![rack], ..gang(3) };
    let h100 = Gang { models: vec!["h100".to_owned()], ..gang(2) };
    let instances = Gang { models: vec!["1g.10gb".to_owned()], ..gang(2) };
    let thirsty = Gang { cpu_milli: 5000, ..gang(2) };
    let heavy = Gang { memory: Bytes(501), ..gang(2) };
    let shared = Gang { share_milli: 600, ..gang(2) };
    let sized = Gang { elastic: Some(elastic), ..gang(4) };
    type Case<'a> = (&'a Gang, &'a [&'a str], &'a [&'a str]);
    let cases: [Case<'_>; 30] = [
        (&plain, &["a/0", "b/0", "c/0", "c/1"], &[]),
        (&plain, &["a/0", "b/0", "c/0", "c/0"], &["DeviceTwice"]),
        (&plain, &["a/0", "b/0", "c/0", "c/9"], &["NoSuchDevice"]),
        (&plain, &["a/0", "b/0", "c/0", "x/0"], &["NoSuchDevice"]),
        (&plain, &["a/0", "b/0", "c/0", "c/4"], &["WrongKind"]),
        (&plain, &["a/0", "b/0", "c/0", "d/0"], &["MixedModels"]),
        (&plain, &["a/0", "b/0", "c/0"], &["IllegalSize"]),
        (&grouped, &["a/0", "a/1", "c/0", "c/1"], &[]),
        (&grouped, &["a/0", "b/1", "c/0", "c/1"], &["GroupSplit"]),
        (&in_rack, &["a/0", "a/1", "b/0", "b/1"], &[]),
        (&in_rack, &["a/0", "a/1", "b/0", "c/1"], &["TopologyBroken"]),
        (&in_pairs, &["a/0", "b/1", "c/0", "c/1"], &[]),
        (&in_pairs, &["a/0", "c/1", "c/0", "b/1"], &["TopologyBroken", "TopologyBroken"]),
        (&led, &["a/4", "a/1", "b/0"], &[]),
        (&led, &["c/4", "a/1", "b/0"], &["TopologyBroken", "TopologyBroken"]),
        (&led, &["a/0", "a/1", "b/0"], &["WrongKind"]),
        (&h100, &["a/0", "a/1"], &[]),
        (&h100, &["d/0", "d/1"], &["WrongModel", "WrongModel"]),
        (&h100, &["e/0", "e/1"], &["WrongModel", "WrongModel"]),
        (&gang(2), &["e/0", "e/1"], &["WrongModel", "WrongModel"]),
        (&instances, &["e/0", "e/1"], &[]),
        (&thirsty, &["a/0", "b/1"], &[]),
        (&thirsty, &["a/0", "a/1"], &["CpuOverfull"]),
        (&heavy, &["a/0", "a/1"], &["MemoryOverfull"]),
        (&shared, &["a/0", "a/1"], &[]),
        (&shared, &["a/0", "a/0"], &["DeviceOverfull"]),
        (&sized, &["a/0", "a/1"], &[]),
        (&sized, &["a/0", "a/1", "a/2"], &["IllegalSize"]),
        (&sized, &["a/0", "a/1", "a/2", "a/3"], &[]),
        (&plain, &["b/2", "b/3", "c/0", "c/1"], &["DeviceHeld", "DeviceHeld"]),
    ];
    let other = request("other", "default", 0, gang(2));
    let instance = Device::new(DeviceKind::Gpu, "NVIDIA H100 MIG 1g.10gb", Bytes(10));
    let divided = Node::new("e".parse().unwrap(), vec![instance; 2]).within("rack", "r2");
    for (gang, devices, expected) in cases {
        let job = request("job", "default", 0, gang.clone());
        let mut auditor = auditor(&[&job], &[(&other, &["b/2", "b/3"])]);
        auditor.apply(&Change::Node { node: Box::new(divided.clone()) });
        let made = cycle(vec![plan(&job, devices)], Vec::new());
        assert_eq!(found(&auditor, &made, &[]), expected, "{gang:?} on {devices:?}");
    }
}

#[test]
fn a_start_out_of_turn_is_found() {
    let job = request("job", "default", 0, gang(2));
    let right = cycle(vec![plan(&job, &["a/0", "a/1"])], Vec::new());
    type Spoil<'a> = (&'a str, &'a dyn Fn(&mut Cycle, &mut Auditor), &'a [&'a str]);
    let told = |job: &str| (id(job), Explanation::new(Reason::WaitingForDevices, "waits"));
    let upsert = |auditor: &mut Auditor, change: &dyn Fn(&mut Node)| {
        let mut node = machines().remove(0);
        change(&mut node);
        auditor.apply(&Change::Node { node: Box::new(node) });
    };
    let submit = |auditor: &mut Auditor, queue: &str, not_before: u64| {
        let request = Box::new(request("job", queue, 0, gang(2)));
        let not_before = Timestamp(not_before);
        auditor.apply(&Change::Submitted { request, attempt: Attempt(1), not_before });
    };
    let cases: [Spoil<'_>; 18] = [
        ("nothing", &|_, _| {}, &[]),
        ("attempt", &|c, _| c.plan.jobs[0].attempt = Attempt(7), &["WrongAttempt"]),
        ("unknown", &|c, _| c.plan.jobs[0].job = id("ghost"), &["UnknownJob"]),
        ("told unknown", &|c, _| c.told.push(told("ghost")), &["UnknownJob"]),
        ("told and started", &|c, _| c.told.push(told("job")), &["JobTwice"]),
        ("held", &|_, a| a.apply(&Change::Held { job: id("job"), held: true }), &["NotYet"]),
        ("too early", &|_, a| submit(a, "default", NOW.0 + 1), &["NotYet"]),
        ("no queue", &|_, a| submit(a, "nowhere", 0), &["QueueClosed"]),
        ("other gang", &|c, _| c.plan.jobs[0].gang.cpu_milli = 3, &["OtherGang"]),
        (
            "rank order",
            &|c, _| c.plan.jobs[0].assignments[0].rank = RankIndex(5),
            &["GangNotWhole"],
        ),
        (
            "rank missing",
            &|c, _| {
                c.plan.jobs[0].assignments.pop();
            },
            &["GangNotWhole"],
        ),
        (
            "coordinates",
            &|c, _| c.plan.jobs[0].assignments[0].coords.tensor = 4,
            &["WrongCoordinates"],
        ),
        ("split", &|c, _| c.plan.jobs[0].split.data = 3, &["SplitDisagrees"]),
        ("not ready", &|_, a| upsert(a, &|node| node.ready = false), &["NodeIneligible"; 2]),
        ("cordoned", &|_, a| upsert(a, &|node| node.cordoned = true), &["NodeIneligible"; 2]),
        (
            "tainted",
            &|_, a| {
                let taint = Taint { key: "x".to_owned(), value: String::new() };
                upsert(a, &|node| node.taints.push(taint.clone()));
            },
            &["NodeIneligible"; 2],
        ),
        (
            "failed",
            &|_, a| {
                upsert(a, &|node| node.devices[0].health = Health::Failed("Xid 79".to_owned()));
            },
            &["DeviceFailed"],
        ),
        (
            "used by others",
            &|_, a| {
                upsert(a, &|node| {
                    node.external.devices.insert(1, 500);
                });
            },
            &["DeviceOverfull"],
        ),
    ];
    for (what, spoil, expected) in cases {
        let (mut auditor, mut made) = (auditor(&[&job], &[]), right.clone());
        spoil(&mut made, &mut auditor);
        assert_eq!(found(&auditor, &made, &[]), expected, "{what}");
    }
}

fn queue(name: &str, parent: Option<&str>, quota: u32) -> QueueSpec {
    let mut queue = QueueSpec::open(name.parse().unwrap());
    queue.parent = parent.map(|parent| parent.parse().unwrap());
    queue.quota.insert("gpu".to_owned(), quota);
    queue
}

#[test]
fn quotas_hold_with_what_may_be_borrowed_and_lent() {
    let job = request("job", "left", 0, gang(4));
    let made = cycle(vec![plan(&job, &["a/0", "a/1", "b/0", "b/1"])], Vec::new());
    let other = request("other", "right", 0, gang(1));
    let limits = |devices: u32| Some([("gpu".to_owned(), devices)].into());
    type Queues<'a> = (&'a str, &'a dyn Fn(&mut [QueueSpec; 3]), &'a [&'a str]);
    let cases: [Queues<'_>; 10] = [
        ("borrows what it likes", &|_| {}, &[]),
        ("within its quota", &|q| q[1].quota = [("gpu".to_owned(), 4)].into(), &[]),
        ("may borrow two", &|q| q[1].borrowing_limit = limits(2), &[]),
        ("may borrow one", &|q| q[1].borrowing_limit = limits(1), &["QuotaBroken"]),
        (
            "its parent may borrow none, and a sibling uses one",
            &|q| q[0].borrowing_limit = limits(0),
            &["QuotaBroken"],
        ),
        (
            "a model of its own has a quota of its own",
            &|q| {
                q[1].quota.insert("h100".to_owned(), 3);
                q[1].borrowing_limit = Some([("h100".to_owned(), 0)].into());
            },
            &["QuotaBroken"],
        ),
        (
            "a root beside it keeps all but two of the fleet",
            &|q| {
                q[2].parent = None;
                (q[0].quota, q[2].quota) = (Default::default(), [("gpu".to_owned(), 14)].into());
                q[2].lending_limit = limits(0);
            },
            &["LentTooMuch"],
        ),
        (
            "a queue below a root keeps all but two of the fleet",
            &|q| {
                (q[0].quota, q[2].quota) = (Default::default(), [("gpu".to_owned(), 14)].into());
                q[2].lending_limit = limits(0);
            },
            &["LentTooMuch"],
        ),
        (
            "a queue below a root keeps just so much that four are left",
            &|q| {
                (q[0].quota, q[2].quota) = (Default::default(), [("gpu".to_owned(), 12)].into());
                q[2].lending_limit = limits(0);
            },
            &[],
        ),
        ("its parent is held", &|q| q[0].held = true, &["QueueClosed"]),
    ];
    for (what, change, expected) in cases {
        let mut queues =
            [queue("top", None, 4), queue("left", Some("top"), 2), queue("right", Some("top"), 2)];
        change(&mut queues);
        let mut auditor = auditor(&[&job], &[(&other, &["c/0"])]);
        for queue in queues {
            auditor.apply(&Change::Queue { queue: Box::new(queue) });
        }
        assert_eq!(found(&auditor, &made, &[]), expected, "{what}");
    }
}

fn eviction(job: &str, cause: EvictionCause, beneficiary: Option<&str>) -> Eviction {
    Eviction {
        job: id(job),
        attempt: Attempt(1),
        cause,
        beneficiary: beneficiary.map(id),
        resize_to: None,
        message: String::new(),
    }
}

/// The whole fleet of H100 is held: by `low` on a and b, by `rest` on c.
fn crowded(low: &Request, high: &Request) -> Auditor {
    let rest = request("rest", "default", 9, gang(4));
    let on_ab: Vec<String> =
        ["a", "b"].iter().flat_map(|n| (0..4).map(move |i| format!("{n}/{i}"))).collect();
    let on_ab: Vec<&str> = on_ab.iter().map(String::as_str).collect();
    let on_d = request("on-d", "default", 9, gang(4));
    auditor(
        &[high],
        &[
            (low, &on_ab),
            (&rest, &["c/0", "c/1", "c/2", "c/3"]),
            (&on_d, &["d/0", "d/1", "d/2", "d/3"]),
        ],
    )
}

#[test]
fn every_eviction_that_breaks_a_rule_is_found() {
    let low = request("low", "default", 0, gang(8));
    let high = request("high", "default", 5, gang(8));
    let kept = [("a/0", "high")];
    let preempted = || eviction("low", EvictionCause::Preempted, Some("high"));
    type Spoil<'a> =
        (&'a str, &'a dyn Fn(&mut Request, &mut Request, &mut Eviction), &'a [&'a str]);
    let budget = |count| Some(DisruptionBudget { count, per_ms: 10_000 });
    let cases: [Spoil<'_>; 15] = [
        ("nothing", &|_, _, _| {}, &[]),
        ("attempt", &|_, _, e| e.attempt = Attempt(3), &["MayNotLeave"]),
        ("unknown", &|_, _, e| e.job = id("ghost"), &["MayNotLeave"]),
        ("size", &|_, _, e| e.resize_to = Some(4), &["MayNotLeave"]),
        ("not preemptible", &|low, _, _| low.settings.preemptible = false, &["MayNotLeave"]),
        ("too young", &|low, _, _| low.settings.min_runtime_ms = NOW.0 + 1, &["MayNotLeave"]),
        ("old enough", &|low, _, _| low.settings.min_runtime_ms = NOW.0, &[]),
        ("never", &|low, _, _| low.settings.disruptions = budget(0), &["MayNotLeave"]),
        ("once", &|low, _, _| low.settings.disruptions = budget(1), &[]),
        ("nobody gains", &|_, _, e| e.beneficiary = None, &["NeedlessVictim"]),
        ("a ghost gains", &|_, _, e| e.beneficiary = Some(id("ghost")), &["NeedlessVictim"]),
        ("a holder gains", &|_, _, e| e.beneficiary = Some(id("rest")), &["NeedlessVictim"]),
        ("same priority", &|_, high, _| high.settings.priority = 0, &["NeedlessVictim"]),
        (
            "reclaimed within a queue",
            &|_, _, e| e.cause = EvictionCause::Reclaimed,
            &["NeedlessVictim"],
        ),
        (
            "a drain asks nobody",
            &|low, _, e| {
                low.settings.preemptible = false;
                (e.cause, e.beneficiary) = (EvictionCause::Drained, None);
            },
            &[],
        ),
    ];
    for (what, spoil, expected) in cases {
        let (mut low, mut high, mut leaves) = (low.clone(), high.clone(), preempted());
        spoil(&mut low, &mut high, &mut leaves);
        let made = cycle(Vec::new(), vec![leaves]);
        assert_eq!(found(&crowded(&low, &high), &made, &kept), expected, "{what}");
    }
}

#[test]
fn nobody_leaves_twice_or_for_one_that_gains_nothing_or_has_room() {
    let (low, high) =
        (request("low", "default", 0, gang(8)), request("high", "default", 5, gang(8)));
    let leaves = || eviction("low", EvictionCause::Preempted, Some("high"));
    let kept = [("a/0", "high")];
    let mut auditor = crowded(&low, &high);
    let twice = cycle(Vec::new(), vec![leaves(), leaves()]);
    assert_eq!(found(&auditor, &twice, &kept), ["MayNotLeave"]);
    // None of its devices is kept for the one that should gain.
    let once = cycle(Vec::new(), vec![leaves()]);
    assert_eq!(found(&auditor, &once, &[]), ["NeedlessVictim"]);
    assert_eq!(found(&auditor, &once, &[("c/0", "high")]), ["NeedlessVictim"]);
    auditor.check(&once, |device| (device.node.as_str() == "a").then(|| id("high"))).unwrap();
    assert_eq!(found(&auditor, &once, &kept), ["MayNotLeave"]);
    // With room on free devices nobody needs to leave.
    let small = request("high", "default", 5, gang(4));
    let mut roomy = crowded(&low, &small);
    assert_eq!(found(&roomy, &once, &kept), [""; 0]);
    roomy.apply(&Change::Ended { job: id("on-d") });
    assert_eq!(found(&roomy, &once, &kept), ["NeedlessVictim"]);
    // What is kept for others is not free.
    let all_kept = [("a/0", "high"), ("d/3", "someone")];
    assert_eq!(found(&roomy, &once, &all_kept), [""; 0]);
}

#[test]
fn only_borrowers_are_reclaimed_from() {
    let (low, high) = (request("low", "left", 0, gang(8)), request("high", "right", 0, gang(8)));
    let made = cycle(Vec::new(), vec![eviction("low", EvictionCause::Reclaimed, Some("high"))]);
    let kept = [("a/0", "high")];
    for (quota, expected) in [(8, vec!["NeedlessVictim"]), (7, vec![])] {
        let mut auditor = crowded(&low, &high);
        for queue in [queue("left", None, quota), queue("right", None, 8)] {
            auditor.apply(&Change::Queue { queue: Box::new(queue) });
        }
        assert_eq!(found(&auditor, &made, &kept), expected, "quota {quota}");
    }
}

#[test]
fn a_disruption_budget_counts_what_the_auditor_has_seen() {
    let budget = Some(DisruptionBudget { count: 1, per_ms: 10_000 });
    let mut low = request("low", "default", 0, gang(8));
    low.settings.disruptions = budget;
    let high = request("high", "default", 5, gang(8));
    let mut auditor = crowded(&low, &high);
    let made = cycle(Vec::new(), vec![eviction("low", EvictionCause::Preempted, Some("high"))]);
    let kept = |device: &DeviceId| (device.node.as_str() == "a").then(|| id("high"));
    auditor.check(&made, kept).unwrap();
    let again = |at: u64| {
        let mut auditor = auditor.clone();
        auditor.recall(&id("low"), &[NOW], false);
        let mut made = made.clone();
        made.now = Timestamp(at);
        auditor.check(&made, kept).is_ok()
    };
    assert!(!again(NOW.0 + 9_999));
    assert!(again(NOW.0 + 10_000));
}

#[test]
fn the_books_agree_with_the_fleet_after_nodes_and_jobs_come_and_go() {
    let job = request("job", "default", 0, gang(2));
    let mut fleet = Snapshot::new();
    machines().into_iter().for_each(|node| fleet.upsert_node(node));
    let mut auditor = auditor(&[&job], &[]);
    auditor.apply(&Change::NodeGone { node: "a".parse().unwrap() });
    let made = cycle(vec![plan(&job, &["a/0", "a/1"])], Vec::new());
    assert_eq!(found(&auditor, &made, &[]), ["NoSuchDevice", "NoSuchDevice"]);
    auditor.apply(&Change::Node { node: Box::new(machines().remove(0)) });
    assert_eq!(found(&auditor, &made, &[]), [""; 0]);
    auditor.apply(&Change::Ended { job: id("job") });
    assert_eq!(found(&auditor, &made, &[]), ["UnknownJob"]);
}

#[test]
fn spares_that_could_not_serve_or_are_lent_to_the_wrong_job_are_found() {
    let mut owner = request("owner", "default", 3, gang(4));
    owner.gang.spares = 2;
    owner.gang.topology = vec![TopologyRule { ranks: 0, level: "rack".to_owned(), required: true }];
    let guest = request("guest", "default", 3, gang(1));
    type Spoil<'a> = (&'a dyn Fn(&mut Request, &mut Request, &mut Vec<DeviceId>), &'a str);
    let lent = "one is lent to a job that cannot be ended at once for it";
    let cases: [Spoil<'_>; 12] = [
        (&|_, _, _| {}, ""),
        (&|owner, _, _| owner.gang.spares = 1, "they are more than it asked for"),
        (&|_, _, kept| kept[1] = device("b/0"), "a device is kept twice"),
        (&|_, _, kept| kept[1] = device("a/0"), "it holds one of them itself"),
        (&|_, _, kept| kept[1] = device("b/9"), "one of them does not exist"),
        (&|_, _, kept| kept[1] = device("x/0"), "a node of theirs is gone"),
        (
            &|_, _, kept| kept[1] = device("c/0"),
            "one of them is outside the domain that the gang must be in",
        ),
        (&|_, _, kept| kept[1] = device("b/4"), "one of them is of another model"),
        (&|_, guest, _| guest.settings.preemptible = false, lent),
        (&|_, guest, _| guest.settings.min_runtime_ms = 1, lent),
        (
            &|_, guest, _| {
                guest.settings.disruptions = Some(DisruptionBudget { count: 9, per_ms: 1 });
            },
            lent,
        ),
        (&|_, guest, _| guest.settings.priority = 4, lent),
    ];
    for (spoil, expected) in cases {
        let (mut owner, mut guest) = (owner.clone(), guest.clone());
        let mut kept = vec![device("b/0"), device("b/1")];
        spoil(&mut owner, &mut guest, &mut kept);
        let mut auditor =
            auditor(&[], &[(&owner, &["a/0", "a/1", "a/2", "a/3"]), (&guest, &["b/0"])]);
        let mut made = cycle(Vec::new(), Vec::new());
        made.spares = vec![Spares { job: id("owner"), devices: kept.clone() }];
        let shown = kept.clone();
        let judged = auditor.check(&made, |d| shown.contains(d).then(|| id("owner")));
        let found: Vec<String> =
            judged.err().into_iter().flatten().map(|v| v.to_string()).collect();
        let told = format!("devices are kept ready for owner and {expected}");
        let expected = if expected.is_empty() { Vec::new() } else { vec![told] };
        assert_eq!(found, expected);
    }
    // Nobody keeps what the scheduler itself does not show as kept.
    let mut auditor = auditor(&[], &[(&owner, &["a/0", "a/1", "a/2", "a/3"])]);
    let mut made = cycle(Vec::new(), Vec::new());
    made.spares = vec![Spares { job: id("owner"), devices: vec![device("b/0")] }];
    assert!(auditor.check(&made, |_| None).is_err());
}

#[test]
fn a_job_on_spares_is_asked_to_leave_only_when_their_owner_has_lost_something() {
    let mut owner = request("owner", "default", 0, gang(4));
    owner.gang.spares = 4;
    let guest = request("guest", "default", 0, gang(4));
    let on_c = ["c/0", "c/1", "c/2", "c/3"];
    let rest = request("rest", "default", 0, gang(4));
    let made = cycle(Vec::new(), vec![eviction("guest", EvictionCause::Recalled, Some("owner"))]);
    let judged = |owner: &Request, guest: &Request, lost: bool| {
        let mut auditor = auditor(
            &[],
            &[
                (owner, &["a/0", "a/1", "a/2", "a/3"]),
                (guest, &["b/0", "b/1", "b/2", "b/3"]),
                (&rest, &on_c),
            ],
        );
        if lost {
            auditor.apply(&Change::NodeGone { node: "a".parse().unwrap() });
        }
        let kept = [("b/0", "owner"), ("b/1", "owner"), ("b/2", "owner"), ("b/3", "owner")];
        found(&auditor, &made, &kept)
    };
    owner.gang.models = vec!["H100".to_owned()];
    assert_eq!(judged(&owner, &guest, true), [""; 0]);
    assert_eq!(judged(&owner, &guest, false), ["NeedlessVictim"]);
    let mut none = owner.clone();
    none.gang.spares = 0;
    assert_eq!(judged(&none, &guest, true), ["NeedlessVictim"]);
    let mut before = guest.clone();
    before.settings.priority = 1;
    assert_eq!(judged(&owner, &before, true), ["NeedlessVictim"]);
}
