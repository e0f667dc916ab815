//! What decisions cost at scale: `cargo run --release -p drumline-scheduler --example scale`.

use std::time::Instant;

use drumline_cluster::{Change, Device, Node, Request};
use drumline_scheduler::{Options, Scheduler};
use drumline_spec::{DeviceKind, Gang, GangSettings, Parallelism, TopologyRule};
use drumline_types::{Attempt, Bytes, Timestamp};

fn job(name: String, ranks: u32, group: u32, priority: i32, now: u64) -> Request {
    Request {
        job: name.parse().expect("a legal name"),
        gang: Gang { ranks, node_group: group, device: DeviceKind::Gpu, ..Gang::default() },
        split: Parallelism { tensor: group, data: ranks / group, ..Parallelism::SINGLE },
        settings: GangSettings {
            priority,
            expected_ms: Some(3_600_000 + u64::from(ranks) * 1000),
            ..GangSettings::default()
        },
        submitted: Timestamp(now),
    }
}

fn main() {
    let nodes: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(10_000);
    let mut scheduler = Scheduler::new(Options::default());
    let started = Instant::now();
    for at in 0..nodes {
        let device = || Device::new(DeviceKind::Gpu, "NVIDIA H100 80GB HBM3", Bytes(80 << 30));
        let node = Node::new(
            format!("node-{at:05}").parse().expect("a legal name"),
            (0..8).map(|_| device()).collect(),
        )
        .within("zone", format!("z{}", at / 5120))
        .within("spine", format!("s{}", at / 1024))
        .within("rack", format!("r{}", at / 512));
        let change = Change::Node { node: Box::new(node) };
        scheduler.apply(change, Timestamp(0)).expect("a node is accepted");
    }
    println!("{nodes} nodes: {:.3} s", started.elapsed().as_secs_f64());
    let submit = |scheduler: &mut Scheduler, request: Request, now: u64| {
        let (attempt, not_before) = (Attempt(1), Timestamp(0));
        let change = Change::Submitted { request: Box::new(request), attempt, not_before };
        scheduler.apply(change, Timestamp(now)).expect("a job is accepted");
    };
    let started = Instant::now();
    for at in 0..20_000 {
        submit(&mut scheduler, job(format!("run-{at}"), 1, 1, 0, 1), 1);
    }
    println!("submit 20,000: {:.3} s", started.elapsed().as_secs_f64());
    let started = Instant::now();
    let cycle = scheduler.cycle(Timestamp(2));
    let seconds = started.elapsed().as_secs_f64();
    let placed = cycle.plan.jobs.len();
    println!("place {placed} single devices: {seconds:.3} s, {:.0}/s", placed as f64 / seconds);
    // Fill the rest with gangs of 8, so that nothing more can be placed.
    let mut at = 0;
    loop {
        for _ in 0..nodes {
            submit(&mut scheduler, job(format!("gang-{at}"), 8, 8, 0, 3), 3);
            at += 1;
        }
        let started = Instant::now();
        let cycle = scheduler.cycle(Timestamp(4));
        let placed = cycle.plan.jobs.len();
        println!("place {placed} gangs of 8: {:.3} s", started.elapsed().as_secs_f64());
        if placed < nodes {
            break;
        }
    }
    for at in 0..100_000 {
        let ranks = [8, 16, 32, 64, 128][at % 5];
        submit(&mut scheduler, job(format!("wait-{at}"), ranks, 8, 0, 5), 5);
    }
    for round in 0..6 {
        let started = Instant::now();
        let cycle = scheduler.cycle(Timestamp(6 + round));
        println!(
            "idle cycle: {:.4} s, {} tried, {} started, {} told",
            started.elapsed().as_secs_f64(),
            cycle.considered,
            cycle.plan.jobs.len(),
            cycle.told.len()
        );
    }
    for round in 0..4 {
        let job = format!("run-{round}").parse().expect("a legal name");
        scheduler.apply(Change::Ended { job }, Timestamp(20)).expect("a job ends");
        let started = Instant::now();
        let cycle = scheduler.cycle(Timestamp(20));
        println!(
            "cycle after an end: {:.4} s, {} tried, {} started",
            started.elapsed().as_secs_f64(),
            cycle.considered,
            cycle.plan.jobs.len()
        );
    }
    for (ranks, rack) in [(1024, false), (1024, true), (4096, true)] {
        let mut big = job(format!("big-{ranks}-{rack}"), ranks, 8, 10, 30);
        if rack {
            let rule = TopologyRule { ranks: 0, level: "rack".to_owned(), required: true };
            big.gang.topology.push(rule);
        }
        submit(&mut scheduler, big, 30);
        let started = Instant::now();
        let cycle = scheduler.cycle(Timestamp(31));
        println!(
            "preempt for {ranks} in one rack {rack}: {:.3} s, {} evicted",
            started.elapsed().as_secs_f64(),
            cycle.evictions.len()
        );
    }
    let started = Instant::now();
    let saved = scheduler.save();
    println!("save: {:.3} s", started.elapsed().as_secs_f64());
    let started = Instant::now();
    let restored = Scheduler::restore(saved).expect("a saved state is whole");
    println!("restore: {:.3} s, {:?}", started.elapsed().as_secs_f64(), restored.counts());
    let started = Instant::now();
    let preview = scheduler.preview(&[job("new".to_owned(), 1, 1, 0, 40)], Timestamp(40));
    println!("preview: {:.3} s, {}", started.elapsed().as_secs_f64(), preview.told.len());
}
