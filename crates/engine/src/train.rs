//! The training step of one rank: its instructions of the pipeline, the reduction of gradients,
//! clipping and the optimizer.

use std::sync::Arc;

use drumline_collective::ReduceOp;
use drumline_mesh::{Coords, Instruction, ShardSpec};
use drumline_spec::{Family, Precision, TrainingJob};
use drumline_tensor::{Backend, Cpu, CpuOptions, MatmulPrecision};

use crate::activations::{Dims, LayerMemory, Scratch, Slot, in_flight, rotary_table};
use crate::error::EngineError;
use crate::gradients::{Buckets, Gradients};
use crate::groups::Groups;
use crate::head::Gradient;
use crate::init;
use crate::layer::{Stage, all_mut};
use crate::layout::{Layout, Split};
use crate::memory::{Memory, schedule};
use crate::optimizer;
use crate::probe::{NoProbe, Probe, Span, timed};
use crate::shards::{FIRST_MOMENT, SECOND_MOMENT, Snapshot, prefixed, scatter};

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
    Ok(Cpu::with_options(CpuOptions { threads, matmul })?)
}

/// One rank of a training run.
pub struct Trainer<B: Backend, P: Probe = NoProbe> {
    backend: Arc<B>,
    probe: P,
    job: TrainingJob,
    split: Split,
    groups: Groups,
    layout: Layout,
    dims: Dims,
    instructions: Vec<Instruction>,
    state: State<B>,
    /// By chunk, then by micro-batch modulo their number.
    slots: Vec<Vec<Slot<B>>>,
    /// The other holder's gradients of a shared matrix.
    theirs: Vec<f32>,
    scratch: Scratch<B>,
    rotary: Option<B::Buffer>,
    positions: Vec<u32>,
}

/// What a checkpoint holds, and the gradients.
struct State<B: Backend> {
    parameters: B::Buffer,
    gradients: B::Buffer,
    first: B::Buffer,
    second: B::Buffer,
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
        let split = Split::new(job.parallelism, coords).interleaved(job.virtual_stages);
        let layout = Layout::new(&job.model, split)?;
        let (batch, sequence) = (job.micro_batch as usize, job.sequence as usize);
        let dims = Dims::new(&job.model, split, batch, sequence);
        let schedule = schedule(job)?;
        let instructions = schedule.stage(coords.pipeline).to_vec();
        let layers = layout.layers.len() / split.chunks;
        let slots = (0..split.chunks)
            .map(|chunk| {
                let last = split.is_last() && chunk + 1 == split.chunks;
                let places = in_flight(&instructions, chunk as u32).max(1);
                let own = chunk * layers..(chunk + 1) * layers;
                (0..places).map(|_| Slot::new(&backend, dims, own.clone(), last)).collect()
            })
            .collect::<Result<_, _>>()?;
        let theirs = match &layout.shared {
            Some(shared) if !split.is_last() => vec![0.0; shared.len()],
            _ => Vec::new(),
        };
        let scratch = Scratch::new(&backend, dims, &layout)?;
        let rotary = if job.model.family == Family::Llama {
            let table = rotary_table(&job.model, sequence);
            let mut buffer = backend.alloc(table.len())?;
            backend.write(&table, all_mut(&backend, &mut buffer));
            Some(buffer)
        } else {
            None
        };
        let positions = (0..dims.rows).map(|row| (row % sequence) as u32).collect();
        let state = State {
            parameters: backend.alloc(layout.elements)?,
            gradients: backend.alloc(layout.elements)?,
            first: backend.alloc(layout.elements)?,
            second: backend.alloc(layout.elements)?,
        };
        let mut trainer = Self {
            backend: Arc::new(backend),
            probe,
            job: job.clone(),
            split,
            groups,
            layout,
            dims,
            instructions,
            state,
            slots,
            theirs,
            scratch,
            rotary,
            positions,
        };
        trainer.initialise();
        Ok(trainer)
    }

    fn initialise(&mut self) {
        let mut values = Vec::new();
        for p in &self.layout.parameters {
            values.resize(p.shard.elements(), 0.0);
            init::fill(self.job.seed, p.init, &p.shard, &mut values);
            scatter(&*self.backend, p, &values, &mut self.state.parameters);
        }
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
        let bytes = |buffer: &B::Buffer| b.elements(buffer) as u64 * 4;
        let layer = |m: &LayerMemory<B>| {
            let all = [&m.x, &m.a1, &m.stats1, &m.qkv, &m.attended, &m.lse, &m.mid, &m.a2];
            let rest = [&m.stats2, &m.up, &m.act];
            all.into_iter().chain(rest).map(bytes).sum::<u64>()
        };
        let slot = |slot: &Slot<B>| {
            let last = slot.last.as_ref();
            slot.layers.iter().map(layer).sum::<u64>()
                + bytes(&slot.out)
                + last.map_or(0, |m| bytes(&m.y) + bytes(&m.stats) + bytes(&m.dy))
        };
        let s = &self.scratch;
        let shared = [&s.branch, &s.gradient, &s.da, &s.dqkv, &s.dattended, &s.dact, &s.row_values];
        let optional = s.logits.iter().chain(&self.rotary);
        let host = (s.host.len() + self.theirs.len()) as u64 * 4;
        Memory {
            weights: bytes(&self.state.parameters),
            gradients: bytes(&self.state.gradients),
            optimizer: bytes(&self.state.first) + bytes(&self.state.second),
            activations: self.slots.iter().flatten().map(slot).sum(),
            workspace: shared.into_iter().chain(optional).map(bytes).sum::<u64>() + host,
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
        self.clear_gradients();
        let data = Arc::clone(&self.groups.data);
        let mut buckets = (data.size() > 1).then(|| Buckets::new(&*data));
        let loss = self.run_pipeline(micros, buckets.as_mut())?;
        self.add_shared()?;
        if let Some(buckets) = buckets {
            let gradients = &mut self.state.gradients;
            buckets.finish(&*self.backend, &self.probe, gradients, self.layout.elements)?;
        }
        let b = &*self.backend;
        let counted = timed(&self.probe, Span::Optimizer, || {
            let square = |r: &std::ops::Range<usize>| {
                b.sum_squares(b.view(&self.state.gradients, r.clone()))
            };
            self.layout.counted.iter().map(square).sum::<f64>()
        });
        // What was read so far is what the device made, or the step ends here.
        b.status()?;
        // One exchange for both numbers: every copy has the same gradients, so copy 0 speaks.
        let share = if self.split.copy == 0 { counted } else { 0.0 };
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
        timed(&self.probe, Span::Optimizer, || {
            let state = &mut self.state;
            let (decayed, all) = (self.layout.decayed, self.layout.elements);
            for (range, decay) in [(0..decayed, constants.weight_decay), (decayed..all, 0.0)] {
                let constants = drumline_tensor::AdamW { weight_decay: decay, ..constants };
                b.adamw(
                    constants,
                    b.view_mut(&mut state.parameters, range.clone()),
                    b.view(&state.gradients, range.clone()),
                    b.view_mut(&mut state.first, range.clone()),
                    b.view_mut(&mut state.second, range),
                );
            }
        });
        Ok(StepReport { loss, grad_norm, learning_rate: constants.learning_rate })
    }

    /// Sums of losses exist on every tensor rank of the last stage; the first of them speaks.
    fn own_loss(&self, loss: f64) -> f64 {
        if self.split.is_last() && self.split.tensor_rank == 0 { loss } else { 0.0 }
    }

    /// Vectors are added to and start from zero; matrices are replaced by the first micro-batch,
    /// but for an embedding without a projection, which only rows are added to.
    fn clear_gradients(&mut self) {
        let (b, layout) = (&*self.backend, &self.layout);
        timed(&self.probe, Span::Other, || {
            let gradients = &mut self.state.gradients;
            b.fill(b.view_mut(gradients, layout.decayed..layout.elements), 0.0);
            if let Some(table) =
                layout.embedding.as_ref().filter(|t| layout.head.as_ref() != Some(t))
            {
                b.fill(b.view_mut(gradients, table.clone()), 0.0);
            }
        });
    }

    fn run_pipeline<'g>(
        &mut self,
        micros: &[Batch],
        mut buckets: Option<&mut Buckets<'g>>,
    ) -> Result<f64, EngineError> {
        let b = &*self.backend;
        let stage = Stage {
            backend: b,
            probe: &self.probe,
            tensor: &*self.groups.tensor,
            dims: self.dims,
            layout: &self.layout,
            parameters: &self.state.parameters,
            rotary: self.rotary.as_ref(),
            positions: &self.positions,
        };
        let (pipeline, probe) = (&*self.groups.pipeline, &self.probe);
        let scale = 1.0 / self.job.tokens_per_step() as f32;
        let split = self.split;
        let (before, after) = neighbours(split);
        let mut loss = 0.0;
        for instruction in &self.instructions {
            match *instruction {
                Instruction::RecvForward { micro, chunk } => {
                    let slot = slot(&mut self.slots, micro, chunk);
                    let x = all_mut(b, &mut slot.layers[0].x);
                    timed(probe, Span::PipelineWait, || {
                        b.on_host(x, |v| pipeline.recv(v, before))
                    })?;
                }
                Instruction::Forward { micro, chunk } => {
                    let slot = slot(&mut self.slots, micro, chunk);
                    let batch = &micros[micro as usize];
                    if split.is_first() && chunk == 0 {
                        stage.embed(&batch.tokens, &mut slot.layers[0].x)?;
                    }
                    stage.forward(slot, &mut self.scratch)?;
                    if let Some(last) = &mut slot.last {
                        let gradient = Gradient {
                            gradients: &mut self.state.gradients,
                            scale,
                            accumulate: micro > 0,
                        };
                        let scratch = &mut self.scratch;
                        loss += stage.loss(&batch.targets, last, scratch, Some(gradient))?;
                        // Nothing else is added to a projection of its own.
                        if let (Some(buckets), Some(head)) = (&mut buckets, &self.layout.head)
                            && micro as usize + 1 == micros.len()
                            && self.layout.embedding.as_ref() != Some(head)
                            && self.layout.shared.is_none()
                        {
                            buckets.add(probe, head.clone())?;
                        }
                    }
                }
                Instruction::SendForward { micro, chunk } => {
                    let out = all_mut(b, &mut slot(&mut self.slots, micro, chunk).out);
                    timed(probe, Span::PipelineSend, || {
                        b.on_host(out, |v| pipeline.send(v, after))
                    })?;
                }
                Instruction::RecvBackward { .. } => {
                    let gradient = all_mut(b, &mut self.scratch.gradient);
                    timed(probe, Span::PipelineWait, || {
                        b.on_host(gradient, |v| pipeline.recv(v, after))
                    })?;
                }
                Instruction::Backward { micro, chunk } => {
                    let slot = slot(&mut self.slots, micro, chunk);
                    let final_pass = micro as usize + 1 == micros.len();
                    let mut gradients = Gradients {
                        buffer: &mut self.state.gradients,
                        accumulate: micro > 0,
                        buckets: buckets.as_deref_mut().filter(|_| final_pass),
                    };
                    stage.backward(slot, &mut self.scratch, &mut gradients)?;
                    if split.is_first() && chunk == 0 {
                        let tokens = &micros[micro as usize].tokens;
                        stage.embed_backward(tokens, &self.scratch, gradients.buffer);
                    }
                }
                Instruction::SendBackward { .. } => {
                    let gradient = all_mut(b, &mut self.scratch.gradient);
                    timed(probe, Span::PipelineSend, || {
                        b.on_host(gradient, |v| pipeline.send(v, before))
                    })?;
                }
            }
        }
        Ok(loss)
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

    fn run_evaluation(&mut self, batches: &[Batch]) -> Result<f32, EngineError> {
        let b = &*self.backend;
        let stage = Stage {
            backend: b,
            probe: &self.probe,
            tensor: &*self.groups.tensor,
            dims: self.dims,
            layout: &self.layout,
            parameters: &self.state.parameters,
            rotary: self.rotary.as_ref(),
            positions: &self.positions,
        };
        let (pipeline, split) = (&*self.groups.pipeline, self.split);
        let (before, after) = neighbours(split);
        let mut loss = 0.0;
        for batch in batches {
            for (chunk, slots) in self.slots.iter_mut().enumerate() {
                let slot = &mut slots[0];
                if split.is_first() && chunk == 0 {
                    stage.embed(&batch.tokens, &mut slot.layers[0].x)?;
                } else {
                    let x = all_mut(b, &mut slot.layers[0].x);
                    b.on_host(x, |v| pipeline.recv(v, before))?;
                }
                stage.forward(slot, &mut self.scratch)?;
                match &mut slot.last {
                    Some(last) => {
                        loss += stage.loss(&batch.targets, last, &mut self.scratch, None)?;
                    }
                    None => {
                        let out = all_mut(b, &mut slot.out);
                        b.on_host(out, |v| pipeline.send(v, after))?;
                    }
                }
            }
        }
        b.status()?;
        let speaks = split.is_last() && split.tensor_rank == 0;
        let tokens = if speaks { batches.len() * self.dims.rows } else { 0 };
        let mut sums = [self.own_loss(loss) as f32, tokens as f32];
        self.groups.world.all_reduce(&mut sums, ReduceOp::Sum)?;
        Ok(if sums[1] > 0.0 { sums[0] / sums[1] } else { 0.0 })
    }

    /// Copies this rank's own shards (weights, then both moments) to host memory, into `reuse`'s
    /// memory where that came from an earlier call.
    #[must_use]
    pub fn snapshot(&self, reuse: Option<Snapshot>) -> Snapshot {
        let mut snapshot = reuse.unwrap_or_default();
        snapshot.plan(&self.layout, &["", FIRST_MOMENT, SECOND_MOMENT]);
        let (b, state) = (&*self.backend, &self.state);
        let mut index = 0;
        for buffer in [&state.parameters, &state.first, &state.second] {
            index = snapshot.take(b, &self.layout, buffer, index);
        }
        snapshot
    }

    /// Returns every shard that this rank needs to continue a run: those that it owns and those
    /// that others own too.
    pub fn needed(&self) -> impl Iterator<Item = ShardSpec> {
        ["", FIRST_MOMENT, SECOND_MOMENT].into_iter().flat_map(|prefix| {
            self.layout.parameters.iter().map(move |p| prefixed(prefix, &p.shard))
        })
    }

    /// Fills every shard that this rank needs, weights and moments, from `source`.
    ///
    /// # Errors
    /// What `source` returns; the trainer is then half loaded.
    pub fn load<E>(
        &mut self,
        mut source: impl FnMut(&ShardSpec, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut values = Vec::new();
        let state = &mut self.state;
        for (prefix, buffer) in [
            ("", &mut state.parameters),
            (FIRST_MOMENT, &mut state.first),
            (SECOND_MOMENT, &mut state.second),
        ] {
            for p in &self.layout.parameters {
                values.resize(p.shard.elements(), 0.0);
                source(&prefixed(prefix, &p.shard), &mut values)?;
                scatter(&*self.backend, p, &values, buffer);
            }
        }
        Ok(())
    }

    /// Copies the gradients that the last step left, before clipping, as a snapshot copies
    /// weights: for tests and diagnosis.
    #[must_use]
    pub fn gradients(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        snapshot.plan(&self.layout, &[""]);
        snapshot.take(&*self.backend, &self.layout, &self.state.gradients, 0);
        snapshot
    }
}

/// Returns the stages that hold the layers before and after, round the pipeline.
fn neighbours(split: Split) -> (usize, usize) {
    ((split.stage + split.stages - 1) % split.stages, (split.stage + 1) % split.stages)
}

/// Returns where a micro-batch keeps what a chunk needs of it.
fn slot<B: Backend>(slots: &mut [Vec<Slot<B>>], micro: u32, chunk: u32) -> &mut Slot<B> {
    let slots = &mut slots[chunk as usize];
    let place = micro as usize % slots.len();
    &mut slots[place]
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
    Ok(())
}
