//! Models and measurements for `drumline bench`: the same that the PyTorch script under
//! `tests/peers/` runs.

use std::sync::Arc;

use drumline_collective::local;
use drumline_mesh::Mesh;
use drumline_spec::{
    Checkpointing, DataSource, Family, LearningRate, MemoryOptions, ModelConfig, Optimizer,
    Parallelism, Precision, TrainingJob, WeightRounding,
};
use drumline_tensor::Backend;
use drumline_tensor::reference::Random;

use crate::error::EngineError;
use crate::groups::{DeviceGroups, Groups};
use crate::probe::Probe;
use crate::train::{Batch, Trainer, cpu};

/// A model, and the batch that it is measured with.
#[derive(Debug, Clone, PartialEq)]
pub struct Preset {
    /// The word for it.
    pub name: &'static str,
    /// The model.
    pub model: ModelConfig,
    /// Sequences in a step.
    pub batch: u32,
    /// Tokens in a sequence.
    pub sequence: u32,
}

/// Returns the presets: a small GPT of 10.8 million parameters, the same size as a LLaMA, GPT-2
/// itself, a LLaMA of 1.3 billion for GPUs, and one that is just large enough to be split.
#[must_use]
pub fn presets() -> Vec<Preset> {
    let small = ModelConfig {
        family: Family::Gpt2,
        layers: 6,
        hidden: 384,
        ffn: 1536,
        heads: 6,
        kv_heads: 6,
        vocab: 256,
        context: 256,
        norm_epsilon: 1e-5,
        rope_theta: 10_000.0,
        tie_embeddings: true,
    };
    let llama = ModelConfig { family: Family::Llama, ffn: 1024, ..small.clone() };
    let gpt2 = ModelConfig {
        layers: 12,
        hidden: 768,
        ffn: 3072,
        heads: 12,
        kv_heads: 12,
        vocab: 50_257,
        context: 1024,
        ..small.clone()
    };
    let large = ModelConfig {
        layers: 24,
        hidden: 2048,
        ffn: 5504,
        heads: 16,
        kv_heads: 16,
        vocab: 32_000,
        context: 4096,
        tie_embeddings: false,
        ..llama.clone()
    };
    let tiny = ModelConfig {
        layers: 2,
        hidden: 32,
        ffn: 64,
        heads: 4,
        kv_heads: 2,
        vocab: 64,
        context: 32,
        ..llama.clone()
    };
    vec![
        Preset { name: "gpt-10m", model: small, batch: 8, sequence: 256 },
        Preset { name: "llama-10m", model: llama, batch: 8, sequence: 256 },
        Preset { name: "gpt2-124m", model: gpt2, batch: 1, sequence: 512 },
        Preset { name: "llama-1.3b", model: large, batch: 4, sequence: 4096 },
        Preset { name: "tiny", model: tiny, batch: 4, sequence: 16 },
    ]
}

/// What a training measurement found.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingRate {
    /// Parameters of the model.
    pub parameters: u64,
    /// Seconds of each step after the first.
    pub step_seconds: Vec<f64>,
    /// Tokens per second of the median step.
    pub tokens_per_second: f64,
    /// Floating-point operations per second of the median step, by
    /// [`ModelConfig::train_flops_per_token`].
    pub flops: f64,
    /// Loss of the first step and of the last.
    pub loss: (f32, f32),
}

/// Returns a training job of one preset, on random data.
#[must_use]
pub fn job(preset: &Preset, parallelism: Parallelism, micro_batch: u32, steps: u64) -> TrainingJob {
    TrainingJob {
        model: preset.model.clone(),
        data: DataSource { path: String::new() },
        parallelism,
        virtual_stages: 1,
        precision: Precision::F32,
        memory: MemoryOptions::default(),
        deterministic: false,
        steps,
        global_batch: preset.batch,
        micro_batch,
        sequence: preset.sequence,
        seed: 1,
        optimizer: Optimizer {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            rounding: WeightRounding::Nearest,
        },
        learning_rate: LearningRate { peak: 3e-4, floor: 3e-5, warmup_steps: 2 },
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

/// Draws one rank's micro-batches: tokens of a fixed pattern with noise, so that there is
/// something to learn.
#[must_use]
pub fn batches(job: &TrainingJob, copy: u32, step: u64) -> Vec<Batch> {
    let rows = (job.micro_batch * job.sequence) as usize;
    let vocab = job.model.vocab as usize;
    let micros = u64::from(job.micro_batches());
    (0..micros)
        .map(|micro| {
            let index = (step * u64::from(job.parallelism.data) + u64::from(copy)) * micros + micro;
            let mut random = Random::new(index);
            let mut tokens = Vec::with_capacity(rows + 1);
            let mut token = random.below(vocab);
            for _ in 0..=rows {
                tokens.push(token as u32);
                token = if random.below(4) == 0 {
                    random.below(vocab)
                } else {
                    (token * 5 + 1) % vocab
                };
            }
            Batch { tokens: tokens[..rows].to_vec(), targets: tokens[1..].to_vec() }
        })
        .collect()
}

/// Who watches a training measurement.
pub trait Watch: Sync {
    /// What each rank's trainer tells of its stretches.
    type Probe: Probe;

    /// Makes a rank's probe.
    fn probe(&self, rank: u32) -> Self::Probe;

    /// A rank has finished a step, counted from 0, in so many seconds.
    fn stepped(&self, rank: u32, step: u64, seconds: f64, probe: &Self::Probe);
}

/// Gives every rank the same probe.
struct Same<'a, P>(&'a P);

impl<P: Probe + Clone> Watch for Same<'_, P> {
    type Probe = P;

    fn probe(&self, _: u32) -> P {
        self.0.clone()
    }

    fn stepped(&self, _: u32, _: u64, _: f64, _: &P) {}
}

/// Trains on this process's threads, `threads` of them for each rank of `job`, and measures every
/// step. `seconds` is the caller's monotonic clock; every rank has a clone of `probe`.
///
/// # Errors
/// [`EngineError`] from any rank.
pub fn train<P: Probe + Clone>(
    job: &TrainingJob,
    threads: usize,
    seconds: &(dyn Fn() -> f64 + Sync),
    probe: &P,
) -> Result<TrainingRate, EngineError> {
    let groups = local_groups(Mesh::new(job.parallelism));
    let open = |_: u32, _: &Groups| cpu(job, threads).map(|cpu| (cpu, DeviceGroups::default()));
    train_linked(job, groups, &open, seconds, &Same(probe))
}

/// Opens a rank's device, and its way to the devices of the other ranks.
pub type Open<'a, B> =
    &'a (dyn Fn(u32, &Groups) -> Result<(B, DeviceGroups<B>), EngineError> + Sync);

/// As [`train`], with ranks that talk through `groups`, in rank order, each on a device that `open`
/// opens and with a probe of its own.
///
/// # Errors
/// [`EngineError`] from any rank.
pub fn train_linked<B: Backend, W: Watch>(
    job: &TrainingJob,
    groups: Vec<Groups>,
    open: Open<'_, B>,
    seconds: &(dyn Fn() -> f64 + Sync),
    watch: &W,
) -> Result<TrainingRate, EngineError> {
    let mesh = Mesh::new(job.parallelism);
    let runs = with_groups(groups, |rank, groups| {
        let coords = mesh.coords(rank);
        let (backend, device) = open(rank, &groups)?;
        let probe = watch.probe(rank);
        let mut trainer = Trainer::with_probe(job, coords, groups, backend, probe)?;
        trainer.link_devices(device);
        let (mut times, mut losses) = (Vec::new(), Vec::new());
        for step in 0..job.steps {
            let micros = batches(job, coords.data, step);
            let start = seconds();
            losses.push(trainer.step(step, &micros)?.loss);
            let took = seconds() - start;
            times.push(took);
            watch.stepped(rank, step, took, trainer.probe());
        }
        Ok::<_, EngineError>((times, losses))
    });
    let mut first = None;
    for run in runs {
        let run = run?;
        first.get_or_insert(run);
    }
    let (times, losses) = first.unwrap_or_default();
    let step_seconds = times.get(1..).unwrap_or_default().to_vec();
    let mut sorted = step_seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
    let tokens_per_second = job.tokens_per_step() as f64 / median;
    Ok(TrainingRate {
        parameters: job.model.parameters(),
        step_seconds,
        tokens_per_second,
        flops: tokens_per_second * job.model.train_flops_per_token(job.sequence),
        loss: (
            losses.first().copied().unwrap_or(f32::NAN),
            losses.last().copied().unwrap_or(f32::NAN),
        ),
    })
}

/// Runs `f` once for each rank of a mesh, each on a thread of its own, with communicators between
/// them, and returns the results in the order of ranks. A rank that returns drops its
/// communicators, so that the others do not wait for it.
pub fn in_process<R: Send>(mesh: Mesh, f: impl Fn(u32, Groups) -> R + Sync) -> Vec<R> {
    with_groups(local_groups(mesh), f)
}

fn with_groups<R: Send>(groups: Vec<Groups>, f: impl Fn(u32, Groups) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let f = &f;
        let threads: Vec<_> = (0u32..)
            .zip(groups)
            .map(|(rank, groups)| scope.spawn(move || f(rank, groups)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Makes the communicators of every rank of a mesh inside one process.
#[must_use]
pub fn local_groups(mesh: Mesh) -> Vec<Groups> {
    use drumline_collective::Collective;
    use drumline_mesh::Axis;
    type Shared = Arc<dyn Collective>;
    let mut made: Vec<[Option<Shared>; 3]> = (0..mesh.size()).map(|_| [None, None, None]).collect();
    for (i, axis) in [Axis::Tensor, Axis::Pipeline, Axis::Data].into_iter().enumerate() {
        for rank in 0..mesh.size() {
            let members = mesh.group(rank, axis);
            // The first member makes the group for all.
            if members[0] != rank {
                continue;
            }
            for (member, part) in members.iter().zip(local::group(members.len())) {
                made[*member as usize][i] = Some(Arc::new(part));
            }
        }
    }
    let world = local::group(mesh.size() as usize);
    made.into_iter()
        .zip(world)
        .map(|([tensor, pipeline, data], world)| {
            let own = |group: Option<Shared>| group.expect("every rank is in a group of each axis");
            Groups {
                tensor: own(tensor),
                pipeline: own(pipeline),
                data: own(data),
                world: Arc::new(world),
            }
        })
        .collect()
}
