//! Matrix products: kernels of our own on AVX2, and where the processor has AVX-512 and they are the
//! faster ones; the `gemm` crate elsewhere; and where a batch has few rows a kernel that streams the
//! weights once.
//!
//! In [`MatmulPrecision::Bf16`] both factors are rounded to bf16 on the way and the sums stay f32:
//! by the processor's own instructions, or where it has none by rounding copies and multiplying
//! these in f32.
#![allow(unsafe_code, reason = "the gemm crate takes pointers; the thin kernel loads vectors")]

use std::ops::Range;

use gemm_common::Parallelism;

use super::GRAIN;
#[cfg(target_arch = "x86_64")]
use super::panels::{
    Format, blocks,
    multiply::{self as panels, Extent},
};
use super::panels::{Operand, narrow::round_to_bf16};
use super::pool::{Pool, Rows};
#[cfg(target_arch = "x86_64")]
use super::simd::{Level, level};
use super::simd::{Simd, dispatched};
use super::tile::{Tile, product};
use crate::dtype::MatmulPrecision;
use crate::shape::{Linear, WeightLayout};

/// Up to so many rows, a product is bound by reading the weights.
const THIN_ROWS: usize = 16;
/// Outputs of a thin product that one task computes.
const THIN_OUTPUTS: usize = 64;

/// Rows or columns of a product that one task computes where no bit may depend on threads.
const BAND: usize = 128;

/// How products are made.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Products {
    /// What factors are rounded to.
    pub precision: MatmulPrecision,
    /// Whether results must not depend on the number of threads.
    pub deterministic: bool,
}

fn plain(values: &[f32], columns: usize) -> Operand<'_> {
    Operand { values, row: columns, column: 1 }
}

fn transposed(values: &[f32], rows: usize) -> Operand<'_> {
    Operand { values, row: 1, column: rows }
}

/// What is multiplied: `C [m, n] (+)= A [m, k] . B [k, n] (+ bias)`.
struct Product<'a> {
    m: usize,
    n: usize,
    k: usize,
    a: Operand<'a>,
    b: Operand<'a>,
    bias: Option<&'a [f32]>,
    accumulate: bool,
}

fn multiply(pool: &Pool, how: Products, p: &Product<'_>, c: &mut [f32]) {
    let precision = how.precision;
    let Product { m, n, k, a, b, .. } = *p;
    assert!(a.values.len() == m * k && b.values.len() == k * n && c.len() == m * n, "matmul");
    if m == 0 || n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if k > 0 {
        let (format, rounds) = match precision {
            MatmulPrecision::F32 => (Format::F32, false),
            MatmulPrecision::Bf16 => (Format::Bf16, true),
        };
        let extent = Extent { m, n, k, accumulate: p.accumulate, scales: None, bias: p.bias };
        if format.has_kernel() && (rounds || ours(p)) {
            panels::multiply(pool, format, extent, a, b, c);
            return;
        }
        if level() == Level::Avx2 {
            blocks::multiply(pool, rounds, extent, a, b, c);
            return;
        }
    }
    match precision {
        MatmulPrecision::F32 => by_gemm(pool, how, p, c),
        MatmulPrecision::Bf16 => pool.scratch(m * k + k * n, |rounded| {
            let (x, w) = rounded.split_at_mut(m * k);
            round(pool, a.values, x);
            round(pool, b.values, w);
            let (a, b) = (Operand { values: x, ..a }, Operand { values: w, ..b });
            by_gemm(pool, how, &Product { a, b, ..*p }, c);
        }),
    }
    if let Some(bias) = p.bias {
        add_bias(pool, m, bias, c);
    }
}

/// Returns whether our own f32 kernel is the faster one, as measured (`examples/matmul_rate.rs`): it
/// is with many rows, and with a long sum over a second factor that lies across it; it is not where
/// the first factor does (the gradients of weights).
#[cfg(target_arch = "x86_64")]
fn ours(p: &Product<'_>) -> bool {
    p.a.column == 1 && (p.m >= 384 || p.b.column != 1 && p.k >= 1024)
}

fn round(pool: &Pool, from: &[f32], to: &mut [f32]) {
    let to = Rows::new(to, 1);
    pool.split(from.len(), GRAIN, |part| {
        // SAFETY: parts are disjoint.
        round_to_bf16(&from[part.clone()], unsafe { to.part(part) });
    });
}

fn by_gemm(pool: &Pool, how: Products, p: &Product<'_>, c: &mut [f32]) {
    let Product { m, n, k, .. } = *p;
    let out = Rows::new(c, 1);
    if how.deterministic {
        // The crate cuts a product by the number of threads; these bands know none of it.
        let by_rows = m >= n;
        let extent = if by_rows { m } else { n };
        pool.split(extent.div_ceil(BAND), 1, |bands| {
            for band in bands {
                let band = band * BAND..extent.min((band + 1) * BAND);
                let (rows, columns) = if by_rows { (band, 0..n) } else { (0..m, band) };
                // SAFETY: the bands are disjoint parts of the product.
                unsafe { part_by_gemm(p, rows, columns, out, Parallelism::None) };
            }
        });
        return;
    }
    if pool.threads() > 1 && m * n * k > 64 * 64 * 64 {
        let parallelism = Parallelism::Rayon(pool.threads());
        // SAFETY: it is all one call's.
        pool.install(|| unsafe { part_by_gemm(p, 0..m, 0..n, out, parallelism) });
    } else {
        // SAFETY: it is all one call's.
        unsafe { part_by_gemm(p, 0..m, 0..n, out, Parallelism::None) };
    }
}

/// Computes rows and columns of a product.
///
/// # Safety
/// Nothing else touches this part of `c`, of `m * n` elements.
unsafe fn part_by_gemm(
    p: &Product<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    c: Rows<'_>,
    parallelism: Parallelism,
) {
    let Product { m, n, k, a, b, accumulate, .. } = *p;
    debug_assert!(rows.end <= m && columns.end <= n);
    // SAFETY: `multiply` asserts that the factors and the product have these extents. The crate's
    // kernels want columns of the product to be runs of memory: with factors and extents swapped, our
    // rows are these.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            columns.len(),
            rows.len(),
            k,
            c.as_ptr().add(rows.start * n + columns.start),
            n as isize,
            1,
            accumulate,
            b.values.as_ptr().add(columns.start * b.column),
            b.row as isize,
            b.column as isize,
            a.values.as_ptr().add(rows.start * a.row),
            a.row as isize,
            a.column as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn check(s: Linear, x: usize, w: usize, y: usize) {
    assert!(
        x == s.rows * s.input && w == s.input * s.output && y == s.rows * s.output,
        "linear {s:?}: x {x}, w {w}, y {y}"
    );
}

pub(super) fn linear(
    pool: &Pool,
    how: Products,
    s: Linear,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    check(s, x.len(), w.len(), y.len());
    assert!(bias.is_none_or(|b| b.len() == s.output), "bias");
    if s.rows <= THIN_ROWS && how.precision == MatmulPrecision::F32 {
        thin(pool, s, x, w, y);
        if let Some(bias) = bias {
            add_bias(pool, s.rows, bias, y);
        }
        return;
    }
    let b = match s.layout {
        WeightLayout::OutIn => transposed(w, s.input),
        WeightLayout::InOut => plain(w, s.output),
    };
    let (m, n, k) = (s.rows, s.output, s.input);
    let p = Product { m, n, k, a: plain(x, k), b, bias, accumulate: false };
    multiply(pool, how, &p, y);
}

#[inline(always)]
fn bias_body<S: Simd>(_: S, bias: &[f32], y: &mut [f32]) {
    for row in y.chunks_exact_mut(bias.len()) {
        for (y, b) in row.iter_mut().zip(bias) {
            *y += b;
        }
    }
}

dispatched! { fn bias_part(bias: &[f32], y: &mut [f32]) = bias_body; }

fn add_bias(pool: &Pool, rows: usize, bias: &[f32], y: &mut [f32]) {
    let out = Rows::new(y, bias.len());
    pool.split(rows, (GRAIN / bias.len()).max(1), |part| {
        // SAFETY: parts are disjoint.
        bias_part(bias, unsafe { out.part(part) });
    });
}

pub(super) fn linear_grad_input(
    pool: &Pool,
    how: Products,
    s: Linear,
    dy: &[f32],
    w: &[f32],
    dx: &mut [f32],
) {
    check(s, dx.len(), w.len(), dy.len());
    let b = match s.layout {
        WeightLayout::OutIn => plain(w, s.input),
        WeightLayout::InOut => transposed(w, s.output),
    };
    let (m, n, k) = (s.rows, s.input, s.output);
    let p = Product { m, n, k, a: plain(dy, k), b, bias: None, accumulate: false };
    multiply(pool, how, &p, dx);
}

pub(super) fn linear_grad_weight(
    pool: &Pool,
    how: Products,
    s: Linear,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    accumulate: bool,
) {
    check(s, x.len(), dw.len(), dy.len());
    let (i, o, k) = (s.input, s.output, s.rows);
    let p = match s.layout {
        WeightLayout::OutIn => {
            let (a, b) = (transposed(dy, o), plain(x, i));
            Product { m: o, n: i, k, a, b, bias: None, accumulate }
        }
        WeightLayout::InOut => {
            let (a, b) = (transposed(x, i), plain(dy, o));
            Product { m: i, n: o, k, a, b, bias: None, accumulate }
        }
    };
    multiply(pool, how, &p, dw);
}

/// Few rows: every weight is read once, by the task that owns its outputs.
fn thin(pool: &Pool, s: Linear, x: &[f32], w: &[f32], y: &mut [f32]) {
    let out = Rows::new(y, 1);
    pool.split(s.output, THIN_OUTPUTS, |part| {
        let n = part.len();
        let mut local = [0.0f32; THIN_ROWS * THIN_OUTPUTS];
        match s.layout {
            WeightLayout::OutIn => {
                let w = &w[part.start * s.input..part.end * s.input];
                dots(s.rows, s.input, x, w, &mut local);
            }
            WeightLayout::InOut => {
                let tile = Tile {
                    m: s.rows,
                    n,
                    k: s.input,
                    a_row: s.input,
                    a_column: 1,
                    b_row: s.output,
                    c_row: THIN_OUTPUTS,
                    accumulate: false,
                };
                product(tile, x, &w[part.start..], &mut local);
            }
        }
        for r in 0..s.rows {
            let at = r * s.output + part.start;
            // SAFETY: this task alone writes these outputs of every row.
            let to = unsafe { out.part(at..at + n) };
            to.copy_from_slice(&local[r * THIN_OUTPUTS..r * THIN_OUTPUTS + n]);
        }
    });
}

/// `R` rows of x against `O` rows of w: `R * O` dot products that share their loads.
///
/// # Safety
/// `x` holds `R` and `w` `O` rows of `length`; `y` takes `R` rows of [`THIN_OUTPUTS`].
#[inline(always)]
unsafe fn dot_block<S: Simd, const R: usize, const O: usize>(
    s: S,
    length: usize,
    x: *const f32,
    w: *const f32,
    y: *mut f32,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut sums = [[s.splat(0.0); O]; R];
        let whole = length / S::LANES * S::LANES;
        let mut i = 0;
        while i < whole {
            let mut weights = [s.splat(0.0); O];
            for (o, v) in weights.iter_mut().enumerate() {
                *v = s.load(w.add(o * length + i));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = s.load(x.add(r * length + i));
                for (sum, v) in sums.iter_mut().zip(weights) {
                    *sum = s.fma(x, v, *sum);
                }
            }
            i += S::LANES;
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let mut totals = [0.0f32; O];
            if let ([a, b, c, d], true) = (&sums[..], O == 4) {
                totals.copy_from_slice(&s.sum4([*a, *b, *c, *d]));
            } else {
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total = s.sum(sum);
                }
            }
            for (o, mut total) in totals.into_iter().enumerate() {
                for i in whole..length {
                    total += *x.add(r * length + i) * *w.add(o * length + i);
                }
                *y.add(r * THIN_OUTPUTS + o) = total;
            }
        }
    }
}

/// All rows against `O` rows of w.
///
/// # Safety
/// As [`dot_block`], for `rows` rows.
#[inline(always)]
unsafe fn dot_rows<S: Simd, const O: usize>(
    s: S,
    rows: usize,
    length: usize,
    x: *const f32,
    w: *const f32,
    y: *mut f32,
) {
    // SAFETY: rows `r .. r + R` are below `rows`.
    unsafe {
        let mut r = 0;
        while r < rows {
            let (x, y) = (x.add(r * length), y.add(r * THIN_OUTPUTS));
            match rows - r {
                1 => dot_block::<S, 1, O>(s, length, x, w, y),
                2 => dot_block::<S, 2, O>(s, length, x, w, y),
                3 => dot_block::<S, 3, O>(s, length, x, w, y),
                _ => dot_block::<S, 4, O>(s, length, x, w, y),
            }
            r += 4;
        }
    }
}

#[inline(always)]
fn dots_body<S: Simd>(s: S, rows: usize, length: usize, x: &[f32], w: &[f32], y: &mut [f32]) {
    let outputs = w.len().checked_div(length).unwrap_or(0);
    assert!(x.len() == rows * length && outputs <= THIN_OUTPUTS, "thin product");
    assert!(rows <= THIN_ROWS && y.len() >= rows * THIN_OUTPUTS, "thin product");
    // SAFETY: blocks of outputs stay below `outputs`; the rest is asserted above.
    unsafe {
        let (x, y) = (x.as_ptr(), y.as_mut_ptr());
        let mut o = 0;
        while o + 4 <= outputs {
            dot_rows::<S, 4>(s, rows, length, x, w.as_ptr().add(o * length), y.add(o));
            o += 4;
        }
        while o < outputs {
            dot_rows::<S, 1>(s, rows, length, x, w.as_ptr().add(o * length), y.add(o));
            o += 1;
        }
    }
}

dispatched! {
    /// Dot products of every row of `x` with every row of `w`.
    fn dots(rows: usize, length: usize, x: &[f32], w: &[f32], y: &mut [f32]) = dots_body;
}
