//! Measuring the serving step on one rank, without gateway or network.

use drumline_mesh::Mesh;
use drumline_spec::{Family, ModelConfig, Parallelism};
use drumline_tensor::reference::Random;
use drumline_tensor::{Cpu, DType, KV_BLOCK};

use super::{Leader, MemoryUse, Model, ModelOptions, Request, Sampling};
use crate::bench::local_groups;
use crate::error::EngineError;

/// How a measured model is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// How matrices are stored.
    pub weights: DType,
    /// Threads.
    pub threads: usize,
    /// Greatest number of sequences at once.
    pub max_batch: usize,
    /// Greatest number of tokens of a prompt and what is made after it.
    pub max_context: usize,
    /// Tokens that the cache holds in all; 0: as many as could be asked for.
    pub cached_tokens: usize,
    /// Tokens of prompts computed in one step.
    pub prefill_tokens: usize,
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServingLoad {
    /// Sequences at once.
    pub batch: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens made for each.
    pub made: usize,
}

/// What a serving measurement found.
#[derive(Debug, Clone, PartialEq)]
pub struct ServingRate {
    /// Tokens of prompts per second.
    pub prefill_tokens_per_second: f64,
    /// Tokens per second of the whole batch while decoding, by the median step.
    pub decode_tokens_per_second: f64,
    /// Bytes that a decoding step must read: weights once, and the cached keys and values of each
    /// sequence halfway through.
    pub step_bytes: f64,
}

/// Returns the LLaMA of 110 million parameters that serving is measured with.
#[must_use]
pub fn llama_110m() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        layers: 12,
        hidden: 768,
        ffn: 2048,
        heads: 12,
        kv_heads: 12,
        vocab: 32_000,
        context: 1024,
        norm_epsilon: 1e-5,
        rope_theta: 10_000.0,
        tie_embeddings: true,
    }
}

/// A model with untrained weights, on one rank.
pub struct Server {
    leader: Leader<Cpu>,
    model: ModelConfig,
    weights: DType,
    cache: DType,
    /// Prompts so far: none is like another, so that no prefix is reused.
    prompts: u64,
}

impl Server {
    /// Makes the model.
    ///
    /// # Errors
    /// [`EngineError`] when memory or threads cannot be had.
    pub fn new(model: &ModelConfig, setting: Setting) -> Result<Self, EngineError> {
        let mesh = Mesh::new(Parallelism::SINGLE);
        let groups = local_groups(mesh).swap_remove(0);
        let options = ModelOptions {
            max_batch: setting.max_batch,
            max_context: setting.max_context,
            max_queue: setting.max_batch,
            prefill_tokens: setting.prefill_tokens,
            prefill_beside_decode: setting.prefill_tokens,
            blocks: setting.cached_tokens.div_ceil(KV_BLOCK),
            weights: setting.weights,
            cache: None,
        };
        let backend = Cpu::new(setting.threads)?;
        let mut served =
            Model::new(model, Parallelism::SINGLE, mesh.coords(0), groups, backend, options)?;
        let filled = served.load(|shard, values| {
            crate::init::fill(1, crate::init::matrix(), shard, values);
            Ok::<_, std::convert::Infallible>(())
        });
        match filled {
            Ok(()) => {}
            Err(never) => match never {},
        }
        let (cache, weights) = (served.cache_format(), setting.weights);
        let leader = Leader::new(served);
        Ok(Self { leader, model: model.clone(), weights, cache, prompts: 0 })
    }

    /// Returns the memory that was planned.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        self.leader.memory()
    }

    /// Serves prompts greedily. `seconds` is the caller's monotonic clock.
    ///
    /// # Errors
    /// [`EngineError`] when the load is more than the setting allows.
    pub fn run(
        &mut self,
        load: ServingLoad,
        seconds: &(dyn Fn() -> f64 + Sync),
    ) -> Result<ServingRate, EngineError> {
        let vocab = self.model.vocab as usize;
        for _ in 0..load.batch {
            self.prompts += 1;
            let mut random = Random::new(self.prompts);
            let prompt = (0..load.prompt).map(|_| random.below(vocab) as u32).collect();
            let request = Request {
                prompt,
                max_tokens: load.made,
                sampling: Sampling::GREEDY,
                stop_tokens: Vec::new(),
            };
            self.leader.submit(request).map_err(|refusal| EngineError::Split {
                field: "max_context",
                message: refusal.to_string(),
            })?;
        }
        let (mut prefilled, mut prefill_seconds, mut steps) = (0, 0.0, Vec::new());
        while !self.leader.is_idle() {
            let start = seconds();
            let output = self.leader.step()?;
            let took = seconds() - start;
            if output.prefilled > 0 {
                prefilled += output.prefilled;
                prefill_seconds += took;
            } else if output.decoded == load.batch {
                steps.push(took);
            }
        }
        steps.sort_by(f64::total_cmp);
        let median = steps.get(steps.len() / 2).copied().unwrap_or(f64::NAN);
        let m = &self.model;
        let cached = load.batch * (load.prompt + load.made / 2);
        let pairs = 2 * m.layers as usize * m.kv_heads as usize * m.head_dim() as usize;
        // An embedding of its own is not read in full.
        let table = vocab * m.hidden as usize * self.weights.bytes();
        let unread = if m.tie_embeddings { 0 } else { table };
        let weights = self.memory().weights;
        let weights = weights - unread.min(weights);
        Ok(ServingRate {
            prefill_tokens_per_second: prefilled as f64 / prefill_seconds,
            decode_tokens_per_second: load.batch as f64 / median,
            step_bytes: (weights + cached * pairs * self.cache.bytes()) as f64,
        })
    }
}
