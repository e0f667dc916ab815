//! `drumline bench schedule`: how fast the decision core decides, and what it costs as fleets grow.

mod world;

use std::time::Duration;

use clap::Args;

use self::world::{Times, World, Wrong, peak_memory, single, whole_node};
use super::{Figure, Measured};
use crate::failure::Failure;

/// Arguments of `bench schedule`.
#[derive(Debug, Args)]
pub struct ScheduleArgs {
    /// Nodes of the fleet, 8 devices each. Ten jobs are queued for each, and two run.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1000..=100_000))]
    pub nodes: u32,
    /// Sizes of fleets in nodes for the table of cost against size; none: no table.
    #[arg(long, value_delimiter = ',', default_values_t = [1000, 4000, 16_000, 64_000],
          value_parser = clap::value_parser!(u32).range(1000..=100_000))]
    pub sizes: Vec<u32>,
    /// Measure the one fleet only.
    #[arg(long)]
    pub no_sizes: bool,
}

pub(super) async fn run(args: &ScheduleArgs) -> Result<Measured, Failure> {
    let (nodes, sizes) = (args.nodes, if args.no_sizes { Vec::new() } else { args.sizes.clone() });
    let measured = tokio::task::spawn_blocking(move || measure(nodes, &sizes)).await;
    let figures = measured
        .map_err(|error| Failure::failed(error.to_string()))?
        .map_err(|Wrong(why)| Failure::failed(why))?;
    let setting = format!(
        "{nodes} nodes x 8 devices in zones, spines and racks, {} jobs queued, {} running, one \
         thread; through Scheduler::cycle, every cycle audited",
        nodes * 10,
        nodes * 2
    );
    Ok(("schedule", setting, figures))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn rate(times: &Times) -> f64 {
    times.started as f64 / times.cycle.as_secs_f64()
}

/// The middle of several samples, each taken by `sample`.
fn median(times: usize, mut sample: impl FnMut() -> Result<f64, Wrong>) -> Result<f64, Wrong> {
    let mut samples = (0..times).map(|_| sample()).collect::<Result<Vec<f64>, Wrong>>()?;
    samples.sort_by(f64::total_cmp);
    Ok(super::quantile(&samples, 0.5))
}

fn measure(nodes: u32, sizes: &[u32]) -> Result<Vec<Figure>, Wrong> {
    let mut figures = Vec::new();
    let mut world = World::busy(nodes, 2, 1);
    world.submit(nodes * 10, 0, &single());
    let burst = world.settle()?;
    let audit = burst.audit.as_secs_f64() * 1e6 / burst.started as f64;
    figures.push(Figure::new("single devices until the fleet is full", rate(&burst), "1/s"));
    if let Some(cpu) = burst.cycle_cpu {
        let rate = burst.started as f64 / cpu.as_secs_f64();
        figures.push(Figure::new("the same, by processor time", rate, "1/s"));
    }
    let churn = world.churn(10, 1000)?;
    let whole = churn.started as f64 / (churn.cycle + churn.apply).as_secs_f64();
    figures.push(
        Figure::new("single devices sustained, 1,000 end and 1,000 come", whole, "1/s")
            .aim("20,000"),
    );
    figures.push(Figure::new("audit of one placement", audit, "us"));
    drop(world);

    let mut world = World::busy(nodes, 2, 1);
    world.submit(nodes * 10, 0, &whole_node());
    figures.push(Figure::new("first look at all that wait", ms(world.settle()?.cycle), "ms"));
    let nothing = median(11, || Ok(ms(world.nothing()?.cycle)))?;
    figures.push(Figure::new("cycle in which nothing fits", nothing, "ms").aim("under 20"));
    let ended = median(11, || Ok(ms(world.almost_nothing()?.cycle)))?;
    figures.push(Figure::new("the same, after a job has ended", ended, "ms").aim("under 20"));
    let gang = world.rack_gang(4096)?;
    figures.push(Figure::new("4,096 devices in one rack", ms(gang.cycle), "ms").aim("under 50"));
    figures.push(Figure::new("audit of it", ms(gang.audit), "ms"));
    drop(world);

    let mut world = World::busy(nodes, 8, 4);
    world.submit(nodes * 10, 0, &single());
    world.settle()?;
    let preempted = world.preempt(1024)?;
    figures.push(
        Figure::new("1,024 devices by preemption", ms(preempted.cycle), "ms").aim("under 500"),
    );
    figures.push(Figure::new("victims of it", preempted.evicted as f64, "jobs"));
    drop(world);
    if let Some(peak) = peak_memory() {
        let peak = peak as f64 / f64::from(1u32 << 30);
        figures.push(Figure::new("peak memory", peak, "GiB").aim("under 2"));
    }
    let mut rows = Vec::new();
    for &nodes in sizes {
        let row = at_size(nodes)?;
        let named = COSTS.iter().zip(row);
        figures.extend(named.map(|((what, unit), value)| {
            Figure::new(format!("{nodes} nodes: {what}"), value, unit)
        }));
        rows.push((nodes, row));
    }
    figures.extend(growth(&rows));
    Ok(figures)
}

/// What the table of cost against size tells of each size, with units.
const COSTS: [(&str, &str); 5] = [
    ("one device", "us"),
    ("nothing fits", "ms"),
    ("nothing fits, after a job has ended", "ms"),
    ("4,096 in one rack", "ms"),
    ("1,024 by preemption", "ms"),
];

/// A row of the table of cost against size.
fn at_size(nodes: u32) -> Result<[f64; COSTS.len()], Wrong> {
    let mut world = World::busy(nodes, 2, 1);
    world.submit(nodes * 10, 0, &single());
    let burst = world.settle()?;
    let each = burst.cycle.as_secs_f64() * 1e6 / burst.started as f64;
    drop(world);
    let mut world = World::busy(nodes, 2, 1);
    world.submit(nodes * 10, 0, &whole_node());
    world.settle()?;
    let nothing = median(5, || Ok(ms(world.nothing()?.cycle)))?;
    let ended = median(5, || Ok(ms(world.almost_nothing()?.cycle)))?;
    let gang = ms(world.rack_gang(4096)?.cycle);
    drop(world);
    let mut world = World::busy(nodes, 8, 4);
    let preempted = ms(world.preempt(1024)?.cycle);
    Ok([each, nothing, ended, gang, preempted])
}

/// The power of the size with which each cost grows between the smallest and the largest fleet: 1
/// is in proportion, 0 not at all.
fn growth(rows: &[(u32, [f64; COSTS.len()])]) -> Vec<Figure> {
    let (Some((small, first)), Some((large, last))) = (rows.first(), rows.last()) else {
        return Vec::new();
    };
    if large <= small {
        return Vec::new();
    }
    let times = f64::from(*large) / f64::from(*small);
    let costs = COSTS.iter().zip(first.iter().zip(last));
    costs
        .map(|((what, _), (first, last))| {
            let name = format!("{what}: cost grows as nodes to the power of");
            Figure::new(name, (last / first).ln() / times.ln(), "").aim("near 1 or less")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_as_a_power() {
        let rows = [(1000, [1.0; COSTS.len()]), (64_000, [64.0; COSTS.len()])];
        let powers: Vec<f64> = growth(&rows).iter().map(|figure| figure.value).collect();
        assert!(powers.iter().all(|power| (power - 1.0).abs() < 1e-9), "{powers:?}");
        assert!(growth(&rows[..1]).is_empty());
    }

    #[test]
    fn every_scenario_comes_about_on_a_small_fleet() {
        let figures = measure(1000, &[]).map_err(|Wrong(why)| why).unwrap();
        let victims = figures.iter().find(|figure| figure.name == "victims of it");
        assert_eq!(victims.map(|figure| figure.value), Some(256.0));
        assert!(figures.iter().all(|figure| figure.value.is_finite()));
    }
}
