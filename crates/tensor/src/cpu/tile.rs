//! Small matrix products on operands that stay in cache: the inside of attention, and thin layers.
//!
//! `C [m, n] (+)= A [m, k] . B [k, n]`, with any strides on A, rows of B and C contiguous. Nothing
//! is packed: B is short enough, or read once. B may be f16 or bf16, which become f32 on their way into
//! registers.
#![allow(
    unsafe_code,
    reason = "vector loads through pointers; bounds are asserted once for each call"
)]

use super::panels::narrow::{bf16_bits, bf16_value, f16_bits, f16_value};
use super::simd::{Simd, dispatched};

/// How an element of B is stored.
pub(super) trait Element: Copy {
    /// Reads [`Simd::LANES`] elements as f32.
    ///
    /// # Safety
    /// They lie at `from`.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V;
    /// Returns the element's value.
    fn value(self) -> f32;
    /// Returns the element nearest to a value; none is infinite.
    fn nearest(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: by the trait's contract.
        unsafe { s.load(from) }
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    fn nearest(value: f32) -> Self {
        value
    }
}

/// IEEE half precision.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct F16(u16);

impl Element for F16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: by the trait's contract; the types have one layout.
        unsafe { s.load_f16(from.cast()) }
    }
    #[inline(always)]
    fn value(self) -> f32 {
        f16_value(self.0)
    }
    #[inline(always)]
    fn nearest(value: f32) -> Self {
        Self(f16_bits(value.clamp(-F16_MAX, F16_MAX)))
    }
}

/// The greatest f16.
const F16_MAX: f32 = 65_504.0;

/// The upper half of an f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Bf16(u16);

impl Element for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: by the trait's contract; the types have one layout.
        unsafe { s.load_bf16(from.cast()) }
    }
    #[inline(always)]
    fn value(self) -> f32 {
        bf16_value(self.0)
    }
    #[inline(always)]
    fn nearest(value: f32) -> Self {
        Self(bf16_bits(value))
    }
}

/// The operands of one product.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A and rows of B.
    pub k: usize,
    /// Step between rows of A.
    pub a_row: usize,
    /// Step between columns of A.
    pub a_column: usize,
    /// Step between rows of B.
    pub b_row: usize,
    /// Step between rows of C.
    pub c_row: usize,
    /// Add to C instead of replacing it.
    pub accumulate: bool,
}

impl Tile {
    /// Asserts that every element that the product touches exists.
    fn check(&self, a: usize, b: usize, c: usize) {
        let last = |rows: usize, step: usize, columns: usize, column_step: usize| {
            if rows == 0 || columns == 0 {
                0
            } else {
                (rows - 1) * step + (columns - 1) * column_step + 1
            }
        };
        assert!(last(self.m, self.a_row, self.k, self.a_column) <= a, "tile: A out of bounds");
        assert!(last(self.k, self.b_row, self.n, 1) <= b, "tile: B out of bounds");
        assert!(last(self.m, self.c_row, self.n, 1) <= c, "tile: C out of bounds");
    }
}

/// Adds the products of column `p` of A and row `p` of B.
///
/// # Safety
/// As [`block`].
#[inline(always)]
unsafe fn step<S: Simd, E: Element, const M: usize, const N: usize>(
    s: S,
    t: &Tile,
    a: *const f32,
    b: *const E,
    p: usize,
    sums: &mut [[S::V; N]; M],
) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut row = [s.splat(0.0); N];
        for (j, v) in row.iter_mut().enumerate() {
            *v = E::load(s, b.add(p * t.b_row + j * S::LANES));
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let x = s.splat(*a.add(i * t.a_row + p * t.a_column));
            for (sum, v) in sums.iter_mut().zip(row) {
                *sum = s.fma(x, v, *sum);
            }
        }
    }
}

/// `M` rows by `N` vectors, all in registers. Sums run along k in order, so that a row's result does
/// not depend on how many rows there are.
///
/// # Safety
/// The block lies inside the operands, which were checked.
#[inline(always)]
unsafe fn block<S: Simd, E: Element, const M: usize, const N: usize>(
    s: S,
    t: &Tile,
    a: *const f32,
    b: *const E,
    c: *mut f32,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut sums = [[s.splat(0.0); N]; M];
        for p in 0..t.k {
            step(s, t, a, b, p, &mut sums);
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (j, mut sum) in sums.into_iter().enumerate() {
                let to = c.add(i * t.c_row + j * S::LANES);
                if t.accumulate {
                    sum = s.add(sum, s.load(to));
                }
                s.store(to, sum);
            }
        }
    }
}

/// All rows of `N` vectors of columns.
///
/// # Safety
/// As [`block`].
#[inline(always)]
unsafe fn columns<S: Simd, E: Element, const N: usize>(
    s: S,
    t: &Tile,
    a: *const f32,
    b: *const E,
    c: *mut f32,
) {
    // SAFETY: rows `i .. i + M` are below `t.m`.
    unsafe {
        let mut i = 0;
        while i < t.m {
            let (a, c) = (a.add(i * t.a_row), c.add(i * t.c_row));
            match t.m - i {
                1 => block::<S, E, 1, N>(s, t, a, b, c),
                2 => block::<S, E, 2, N>(s, t, a, b, c),
                3 => block::<S, E, 3, N>(s, t, a, b, c),
                4 => block::<S, E, 4, N>(s, t, a, b, c),
                5 => block::<S, E, 5, N>(s, t, a, b, c),
                _ => block::<S, E, 6, N>(s, t, a, b, c),
            }
            i += 6;
        }
    }
}

#[inline(always)]
fn product_body<S: Simd, E: Element>(s: S, t: Tile, a: &[f32], b: &[E], c: &mut [f32]) {
    t.check(a.len(), b.len(), c.len());
    let mut j = 0;
    // SAFETY: `check` holds, and every block's columns `j .. j + N * LANES` are below `t.n`.
    unsafe {
        let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
        if S::WIDE {
            while j + 4 * S::LANES <= t.n {
                columns::<S, E, 4>(s, &t, a, b.add(j), c.add(j));
                j += 4 * S::LANES;
            }
        }
        while j + 2 * S::LANES <= t.n {
            columns::<S, E, 2>(s, &t, a, b.add(j), c.add(j));
            j += 2 * S::LANES;
        }
        while j + S::LANES <= t.n {
            columns::<S, E, 1>(s, &t, a, b.add(j), c.add(j));
            j += S::LANES;
        }
    }
    if j < t.n {
        for i in 0..t.m {
            for q in j..t.n {
                let mut sum = 0.0;
                for p in 0..t.k {
                    sum += a[i * t.a_row + p * t.a_column] * b[p * t.b_row + q].value();
                }
                let to = &mut c[i * t.c_row + q];
                *to = if t.accumulate { *to + sum } else { sum };
            }
        }
    }
}

dispatched! {
    /// Computes one product.
    pub(super) fn product(t: Tile, a: &[f32], b: &[f32], c: &mut [f32]) = product_body;
}
dispatched! {
    /// As [`product`], with B of f16.
    pub(super) fn product_f16(t: Tile, a: &[f32], b: &[F16], c: &mut [f32]) = product_body;
}
dispatched! {
    /// As [`product`], with B of bf16.
    pub(super) fn product_bf16(t: Tile, a: &[f32], b: &[Bf16], c: &mut [f32]) = product_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::Random;

    #[test]
    fn products_of_every_remainder_match_the_definition() {
        let mut random = Random::new(7);
        for seed in 0..200 {
            let mut r = Random::new(seed);
            let (m, n, k) = (1 + r.below(14), 1 + r.below(150), 1 + r.below(40));
            let transposed = r.below(2) == 1;
            let (a_row, a_column) = if transposed { (1, m + 3) } else { (k + 3, 1) };
            let t = Tile {
                m,
                n,
                k,
                a_row,
                a_column,
                b_row: n + 5,
                c_row: n + 2,
                accumulate: r.below(2) == 1,
            };
            let a = random.values((m + 3) * (k + 3));
            let b = random.values(k * (n + 5));
            let mut c = random.values(m * (n + 2));
            let before = c.clone();
            product(t, &a, &b, &mut c);
            for i in 0..m {
                for j in 0..n + 2 {
                    let old = before[i * (n + 2) + j];
                    let mut want = if j >= n || t.accumulate { old } else { 0.0 };
                    if j < n {
                        for p in 0..k {
                            want += a[i * a_row + p * a_column] * b[p * (n + 5) + j];
                        }
                    }
                    let got = c[i * (n + 2) + j];
                    assert!((got - want).abs() < 1e-4, "seed {seed} at {i},{j}: {got} {want}");
                }
            }
        }
    }
}
