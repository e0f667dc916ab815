//! Reordering of f32 matrices into lines of 16 columns, as f32 or as pairs of bf16 (AVX-512).
#![allow(
    unsafe_code,
    reason = "vector loads through strided pointers; the callers assert what is reached"
)]

use core::arch::x86_64::{
    __m512, __m512i, __mmask16, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castsi512_ps,
    _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_loadu_ps,
    _mm512_permutexvar_epi16, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_storeu_ps,
    _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use super::GROUP;

/// A part of a matrix to be reordered: `lanes` columns of the result by `k` rows.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// The first element.
    pub from: *const f32,
    /// From one column to the next.
    pub lane: usize,
    /// From one row to the next.
    pub row: usize,
    /// Columns, 1 to 16; the rest of a line becomes zeros.
    pub lanes: usize,
    /// Rows.
    pub k: usize,
    /// Where the first line goes.
    pub to: *mut f32,
    /// From one line to the next, in f32.
    pub line: usize,
    /// Lines to write; those beyond `k` become zeros.
    pub lines: usize,
}

/// The first `count` of 16.
#[inline(always)]
pub(super) fn first(count: usize) -> __mmask16 {
    if count >= 16 { u16::MAX } else { (1u16 << count) - 1 }
}

/// Interleaves two rows of 16: pair `i` is `(low[i], high[i])`.
const PAIRS: [u16; 32] = {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 16 {
        index[2 * i] = i as u16;
        index[2 * i + 1] = 16 + i as u16;
        i += 1;
    }
    index
};

/// Returns 32 values as bf16: those of `low`, then those of `high`.
///
/// # Safety
/// The processor has AVX-512 BF16.
#[inline(always)]
unsafe fn halves(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes without invalid values.
    unsafe { core::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Columns are neighbours in memory: a line is one row, or a pair of rows.
///
/// # Safety
/// The part lies in the matrix and its lines in the output.
#[inline(always)]
unsafe fn along<const BF16: bool>(p: Part) {
    // SAFETY: by this function's contract.
    unsafe {
        let mask = first(p.lanes);
        let row = |r: usize| {
            if r < p.k {
                _mm512_maskz_loadu_ps(mask, p.from.add(r * p.row))
            } else {
                _mm512_setzero_ps()
            }
        };
        let pairs = _mm512_loadu_si512(PAIRS.as_ptr().cast());
        for i in 0..p.lines {
            let line = if BF16 {
                let both = halves(row(2 * i), row(2 * i + 1));
                _mm512_castsi512_ps(_mm512_permutexvar_epi16(pairs, both))
            } else {
                row(i)
            };
            _mm512_storeu_ps(p.to.add(i * p.line), line);
        }
    }
}

/// Rows are neighbours in memory: 16 columns are read along k and transposed.
///
/// # Safety
/// As [`along`].
#[inline(always)]
unsafe fn across<const BF16: bool>(p: Part) {
    // SAFETY: by this function's contract.
    unsafe {
        let rows = if BF16 { 2 * GROUP } else { GROUP };
        for i in (0..p.lines).step_by(GROUP) {
            let k = i / GROUP * rows;
            let left = p.k.saturating_sub(k);
            let mut block = [_mm512_setzero_ps(); GROUP];
            for (lane, v) in block.iter_mut().enumerate().take(p.lanes) {
                let from = p.from.add(lane * p.lane + k.min(p.k));
                *v = if left >= rows {
                    let low = _mm512_loadu_ps(from);
                    if BF16 {
                        _mm512_castsi512_ps(halves(low, _mm512_loadu_ps(from.add(GROUP))))
                    } else {
                        low
                    }
                } else {
                    let low = _mm512_maskz_loadu_ps(first(left), from);
                    if BF16 {
                        let mask = first(left.saturating_sub(GROUP));
                        // Masked off, an address beyond the matrix is not read.
                        let high = from.wrapping_add(GROUP);
                        _mm512_castsi512_ps(halves(low, _mm512_maskz_loadu_ps(mask, high)))
                    } else {
                        low
                    }
                };
            }
            let lines = transposed(block);
            for (j, line) in lines.into_iter().enumerate().take(p.lines - i) {
                _mm512_storeu_ps(p.to.add((i + j) * p.line), line);
            }
        }
    }
}

/// Transposes 16 x 16 words.
///
/// # Safety
/// The processor has AVX-512.
#[inline(always)]
unsafe fn transposed(rows: [__m512; 16]) -> [__m512; 16] {
    // SAFETY: by this function's contract.
    unsafe {
        let mut quads = [_mm512_setzero_ps(); 16];
        for g in 0..4 {
            let [a, b, c, d] = [rows[4 * g], rows[4 * g + 1], rows[4 * g + 2], rows[4 * g + 3]];
            let low = |x, y| _mm512_castps_pd(_mm512_unpacklo_ps(x, y));
            let high = |x, y| _mm512_castps_pd(_mm512_unpackhi_ps(x, y));
            quads[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(low(a, b), low(c, d)));
            quads[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low(a, b), low(c, d)));
            quads[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high(a, b), high(c, d)));
            quads[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high(a, b), high(c, d)));
        }
        // quads[4 g + j] holds, in its 128-bit lane l, column 4 l + j of rows 4 g to 4 g + 3.
        let mut columns = [_mm512_setzero_ps(); 16];
        for j in 0..4 {
            let even = _mm512_shuffle_f32x4::<0x88>(quads[j], quads[4 + j]);
            let odd = _mm512_shuffle_f32x4::<0xDD>(quads[j], quads[4 + j]);
            let even2 = _mm512_shuffle_f32x4::<0x88>(quads[8 + j], quads[12 + j]);
            let odd2 = _mm512_shuffle_f32x4::<0xDD>(quads[8 + j], quads[12 + j]);
            columns[j] = _mm512_shuffle_f32x4::<0x88>(even, even2);
            columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, odd2);
            columns[8 + j] = _mm512_shuffle_f32x4::<0xDD>(even, even2);
            columns[12 + j] = _mm512_shuffle_f32x4::<0xDD>(odd, odd2);
        }
        columns
    }
}

#[inline(always)]
unsafe fn part<const BF16: bool>(p: Part) {
    // SAFETY: by the callers' contract.
    unsafe { if p.lane == 1 { along::<BF16>(p) } else { across::<BF16>(p) } }
}

/// Writes lines of f32.
///
/// # Safety
/// The part lies in the matrix and its lines in the output; one of its strides is 1; the processor
/// has AVX-512 F, VL, BW and DQ.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn to_f32(p: Part) {
    // SAFETY: by this function's contract.
    unsafe { part::<false>(p) }
}

/// Writes lines of pairs of bf16.
///
/// # Safety
/// As [`to_f32`]; the processor has AVX-512 BF16 too.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) unsafe fn to_bf16(p: Part) {
    // SAFETY: by this function's contract.
    unsafe { part::<true>(p) }
}

/// Converts a row to bf16, and fills `to` with zeros beyond it.
///
/// # Safety
/// The processor has AVX-512 F, VL, BW, DQ and BF16.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) unsafe fn row_to_bf16(from: &[f32], to: &mut [f32]) {
    let k = from.len();
    assert!(to.len() * 2 >= k, "row of bf16");
    let words = to.len();
    // SAFETY: masks keep loads inside `from`, and the last store inside `to`.
    unsafe {
        for i in (0..words).step_by(GROUP) {
            let left = k.saturating_sub(2 * i);
            let at = from.as_ptr().wrapping_add(2 * i);
            let low = _mm512_maskz_loadu_ps(first(left), at);
            let high =
                _mm512_maskz_loadu_ps(first(left.saturating_sub(GROUP)), at.wrapping_add(GROUP));
            let pairs = halves(low, high);
            let store = first(words - i);
            let to = to.as_mut_ptr().add(i);
            core::arch::x86_64::_mm512_mask_storeu_ps(to, store, _mm512_castsi512_ps(pairs));
        }
    }
}
