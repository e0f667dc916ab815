//! The training step of one rank: its instructions of the pipeline, the reduction of gradients,
//! clipping and the optimizer.

use std::sync::Arc;

use drumline_collective::ReduceOp;
use drumline_mesh::{Coords, Instruction, Schedule, ShardSpec};
use drumline_spec::{Family, TrainingJob};
use drumline_tensor::Backend;

use crate::activations::{Dims, Scratch, Slot, in_flight, rotary_table};
use crate::error::EngineError;
use crate::groups::Groups;
use crate::head::Gradient;
use crate::init;
use crate::layer::{Stage, all_mut};
use crate::layout::{Layout, Split};
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
    slots: Vec<Slot<B>>,
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
        let split = Split::new(job.parallelism, coords);
        let layout = Layout::new(&job.model, split)?;
        let (batch, sequence) = (job.micro_batch as usize, job.sequence as usize);
        let dims = Dims::new(&job.model, split, batch, sequence);
        let schedule = Schedule::one_f_one_b(job.parallelism.pipeline, job.micro_batches())?;
        let instructions = schedule.stage(coords.pipeline).to_vec();
        let slots = (0..in_flight(&instructions).max(1))
            .map(|_| Slot::new(&backend, dims, layout.layers.len(), split.is_last()))
            .collect::<Result<_, _>>()?;
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
        let loss = self.run_pipeline(micros)?;
        self.reduce_gradients()?;
        let b = &*self.backend;
        let counted = timed(&self.probe, Span::Optimizer, || {
            let square = |r: &std::ops::Range<usize>| {
                b.sum_squares(b.view(&self.state.gradients, r.clone()))
            };
            self.layout.counted.iter().map(square).sum::<f64>()
        });
        // One exchange for both numbers: every copy has the same gradients, so copy 0 speaks.
        let share = if self.split.copy == 0 { counted } else { 0.0 };
        let mut sums = [self.own_loss(loss) as f32, share as f32];
        timed(&self.probe, Span::GradientComm, || {
            self.groups.world.all_reduce(&mut sums, ReduceOp::Sum)
        })?;
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

    fn run_pipeline(&mut self, micros: &[Batch]) -> Result<f64, EngineError> {
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
        let (split, places) = (self.split, self.slots.len());
        let mut loss = 0.0;
        for instruction in &self.instructions {
            match *instruction {
                Instruction::RecvForward { micro, .. } => {
                    let slot = &mut self.slots[micro as usize % places];
                    let x = all_mut(b, &mut slot.layers[0].x);
                    timed(probe, Span::PipelineWait, || {
                        b.on_host(x, |v| pipeline.recv(v, split.stage - 1))
                    })?;
                }
                Instruction::Forward { micro, .. } => {
                    let slot = &mut self.slots[micro as usize % places];
                    let batch = &micros[micro as usize];
                    if split.is_first() {
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
                    }
                }
                Instruction::SendForward { micro, .. } => {
                    let slot = &mut self.slots[micro as usize % places];
                    let out = all_mut(b, &mut slot.out);
                    timed(probe, Span::PipelineSend, || {
                        b.on_host(out, |v| pipeline.send(v, split.stage + 1))
                    })?;
                }
                Instruction::RecvBackward { .. } => {
                    let gradient = all_mut(b, &mut self.scratch.gradient);
                    timed(probe, Span::PipelineWait, || {
                        b.on_host(gradient, |v| pipeline.recv(v, split.stage + 1))
                    })?;
                }
                Instruction::Backward { micro, .. } => {
                    let slot = &mut self.slots[micro as usize % places];
                    let gradients = &mut self.state.gradients;
                    stage.backward(slot, &mut self.scratch, gradients, micro > 0)?;
                    if split.is_first() {
                        let tokens = &micros[micro as usize].tokens;
                        stage.embed_backward(tokens, &self.scratch, gradients);
                    }
                }
                Instruction::SendBackward { .. } => {
                    let gradient = all_mut(b, &mut self.scratch.gradient);
                    timed(probe, Span::PipelineSend, || {
                        b.on_host(gradient, |v| pipeline.send(v, split.stage - 1))
                    })?;
                }
            }
        }
        Ok(loss)
    }

    /// Adds the gradients of a tied matrix over its two stages, then all over the copies.
    fn reduce_gradients(&mut self) -> Result<(), EngineError> {
        let b = &*self.backend;
        if let Some(shared) = &self.layout.shared {
            let last = self.split.stages - 1;
            let pipeline = &*self.groups.pipeline;
            let gradients = b.view_mut(&mut self.state.gradients, shared.clone());
            // The last stage sends its part and gets the sum: no order in which both wait.
            timed(&self.probe, Span::GradientComm, || {
                b.on_host(gradients, |own| {
                    if self.split.is_last() {
                        pipeline.send(own, 0)?;
                        return pipeline.recv(own, 0);
                    }
                    let mut theirs = vec![0.0; own.len()];
                    pipeline.recv(&mut theirs, last)?;
                    own.iter_mut().zip(&theirs).for_each(|(o, t)| *o += t);
                    pipeline.send(own, last)
                })
            })?;
        }
        let all = all_mut(b, &mut self.state.gradients);
        crate::layer::add_over(b, &self.probe, Span::GradientComm, &*self.groups.data, all)?;
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
        let slot = &mut self.slots[0];
        let mut loss = 0.0;
        for batch in batches {
            if split.is_first() {
                stage.embed(&batch.tokens, &mut slot.layers[0].x)?;
            } else {
                let x = all_mut(b, &mut slot.layers[0].x);
                b.on_host(x, |v| pipeline.recv(v, split.stage - 1))?;
            }
            stage.forward(slot, &mut self.scratch)?;
            match &mut slot.last {
                Some(last) => {
                    loss += stage.loss(&batch.targets, last, &mut self.scratch, None)?;
                }
                None => {
                    let out = all_mut(b, &mut slot.out);
                    b.on_host(out, |v| pipeline.send(v, split.stage + 1))?;
                }
            }
        }
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
