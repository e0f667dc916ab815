//! The machine's own limit: how fast the best matrix product runs here.

use crate::backend::{Backend, TensorError};
use crate::cpu::Cpu;
use crate::shape::{Linear, WeightLayout};

/// Side of the square matrices that the peak is measured with: large enough to hide packing, small
/// enough that three of them fit in L3.
const SIDE: usize = 1024;

/// Measures the f32 matrix product peak of `threads` threads, in floating-point operations per
/// second: the best of `rounds` products of 1024 x 1024 matrices.
///
/// `seconds` is the caller's monotonic clock.
///
/// # Errors
/// [`TensorError`] when memory or threads cannot be had.
pub fn matmul_f32(
    threads: usize,
    rounds: usize,
    mut seconds: impl FnMut() -> f64 + Send,
) -> Result<f64, TensorError> {
    let cpu = Cpu::new(threads)?;
    let (mut a, mut b, mut c) =
        (cpu.alloc(SIDE * SIDE)?, cpu.alloc(SIDE * SIDE)?, cpu.alloc(SIDE * SIDE)?);
    // Not zeros, so that no processor can take a short cut.
    for (i, (a, b)) in a.as_mut_slice().iter_mut().zip(b.as_mut_slice()).enumerate() {
        *a = (i % 13) as f32 * 0.1;
        *b = (i % 7) as f32 * 0.2;
    }
    let shape = Linear { rows: SIDE, input: SIDE, output: SIDE, layout: WeightLayout::InOut };
    let flops = 2.0 * (SIDE * SIDE * SIDE) as f64;
    let best = cpu.scope(|| {
        let mut best = f64::INFINITY;
        for _ in 0..rounds.max(1) {
            let start = seconds();
            cpu.linear(shape, a.as_slice(), b.as_slice(), None, c.as_mut_slice());
            best = best.min(seconds() - start);
        }
        best
    });
    Ok(flops / best)
}
