//! Measuring the serving step on one rank, without gateway or network.

use drumline_mesh::Mesh;
use drumline_spec::{Family, ModelConfig, Parallelism};
use drumline_tensor::reference::Random;
use drumline_tensor::{Cpu, DType};

use super::{Leader, MemoryUse, Model, ModelOptions, Request, Sampling};
use crate::bench::local_groups;
use crate::error::EngineError;

/// What is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServingLoad {
    /// How matrices are stored.
    pub weights: DType,
    /// Threads.
    pub threads: usize,
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
    /// The rank's memory.
    pub memory: MemoryUse,
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

/// Serves prompts greedily with untrained weights. `seconds` is the caller's monotonic clock.
///
/// # Errors
/// [`EngineError`] when memory or threads cannot be had or the context is too short.
pub fn serve(
    model: &ModelConfig,
    load: ServingLoad,
    seconds: &(dyn Fn() -> f64 + Sync),
) -> Result<ServingRate, EngineError> {
    let mesh = Mesh::new(Parallelism::SINGLE);
    let groups = local_groups(mesh).swap_remove(0);
    let options = ModelOptions {
        max_batch: load.batch,
        max_context: load.prompt + load.made,
        max_queue: load.batch,
        prefill_tokens: 512,
        prefill_beside_decode: 512,
        blocks: 0,
        weights: load.weights,
    };
    let backend = Cpu::new(load.threads)?;
    let mut served =
        Model::new(model, Parallelism::SINGLE, mesh.coords(0), groups, backend, options)?;
    let weights = served.load(|shard, values| {
        crate::init::fill(1, crate::init::matrix(), shard, values);
        Ok::<_, std::convert::Infallible>(())
    });
    match weights {
        Ok(()) => {}
        Err(never) => match never {},
    }
    let memory = served.memory();
    let mut leader = Leader::new(served);
    for i in 0..load.batch {
        let mut random = Random::new(i as u64);
        let prompt = (0..load.prompt).map(|_| random.below(model.vocab as usize) as u32).collect();
        let request = Request {
            prompt,
            max_tokens: load.made,
            sampling: Sampling::GREEDY,
            stop_tokens: Vec::new(),
        };
        leader.submit(request).map_err(|refusal| EngineError::Split {
            field: "max_context",
            message: refusal.to_string(),
        })?;
    }
    let (mut prefilled, mut prefill_seconds, mut steps) = (0, 0.0, Vec::new());
    while !leader.is_idle() {
        let start = seconds();
        let output = leader.step()?;
        let took = seconds() - start;
        if output.prefilled > 0 {
            prefilled += output.prefilled;
            prefill_seconds += took;
        } else {
            steps.push(took);
        }
    }
    steps.sort_by(f64::total_cmp);
    let median = steps.get(steps.len() / 2).copied().unwrap_or(f64::NAN);
    let cached = load.batch * (load.prompt + load.made / 2);
    let pairs = 2 * model.layers as usize * model.kv_heads as usize * model.head_dim() as usize;
    // An embedding of its own is not read in full.
    let table = model.vocab as usize * model.hidden as usize * load.weights.bytes();
    let unread = if model.tie_embeddings { 0 } else { table };
    Ok(ServingRate {
        prefill_tokens_per_second: prefilled as f64 / prefill_seconds,
        decode_tokens_per_second: load.batch as f64 / median,
        step_bytes: (memory.weights - unread.min(memory.weights) + cached * pairs * 4) as f64,
        memory,
    })
}
