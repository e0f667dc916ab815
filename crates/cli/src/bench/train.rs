//! `drumline bench train`: the training step, on the threads of one process, on the same models as
//! the PyTorch script under `tests/peers/`.

use std::time::Instant;

use clap::Args;
use drumline_engine::bench::{self, Preset, TrainingRate};
use drumline_engine::probe::NoProbe;
use drumline_spec::Parallelism;

use super::{Figure, Measured};
use crate::failure::Failure;

/// Arguments of `bench train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The model: gpt-10m, llama-10m or gpt2-124m.
    #[arg(long, default_value = "llama-10m")]
    pub model: String,
    /// Steps, the first of which does not count.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub steps: u32,
    /// Threads of each rank; 0: the cores, divided among the ranks.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Tensor parallelism.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tensor: u32,
    /// Pipeline stages.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub pipeline: u32,
    /// Data-parallel copies.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub data: u32,
    /// Sequences in one forward pass; 0: all that a copy has of the step.
    #[arg(long, default_value_t = 0)]
    pub micro: u32,
}

pub(super) async fn run(args: &TrainArgs) -> Result<Measured, Failure> {
    let presets = bench::presets();
    let Some(preset) = presets.iter().find(|preset| preset.name == args.model).cloned() else {
        let names: Vec<_> = presets.iter().map(|preset| preset.name).collect();
        return Err(Failure::user(format!(
            "--model {:?} is not one of {}",
            args.model,
            names.join(", ")
        )));
    };
    let split = Parallelism { tensor: args.tensor, pipeline: args.pipeline, data: args.data };
    let mistakes = preset.model.check(split.tensor, split.pipeline);
    if let Some(mistake) = mistakes.first() {
        return Err(Failure::user(mistake.to_string()));
    }
    let micro =
        if args.micro == 0 { preset.batch / split.data.min(preset.batch) } else { args.micro };
    let part = u64::from(micro) * u64::from(split.data);
    if part == 0 || !u64::from(preset.batch).is_multiple_of(part) {
        return Err(Failure::user(format!(
            "batch {} is not divisible by data {} x micro {micro}",
            preset.batch, split.data
        )));
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let ranks = split.world_size() as usize;
    let threads = if args.threads == 0 { (cores / ranks).max(1) } else { args.threads };
    let steps = u64::from(args.steps);
    let (rate, preset) = tokio::task::spawn_blocking(move || {
        measure(&preset, split, micro, steps, threads).map(|rate| (rate, preset))
    })
    .await
    .map_err(|error| Failure::failed(error.to_string()))??;
    let setting = format!(
        "{} ({:.1} million parameters), batch {} x {} tokens, f32, tensor {} x pipeline {} x data {}, \
         {threads} threads a rank",
        preset.name,
        rate.parameters as f64 / 1e6,
        preset.batch,
        preset.sequence,
        split.tensor,
        split.pipeline,
        split.data
    );
    let mut sorted = rate.step_seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let figures = vec![
        Figure::new("tokens", rate.tokens_per_second, "1/s")
            .aim("0.8 x PyTorch on the same machine"),
        Figure::new("step, median", super::quantile(&sorted, 0.5) * 1e3, "ms"),
        Figure::new("step, shortest", super::quantile(&sorted, 0.0) * 1e3, "ms"),
        Figure::new("operations", rate.flops / 1e9, "GFLOP/s"),
        Figure::new("loss, first step", f64::from(rate.loss.0), "nat"),
        Figure::new("loss, last step", f64::from(rate.loss.1), "nat"),
    ];
    Ok(("train", setting, figures))
}

fn measure(
    preset: &Preset,
    split: Parallelism,
    micro: u32,
    steps: u64,
    threads: usize,
) -> Result<TrainingRate, Failure> {
    let job = bench::job(preset, split, micro, steps);
    let begin = Instant::now();
    bench::train(&job, threads, &|| begin.elapsed().as_secs_f64(), &NoProbe)
        .map_err(|error| Failure::failed(error.to_string()))
}
