//! `drumline bench launch`: from a submission to the first step of a gang, on a cluster of its own.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use drumline_data::{BuildOptions, Corpus};
use serde_json::json;

use super::{Figure, Measured, quantile};
use crate::client::Access;
use crate::cluster::{ClusterOptions, EmbeddedCluster};
use crate::commands::submit::submit;
use crate::commands::wait::{Progress, Until, outcome, until_done};
use crate::failure::Failure;
use crate::state::StateDir;

/// Arguments of `bench launch`.
#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Launches that are measured, after one that is not.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
}

/// Longest time for one launch and its one step.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) async fn run(args: &LaunchArgs) -> Result<Measured, Failure> {
    let folder = tempfile::Builder::new().prefix("drumline-bench-").tempdir()?;
    let state = StateDir::resolve(Some(folder.path()))?;
    let options = ClusterOptions::new(state.clone())?;
    let cluster = EmbeddedCluster::start(options).map_err(crate::up::failure)?;
    let measured = measure(&cluster, &state, args.runs).await;
    cluster.shutdown().await;
    let mut samples = measured?;
    samples.sort_by(f64::total_cmp);
    let setting = format!(
        "{} gangs of 4 ranks (tensor 2 x pipeline 2) on 2 nodes, each a training run of one step",
        args.runs
    );
    let figures = vec![
        Figure::new("submit to first step, half within", quantile(&samples, 0.5), "ms")
            .aim("500 ms"),
        Figure::new("submit to first step, 9 of 10 within", quantile(&samples, 0.9), "ms"),
        Figure::new("submit to first step, longest", quantile(&samples, 1.0), "ms"),
    ];
    Ok(("launch", setting, figures))
}

async fn measure(
    cluster: &EmbeddedCluster,
    state: &StateDir,
    runs: u32,
) -> Result<Vec<f64>, Failure> {
    let dataset = state.shared_dir().join("data");
    let text = state.path().join("text");
    tokio::task::spawn_blocking(move || prepare(&text, &dataset))
        .await
        .map_err(|error| Failure::failed(error.to_string()))??;
    cluster.wait_ready(Duration::from_secs(30)).await.map_err(crate::up::failure)?;
    let access = cluster.access();
    let mut samples = Vec::new();
    for run in 0..=runs {
        let sample = one(&access).await?;
        // The first finds cold files.
        if run > 0 {
            samples.push(sample);
        }
    }
    Ok(samples)
}

/// Launches one gang and returns the milliseconds from the submission to its first step.
async fn one(access: &Access) -> Result<f64, Failure> {
    let manifest = json!({
        "apiVersion": drumline_spec::table::API_VERSION,
        "kind": "TrainingJob",
        "metadata": { "name": "launch" },
        "spec": {
            "model": {
                "family": "llama", "layers": 2, "hidden": 32, "ffn": 64, "heads": 2,
                "vocab": 512, "context": 16,
            },
            "data": { "path": "data" },
            "parallelism": { "tensor": 2, "pipeline": 2 },
            "batch": { "global": 2 },
            "steps": 1,
            "checkpoint": { "intervalSteps": 0 },
            "eval": { "sequences": 1 },
        },
    });
    let begin_ms = drumline_wire::now_ms();
    let jobs = submit(access, manifest.to_string(), "bench", false).await?;
    let Some(job) = jobs.first() else {
        return Err(Failure::failed("the cluster accepted the job and named no id"));
    };
    let until = Until {
        deadline: Instant::now().checked_add(RUN_TIMEOUT),
        reconnect: Duration::from_secs(5),
        service_ready_is_enough: true,
    };
    let ended = until_done(access, &job.id, &until, &mut Progress::silent()).await?;
    outcome(&ended)?;
    // The rank's own clock, which on one machine is this one's.
    match ended.training.map(|run| run.last_step_ms) {
        Some(step_ms) if step_ms >= begin_ms => Ok((step_ms - begin_ms) as f64),
        _ => Err(Failure::failed(format!("{} ended without telling of its step", job.id))),
    }
}

/// Makes a small dataset: the reference of manifests is text enough for one step.
pub(super) fn prepare(text: &Path, dataset: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(text)?;
    for part in 0..4 {
        std::fs::write(text.join(format!("{part}.txt")), drumline_spec::reference::markdown())?;
    }
    let failed = |error: &dyn std::error::Error| Failure::failed(error.to_string());
    let corpus = Corpus::from_path(text, 1 << 20).map_err(|error| failed(&error))?;
    let options = BuildOptions { vocab: 512, held_out: 0.25, ..BuildOptions::default() };
    drumline_data::build(&corpus, dataset, &options, &mut |_| {})
        .map_err(|error| failed(&error))?;
    Ok(())
}
