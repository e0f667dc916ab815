//! The decision speed of the core, as `drumline bench schedule` measures it, without the binary:
//! `cargo bench -p drumline-scheduler --bench decide [NODES]`.

#[allow(dead_code, unreachable_pub, clippy::expect_used)]
#[path = "../../cli/src/bench/schedule/world.rs"]
mod world;

use world::{World, Wrong, peak_memory, single, whole_node};

fn main() {
    let nodes = std::env::args().filter_map(|word| word.parse().ok()).next().unwrap_or(10_000);
    if let Err(Wrong(why)) = run(nodes) {
        println!("wrong: {why}");
        std::process::exit(1);
    }
}

fn run(nodes: u32) -> Result<(), Wrong> {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1000.0;
    let both = |times: &world::Times| {
        let cpu = times.cycle_cpu.map_or(f64::NAN, ms);
        format!("{:.3} ms, {cpu:.3} ms of processor", ms(times.cycle))
    };
    let mut world = World::busy(nodes, 2, 1);
    world.submit(nodes * 10, 0, &single());
    let burst = world.settle()?;
    let rate = burst.started as f64 / burst.cycle.as_secs_f64();
    let audit = ms(burst.audit) * 1000.0 / burst.started as f64;
    println!("{nodes} nodes: burst of {}: {rate:.0}/s, audit {audit:.2} us each", burst.started);
    let churn = world.churn(20, 1000)?;
    let rate = churn.started as f64 / churn.cycle.as_secs_f64();
    let whole = churn.started as f64 / (churn.cycle + churn.apply).as_secs_f64();
    println!("churn of {}: {rate:.0}/s in cycles, {whole:.0}/s with changes", churn.started);
    println!("burst: {}; churn: {}", both(&burst), both(&churn));
    drop(world);

    let mut world = World::busy(nodes, 2, 1);
    world.submit(nodes * 10, 0, &whole_node());
    let first = world.settle()?;
    println!("first look at {} that do not fit: {}", nodes * 10, both(&first));
    println!("nothing, unchanged: {}", both(&world.nothing()?));
    println!("nothing, one job ended: {}", both(&world.almost_nothing()?));
    let gang = world.rack_gang(4096)?;
    println!("4,096 in one rack: {}, audit {:.2} ms", both(&gang), ms(gang.audit));
    drop(world);

    let mut world = World::busy(nodes, 8, 4);
    world.submit(nodes * 10, 0, &single());
    world.settle()?;
    let preempted = world.preempt(1024)?;
    println!(
        "1,024 by preemption of {}: {}, audit {:.2} ms",
        preempted.evicted,
        both(&preempted),
        ms(preempted.audit)
    );
    println!("peak memory: {} MiB", peak_memory().unwrap_or(0) >> 20);
    Ok(())
}
