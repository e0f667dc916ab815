//! Each term of a plan with its formula and source, for `--explain`. The same as in `docs/planner.md`.

/// One term: its name as in tables, its formula, its source.
pub type Term = (&'static str, &'static str, &'static str);

/// The terms of a training step.
pub const STEP: [Term; 14] = [
    (
        "matmuls",
        "2 m n k / (peak e k/(k+k_half) w/(w+1/2)), w = tiles/SMs; or bytes/bandwidth if slower; forward + 2x backward",
        "roofline: Williams et al. 2009; e and k_half calibrated per GPU generation",
    ),
    (
        "attention",
        "fused: B T^2 H E ops causal forward, 2.5x backward, over e_attn peak; unfused: scores' bytes over bandwidth",
        "Dao 2023 (2307.08691); e_attn calibrated",
    ),
    (
        "memory-bound operators",
        "bytes of norms, residuals, non-linearities, rotations over achieved bandwidth + a launch each",
        "operator list: Korthikanti et al. 2022, section 4",
    ),
    (
        "tensor collectives",
        "per layer and pass 2 all-reduces of 2 B T D bytes: 2 (t-1)/t bytes/bw, or as gathers and scatters with sequence parallelism",
        "Shoeybi et al. 2019; Korthikanti et al. 2022",
    ),
    (
        "context ring",
        "keys and values round c ranks, max(ring - 0.8 attention, 0.3 ring)",
        "Liu et al. 2023 (2310.01889); Llama 3, section 3.3.2",
    ),
    (
        "expert all-to-all",
        "2 per mixture layer and pass, top_k B T D 2 bytes, the share leaving the node over the NIC",
        "Lepikhin et al. 2020 (2006.16668)",
    ),
    (
        "recomputation",
        "full: one more forward pass of the layers; selective: scores, softmax and dropout again",
        "Korthikanti et al. 2022, section 5",
    ),
    (
        "embedding and loss",
        "3 products of B T D V/t, cross-entropy's bytes over bandwidth, on the stage that holds them",
        "Narayanan et al. 2021, appendix",
    ),
    (
        "pipeline bubble",
        "(sum of all stages - slowest stage) / v for one micro-batch; (p-1)/(m v) for equal stages",
        "Narayanan et al. 2021, section 2.2",
    ),
    (
        "pipeline sends",
        "2 sends of 2 B T D / t bytes per micro-batch and chunk; a tenth shows where the software overlaps them",
        "Narayanan et al. 2021, section 4.1",
    ),
    (
        "data parallelism",
        "gradients (and parameters with ZeRO) round the ring, less what fits behind the last backward passes",
        "Rajbhandari et al. 2020 (1910.02054)",
    ),
    (
        "optimizer",
        "46 to 52 bytes per parameter of this rank over achieved bandwidth",
        "Adam in fp32 with 16-bit weights",
    ),
    (
        "slowest node",
        "busy time x spread x sqrt(2 ln nodes)",
        "expected maximum of N normal variates; spread calibrated per network",
    ),
    (
        "outside the device",
        "30 ms per step",
        "input, logging, gradient norm's round trip; calibrated",
    ),
];

/// The terms of memory.
pub const MEMORY: [Term; 7] = [
    (
        "weights",
        "2 bytes per parameter of the rank; / (d c) with ZeRO 3",
        "Rajbhandari et al. 2020",
    ),
    (
        "gradients",
        "4 bytes (bf16) or 2 (fp16); / (d c) from ZeRO 2",
        "Megatron-Core, distributed optimizer",
    ),
    (
        "optimizer",
        "12 bytes (bf16) or 16 (fp16); / (d c) from ZeRO 1",
        "Megatron-Core, distributed optimizer",
    ),
    (
        "activations",
        "layers x s b h (34 + 5 a s/h) and its forms for t, SP, recomputation, x micro-batches in flight",
        "Korthikanti et al. 2022, table 2",
    ),
    (
        "logits",
        "B T (4 D + 6 V / t) bytes on the last stage",
        "Korthikanti et al. 2022, section 4.3",
    ),
    (
        "buffers",
        "gradient buckets, gathered activations, pipeline's receive buffers",
        "Megatron-Core defaults",
    ),
    (
        "overhead",
        "3 GB of driver and libraries + 5% of activations",
        "assumed; stated as constants",
    ),
];

/// Writes a list of terms with their values.
#[must_use]
pub fn render(terms: &[Term], values: &[(String, String)]) -> String {
    let mut text = String::new();
    for (name, formula, source) in terms {
        let value =
            values.iter().find(|(n, _)| n == name).map_or(String::new(), |(_, v)| v.clone());
        text.push_str(&format!("  {name:<24} {value:>12}\n      = {formula}\n      [{source}]\n"));
    }
    text
}
