//! Memory of serving: what is allocated is what the plan says.

use drumline_engine::bench::local_groups;
use drumline_engine::infer::{Leader, Model, ModelOptions, Request, Sampling};
use drumline_mesh::Mesh;
use drumline_spec::{Family, ModelConfig, Parallelism};
use drumline_tensor::{Cpu, DType};

fn config(family: Family, tie_embeddings: bool) -> ModelConfig {
    ModelConfig {
        family,
        layers: 3,
        hidden: 192,
        ffn: 512,
        heads: 6,
        kv_heads: if family == Family::Llama { 2 } else { 6 },
        vocab: 3000,
        context: 256,
        norm_epsilon: 1e-5,
        rope_theta: 10_000.0,
        tie_embeddings,
    }
}

fn prompt(tokens: usize, max_tokens: usize) -> Request {
    Request {
        prompt: (0..tokens as u32).collect(),
        max_tokens,
        sampling: Sampling::GREEDY,
        stop_tokens: Vec::new(),
    }
}

/// Loads and serves, and returns what is allocated after the largest step beside what was planned.
fn served(config: &ModelConfig, weights: DType, max_batch: usize) -> (i64, i64) {
    let mut kept = None;
    let seen = allocation_counter::measure(|| {
        let groups = local_groups(Mesh::new(Parallelism::SINGLE)).remove(0);
        let coords = Mesh::new(Parallelism::SINGLE).coords(0);
        let options = ModelOptions { max_batch, weights, ..ModelOptions::default() };
        let (cpu, split) = (Cpu::new(1).unwrap(), Parallelism::SINGLE);
        let mut model = Model::new(config, split, coords, groups, cpu, options).unwrap();
        let filled = model.load(|_, values| {
            values.iter_mut().enumerate().for_each(|(i, x)| *x = (i % 7) as f32 * 0.01);
            Ok::<_, std::convert::Infallible>(())
        });
        filled.unwrap();
        let mut leader = Leader::new(model);
        for _ in 0..max_batch {
            leader.submit(prompt(200, 4)).unwrap();
        }
        while !leader.is_idle() {
            leader.step().unwrap();
        }
        kept = Some(leader);
    });
    let memory = kept.map(|leader| leader.memory()).unwrap();
    let planned = memory.weights + memory.cache + memory.buffers + memory.scratch;
    (seen.bytes_current, planned as i64)
}

#[test]
fn what_serving_allocates_is_what_its_plan_says() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, false)] {
        for weights in [DType::F32, DType::F16, DType::Bf16, DType::I8] {
            for max_batch in [1, 8] {
                let (allocated, planned) = served(&config(family, tie), weights, max_batch);
                // The layout, the batcher's books and the known prefixes: a few KiB a block.
                let rest = allocated - planned;
                assert!(
                    (0..256 << 10).contains(&rest),
                    "{family:?}, {weights:?}, batch {max_batch}: {allocated} bytes, {planned} planned"
                );
            }
        }
    }
}
