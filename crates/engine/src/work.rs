//! How much one rank has to do in a step, by arithmetic: what a measured time is held against.

use drumline_mesh::Coords;
use drumline_spec::{Family, TrainingJob};

use crate::activations::Dims;
use crate::error::EngineError;
use crate::layout::{Layout, Split};

/// The work of one rank in one step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Floating-point operations of linear layers and the output projection, forward and backward.
    pub matmul_flops: f64,
    /// Floating-point operations of attention: the lower triangle alone, its probabilities computed
    /// twice.
    pub attention_flops: f64,
    /// Bytes that norms, non-linearities, rotations, biases and the loss must move at least.
    pub other_bytes: f64,
    /// Bytes that clipping and the optimizer must move at least.
    pub optimizer_bytes: f64,
}

impl Work {
    /// Computes a rank's work.
    ///
    /// # Errors
    /// [`EngineError`] when the job cannot be split so.
    pub fn of(job: &TrainingJob, coords: Coords) -> Result<Self, EngineError> {
        let split = Split::of(job, coords);
        let layout = Layout::new(&job.model, split)?;
        let d = Dims::new(&job.model, split, job.micro_batch as usize, job.sequence as usize);
        let micros = f64::from(job.micro_batches());
        let layers = layout.layers.len() as f64;
        let n = d.rows as f64;
        let [hidden, qkv, width, up, ffn] =
            [d.hidden, d.qkv_width(), d.attention_width(), d.up, d.ffn].map(|x| x as f64);
        let vocab = if layout.head.is_some() { layout.vocab_rows as f64 } else { 0.0 };

        // Two operations for a multiply-add; forward, and the gradients of input and weights.
        let layer = hidden * qkv + width * hidden + hidden * up + ffn * hidden;
        let matmul_flops = 6.0 * n * micros * (layers * layer + vocab * hidden);
        // Forward: scores and values. Backward: scores again and four gradients. Half a square each.
        let attention_flops = 7.0 * n * d.sequence as f64 * width * layers * micros;

        // Per layer and row: two norms forward (read two, write two) and backward (read two, change
        // one); the non-linearity forward and backward.
        let norms = 2.0 * (4.0 + 4.0) * hidden;
        let activation = (up + ffn) + (2.0 * up + ffn);
        // Turned in place, forward and backward; or the sums of four bias gradients and three adds.
        let family = match job.model.family {
            Family::Llama => 4.0 * qkv,
            Family::Gpt2 => (qkv + hidden + up + hidden) + 2.0 * (qkv + up),
        };
        // Logits become probabilities, then gradients, in two passes.
        let loss = 4.0 * vocab;
        let other = layers * (norms + activation + family) + loss;
        // The norm reads gradients; AdamW reads four numbers and writes three.
        let optimizer = (1.0 + 7.0) * layout.elements as f64;
        Ok(Self {
            matmul_flops,
            attention_flops,
            other_bytes: 4.0 * n * micros * other,
            optimizer_bytes: 4.0 * optimizer,
        })
    }
}

#[cfg(test)]
mod tests {
    use drumline_mesh::Mesh;
    use drumline_spec::Parallelism;

    use super::*;
    use crate::bench::{job, presets};

    #[test]
    fn the_ranks_of_a_split_share_the_matrix_products_of_one_rank() {
        let presets = presets();
        for preset in &presets {
            let whole = Work::of(
                &job(preset, Parallelism::SINGLE, 1, 1),
                Mesh::new(Parallelism::SINGLE).coords(0),
            )
            .unwrap();
            for (tensor, pipeline, data) in [(2, 1, 1), (1, 2, 1), (2, 2, 1)] {
                let shape = Parallelism { tensor, pipeline, data };
                let job = job(preset, shape, 1, 1);
                let mesh = Mesh::new(shape);
                let parts: f64 = (0..mesh.size())
                    .map(|rank| Work::of(&job, mesh.coords(rank)).unwrap().matmul_flops)
                    .sum();
                // A vocabulary that does not divide is padded.
                let off = (parts - whole.matmul_flops).abs() / whole.matmul_flops;
                assert!(off < 1e-4, "{} {shape:?}: {off}", preset.name);
            }
        }
    }

    #[test]
    fn the_work_of_a_step_is_that_of_the_models_formula_but_for_attentions_second_look() {
        let presets = presets();
        let preset = &presets[0];
        let job = job(preset, Parallelism::SINGLE, 8, 1);
        let work = Work::of(&job, Mesh::new(Parallelism::SINGLE).coords(0)).unwrap();
        let formula =
            preset.model.train_flops_per_token(preset.sequence) * job.tokens_per_step() as f64;
        let sum = work.matmul_flops + work.attention_flops * 6.0 / 7.0;
        assert!((sum - formula).abs() / formula < 1e-6, "{sum} {formula}");
    }
}
