//! Tiny models and runs that the engine's tests share.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;

use drumline_engine::bench::{batches, in_process};
use drumline_engine::{Snapshot, StepReport, Trainer};
use drumline_mesh::{Mesh, ShardSpec};
use drumline_spec::{
    Checkpointing, DataSource, Family, LearningRate, MemoryOptions, ModelConfig, Optimizer,
    Parallelism, Precision, TrainingJob, WeightRounding,
};
use drumline_tensor::Cpu;

/// A model small enough to train in a blink, with every number different from the others, and a
/// vocabulary that no split divides.
pub(crate) fn tiny(family: Family, tie: bool) -> ModelConfig {
    ModelConfig {
        family,
        layers: 4,
        hidden: 32,
        ffn: 48,
        heads: 8,
        kv_heads: if family == Family::Llama { 4 } else { 8 },
        vocab: 61,
        context: 24,
        norm_epsilon: 1e-5,
        rope_theta: 10_000.0,
        tie_embeddings: tie,
    }
}

pub(crate) fn job(model: ModelConfig, parallelism: Parallelism) -> TrainingJob {
    TrainingJob {
        model,
        data: DataSource { path: String::new() },
        parallelism,
        virtual_stages: 1,
        precision: Precision::F32,
        memory: MemoryOptions::default(),
        deterministic: false,
        steps: 20,
        global_batch: 8,
        micro_batch: 2,
        sequence: 20,
        seed: 7,
        optimizer: Optimizer {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 0.5,
            rounding: WeightRounding::Nearest,
        },
        learning_rate: LearningRate { peak: 3e-3, floor: 3e-4, warmup_steps: 4 },
        checkpoint: Checkpointing {
            path: String::new(),
            interval_steps: 0,
            keep: 1,
            resume_from: None,
        },
        eval_interval_steps: 0,
        eval_sequences: 0,
    }
}

pub(crate) fn split(tensor: u32, pipeline: u32, data: u32) -> Parallelism {
    Parallelism { tensor, pipeline, data }
}

/// One rank's micro-batches of a step, so that any split sees the same global batch: the same
/// sequences go to whichever copy and pass they fall to.
pub(crate) fn micros(job: &TrainingJob, copy: u32, step: u64) -> Vec<drumline_engine::Batch> {
    let single = TrainingJob { parallelism: Parallelism::SINGLE, ..job.clone() };
    let all = batches(&single, 0, step);
    let own = job.micro_batches() as usize;
    all[copy as usize * own..(copy as usize + 1) * own].to_vec()
}

/// Trains on every rank of the job and returns each rank's reports and held-out loss.
pub(crate) fn train(job: &TrainingJob) -> Vec<(Vec<StepReport>, f32)> {
    let mesh = Mesh::new(job.parallelism);
    in_process(mesh, |rank, groups| {
        let coords = mesh.coords(rank);
        let mut trainer = Trainer::new(job, coords, groups, Cpu::new(1).unwrap()).unwrap();
        let reports = (0..job.steps)
            .map(|step| trainer.step(step, &micros(job, coords.data, step)).unwrap())
            .collect();
        let held_out = trainer.evaluate(&micros(job, coords.data, 1000)).unwrap();
        (reports, held_out)
    })
}

/// Whole tensors, by name, put together from the shards that ranks own.
#[derive(Default)]
pub(crate) struct Whole {
    tensors: BTreeMap<String, (ShardSpec, Vec<f32>, Vec<bool>)>,
}

impl Whole {
    /// Adds one rank's snapshot. No element may come twice.
    pub(crate) fn add(&mut self, snapshot: &Snapshot) {
        for (shard, values) in snapshot.shards() {
            assert_eq!(shard.elements(), values.len());
            let whole = ShardSpec {
                offset: vec![0; shard.offset.len()],
                shape: shard.global_shape.clone(),
                ..shard.clone()
            };
            let elements = whole.elements();
            let (spec, tensor, seen) = self
                .tensors
                .entry(shard.name.clone())
                .or_insert_with(|| (whole, vec![0.0; elements], vec![false; elements]));
            shard.copy_part(values, spec, tensor, shard);
            let mut mark = vec![false; elements];
            shard.copy_part(&vec![true; values.len()], spec, &mut mark, shard);
            for (seen, mark) in seen.iter_mut().zip(mark) {
                assert!(!(*seen && mark), "{} has two owners", shard.name);
                *seen |= mark;
            }
        }
    }

    /// Asserts that every element of every tensor came.
    pub(crate) fn assert_complete(&self) {
        for (name, (_, _, seen)) in &self.tensors {
            assert!(seen.iter().all(|s| *s), "{name} has elements that nobody owns");
        }
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn get(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }

    pub(crate) fn get_mut(&mut self, name: &str) -> &mut Vec<f32> {
        &mut self.tensors.get_mut(name).unwrap().1
    }

    /// Fills a shard: the callback of `load`.
    pub(crate) fn fill(&self, shard: &ShardSpec, values: &mut [f32]) -> Result<(), String> {
        let (spec, tensor, _) =
            self.tensors.get(&shard.name).ok_or_else(|| format!("no tensor {}", shard.name))?;
        spec.copy_part(tensor, shard, values, shard);
        Ok(())
    }
}
