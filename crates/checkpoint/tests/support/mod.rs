//! Made-up models, their shards under any split, and values that tell where they belong.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::Path;
use std::time::Duration;

use drumline_checkpoint::{RunState, Tensor, Writer, WriterOptions, Written};
use drumline_mesh::{ShardSpec, split};
use drumline_spec::{Family, ModelConfig, Parallelism};

pub(crate) fn model(family: Family) -> ModelConfig {
    let gpt2 = family == Family::Gpt2;
    ModelConfig {
        family,
        layers: 2,
        hidden: 16,
        ffn: 40,
        heads: 4,
        kv_heads: if gpt2 { 4 } else { 2 },
        vocab: 37,
        context: 24,
        norm_epsilon: 1e-5,
        rope_theta: 10_000.0,
        tie_embeddings: gpt2,
    }
}

/// How a tensor of two dimensions is cut: by rows, by columns, or not at all.
pub(crate) type Tensors = Vec<(String, Vec<usize>)>;

/// Returns rank `rank`'s parts when every tensor is cut into a grid; vectors by its rows. Several
/// cells may fall to one rank, as with GPT-2's fused matrices.
pub(crate) fn parts(
    tensors: &Tensors,
    grid: (usize, usize),
    ranks: usize,
    rank: usize,
) -> Vec<ShardSpec> {
    let mut out = Vec::new();
    for (name, shape) in tensors {
        let mut cell = 0;
        let (rows, columns) = (shape[0], shape.get(1).copied());
        for i in 0..grid.0 {
            for j in 0..columns.map_or(1, |_| grid.1) {
                let mut spans = vec![split(rows, grid.0, i)];
                spans.extend(columns.map(|columns| split(columns, grid.1, j)));
                if cell % ranks == rank && spans.iter().all(|s| !s.is_empty()) {
                    out.push(ShardSpec {
                        name: name.clone(),
                        global_shape: shape.clone(),
                        offset: spans.iter().map(|s| s.start).collect(),
                        shape: spans.iter().map(ExactSizeIterator::len).collect(),
                    });
                }
                cell += 1;
            }
        }
    }
    out
}

/// The value of each element follows from tensor, place and step.
pub(crate) fn values(spec: &ShardSpec, step: u64) -> Vec<f32> {
    let name = spec.name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    (0..spec.elements())
        .map(|index| {
            let mut rest = index;
            let mut place = 0;
            let mut stride = 1;
            for d in (0..spec.shape.len()).rev() {
                place += (spec.offset[d] + rest % spec.shape[d]) * stride;
                rest /= spec.shape[d];
                stride *= spec.global_shape[d];
            }
            let mixed = (name ^ step.wrapping_mul(0x9E37_79B9) ^ place as u64)
                .wrapping_mul(0x9E37_79B9_7F4A_7C15);
            (mixed >> 40) as f32 / 1e6
        })
        .collect()
}

pub(crate) fn snapshot(specs: &[ShardSpec], step: u64) -> Vec<Tensor> {
    specs.iter().map(|spec| Tensor { spec: spec.clone(), values: values(spec, step) }).collect()
}

pub(crate) fn options(run: &Path, rank: u32, ranks: u32) -> WriterOptions {
    WriterOptions {
        run: run.to_owned(),
        rank,
        writers: (0..ranks).collect(),
        attempt: 1,
        keep: 3,
        model: model(Family::Llama),
        parallelism: Parallelism { tensor: ranks, ..Parallelism::SINGLE },
        state: RunState {
            seed: 7,
            data_fingerprint: "abc".into(),
            job: serde_json::json!({"kind": "TrainingJob"}),
            ..RunState::default()
        },
        tokenizer: None,
        parts_timeout: Duration::from_secs(20),
    }
}

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Writes one checkpoint by `ranks` writers at once and returns what the first one wrote.
pub(crate) fn write(
    tensors: &Tensors,
    grid: (usize, usize),
    ranks: u32,
    step: u64,
    with: impl Fn(u32) -> WriterOptions,
) -> Written {
    let writers: Vec<_> = (0..ranks).map(|r| Writer::start(with(r)).unwrap()).collect();
    for (rank, writer) in writers.iter().enumerate() {
        let own = parts(tensors, grid, ranks as usize, rank);
        writer.submit(step, snapshot(&own, step), LIMIT).unwrap();
    }
    let mut written: Vec<_> = writers
        .into_iter()
        .map(|writer| {
            let mut outcomes = writer.finish(LIMIT).unwrap();
            assert_eq!(outcomes.len(), 1);
            outcomes.remove(0).result.unwrap()
        })
        .collect();
    assert!(written[0].complete);
    written.swap_remove(0)
}
