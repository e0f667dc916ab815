//! Memory of a training run, itemised per pipeline stage, in bytes per GPU.

use serde::Serialize;

use crate::catalogue::Dtype;
use crate::model::Model;
use crate::split::{Batch, Recompute, Split, Stack};

/// Share of activations lost to the allocator's rounding and fragments.
pub const FRAGMENTATION: f64 = 0.05;

/// The memory of one rank of one stage.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct StageMemory {
    /// The stage, from 0.
    pub stage: u32,
    /// Weights in the training format.
    pub weights: f64,
    /// Gradients.
    pub gradients: f64,
    /// Optimizer: fp32 weights and two moments.
    pub optimizer: f64,
    /// Activations of every micro-batch in flight.
    pub activations: f64,
    /// Logits, loss and their gradient.
    pub logits: f64,
    /// Buffers for communication.
    pub buffers: f64,
    /// Driver, libraries, and the allocator's fragments.
    pub overhead: f64,
}

impl StageMemory {
    /// Returns the sum.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.buffers
            + self.overhead
    }
}

/// Bytes per parameter of weights, gradients and optimizer, before sharding.
///
/// bf16: 2 + 4 + 12; fp16: 2 + 2 + 16, with the fp32 copy of the gradient; fp32: 4 + 4 + 8.
/// Source: Megatron-Core, distributed optimizer documentation (18, 20 and 16 bytes).
#[must_use]
pub fn bytes_per_parameter(dtype: Dtype) -> (f64, f64, f64) {
    match dtype {
        Dtype::Fp32 | Dtype::Tf32 => (4.0, 4.0, 8.0),
        Dtype::Fp16 => (2.0, 2.0, 16.0),
        _ => (2.0, 4.0, 12.0),
    }
}

/// Returns the activation bytes that one layer keeps for one micro-batch on one rank.
///
/// For a GPT with dropout and unfused attention this is Korthikanti et al. 2022, table 2:
/// `s b h (34 + 5 a s / h)` in whole; `10 + 24/t + 5 a s / (h t)` with tensor parallelism;
/// `(34 + 5 a s / h) / t` with sequence parallelism; without the `5 a s / h` where attention is
/// recomputed or fused; `2 s b h` (`/ t` with sequence parallelism) with full recomputation.
#[must_use]
pub fn layer_activation_bytes(model: &Model, split: &Split, batch: &Batch) -> f64 {
    let t = f64::from(split.tensor);
    let tokens =
        f64::from(split.micro_batch) * f64::from(batch.sequence) / f64::from(split.context);
    let a = batch.activation_bytes();
    let [d, h, g, e] = [model.hidden, model.heads, model.kv_heads, model.head_dim].map(f64::from);
    let sp = if split.sequence_parallel { t } else { 1.0 };
    if split.recompute == Recompute::Full {
        return a * tokens * d / sp;
    }
    let mask = if batch.stack.dropout() { 1.0 } else { 0.0 };
    // Our own engine computes the outputs of norms and non-linearity again.
    let lean = split.recompute == Recompute::Selective && batch.stack == Stack::Native;
    // Norm inputs (2), inputs of the two column-parallel matmuls (2), dropout masks (2).
    let inputs = if lean { 0.0 } else { 2.0 };
    let whole = tokens * d * ((2.0 + inputs) * a + 2.0 * mask) / sp;
    // Queries, keys, values, and the context that enters the output projection.
    let (q, k, v) = model.mla.map_or((h * e, g * e, g * e), |m| {
        let [nope, rope, value] = [m.nope_dim, m.rope_dim, m.value_dim].map(f64::from);
        (h * (nope + rope), h * (nope + rope), h * value)
    });
    let context_width = model.mla.map_or(h * e, |m| h * f64::from(m.value_dim));
    let attention = tokens * a * (q + k + v + context_width) / t;
    let scores = if batch.stack.fused_attention() {
        4.0 * tokens * h / t
    } else if split.recompute == Recompute::Selective {
        0.0
    } else {
        // Softmax output, dropout mask, dropout output.
        tokens * h / t * f64::from(batch.sequence) * (2.0 * a + mask)
    };
    // Input of the non-linearity (two of them when gated) and input of the second matmul.
    let copies = if model.gated { 3.0 } else { 2.0 } - if lean { 1.0 } else { 0.0 };
    let feed_forward = match model.moe {
        None => tokens * a * copies * f64::from(model.ffn) / t,
        Some(moe) => {
            let share = f64::from(model.moe_layers()) / f64::from(model.layers.max(1));
            let f = f64::from(moe.expert_ffn);
            let visited = f64::from(moe.top_k + moe.shared_experts);
            // Each visited expert also keeps its copy of the token.
            let expert = visited * copies * f / t + f64::from(moe.top_k) * 2.0 * d / sp;
            tokens * a * (share * expert + (1.0 - share) * copies * f64::from(model.ffn) / t)
        }
    };
    whole + attention + scores + feed_forward
}

/// Returns the parameters that one rank of a stage holds: `(outside routed experts, routed)`.
#[must_use]
pub fn stage_params(model: &Model, split: &Split, stage: u32) -> (f64, f64) {
    let layers = layers_of_stage(model.total_layers(), split.pipeline, stage);
    let t = f64::from(split.tensor);
    let mut dense = layers * model.layer_params_without_routed() / t;
    let routed = layers * model.layer_routed_params() / t / f64::from(split.expert);
    if stage == 0 {
        dense += model.embedding_params() / t;
    }
    if stage + 1 == split.pipeline && (split.pipeline > 1 || !model.tie_embeddings) {
        // The last stage holds the output projection, a copy of the embedding where it is tied.
        dense += f64::from(model.vocab) * f64::from(model.hidden) / t;
    }
    (dense, routed)
}

/// Returns the layers of a stage. Where they do not divide, the first and the last stage, which
/// carry embedding and loss, go without (Llama 3, 2407.21783, section 3.3.2).
#[must_use]
pub fn layers_of_stage(layers: u32, pipeline: u32, stage: u32) -> f64 {
    let each = layers / pipeline;
    let rest = layers % pipeline;
    let extra = if rest == 0 {
        false
    } else {
        // Hand the extra layers to the stages in the middle.
        let from = (pipeline - rest).div_ceil(2);
        stage >= from && stage < from + rest
    };
    f64::from(each + u32::from(extra))
}

/// Returns the micro-batches whose activations a stage holds at its fullest.
///
/// 1F1B: `min(m, p - stage)`. Interleaved: `p (1 + (p - 1) / (p v))` on the first stage
/// (Korthikanti et al. 2022, section 4.3), two fewer chunks on each later one.
#[must_use]
pub fn micro_batches_in_flight(split: &Split, micro_batches: u32, stage: u32) -> f64 {
    let p = f64::from(split.pipeline);
    let m = f64::from(micro_batches);
    if split.virtual_stages <= 1 || split.pipeline <= 1 {
        return (p - f64::from(stage)).min(m).max(1.0);
    }
    let v = f64::from(split.virtual_stages);
    let warm_up = (v - 1.0) * p + 2.0 * (p - 1.0 - f64::from(stage)) + 1.0;
    (warm_up / v).min(m).max(1.0 / v)
}

/// Returns the memory of one stage. `framework` is what driver and libraries take, in bytes.
#[must_use]
pub fn stage_memory(
    model: &Model,
    split: &Split,
    batch: &Batch,
    micro_batches: u32,
    framework: f64,
    stage: u32,
) -> StageMemory {
    let (dense, routed) = stage_params(model, split, stage);
    let dense_ranks = f64::from(split.data) * f64::from(split.context);
    let routed_ranks = dense_ranks / f64::from(split.expert);
    let (w, g, o) = batch.bytes_per_parameter();
    let shard = |bytes: f64, from_stage: u8| {
        if split.zero >= from_stage {
            bytes * (dense / dense_ranks + routed / routed_ranks)
        } else {
            bytes * (dense + routed)
        }
    };
    let weights = shard(w, 3);
    // Sharded from stage 2 on, where they leave after each micro-batch, in a pipeline after as
    // many as it has stages.
    let gradients = shard(g, 2);
    let optimizer = shard(o, 1);
    let layers = layers_of_stage(model.total_layers(), split.pipeline, stage);
    let per_layer = layer_activation_bytes(model, split, batch);
    let flight = micro_batches_in_flight(split, micro_batches, stage);
    let tokens =
        f64::from(split.micro_batch) * f64::from(batch.sequence) / f64::from(split.context);
    let [d, v, t] = [f64::from(model.hidden), f64::from(model.vocab), f64::from(split.tensor)];
    let sp = if split.sequence_parallel { t } else { 1.0 };
    let a = batch.activation_bytes();
    let mut activations = layers * per_layer * flight;
    if split.recompute == Recompute::Full {
        // One layer's activations live at a time while it is computed again.
        let kept = Split { recompute: Recompute::None, ..*split };
        activations += layer_activation_bytes(model, &kept, batch);
    } else if split.recompute == Recompute::Selective
        && (!batch.stack.fused_attention() || batch.stack == Stack::Native)
    {
        let kept = Split { recompute: Recompute::None, ..*split };
        activations += layer_activation_bytes(model, &kept, batch) - per_layer;
    }
    if stage == 0 && batch.stack.dropout() {
        activations += tokens * d / sp * flight.max(1.0);
    }
    let last = stage + 1 == split.pipeline;
    // fp32 logits (4 bytes) and their 16-bit copy, the gradient takes the logits' place; input of
    // the final norm and of the projection (Korthikanti et al. 2022: 4 s b h (1 + v / h)).
    let logits = if last { tokens * (2.0 * a * d / sp + (4.0 + a) * v / t) } else { 0.0 };
    let gathered = if split.zero == 3 {
        // Two layers in whole: the one in use and the one being fetched.
        2.0 * w * (dense + routed) / layers.max(1.0)
    } else {
        0.0
    };
    let tensor_buffer = if split.tensor > 1 { 2.0 * a * tokens * d } else { 0.0 };
    let pipeline_buffer = if split.pipeline > 1 { 4.0 * a * tokens * d / sp } else { 0.0 };
    let bucket = if dense_ranks > 1.0 && split.zero >= 1 && batch.stack == Stack::Overlapped {
        // Two gradient buckets of 40 M numbers on their way.
        2.0 * g * (40e6_f64).min(dense + routed)
    } else {
        0.0
    };
    let expert_buffer =
        model.moe.map_or(0.0, |moe| 2.0 * a * tokens * f64::from(moe.top_k) * d / sp);
    StageMemory {
        stage,
        weights,
        gradients,
        optimizer,
        activations,
        logits,
        buffers: gathered + tensor_buffer + pipeline_buffer + bucket + expert_buffer,
        overhead: framework + FRAGMENTATION * (activations + logits),
    }
}

/// Returns the memory of the fullest stage.
#[must_use]
pub fn peak(
    model: &Model,
    split: &Split,
    batch: &Batch,
    micro_batches: u32,
    framework: f64,
) -> StageMemory {
    // First and last carry the embedding, the loss and the longest queue; the middle ones may
    // hold one layer more.
    let p = split.pipeline;
    [0, p / 2, p - 1]
        .into_iter()
        .chain(first_extra_stage(model.total_layers(), p))
        .map(|stage| stage_memory(model, split, batch, micro_batches, framework, stage))
        .max_by(|x, y| x.total().total_cmp(&y.total()))
        .unwrap_or_default()
}

fn first_extra_stage(layers: u32, pipeline: u32) -> Option<u32> {
    let rest = layers % pipeline;
    (rest > 0).then(|| (pipeline - rest).div_ceil(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;

    fn gpt3() -> (Model, Split, Batch) {
        let model = Catalogue::builtin().model("gpt3-175b").unwrap();
        let split = Split { tensor: 8, pipeline: 8, ..Split::SINGLE };
        let batch = Batch { sequence: 2048, global: 64, dtype: Dtype::Fp16, stack: Stack::Fused };
        (model, split, batch)
    }

    #[test]
    fn a_layer_keeps_what_korthikanti_table_2_says() {
        let (model, split, batch) = gpt3();
        let (s, b, h, a, t) = (2048.0_f64, 1.0, 12288.0, 96.0, 8.0);
        let sbh = s * b * h;
        let scores = 5.0 * a * s / h;
        assert_eq!(scores, 80.0);
        let bytes = |tensor: u32, sp: bool, recompute: Recompute| {
            let split = Split { tensor, sequence_parallel: sp, recompute, ..split };
            layer_activation_bytes(&model, &split, &batch)
        };
        for (got, published) in [
            (bytes(1, false, Recompute::None), sbh * (34.0 + scores)),
            (bytes(8, false, Recompute::None), sbh * (10.0 + 24.0 / t + scores / t)),
            (bytes(8, true, Recompute::None), sbh * (34.0 / t + scores / t)),
            (bytes(8, false, Recompute::Selective), sbh * (10.0 + 24.0 / t)),
            (bytes(8, true, Recompute::Selective), sbh * 34.0 / t),
            (bytes(8, false, Recompute::Full), sbh * 2.0),
        ] {
            assert!((got / published - 1.0).abs() < 1e-12, "{got} {published}");
        }
    }

    #[test]
    fn the_first_stage_holds_the_interleaved_queue() {
        let (_, mut split, _) = gpt3();
        assert_eq!(micro_batches_in_flight(&split, 64, 0), 8.0);
        assert_eq!(micro_batches_in_flight(&split, 64, 7), 1.0);
        split.virtual_stages = 3;
        // p (1 + (p - 1) / (p v)) = 8 + 7/3, within one chunk.
        let published = 8.0 * (1.0 + 7.0 / 24.0);
        assert!((micro_batches_in_flight(&split, 64, 0) - published).abs() < 1.0 / 3.0 + 1e-9);
    }

    #[test]
    fn states_take_18_bytes_and_zero_1_divides_12_of_them() {
        let (model, split, batch) = gpt3();
        let batch = Batch { dtype: Dtype::Bf16, ..batch };
        let one = stage_memory(&model, &split, &batch, 8, 3e9, 1);
        let params = 12.0 * model.layer_params_without_routed() / 8.0;
        assert!(((one.weights + one.gradients + one.optimizer) / params - 18.0).abs() < 1e-9);
        let split = Split { data: 8, zero: 1, ..split };
        let eight = stage_memory(&model, &split, &batch, 8, 3e9, 1);
        let per = (eight.weights + eight.gradients + eight.optimizer) / params;
        assert!((per - (6.0 + 12.0 / 8.0)).abs() < 1e-9, "{per}");
    }

    #[test]
    fn layers_that_do_not_divide_spare_the_ends() {
        let counts: Vec<f64> = (0..16).map(|stage| layers_of_stage(126, 16, stage)).collect();
        assert_eq!(counts.iter().sum::<f64>(), 126.0);
        assert_eq!((counts[0], counts[15], counts[8]), (7.0, 7.0, 8.0));
    }
}
