//! Predicted against measured step times of the CPU engine: the planner's formulas with this
//! node's own profile, over sizes and splits, both sides in one run.

use std::collections::BTreeMap;
use std::time::Instant;

use drumline_engine::bench::{self, Preset};
use drumline_engine::probe::NoProbe;
use drumline_planner::step::{StepTime, step_time};
use drumline_planner::{Batch, Dtype, Model, Split, Stack};
use drumline_spec::{Family, ModelConfig, Parallelism};
use serde::Serialize;

use super::node::{self, Extent, Samples, Setting};

/// One run: a model and a split.
#[derive(Debug, Clone)]
pub(super) struct Case {
    preset: Preset,
    split: Parallelism,
    micro: u32,
    threads: usize,
}

/// One run, predicted and measured.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    /// The model.
    pub(super) model: &'static str,
    /// Parameters.
    pub(super) parameters: u64,
    /// Tensor, pipeline and data.
    pub(super) split: (u32, u32, u32),
    /// Sequences of a step, and of a micro-batch.
    pub(super) batch: (u32, u32),
    /// Tokens of a sequence.
    pub(super) sequence: u32,
    /// Threads of each rank.
    pub(super) threads: usize,
    /// Seconds of a step, predicted.
    pub(super) predicted: f64,
    /// Seconds of a step, the median of those measured.
    pub(super) measured: f64,
    /// How far the prediction is off, in percent.
    pub(super) error_percent: f64,
    /// What the prediction is made of.
    pub(super) terms: StepTime,
}

/// Returns the models: three sizes of GPT, a LLaMA with grouped queries, and a short and a long
/// sequence.
fn presets() -> Vec<Preset> {
    let gpt = |layers, hidden: u32, vocab| ModelConfig {
        family: Family::Gpt2,
        layers,
        hidden,
        ffn: 4 * hidden,
        heads: hidden / 64,
        kv_heads: hidden / 64,
        vocab,
        context: 512,
        norm_epsilon: 1e-5,
        rope_theta: 10_000.0,
        tie_embeddings: true,
    };
    let llama = ModelConfig {
        family: Family::Llama,
        ffn: 1280,
        heads: 8,
        kv_heads: 4,
        tie_embeddings: false,
        ..gpt(8, 512, 2048)
    };
    vec![
        Preset { name: "gpt-3m", model: gpt(4, 256, 256), batch: 8, sequence: 256 },
        Preset { name: "gpt-10m", model: gpt(6, 384, 256), batch: 8, sequence: 128 },
        Preset { name: "llama-24m", model: llama, batch: 4, sequence: 128 },
        Preset { name: "gpt-38m", model: gpt(12, 512, 512), batch: 2, sequence: 256 },
    ]
}

/// Returns the runs: each model on one thread, on all, and over the splits that its batch allows.
pub(super) fn cases(cores: usize) -> Vec<Case> {
    // Tensor, pipeline, data; pipelines run one sequence at a time.
    let all: [(u32, u32, u32); 7] =
        [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)];
    let mut list = Vec::new();
    for (preset, kept) in presets().into_iter().zip([7, 5, 4, 3]) {
        for (tensor, pipeline, data) in all.into_iter().take(kept) {
            let split = Parallelism { tensor, pipeline, data };
            let micro = if pipeline > 1 { 1 } else { preset.batch / data };
            let threads = (cores / split.world_size() as usize).max(1);
            let case = Case { preset: preset.clone(), split, micro, threads };
            if split == Parallelism::SINGLE && threads > 1 {
                list.push(Case { threads: 1, ..case.clone() });
            }
            list.push(case);
        }
    }
    list
}

impl Case {
    /// Returns the kind of rank that the run has, and how many of them compute at one time: no
    /// more than the cores hold.
    fn setting(&self, cores: usize) -> Setting {
        let ranks = self.split.world_size() as usize;
        let at_once = ranks.min((cores / self.threads).max(1));
        Setting { threads: self.threads, at_once, bf16: false, extent: Extent::PROCESSOR }
    }
}

/// Measures kernels and steps in `rounds` alternating rounds, and predicts each step from the
/// kernels of its own kind of rank.
///
/// # Errors
/// What went wrong, in words.
pub(super) fn run(
    cases: &[Case],
    cores: usize,
    rounds: u32,
    tell: &dyn Fn(String),
) -> Result<Vec<Row>, String> {
    let mut samples: BTreeMap<Setting, Samples> = BTreeMap::new();
    let mut steps: Vec<Vec<f64>> = vec![Vec::new(); cases.len()];
    let begin = Instant::now();
    for round in 0..rounds {
        for setting in cases.iter().map(|case| case.setting(cores)) {
            samples.entry(setting).or_default();
        }
        tell(format!("round {} of {rounds}: kernels", round + 1));
        for (setting, samples) in &mut samples {
            let open = node::processor(setting.threads);
            node::round(*setting, &open, 10, samples).map_err(|error| error.to_string())?;
            let mut worlds: Vec<u32> = cases
                .iter()
                .filter(|case| case.setting(cores) == *setting)
                .map(|case| case.split.world_size())
                .filter(|ranks| *ranks > 1)
                .collect();
            worlds.sort_unstable();
            worlds.dedup();
            for ranks in worlds {
                node::collectives_in_process(ranks, 5, samples)?;
            }
        }
        tell(format!("round {} of {rounds}: steps", round + 1));
        for (case, steps) in cases.iter().zip(&mut steps) {
            let job = bench::job(&case.preset, case.split, case.micro, 5);
            let clock = || begin.elapsed().as_secs_f64();
            let rate = bench::train(&job, case.threads, &clock, &NoProbe)
                .map_err(|error| format!("{}: {error}", case.preset.name))?;
            steps.extend(rate.step_seconds);
        }
    }
    cases
        .iter()
        .zip(&steps)
        .map(|(case, steps)| {
            let setting = case.setting(cores);
            let empty = Samples::default();
            let samples = samples.get(&setting).unwrap_or(&empty);
            let profile = node::profile("cpu".to_owned(), setting, 256, 16e9, samples);
            predict(case, &profile, node::median(steps))
        })
        .collect()
}

fn predict(
    case: &Case,
    profile: &drumline_planner::profile::Profile,
    measured: f64,
) -> Result<Row, String> {
    let model = Model::from(&case.preset.model);
    let split = Split {
        tensor: case.split.tensor,
        pipeline: case.split.pipeline,
        data: case.split.data,
        micro_batch: case.micro,
        ..Split::SINGLE
    };
    let batch = Batch {
        sequence: case.preset.sequence,
        global: case.preset.batch,
        dtype: Dtype::Fp32,
        stack: Stack::Native,
    };
    let terms = step_time(&model, &split, &batch, &profile.machines())
        .map_err(|error| format!("{}: {error}", case.preset.name))?;
    Ok(Row {
        model: case.preset.name,
        parameters: case.preset.model.parameters(),
        split: (split.tensor, split.pipeline, split.data),
        batch: (batch.global, split.micro_batch),
        sequence: batch.sequence,
        threads: case.threads,
        predicted: terms.step,
        measured,
        error_percent: (terms.step / measured - 1.0) * 100.0,
        terms,
    })
}
