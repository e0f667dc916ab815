//! A training run.

use serde::{Deserialize, Serialize};

use crate::gang::Parallelism;
use crate::memory::MemoryOptions;
use crate::model::ModelConfig;

/// Where tokens come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSource {
    /// Folder with token shards and `dataset.json`, as `drumline data build` writes it.
    pub path: String,
}

/// AdamW's constants (Loshchilov and Hutter 2019).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled decay, for matrices only (not norms, biases or embeddings of positions).
    pub weight_decay: f32,
    /// Greatest global gradient norm; 0 switches clipping off.
    pub clip_norm: f32,
    /// How the copy of the weights that products read is rounded, where a device keeps one.
    #[serde(default)]
    pub rounding: WeightRounding,
}

/// How weights are rounded to the bf16 that products read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightRounding {
    /// To the nearest, ties to even.
    #[default]
    Nearest,
    /// Up or down by chance, right on average.
    Stochastic,
}

/// Linear warm-up, then a cosine down to the least rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LearningRate {
    /// The greatest rate, reached at the end of the warm-up.
    pub peak: f32,
    /// The rate at the last step.
    pub floor: f32,
    /// Steps of warm-up.
    pub warmup_steps: u64,
}

/// When checkpoints are written and which are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpointing {
    /// Folder of the run's checkpoints; empty: a folder of the job's own in the state directory.
    pub path: String,
    /// Steps between two checkpoints; 0 writes only the last.
    pub interval_steps: u64,
    /// How many complete checkpoints are kept, at least 1.
    pub keep: u32,
    /// Checkpoint folder to start from, when the run has none of its own yet.
    pub resume_from: Option<String>,
}

/// The numbers that matrix products are computed with. Weights, gradients, activations and the
/// optimizer are f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 throughout.
    #[default]
    F32,
    /// Inputs rounded to bf16, products added up in f32.
    Bf16,
}

impl Precision {
    /// Returns the word used in manifests and reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// A training run, checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingJob {
    /// The model's shape.
    pub model: ModelConfig,
    /// The data.
    pub data: DataSource,
    /// How the model is split.
    pub parallelism: Parallelism,
    /// Parts of the layers that each pipeline stage holds, at least 1; more than 1 interleaves the
    /// schedule.
    #[serde(default = "one")]
    pub virtual_stages: u32,
    /// What matrix products are computed with.
    #[serde(default)]
    pub precision: Precision,
    /// What is given for memory.
    #[serde(default)]
    pub memory: MemoryOptions,
    /// Whether the bits of a run must not depend on how many threads its ranks get.
    #[serde(default)]
    pub deterministic: bool,
    /// Number of optimizer steps.
    pub steps: u64,
    /// Sequences in one optimizer step, over all ranks.
    pub global_batch: u32,
    /// Sequences in one forward pass of one rank.
    pub micro_batch: u32,
    /// Tokens in one sequence, at most the model's context.
    pub sequence: u32,
    /// The seed of initial weights and data order.
    pub seed: u64,
    /// AdamW's constants.
    pub optimizer: Optimizer,
    /// The learning rate's course.
    pub learning_rate: LearningRate,
    /// Checkpoints.
    pub checkpoint: Checkpointing,
    /// Steps between two losses on the held-out split; 0 measures it only at the end.
    pub eval_interval_steps: u64,
    /// Held-out sequences in one such measurement.
    pub eval_sequences: u32,
}

/// What a spec that was stored before the field existed means.
fn one() -> u32 {
    1
}

impl TrainingJob {
    /// Returns the forward passes that one rank makes in one optimizer step.
    #[must_use]
    pub fn micro_batches(&self) -> u32 {
        self.global_batch / (self.micro_batch * self.parallelism.data)
    }

    /// Returns the tokens of one optimizer step.
    #[must_use]
    pub fn tokens_per_step(&self) -> u64 {
        u64::from(self.global_batch) * u64::from(self.sequence)
    }
}
