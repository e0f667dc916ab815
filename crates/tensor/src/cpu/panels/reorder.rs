//! Reordering of f32 matrices into lines of up to 16 lanes, as f32 or rounded to bf16 (AVX2).
//!
//! A lane is a row of the first factor of a product, or a column of the second; a line holds one
//! word of every lane of a block, and a block one line for each row of the sum.
#![allow(
    unsafe_code,
    reason = "vector loads through strided pointers; what they reach is asserted for each block"
)]

use core::arch::x86_64::{
    __m256, __m256i, _CMP_UNORD_Q, _mm256_add_epi32, _mm256_and_ps, _mm256_and_si256,
    _mm256_blendv_ps, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_maskload_ps, _mm256_or_ps, _mm256_permute2f128_ps,
    _mm256_set1_epi32, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_srli_epi32, _mm256_storeu_ps,
    _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use std::ops::Range;

use super::pack::Part;
use super::{GROUP, Operand};

/// Lanes of a vector.
const LANES: usize = 8;
/// Where lanes are neighbours in memory, so many lines of every block are written before the next of
/// any: a page of the matrix is read from end to end.
const LINES: usize = 16;
/// Words that a block needs beyond its lines: each is written by whole vectors.
pub(super) const SPARE: usize = 16;

/// How blocks lie.
#[derive(Clone, Copy)]
pub(super) struct Order {
    /// Lanes of a block, at most 16; the last one may have fewer.
    pub width: usize,
    /// Whether lines of the last block are as long as those of the others. What is in lanes beyond
    /// the matrix does not matter.
    pub padded: bool,
    /// From one block to the next, in words: its lines and [`SPARE`], or more.
    pub block: usize,
    /// Whether values are rounded to bf16.
    pub rounds: bool,
}

/// A mask of the first `count` lanes.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn first(count: usize) -> __m256i {
    const MASKS: [i32; 2 * LANES] = {
        let mut masks = [0; 2 * LANES];
        let mut i = 0;
        while i < LANES {
            masks[i] = -1;
            i += 1;
        }
        masks
    };
    // SAFETY: eight masks follow each of the first nine places.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(LANES - count.min(LANES)).cast()) }
}

/// Rounds to bf16 as [`super::narrow::bf16_bits`] does, or returns the values as they are.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn stored<const ROUND: bool>(v: __m256) -> __m256 {
    if !ROUND {
        return v;
    }
    // SAFETY: by this function's contract.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let high = _mm256_set1_epi32(0xFFFF_0000u32.cast_signed());
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
        let near = _mm256_castsi256_ps(_mm256_and_si256(_mm256_add_epi32(bits, half), high));
        // A NaN stays one: rounding could carry it into infinity.
        let quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_or_ps(_mm256_and_ps(v, _mm256_castsi256_ps(high)), quiet);
        _mm256_blendv_ps(near, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v))
    }
}

/// Lanes are neighbours in memory.
///
/// # Safety
/// As [`to_lines`].
#[inline(always)]
unsafe fn along<const ROUND: bool>(p: Part) {
    // SAFETY: by the caller's contract; lanes beyond `p.lanes` are not read.
    unsafe {
        if p.lanes >= LANES {
            for i in 0..p.lines {
                let v = _mm256_loadu_ps(p.from.add(i * p.row));
                _mm256_storeu_ps(p.to.add(i * p.line), stored::<ROUND>(v));
            }
        } else {
            let mask = first(p.lanes);
            for i in 0..p.lines {
                let v = _mm256_maskload_ps(p.from.add(i * p.row), mask);
                _mm256_storeu_ps(p.to.add(i * p.line), stored::<ROUND>(v));
            }
        }
    }
}

/// Each lane is a run of memory: 8 x 8 words are read and transposed. The last lane stands in for
/// those beyond it.
///
/// # Safety
/// As [`to_lines`].
#[inline(always)]
unsafe fn across<const ROUND: bool>(p: Part) {
    // SAFETY: by the caller's contract.
    unsafe {
        let lane = |l: usize| p.from.add(l.min(p.lanes - 1) * p.lane);
        let from: [*const f32; LANES] = std::array::from_fn(lane);
        let mut i = 0;
        while i + LANES <= p.lines {
            let mut rows = [_mm256_setzero_ps(); LANES];
            for (row, from) in rows.iter_mut().zip(from) {
                *row = _mm256_loadu_ps(from.add(i));
            }
            for (j, line) in transposed(rows).into_iter().enumerate() {
                _mm256_storeu_ps(p.to.add((i + j) * p.line), stored::<ROUND>(line));
            }
            i += LANES;
        }
        if i < p.lines {
            let mask = first(p.lines - i);
            let mut rows = [_mm256_setzero_ps(); LANES];
            for (row, from) in rows.iter_mut().zip(from) {
                *row = _mm256_maskload_ps(from.add(i), mask);
            }
            for (j, line) in transposed(rows).into_iter().enumerate().take(p.lines - i) {
                _mm256_storeu_ps(p.to.add((i + j) * p.line), stored::<ROUND>(line));
            }
        }
    }
}

/// Transposes 8 x 8 words.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn transposed(r: [__m256; LANES]) -> [__m256; LANES] {
    // SAFETY: by this function's contract.
    unsafe {
        // quads[2 g + h][j]: column j, and in the other 128 bits column 4 + j, of four rows.
        let mut quads = [[_mm256_setzero_ps(); 4]; 2];
        for (g, quads) in quads.iter_mut().enumerate() {
            let [a, b, c, d] = [r[4 * g], r[4 * g + 1], r[4 * g + 2], r[4 * g + 3]];
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            quads[0] = _mm256_shuffle_ps::<0x44>(ab, cd);
            quads[1] = _mm256_shuffle_ps::<0xEE>(ab, cd);
            let (ab, cd) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            quads[2] = _mm256_shuffle_ps::<0x44>(ab, cd);
            quads[3] = _mm256_shuffle_ps::<0xEE>(ab, cd);
        }
        let mut columns = [_mm256_setzero_ps(); LANES];
        for j in 0..4 {
            columns[j] = _mm256_permute2f128_ps::<0x20>(quads[0][j], quads[1][j]);
            columns[4 + j] = _mm256_permute2f128_ps::<0x31>(quads[0][j], quads[1][j]);
        }
        columns
    }
}

/// Writes lines of up to eight lanes, each as a whole vector.
///
/// # Safety
/// The part lies in the matrix and has a lane; the output takes its lines and the rest of a vector
/// after the last; one of its strides is 1; the processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn to_lines(rounds: bool, p: Part) {
    // SAFETY: by this function's contract.
    unsafe {
        match (p.row == 1, rounds) {
            (false, false) => along::<false>(p),
            (false, true) => along::<true>(p),
            (true, false) => across::<false>(p),
            (true, true) => across::<true>(p),
        }
    }
}

/// Reorders `lanes` of `from` over `ks` into blocks. [`Operand::row`] is from one lane to the next.
/// The caller has asked for AVX2.
pub(super) fn reorder(
    o: Order,
    from: Operand<'_>,
    lanes: Range<usize>,
    ks: Range<usize>,
    to: &mut [f32],
) {
    if lanes.is_empty() || ks.is_empty() {
        return;
    }
    let last = (lanes.end - 1) * from.row + (ks.end - 1) * from.column;
    let blocks = lanes.len().div_ceil(o.width);
    assert!(last < from.values.len(), "reorder: out of the matrix");
    assert!(from.row == 1 || from.column == 1, "reorder: both steps");
    assert!(o.width <= GROUP && o.block >= o.width * ks.len() + SPARE, "reorder: blocks");
    assert!(to.len() >= blocks * o.block, "reorder: out of the output");
    let at_once = if from.column == 1 { ks.len() } else { LINES };
    for k in ks.clone().step_by(at_once) {
        let lines = at_once.min(ks.end - k);
        for (block, to) in to.chunks_exact_mut(o.block).enumerate().take(blocks) {
            let start = lanes.start + block * o.width;
            let here = o.width.min(lanes.end - start);
            let line = if o.padded { o.width } else { here };
            for half in (0..here).step_by(LANES) {
                let part = Part {
                    from: from.values[(start + half) * from.row + k * from.column..].as_ptr(),
                    lane: from.row,
                    row: from.column,
                    lanes: LANES.min(here - half),
                    k: lines,
                    to: to[(k - ks.start) * line + half..].as_mut_ptr(),
                    line,
                    lines,
                };
                // SAFETY: the part's last element is at most the one asserted above; a line is
                // written as a whole vector, at most SPARE words beyond the block's last.
                unsafe { to_lines(o.rounds, part) };
            }
        }
    }
}

/// Writes the columns of `rows x columns` values, whose rows begin `width` apart, as lines `line`
/// apart. What follows in a line, up to whole vectors, does not matter. The caller has asked for
/// AVX2.
pub(in crate::cpu) fn transpose(
    (rows, columns): (usize, usize),
    width: usize,
    from: &[f32],
    line: usize,
    to: &mut [f32],
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!((rows - 1) * width + columns <= from.len(), "transpose: out of the matrix");
    assert!(rows.next_multiple_of(LANES) <= line, "transpose: lines");
    assert!(columns * line <= to.len(), "transpose: out of the output");
    for first in (0..rows).step_by(LANES) {
        let part = Part {
            from: from[first * width..].as_ptr(),
            lane: width,
            row: 1,
            lanes: LANES.min(rows - first),
            k: columns,
            to: to[first..].as_mut_ptr(),
            line,
            lines: columns,
        };
        // SAFETY: asserted above.
        unsafe { to_lines(false, part) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::narrow::{bf16_bits, bf16_value};
    use super::*;
    use crate::cpu::simd::{Level, level};
    use crate::reference::Random;

    #[test]
    fn blocks_hold_every_lane_of_every_shape_in_both_directions() {
        if level() < Level::Avx2 {
            eprintln!("not tested: this processor has no AVX2");
            return;
        }
        for seed in 0..300 {
            let mut r = Random::new(seed);
            let (lanes, k) = (1 + r.below(60), 1 + r.below(70));
            let mut values = r.values(lanes * k);
            let at = r.below(lanes * k);
            values[at] = f32::from_bits([0x7F80_0001, 0x7F80_0000, 0x0000_FFFF][r.below(3)]);
            let along = r.below(2) == 0;
            let (row, column) = if along { (1, lanes) } else { (k, 1) };
            let from = Operand { values: &values, row, column };
            let (first, start) = (r.below(lanes), r.below(k));
            let (lanes, ks) = (first..lanes, start..k);
            let padded = r.below(2) == 0;
            let width = if padded { 16 } else { 6 };
            let block = width * ks.len() + SPARE + r.below(3);
            let rounds = r.below(2) == 0;
            let blocks = lanes.len().div_ceil(width);
            let mut to = vec![9.0; blocks * block];
            let o = Order { width, padded, block, rounds };
            reorder(o, from, lanes.clone(), ks.clone(), &mut to);
            for (i, lane) in lanes.clone().enumerate() {
                let here = width.min(lanes.len() - i / width * width);
                let line = if padded { width } else { here };
                for (j, k) in ks.clone().enumerate() {
                    let got = to[i / width * block + j * line + i % width];
                    let value = values[lane * row + k * column];
                    let want = if rounds { bf16_value(bf16_bits(value)) } else { value };
                    assert_eq!(got.to_bits(), want.to_bits(), "seed {seed}, lane {lane}, {k}");
                }
            }
        }
    }
}
