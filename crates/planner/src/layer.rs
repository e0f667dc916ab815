//! Time of one transformer layer for one micro-batch on one rank, by kind of work.
//!
//! A forward pass, a backward pass and what recomputation adds, each split into matmuls,
//! attention, memory-bound operators and the collectives that nothing hides.

use std::ops::{Add, AddAssign, Mul};

use serde::Serialize;

use crate::comm::Group;
use crate::model::Model;
use crate::ops::Device;
use crate::split::{Batch, Machines, Recompute, Split, Stack};

/// Seconds by kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Parts {
    /// Matrix products of the linear layers.
    pub matmul: f64,
    /// Attention's core: scores, softmax, values.
    pub attention: f64,
    /// Norms, residuals, non-linearities, rotations, copies.
    pub elementwise: f64,
    /// Tensor- and sequence-parallel collectives that computation does not hide.
    pub tensor: f64,
    /// Context-parallel ring beyond what attention hides.
    pub context: f64,
    /// Expert all-to-all.
    pub expert: f64,
}

impl Parts {
    /// Returns the sum.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.matmul + self.attention + self.elementwise + self.tensor + self.context + self.expert
    }
}

impl Add for Parts {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self {
            matmul: self.matmul + o.matmul,
            attention: self.attention + o.attention,
            elementwise: self.elementwise + o.elementwise,
            tensor: self.tensor + o.tensor,
            context: self.context + o.context,
            expert: self.expert + o.expert,
        }
    }
}

impl AddAssign for Parts {
    fn add_assign(&mut self, o: Self) {
        *self = *self + o;
    }
}

impl Mul<f64> for Parts {
    type Output = Self;
    fn mul(self, x: f64) -> Self {
        Self {
            matmul: self.matmul * x,
            attention: self.attention * x,
            elementwise: self.elementwise * x,
            tensor: self.tensor * x,
            context: self.context * x,
            expert: self.expert * x,
        }
    }
}

/// One layer's times.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct LayerTime {
    /// Forward pass.
    pub forward: Parts,
    /// Backward pass without recomputation.
    pub backward: Parts,
    /// Work done a second time.
    pub recompute: Parts,
    /// Seconds of weight-gradient matmuls in `backward`, behind which collectives can hide.
    pub weight_gradient: f64,
}

impl LayerTime {
    /// Returns forward, recomputation and backward together.
    #[must_use]
    pub fn total(&self) -> Parts {
        self.forward + self.recompute + self.backward
    }
}

/// Share of the tensor-parallel collectives of a pass that computation hides, by stack.
///
/// The gradient's collective runs beside the weight-gradient matmul from the `fused` stack on, and
/// from the `overlapped` stack part of the forward collectives too; both slow each other down.
pub(crate) fn tensor_overlap(stack: Stack) -> (f64, f64) {
    match stack {
        Stack::Eager => (0.0, 0.0),
        Stack::Fused => (0.0, 0.5),
        Stack::Overlapped => (0.3, 0.6),
        Stack::Native => (0.0, 0.0),
    }
}

/// How much busier the busiest rank of an expert group is than the mean.
pub const EXPERT_IMBALANCE: f64 = 1.1;

/// Share of the experts' all-to-all that the `overlapped` stack hides. Assumed: full overlap is
/// reported (DeepSeek-V3, section 3.2.1), none in plainer software.
pub const EXPERT_OVERLAP: f64 = 0.5;

/// One matmul of the forward pass: `[m, k] x [k, n]`, `count` times.
#[derive(Debug, Clone, Copy)]
struct Gemm {
    m: f64,
    n: f64,
    k: f64,
    count: f64,
}

fn gemms(model: &Model, split: &Split, tokens: f64) -> Vec<Gemm> {
    let t = f64::from(split.tensor);
    let [d, f, h, g, e] =
        [model.hidden, model.ffn, model.heads, model.kv_heads, model.head_dim].map(f64::from);
    let mut list = Vec::with_capacity(10);
    let mut add = |m: f64, n: f64, k: f64, count: f64| list.push(Gemm { m, n, k, count });
    let blocks = if model.encoder_layers > 0 {
        1.0 + f64::from(model.layers) / f64::from(model.total_layers())
    } else {
        1.0
    };
    if let Some(mla) = model.mla {
        let [q, kv, rope, nope, value] =
            [mla.q_rank, mla.kv_rank, mla.rope_dim, mla.nope_dim, mla.value_dim].map(f64::from);
        if q > 0.0 {
            add(tokens, q, d, 1.0);
            add(tokens, h * (nope + rope) / t, q, 1.0);
        } else {
            add(tokens, h * (nope + rope) / t, d, 1.0);
        }
        add(tokens, kv + rope, d, 1.0);
        add(tokens, h * (nope + value) / t, kv, 1.0);
        add(tokens, d, h * value / t, 1.0);
    } else {
        // A rank without a key-value head of its own computes a copy.
        let kv_heads = (g / t).max(1.0);
        add(tokens, e * (h / t + 2.0 * kv_heads), d, blocks);
        add(tokens, d, h * e / t, blocks);
    }
    let up = if model.gated { 2.0 } else { 1.0 };
    let share = f64::from(model.moe_layers()) / f64::from(model.layers.max(1));
    if share < 1.0 {
        add(tokens, up * f / t, d, 1.0 - share);
        add(tokens, d, f / t, 1.0 - share);
    }
    if let Some(moe) = model.moe {
        let [n, k, x, shared] =
            [moe.experts, moe.top_k, moe.expert_ffn, moe.shared_experts].map(f64::from);
        let ep = f64::from(split.expert);
        add(tokens, n, d, share);
        if shared > 0.0 {
            add(tokens, up * shared * x / t, d, share);
            add(tokens, d, shared * x / t, share);
        }
        // Every rank of the group sends top_k copies; each rank holds n / ep experts.
        let rows = tokens * k * ep / n * EXPERT_IMBALANCE;
        add(rows, up * x / t, d, share * n / ep);
        add(rows, d, x / t, share * n / ep);
    }
    list
}

/// Computes the times of one layer.
///
/// `B T / c` tokens enter; matrices are split over `t`. See `docs/planner.md` for each term.
#[must_use]
pub fn layer_time(
    model: &Model,
    split: &Split,
    batch: &Batch,
    machines: &Machines,
    device: &Device,
) -> LayerTime {
    let stack = batch.stack;
    let [t, c] = [split.tensor, split.context].map(f64::from);
    let sequence = f64::from(batch.sequence);
    let tokens = f64::from(split.micro_batch) * sequence / c;
    let a = batch.activation_bytes();
    let [d, h] = [model.hidden, model.heads].map(f64::from);
    let (_, gradient_bytes, _) = batch.bytes_per_parameter();

    let mut forward = Parts::default();
    let mut backward = Parts::default();
    let mut weight_gradient = 0.0;
    let list = gemms(model, split, tokens);
    for gemm in &list {
        let Gemm { m, n, k, count } = *gemm;
        // fp8 products read a 16-bit input once more to quantise it.
        let cast = if device.operand_bytes < a { (a + device.operand_bytes) * m * k } else { 0.0 };
        forward.matmul += count * device.matmul(m, n, k, cast);
        backward.matmul += count * device.matmul(m, k, n, cast);
        // dW [k, n] = X^T [k, m] dY [m, n], added to the accumulated gradient.
        let extra =
            if stack.fused_accumulation() { (2.0 * gradient_bytes - a) * k * n } else { 0.0 };
        let dw = count * device.matmul(k, n, m, extra.max(0.0));
        weight_gradient += dw;
        backward.matmul += dw;
        if !stack.fused_accumulation() {
            backward.elementwise += count * device.stream((a + 2.0 * gradient_bytes) * k * n);
        }
    }

    // Attention's core.
    let blocks = list[0].count.max(1.0);
    let width = model.score_and_value_width() / t * blocks;
    let mut selective = 0.0;
    if stack.fused_attention() {
        // Causal: half of the scores. Backward: 5 products for the forward's 2.
        let flops = tokens * sequence * width;
        forward.attention = device.fused_attention(flops, f64::from(model.head_dim));
        backward.attention = device.fused_attention(2.5 * flops, f64::from(model.head_dim));
    } else {
        let scores = tokens * h / t * sequence * blocks;
        let products = 2.0 * tokens * sequence * width;
        let e = f64::from(model.head_dim);
        // Batched products with an inner or outer width of one head.
        let product = |flops: f64, passes: f64| {
            let compute =
                flops / (device.peak * device.matmul_efficiency * e / (e + device.k_half));
            compute.max(passes * a * scores / device.memory) + device.overhead
        };
        let mask = if stack.dropout() { 1.0 } else { 0.0 };
        // Softmax reads and writes; dropout reads, writes, and writes its mask.
        let softmax = device.stream(2.0 * a * scores);
        let dropout = mask * device.stream((2.0 * a + 1.0) * scores);
        forward.attention = 2.0 * product(products / 2.0, 1.0) + softmax + dropout;
        backward.attention = 4.0 * product(products / 2.0, 1.0)
            + device.stream(3.0 * a * scores)
            + mask * device.stream((2.0 * a + 1.0) * scores);
        selective = product(products / 2.0, 1.0) + softmax + dropout;
    }

    // Memory-bound operators, bytes per token.
    let sp = if split.sequence_parallel { t } else { 1.0 };
    let mask = if stack.dropout() { 1.0 } else { 0.0 };
    let (f_width, experts_width) = ffn_widths(model);
    let f = (f_width + experts_width) / t;
    let heads = model.score_and_value_width() / 2.0 / t;
    let kv = f64::from(model.kv_heads) * f64::from(model.head_dim) / t;
    let norms = if model.encoder_layers > 0 { 2.5 } else { 2.0 };
    // Norm: read, write. Residual with bias and dropout: read two, write one, mask.
    let stream_forward = norms * d * (2.0 * a + 3.0 * a + mask) / sp
        + if model.gated { 3.0 * a * f } else { 2.0 * a * f }
        + 2.0 * a * (2.0 * heads + 2.0 * kv);
    // Norm: read input and gradient, write gradient. Residual: read two, write one; mask.
    let stream_backward = norms * d * (3.0 * a + 3.0 * a + a * mask + mask) / sp
        + if model.gated { 5.0 * a * f } else { 3.0 * a * f }
        + 2.0 * a * (2.0 * heads + 2.0 * kv);
    // The routing of a mixture permutes tokens to experts and back.
    let permute = model.moe.map_or(0.0, |moe| 4.0 * a * f64::from(moe.top_k) * d / sp);
    if stack == Stack::Native {
        let (pass, back) = native_operators(model, f_width / t, heads, kv);
        forward.elementwise += device.operator(4.0 * tokens * pass);
        backward.elementwise += device.operator(4.0 * tokens * back);
    } else {
        let kernels = if stack.fused_attention() { 8.0 } else { 12.0 };
        forward.elementwise +=
            tokens * (stream_forward + permute) / device.operators + kernels * device.overhead;
        backward.elementwise += tokens * (stream_backward + permute) / device.operators
            + 1.5 * kernels * device.overhead;
    }

    // Tensor parallelism: two all-reduces a pass, or as many gathers and scatters.
    if split.tensor > 1 {
        let group = Group::new(machines, split.tensor, 1);
        let bytes = a * tokens * d * blocks;
        let (hidden_forward, hidden_backward) = tensor_overlap(stack);
        let pass = if split.sequence_parallel {
            4.0 * group.all_gather(bytes)
        } else {
            2.0 * group.all_reduce(bytes)
        };
        forward.tensor = pass * (1.0 - hidden_forward);
        // With sequence parallelism the inputs of the column-parallel matmuls are gathered again.
        let again = if split.sequence_parallel { 2.0 * group.all_gather(bytes) } else { 0.0 };
        backward.tensor = (pass + again) * (1.0 - hidden_backward);
    }

    // Context parallelism: keys and values go round the ring behind attention.
    if split.context > 1 {
        let group = Group::new(machines, split.context, split.tensor);
        let kv_bytes =
            a * sequence * f64::from(split.micro_batch) * model.kv_values_per_token_layer()
                / if model.mla.is_some() { 1.0 } else { t.min(f64::from(model.kv_heads)) };
        let pass = group.all_gather(kv_bytes);
        forward.context = (pass - 0.8 * forward.attention).max(0.3 * pass);
        backward.context = (2.0 * pass - 0.8 * backward.attention).max(0.6 * pass);
    }

    // Experts: dispatch and combine. A token goes once to each node that holds one of its experts,
    // and is copied there: of `nodes` nodes it reaches `nodes (1 - (1 - 1/nodes)^top_k)`. With
    // 8-bit products it is dispatched in 8 bits (DeepSeek-V3, 2412.19437, section 3.2).
    if let Some(moe) = model.moe
        && split.expert > 1
    {
        let group = Group::new(machines, split.expert, split.tensor);
        let share = f64::from(model.moe_layers()) / f64::from(model.layers.max(1));
        let nodes = (group.size / group.per_node).max(1.0);
        let k = f64::from(moe.top_k);
        let copies = if stack.overlaps() && nodes > 1.0 {
            (nodes * (1.0 - (1.0 - 1.0 / nodes).powf(k))).min(k)
        } else {
            k
        };
        let numbers = tokens * copies * d / sp;
        let dispatch = group.all_to_all(device.operand_bytes.min(a) * numbers, machines);
        let combine = group.all_to_all(a * numbers, machines);
        // Half of it runs beside the shared experts and the other half of the micro-batch.
        let shown = if stack.overlaps() { 1.0 - EXPERT_OVERLAP } else { 1.0 };
        forward.expert = share * shown * (dispatch + combine);
        backward.expert = forward.expert;
    }

    let recompute = match split.recompute {
        Recompute::None => Parts::default(),
        Recompute::Selective => Parts { attention: selective, ..Parts::default() },
        Recompute::Full => forward,
    };
    LayerTime { forward, backward, recompute, weight_gradient }
}

/// Returns the numbers per token that this project's engine reads and writes in the norms,
/// residuals and non-linearities of a layer: forward and backward.
///
/// Forward: two fused sums and norms (two read, two written), rotary positions in place, and the
/// non-linearity. Backward: two gradients of norms (three read, one written), the same rotation,
/// the non-linearity's gradient in place, and the sums of the biases' columns.
#[must_use]
pub fn native_operators(model: &Model, ffn: f64, queries: f64, keys: f64) -> (f64, f64) {
    let d = f64::from(model.hidden);
    let rotated =
        if model.position == crate::model::Position::Rotary { 2.0 * (queries + keys) } else { 0.0 };
    let (up, gradient) = if model.gated { (3.0, 5.0) } else { (2.0, 3.0) };
    let biases = if model.bias { queries + 2.0 * keys + ffn + 2.0 * d } else { 0.0 };
    (8.0 * d + rotated + up * ffn, 8.0 * d + rotated + gradient * ffn + biases)
}

/// Returns the mean widths of the dense network and of visited experts per token.
fn ffn_widths(model: &Model) -> (f64, f64) {
    let share = f64::from(model.moe_layers()) / f64::from(model.layers.max(1));
    let experts = model.moe.map_or(0.0, |moe| {
        share * f64::from(moe.top_k + moe.shared_experts) * f64::from(moe.expert_ffn)
    });
    ((1.0 - share) * f64::from(model.ffn), experts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;

    #[test]
    fn the_engines_operators_are_counted_by_hand() {
        // GPT-2: 768 wide, 3,072 inside, 12 heads of 64, biases, learned positions.
        let gpt2 = Catalogue::builtin().model("gpt2").unwrap();
        // Forward: 2 x (2 read + 2 written) of 768, GELU reads and writes 3,072.
        // Backward: 2 x (3 read + 1 written) of 768, GELU's gradient 3 x 3,072, the columns of
        // biases 768 x 3 + 768 + 3,072 + 768.
        let counted = native_operators(&gpt2, 3072.0, 768.0, 768.0);
        assert_eq!(counted, (6144.0 + 6144.0, 6144.0 + 9216.0 + 6912.0));
        // LLaMA: the same norms, rotary positions of queries and keys, three and five widths.
        let llama = Catalogue::builtin().model("llama2-7b").unwrap();
        let counted = native_operators(&llama, 11_008.0, 4096.0, 4096.0);
        assert_eq!(counted, (32_768.0 + 16_384.0 + 33_024.0, 32_768.0 + 16_384.0 + 55_040.0));
    }
}
