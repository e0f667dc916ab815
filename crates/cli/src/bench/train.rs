//! `drumline bench train`: the training step, its ranks as threads of this process that talk as
//! processes do, on the same models as the PyTorch scripts under `tests/peers/`.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use clap::{Args, ValueEnum};
use drumline_collective::host::{Listener, WorldOptions};
use drumline_engine::bench::{self, Preset, TrainingRate, Watch};
use drumline_engine::train::cpu;
use drumline_engine::{DeviceGroups, EngineError, Groups, Memory, Span, Work};
use drumline_mesh::Mesh;
use drumline_rank::stopwatch::{Breakdown, Stopwatch};
use drumline_spec::{MemoryOptions, Parallelism, Precision, Recompute, TrainingJob};
use drumline_tensor::{DType, MatmulPrecision, peak};

use super::gpu::{self, DeviceArg};
use super::{Figure, Measured};
use crate::failure::Failure;
use crate::output;

/// Products that the matmul peak is the best of.
const PEAK_ROUNDS: usize = 8;

/// Arguments of `bench train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The model: gpt-10m, llama-10m, gpt2-124m, llama-1.3b or tiny.
    #[arg(long, default_value = "llama-10m")]
    pub model: String,
    /// What ranks compute on; they go round the GPUs that there are.
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
    /// Sequences in a step; 0: the model's own.
    #[arg(long, default_value_t = 0)]
    pub batch: u32,
    /// Tokens in a sequence; 0: the model's own.
    #[arg(long, default_value_t = 0)]
    pub sequence: u32,
    /// Steps, the first of which does not count.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub steps: u32,
    /// Threads of each rank; 0: the cores, divided among the ranks.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Tensor parallelism.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tensor: u32,
    /// Pipeline stages.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub pipeline: u32,
    /// Parts of the layers that each stage holds.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub virtual_stages: u32,
    /// Data-parallel copies.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub data: u32,
    /// Sequences in one forward pass; 0: all that a copy has of the step.
    #[arg(long, default_value_t = 0)]
    pub micro: u32,
    /// What matrix products are computed with.
    #[arg(long, value_enum, default_value_t = PrecisionArg::F32)]
    pub precision: PrecisionArg,
    /// What the backward pass computes again instead of keeping it.
    #[arg(long, value_enum, default_value_t = RecomputeArg::None)]
    pub recompute: RecomputeArg,
    /// Each copy keeps the optimizer of its share of the parameters.
    #[arg(long)]
    pub shard_optimizer: bool,
    /// The ranks of a tensor group share the rows between the matrix products.
    #[arg(long)]
    pub sequence_parallel: bool,
    /// No bit depends on the number of threads.
    #[arg(long)]
    pub deterministic: bool,
    /// Where the ranks' data goes.
    #[arg(long, value_enum, default_value_t = Transport::Shm)]
    pub transport: Transport,
    /// Where a step's time goes, the share of this machine's measured peaks, and memory beside its
    /// plan.
    #[arg(long)]
    pub breakdown: bool,
}

/// What matrix products are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// f32 throughout.
    F32,
    /// Inputs rounded to bf16, sums in f32.
    Bf16,
}

/// What the backward pass computes again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RecomputeArg {
    /// Nothing.
    None,
    /// What costs no matrix product.
    Selective,
    /// Everything but the input of each layer.
    Full,
}

/// How ranks on one host talk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Shared memory.
    Shm,
    /// TCP, as between hosts.
    Tcp,
}

pub(super) async fn run(args: &TrainArgs) -> Result<Measured, Failure> {
    let (preset, job) = job(args)?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let ranks = job.parallelism.world_size() as usize;
    let threads = if args.threads == 0 { (cores / ranks).max(1) } else { args.threads };
    let p = job.parallelism;
    let mut setting = format!(
        "{} ({:.1} million parameters), batch {} x {} tokens, {}, tensor {} x pipeline {} x data {}, ",
        preset.name,
        job.model.parameters() as f64 / 1e6,
        preset.batch,
        preset.sequence,
        job.precision.as_str(),
        p.tensor,
        p.pipeline,
        p.data
    );
    if job.virtual_stages > 1 {
        setting.push_str(&format!("{} virtual stages, ", job.virtual_stages));
    }
    if job.memory.recompute != Recompute::None {
        setting.push_str(&format!("recompute {}, ", job.memory.recompute.as_str()));
    }
    for (wanted, what) in [
        (job.memory.shard_optimizer, "sharded optimizer, "),
        (job.memory.sequence_parallel, "sequence parallel, "),
        (job.deterministic, "deterministic, "),
    ] {
        setting.push_str(if wanted { what } else { "" });
    }
    let (shared, breakdown, device) =
        (args.transport == Transport::Shm, args.breakdown, args.device);
    match device {
        DeviceArg::Cpu => setting.push_str(&format!("{threads} threads a rank")),
        DeviceArg::Gpu => setting.push_str(&gpu::words(p.world_size())?),
    }
    let figures = tokio::task::spawn_blocking(move || match device {
        DeviceArg::Cpu => figures(&job, threads, shared, breakdown),
        DeviceArg::Gpu => gpu_figures(&job, shared),
    })
    .await
    .map_err(|error| Failure::failed(error.to_string()))??;
    Ok(("train", setting, figures))
}

fn job(args: &TrainArgs) -> Result<(Preset, TrainingJob), Failure> {
    let presets = bench::presets();
    let Some(mut preset) = presets.iter().find(|preset| preset.name == args.model).cloned() else {
        let names: Vec<_> = presets.iter().map(|preset| preset.name).collect();
        return Err(Failure::user(format!(
            "--model {:?} is not one of {}",
            args.model,
            names.join(", ")
        )));
    };
    if args.batch > 0 {
        preset.batch = args.batch;
    }
    if args.sequence > 0 {
        preset.sequence = args.sequence;
    }
    if preset.sequence > preset.model.context {
        let context = preset.model.context;
        return Err(Failure::user(format!("--sequence is at most {context} with {}", preset.name)));
    }
    if args.device == DeviceArg::Gpu && args.breakdown {
        // Work is queued there: the host's clock does not see where its time goes.
        return Err(Failure::user("--breakdown is measured on the processor alone"));
    }
    let split = Parallelism { tensor: args.tensor, pipeline: args.pipeline, data: args.data };
    let mistakes = preset.model.check(split.tensor, split.pipeline * args.virtual_stages);
    if let Some(mistake) = mistakes.first() {
        return Err(Failure::user(mistake.to_string()));
    }
    let micro =
        if args.micro == 0 { preset.batch / split.data.min(preset.batch) } else { args.micro };
    let part = u64::from(micro) * u64::from(split.data);
    if part == 0 || !u64::from(preset.batch).is_multiple_of(part) {
        return Err(Failure::user(format!(
            "batch {} is not divisible by data {} x micro {micro}",
            preset.batch, split.data
        )));
    }
    let precision = match args.precision {
        PrecisionArg::F32 => Precision::F32,
        PrecisionArg::Bf16 => Precision::Bf16,
    };
    let steps = u64::from(args.steps);
    let virtual_stages = args.virtual_stages;
    let memory = MemoryOptions {
        recompute: match args.recompute {
            RecomputeArg::None => Recompute::None,
            RecomputeArg::Selective => Recompute::Selective,
            RecomputeArg::Full => Recompute::Full,
        },
        shard_optimizer: args.shard_optimizer,
        sequence_parallel: args.sequence_parallel,
    };
    for (wanted, ranks, what, axis) in [
        (memory.shard_optimizer, split.data, "--shard-optimizer", "--data"),
        (memory.sequence_parallel, split.tensor, "--sequence-parallel", "--tensor"),
    ] {
        if wanted && ranks == 1 {
            return Err(Failure::user(format!("{what} needs {axis} 2 or more")));
        }
    }
    let job = TrainingJob {
        virtual_stages,
        precision,
        memory,
        deterministic: args.deterministic,
        ..bench::job(&preset, split, micro, steps)
    };
    // The other rule of interleaving: whole turns of micro-batches.
    Memory::plan(&job, Mesh::new(split).coords(0), DType::F32)
        .map_err(|error| Failure::user(error.to_string()))?;
    Ok((preset, job))
}

fn figures(
    job: &TrainingJob,
    threads: usize,
    shared_memory: bool,
    breakdown: bool,
) -> Result<Vec<Figure>, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::failed(error.to_string());
    let begin = Instant::now();
    let seconds = || begin.elapsed().as_secs_f64();
    let groups = link(job.parallelism, shared_memory)?;
    let before = Usage::now();
    // Two readings of the clock for each of some hundred stretches of a step: some ten microseconds.
    let watch = Watcher::new(job);
    let open = |_: u32, _: &Groups| cpu(job, threads).map(|cpu| (cpu, DeviceGroups::default()));
    let rate = bench::train_linked(job, groups, &open, &seconds, &watch);
    let rate = rate.map_err(|error| failed(&error))?;
    let mut figures = rate_figures(&rate);
    if !breakdown {
        return Ok(figures);
    }
    let found = watch.found();
    figures.extend(parts(job, threads, &found)?);
    figures.extend(memory(job, before, &found)?);
    Ok(figures)
}

/// As [`figures`], on GPUs.
fn gpu_figures(job: &TrainingJob, shared_memory: bool) -> Result<Vec<Figure>, Failure> {
    let begin = Instant::now();
    let seconds = || begin.elapsed().as_secs_f64();
    let groups = link(job.parallelism, shared_memory)?;
    let matmul = match job.precision {
        Precision::F32 => MatmulPrecision::F32,
        Precision::Bf16 => MatmulPrecision::Bf16,
    };
    let open = |rank: u32, groups: &Groups| -> Result<_, EngineError> {
        let cuda =
            gpu::open(rank, matmul).map_err(|error| error.during("open", "the rank's GPU"))?;
        let linked = gpu::link(&cuda, groups, rank)?;
        if rank == 0 && job.parallelism.world_size() > 1 {
            output::note(&format!("collectives between GPUs: {}", linked.words));
        }
        Ok((cuda, linked.groups))
    };
    let rate = bench::train_linked(job, groups, &open, &seconds, &Watcher::new(job))
        .map_err(|error| Failure::failed(error.to_string()))?;
    Ok(rate_figures(&rate))
}

/// Links ranks of this process as ranks of different processes are.
fn link(split: Parallelism, shared_memory: bool) -> Result<Vec<Groups>, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::failed(error.to_string());
    if split.world_size() == 1 {
        return Ok(bench::local_groups(Mesh::new(split)));
    }
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let listeners = (0..split.world_size())
        .map(|_| Listener::bind(loopback))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| failed(&error))?;
    let addresses: Vec<_> = listeners.iter().map(Listener::address).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0u32..)
            .zip(listeners)
            .map(|(rank, listener)| {
                // Nobody else connects within this process' own moment.
                let secret = b"one process".to_vec();
                let mut options = WorldOptions::new(rank as usize, addresses.clone(), secret);
                options.shared_memory = shared_memory;
                scope.spawn(move || drumline_rank::world::link(listener, &options, split, rank))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(linked) => linked.map(|(_, groups)| groups).map_err(|error| failed(&error)),
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    })
}

fn rate_figures(rate: &TrainingRate) -> Vec<Figure> {
    let mut sorted = rate.step_seconds.clone();
    sorted.sort_by(f64::total_cmp);
    vec![
        Figure::new("tokens", rate.tokens_per_second, "1/s")
            .aim("1.15 x PyTorch on the same machine (bf16: 1.1 x)"),
        Figure::new("step, median", super::quantile(&sorted, 0.5) * 1e3, "ms"),
        Figure::new("step, shortest", super::quantile(&sorted, 0.0) * 1e3, "ms"),
        Figure::new("operations", rate.flops / 1e9, "GFLOP/s"),
        Figure::new("loss, first step", f64::from(rate.loss.0), "nat"),
        Figure::new("loss, last step", f64::from(rate.loss.1), "nat"),
    ]
}

/// What the ranks found, over the steps after the first.
#[derive(Debug, Clone, Default)]
struct Found {
    /// By rank.
    sums: Vec<Breakdown>,
    /// By rank: seconds of all steps.
    seconds: Vec<f64>,
    /// Steps counted.
    steps: u64,
    /// At the end of the first step and of the last, as seen by rank 0.
    usage: (Option<Usage>, Option<Usage>),
}

struct Watcher {
    found: Mutex<Found>,
}

impl Watcher {
    fn new(job: &TrainingJob) -> Self {
        let ranks = job.parallelism.world_size() as usize;
        let found = Found {
            sums: vec![Breakdown::default(); ranks],
            seconds: vec![0.0; ranks],
            steps: job.steps.saturating_sub(1),
            usage: (None, None),
        };
        Self { found: Mutex::new(found) }
    }

    fn found(&self) -> Found {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Watch for Watcher {
    type Probe = Stopwatch;

    fn probe(&self, _: u32) -> Stopwatch {
        Stopwatch::default()
    }

    fn stepped(&self, rank: u32, step: u64, seconds: f64, probe: &Stopwatch) {
        let taken = probe.take();
        let usage = (rank == 0).then(Usage::now);
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if step == 0 {
            found.usage.0 = usage.or(found.usage.0);
            return;
        }
        let rank = rank as usize;
        found.sums[rank].add(&taken);
        found.seconds[rank] += seconds;
        found.usage.1 = usage.or(found.usage.1);
    }
}

/// Means over ranks and steps, as milliseconds of a step, and shares of peaks.
fn parts(job: &TrainingJob, threads: usize, found: &Found) -> Result<Vec<Figure>, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::failed(error.to_string());
    let mesh = Mesh::new(job.parallelism);
    let ranks = mesh.size() as usize;
    let count = (found.steps * ranks as u64) as f64;
    let mut sum = Breakdown::default();
    found.sums.iter().for_each(|one| sum.add(one));
    let seconds = found.seconds.iter().sum::<f64>();
    let ms = |name: &str, seconds: f64| Figure::new(name, seconds / count * 1e3, "ms");
    let bubble = sum.of(Span::PipelineWait);
    let mut figures = vec![
        ms("a rank's step: matmul", sum.of(Span::Matmul)),
        ms("a rank's step: attention", sum.of(Span::Attention)),
        ms("a rank's step: other kernels", sum.of(Span::Other)),
        ms("a rank's step: optimizer", sum.of(Span::Optimizer)),
        ms("a rank's step: communication, exposed", sum.exposed()),
        ms("a rank's step: bubble, waiting for a stage", bubble),
        ms("a rank's step: idle, none of these", (seconds - sum.total()).max(0.0)),
        ms("beside it: communication, hidden", sum.hidden()),
    ];
    if job.parallelism.pipeline > 1 {
        let schedule = drumline_mesh::Schedule::interleaved(
            job.parallelism.pipeline,
            job.virtual_stages,
            job.micro_batches(),
        );
        let ideal = schedule.map_err(|error| failed(&error))?.bubble_ideal();
        // What comes after the pipeline is not the schedule's.
        let pipeline = seconds - sum.of(Span::Optimizer) - sum.of(Span::GradientComm);
        figures.push(Figure::new("bubble, measured", bubble / pipeline, "ratio"));
        figures.push(Figure::new("bubble, computed", ideal, "ratio"));
    }

    let mut work = Work::default();
    for rank in 0..mesh.size() {
        let one = Work::of(job, mesh.coords(rank)).map_err(|error| failed(&error))?;
        work.matmul_flops += one.matmul_flops;
        work.attention_flops += one.attention_flops;
        work.other_bytes += one.other_bytes;
        work.optimizer_bytes += one.optimizer_bytes;
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let used = (threads * ranks).min(cores);
    let begin = Instant::now();
    let clock = || begin.elapsed().as_secs_f64();
    let precision = match job.precision {
        Precision::F32 => MatmulPrecision::F32,
        Precision::Bf16 => MatmulPrecision::Bf16,
    };
    let matmul = peak::matmul(used, precision, PEAK_ROUNDS, clock).map_err(|e| failed(&e))?;
    let memory = peak::read_bandwidth(used, 3, clock).map_err(|e| failed(&e))?;
    // Ranks that take turns on a core: a stretch of one includes the others' turns.
    let crowd = (threads * ranks) as f64 / used as f64;
    let per_step = |seconds: f64| seconds / found.steps as f64 / ranks as f64 / crowd;
    let step = seconds / count;
    let share = |name: &str, rate: f64, peak: f64| Figure::new(name, rate / peak, "ratio");
    figures.extend([
        Figure::new("peak: matmul, measured", matmul / 1e9, "GFLOP/s"),
        share("peak: matmul kernels", work.matmul_flops / per_step(sum.of(Span::Matmul)), matmul)
            .aim("0.85 in f32"),
        share(
            "peak: whole step",
            (work.matmul_flops + work.attention_flops * 6.0 / 7.0) / step,
            matmul,
        ),
        Figure::new("peak: memory, measured by reading", memory / 1e9, "GB/s"),
        share("peak: optimizer", work.optimizer_bytes / per_step(sum.of(Span::Optimizer)), memory),
        share("peak: other kernels", work.other_bytes / per_step(sum.of(Span::Other)), memory),
    ]);
    if let (Some(first), Some(last)) = found.usage {
        let wall = last.at.duration_since(first.at).as_secs_f64();
        let busy = (last.cpu_seconds - first.cpu_seconds) / wall / used as f64;
        figures.push(Figure::new("cores busy", busy, "ratio"));
    }
    Ok(figures)
}

/// The ranks' memory beside the plan's arithmetic.
fn memory(job: &TrainingJob, before: Usage, found: &Found) -> Result<Vec<Figure>, Failure> {
    let mesh = Mesh::new(job.parallelism);
    let mut plan = Memory::default();
    for rank in 0..mesh.size() {
        let one = Memory::plan(job, mesh.coords(rank), DType::F32)
            .map_err(|error| Failure::failed(error.to_string()))?;
        plan.weights += one.weights;
        plan.gradients += one.gradients;
        plan.optimizer += one.optimizer;
        plan.activations += one.activations;
        plan.workspace += one.workspace;
    }
    let mib = |name: &str, bytes: u64| Figure::new(name, bytes as f64 / (1 << 20) as f64, "MiB");
    let mut figures = vec![
        mib("memory, planned: weights", plan.weights),
        mib("memory, planned: gradients", plan.gradients),
        mib("memory, planned: optimizer", plan.optimizer),
        mib("memory, planned: activations", plan.activations),
        mib("memory, planned: workspace", plan.workspace),
        mib("memory, planned", plan.total()),
    ];
    if let (Some(first), Some(last)) = found.usage {
        let used = last.resident_bytes.saturating_sub(before.resident_bytes);
        let grown = last.resident_bytes.saturating_sub(first.resident_bytes);
        let over = used as f64 / plan.total() as f64;
        figures.push(mib("memory, measured (resident)", used));
        figures.push(Figure::new("memory, measured over planned", over, "ratio").aim("1.1"));
        figures.push(mib("memory, growth after the first step", grown));
    }
    Ok(figures)
}

/// What this process uses.
#[derive(Debug, Clone, Copy)]
struct Usage {
    at: Instant,
    resident_bytes: u64,
    cpu_seconds: f64,
}

impl Usage {
    fn now() -> Self {
        let resident = std::fs::read_to_string("/proc/self/statm").ok().and_then(|text| {
            text.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok())
        });
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Self {
            at: Instant::now(),
            resident_bytes: resident.unwrap_or(0) * rustix::param::page_size() as u64,
            cpu_seconds: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
        }
    }
}
