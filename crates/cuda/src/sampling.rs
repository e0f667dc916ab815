//! Choosing tokens where the logits lie: [`drumline_tensor::sampling`]'s rule.

use drumline_tensor::Draw;

use crate::backend::{Cuda, THREADS, grid};
use crate::device::Shape;
use crate::error::CudaError;
use crate::memory::{View, copy_out};

/// Sums that `kernels/sampling.cu` makes in one pass.
const DIGITS: u32 = 7;
/// Tokens are counted in f32 there.
const MOST: usize = 1 << 24;

impl Cuda {
    pub(crate) fn choose(
        &self,
        columns: usize,
        used: usize,
        logits: View<'_>,
        draws: &[Draw],
        tokens: &mut [u32],
    ) -> Result<(), CudaError> {
        assert!(used <= columns && logits.elements == draws.len() * columns, "sample");
        assert!(tokens.len() == draws.len() && 0 < used && used < MOST, "sample");
        if draws.is_empty() {
            return Ok(());
        }
        let words: Vec<u32> = draws.iter().flat_map(words).collect();
        let sent = self.send(&words)?;
        let [chosen] = self.temporary([size_of_val(tokens)])?;
        self.device
            .launch("sampling.cu", c"sample")
            .pointer(logits.wide("logits that are sampled"))
            .pointer(sent)
            .pointer(chosen)
            .u32(columns)
            .u32(used)
            .go(Shape {
                grid: (grid(draws.len()), 1, 1),
                threads: THREADS,
                shared: DIGITS * THREADS * size_of::<u64>() as u32,
            })?;
        copy_out(&self.device, chosen, tokens)
    }
}

/// A draw as the kernel reads it.
fn words(draw: &Draw) -> [u32; 5] {
    let Draw { temperature, top_k, top_p, point } = *draw;
    [temperature.to_bits(), top_k, top_p.to_bits(), point as u32, (point >> 32) as u32]
}
