//! The machine's own limits: how fast the best matrix product runs here, and how fast memory is read.

use crate::backend::{Backend, TensorError};
use crate::cpu::{Cpu, CpuOptions};
use crate::dtype::MatmulPrecision;
use crate::shape::{Linear, WeightLayout};

/// Side of the square matrices that the peak is measured with: large enough to hide packing, small
/// enough that three of them fit in L3.
const SIDE: usize = 1024;
/// Elements that the bandwidth is measured with: 512 MiB, far more than any cache.
const READ: usize = 128 << 20;

/// Measures the f32 matrix product peak, as [`matmul`] does.
///
/// # Errors
/// [`TensorError`] when memory or threads cannot be had.
pub fn matmul_f32(
    threads: usize,
    rounds: usize,
    seconds: impl FnMut() -> f64 + Send,
) -> Result<f64, TensorError> {
    matmul(threads, MatmulPrecision::F32, rounds, seconds)
}

/// Measures the matrix product peak of `threads` threads, in floating-point operations per second:
/// the best of `rounds` products of 1024 x 1024 matrices.
///
/// `seconds` is the caller's monotonic clock.
///
/// # Errors
/// [`TensorError`] when memory or threads cannot be had.
pub fn matmul(
    threads: usize,
    precision: MatmulPrecision,
    rounds: usize,
    mut seconds: impl FnMut() -> f64 + Send,
) -> Result<f64, TensorError> {
    let cpu =
        Cpu::with_options(CpuOptions { threads, matmul: precision, ..CpuOptions::default() })?;
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

/// Measures how fast `threads` threads read memory, in bytes per second: the best of `rounds` sums
/// over 512 MiB.
///
/// `seconds` is the caller's monotonic clock.
///
/// # Errors
/// [`TensorError`] when memory or threads cannot be had.
pub fn read_bandwidth(
    threads: usize,
    rounds: usize,
    mut seconds: impl FnMut() -> f64 + Send,
) -> Result<f64, TensorError> {
    let cpu = Cpu::new(threads)?;
    let mut values = cpu.alloc(READ)?;
    cpu.fill(values.as_mut_slice(), 1.0);
    let best = cpu.scope(|| {
        let mut best = f64::INFINITY;
        for _ in 0..rounds.max(1) {
            let start = seconds();
            assert!(cpu.read_through(values.as_slice()) > 0.0, "ones have a sum");
            best = best.min(seconds() - start);
        }
        best
    });
    Ok((READ * size_of::<f32>()) as f64 / best)
}
