//! The operations that an engine asks of a device.
//!
//! Buffers are flat and belong to the device; they hold f32, or what a device keeps of activations
//! ([`Backend::alloc_activation`]). Operations work on views of them, so that parameters, gradients and activations can be parts of a few large buffers planned once.
//! Shapes come as values, are checked by assertion (a wrong one is a bug in the engine), and
//! follow the dimension letters of the crate. Nothing here returns before its result may be used
//! by the next call on the same backend; results reach the host through [`Backend::read`],
//! [`Backend::on_host`] and the functions that return numbers.

use std::ops::Range;

use crate::dtype::DType;
use crate::sampling::Draw;
use crate::shape::{Attention, CachedAttention, CachedSegment, Linear, Loss, Normalise, Rotary};

/// Why a device could not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// Memory ran out.
    #[error("no memory for {elements} elements of f32")]
    OutOfMemory {
        /// How many were asked for.
        elements: usize,
    },
    /// The threads could not be started.
    #[error("cannot start {threads} threads: {message}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// The system's words.
        message: String,
    },
    /// A device failed; what it holds is lost.
    #[error("{operation}: {message}")]
    Device {
        /// What was asked of it, with its shape.
        operation: String,
        /// What it or its driver says.
        message: String,
    },
}

/// How a number becomes one of fewer bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rounding {
    /// To the nearest, ties to even.
    #[default]
    Nearest,
    /// Up or down by chance, the likelier the nearer, so that it is right on average
    /// ([`crate::reference::bf16_by_chance`]). The chance is a function of the number, its place and a seed:
    /// whoever rounds the same numbers again gets the same.
    Stochastic {
        /// The run's seed.
        seed: u64,
        /// The place of the first element.
        first: u64,
    },
}

/// One step of AdamW over a flat range of parameters (Loshchilov and Hutter 2019).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// The step's learning rate.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1 - beta1 ^ step, with steps counted from 1.
    pub correction1: f32,
    /// 1 - beta2 ^ step.
    pub correction2: f32,
    /// Factor on every gradient: the clipping.
    pub gradient_scale: f32,
    /// How the copy of the parameters is rounded.
    pub rounding: Rounding,
}

/// A device that holds f32 buffers and computes on them.
pub trait Backend: Send + Sync + 'static {
    /// A flat allocation of f32 on the device.
    type Buffer: Send + Sync;
    /// A part of a buffer that is read.
    type View<'a>: Copy + Send + Sync;
    /// A part of a buffer that is written.
    type ViewMut<'a>: Send;
    /// A matrix that is only multiplied by, in the device's own order and number format.
    type Matrix: Send + Sync;

    /// Allocates zeros.
    ///
    /// # Errors
    /// [`TensorError::OutOfMemory`].
    fn alloc(&self, elements: usize) -> Result<Self::Buffer, TensorError>;

    /// Allocates zeros that hold activations, their gradients, or a copy of the parameters for
    /// products. A backend may keep them as bf16; every operation that takes activations then
    /// takes such views too, and rounds what it writes to them. By default they are f32.
    ///
    /// # Errors
    /// [`TensorError::OutOfMemory`].
    fn alloc_activation(&self, elements: usize) -> Result<Self::Buffer, TensorError> {
        self.alloc(elements)
    }

    /// Returns how [`Backend::alloc_activation`] keeps values.
    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    /// Returns the memory of a buffer in bytes.
    fn bytes(&self, buffer: &Self::Buffer) -> usize {
        self.elements(buffer) * size_of::<f32>()
    }

    /// Returns the memory that operations keep between calls, in bytes: it grows up to what the largest
    /// of them needed.
    fn scratch_bytes(&self) -> usize {
        0
    }

    /// Returns the number of elements of a buffer.
    fn elements(&self, buffer: &Self::Buffer) -> usize;

    /// Returns a part of a buffer, to be read.
    fn view<'a>(&self, buffer: &'a Self::Buffer, range: Range<usize>) -> Self::View<'a>;

    /// Returns a part of a buffer, to be written.
    fn view_mut<'a>(&self, buffer: &'a mut Self::Buffer, range: Range<usize>) -> Self::ViewMut<'a>;

    /// Cuts a written view in two at element `at`.
    fn split_mut<'a>(
        &self,
        view: Self::ViewMut<'a>,
        at: usize,
    ) -> (Self::ViewMut<'a>, Self::ViewMut<'a>);

    /// Sees a written view as one that is read.
    fn as_view<'a>(&self, view: &'a Self::ViewMut<'_>) -> Self::View<'a>;

    /// Runs `f` where the device's operations start cheapest (on the CPU: inside the pool). Every
    /// operation is also legal outside.
    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        f()
    }

    /// Runs `f`, whose operations are one step that comes again and again: a device may start them all at
    /// once. What `f` reads back or writes from the host is as it would be without. It drops no buffer, and
    /// leaves the exchange of values between devices to others.
    fn together<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    /// Tells the first failure since the backend was made. Operations return nothing: after a
    /// failure they do nothing, and what was read since is worthless, so whoever has read asks.
    ///
    /// # Errors
    /// [`TensorError::Device`].
    fn status(&self) -> Result<(), TensorError> {
        Ok(())
    }

    /// Copies a view to the host.
    fn read(&self, from: Self::View<'_>, to: &mut [f32]);

    /// Copies host values to a view.
    fn write(&self, from: &[f32], to: Self::ViewMut<'_>);

    /// Copies a view to another of the same length.
    fn copy(&self, from: Self::View<'_>, to: Self::ViewMut<'_>);

    /// As [`Backend::copy`], to a view of fewer bits. What keeps activations as f32 has none.
    fn copy_rounded(&self, from: Self::View<'_>, to: Self::ViewMut<'_>, _rounding: Rounding) {
        self.copy(from, to);
    }

    /// Gives `f` the values in host memory and takes back what it left there: for collectives.
    fn on_host<R>(&self, values: Self::ViewMut<'_>, f: impl FnOnce(&mut [f32]) -> R) -> R;

    /// Sets every element.
    fn fill(&self, to: Self::ViewMut<'_>, value: f32);

    /// Computes `y = x . w (+ bias)`. Few rows read each weight once.
    fn linear(
        &self,
        shape: Linear,
        x: Self::View<'_>,
        w: Self::View<'_>,
        bias: Option<Self::View<'_>>,
        y: Self::ViewMut<'_>,
    );

    /// Computes the gradient of [`Backend::linear`]'s input from that of its output.
    fn linear_grad_input(
        &self,
        shape: Linear,
        dy: Self::View<'_>,
        w: Self::View<'_>,
        dx: Self::ViewMut<'_>,
    );

    /// Computes the gradient of [`Backend::linear`]'s weights, or adds it to what is there.
    fn linear_grad_weight(
        &self,
        shape: Linear,
        x: Self::View<'_>,
        dy: Self::View<'_>,
        dw: Self::ViewMut<'_>,
        accumulate: bool,
    );

    /// Computes `up = x . w (+ bias)` and `act = gelu(up)` in one operation, where the backend has
    /// one for these operands; returns whether it did, and else has done nothing. GELU is applied to
    /// the sum before it is rounded.
    fn linear_gelu(
        &self,
        _shape: Linear,
        _x: Self::View<'_>,
        _w: Self::View<'_>,
        _bias: Option<Self::View<'_>>,
        _up: Self::ViewMut<'_>,
        _act: Self::ViewMut<'_>,
    ) -> bool {
        false
    }

    /// Computes [`Backend::linear_grad_input`] and then [`Backend::gelu_grad`] at `up` in one
    /// operation, where the backend has one; returns whether it did.
    fn linear_grad_input_gelu(
        &self,
        _shape: Linear,
        _dy: Self::View<'_>,
        _w: Self::View<'_>,
        _up: Self::View<'_>,
        _dx: Self::ViewMut<'_>,
    ) -> bool {
        false
    }

    /// Allocates the matrix of a linear layer, zeros, for products alone, stored as `dtype`. Rows of
    /// `s` do not matter.
    ///
    /// f16 and f32 are multiplied by f32. With bf16 the other factor is rounded to bf16. With int8 it is
    /// rounded to bf16 too or, where that is faster, to 16 bits of its row's greatest; int8 has one scale for
    /// each output, its greatest weight over 127. Sums are f32, or exact and then f32.
    ///
    /// # Errors
    /// [`TensorError::OutOfMemory`].
    fn alloc_matrix(&self, dtype: DType, s: Linear) -> Result<Self::Matrix, TensorError>;

    /// Stores host values, `[output, input]` or `[input, output]` as the matrix's layout says.
    fn write_matrix(&self, from: &[f32], to: &mut Self::Matrix);

    /// Returns the memory that a stored matrix takes, scales included.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;

    /// Computes `y = x . w (+ bias)` for `rows` rows, reading each weight once. A row's result does
    /// not depend on the other rows.
    fn linear_stored(
        &self,
        rows: usize,
        x: Self::View<'_>,
        w: &Self::Matrix,
        bias: Option<Self::View<'_>>,
        y: Self::ViewMut<'_>,
    );

    /// Copies to `out` the weights of outputs `indices[i] - offset` of a stored matrix, or zeros
    /// where that is outside it: a table of embeddings.
    fn embed_stored(
        &self,
        indices: &[u32],
        offset: usize,
        table: &Self::Matrix,
        out: Self::ViewMut<'_>,
    );

    /// Adds the sums of the columns of `[rows, columns]` to `sums`: the gradient of a bias.
    fn add_column_sums(
        &self,
        rows: usize,
        columns: usize,
        values: Self::View<'_>,
        sums: Self::ViewMut<'_>,
    );

    /// Computes `sum = a + b (+ bias)`, with `bias` one row that is added to every row.
    fn add(
        &self,
        a: Self::View<'_>,
        b: Self::View<'_>,
        bias: Option<Self::View<'_>>,
        sum: Self::ViewMut<'_>,
    );

    /// Normalises every row of `x`. `stats` is `[2, rows]`: means (0 for RMS), then reciprocal
    /// deviations; the gradient needs them.
    fn norm(
        &self,
        shape: Normalise,
        x: Self::View<'_>,
        gain: Self::View<'_>,
        bias: Option<Self::View<'_>>,
        y: Self::ViewMut<'_>,
        stats: Self::ViewMut<'_>,
    );

    /// Computes `sum = x + branch (+ branch_bias)` and normalises it, in one pass.
    #[expect(clippy::too_many_arguments, reason = "a fused operation has many operands")]
    fn add_norm(
        &self,
        shape: Normalise,
        x: Self::View<'_>,
        branch: Self::View<'_>,
        branch_bias: Option<Self::View<'_>>,
        sum: Self::ViewMut<'_>,
        gain: Self::View<'_>,
        bias: Option<Self::View<'_>>,
        y: Self::ViewMut<'_>,
        stats: Self::ViewMut<'_>,
    );

    /// Adds the gradient of a normalisation's input to `dx`, and those of gain and bias to
    /// `dgain` and `dbias`.
    #[expect(clippy::too_many_arguments, reason = "a fused operation has many operands")]
    fn norm_grad(
        &self,
        shape: Normalise,
        dy: Self::View<'_>,
        x: Self::View<'_>,
        gain: Self::View<'_>,
        stats: Self::View<'_>,
        dx: Self::ViewMut<'_>,
        dgain: Self::ViewMut<'_>,
        dbias: Option<Self::ViewMut<'_>>,
    );

    /// Rotates heads in place. `table` is `[positions, E]`: E / 2 cosines, then E / 2 sines.
    /// `positions` holds one entry for each row.
    fn rotary(&self, shape: Rotary, table: Self::View<'_>, positions: &[u32], x: Self::ViewMut<'_>);

    /// Computes causal attention in tiles. `lse` is `[B, H, T]`: the logarithm of each row's sum
    /// of exponentials, kept for the gradient.
    fn attention(
        &self,
        shape: Attention,
        qkv: Self::View<'_>,
        out: Self::ViewMut<'_>,
        lse: Self::ViewMut<'_>,
    );

    /// Computes the gradient of [`Backend::attention`]'s `qkv`, recomputing the probabilities.
    fn attention_grad(
        &self,
        shape: Attention,
        qkv: Self::View<'_>,
        out: Self::View<'_>,
        lse: Self::View<'_>,
        dout: Self::View<'_>,
        dqkv: Self::ViewMut<'_>,
    );

    /// Tells how the cache of keys and values can be stored, the default first.
    fn cache_formats(&self) -> &'static [DType] {
        &[DType::F32]
    }

    /// Stores the keys and values of new rows in the cache, rounded to the nearest number of its format (in
    /// f16 to the greatest finite one beyond that). `slots` holds, for each row, its
    /// block times [`crate::KV_BLOCK`] plus its place in the block.
    fn cache_write(
        &self,
        shape: CachedAttention,
        qkv: Self::View<'_>,
        slots: &[u32],
        keys: Self::ViewMut<'_>,
        values: Self::ViewMut<'_>,
    );

    /// Computes the attention of new rows to their own sequences' caches.
    fn cached_attention(
        &self,
        shape: CachedAttention,
        segments: &[CachedSegment<'_>],
        qkv: Self::View<'_>,
        keys: Self::View<'_>,
        values: Self::View<'_>,
        out: Self::ViewMut<'_>,
    );

    /// Computes GELU, tanh form.
    fn gelu(&self, x: Self::View<'_>, y: Self::ViewMut<'_>);

    /// Multiplies `dy` by GELU's slope at `x`: the gradient of its output becomes that of its input.
    fn gelu_grad(&self, x: Self::View<'_>, dy: Self::ViewMut<'_>);

    /// Computes `silu(gate) * up` from rows `[gate F, up F]`.
    fn swiglu(&self, width: usize, gate_up: Self::View<'_>, y: Self::ViewMut<'_>);

    /// Replaces [`Backend::swiglu`]'s input by its gradient.
    fn swiglu_grad(&self, width: usize, gate_up: Self::ViewMut<'_>, dy: Self::View<'_>);

    /// Copies, or with `accumulate` adds, rows of `table` to `out`: row `indices[i] - offset`, or
    /// zeros where that is outside the table.
    fn embed(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        table: Self::View<'_>,
        out: Self::ViewMut<'_>,
        accumulate: bool,
    );

    /// Adds the rows of `dy` to the rows of `dtable` that [`Backend::embed`] took, in order.
    fn embed_grad(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        dy: Self::View<'_>,
        dtable: Self::ViewMut<'_>,
    );

    /// Copies the rows `indices` of `[_, width]` to `out`.
    fn gather_rows(
        &self,
        width: usize,
        indices: &[u32],
        from: Self::View<'_>,
        out: Self::ViewMut<'_>,
    );

    /// Computes each row's cross-entropy over a whole vocabulary into `losses`, and replaces the
    /// logits by `scale` times their gradient. A `scale` of 0 leaves the logits alone.
    fn cross_entropy(
        &self,
        shape: Loss,
        targets: &[u32],
        scale: f32,
        logits: Self::ViewMut<'_>,
        losses: Self::ViewMut<'_>,
    );

    /// Writes the greatest used logit of each row.
    fn row_max(&self, shape: Loss, logits: Self::View<'_>, max: Self::ViewMut<'_>);

    /// Writes, as `[2, rows]`, each row's sum of `exp(logit - max)` and its target's
    /// `logit - max`, 0 when the target is outside this slice. Summed over the slices, they give the loss
    /// `ln(sum) - target`.
    fn partial_cross_entropy(
        &self,
        shape: Loss,
        targets: &[u32],
        logits: Self::View<'_>,
        max: Self::View<'_>,
        sums: Self::ViewMut<'_>,
    );

    /// Replaces a slice's logits by `scale` times their gradient, given each row's maximum and
    /// sum over the whole vocabulary.
    fn partial_cross_entropy_grad(
        &self,
        shape: Loss,
        targets: &[u32],
        scale: f32,
        max: Self::View<'_>,
        sums: Self::View<'_>,
        logits: Self::ViewMut<'_>,
    );

    /// Chooses a token for each row of `[rows, columns]` logits, as [`crate::sampling::choose`] does, among
    /// the first `used` columns; returns whether it did. What does not choose on the device leaves it to
    /// who reads the logits.
    fn sample(
        &self,
        _columns: usize,
        _used: usize,
        _logits: Self::View<'_>,
        _draws: &[Draw],
        _tokens: &mut [u32],
    ) -> bool {
        false
    }

    /// Returns the sum of squares. The order of additions depends on the length alone.
    fn sum_squares(&self, values: Self::View<'_>) -> f64;

    /// Updates parameters and moments in one pass; with a `copy`, writes the new parameters to it
    /// too, as it keeps them.
    fn adamw(
        &self,
        step: AdamW,
        parameters: Self::ViewMut<'_>,
        copy: Option<Self::ViewMut<'_>>,
        gradients: Self::View<'_>,
        first: Self::ViewMut<'_>,
        second: Self::ViewMut<'_>,
    );
}
