//! Time of one optimizer step: layers, pipeline, data parallelism, optimizer.

use serde::Serialize;

use crate::comm::Group;
use crate::error::PlanError;
use crate::layer::{LayerTime, Parts, layer_time};
use crate::memory::{layers_of_stage, stage_params};
use crate::model::Model;
use crate::ops::Device;
use crate::split::{Batch, Machines, Recompute, Split, Stack, check};

/// Share of hidden communication that computation still pays, as both use the same units.
pub const INTERFERENCE: f64 = 0.1;

/// One optimizer step, by cause. All in seconds; the fields but `step` sum to `step`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct StepTime {
    /// The whole step.
    pub step: f64,
    /// Forward and backward passes of the fullest stage's layers, without recomputation.
    pub layers: Parts,
    /// What is computed a second time, its collectives included.
    pub recompute: f64,
    /// Embedding, logits and loss, where the fullest stage holds them.
    pub embedding_and_loss: f64,
    /// Waiting for the pipeline to fill and drain.
    pub bubble: f64,
    /// Sends between stages that nothing hides.
    pub pipeline_sends: f64,
    /// Gradient and parameter traffic that nothing hides.
    pub data: f64,
    /// The optimizer's pass over its state.
    pub optimizer: f64,
    /// Waiting for the slowest node.
    pub straggler: f64,
    /// Waiting for cores that devices share.
    pub sharing: f64,
    /// Outside the device.
    pub overhead: f64,
    /// Micro-batches per rank and step (not a time).
    pub micro_batches: f64,
    /// Model operations per GPU and second: 3 forward passes, attention in full, nothing computed
    /// twice.
    pub model_flops_per_gpu: f64,
    /// Hardware operations per GPU and second: with what is computed twice.
    pub hardware_flops_per_gpu: f64,
    /// Model FLOPs utilization: `model_flops_per_gpu` over the peak.
    pub mfu: f64,
    /// Hardware FLOPs utilization: `hardware_flops_per_gpu` over the peak.
    pub hfu: f64,
    /// Tokens per second and GPU.
    pub tokens_per_gpu: f64,
}

/// Returns the operations of one step: `(model, hardware)`.
///
/// Model: `3 B T` forward passes by Narayanan's convention. Hardware adds one forward pass of the
/// layers with full recomputation, and the scores' `2 T H E` per token with selective.
#[must_use]
pub fn step_flops(model: &Model, recompute: Recompute, batch: &Batch) -> (f64, f64) {
    let sequence = f64::from(batch.sequence);
    let tokens = batch.tokens();
    let useful = tokens * model.train_flops_per_token(sequence);
    let layers = f64::from(model.total_layers());
    let twice = match recompute {
        Recompute::None => 0.0,
        // Our own engine keeps no scores; what it computes again has no products.
        Recompute::Selective if batch.stack == Stack::Native => 0.0,
        Recompute::Selective => layers * 2.0 * sequence * model.score_and_value_width(),
        Recompute::Full => layers * model.layer_forward_flops_per_token(sequence),
    };
    (useful, useful + tokens * twice)
}

/// Computes the time of one optimizer step.
///
/// # Errors
/// [`PlanError::Invalid`] for a split that the model or the batch does not allow, or a format that
/// the GPU has not.
pub fn step_time(
    model: &Model,
    split: &Split,
    batch: &Batch,
    machines: &Machines,
) -> Result<StepTime, PlanError> {
    let micro_batches = check(model, split, batch)?;
    if split.gpus() > machines.domain() && machines.network.nic_gbps <= 0.0 {
        return Err(PlanError::invalid(
            "network",
            format!(
                "{} GPUs span nodes, and '{}' joins no nodes; nearest that works: {} GPUs",
                split.gpus(),
                machines.network.name,
                machines.domain()
            ),
        ));
    }
    let peak = machines.gpu.peak(batch.dtype)?;
    let device = Device::new(&machines.gpu, batch.dtype, peak);
    let layer = layer_time(model, split, batch, machines, &device);
    Ok(assemble(model, split, batch, machines, &device, &layer, f64::from(micro_batches)))
}

/// Puts a step together from one layer's time. Split off so that the search computes a layer once
/// for many pipelines.
#[must_use]
pub fn assemble(
    model: &Model,
    split: &Split,
    batch: &Batch,
    machines: &Machines,
    device: &Device,
    layer: &LayerTime,
    m: f64,
) -> StepTime {
    let [t, p, v, c] =
        [split.tensor, split.pipeline, split.virtual_stages, split.context].map(f64::from);
    let tokens = f64::from(split.micro_batch) * f64::from(batch.sequence) / c;
    let a = batch.activation_bytes();
    let d = f64::from(model.hidden);
    let sp = if split.sequence_parallel { t } else { 1.0 };

    // Stages: all layers alike, the first with the embedding, the last with the loss.
    let per_layer = layer.total().total();
    let loss = loss_time(model, split, batch, machines, device, tokens);
    let embedding = 2.0 * device.stream(2.0 * a * tokens * d / sp);
    let layers = model.total_layers();
    let count = |stage: u32| layers_of_stage(layers, split.pipeline, stage);
    let extra = |stage: u32| {
        (if stage == 0 { embedding } else { 0.0 })
            + if stage + 1 == split.pipeline { loss } else { 0.0 }
    };
    let middle = split.pipeline / 2;
    let mut slowest = (0.0, 0);
    for stage in [0, middle, split.pipeline - 1] {
        let time = count(stage) * per_layer + extra(stage);
        if time > slowest.0 {
            slowest = (time, stage);
        }
    }
    let (stage_time, stage) = slowest;
    let all_stages = f64::from(layers) * per_layer + embedding + loss;
    // 1F1B: (m - 1) max + sum; interleaving divides filling and draining by v, and needs at least
    // p micro-batches to do so.
    let chunks = if m >= p { v } else { 1.0 };
    let bubble = (all_stages - stage_time) / chunks;

    // Pipeline sends: activations there, gradients back, once per chunk; each rank of a tensor
    // group sends its share and the group gathers (Narayanan et al. 2021, section 4.1). ZeRO in a
    // pipeline before 2023 was DeepSpeed's engine, where each rank sends the whole.
    let mut sends = 0.0;
    if split.pipeline > 1 {
        let neighbours = Group::new(machines, split.pipeline, split.tensor * split.context);
        let bytes = a * tokens * d;
        let deepspeed = batch.stack < Stack::Overlapped && split.zero >= 1;
        let mut one = neighbours.send(if deepspeed { bytes } else { bytes / t });
        if split.tensor > 1 && !split.sequence_parallel && !deepspeed {
            one += Group::new(machines, split.tensor, 1).all_gather(bytes);
        }
        let shown = if batch.stack.overlaps() { INTERFERENCE } else { 1.0 };
        sends = 2.0 * one * (m * v * shown + (p - 1.0));
    }

    let pass_forward = layer.forward.total() * count(stage);
    let pass_backward = (layer.backward.total() + layer.recompute.total()) * count(stage);
    let data = data_time(model, split, batch, machines, stage, m, pass_forward, pass_backward);

    let (dense, routed) = stage_params(model, split, stage);
    let ranks = f64::from(split.data) * c;
    let own = if split.zero >= 1 {
        dense / ranks + routed / (ranks / f64::from(split.expert))
    } else {
        dense + routed
    };
    // Gradient to fp32, unscale, norm, Adam's four reads and three writes, and the 16-bit copy.
    let optimizer = device.stream(
        own * match batch.stack {
            Stack::Overlapped => 46.0,
            // All in fp32: the norm reads the gradient, Adam reads four numbers and writes three.
            Stack::Native => 32.0,
            _ => 52.0,
        },
    );

    let layer_parts = (layer.forward + layer.backward) * (m * count(stage));
    let recompute = layer.recompute.total() * m * count(stage);
    let edge = extra(stage) * m;
    let busy = layer_parts.total() + recompute + edge + bubble + sends;
    let nodes =
        (f64::from(split.gpus()) / f64::from(machines.network.gpus_per_node.max(1))).max(1.0);
    let straggler = busy * machines.network.straggler * (2.0 * nodes.ln()).sqrt();
    let overhead = machines.gpu.calibration.step_overhead_ms * 1e-3;
    let alone = busy + data + optimizer + straggler + overhead;
    // Devices that share cores: a node's computation takes no less than its sum over what can run
    // at one time, whatever waits in between; communication comes on top.
    let sharing = if machines.gpu.at_once == 0 {
        0.0
    } else {
        let here = f64::from(split.gpus().min(machines.network.gpus_per_node.max(1)));
        let talk = |parts: &Parts| parts.tensor + parts.context + parts.expert;
        let exposed = talk(&layer.forward) + talk(&layer.backward) + talk(&layer.recompute);
        let computed = f64::from(layers) * (per_layer - exposed) + embedding + loss;
        // Of the mean rank: one stage of `p`.
        let mean = m * computed / p + optimizer;
        let shared = mean * (here / f64::from(machines.gpu.at_once)).max(1.0)
            + m * count(stage) * exposed
            + sends
            + data
            + overhead;
        (shared - alone).max(0.0)
    };
    let step = alone + sharing;
    let (useful, hardware) = step_flops(model, split.recompute, batch);
    let gpus = f64::from(split.gpus());
    StepTime {
        step,
        layers: layer_parts,
        recompute,
        embedding_and_loss: edge,
        bubble,
        pipeline_sends: sends,
        data,
        optimizer,
        straggler,
        sharing,
        overhead,
        micro_batches: m,
        model_flops_per_gpu: useful / gpus / step,
        hardware_flops_per_gpu: hardware / gpus / step,
        mfu: useful / gpus / step / device.peak,
        hfu: hardware / gpus / step / device.peak,
        tokens_per_gpu: batch.tokens() / gpus / step,
    }
}

/// Returns the time of logits, cross-entropy and their gradients for one micro-batch.
fn loss_time(
    model: &Model,
    split: &Split,
    batch: &Batch,
    machines: &Machines,
    device: &Device,
    tokens: f64,
) -> f64 {
    let t = f64::from(split.tensor);
    let d = f64::from(model.hidden);
    let v = (f64::from(model.vocab) / t).ceil();
    let a = batch.activation_bytes();
    // The output projection stays in 16 bits when the layers are in 8.
    let projection = Device {
        peak: device.attention_peak,
        operand_bytes: device.operand_bytes.max(2.0),
        ..*device
    };
    let products = projection.matmul(tokens, v, d, 0.0)
        + projection.matmul(tokens, d, v, 0.0)
        + projection.matmul(d, v, tokens, 0.0);
    // fp32 cast, maximum, exponentials and sum, gradient, and back to 16 bits.
    let passes = match batch.stack {
        Stack::Overlapped => 26.0,
        // Three reads and a write in fp32.
        Stack::Native => 16.0,
        _ => 36.0,
    };
    let mut time = products + device.operator(passes * tokens * v);
    if split.tensor > 1 {
        let group = Group::new(machines, split.tensor, 1);
        time += 2.0 * group.all_gather(a * tokens * d) + 3.0 * group.all_reduce(4.0 * tokens);
    }
    time
}

/// Returns the gradient and parameter traffic over data-parallel ranks that nothing hides.
#[allow(clippy::too_many_arguments)]
fn data_time(
    model: &Model,
    split: &Split,
    batch: &Batch,
    machines: &Machines,
    stage: u32,
    m: f64,
    pass_forward: f64,
    pass_backward: f64,
) -> f64 {
    let ranks = split.data * split.context;
    let mut time = 0.0;
    let (dense, routed) = stage_params(model, split, stage);
    let (w, g, _) = batch.bytes_per_parameter();
    if ranks > 1 {
        let stride = if split.context > 1 { split.tensor } else { split.tensor * split.pipeline };
        let mut group = Group::new(machines, ranks, stride);
        if split.zero == 3 && batch.stack == Stack::Eager && ranks > machines.domain() {
            // Parameters were gathered one by one in rings over one adapter (Narayanan et al. 2021,
            // table 2: some 23 GB/s per GPU whatever the model and the number of GPUs), which
            // so run near its line rate.
            group.bandwidth = 0.94 * machines.network.nic_gbps * 1e9 / 8.0;
        }
        let expert_group = Group::new(
            machines,
            (ranks / split.expert).max(1),
            stride.saturating_mul(split.expert),
        );
        let both = |f: &dyn Fn(&Group, f64) -> f64, bytes: f64| {
            f(&group, bytes * dense) + f(&expert_group, bytes * routed)
        };
        let scatter = both(&Group::all_gather, g);
        let gather = both(&Group::all_gather, w);
        let (reduce, fetch) = match split.zero {
            0 => (both(&Group::all_reduce, g), 0.0),
            // DeepSpeed's pipeline engine sums all gradients and then gathers parameters.
            1 | 2 if split.pipeline > 1 && batch.stack < Stack::Overlapped => {
                (both(&Group::all_reduce, g), gather)
            }
            1 => (scatter, gather),
            // Sharded gradients leave after each micro-batch, in a pipeline after each round.
            2 => (scatter * (m / f64::from(split.pipeline)).ceil(), gather),
            // Parameters are fetched for each pass of each micro-batch; gradients leave as often.
            _ => {
                let passes = if split.recompute == Recompute::Full { 3.0 } else { 2.0 };
                (scatter * m, gather * m * passes)
            }
        };
        if batch.stack.overlaps() {
            // Gradients leave while the last micro-batch's backward pass runs, with interleaving
            // while the last p of each chunk do; parameters arrive behind the first forward
            // passes in the same way. The last bucket has nothing to hide behind.
            let [p, v] = [split.pipeline, split.virtual_stages].map(f64::from);
            let last = 1.0 + p.min(m) * (v - 1.0) / v;
            let rounds = if split.zero == 2 { (m / p).ceil() } else { 1.0 };
            let behind = if split.zero == 3 || rounds > 1.0 { m } else { last };
            let ahead = if split.zero == 3 { m } else { last };
            time += hide(reduce, behind * pass_backward) + hide(fetch, ahead * pass_forward);
        } else if split.zero == 3 {
            // Prefetching hides parameters behind the layers even in the oldest stacks, in part.
            time += hide(reduce + fetch, 0.9 * m * (pass_forward + pass_backward));
        } else {
            time += reduce + fetch;
        }
    }
    if split.pipeline > 1 && model.tie_embeddings {
        // First and last stage sum the gradients of their two copies of the embedding.
        let bytes = g * f64::from(model.vocab) * f64::from(model.hidden) / f64::from(split.tensor);
        // They lie almost a whole copy of the model apart.
        let apart = (split.tensor * split.context * split.pipeline).div_ceil(2);
        time += Group::new(machines, 2, apart).all_reduce(bytes);
    }
    time
}

/// Returns what is left of `comm` seconds behind `window` seconds of computation.
fn hide(comm: f64, window: f64) -> f64 {
    let hidden = comm.min(0.9 * window);
    (comm - hidden) + INTERFERENCE * hidden
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{Catalogue, Dtype};

    fn a100() -> Machines {
        let catalogue = Catalogue::builtin();
        Machines {
            gpu: catalogue.gpu("a100-80g").unwrap(),
            network: catalogue.network("hdr-8x200").unwrap(),
        }
    }

    #[test]
    fn one_layer_of_the_22b_model_takes_what_korthikanti_measured() {
        // Korthikanti et al. 2022, table 4: milliseconds of forward and of backward with
        // recomputation, 22B, tensor 8, micro-batch 4.
        let model = Catalogue::builtin().model("megatron-22b").unwrap();
        let machines = a100();
        let batch = Batch { sequence: 2048, global: 4, dtype: Dtype::Fp16, stack: Stack::Fused };
        let device = Device::new(&machines.gpu, Dtype::Fp16, 312e12);
        for (sp, recompute, forward, backward) in [
            (false, Recompute::None, 7.7, 11.9),
            (true, Recompute::None, 7.2, 11.8),
            (false, Recompute::Full, 7.7, 19.5),
            (false, Recompute::Selective, 7.7, 13.2),
            (true, Recompute::Selective, 7.2, 13.1),
        ] {
            let split = Split {
                tensor: 8,
                sequence_parallel: sp,
                recompute,
                micro_batch: 4,
                ..Split::SINGLE
            };
            let time = layer_time(&model, &split, &batch, &machines, &device);
            let got = [time.forward.total(), (time.backward + time.recompute).total()];
            println!("{sp} {recompute}: {got:?} for {forward} {backward} {time:?}");
            for (got, published) in got.into_iter().zip([forward, backward]) {
                let error = got * 1e3 / published - 1.0;
                assert!(error.abs() < 0.10, "sp {sp} {recompute}: {got} for {published} ms");
            }
        }
    }

    #[test]
    fn the_terms_sum_to_the_step() {
        let model = Catalogue::builtin().model("megatron-145.6b").unwrap();
        let split = Split {
            tensor: 8,
            pipeline: 8,
            virtual_stages: 2,
            data: 24,
            micro_batch: 2,
            recompute: Recompute::Full,
            ..Split::SINGLE
        };
        let batch = Batch { sequence: 2048, global: 2304, dtype: Dtype::Fp16, stack: Stack::Eager };
        let s = step_time(&model, &split, &batch, &a100()).unwrap();
        let sum = s.layers.total()
            + s.recompute
            + s.embedding_and_loss
            + s.bubble
            + s.pipeline_sends
            + s.data
            + s.optimizer
            + s.straggler
            + s.sharing
            + s.overhead;
        assert!((sum / s.step - 1.0).abs() < 1e-12);
        assert!(s.hfu > s.mfu);
    }

    #[test]
    fn ranks_that_share_cores_take_the_sum_of_their_work() {
        let catalogue = Catalogue::builtin();
        let model = catalogue.model("gpt2").unwrap();
        let gpu = catalogue.gpu("cpu").unwrap();
        let own = Machines { network: catalogue.default_network(&gpu), gpu };
        let mut shared = own.clone();
        shared.gpu.at_once = 2;
        let batch = Batch { sequence: 256, global: 8, dtype: Dtype::Fp32, stack: Stack::Native };
        // Four copies on two cores: each takes twice its computation, and its messages once.
        let copies = Split { data: 4, ..Split::SINGLE };
        let alone = step_time(&model, &copies, &batch, &own).unwrap();
        let together = step_time(&model, &copies, &batch, &shared).unwrap();
        let computed = alone.layers.total() + alone.embedding_and_loss + alone.optimizer;
        assert!(((together.step - alone.step) / computed - 1.0).abs() < 1e-9);
        assert_eq!(together.sharing, together.step - alone.step);
        // A bubble costs nothing while another stage has work for the core.
        let stages = Split { pipeline: 4, ..Split::SINGLE };
        let alone = step_time(&model, &stages, &batch, &own).unwrap();
        let together = step_time(&model, &stages, &batch, &shared).unwrap();
        assert!(together.step < 2.0 * alone.step - alone.bubble);
        // Two ranks have a core each.
        let two = Split { data: 2, ..Split::SINGLE };
        let [a, b] = [&own, &shared].map(|m| step_time(&model, &two, &batch, m).unwrap());
        assert_eq!((a.step, b.sharing), (b.step, 0.0));
    }

    #[test]
    fn the_bubble_is_p_minus_1_over_m_v_for_equal_stages() {
        let model = Catalogue::builtin().model("megatron-310.1b").unwrap();
        let batch = Batch { sequence: 2048, global: 512, dtype: Dtype::Fp16, stack: Stack::Eager };
        let machines = a100();
        let base =
            Split { tensor: 8, pipeline: 16, data: 1, recompute: Recompute::Full, ..Split::SINGLE };
        let plain = step_time(&model, &base, &batch, &machines).unwrap();
        let busy = plain.layers.total() + plain.recompute + plain.embedding_and_loss;
        // The last stage also has the loss, so the bubble is a little below 15/512.
        let share = plain.bubble / busy;
        assert!((0.85..=1.0).contains(&(share / (15.0 / 512.0))), "{share}");
        let six = Split { virtual_stages: 6, ..base };
        let six = step_time(&model, &six, &batch, &machines).unwrap();
        assert!((plain.bubble / six.bubble - 6.0).abs() < 1e-9);
    }
}
