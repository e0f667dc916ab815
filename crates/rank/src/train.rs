//! The step loop of one training rank: batches in, reports and checkpoints out.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_checkpoint::file::Shards;
use drumline_checkpoint::{Checkpoint, RunState, Writer, WriterOptions};
use drumline_collective::Collective;
use drumline_cuda::Cuda;
use drumline_data::{Batches, Dataset};
use drumline_engine::{Batch, DeviceGroups, Groups, Snapshot, Span, StepReport, Trainer, Work};
use drumline_mesh::{Mesh, ShardSpec};
use drumline_spec::{DeviceKind, Precision, TrainingJob};
use drumline_tensor::{Backend, Cpu, MatmulPrecision};
use drumline_wire::v1;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::RankError;
use crate::context::Context;
use crate::gpu;
use crate::host::Host;
use crate::record::Record;
use crate::stopwatch::{Breakdown, Stopwatch};
use crate::world::{self, World};

/// Folder of a run's checkpoints within its job's folder, unless the spec names another.
const CHECKPOINTS: &str = "checkpoints";
/// Longest wait for an earlier checkpoint before the next is handed over, and at the end.
const CHECKPOINT_DEADLINE: Duration = Duration::from_secs(600);
/// How often a rank that does not lead reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// How often the leader writes a line to its log.
const LOG_INTERVAL: Duration = Duration::from_secs(2);

/// A snapshot on its way to disk.
struct Saved(Snapshot);

impl Shards for Saved {
    fn shards(&self) -> Vec<(&ShardSpec, &[f32])> {
        self.0.shards().collect()
    }
}

/// Where to start, as the leader found it and all ranks agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Start {
    step: u64,
    checkpoint: Option<PathBuf>,
    error: Option<String>,
}

/// Trains until the job's last step, on the kind of device that the job asks for.
///
/// # Errors
/// [`RankError`]; the gang's attempt is over then.
pub fn run(
    context: &Context,
    job: &TrainingJob,
    host: &Host,
    runtime: &Handle,
) -> Result<(), RankError> {
    match context.spec.gang().device {
        DeviceKind::Cpu => {
            let backend = drumline_engine::train::cpu(job, context.threads)?;
            let alone = |_: &Cpu, _: &Groups| Ok((DeviceGroups::default(), String::new()));
            run_on(backend, alone, context, job, host, runtime)
        }
        DeviceKind::Gpu => {
            let matmul = match job.precision {
                Precision::F32 => MatmulPrecision::F32,
                Precision::Bf16 => MatmulPrecision::Bf16,
            };
            let link = |cuda: &Cuda, groups: &Groups| {
                gpu::link(context, cuda, groups).map(|linked| {
                    (linked.groups, format!(", collectives between GPUs {}", linked.words))
                })
            };
            run_on(gpu::open(context, matmul)?, link, context, job, host, runtime)
        }
    }
}

fn run_on<B: Backend>(
    backend: B,
    link: impl FnOnce(&B, &Groups) -> Result<(DeviceGroups<B>, String), RankError>,
    context: &Context,
    job: &TrainingJob,
    host: &Host,
    runtime: &Handle,
) -> Result<(), RankError> {
    let dataset = Arc::new(Dataset::open(&context.resolve(&job.data.path))?);
    let batches = Batches::of_job(Arc::clone(&dataset), job)?;
    let World { coords, groups, .. } =
        runtime.block_on(world::join(context, host, job.parallelism, String::new()))?;
    let all = Arc::clone(&groups.world);
    let (device, way) = link(&backend, &groups)?;
    let mut trainer = Trainer::with_probe(job, coords, groups, backend, Stopwatch::default())?;
    trainer.link_devices(device);
    let run_dir = run_dir(context, job);
    let start = agree_on_start(context, job, &run_dir, &*all)?;
    let mut rank = Rank {
        leads: context.rank == 0,
        writer: writer(context, job, &run_dir, &dataset)?,
        record: if context.rank == 0 {
            Some(Record::open(&context.job_dir, context.attempt)?)
        } else {
            None
        },
        last_report: None,
        last_line: None,
        validation: None,
        job,
        host,
        batches,
        work: Work::of(job, coords)?,
        trainer,
        copy: coords.data,
        way,
    };
    rank.load(&start)?;
    for step in start.step..job.steps {
        rank.step(step)?;
    }
    rank.finish(&*all, runtime)
}

fn run_dir(context: &Context, job: &TrainingJob) -> PathBuf {
    if job.checkpoint.path.is_empty() {
        context.job_dir.join(CHECKPOINTS)
    } else {
        context.resolve(&job.checkpoint.path)
    }
}

/// The leader looks for the newest sound checkpoint; all ranks start from what it found.
fn agree_on_start(
    context: &Context,
    job: &TrainingJob,
    run_dir: &Path,
    world: &dyn Collective,
) -> Result<Start, RankError> {
    let mut message = Vec::new();
    if context.rank == 0 {
        let start = find_start(context, job, run_dir).unwrap_or_else(|error| Start {
            step: 0,
            checkpoint: None,
            error: Some(error.to_string()),
        });
        message = serde_json::to_vec(&start).map_err(std::io::Error::from)?;
    }
    world.broadcast_bytes(&mut message, 0)?;
    let start: Start = serde_json::from_slice(&message).map_err(std::io::Error::from)?;
    match start.error {
        Some(error) => Err(RankError::Refused(error)),
        None => Ok(start),
    }
}

fn find_start(context: &Context, job: &TrainingJob, run_dir: &Path) -> Result<Start, RankError> {
    drumline_checkpoint::clean(run_dir)?;
    let mut found = drumline_checkpoint::latest(run_dir)?;
    for refused in &found.refused {
        println!("checkpoint of step {} refused: {}", refused.step, refused.error);
    }
    if found.checkpoint.is_none()
        && let Some(from) = &job.checkpoint.resume_from
    {
        let path = context.resolve(from);
        found = match Checkpoint::open(&path) {
            Ok(checkpoint) => {
                drumline_checkpoint::Found { checkpoint: Some(checkpoint), refused: Vec::new() }
            }
            // Not a checkpoint: then a run's folder, of which the newest is meant.
            Err(not_one) => {
                let found = drumline_checkpoint::latest(&path)?;
                if found.checkpoint.is_none() {
                    return Err(not_one.into());
                }
                found
            }
        };
    }
    let Some(checkpoint) = found.checkpoint else {
        return Ok(Start { step: 0, checkpoint: None, error: None });
    };
    let manifest = checkpoint.manifest();
    if manifest.model != job.model {
        return Err(RankError::Refused(format!(
            "{}: the checkpoint is of another model shape than the job's",
            checkpoint.path().display()
        )));
    }
    println!("continues from step {} in {}", checkpoint.step(), checkpoint.path().display());
    Ok(Start {
        step: checkpoint.step(),
        checkpoint: Some(checkpoint.path().to_owned()),
        error: None,
    })
}

fn writer(
    context: &Context,
    job: &TrainingJob,
    run_dir: &Path,
    dataset: &Dataset,
) -> Result<Option<Writer<Saved>>, RankError> {
    // The first copy of the model owns every shard, but for the moments that the copies share.
    let mesh = Mesh::new(job.parallelism);
    let shared = job.memory.shard_optimizer;
    let writes = |rank: &u32| shared || mesh.coords(*rank).data == 0;
    let writers: Vec<u32> = (0..mesh.size()).filter(writes).collect();
    if !writers.contains(&context.rank) {
        return Ok(None);
    }
    let state = RunState {
        seed: job.seed,
        data_fingerprint: dataset.manifest().fingerprint.clone(),
        job: serde_json::to_value(&context.spec).map_err(std::io::Error::from)?,
        ..RunState::default()
    };
    Ok(Some(Writer::start(WriterOptions {
        run: run_dir.to_owned(),
        rank: context.rank,
        writers,
        attempt: u64::from(context.attempt),
        keep: job.checkpoint.keep,
        model: job.model.clone(),
        parallelism: job.parallelism,
        state,
        tokenizer: Some(dataset.tokenizer_path()),
        parts_timeout: CHECKPOINT_DEADLINE,
    })?))
}

struct Rank<'a, B: Backend> {
    job: &'a TrainingJob,
    host: &'a Host,
    leads: bool,
    copy: u32,
    /// How values go between GPUs, to be told beside where the rank stands.
    way: String,
    batches: Batches,
    work: Work,
    trainer: Trainer<B, Stopwatch>,
    writer: Option<Writer<Saved>>,
    record: Option<Record>,
    last_report: Option<Instant>,
    last_line: Option<Instant>,
    validation: Option<f64>,
}

impl<B: Backend> Rank<'_, B> {
    fn load(&mut self, start: &Start) -> Result<(), RankError> {
        let Some(path) = &start.checkpoint else { return Ok(()) };
        let checkpoint = Checkpoint::open(path)?;
        let reader = checkpoint.reader();
        self.trainer.load(|shard, values| reader.read(shard, values))?;
        Ok(())
    }

    fn step(&mut self, step: u64) -> Result<(), RankError> {
        let begin = Instant::now();
        let micros = (0..self.job.micro_batches())
            .map(|micro| self.batches.batch(step, self.copy, micro).map(engine_batch))
            .collect::<Result<Vec<_>, _>>()?;
        let done = self.trainer.step(step, &micros)?;
        let seconds = begin.elapsed().as_secs_f64();
        let breakdown = self.trainer.probe().take();
        let finished = step + 1;
        let last = finished == self.job.steps;
        let every = |interval: u64| interval > 0 && finished.is_multiple_of(interval);
        if last || every(self.job.eval_interval_steps) {
            self.evaluate()?;
        }
        if let Some(record) = &mut self.record {
            record.step(finished, done.loss, done.grad_norm)?;
        }
        self.report(finished, done, seconds, &breakdown);
        if last || every(self.job.checkpoint.interval_steps) {
            self.save(finished)?;
        }
        self.tell_checkpoints()
    }

    /// Measures the loss on the held-out split; its batches are divided over the copies.
    fn evaluate(&mut self) -> Result<(), RankError> {
        let rows = self.job.micro_batch;
        let wanted = u64::from(self.job.eval_sequences).min(self.batches.validation_sequences());
        let copies = u64::from(self.job.parallelism.data);
        let batches = (0..wanted / u64::from(rows))
            .filter(|index| index % copies == u64::from(self.copy))
            .map(|index| self.batches.validation(index * u64::from(rows), rows).map(engine_batch))
            .collect::<Result<Vec<_>, _>>()?;
        let loss = self.trainer.evaluate(&batches)?;
        // What the evaluation took is not part of the next step.
        self.trainer.probe().take();
        self.validation = (loss > 0.0).then_some(f64::from(loss));
        Ok(())
    }

    fn report(&mut self, step: u64, done: StepReport, seconds: f64, breakdown: &Breakdown) {
        let now = Instant::now();
        let due = |last: Option<Instant>, interval: Duration| {
            last.is_none_or(|last| now - last >= interval)
        };
        if !self.leads {
            if due(self.last_report, REPORT_INTERVAL) || step == self.job.steps {
                self.last_report = Some(now);
                self.host.report(|report| {
                    report.step = step;
                    report.position = format!("step {step} finished{}", self.way);
                });
            }
            return;
        }
        let tokens = self.job.tokens_per_step();
        if due(self.last_line, LOG_INTERVAL) || step == self.job.steps {
            self.last_line = Some(now);
            println!(
                "step {step}/{} loss {:.4} grad norm {:.3} rate {:.2e} {:.0} tokens/s",
                self.job.steps,
                done.loss,
                done.grad_norm,
                done.learning_rate,
                tokens as f64 / seconds
            );
        }
        let train = v1::TrainReport {
            loss: f64::from(done.loss),
            grad_norm: f64::from(done.grad_norm),
            learning_rate: f64::from(done.learning_rate),
            step_seconds: seconds,
            tokens: step * tokens,
            loss_validation: self.validation.take(),
            parameters: self.job.model.parameters(),
            flops_per_token: self.job.model.train_flops_per_token(self.job.sequence),
            matmul_seconds: breakdown.of(Span::Matmul),
            attention_seconds: breakdown.of(Span::Attention),
            other_seconds: breakdown.sum(&[Span::Other, Span::Optimizer]),
            communication_seconds: breakdown.exposed(),
            bubble_seconds: breakdown.of(Span::PipelineWait),
            communication_hidden_seconds: breakdown.hidden(),
            idle_seconds: (seconds - breakdown.total()).max(0.0),
            optimizer_seconds: breakdown.of(Span::Optimizer),
            matmul_flops: self.work.matmul_flops,
            optimizer_bytes: self.work.optimizer_bytes,
        };
        self.host.report(|report| {
            report.step = step;
            report.train = Some(train);
            report.position = format!("step {step} finished{}", self.way);
        });
    }

    /// Hands a copy of the state to the writer; the loop goes on while it is written.
    fn save(&mut self, step: u64) -> Result<(), RankError> {
        let Some(writer) = &self.writer else { return Ok(()) };
        let snapshot = self.trainer.snapshot(writer.spare().map(|saved| saved.0));
        writer.submit(step, Saved(snapshot), CHECKPOINT_DEADLINE)?;
        Ok(())
    }

    fn tell_checkpoints(&self) -> Result<(), RankError> {
        let Some(writer) = &self.writer else { return Ok(()) };
        for outcome in writer.outcomes() {
            self.tell_checkpoint(outcome)?;
        }
        Ok(())
    }

    /// A checkpoint that cannot be written ends the attempt: a run that could not come back is
    /// worth less than one that says so.
    fn tell_checkpoint(&self, outcome: drumline_checkpoint::Outcome) -> Result<(), RankError> {
        let written = outcome.result?;
        if written.complete {
            println!("checkpoint of step {} in {:.2} s", outcome.step, written.total.as_secs_f64());
            let checkpoint = v1::CheckpointReport {
                step: outcome.step,
                path: written.path.display().to_string(),
                write_seconds: written.total.as_secs_f64(),
                bytes: written.bytes,
            };
            self.host.report_surely(|report| {
                report.step = outcome.step;
                report.checkpoint = Some(checkpoint);
            });
        }
        Ok(())
    }

    fn finish(mut self, world: &dyn Collective, runtime: &Handle) -> Result<(), RankError> {
        if let Some(writer) = self.writer.take() {
            for outcome in writer.finish(CHECKPOINT_DEADLINE)? {
                self.tell_checkpoint(outcome)?;
            }
        }
        // Nobody leaves before the last checkpoint is complete: a peer that is gone would look
        // like a failure to those that still write.
        world.barrier()?;
        let steps = self.job.steps;
        runtime.block_on(self.host.report_last(|report| report.step = steps));
        Ok(())
    }
}

fn engine_batch(batch: drumline_data::Batch) -> Batch {
    Batch { tokens: batch.tokens, targets: batch.targets }
}
