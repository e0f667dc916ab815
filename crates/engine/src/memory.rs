//! What a rank's training takes, by arithmetic, before anything is allocated.

use drumline_mesh::{Coords, Schedule};
use drumline_spec::{Family, TrainingJob};
use drumline_tensor::DType;

use crate::activations::{Dims, in_flight, layer_buffers, logits_rows};
use crate::error::EngineError;
use crate::layout::{Layout, Split};
use crate::state::share;

/// Bytes of one rank's training state, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Parameters, and their copy for products where activations are not f32.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// Both moments.
    pub optimizer: u64,
    /// What micro-batches in flight keep for their backward pass.
    pub activations: u64,
    /// What all micro-batches share: gradients of activations, a chunk of logits, tables.
    pub workspace: u64,
}

impl Memory {
    /// Computes what [`crate::Trainer::new`] will allocate and a step then uses: nothing grows
    /// after that. `activations` is how the backend keeps them, as
    /// [`drumline_tensor::Backend::activation_dtype`] tells.
    ///
    /// # Errors
    /// [`EngineError`] when the job cannot be split so.
    pub fn plan(
        job: &TrainingJob,
        coords: Coords,
        activations: DType,
    ) -> Result<Self, EngineError> {
        let split = Split::of(job, coords);
        let layout = Layout::new(&job.model, split)?;
        let d = Dims::new(&job.model, split, job.micro_batch as usize, job.sequence as usize);
        let schedule = schedule(job)?;
        let instructions = schedule.stage(coords.pipeline);
        let (n, own) = (d.rows, d.own_rows);
        let recompute = job.memory.recompute;
        let (f32, dtype) = (DType::F32.bytes(), activations.bytes());
        let buffers = |kept: bool| -> usize {
            let planned = layer_buffers(d, recompute).into_iter().filter(|p| p.kept == kept);
            planned.map(|p| p.bytes(activations)).sum()
        };
        let layer = buffers(true);
        let layers = layout.layers.len() / split.chunks;
        let in_slots: usize = (0..job.virtual_stages.max(1))
            .map(|chunk| {
                let last = split.is_last() && chunk + 1 == schedule.chunks();
                let loss = if last { own * 2 * (d.hidden * dtype + f32) } else { 0 };
                let one = layers * layer + own * d.hidden * f32 + loss;
                in_flight(instructions, chunk).max(1) * one
            })
            .sum();
        // All rows, and the gradients of the norms, to be summed over the rows' holders.
        let gathered = if d.shares_rows() {
            let norms = layout.norms().map(|norm| norm.range().len()).sum::<usize>();
            d.rows * d.hidden * dtype + norms * f32
        } else {
            0
        };
        let chunk = logits_rows(n, layout.vocab_rows);
        let logits = if layout.head.is_some() { chunk * layout.vocab_rows } else { 0 };
        let rotary = if job.model.family == Family::Llama {
            job.sequence as usize * job.model.head_dim() as usize
        } else {
            0
        };
        let shared = match &layout.shared {
            Some(range) if !split.is_last() => range.len(),
            _ => 0,
        };
        let of_activations =
            n * (2 * d.hidden + d.qkv_width() + d.attention_width() + d.ffn) + logits;
        let of_f32 = own * d.hidden + 5 * chunk + rotary + shared;
        let workspace = of_activations * dtype + of_f32 * f32 + buffers(false) + gathered;
        let copy = if activations == DType::F32 { 0 } else { layout.elements * dtype };
        Ok(Self {
            weights: (layout.elements * f32 + copy) as u64,
            gradients: (layout.elements * f32) as u64,
            optimizer: (2 * share(split, layout.elements).len() * f32) as u64,
            activations: in_slots as u64,
            workspace: workspace as u64,
        })
    }

    /// Returns the sum of all parts.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.workspace
    }
}

/// Makes the schedule of a job's pipeline.
pub(crate) fn schedule(job: &TrainingJob) -> Result<Schedule, EngineError> {
    let (stages, micros) = (job.parallelism.pipeline, job.micro_batches());
    Ok(Schedule::interleaved(stages, job.virtual_stages.max(1), micros)?)
}
