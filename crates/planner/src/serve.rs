//! Serving by roofline: prefill, decode, the greatest batch, tokens per second against concurrency.

use serde::Serialize;

use crate::catalogue::Dtype;
use crate::comm::Group;
use crate::error::PlanError;
use crate::model::Model;
use crate::ops::Device;
use crate::split::Machines;

/// How a model is served.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Serving {
    /// Ranks that share each matrix.
    pub tensor: u32,
    /// Pipeline stages.
    pub pipeline: u32,
    /// Format of weights and products.
    pub dtype: Dtype,
    /// Format of the key-value cache.
    pub kv_dtype: Dtype,
    /// Tokens of a prompt.
    pub prompt: u32,
    /// Tokens of a completion.
    pub output: u32,
    /// Share of the memory that may be used.
    pub memory_fraction: f64,
}

/// Memory of one serving rank, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ServingMemory {
    /// Weights.
    pub weights: f64,
    /// Framework and workspaces.
    pub overhead: f64,
    /// Key-value cache that one token adds.
    pub kv_per_token: f64,
    /// Key-value cache of one sequence of prompt and completion.
    pub kv_per_sequence: f64,
    /// What is left for the cache.
    pub kv_room: f64,
    /// Sequences that fit.
    pub max_batch: u32,
}

/// One point of the curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Load {
    /// Sequences decoded together.
    pub concurrency: u32,
    /// Seconds until the first token of a request that finds a place, alone in its prefill.
    pub ttft_s: f64,
    /// Seconds per output token, the prefills of others between the steps included.
    pub tpot_s: f64,
    /// Seconds of one decode step alone.
    pub decode_step_s: f64,
    /// Output tokens per second of one replica.
    pub tokens_per_second: f64,
    /// Output tokens per second and GPU.
    pub tokens_per_second_per_gpu: f64,
    /// US dollars per million output tokens.
    pub cost_per_million_tokens: f64,
}

/// A serving plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServingPlan {
    /// The split and lengths.
    pub serving: Serving,
    /// GPUs of a replica.
    pub gpus: u32,
    /// Memory.
    pub memory: ServingMemory,
    /// From one sequence to the greatest batch.
    pub curve: Vec<Load>,
}

/// Returns the memory of one rank.
///
/// Cache per token: `2 L G E` numbers (`L (kv_rank + rope)` with latent attention), divided over
/// stages and over `min(t, G)` ranks, as a rank without a key-value head of its own keeps a copy.
#[must_use]
pub fn serving_memory(model: &Model, serving: &Serving, machines: &Machines) -> ServingMemory {
    let [t, p] = [serving.tensor, serving.pipeline].map(f64::from);
    let embedding = f64::from(model.vocab) * f64::from(model.hidden) * 2.0 / t;
    let layers = f64::from(model.total_layers()) / p;
    let body = (model.layer_params_without_routed() + model.layer_routed_params()) * layers / t;
    // Embedding and projection stay in 16 bits when the layers are quantised.
    let tables =
        if model.tie_embeddings { 0.5 } else { 1.0 } * embedding * serving.dtype.bytes().max(2.0)
            / if serving.pipeline > 1 { 2.0 } else { 1.0 };
    let weights = body * serving.dtype.bytes() + tables;
    let kv_ranks = if model.mla.is_some() { 1.0 } else { t.min(f64::from(model.kv_heads)) };
    let kv_per_token =
        model.kv_values_per_token_layer() * serving.kv_dtype.bytes() * layers / kv_ranks;
    let sequence = f64::from(serving.prompt) + f64::from(serving.output);
    let chunk = f64::from(serving.prompt.clamp(1, 8192));
    let workspace = chunk * (4.0 * f64::from(model.hidden) + 4.0 * f64::from(model.ffn) / t) * 2.0
        + 4.0 * f64::from(model.vocab) / t * 256.0;
    let overhead = machines.framework_bytes() + workspace;
    let kv_room = machines.gpu.memory_bytes * serving.memory_fraction - weights - overhead;
    let kv_per_sequence = kv_per_token * sequence;
    let max_batch =
        if kv_room > 0.0 { (kv_room / kv_per_sequence).floor().min(65_536.0) } else { 0.0 };
    ServingMemory {
        weights,
        overhead,
        kv_per_token,
        kv_per_sequence,
        kv_room: kv_room.max(0.0),
        max_batch: max_batch as u32,
    }
}

/// Returns the time of one forward pass of `rows` new tokens, of which each attends to `context`
/// earlier ones, over all stages one after another. `causal` halves attention for a prefill.
fn forward_time(
    model: &Model,
    serving: &Serving,
    machines: &Machines,
    device: &Device,
    rows: f64,
    context: f64,
    prefill: bool,
) -> f64 {
    let t = f64::from(serving.tensor);
    let [d, h, g, e] = [model.hidden, model.heads, model.kv_heads, model.head_dim].map(f64::from);
    let up = if model.gated { 2.0 } else { 1.0 };
    let mut layer = 0.0;
    if let Some(mla) = model.mla {
        let [q, kv, rope, nope, value] =
            [mla.q_rank, mla.kv_rank, mla.rope_dim, mla.nope_dim, mla.value_dim].map(f64::from);
        let query_in = if q > 0.0 { q } else { d };
        if q > 0.0 {
            layer += device.matmul(rows, q, d, 0.0);
        }
        layer += device.matmul(rows, h * (nope + rope) / t, query_in, 0.0)
            + device.matmul(rows, kv + rope, d, 0.0)
            + device.matmul(rows, h * (nope + value) / t, kv, 0.0)
            + device.matmul(rows, d, h * value / t, 0.0);
    } else {
        layer += device.matmul(rows, e * (h / t + 2.0 * (g / t).max(1.0)), d, 0.0)
            + device.matmul(rows, d, h * e / t, 0.0);
    }
    let share = f64::from(model.moe_layers()) / f64::from(model.layers.max(1));
    let f = f64::from(model.ffn);
    layer += (1.0 - share)
        * (device.matmul(rows, up * f / t, d, 0.0) + device.matmul(rows, d, f / t, 0.0));
    if let Some(moe) = model.moe {
        let [n, k, x, shared] =
            [moe.experts, moe.top_k, moe.expert_ffn, moe.shared_experts].map(f64::from);
        // Experts that at least one of the rows visits: n (1 - (1 - k/n)^rows).
        let touched = n * (1.0 - (1.0 - k / n).powf(rows));
        let rows_each = (rows * k / touched).max(1.0);
        let gemm = |m: f64, nn: f64, kk: f64| device.matmul(m, nn, kk, 0.0) - device.overhead;
        // One grouped kernel for all experts.
        layer += share
            * (touched * (gemm(rows_each, up * x / t, d) + gemm(rows_each, d, x / t))
                + 2.0 * device.overhead
                + device.matmul(rows, n, d, 0.0));
        if shared > 0.0 {
            layer += share
                * (device.matmul(rows, up * shared * x / t, d, 0.0)
                    + device.matmul(rows, d, shared * x / t, 0.0));
        }
    }
    // Attention: arithmetic in a prefill, reading the cache in a decode step.
    let width = model.score_and_value_width() / t;
    layer += if prefill {
        device.fused_attention(rows * (rows / 2.0 + context) * 2.0 * width, e)
    } else {
        let kv_ranks = if model.mla.is_some() { 1.0 } else { t.min(g) };
        let bytes = rows * context * model.kv_values_per_token_layer() * serving.kv_dtype.bytes()
            / kv_ranks;
        device.stream(bytes)
    };
    // Norms, residuals, activation.
    layer += device.stream(rows * (16.0 * d + 6.0 * up * f / t)) + 3.0 * device.overhead;
    if serving.tensor > 1 {
        layer += 2.0 * Group::new(machines, serving.tensor, 1).all_reduce(2.0 * rows * d);
    }
    let layers = f64::from(model.total_layers());
    let logits_rows = if prefill { 1.0 } else { rows };
    let logits = Device {
        peak: device.attention_peak,
        operand_bytes: device.operand_bytes.max(2.0),
        ..*device
    }
    .matmul(logits_rows, f64::from(model.vocab) / t, d, 0.0);
    let sends = if serving.pipeline > 1 {
        f64::from(serving.pipeline - 1)
            * Group::new(machines, serving.pipeline, serving.tensor).send(2.0 * rows * d / t)
    } else {
        0.0
    };
    layers * layer + logits + sends
}

/// Plans a replica.
///
/// # Errors
/// [`PlanError::Invalid`] for an impossible split or length, [`PlanError::DoesNotFit`] where not
/// even one sequence fits, with the fewest GPUs that hold it.
pub fn plan(
    model: &Model,
    serving: &Serving,
    machines: &Machines,
    price_per_hour: f64,
) -> Result<ServingPlan, PlanError> {
    if serving.tensor == 0
        || serving.pipeline == 0
        || serving.tensor > 1024
        || serving.pipeline > 1024
    {
        return Err(PlanError::invalid("tensor", "tensor and pipeline are from 1 to 1024"));
    }
    if serving.prompt == 0 || serving.output == 0 {
        return Err(PlanError::invalid("prompt", "prompt and output have at least 1 token"));
    }
    if !(0.05..=1.0).contains(&serving.memory_fraction) {
        return Err(PlanError::invalid("memory_fraction", "must be from 0.05 to 1"));
    }
    if !model.heads.is_multiple_of(serving.tensor) {
        let near = drumline_spec::model::nearest_divisor(model.heads, serving.tensor);
        return Err(PlanError::invalid(
            "tensor",
            format!(
                "heads {} are not divisible by tensor {}; nearest that works: tensor {near}",
                model.heads, serving.tensor
            ),
        ));
    }
    if serving.pipeline > model.total_layers() {
        return Err(PlanError::invalid(
            "pipeline",
            format!(
                "{} stages for {} layers; nearest that works: {}",
                serving.pipeline,
                model.total_layers(),
                model.total_layers()
            ),
        ));
    }
    let length = u64::from(serving.prompt) + u64::from(serving.output);
    if length > u64::from(model.context) {
        return Err(PlanError::invalid(
            "prompt",
            format!(
                "prompt and output are {length} tokens, {} more than the context of {}; nearest that works: {}",
                length - u64::from(model.context),
                model.name,
                model.context
            ),
        ));
    }
    let peak = machines.gpu.peak(serving.dtype)?;
    let device = Device::new(&machines.gpu, serving.dtype, peak);
    let memory = serving_memory(model, serving, machines);
    let gpus = serving.tensor * serving.pipeline;
    if memory.max_batch == 0 {
        return Err(does_not_fit(model, serving, machines, &memory));
    }
    let mut points: Vec<u32> = Vec::new();
    let mut at = 1;
    while at < memory.max_batch {
        points.push(at);
        at = at.saturating_mul(2);
    }
    points.push(memory.max_batch);
    let curve = points
        .into_iter()
        .map(|c| load(model, serving, machines, &device, c, price_per_hour))
        .collect();
    Ok(ServingPlan { serving: *serving, gpus, memory, curve })
}

fn load(
    model: &Model,
    serving: &Serving,
    machines: &Machines,
    device: &Device,
    concurrency: u32,
    price_per_hour: f64,
) -> Load {
    let gpus = f64::from(serving.tensor * serving.pipeline);
    let p = f64::from(serving.pipeline);
    let prompt = f64::from(serving.prompt);
    let output = f64::from(serving.output);
    // Prompts beyond 8,192 tokens go in chunks.
    let mut prefill = 0.0;
    let mut done = 0.0;
    while done < prompt {
        let rows = (prompt - done).min(8192.0);
        prefill += forward_time(model, serving, machines, device, rows, done, true);
        done += rows;
    }
    let batch = f64::from(concurrency);
    // On average half of the completion stands in the cache.
    let context = prompt + output / 2.0;
    // With p stages, p groups of the batch are under way, each in its own stage.
    let groups = p.min(batch);
    let step =
        forward_time(model, serving, machines, device, (batch / groups).ceil(), context, false);
    // Between two tokens of one sequence, the others' prefills take their share of the replica:
    // in the time of one completion every other sequence is admitted once.
    let tpot = step + (batch - 1.0) * prefill / p / output;
    let per_request = output * tpot + prefill;
    let tokens_per_second = batch * output / per_request;
    let per_gpu = tokens_per_second / gpus;
    Load {
        concurrency,
        ttft_s: prefill + step,
        tpot_s: tpot,
        decode_step_s: step,
        tokens_per_second,
        tokens_per_second_per_gpu: per_gpu,
        cost_per_million_tokens: price_per_hour / 3600.0 / per_gpu * 1e6,
    }
}

fn does_not_fit(
    model: &Model,
    serving: &Serving,
    machines: &Machines,
    memory: &ServingMemory,
) -> PlanError {
    let limit = machines.gpu.memory_bytes * serving.memory_fraction;
    let needed = memory.weights + memory.overhead + memory.kv_per_sequence;
    let gib = f64::from(1 << 30);
    let larger = splits(model, machines)
        .into_iter()
        .find(|(t, p)| {
            let other = Serving { tensor: *t, pipeline: *p, ..*serving };
            serving_memory(model, &other, machines).max_batch > 0
        })
        .map_or_else(
            || "no split of this model over these GPUs does".to_owned(),
            |(t, p)| format!("nearest that works: {} GPUs as tensor {t} x pipeline {p}", t * p),
        );
    PlanError::DoesNotFit {
        model: model.name.clone(),
        gpus: serving.tensor * serving.pipeline,
        gpu: machines.gpu.name.clone(),
        needed_gib: needed / gib,
        limit_gib: limit / gib,
        short_gib: (needed - limit) / gib,
        leanest: format!(
            "{} weights, one sequence of {} tokens",
            serving.dtype,
            serving.prompt + serving.output
        ),
        nearest: larger,
    }
}

/// Lists `(tensor, pipeline)` by number of GPUs: tensor inside the fast domain.
#[must_use]
pub fn splits(model: &Model, machines: &Machines) -> Vec<(u32, u32)> {
    let mut list = Vec::new();
    for t in (0..8).map(|i| 1u32 << i) {
        if t > machines.domain() || !model.heads.is_multiple_of(t) {
            continue;
        }
        for p in (0..8).map(|i| 1u32 << i).filter(|p| *p <= model.total_layers()) {
            list.push((t, p));
        }
    }
    list.sort_by_key(|(t, p)| (t * p, *p));
    list
}

/// Finds the split with the most output tokens per second and GPU that meets the limits, and the
/// concurrency at which it does.
///
/// # Errors
/// [`PlanError::Invalid`] where no split meets the limits, with the best TTFT and TPOT there are;
/// otherwise as [`plan`].
pub fn best(
    model: &Model,
    base: &Serving,
    machines: &Machines,
    price_per_hour: f64,
    ttft_limit_s: Option<f64>,
    tpot_limit_s: Option<f64>,
    max_gpus: u32,
) -> Result<(ServingPlan, Load), PlanError> {
    let mut found: Option<(ServingPlan, Load)> = None;
    let mut fastest: Option<(f64, f64)> = None;
    let mut refusal = None;
    for (tensor, pipeline) in splits(model, machines) {
        if tensor * pipeline > max_gpus {
            continue;
        }
        let serving = Serving { tensor, pipeline, ..*base };
        let planned = match plan(model, &serving, machines, price_per_hour) {
            Ok(planned) => planned,
            Err(error) => {
                refusal.get_or_insert(error);
                continue;
            }
        };
        for load in &planned.curve {
            let now = fastest.unwrap_or((f64::INFINITY, f64::INFINITY));
            fastest = Some((now.0.min(load.ttft_s), now.1.min(load.tpot_s)));
            let meets = ttft_limit_s.is_none_or(|l| load.ttft_s <= l)
                && tpot_limit_s.is_none_or(|l| load.tpot_s <= l);
            let better = found.as_ref().is_none_or(|(_, old)| {
                load.tokens_per_second_per_gpu > old.tokens_per_second_per_gpu
            });
            if meets && better {
                found = Some((planned.clone(), *load));
            }
        }
    }
    if let Some(found) = found {
        return Ok(found);
    }
    match (fastest, refusal) {
        (Some((ttft, tpot)), _) => Err(PlanError::invalid(
            "latency",
            format!(
                "no split of up to {max_gpus} GPUs meets the limits; the least TTFT is {:.0} ms and the least TPOT {:.1} ms",
                ttft * 1e3,
                tpot * 1e3
            ),
        )),
        (None, Some(error)) => Err(error),
        (None, None) => Err(PlanError::invalid("gpus", "no split is possible")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;

    fn llama70b() -> (Model, Machines, Serving) {
        let catalogue = Catalogue::builtin();
        let gpu = catalogue.gpu("h100-sxm").unwrap();
        let network = catalogue.default_network(&gpu);
        let serving = Serving {
            tensor: 8,
            pipeline: 1,
            dtype: Dtype::Bf16,
            kv_dtype: Dtype::Bf16,
            prompt: 2048,
            output: 256,
            memory_fraction: 0.9,
        };
        (catalogue.model("llama3-70b").unwrap(), Machines { gpu, network }, serving)
    }

    #[test]
    fn the_cache_of_llama_70b_is_320_kib_per_token() {
        // 2 * 80 layers * 8 heads * 128 * 2 bytes = 327,680, over 8 ranks.
        let (model, machines, serving) = llama70b();
        let memory = serving_memory(&model, &serving, &machines);
        assert_eq!(memory.kv_per_token * 8.0, 327_680.0);
        // 70.55e9 * 2 / 8 bytes of weights, norms aside.
        assert!((memory.weights / (70.55e9 * 2.0 / 8.0) - 1.0).abs() < 0.01, "{memory:?}");
    }

    #[test]
    fn deepseek_v3_keeps_70_kb_per_token() {
        // (512 + 64) * 61 layers * 2 bytes = 70,272 (DeepSeek-V3, table in 2505.09343: 70.272 KB).
        let (_, machines, serving) = llama70b();
        let model = Catalogue::builtin().model("deepseek-v3").unwrap();
        assert_eq!(serving_memory(&model, &serving, &machines).kv_per_token, 70_272.0);
    }

    #[test]
    fn decoding_one_sequence_reads_the_weights_once() {
        let (model, machines, serving) = llama70b();
        let planned = plan(&model, &serving, &machines, 3.0).unwrap();
        let one = planned.curve[0];
        let bandwidth = 3350e9 * machines.gpu.calibration.memory_efficiency;
        let floor = planned.memory.weights / bandwidth;
        assert!(
            one.decode_step_s > 0.9 * floor && one.decode_step_s < 2.5 * floor,
            "{one:?} {floor}"
        );
        // Prefill: 2 * 70e9 * 2048 operations over 8 GPUs, by hand 36 ms at the full peak.
        assert!(one.ttft_s > 0.036 && one.ttft_s < 0.15, "{one:?}");
    }

    #[test]
    fn more_sequences_give_more_tokens_and_wait_longer() {
        let (model, machines, serving) = llama70b();
        let curve = plan(&model, &serving, &machines, 3.0).unwrap().curve;
        for pair in curve.windows(2) {
            assert!(pair[1].tokens_per_second >= pair[0].tokens_per_second * 0.999, "{pair:?}");
            assert!(pair[1].tpot_s >= pair[0].tpot_s * 0.999, "{pair:?}");
        }
    }

    #[test]
    fn what_does_not_fit_says_by_how_much_and_what_does() {
        let (model, machines, serving) = llama70b();
        let one = Serving { tensor: 1, ..serving };
        let error = plan(&model, &one, &machines, 3.0).unwrap_err().to_string();
        assert!(
            error.contains("GiB short") && error.contains("nearest that works: 2 GPUs"),
            "{error}"
        );
        let long = Serving { prompt: 9000, ..serving };
        let error = plan(&model, &long, &machines, 3.0).unwrap_err().to_string();
        assert!(error.contains("1064 more than the context"), "{error}");
    }

    #[test]
    fn limits_choose_the_split() {
        let (model, machines, serving) = llama70b();
        let (loose, _) = best(&model, &serving, &machines, 3.0, None, None, 8).unwrap();
        let (tight, load) = best(&model, &serving, &machines, 3.0, None, Some(0.02), 8).unwrap();
        assert!(load.tpot_s <= 0.02 && tight.gpus >= loose.gpus);
        let error = best(&model, &serving, &machines, 3.0, Some(1e-4), None, 8).unwrap_err();
        assert!(error.to_string().contains("least TTFT"), "{error}");
    }
}
