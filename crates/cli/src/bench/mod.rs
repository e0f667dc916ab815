//! `drumline bench`: measures this machine and tells the figures as a table or JSON.

mod collective;
mod control;
mod gpu;
mod launch;
mod node;
mod predict;
mod profile;
mod schedule;
mod serve;
mod store;
mod train;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output::{self, Format};

pub use collective::CollectiveArgs;
pub(crate) use collective::worker as collective_worker;
pub use control::ControlArgs;
pub use gpu::DeviceArg;
pub use launch::LaunchArgs;
pub use profile::{PlanArgs, ProfileArgs};
pub use schedule::ScheduleArgs;
pub use serve::ServeArgs;
pub use store::StoreArgs;
pub use train::TrainArgs;

/// Measure this machine.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub what: Bench,
}

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// The training step: tokens per second.
    Train(TrainArgs),
    /// Collectives between processes: time and bandwidth.
    Collective(CollectiveArgs),
    /// Requests through the gateway to a served model.
    Serve(ServeArgs),
    /// Durable transactions per second, and how soon a watch tells of a change.
    Store(StoreArgs),
    /// The time from a submission to the first step of its gang.
    Launch(LaunchArgs),
    /// The decision core: placements per second, big gangs, preemption, cost against size.
    Schedule(ScheduleArgs),
    /// The whole control path in real time: queues, thousands of jobs, simulated agents.
    Control(ControlArgs),
    /// What the planner asks of a node: products, memory, operators, attention, collectives.
    Profile(ProfileArgs),
    /// The planner's predictions against the engine's steps, over sizes and splits.
    Plan(PlanArgs),
    /// All of these but the last four, with their usual settings.
    All,
}

/// One figure.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What was aimed at, in words; empty without an aim.
    pub(crate) target: &'static str,
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, target: "" }
    }

    pub(crate) fn aim(mut self, target: &'static str) -> Self {
        self.target = target;
        self
    }
}

/// Runs the command.
///
/// # Errors
/// Failed, when a measurement did.
pub async fn run(args: &BenchArgs, format: Format) -> Result<(), Failure> {
    let results = match &args.what {
        Bench::Profile(args) => vec![profile::run(args).await?],
        Bench::Plan(args) => return profile::plan(args, format).await,
        Bench::Train(args) => vec![train::run(args).await?],
        Bench::Serve(args) => vec![serve::run(args).await?],
        Bench::Collective(args) => vec![collective::run(args).await?],
        Bench::Store(args) => vec![store::run(args).await?],
        Bench::Launch(args) => vec![launch::run(args).await?],
        Bench::Control(args) => vec![control::run(args).await?],
        Bench::Schedule(args) => vec![schedule::run(args).await?],
        Bench::All => all().await?,
    };
    let machine = machine();
    let list: Vec<Value> = results.iter().map(|result| json(result, &machine)).collect();
    let value = match list.as_slice() {
        [one] => one.clone(),
        _ => Value::Array(list),
    };
    output::value(format, &value, || results.iter().map(table).collect::<Vec<_>>().join("\n"))?;
    if cfg!(debug_assertions) {
        output::note("this is a debug build: its figures say little; build with --release");
    }
    Ok(())
}

/// A benchmark's name, its setting in words, and its figures.
pub(crate) type Measured = (&'static str, String, Vec<Figure>);

/// Runs every benchmark with its usual setting, one after the other.
async fn all() -> Result<Vec<Measured>, Failure> {
    /// The setting that a command without flags has.
    #[derive(clap::Parser)]
    struct Usual<T: Args> {
        #[command(flatten)]
        args: T,
    }
    fn usual<T: Args>(flags: &[&str]) -> Result<T, Failure> {
        let words = std::iter::once("bench").chain(flags.iter().copied());
        let parsed = <Usual<T> as clap::Parser>::try_parse_from(words);
        parsed.map(|usual| usual.args).map_err(|error| Failure::failed(error.to_string()))
    }
    let next = |name: &str| output::note(&format!("measuring {name}"));
    let mut results = Vec::new();
    next("train");
    results.push(train::run(&usual(&[])?).await?);
    next("serve");
    results.push(serve::run(&usual(&[])?).await?);
    next("collective");
    results.push(collective::run(&usual(&["--op", "all_reduce"])?).await?);
    next("store");
    results.push(store::run(&usual(&[])?).await?);
    next("launch");
    results.push(launch::run(&usual(&[])?).await?);
    Ok(results)
}

fn json((name, setting, figures): &Measured, machine: &Value) -> Value {
    let list: Vec<Value> = figures
        .iter()
        .map(|figure| {
            json!({
                "name": figure.name,
                "value": figure.value,
                "unit": figure.unit,
                "target": figure.target,
            })
        })
        .collect();
    json!({
        "bench": name,
        "setting": setting,
        "version": env!("CARGO_PKG_VERSION"),
        "profile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "at_ms": drumline_wire::now_ms(),
        "machine": machine,
        "figures": list,
    })
}

fn table((name, setting, figures): &Measured) -> String {
    let rows: Vec<_> = figures
        .iter()
        .map(|figure| {
            vec![
                figure.name.clone(),
                format!("{:.3}", figure.value),
                figure.unit.to_owned(),
                figure.target.to_owned(),
            ]
        })
        .collect();
    format!("{name}: {setting}\n{}", output::table(&["FIGURE", "VALUE", "UNIT", "TARGET"], &rows))
}

/// What the figures depend on.
fn machine() -> Value {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    json!({
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        "os": std::env::consts::OS,
    })
}

/// The share `of` (0 to 1) of sorted samples lies at or below the result.
pub(crate) fn quantile(sorted: &[f64], of: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let at = (of * last as f64).ceil() as usize;
    sorted.get(at.min(last)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(quantile(&samples, 0.5), 3.0);
        assert_eq!(quantile(&samples, 1.0), 4.0);
        assert_eq!(quantile(&samples, 0.0), 1.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
