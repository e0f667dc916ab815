//! One rank's part of the pipeline: its instructions in order, forward, backward and between its
//! neighbours.

use drumline_collective::ReduceOp;
use drumline_mesh::Instruction;
use drumline_tensor::Backend;

use crate::activations::Slot;
use crate::error::EngineError;
use crate::gradients::{Buckets, Gradients};
use crate::groups::Route;
use crate::head::Gradient;
use crate::layer::{Stage, all_mut};
use crate::layout::Split;
use crate::probe::{Probe, Span, timed};
use crate::train::{Batch, Trainer};

impl<B: Backend, P: Probe> Trainer<B, P> {
    /// Runs the micro-batches of a step; returns the sum of this rank's losses.
    pub(crate) fn run_pipeline<'g>(
        &mut self,
        micros: &[Batch],
        mut buckets: Option<&mut Buckets<'g, B>>,
    ) -> Result<f64, EngineError> {
        let b = &*self.backend;
        let stage = Stage {
            backend: b,
            probe: &self.probe,
            tensor: Route::new(b, &*self.groups.tensor, self.device.tensor.as_ref()),
            dims: self.dims,
            layout: &self.layout,
            parameters: &self.state.parameters,
            copy: self.state.copy.as_ref(),
            rotary: self.rotary.as_ref(),
            positions: &self.positions,
            recompute: self.job.memory.recompute,
            rows: self.rows.as_deref(),
        };
        let pipeline = Route::new(b, &*self.groups.pipeline, self.device.pipeline.as_ref());
        let probe = &self.probe;
        let scale = 1.0 / self.job.tokens_per_step() as f32;
        let split = self.split;
        let (before, after) = neighbours(split);
        let mut loss = 0.0;
        for instruction in &self.instructions {
            match *instruction {
                Instruction::RecvForward { micro, chunk } => {
                    let slot = slot(&mut self.slots, micro, chunk);
                    let x = all_mut(b, &mut slot.layers[0].x);
                    timed(probe, Span::PipelineWait, || pipeline.recv(x, before))?;
                }
                Instruction::Forward { micro, chunk } => {
                    let slot = slot(&mut self.slots, micro, chunk);
                    let batch = &micros[micro as usize];
                    if split.is_first() && chunk == 0 {
                        let scratch = &mut self.scratch.branch;
                        stage.embed(&batch.tokens, &mut slot.layers[0].x, scratch)?;
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
                    timed(probe, Span::PipelineSend, || pipeline.send(out, after))?;
                }
                Instruction::RecvBackward { .. } => {
                    let gradient = all_mut(b, &mut self.scratch.gradient);
                    timed(probe, Span::PipelineWait, || pipeline.recv(gradient, after))?;
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
                        stage.embed_backward(tokens, &mut self.scratch, gradients.buffer)?;
                    }
                }
                Instruction::SendBackward { .. } => {
                    let gradient = all_mut(b, &mut self.scratch.gradient);
                    timed(probe, Span::PipelineSend, || pipeline.send(gradient, before))?;
                }
            }
        }
        Ok(loss)
    }

    /// Runs batches forward alone; returns their mean loss.
    pub(crate) fn run_evaluation(&mut self, batches: &[Batch]) -> Result<f32, EngineError> {
        let b = &*self.backend;
        let stage = Stage {
            backend: b,
            probe: &self.probe,
            tensor: Route::new(b, &*self.groups.tensor, self.device.tensor.as_ref()),
            dims: self.dims,
            layout: &self.layout,
            parameters: &self.state.parameters,
            copy: self.state.copy.as_ref(),
            rotary: self.rotary.as_ref(),
            positions: &self.positions,
            recompute: self.job.memory.recompute,
            rows: self.rows.as_deref(),
        };
        let pipeline = Route::new(b, &*self.groups.pipeline, self.device.pipeline.as_ref());
        let split = self.split;
        let (before, after) = neighbours(split);
        let mut loss = 0.0;
        for batch in batches {
            for (chunk, slots) in self.slots.iter_mut().enumerate() {
                let slot = &mut slots[0];
                if split.is_first() && chunk == 0 {
                    let scratch = &mut self.scratch.branch;
                    stage.embed(&batch.tokens, &mut slot.layers[0].x, scratch)?;
                } else {
                    let x = all_mut(b, &mut slot.layers[0].x);
                    pipeline.recv(x, before)?;
                }
                stage.forward(slot, &mut self.scratch)?;
                match &mut slot.last {
                    Some(last) => {
                        loss += stage.loss(&batch.targets, last, &mut self.scratch, None)?;
                    }
                    None => {
                        let out = all_mut(b, &mut slot.out);
                        pipeline.send(out, after)?;
                    }
                }
            }
        }
        b.status()?;
        self.device.check()?;
        let speaks = split.is_last() && split.tensor_rank == 0;
        let tokens = if speaks { batches.len() * self.dims.rows } else { 0 };
        let mut sums = [self.own_loss(loss) as f32, tokens as f32];
        self.groups.world.all_reduce(&mut sums, ReduceOp::Sum)?;
        Ok(if sums[1] > 0.0 { sums[0] / sums[1] } else { 0.0 })
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
