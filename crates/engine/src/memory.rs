//! What a rank's training takes, by arithmetic, before anything is allocated.

use drumline_mesh::{Coords, Schedule};
use drumline_spec::{Family, TrainingJob};

use crate::activations::{Dims, in_flight, layer_elements, logits_rows};
use crate::error::EngineError;
use crate::layout::{Layout, Split};
use crate::state::share;

/// Bytes of one rank's training state, by what they are for. Everything is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Parameters.
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
    /// after that.
    ///
    /// # Errors
    /// [`EngineError`] when the job cannot be split so.
    pub fn plan(job: &TrainingJob, coords: Coords) -> Result<Self, EngineError> {
        let split = Split::of(job, coords);
        let layout = Layout::new(&job.model, split)?;
        let d = Dims::new(&job.model, split, job.micro_batch as usize, job.sequence as usize);
        let schedule = schedule(job)?;
        let instructions = schedule.stage(coords.pipeline);
        let (n, own) = (d.rows, d.own_rows);
        let recompute = job.memory.recompute;
        let elements = |kept: bool| -> usize {
            layer_elements(d, recompute).iter().filter(|(_, k)| *k == kept).map(|(e, _)| e).sum()
        };
        let layer = elements(true);
        let layers = layout.layers.len() / split.chunks;
        let activations: usize = (0..job.virtual_stages.max(1))
            .map(|chunk| {
                let last = split.is_last() && chunk + 1 == schedule.chunks();
                let loss = if last { own * (2 * d.hidden + 2) } else { 0 };
                in_flight(instructions, chunk).max(1) * (layers * layer + own * d.hidden + loss)
            })
            .sum();
        // All rows, and the gradients of the norms, to be summed over the rows' holders.
        let gathered = if d.shares_rows() {
            d.rows * d.hidden + layout.norms().map(|norm| norm.range().len()).sum::<usize>()
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
        let workspace = own * d.hidden
            + n * (2 * d.hidden + d.qkv_width() + d.attention_width() + d.ffn)
            + elements(false)
            + gathered
            + logits
            + 5 * chunk
            + rotary
            + shared;
        let bytes = |elements: usize| elements as u64 * 4;
        Ok(Self {
            weights: bytes(layout.elements),
            gradients: bytes(layout.elements),
            optimizer: bytes(2 * share(split, layout.elements).len()),
            activations: bytes(activations),
            workspace: bytes(workspace),
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
