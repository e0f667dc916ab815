//! The inner kernel where there is no AVX-512 for a format: up to 6 rows by 16 columns, or 2 rows by
//! a whole panel, in registers (AVX2, FMA, F16C).
//!
//! Halves and bytes become f32, or pairs of 16-bit numbers, on their way into registers: no expanded
//! copy of the weights is ever in memory.
#![allow(unsafe_code, reason = "vector loads through pointers; the callers assert what is reached")]

use core::arch::x86_64::{
    __m256, __m256i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_add_epi32, _mm256_add_ps,
    _mm256_and_si256, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cvtepi32_ps,
    _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_sign_epi8, _mm256_slli_epi32, _mm256_srai_epi16, _mm256_storeu_ps, _mm256_unpackhi_epi8,
    _mm256_unpacklo_epi8,
};

use std::ops::Range;

use super::{Format, GROUP, PANEL};

/// Rows of the product that are computed together.
pub(super) const ROWS: usize = 6;
/// Rows that are computed by a whole panel of columns: more would not leave enough registers.
pub(super) const WIDE_ROWS: usize = 2;

/// What one call computes: `C [m, columns] = A [m, k] . B [k, columns]`, B being a panel or a run of
/// its steps, and A being packed: for each word along the sum, one of every row.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Rows, at most [`ROWS`].
    pub m: usize,
    /// The first word of A: an f32, or for [`Format::I8`] a pair of 16-bit numbers.
    pub a: *const f32,
    /// The first line of B.
    pub b: *const u8,
    /// Groups of the panel.
    pub groups: usize,
    /// Steps of B.
    pub steps: usize,
    /// How far ahead of its use a line is asked for, in bytes.
    pub ahead: usize,
    /// The first element of C.
    pub c: *mut f32,
    /// From one row of C to the next.
    pub c_row: usize,
    /// Columns of C.
    pub columns: usize,
    /// Start from C instead of zeros.
    pub resume: bool,
    /// For [`Format::I8`], multiply rows; null otherwise.
    pub row_scales: *const f32,
    /// For [`Format::I8`], multiply columns; null otherwise.
    pub scales: *const f32,
    /// Add to columns, at the end; null: do not.
    pub bias: *const f32,
}

/// How one format's lines are read and multiplied.
trait Lines {
    /// Bytes of a line.
    const LINE: usize;
    /// Words of A that a step takes.
    const WORDS: usize;
    /// Whether sums are 32-bit integers.
    const INTEGER: bool;

    /// Returns what the `word`-th word of A is multiplied by, 16 columns of it. The line is read again
    /// for each word: L1 is cheaper than registers.
    ///
    /// # Safety
    /// A line lies at `from`; the processor has AVX2, FMA and F16C.
    unsafe fn load(from: *const u8, word: usize) -> [__m256; 2];
    /// # Safety
    /// The processor has AVX2, FMA and F16C.
    #[inline(always)]
    unsafe fn add(sum: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: by the trait's contract.
        unsafe { _mm256_fmadd_ps(a, b, sum) }
    }
}

struct F32;

impl Lines for F32 {
    const LINE: usize = 64;
    const WORDS: usize = 1;
    const INTEGER: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u8, _: usize) -> [__m256; 2] {
        // SAFETY: by the trait's contract.
        unsafe { [_mm256_loadu_ps(from.cast()), _mm256_loadu_ps(from.add(32).cast())] }
    }
}

struct F16;

impl Lines for F16 {
    const LINE: usize = 32;
    const WORDS: usize = 1;
    const INTEGER: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u8, _: usize) -> [__m256; 2] {
        // SAFETY: by the trait's contract.
        unsafe {
            let (left, right) =
                (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast()));
            [_mm256_cvtph_ps(left), _mm256_cvtph_ps(right)]
        }
    }
}

struct Bf16;

/// Returns the same address in a way that hides this from the compiler: it would keep a line that is
/// read twice in registers, of which there are none left, and spill the sums.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is read or written: it is a name")]
fn again(mut from: *const u8) -> *const u8 {
    // SAFETY: no instruction at all.
    unsafe {
        core::arch::asm!("/* {0} */", inout(reg) from, options(pure, nomem, nostack, preserves_flags));
    }
    from
}

impl Lines for Bf16 {
    const LINE: usize = 64;
    const WORDS: usize = 2;
    const INTEGER: bool = false;

    /// The even rows are the low halves of pairs, the odd ones the high halves.
    #[inline(always)]
    unsafe fn load(from: *const u8, word: usize) -> [__m256; 2] {
        // SAFETY: by the trait's contract.
        unsafe {
            let from = if word == 0 { from } else { again(from) };
            let left = _mm256_loadu_si256(from.cast());
            let right = _mm256_loadu_si256(from.add(32).cast());
            let bits = if word == 0 {
                [_mm256_slli_epi32::<16>(left), _mm256_slli_epi32::<16>(right)]
            } else {
                let high = _mm256_set1_epi32(0xFFFF_0000u32.cast_signed());
                [_mm256_and_si256(left, high), _mm256_and_si256(right, high)]
            };
            [_mm256_castsi256_ps(bits[0]), _mm256_castsi256_ps(bits[1])]
        }
    }
}

struct I8;

/// Reads eight columns by four rows of bytes and puts the signs back.
///
/// # Safety
/// 32 bytes lie at `from`; the processor has AVX2.
#[inline(always)]
unsafe fn signed(from: *const u8) -> __m256i {
    // SAFETY: by this function's contract.
    unsafe {
        let bytes = _mm256_loadu_si256(from.cast());
        let magnitude = _mm256_and_si256(bytes, _mm256_set1_epi8(0x7F));
        _mm256_sign_epi8(magnitude, bytes)
    }
}

impl Lines for I8 {
    const LINE: usize = 64;
    const WORDS: usize = 2;
    const INTEGER: bool = true;

    /// Of each 128 bits, the low half are the pairs of rows 0 and 1, the high half those of rows 2
    /// and 3. Bytes become 16 bits as the high halves of these, shifted down.
    #[inline(always)]
    unsafe fn load(from: *const u8, word: usize) -> [__m256; 2] {
        // SAFETY: by the trait's contract.
        unsafe {
            let (left, right) = (signed(from), signed(from.add(32)));
            let (left, right) = if word == 0 {
                (_mm256_unpacklo_epi8(left, left), _mm256_unpacklo_epi8(right, right))
            } else {
                (_mm256_unpackhi_epi8(left, left), _mm256_unpackhi_epi8(right, right))
            };
            let wide = [_mm256_srai_epi16::<8>(left), _mm256_srai_epi16::<8>(right)];
            [_mm256_castsi256_ps(wide[0]), _mm256_castsi256_ps(wide[1])]
        }
    }
    #[inline(always)]
    unsafe fn add(sum: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: by the trait's contract.
        unsafe {
            let products = _mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum), products))
        }
    }
}

/// `M` rows by `V` groups, the first of which is `group`. `WHOLE`: all their columns exist.
///
/// # Safety
/// The block's operands exist; `M == b.m`, `group + V <= b.groups`.
#[inline(always)]
unsafe fn part<L: Lines, const M: usize, const V: usize, const WHOLE: bool>(
    b: &Block,
    group: usize,
) {
    // SAFETY: by this function's contract; a prefetched address need not exist; the columns of the
    // last group go through a copy where they are not all there.
    unsafe {
        let mut sums = [[[_mm256_setzero_ps(); 2]; V]; M];
        let whole = |v: usize| WHOLE || (group + v + 1) * GROUP <= b.columns;
        let there = |v: usize| b.columns - (group + v) * GROUP;
        let place = |m: usize, v: usize| b.c.add(m * b.c_row + (group + v) * GROUP);
        let row = |from: *const f32, v: usize| -> [__m256; 2] {
            if whole(v) {
                return [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
            }
            let mut copy = [0.0f32; GROUP];
            from.copy_to_nonoverlapping(copy.as_mut_ptr(), there(v));
            [_mm256_loadu_ps(copy.as_ptr()), _mm256_loadu_ps(copy.as_ptr().add(8))]
        };
        if b.resume && !L::INTEGER {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = row(place(m, v), v);
                }
            }
        }
        if M == ROWS {
            // The rows of the next block.
            for m in 0..M {
                _mm_prefetch::<_MM_HINT_T0>(b.c.wrapping_add((M + m) * b.c_row).cast());
            }
        }
        let (mut a, mut lines) = (b.a, b.b.add(group * L::LINE));
        for _ in 0..b.steps {
            for v in 0..V {
                let at = lines.add(v * L::LINE);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(b.ahead).cast());
                for w in 0..L::WORDS {
                    let columns = L::load(at, w);
                    for (m, sums) in sums.iter_mut().enumerate() {
                        let x = _mm256_set1_ps(*a.add(w * M + m));
                        for (sum, column) in sums[v].iter_mut().zip(columns) {
                            *sum = L::add(*sum, x, column);
                        }
                    }
                }
            }
            a = a.add(L::WORDS * M);
            lines = lines.add(b.groups * L::LINE);
        }
        let column = |from: *const f32, v: usize| row(from.add((group + v) * GROUP), v);
        if L::INTEGER {
            for (m, sums) in sums.iter_mut().enumerate() {
                let by_row = _mm256_set1_ps(*b.row_scales.add(m));
                for (v, sum) in sums.iter_mut().enumerate() {
                    let scales = column(b.scales, v);
                    let before =
                        if b.resume { row(place(m, v), v) } else { [_mm256_setzero_ps(); 2] };
                    for ((sum, scale), before) in sum.iter_mut().zip(scales).zip(before) {
                        let total = _mm256_cvtepi32_ps(_mm256_castps_si256(*sum));
                        *sum = _mm256_fmadd_ps(total, _mm256_mul_ps(scale, by_row), before);
                    }
                }
            }
        }
        if !b.bias.is_null() {
            for v in 0..V {
                let bias = column(b.bias, v);
                for sums in &mut sums {
                    for (sum, bias) in sums[v].iter_mut().zip(bias) {
                        *sum = _mm256_add_ps(*sum, bias);
                    }
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let to = place(m, v);
                if whole(v) {
                    _mm256_storeu_ps(to, sum[0]);
                    _mm256_storeu_ps(to.add(8), sum[1]);
                } else {
                    let mut copy = [0.0f32; GROUP];
                    _mm256_storeu_ps(copy.as_mut_ptr(), sum[0]);
                    _mm256_storeu_ps(copy.as_mut_ptr().add(8), sum[1]);
                    to.copy_from_nonoverlapping(copy.as_ptr(), there(v));
                }
            }
        }
    }
}

/// As [`part`]. Compiled apart where columns are missing, sums stay in registers where none are.
///
/// # Safety
/// As [`part`].
#[inline(always)]
unsafe fn tile<L: Lines, const M: usize, const V: usize>(b: &Block, group: usize) {
    // SAFETY: by this function's contract.
    unsafe {
        if (group + V) * GROUP <= b.columns {
            part::<L, M, V, true>(b, group);
        } else {
            part::<L, M, V, false>(b, group);
        }
    }
}

/// One block of rows by a run of groups.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn groups<L: Lines>(b: &Block, which: Range<usize>) {
    const { assert!(PANEL == 3 && WIDE_ROWS == 2 && ROWS == 6) };
    // SAFETY: by this function's contract.
    unsafe {
        match (b.m, which.len()) {
            (1, 3) => return tile::<L, 1, 3>(b, 0),
            (2, 3) => return tile::<L, 2, 3>(b, 0),
            _ => {}
        }
        for group in which {
            match b.m {
                1 => tile::<L, 1, 1>(b, group),
                2 => tile::<L, 2, 1>(b, group),
                3 => tile::<L, 3, 1>(b, group),
                4 => tile::<L, 4, 1>(b, group),
                5 => tile::<L, 5, 1>(b, group),
                _ => tile::<L, 6, 1>(b, group),
            }
        }
    }
}

/// Computes the columns of some groups of one block.
///
/// # Safety
/// All that the block describes exists, `which` lies in its groups, nothing else touches these parts
/// of C, and the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run(format: Format, b: &Block, which: Range<usize>) {
    debug_assert!(b.columns > (b.groups - 1) * GROUP && b.columns <= b.groups * GROUP);
    debug_assert!(b.m >= 1 && b.m <= ROWS && which.end <= b.groups);
    // SAFETY: by this function's contract.
    unsafe {
        match format {
            Format::F32 => groups::<F32>(b, which),
            Format::F16 => groups::<F16>(b, which),
            Format::Bf16 => groups::<Bf16>(b, which),
            Format::I8 => groups::<I8>(b, which),
        }
    }
}
