//! `drumline sim run`: virtual time, with progress, and a way to stop it.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use drumline_sim::args::RunArgs;
use drumline_sim::record::Recorder;
use drumline_sim::world::Nobody;
use drumline_sim::{Limits, Policy, PolicyReport, Report, Scenario, Status, report};
use drumline_types::{Timestamp, format_duration_ms};
use indicatif::{ProgressBar, ProgressStyle};

use crate::commands::sim::mistake;
use crate::failure::Failure;
use crate::output::{self, Format, note};

/// Runs the command.
///
/// # Errors
/// The user's mistake, for files and names that are none.
pub(super) async fn run(args: RunArgs, format: Format) -> Result<(), Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let simulation = tokio::task::spawn_blocking({
        let (args, stop) = (args.clone(), Arc::clone(&stop));
        move || simulate(&args, &stop)
    });
    let interrupted = tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stop.store(true, Ordering::Relaxed);
            note("stopping; the report says what is known so far");
        }
    });
    let outcome = simulation.await.map_err(|error| Failure::failed(error.to_string()))?;
    interrupted.abort();
    let report = outcome?;
    if let Some(file) = &args.html {
        write(file, &report::html(&report))?;
    }
    if let Some(folder) = &args.csv {
        make(folder)?;
        for (name, text) in report::files(&report) {
            write(&folder.join(name), &text)?;
        }
    }
    let value =
        serde_json::to_value(&report).map_err(|error| Failure::failed(error.to_string()))?;
    output::value(format, &value, || report::table(&report))
}

fn simulate(args: &RunArgs, stop: &AtomicBool) -> Result<Report, Failure> {
    let policies = args.policies().map_err(mistake)?;
    let scenario = args.scenario().map_err(mistake)?;
    let mut reports = Vec::new();
    for policy in &policies {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        reports.push(one(args, &scenario, policy, stop)?);
    }
    Ok(Report::new(&scenario, reports))
}

fn one(
    args: &RunArgs,
    scenario: &Scenario,
    policy: &Policy,
    stop: &AtomicBool,
) -> Result<PolicyReport, Failure> {
    let bar = ProgressBar::new(scenario.lasts_ms);
    let style = ProgressStyle::with_template("{prefix} {bar:28} {msg}  {elapsed}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(policy.name.clone());
    let mut progress = |status: &Status| {
        bar.set_position(status.now_ms.min(status.lasts_ms));
        bar.set_message(format!(
            "{} of {}: {} jobs arrived, {} ended, {} wait",
            format_duration_ms(status.now_ms),
            format_duration_ms(status.lasts_ms),
            status.arrived,
            status.finished,
            status.waiting
        ));
    };
    let mut limits = Limits { stop, progress: &mut progress };
    let found = match &args.record {
        None => drumline_sim::run(scenario, policy, &mut Nobody, &mut limits),
        Some(folder) => {
            make(folder)?;
            let open = |name: &str| create(&folder.join(name));
            let from = Timestamp((args.record_from.max(0.0) * 3_600_000.0) as u64);
            let (snapshot, log) = (open("snapshot.json")?, open("changes.jsonl")?);
            let mut recorder = Recorder::new(from, snapshot, log, open("decisions.jsonl")?);
            let found = drumline_sim::run(scenario, policy, &mut recorder, &mut limits);
            let any = recorder.finish().map_err(|error| {
                Failure::failed(format!("cannot write to {}: {error}", folder.display()))
            })?;
            if !any {
                note("nothing was recorded: the simulation ended before");
            }
            found
        }
    };
    bar.finish_and_clear();
    found.map_err(|error| {
        Failure::failed(format!("policy {}: {error}", policy.name))
            .hint("this is a defect: report it with the command line, it happens again the same")
    })
}

fn make(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)
        .map_err(|error| Failure::user(format!("cannot make {}: {error}", folder.display())))
}

fn create(file: &Path) -> Result<BufWriter<File>, Failure> {
    File::create(file)
        .map(BufWriter::new)
        .map_err(|error| Failure::user(format!("cannot write {}: {error}", file.display())))
}

fn write(file: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(file, text)
        .map_err(|error| Failure::user(format!("cannot write {}: {error}", file.display())))
}
