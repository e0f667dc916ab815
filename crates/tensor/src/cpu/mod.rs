//! The CPU backend: f32, vectorised for the processor that it finds, on a thread pool of its own.
//!
//! Results depend on shapes and values alone, not on the number of threads, except for the f32
//! products that the `gemm` crate makes: these repeat bit for bit for a given number, or with
//! [`CpuOptions::deterministic`] for any.

mod activation;
mod attention;
mod cached;
mod embedding;
mod loss;
mod matmul;
mod matrix;
mod norm;
mod optimizer;
mod pages;
mod panels;
mod pool;
mod rotary;
pub mod simd;
mod tile;

use std::ops::Range;

use crate::backend::{AdamW, Backend, TensorError};
use crate::dtype::{DType, MatmulPrecision};
use crate::sampling::{Draw, choose};
use crate::shape::{Attention, CachedAttention, CachedSegment, Linear, Loss, Normalise, Rotary};
pub use matrix::CpuMatrix;
use pool::Pool;

/// One cache line of f32: buffers are made of these, so that they are aligned to 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; Line::ELEMENTS]);

impl Line {
    const ELEMENTS: usize = 16;
}

/// A flat allocation of f32, aligned to 64 bytes.
pub struct CpuBuffer {
    lines: Vec<Line>,
    elements: usize,
}

#[allow(unsafe_code, reason = "a vector of aligned lines is seen as its elements")]
impl CpuBuffer {
    /// Returns the elements.
    #[must_use]
    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: `Line` is `repr(C)` around f32 without padding, and `elements` fit in `lines`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.elements) }
    }

    /// Returns the elements, to be written.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as above; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.elements) }
    }
}

/// How a [`Cpu`] works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuOptions {
    /// Threads of its own, at least 1; with one, it uses the caller's.
    pub threads: usize,
    /// What matrix products of [`Backend::linear`] and its gradients round their factors to.
    pub matmul: MatmulPrecision,
    /// Whether no bit may depend on the number of threads. It costs a few percent of the products
    /// that the `gemm` crate makes.
    pub deterministic: bool,
}

/// The CPU as a device: one rank's share of its cores.
pub struct Cpu {
    pool: Pool,
    products: matmul::Products,
}

impl Cpu {
    /// Creates a backend with `threads` threads of its own; with one, it uses the caller's.
    ///
    /// # Errors
    /// [`TensorError::Threads`].
    pub fn new(threads: usize) -> Result<Self, TensorError> {
        Self::with_options(CpuOptions { threads, ..CpuOptions::default() })
    }

    /// Creates a backend.
    ///
    /// # Errors
    /// [`TensorError::Threads`].
    pub fn with_options(options: CpuOptions) -> Result<Self, TensorError> {
        let CpuOptions { threads, matmul, deterministic } = options;
        let products = matmul::Products { precision: matmul, deterministic };
        Ok(Self { pool: Pool::new(threads)?, products })
    }

    /// Returns what matrix products round their factors to.
    #[must_use]
    pub fn matmul_precision(&self) -> MatmulPrecision {
        self.products.precision
    }

    /// Returns the number of threads that operations are spread over.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Reads values as fast as memory gives them, and returns a sum that depends on them all.
    pub(crate) fn read_through(&self, values: &[f32]) -> f32 {
        optimizer::read_through(&self.pool, values)
    }

    /// Returns the vector instructions in use, for reports.
    #[must_use]
    pub fn instructions() -> &'static str {
        match simd::level() {
            simd::Level::Avx512Bf16 => "avx512 with bf16",
            simd::Level::Avx512 => "avx512",
            simd::Level::Avx2 => "avx2",
            simd::Level::Plain => "plain",
        }
    }
}

/// Elements that one task handles in operations without rows: 16 Ki, half of an L2 way's worth.
const GRAIN: usize = 16 << 10;

impl Backend for Cpu {
    type Buffer = CpuBuffer;
    type View<'a> = &'a [f32];
    type ViewMut<'a> = &'a mut [f32];
    type Matrix = CpuMatrix;

    fn alloc(&self, elements: usize) -> Result<CpuBuffer, TensorError> {
        let count = elements.div_ceil(Line::ELEMENTS);
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).map_err(|_| TensorError::OutOfMemory { elements })?;
        pages::advise(lines.spare_capacity_mut());
        lines.resize(count, Line([0.0; Line::ELEMENTS]));
        Ok(CpuBuffer { lines, elements })
    }

    fn scratch_bytes(&self) -> usize {
        self.pool.scratch_bytes()
    }

    fn elements(&self, buffer: &CpuBuffer) -> usize {
        buffer.elements
    }

    fn view<'a>(&self, buffer: &'a CpuBuffer, range: Range<usize>) -> &'a [f32] {
        &buffer.as_slice()[range]
    }

    fn view_mut<'a>(&self, buffer: &'a mut CpuBuffer, range: Range<usize>) -> &'a mut [f32] {
        &mut buffer.as_mut_slice()[range]
    }

    fn split_mut<'a>(
        &self,
        view: Self::ViewMut<'a>,
        at: usize,
    ) -> (Self::ViewMut<'a>, Self::ViewMut<'a>) {
        view.split_at_mut(at)
    }

    fn as_view<'a>(&self, view: &'a Self::ViewMut<'_>) -> Self::View<'a> {
        view
    }

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }

    fn read(&self, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn write(&self, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn copy(&self, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn on_host<R>(&self, values: &mut [f32], f: impl FnOnce(&mut [f32]) -> R) -> R {
        f(values)
    }

    fn fill(&self, to: &mut [f32], value: f32) {
        to.fill(value);
    }

    fn linear(&self, s: Linear, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
        matmul::linear(&self.pool, self.products, s, x, w, bias, y);
    }

    fn linear_grad_input(&self, s: Linear, dy: &[f32], w: &[f32], dx: &mut [f32]) {
        matmul::linear_grad_input(&self.pool, self.products, s, dy, w, dx);
    }

    fn linear_grad_weight(
        &self,
        s: Linear,
        x: &[f32],
        dy: &[f32],
        dw: &mut [f32],
        accumulate: bool,
    ) {
        matmul::linear_grad_weight(&self.pool, self.products, s, x, dy, dw, accumulate);
    }

    fn alloc_matrix(&self, dtype: DType, s: Linear) -> Result<CpuMatrix, TensorError> {
        CpuMatrix::new(self, dtype, s)
    }

    fn write_matrix(&self, from: &[f32], to: &mut CpuMatrix) {
        to.write(&self.pool, from);
    }

    fn matrix_bytes(&self, matrix: &CpuMatrix) -> usize {
        matrix.bytes()
    }

    fn linear_stored(
        &self,
        rows: usize,
        x: &[f32],
        w: &CpuMatrix,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        w.linear(&self.pool, rows, x, bias, y);
    }

    fn embed_stored(&self, indices: &[u32], offset: usize, table: &CpuMatrix, out: &mut [f32]) {
        table.embed(indices, offset, out);
    }

    fn add_column_sums(&self, rows: usize, columns: usize, values: &[f32], sums: &mut [f32]) {
        norm::add_column_sums(&self.pool, rows, columns, values, sums);
    }

    fn add(&self, a: &[f32], b: &[f32], bias: Option<&[f32]>, sum: &mut [f32]) {
        norm::add(&self.pool, a, b, bias, sum);
    }

    fn norm(
        &self,
        s: Normalise,
        x: &[f32],
        gain: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
        stats: &mut [f32],
    ) {
        norm::norm(&self.pool, s, x, gain, bias, y, stats);
    }

    fn add_norm(
        &self,
        s: Normalise,
        x: &[f32],
        branch: &[f32],
        branch_bias: Option<&[f32]>,
        sum: &mut [f32],
        gain: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
        stats: &mut [f32],
    ) {
        norm::add_norm(&self.pool, s, x, branch, branch_bias, sum, gain, bias, y, stats);
    }

    fn norm_grad(
        &self,
        s: Normalise,
        dy: &[f32],
        x: &[f32],
        gain: &[f32],
        stats: &[f32],
        dx: &mut [f32],
        dgain: &mut [f32],
        dbias: Option<&mut [f32]>,
    ) {
        norm::norm_grad(&self.pool, s, dy, x, gain, stats, dx, dgain, dbias);
    }

    fn rotary(&self, s: Rotary, table: &[f32], positions: &[u32], x: &mut [f32]) {
        rotary::rotary(&self.pool, s, table, positions, x);
    }

    fn attention(&self, s: Attention, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
        attention::attention(&self.pool, s, qkv, out, lse);
    }

    fn attention_grad(
        &self,
        s: Attention,
        qkv: &[f32],
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
        dqkv: &mut [f32],
    ) {
        attention::attention_grad(&self.pool, s, qkv, out, lse, dout, dqkv);
    }

    fn cache_formats(&self) -> &'static [DType] {
        &[DType::F32, DType::Bf16, DType::F16]
    }

    fn cache_write(
        &self,
        s: CachedAttention,
        qkv: &[f32],
        slots: &[u32],
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        cached::write(&self.pool, s, qkv, slots, keys, values);
    }

    fn cached_attention(
        &self,
        s: CachedAttention,
        segments: &[CachedSegment<'_>],
        qkv: &[f32],
        keys: &[f32],
        values: &[f32],
        out: &mut [f32],
    ) {
        cached::attention(&self.pool, s, segments, qkv, keys, values, out);
    }

    fn gelu(&self, x: &[f32], y: &mut [f32]) {
        activation::gelu(&self.pool, x, y);
    }

    fn gelu_grad(&self, x: &[f32], dy: &mut [f32]) {
        activation::gelu_grad(&self.pool, x, dy);
    }

    fn swiglu(&self, width: usize, gate_up: &[f32], y: &mut [f32]) {
        activation::swiglu(&self.pool, width, gate_up, y);
    }

    fn swiglu_grad(&self, width: usize, gate_up: &mut [f32], dy: &[f32]) {
        activation::swiglu_grad(&self.pool, width, gate_up, dy);
    }

    fn embed(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        table: &[f32],
        out: &mut [f32],
        accumulate: bool,
    ) {
        embedding::embed(width, indices, offset, table, out, accumulate);
    }

    fn embed_grad(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        dy: &[f32],
        dtable: &mut [f32],
    ) {
        embedding::embed_grad(width, indices, offset, dy, dtable);
    }

    fn gather_rows(&self, width: usize, indices: &[u32], from: &[f32], out: &mut [f32]) {
        for (row, index) in out.chunks_exact_mut(width).zip(indices) {
            let start = *index as usize * width;
            row.copy_from_slice(&from[start..start + width]);
        }
    }

    fn cross_entropy(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        logits: &mut [f32],
        losses: &mut [f32],
    ) {
        loss::cross_entropy(&self.pool, s, targets, scale, logits, losses);
    }

    fn row_max(&self, s: Loss, logits: &[f32], max: &mut [f32]) {
        loss::row_max(&self.pool, s, logits, max);
    }

    fn partial_cross_entropy(
        &self,
        s: Loss,
        targets: &[u32],
        logits: &[f32],
        max: &[f32],
        sums: &mut [f32],
    ) {
        loss::partial(&self.pool, s, targets, logits, max, sums);
    }

    fn partial_cross_entropy_grad(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        max: &[f32],
        sums: &[f32],
        logits: &mut [f32],
    ) {
        loss::partial_grad(&self.pool, s, targets, scale, max, sums, logits);
    }

    fn sample(
        &self,
        columns: usize,
        used: usize,
        logits: &[f32],
        draws: &[Draw],
        tokens: &mut [u32],
    ) -> bool {
        assert!(used <= columns && logits.len() == draws.len() * columns, "sample");
        assert_eq!(tokens.len(), draws.len(), "sample");
        self.pool.each(tokens, |row, token| {
            *token = choose(&draws[row], &logits[row * columns..][..used]);
        });
        true
    }

    fn sum_squares(&self, values: &[f32]) -> f64 {
        optimizer::sum_squares(&self.pool, values)
    }

    fn adamw(
        &self,
        step: AdamW,
        parameters: &mut [f32],
        copy: Option<&mut [f32]>,
        gradients: &[f32],
        first: &mut [f32],
        second: &mut [f32],
    ) {
        optimizer::adamw(&self.pool, step, parameters, gradients, first, second);
        if let Some(copy) = copy {
            copy.copy_from_slice(parameters);
        }
    }
}
