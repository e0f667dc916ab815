//! Vector instructions behind one trait, chosen when the program runs.
//!
//! A kernel is written once, generic over [`Simd`], and [`dispatched!`] compiles it for AVX-512,
//! for AVX2 and plainly. A value of a vector type exists only where its instructions do.
#![allow(
    unsafe_code,
    reason = "vector intrinsics; every kernel states why its accesses are in bounds"
)]

use std::sync::atomic::{AtomicU8, Ordering};

use super::panels::narrow::{bf16_value, f16_value};

/// Vectors of f32, and the operations that kernels need.
pub(crate) trait Simd: Copy + Send + Sync {
    /// A vector.
    type V: Copy;
    /// Elements of a vector.
    const LANES: usize;
    /// Whether there are 32 registers (24 accumulators fit) or 16 (12 fit).
    const WIDE: bool;
    /// Whether products are added without rounding them first.
    const FUSED: bool;

    /// Returns a vector of equal elements.
    fn splat(self, x: f32) -> Self::V;
    /// Reads `LANES` elements.
    ///
    /// # Safety
    /// `from .. from + LANES` is readable.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// Writes `LANES` elements.
    ///
    /// # Safety
    /// `to .. to + LANES` is writable.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// Reads `LANES` f16.
    ///
    /// # Safety
    /// `from .. from + LANES` is readable.
    unsafe fn load_f16(self, from: *const u16) -> Self::V;
    /// Reads `LANES` bf16.
    ///
    /// # Safety
    /// `from .. from + LANES` is readable.
    unsafe fn load_bf16(self, from: *const u16) -> Self::V;
    /// Returns `a * b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Returns `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// Returns the sum of the elements.
    fn sum(self, v: Self::V) -> f32;
    /// Returns the sums of four vectors, cheaper than one by one.
    #[inline(always)]
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4] {
        v.map(|v| self.sum(v))
    }
}

/// Eight f32 in plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Simd for Plain {
    type V = [f32; 8];
    const LANES: usize = 8;
    const WIDE: bool = false;
    const FUSED: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: the caller vouches for eight elements.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for eight elements.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::V {
        // SAFETY: the caller vouches for eight elements.
        unsafe { from.cast::<[u16; 8]>().read_unaligned() }.map(f16_value)
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::V {
        // SAFETY: the caller vouches for eight elements.
        unsafe { from.cast::<[u16; 8]>().read_unaligned() }.map(bf16_value)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, mut c: Self::V) -> Self::V {
        for i in 0..8 {
            c[i] += a[i] * b[i];
        }
        c
    }
    #[inline(always)]
    fn add(self, mut a: Self::V, b: Self::V) -> Self::V {
        for i in 0..8 {
            a[i] += b[i];
        }
        a
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{
        __m128, __m256, __m512, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_hadd_ps,
        _mm_loadu_si128, _mm_movehl_ps, _mm_shuffle_ps, _mm_storeu_ps, _mm256_add_ps,
        _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
        _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
        _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_add_ps, _mm512_castps512_ps256,
        _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_extractf32x8_ps,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_reduce_add_ps, _mm512_set1_ps, _mm512_slli_epi32,
        _mm512_storeu_ps,
    };

    use super::Simd;

    /// Sixteen f32 in AVX-512.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(());

    impl Avx512 {
        /// # Safety
        /// The processor has AVX-512 F, VL, BW and DQ.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }

    // SAFETY (every block below): an `Avx512` exists only where the processor has the
    // instructions; loads and stores are vouched for by the caller.
    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const WIDE: bool = true;
        const FUSED: bool = true;

        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        unsafe fn load_f16(self, from: *const u16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u16) -> __m512 {
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
        #[inline(always)]
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sum(self, v: __m512) -> f32 {
            unsafe { _mm512_reduce_add_ps(v) }
        }
        #[inline(always)]
        fn sum4(self, v: [__m512; 4]) -> [f32; 4] {
            let half = |v: __m512| unsafe {
                let low = _mm512_castps512_ps256(v);
                quarter(_mm256_add_ps(low, _mm512_extractf32x8_ps::<1>(v)))
            };
            unsafe { add_across(v.map(half)) }
        }
    }

    /// Adds the halves of a vector.
    ///
    /// # Safety
    /// The processor has AVX.
    #[inline(always)]
    unsafe fn quarter(v: __m256) -> __m128 {
        unsafe { _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)) }
    }

    /// Returns each vector's sum.
    ///
    /// # Safety
    /// The processor has AVX.
    #[inline(always)]
    unsafe fn add_across(v: [__m128; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        unsafe {
            let pairs = _mm_hadd_ps(_mm_hadd_ps(v[0], v[1]), _mm_hadd_ps(v[2], v[3]));
            _mm_storeu_ps(sums.as_mut_ptr(), pairs);
        }
        sums
    }

    /// Eight f32 in AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());

    impl Avx2 {
        /// # Safety
        /// The processor has AVX2, FMA and F16C.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }

    // SAFETY (every block below): as for `Avx512`.
    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        const WIDE: bool = false;
        const FUSED: bool = true;

        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(to, v) }
        }
        #[inline(always)]
        unsafe fn load_f16(self, from: *const u16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u16) -> __m256 {
            unsafe {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
        #[inline(always)]
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        fn sum(self, v: __m256) -> f32 {
            unsafe {
                let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
            }
        }
        #[inline(always)]
        fn sum4(self, v: [__m256; 4]) -> [f32; 4] {
            unsafe { add_across(v.map(|v| quarter(v))) }
        }
    }
}

/// Vector instructions, fewest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the target has.
    Plain,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, VL, BW and DQ.
    Avx512,
    /// These, and AVX-512 BF16 and VBMI.
    Avx512Bf16,
}

/// The most that may be used, as a number of [`Level`].
static LIMIT: AtomicU8 = AtomicU8::new(Level::Avx512Bf16 as u8);

/// Forbids this process instructions beyond `level`, so that tests and measurements reach the
/// paths of older processors. The `gemm` crate makes its own choice.
pub fn limit(level: Level) {
    LIMIT.store(level as u8, Ordering::Relaxed);
}

/// Returns the best that this processor has and [`limit`] allows. What the processor has is cached
/// by the standard library.
#[inline]
#[must_use]
pub fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let limit = LIMIT.load(Ordering::Relaxed);
        if limit >= Level::Avx512 as u8
            && std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512dq")
        {
            let more = limit >= Level::Avx512Bf16 as u8
                && std::arch::is_x86_feature_detected!("avx512bf16")
                && std::arch::is_x86_feature_detected!("avx512vbmi");
            return if more { Level::Avx512Bf16 } else { Level::Avx512 };
        }
        if limit >= Level::Avx2 as u8
            && std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("fma")
            && std::arch::is_x86_feature_detected!("f16c")
        {
            return Level::Avx2;
        }
    }
    Level::Plain
}

/// Compiles `body` once for each instruction level, and a function that picks at run time.
///
/// `body` is `#[inline(always)]` and takes the [`Simd`] first. Bodies that leave vectorising to the
/// compiler ignore it; they gain the wider instructions all the same.
macro_rules! dispatched {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path;) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn wide($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: this function runs only on processors with these features.
                    $body(unsafe { $crate::cpu::simd::Avx512::new() }, $($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn narrow($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: as above.
                    $body(unsafe { $crate::cpu::simd::Avx2::new() }, $($arg),*)
                }
                match $crate::cpu::simd::level() {
                    // SAFETY: the processor was asked.
                    $crate::cpu::simd::Level::Avx512 | $crate::cpu::simd::Level::Avx512Bf16 => return unsafe { wide($($arg),*) },
                    // SAFETY: the processor was asked.
                    $crate::cpu::simd::Level::Avx2 => return unsafe { narrow($($arg),*) },
                    $crate::cpu::simd::Level::Plain => {}
                }
            }
            $body($crate::cpu::simd::Plain, $($arg),*)
        }
    };
}
pub(crate) use dispatched;

/// Returns `a * b + c`, in one instruction where `S` has it.
#[inline(always)]
pub(crate) fn fused<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Returns `exp(x)` to within 2 units in the last place, in operations that vectorise. Below -87
/// it is 0 or tiny, above 88 about the greatest finite value.
///
/// Range reduction to +-ln(2)/2 and a polynomial of degree 6, as in the Cephes library.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer.
    let x = if x < 88.0 { x } else { 88.0 };
    let y = if x > -87.0 { x } else { -87.0 };
    let t = fused::<S>(y, std::f32::consts::LOG2_E, MAGIC);
    let n = t - MAGIC;
    let r = fused::<S>(n, 2.121_944_4e-4, fused::<S>(n, -0.693_359_4, y));
    let p = 1.987_569_1e-4;
    let p = fused::<S>(p, r, 1.398_2e-3);
    let p = fused::<S>(p, r, 8.333_452e-3);
    let p = fused::<S>(p, r, 4.166_579_6e-2);
    let p = fused::<S>(p, r, 0.166_666_66);
    let p = fused::<S>(p, r, 0.5);
    let p = fused::<S>(p * r, r, r + 1.0);
    // The low bits of `t` hold n; shifted into the exponent they make 2^n.
    let scale = f32::from_bits((t.to_bits() << 23).wrapping_add(0x3F80_0000));
    if x > -87.0 { p * scale } else { 0.0 }
}

/// Returns the logistic function.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<S>(-x))
}

/// Lanes of the compiler-vectorised sums below.
const SUM_LANES: usize = 16;

/// Returns the sum of `f(i)` over a row, in an order that depends on the length alone.
#[inline(always)]
pub(crate) fn lane_sum(length: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; SUM_LANES];
    let whole = length / SUM_LANES * SUM_LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += SUM_LANES;
    }
    for (l, i) in (whole..length).enumerate() {
        lanes[l] += f(i);
    }
    let mut width = SUM_LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Returns the greatest of a row.
#[inline(always)]
pub(crate) fn lane_max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; SUM_LANES];
    let (whole, rest) = row.as_chunks::<SUM_LANES>();
    for chunk in whole {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = if *x > *lane { *x } else { *lane };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// Returns the greatest magnitude in a row; what is not a number does not count.
#[inline(always)]
pub(crate) fn lane_greatest(row: &[f32]) -> f32 {
    let mut lanes = [0.0f32; SUM_LANES];
    let (whole, rest) = row.as_chunks::<SUM_LANES>();
    for chunk in whole {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if x.abs() > *lane { x.abs() } else { *lane };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = if x.abs() > *lane { x.abs() } else { *lane };
    }
    lanes.into_iter().fold(0.0, |a, b| if b > a { b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_exp(exp: fn(f32) -> f32) {
        let mut worst = 0.0f64;
        for i in -86_000..=87_900 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert!(exp(1000.0).is_finite());
        assert!((exp(0.0) - 1.0).abs() < 1e-7);
    }

    #[test]
    fn exp_is_within_two_units_of_the_exact_value() {
        check_exp(exp::<Plain>);
        #[cfg(target_arch = "x86_64")]
        check_exp(exp::<Avx2>);
    }

    #[test]
    fn sums_and_maxima_take_rows_of_every_length() {
        for n in 0..70 {
            let row: Vec<f32> = (0..n).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
            let sum: f32 = row.iter().sum();
            assert!((lane_sum(n, |i| row[i]) - sum).abs() < 1e-4, "length {n}");
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(lane_max(&row), max, "length {n}");
            let greatest = row.iter().fold(0.0, |g: f32, x| g.max(x.abs()));
            assert_eq!(lane_greatest(&row), greatest, "length {n}");
        }
    }
}
