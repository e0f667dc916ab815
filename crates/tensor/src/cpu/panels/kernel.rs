//! The inner kernel: up to 8 rows by one panel, in registers (AVX-512).
#![allow(unsafe_code, reason = "vector loads through pointers; the callers assert what is reached")]

use core::arch::x86_64::{
    __m512, __m512bh, __m512i, __mmask16, _mm256_loadu_si256, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_permutex2var_epi8,
    _mm512_set1_epi8, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    _mm512_ternarylogic_epi32, _mm512_unpackhi_epi8, _mm512_unpacklo_epi8,
};

use super::{Format, GROUP, PANEL};

/// Rows of the product that are computed together.
pub(super) const ROWS: usize = 8;

/// What one call computes: `C [m, columns] = A [m, k] . B [k, columns]`, B being a panel or a run
/// of its steps.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Rows.
    pub m: usize,
    /// The first word of A: an f32, or a pair of bf16.
    pub a: *const f32,
    /// From one row of A to the next, in words; none: A is in groups of 16 rows, as B is.
    pub a_row: Option<usize>,
    /// From one group of 16 rows to the next, in words, where A is in groups.
    pub a_group: usize,
    /// The first line of B.
    pub b: *const u8,
    /// Groups of the panel.
    pub groups: usize,
    /// Steps of B.
    pub steps: usize,
    /// The first element of C.
    pub c: *mut f32,
    /// From one row of C to the next.
    pub c_row: usize,
    /// Columns of C.
    pub columns: usize,
    /// Start from C instead of zeros.
    pub resume: bool,
    /// Multiply columns, at the end; null: do not.
    pub scales: *const f32,
    /// Add to columns, at the end; null: do not.
    pub bias: *const f32,
}

/// How one format's lines are read and multiplied.
trait Lines {
    /// Bytes of a line.
    const LINE: usize;
    /// Words of A that a step takes: vectors that a line makes.
    const WORDS: usize;
    type Words: Copy + AsRef<[__m512]>;

    /// # Safety
    /// A line lies at `from`; the processor has the format's instructions.
    unsafe fn load(from: *const u8) -> Self::Words;
    /// # Safety
    /// The processor has the format's instructions.
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512;
}

struct F32;

impl Lines for F32 {
    const LINE: usize = 64;
    const WORDS: usize = 1;
    type Words = [__m512; 1];

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [__m512; 1] {
        // SAFETY: by the trait's contract.
        unsafe { [_mm512_loadu_ps(from.cast())] }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: by the trait's contract.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }
}

struct F16;

impl Lines for F16 {
    const LINE: usize = 32;
    const WORDS: usize = 1;
    type Words = [__m512; 1];

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [__m512; 1] {
        // SAFETY: by the trait's contract.
        unsafe { [_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))] }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: by the trait's contract.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }
}

/// Adds the products of 16 pairs.
///
/// # Safety
/// The processor has AVX-512 BF16.
#[inline(always)]
unsafe fn dot(sum: __m512, a: __m512, b: __m512) -> __m512 {
    let pairs = |v: __m512| {
        // SAFETY: both types are 64 bytes without invalid values.
        unsafe { core::mem::transmute::<__m512, __m512bh>(v) }
    };
    // SAFETY: by this function's contract.
    unsafe { _mm512_dpbf16_ps(sum, pairs(a), pairs(b)) }
}

struct Bf16;

impl Lines for Bf16 {
    const LINE: usize = 64;
    const WORDS: usize = 1;
    type Words = [__m512; 1];

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [__m512; 1] {
        // SAFETY: by the trait's contract.
        unsafe { [_mm512_loadu_ps(from.cast())] }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: by the trait's contract.
        unsafe { dot(sum, a, b) }
    }
}

/// The high or the low byte of every bf16 from 0 to 127.
const fn table(high: bool) -> [u8; 128] {
    let mut bytes = [0; 128];
    let mut i = 0;
    while i < 128 {
        // Whole numbers below 256 need no more than bf16's eight bits.
        let bits = (i as f32).to_bits() >> 16;
        bytes[i] = if high { (bits >> 8) as u8 } else { bits as u8 };
        i += 1;
    }
    bytes
}

static HIGH: [u8; 128] = table(true);
static LOW: [u8; 128] = table(false);

struct I8;

impl Lines for I8 {
    const LINE: usize = 64;
    const WORDS: usize = 2;
    type Words = [__m512; 2];

    /// Looks the magnitudes up as bf16, puts the signs back, and unpacks two lines of pairs.
    #[inline(always)]
    unsafe fn load(from: *const u8) -> [__m512; 2] {
        // SAFETY: by the trait's contract; the tables have 128 bytes.
        unsafe {
            let bytes = _mm512_loadu_si512(from.cast());
            let look_up = |table: &[u8; 128]| -> __m512i {
                let low = _mm512_loadu_si512(table.as_ptr().cast());
                let high = _mm512_loadu_si512(table.as_ptr().add(64).cast());
                _mm512_permutex2var_epi8(low, bytes, high)
            };
            let low = look_up(&LOW);
            // high | (bytes & 0x80)
            let sign = _mm512_set1_epi8(-128);
            let high = _mm512_ternarylogic_epi32::<0xF8>(look_up(&HIGH), bytes, sign);
            [
                _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high)),
                _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: by the trait's contract.
        unsafe { dot(sum, a, b) }
    }
}

/// `M` rows by `V` groups. `IN_GROUPS`: A is in groups of 16 rows.
///
/// # Safety
/// The block's operands exist; `M <= b.m`, `V == b.groups`.
#[inline(always)]
unsafe fn tile<L: Lines, const M: usize, const V: usize, const IN_GROUPS: bool>(
    b: &Block,
    a: *const f32,
    c: *mut f32,
) {
    // SAFETY: by this function's contract; the last group's columns are masked.
    unsafe {
        let (row, word) = if IN_GROUPS { (1, GROUP) } else { (b.a_row.unwrap_or_default(), 1) };
        let last = super::pack::first(b.columns - (V - 1) * GROUP);
        let mask = |v: usize| -> __mmask16 { if v + 1 == V { last } else { u16::MAX } };
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        if b.resume {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_maskz_loadu_ps(mask(v), c.add(m * b.c_row + v * GROUP));
                }
            }
        }
        let (mut a, mut lines) = (a, b.b);
        for _ in 0..b.steps {
            let mut words = [L::load(lines); V];
            for (v, words) in words.iter_mut().enumerate().skip(1) {
                *words = L::load(lines.add(v * L::LINE));
            }
            for w in 0..L::WORDS {
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(m * row + w * word));
                    for (sum, words) in sums.iter_mut().zip(&words) {
                        *sum = L::add(*sum, x, words.as_ref()[w]);
                    }
                }
            }
            a = a.add(L::WORDS * word);
            lines = lines.add(V * L::LINE);
        }
        let column =
            |from: *const f32, v: usize| _mm512_maskz_loadu_ps(mask(v), from.add(v * GROUP));
        if !b.scales.is_null() {
            for sums in &mut sums {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_mul_ps(*sum, column(b.scales, v));
                }
            }
        }
        if !b.bias.is_null() {
            for sums in &mut sums {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_add_ps(*sum, column(b.bias, v));
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let to = c.add(m * b.c_row + v * GROUP);
                if mask(v) == u16::MAX {
                    _mm512_storeu_ps(to, sum);
                } else {
                    _mm512_mask_storeu_ps(to, mask(v), sum);
                }
            }
        }
    }
}

/// All rows by `V` groups.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn rows<L: Lines, const V: usize, const IN_GROUPS: bool>(b: &Block) {
    // SAFETY: rows `r .. r + M` are below `b.m`.
    unsafe {
        for r in (0..b.m).step_by(ROWS) {
            let a = match b.a_row {
                Some(row) => b.a.add(r * row),
                None => b.a.add(r / GROUP * b.a_group + r % GROUP),
            };
            let c = b.c.add(r * b.c_row);
            match b.m - r {
                1 => tile::<L, 1, V, IN_GROUPS>(b, a, c),
                2 => tile::<L, 2, V, IN_GROUPS>(b, a, c),
                3 => tile::<L, 3, V, IN_GROUPS>(b, a, c),
                4 => tile::<L, 4, V, IN_GROUPS>(b, a, c),
                5 => tile::<L, 5, V, IN_GROUPS>(b, a, c),
                6 => tile::<L, 6, V, IN_GROUPS>(b, a, c),
                7 => tile::<L, 7, V, IN_GROUPS>(b, a, c),
                _ => tile::<L, 8, V, IN_GROUPS>(b, a, c),
            }
        }
    }
}

/// # Safety
/// As [`tile`]; A lies as `IN_GROUPS` says.
#[inline(always)]
unsafe fn panel<L: Lines, const IN_GROUPS: bool>(b: &Block) {
    const { assert!(PANEL == 3) };
    // SAFETY: by this function's contract.
    unsafe {
        match b.groups {
            1 => rows::<L, 1, IN_GROUPS>(b),
            2 => rows::<L, 2, IN_GROUPS>(b),
            _ => rows::<L, 3, IN_GROUPS>(b),
        }
    }
}

/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn run_f32(b: &Block) {
    // SAFETY: by this function's contract.
    unsafe { if b.a_row.is_some() { panel::<F32, false>(b) } else { panel::<F32, true>(b) } }
}

/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,f16c")]
unsafe fn run_f16(b: &Block) {
    // SAFETY: by this function's contract.
    unsafe { panel::<F16, false>(b) }
}

/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
unsafe fn run_bf16(b: &Block) {
    // SAFETY: by this function's contract.
    unsafe { if b.a_row.is_some() { panel::<Bf16, false>(b) } else { panel::<Bf16, true>(b) } }
}

/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx512vbmi")]
unsafe fn run_i8(b: &Block) {
    // SAFETY: by this function's contract.
    unsafe { panel::<I8, false>(b) }
}

/// Computes one block.
///
/// # Safety
/// All that the block describes exists, nothing else touches its part of C, and
/// [`Format::has_kernel`] holds. A is in rows where the format is [`Format::F16`] or
/// [`Format::I8`].
pub(super) unsafe fn run(format: Format, b: &Block) {
    debug_assert!(b.columns > (b.groups - 1) * GROUP && b.columns <= b.groups * GROUP);
    // SAFETY: by this function's contract.
    unsafe {
        match format {
            Format::F32 => run_f32(b),
            Format::F16 => run_f16(b),
            Format::Bf16 => run_bf16(b),
            Format::I8 => run_i8(b),
        }
    }
}
