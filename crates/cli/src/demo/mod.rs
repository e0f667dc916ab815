//! `drumline demo`: the whole of Drumline on one machine, from text to a served model.

mod ask;
mod dataset;
mod report;
mod train;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use drumline_spec::Work;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::Global;
use crate::client::Access;
use crate::cluster::{Addresses, ClusterOptions, EmbeddedCluster};
use crate::commands::submit::submit;
use crate::demo::report::{CheckpointReport, ClusterReport, Report, TrainingReport};
use crate::failure::Failure;
use crate::gateway::Gateway;
use crate::output::{self, Format, note};
use crate::state::StateDir;
use crate::up;

/// The manifest that the demo submits: the same file that a user would write.
const MANIFEST: &str = include_str!("../../../../docs/examples/train-demo.yaml");
/// What the model is asked to continue, where it learned Rust.
const PROMPT: &str = "pub fn new(";
/// And where it learned something else.
const PROMPT_ANY: &str = "The ";
/// Longest time until the cluster answers.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Train, break, recover, serve and ask a small model on this machine: the place to begin.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// File or folder with text to learn; without it, Rust source of the local cargo registry.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Kill one rank in the middle of the run, and recover.
    #[arg(long)]
    pub kill_rank: bool,
    /// Leave everything running until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
    /// Optimizer steps, instead of the manifest's.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub steps: Option<u64>,
    /// What the model is asked to continue.
    #[arg(long)]
    pub prompt: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// Failed, when a part of it did; the user's mistake, when there is no text.
pub async fn run(args: &DemoArgs, global: &Global) -> Result<(), Failure> {
    // Without a folder of the user's, everything is gone afterwards.
    let (state, temporary) = match &global.state_dir {
        Some(path) => (StateDir::resolve(Some(path))?, None),
        None => {
            let folder = tempfile::Builder::new().prefix("drumline-demo-").tempdir()?;
            (StateDir::resolve(Some(folder.path()))?, Some(folder))
        }
    };
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let cluster =
        EmbeddedCluster::start(ClusterOptions::new(state.clone())?).map_err(up::failure)?;
    let outcome = tokio::select! {
        outcome = story(args, global, &cluster, &state) => outcome,
        error = cluster.gave_up() => Err(up::failure(error)),
        _ = interrupt.recv() => Err(Failure::failed("interrupted")),
        _ = terminate.recv() => Err(Failure::failed("interrupted")),
    };
    if outcome.is_ok() && args.keep {
        note("everything runs on; press Ctrl-C to stop");
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            error = cluster.gave_up() => note(&error.to_string()),
        }
    }
    note("stopping");
    cluster.shutdown().await;
    match temporary {
        None => note(&format!("kept in {}", state.path().display())),
        Some(folder) => {
            folder.close()?;
            note("all of it is removed; `--state-dir DIR` keeps it");
        }
    }
    outcome
}

async fn story(
    args: &DemoArgs,
    global: &Global,
    cluster: &EmbeddedCluster,
    state: &StateDir,
) -> Result<(), Failure> {
    let begin = Instant::now();
    let addresses = cluster.wait_ready(READY_TIMEOUT).await.map_err(up::failure)?;
    note(&format!(
        "cluster: a control plane and {} agents with {} CPU devices, as processes of their own",
        addresses.nodes, addresses.devices
    ));
    note(&format!("dashboard: {}", addresses.dashboard));
    let access = cluster.access();
    let manifest = manifest(args.steps);
    let data = state.shared_dir().join("data/demo");
    dataset::prepare(args.data.clone(), data, vocab(&manifest)?).await?;

    let jobs = submit(&access, manifest, "docs/examples/train-demo.yaml", false).await?;
    let id = jobs.first().map(|job| job.id.clone()).unwrap_or_default();
    note(&format!("submitted {id}"));
    let run = train::watch(&access, &id, args.kill_rank).await?;
    let training = run.job.training.clone().unwrap_or_default();
    let checkpoint = PathBuf::from(&training.checkpoint_path);
    if args.kill_rank {
        let record = state.shared_dir().join("jobs").join(&id).join("losses.jsonl");
        let repeated = train::check_repeated_losses(&record)?;
        note(&format!(
            "recovered: {} restart, {repeated} steps made again with the same losses, bit for bit",
            run.job.restarts
        ));
    }
    note(&format!(
        "trained: loss {:.3} -> {:.3}, held out {:.3}, {:.0} tokens/s",
        training.loss_first, training.loss, training.loss_validation, run.tokens_per_second
    ));

    let quiet = global.output != Format::Table;
    let serving = ask(args, &access, &addresses, &checkpoint, quiet).await?;
    let report = Report {
        cluster: ClusterReport { nodes: addresses.nodes, devices: addresses.devices },
        training: TrainingReport::new(&run.job, run.tokens_per_second),
        checkpoint: CheckpointReport {
            path: training.checkpoint_path.clone(),
            step: training.checkpoint_step,
        },
        serving,
        dashboard: addresses.dashboard.clone(),
        metrics: addresses.metrics.clone(),
    };
    if quiet {
        output::value(global.output, &report.json(), String::new)?;
    }
    note(&format!("done in {:.0} s", begin.elapsed().as_secs_f64()));
    note(&format!("dashboard: {}", addresses.dashboard));
    Ok(())
}

async fn ask(
    args: &DemoArgs,
    access: &Access,
    addresses: &Addresses,
    checkpoint: &Path,
    quiet: bool,
) -> Result<report::ServingReport, Failure> {
    let gateway = Gateway::new(&addresses.gateway, access.token()?);
    let own = if args.data.is_none() { PROMPT } else { PROMPT_ANY };
    let prompt = args.prompt.as_deref().unwrap_or(own);
    ask::serve_and_ask(access, &gateway, checkpoint, prompt, quiet).await
}

/// Returns the manifest with another number of steps, if asked; its text stays as it is.
fn manifest(steps: Option<u64>) -> String {
    let Some(steps) = steps else { return MANIFEST.to_owned() };
    let line = |line: &str| match line.strip_prefix("  steps:") {
        Some(_) => format!("  steps: {steps}\n"),
        None => format!("{line}\n"),
    };
    MANIFEST.lines().map(line).collect()
}

fn vocab(manifest: &str) -> Result<u32, Failure> {
    let specs = crate::commands::manifests::check(manifest.as_bytes(), "train-demo.yaml")?;
    match specs.jobs.first().map(|spec| &spec.work) {
        Some(Work::TrainingJob(job)) => Ok(job.model.vocab),
        _ => Err(Failure::failed("the demo's manifest is no TrainingJob")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_is_sound_and_its_steps_can_be_set() {
        assert!(vocab(MANIFEST).is_ok());
        assert!(manifest(Some(7)).contains("\n  steps: 7\n"));
        assert!(vocab(&manifest(Some(7))).is_ok());
        assert_eq!(manifest(None), MANIFEST);
    }
}
