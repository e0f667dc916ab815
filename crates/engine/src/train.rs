//! The training step of one rank: the pipeline, the reduction of gradients, clipping and the
//! optimizer.

use std::ops::Range;
use std::sync::Arc;

use drumline_collective::ReduceOp;
use drumline_mesh::{Coords, Instruction, ShardSpec};
use drumline_spec::{Family, Precision, TrainingJob, WeightRounding};
use drumline_tensor::{Backend, Cpu, CpuOptions, DType, MatmulPrecision};

use crate::activations::{Dims, Scratch, Slot, in_flight, rotary_table};
use crate::error::EngineError;
use crate::gradients::Buckets;
use crate::groups::{DeviceGroups, Groups, Route};
use crate::layer::all_mut;
use crate::layout::{Layout, NormAt, Split};
use crate::memory::{Memory, schedule};
use crate::optimizer;
use crate::probe::{NoProbe, Probe, Span, timed};
use crate::shards::Snapshot;
use crate::state::State;

/// One micro-batch: `micro_batch` sequences, one after the other. The target of a position is the
/// token that follows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Inputs, `[B * T]`.
    pub tokens: Vec<u32>,
    /// What should be predicted, `[B * T]`.
    pub targets: Vec<u32>,
}

/// What a step did. The same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Mean loss over the tokens of the global batch, in nats.
    pub loss: f32,
    /// Norm of the gradient of the whole model, before clipping.
    pub grad_norm: f32,
    /// The step's learning rate.
    pub learning_rate: f32,
}

/// Creates the CPU backend that a job asks for.
///
/// # Errors
/// [`EngineError::Tensor`].
pub fn cpu(job: &TrainingJob, threads: usize) -> Result<Cpu, EngineError> {
    let matmul = match job.precision {
        Precision::F32 => MatmulPrecision::F32,
        Precision::Bf16 => MatmulPrecision::Bf16,
    };
    Ok(Cpu::with_options(CpuOptions { threads, matmul, deterministic: job.deterministic })?)
}

/// One rank of a training run.
pub struct Trainer<B: Backend, P: Probe = NoProbe> {
    pub(crate) backend: Arc<B>,
    pub(crate) probe: P,
    pub(crate) job: TrainingJob,
    pub(crate) split: Split,
    pub(crate) groups: Groups,
    pub(crate) device: DeviceGroups<B>,
    pub(crate) layout: Layout,
    pub(crate) dims: Dims,
    pub(crate) instructions: Vec<Instruction>,
    pub(crate) state: State<B>,
    /// By chunk, then by micro-batch modulo their number.
    pub(crate) slots: Vec<Vec<Slot<B>>>,
    /// The other holder's gradients of a shared matrix.
    theirs: Vec<f32>,
    /// The gradients of the norms, on their way over the tensor group that shares the rows.
    norms: Vec<f32>,
    pub(crate) scratch: Scratch<B>,
    pub(crate) rotary: Option<B::Buffer>,
    pub(crate) positions: Vec<u32>,
    /// The rows of each rank of the tensor group, where it shares them.
    pub(crate) rows: Option<Vec<Range<usize>>>,
}

impl<B: Backend> Trainer<B> {
    /// Allocates one rank's part of the model and everything that a step needs, and initialises
    /// the weights from the job's seed.
    ///
    /// # Errors
    /// [`EngineError`] when the split, the groups or the memory do not fit.
    pub fn new(
        job: &TrainingJob,
        coords: Coords,
        groups: Groups,
        backend: B,
    ) -> Result<Self, EngineError> {
        Self::with_probe(job, coords, groups, backend, NoProbe)
    }
}

impl<B: Backend, P: Probe> Trainer<B, P> {
    /// As [`Trainer::new`], watched by `probe`.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn with_probe(
        job: &TrainingJob,
        coords: Coords,
        groups: Groups,
        backend: B,
        probe: P,
    ) -> Result<Self, EngineError> {
        groups.check(job.parallelism)?;
        check_shape(job)?;
        let split = Split::of(job, coords);
        let layout = Layout::new(&job.model, split)?;
        let (batch, sequence) = (job.micro_batch as usize, job.sequence as usize);
        let dims = Dims::new(&job.model, split, batch, sequence);
        let schedule = schedule(job)?;
        let instructions = schedule.stage(coords.pipeline).to_vec();
        let layers = layout.layers.len() / split.chunks;
        let recompute = job.memory.recompute;
        let slots = (0..split.chunks)
            .map(|chunk| {
                let last = split.is_last() && chunk + 1 == split.chunks;
                let places = in_flight(&instructions, chunk as u32).max(1);
                let own = chunk * layers..(chunk + 1) * layers;
                (0..places)
                    .map(|_| Slot::new(&backend, dims, recompute, own.clone(), last))
                    .collect()
            })
            .collect::<Result<_, _>>()?;
        let theirs = match &layout.shared {
            Some(shared) if !split.is_last() => vec![0.0; shared.len()],
            _ => Vec::new(),
        };
        let scratch = Scratch::new(&backend, dims, recompute, &layout)?;
        let rotary = if job.model.family == Family::Llama {
            let table = rotary_table(&job.model, sequence);
            let mut buffer = backend.alloc(table.len())?;
            backend.write(&table, all_mut(&backend, &mut buffer));
            Some(buffer)
        } else {
            None
        };
        let positions = (0..dims.rows).map(|row| (row % sequence) as u32).collect();
        let rounding = job.optimizer.rounding;
        if rounding == WeightRounding::Stochastic && backend.activation_dtype() == DType::F32 {
            return Err(EngineError::Split {
                field: "spec.optimizer.rounding",
                message:
                    "stochastic: this device keeps no copy of the weights in bf16 to round; a \
                          GPU does, with precision bf16"
                        .to_owned(),
            });
        }
        let state = State::new(&backend, &layout, split, job.seed, rounding)?;
        let rows = dims
            .shares_rows()
            .then(|| drumline_collective::parts(dims.rows * dims.hidden, split.tensor, 1));
        let norms = if dims.shares_rows() {
            vec![0.0; layout.norms().map(|norm| norm.range().len()).sum()]
        } else {
            Vec::new()
        };
        Ok(Self {
            backend: Arc::new(backend),
            probe,
            job: job.clone(),
            split,
            groups,
            device: DeviceGroups::default(),
            layout,
            dims,
            instructions,
            state,
            slots,
            theirs,
            norms,
            scratch,
            rotary,
            positions,
            rows,
        })
    }

    /// Lets values go between devices by the devices' own groups, of the same ranks as those that the
    /// trainer was made with. All ranks of a group do this, or none.
    pub fn link_devices(&mut self, device: DeviceGroups<B>) {
        self.device = device;
    }

    /// Returns where this rank's parameters are.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the bytes that this rank's state, activations and workspace take, as
    /// [`Memory::plan`] says beforehand.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let b = &*self.backend;
        let [weights, gradients, optimizer] = self.state.bytes(b);
        let rotary = self.rotary.as_ref().map_or(0, |table| b.bytes(table) as u64);
        let host = (self.theirs.len() + self.norms.len()) as u64 * 4;
        Memory {
            weights,
            gradients,
            optimizer,
            activations: self.slots.iter().flatten().map(|slot| slot.bytes(b)).sum(),
            workspace: self.scratch.bytes(b) + rotary + host,
        }
    }

    /// Returns who watches.
    #[must_use]
    pub fn probe(&self) -> &P {
        &self.probe
    }

    /// Runs optimizer step `step`, counted from 0, on this rank's micro-batches: those of its
    /// copy of the model, the same on every rank of the copy.
    ///
    /// All ranks call it with the same `step`. After an error the weights may be half updated;
    /// the trainer must be loaded again or dropped.
    ///
    /// # Errors
    /// [`EngineError`] when a batch is malformed, a peer is lost, or the loss is not a number.
    pub fn step(&mut self, step: u64, micros: &[Batch]) -> Result<StepReport, EngineError> {
        let expected = self.job.micro_batches() as usize;
        if micros.len() != expected {
            let got = micros.len();
            return Err(EngineError::Batch { what: "micro-batches", expected, got });
        }
        for batch in micros {
            self.check_batch(batch)?;
        }
        let backend = Arc::clone(&self.backend);
        backend.scope(|| self.run_step(step, micros))
    }

    fn run_step(&mut self, step: u64, micros: &[Batch]) -> Result<StepReport, EngineError> {
        timed(&self.probe, Span::Other, || {
            self.state.clear_gradients(&self.backend, &self.layout);
        });
        let data = Arc::clone(&self.groups.data);
        let shares = self.state.shared().map(<[_]>::to_vec);
        let device = self.device.data.clone();
        let mut buckets =
            (data.size() > 1).then(|| Buckets::new(&*data, device.as_ref(), shares.as_deref()));
        let loss = self.run_pipeline(micros, buckets.as_mut())?;
        self.add_norms()?;
        self.add_shared()?;
        if let Some(buckets) = buckets {
            let gradients = &mut self.state.gradients;
            buckets.finish(&*self.backend, &self.probe, gradients, self.layout.elements)?;
        }
        let b = &*self.backend;
        let share = timed(&self.probe, Span::Optimizer, || self.state.sum_squares(b, &self.layout));
        // What was read so far is what the device made, or the step ends here.
        b.status()?;
        self.device.check()?;
        // One exchange for both numbers.
        let mut sums = [self.own_loss(loss) as f32, share as f32];
        if self.groups.world.size() > 1 {
            timed(&self.probe, Span::GradientComm, || {
                self.groups.world.all_reduce(&mut sums, ReduceOp::Sum)
            })?;
        }
        let loss = sums[0] / self.job.tokens_per_step() as f32;
        let grad_norm = sums[1].sqrt();
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(EngineError::Diverged { step, loss });
        }
        let scale = optimizer::clip_scale(self.job.optimizer.clip_norm, grad_norm);
        let constants = optimizer::adamw(&self.job, step, scale);
        timed(&self.probe, Span::Optimizer, || self.state.update(b, &self.layout, constants));
        if shares.is_some() {
            let copies = Route::new(b, &*data, self.device.data.as_ref());
            timed(&self.probe, Span::GradientComm, || self.state.gather(b, copies))?;
        }
        Ok(StepReport { loss, grad_norm, learning_rate: constants.learning_rate })
    }

    /// Sums of losses exist on every tensor rank of the last stage; the first of them speaks.
    pub(crate) fn own_loss(&self, loss: f64) -> f64 {
        if self.split.is_last() && self.split.tensor_rank == 0 { loss } else { 0.0 }
    }

    /// Adds the gradients of the norms over the tensor group, where each rank has those of its rows.
    fn add_norms(&mut self) -> Result<(), EngineError> {
        if self.rows.is_none() {
            return Ok(());
        }
        let (b, values) = (&*self.backend, &mut self.norms);
        let ranges = || self.layout.norms().map(NormAt::range);
        let gradients = &mut self.state.gradients;
        let mut at = 0;
        for range in ranges() {
            let len = range.len();
            b.read(b.view(gradients, range), &mut values[at..at + len]);
            at += len;
        }
        timed(&self.probe, Span::TensorComm, || {
            self.groups.tensor.all_reduce(values, ReduceOp::Sum)
        })?;
        at = 0;
        for range in ranges() {
            let len = range.len();
            b.write(&values[at..at + len], b.view_mut(gradients, range));
            at += len;
        }
        Ok(())
    }

    /// Adds the gradients of a tied matrix over its two stages.
    fn add_shared(&mut self) -> Result<(), EngineError> {
        let Some(shared) = &self.layout.shared else { return Ok(()) };
        let b = &*self.backend;
        let (last, theirs) = (self.split.stages - 1, &mut self.theirs);
        let pipeline = &*self.groups.pipeline;
        let gradients = b.view_mut(&mut self.state.gradients, shared.clone());
        // The last stage sends its part and gets the sum: no order in which both wait.
        timed(&self.probe, Span::GradientComm, || {
            b.on_host(gradients, |own| {
                if self.split.is_last() {
                    pipeline.send(own, 0)?;
                    return pipeline.recv(own, 0);
                }
                pipeline.recv(theirs, last)?;
                own.iter_mut().zip(theirs.iter()).for_each(|(o, t)| *o += t);
                pipeline.send(own, last)
            })
        })?;
        Ok(())
    }

    fn check_batch(&self, batch: &Batch) -> Result<(), EngineError> {
        let expected = self.dims.rows;
        for (what, values) in [("tokens", &batch.tokens), ("targets", &batch.targets)] {
            if values.len() != expected {
                return Err(EngineError::Batch { what, expected, got: values.len() });
            }
            let vocab = self.job.model.vocab;
            if let Some(token) = values.iter().copied().find(|t| *t >= vocab) {
                return Err(EngineError::Token { token, vocab });
            }
        }
        Ok(())
    }

    /// Computes the mean loss over batches shaped like micro-batches, without changing anything.
    /// The ranks of one copy pass the same batches; copies may pass different ones. Without any
    /// batch it is 0.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn evaluate(&mut self, batches: &[Batch]) -> Result<f32, EngineError> {
        for batch in batches {
            self.check_batch(batch)?;
        }
        let backend = Arc::clone(&self.backend);
        backend.scope(|| self.run_evaluation(batches))
    }

    /// Copies this rank's own shards (weights, then both moments) to host memory, into `reuse`'s
    /// memory where that came from an earlier call.
    #[must_use]
    pub fn snapshot(&self, reuse: Option<Snapshot>) -> Snapshot {
        self.state.snapshot(&self.backend, &self.layout, reuse.unwrap_or_default())
    }

    /// Returns every shard that this rank needs to continue a run: those that it owns and those
    /// that others own too.
    pub fn needed(&self) -> impl Iterator<Item = ShardSpec> {
        self.state.needed(&self.layout)
    }

    /// Fills every shard that this rank needs, weights and moments, from `source`.
    ///
    /// # Errors
    /// What `source` returns; the trainer is then half loaded.
    pub fn load<E>(
        &mut self,
        source: impl FnMut(&ShardSpec, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.state.load(&*self.backend, &self.layout, source)
    }

    /// Copies the gradients that the last step left, before clipping, as a snapshot copies
    /// moments: for tests and diagnosis.
    #[must_use]
    pub fn gradients(&self) -> Snapshot {
        self.state.snapshot_gradients(&self.backend)
    }
}

fn check_shape(job: &TrainingJob) -> Result<(), EngineError> {
    let split = |field, message| Err(EngineError::Split { field, message });
    if job.micro_batch == 0 || job.global_batch == 0 {
        return split("micro_batch", "batches need at least one sequence".to_owned());
    }
    let per_pass = job.micro_batch * job.parallelism.data;
    if !job.global_batch.is_multiple_of(per_pass) {
        let message = format!(
            "global_batch {} is not divisible by micro_batch {} x data {}",
            job.global_batch, job.micro_batch, job.parallelism.data
        );
        return split("global_batch", message);
    }
    if job.sequence == 0 || job.sequence > job.model.context {
        let message =
            format!("sequence {} is not within the context of {}", job.sequence, job.model.context);
        return split("sequence", message);
    }
    let (rows, ranks) = (job.micro_batch * job.sequence, job.parallelism.tensor);
    if job.memory.sequence_parallel && !rows.is_multiple_of(ranks) {
        let message = format!("{rows} rows are not divisible by tensor {ranks}");
        return split("memory.sequence_parallel", message);
    }
    Ok(())
}
