//! `drumline bench serve`: requests through gateway, queue and ranks, on a cluster of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::gpu::DeviceArg;
use super::launch::prepare;
use super::{Figure, Measured, quantile};
use crate::client::Access;
use crate::cluster::{ClusterOptions, EmbeddedCluster};
use crate::commands::submit::submit;
use crate::commands::wait::{Progress, Until, outcome, until_done};
use crate::failure::Failure;
use crate::gateway::Gateway;
use crate::output::note;
use crate::state::StateDir;

/// Arguments of `bench serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The model: a checkpoint or a Hugging Face folder; without it, an untrained one of 10 million
    /// parameters.
    #[arg(long)]
    pub model: Option<String>,
    /// What ranks compute on.
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
    /// Ranks that share each layer; the default is 2, and 1 on GPUs.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4))]
    pub tensor: Option<u32>,
    /// Requests in all.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub requests: u32,
    /// Requests at one time.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub concurrency: u32,
    /// Tokens to make for each.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub max_tokens: u32,
    /// How matrices are stored.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16", "int8"])]
    pub weights: String,
}

impl ServeArgs {
    fn tensor(&self) -> u32 {
        self.tensor.unwrap_or(match self.device {
            DeviceArg::Cpu => 2,
            DeviceArg::Gpu => 1,
        })
    }

    /// Returns the manifest's word.
    fn device_word(&self) -> &'static str {
        match self.device {
            DeviceArg::Cpu => "cpu",
            DeviceArg::Gpu => "gpu",
        }
    }
}

/// What every request asks the model to continue.
const PROMPT: &str = "The quick brown fox jumps over the lazy dog, and the drums go on.";
/// Longest time until the model is served.
const SERVED_TIMEOUT: Duration = Duration::from_secs(120);

/// One request's times.
struct Sample {
    first_ms: f64,
    /// Between the tokens after the first.
    each_ms: f64,
    tokens: u64,
}

pub(super) async fn run(args: &ServeArgs) -> Result<Measured, Failure> {
    let folder = tempfile::Builder::new().prefix("drumline-bench-").tempdir()?;
    let state = StateDir::resolve(Some(folder.path()))?;
    let mut options = ClusterOptions::new(state.clone())?;
    options.gpus = match args.device {
        DeviceArg::Cpu => "off",
        DeviceArg::Gpu => "required",
    };
    let cluster = EmbeddedCluster::start(options).map_err(crate::up::failure)?;
    let measured = measure(args, &cluster, &state).await;
    cluster.shutdown().await;
    let (samples, seconds) = measured?;
    let sorted = |of: fn(&Sample) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (first, each) = (sorted(|s| s.first_ms), sorted(|s| s.each_ms));
    let tokens: u64 = samples.iter().map(|sample| sample.tokens).sum();
    let setting = format!(
        "{} requests, {} at a time, {} tokens each, on {}, tensor {}, weights {}; {}",
        args.requests,
        args.concurrency,
        args.max_tokens,
        args.device_word(),
        args.tensor(),
        args.weights,
        args.model.as_deref().unwrap_or("an untrained LLaMA of 10 million parameters")
    );
    let figures = vec![
        Figure::new("completion tokens", tokens as f64 / seconds, "1/s"),
        Figure::new("time to first token, half within", quantile(&first, 0.5), "ms"),
        Figure::new("time to first token, 99 of 100 within", quantile(&first, 0.99), "ms"),
        Figure::new("time per output token, half within", quantile(&each, 0.5), "ms"),
        Figure::new("time per output token, 99 of 100 within", quantile(&each, 0.99), "ms"),
    ];
    Ok(("serve", setting, figures))
}

async fn measure(
    args: &ServeArgs,
    cluster: &EmbeddedCluster,
    state: &StateDir,
) -> Result<(Vec<Sample>, f64), Failure> {
    let addresses =
        cluster.wait_ready(Duration::from_secs(30)).await.map_err(crate::up::failure)?;
    let access = cluster.access();
    let model = match &args.model {
        Some(path) => Path::new(path)
            .canonicalize()
            .map_err(|error| Failure::user(format!("--model {path}: {error}")))?
            .display()
            .to_string(),
        None => untrained(&access, state).await?,
    };
    let manifest = json!({
        "apiVersion": drumline_spec::table::API_VERSION,
        "kind": "ModelService",
        "metadata": { "name": "bench" },
        "spec": {
            "model": model, "servedName": "bench", "parallelism": { "tensor": args.tensor() },
            "resources": { "device": args.device_word() },
            "maxBatch": args.concurrency, "maxQueue": args.concurrency,
            "weights": args.weights,
        },
    });
    finish(&access, manifest).await?;
    let gateway = Arc::new(Gateway::new(&addresses.gateway, access.token()?));
    // The gateway learns of a service a moment after the control plane does.
    let begin = Instant::now();
    while let Err(failure) = ask(&gateway, 2).await {
        if begin.elapsed() > Duration::from_secs(10) {
            return Err(failure);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    note("measuring");
    let places = Arc::new(Semaphore::new(args.concurrency as usize));
    let begin = Instant::now();
    let mut asking = JoinSet::new();
    for _ in 0..args.requests {
        let (gateway, places, tokens) = (gateway.clone(), places.clone(), args.max_tokens);
        asking.spawn(async move {
            let _place =
                places.acquire().await.map_err(|error| Failure::failed(error.to_string()))?;
            ask(&gateway, tokens).await
        });
    }
    let mut samples = Vec::new();
    while let Some(asked) = asking.join_next().await {
        samples.push(asked.map_err(|error| Failure::failed(error.to_string()))??);
    }
    Ok((samples, begin.elapsed().as_secs_f64()))
}

/// Trains a model for one step, for its shape alone, and returns its checkpoint.
async fn untrained(access: &Access, state: &StateDir) -> Result<String, Failure> {
    let (text, dataset) = (state.path().join("text"), state.shared_dir().join("data"));
    tokio::task::spawn_blocking(move || prepare(&text, &dataset))
        .await
        .map_err(|error| Failure::failed(error.to_string()))??;
    let manifest = json!({
        "apiVersion": drumline_spec::table::API_VERSION,
        "kind": "TrainingJob",
        "metadata": { "name": "bench" },
        "spec": {
            "model": {
                "family": "llama", "layers": 6, "hidden": 320, "ffn": 896, "heads": 8,
                "kvHeads": 4, "vocab": 4096, "context": 256,
            },
            "data": { "path": "data" },
            "parallelism": { "tensor": 2, "pipeline": 2 },
            "batch": { "global": 2, "sequence": 32 },
            "steps": 1,
            "checkpoint": { "intervalSteps": 0 },
            "eval": { "sequences": 1 },
        },
    });
    finish(access, manifest).await
}

/// Submits a job, waits until it has ended or is ready, and returns its checkpoint, if it has one.
async fn finish(access: &Access, manifest: Value) -> Result<String, Failure> {
    let jobs = submit(access, manifest.to_string(), "bench", false).await?;
    let id = jobs.first().map(|job| job.id.clone()).unwrap_or_default();
    let until = Until {
        deadline: Instant::now().checked_add(SERVED_TIMEOUT),
        reconnect: Duration::from_secs(5),
        service_ready_is_enough: true,
    };
    let job = until_done(access, &id, &until, &mut Progress::silent()).await?;
    outcome(&job)?;
    Ok(job.training.map(|run| run.checkpoint_path).unwrap_or_default())
}

async fn ask(gateway: &Gateway, max_tokens: u32) -> Result<Sample, Failure> {
    let request = json!({
        "model": "bench", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 1.0,
        "ignore_eos": true, "stream": true, "stream_options": { "include_usage": true },
    });
    let begin = Instant::now();
    let mut events = gateway.stream("/v1/completions", &request).await?;
    let (mut first, mut tokens) = (None, 0);
    while let Some(event) = events.next().await? {
        let text = event.pointer("/choices/0/text").and_then(Value::as_str).unwrap_or_default();
        if !text.is_empty() {
            first.get_or_insert_with(|| begin.elapsed());
        }
        if let Some(made) = event.pointer("/usage/completion_tokens").and_then(Value::as_u64) {
            tokens = made;
        }
    }
    let total = begin.elapsed();
    let first = first.unwrap_or(total);
    let after = tokens.saturating_sub(1).max(1) as f64;
    Ok(Sample {
        first_ms: first.as_secs_f64() * 1e3,
        each_ms: (total - first).as_secs_f64() * 1e3 / after,
        tokens,
    })
}
