//! The memory of a training step, planned before the first one: what each micro-batch in flight
//! keeps for its backward pass, and what all share.

use std::ops::Range;

use drumline_mesh::Instruction;
use drumline_spec::{Family, ModelConfig, Recompute};
use drumline_tensor::{Attention, Backend, DType, NormKind, Normalise, Rotary, TensorError};

use crate::layout::{Layout, Split};

/// Elements of the logits that are computed at a time: 32 MiB, so that a large vocabulary's
/// logits never exist for a whole batch.
const LOGITS_MAX: usize = 8 << 20;
/// Rows of logits below which the output projection's gradient would be read and written too often.
const LOGITS_ROWS_MIN: usize = 256;

/// The extents of one rank's work on one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Sequences, B.
    pub batch: usize,
    /// Tokens in each, T.
    pub sequence: usize,
    /// Rows, N = B T.
    pub rows: usize,
    /// Rows of the residual stream on this rank, R: N, or N / t where the tensor group shares them.
    pub own_rows: usize,
    /// The first of them.
    pub own_start: usize,
    /// Width of the residual stream, D.
    pub hidden: usize,
    /// Query heads of this rank, H / t.
    pub heads: usize,
    /// Key and value heads of this rank, K / t.
    pub kv_heads: usize,
    /// Width of a head, E.
    pub head_dim: usize,
    /// Feed-forward width of this rank, F / t.
    pub ffn: usize,
    /// Outputs of the up projection: 2 F / t with a gate, F / t without.
    pub up: usize,
    /// Which normalisation.
    pub norm: NormKind,
    /// Its epsilon.
    pub epsilon: f32,
    /// Whether positions are rotary.
    pub rotary: bool,
}

impl Dims {
    /// Computes the extents.
    #[must_use]
    pub fn new(model: &ModelConfig, split: Split, batch: usize, sequence: usize) -> Self {
        let t = split.tensor;
        let ffn = model.ffn as usize / t;
        let llama = model.family == Family::Llama;
        let rows = batch * sequence;
        let own_rows = if split.shares_rows { rows / t } else { rows };
        Self {
            batch,
            sequence,
            rows,
            own_rows,
            own_start: if split.shares_rows { split.tensor_rank * own_rows } else { 0 },
            hidden: model.hidden as usize,
            heads: model.heads as usize / t,
            kv_heads: model.kv_heads as usize / t,
            head_dim: model.head_dim() as usize,
            ffn,
            up: if llama { 2 * ffn } else { ffn },
            norm: if llama { NormKind::Rms } else { NormKind::Layer },
            epsilon: model.norm_epsilon,
            rotary: llama,
        }
    }

    /// Returns the width of attention's output, H E / t.
    #[must_use]
    pub fn attention_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the width of queries, keys and values.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Returns whether the tensor group shares the rows.
    #[must_use]
    pub fn shares_rows(&self) -> bool {
        self.own_rows < self.rows
    }

    /// Returns where this rank's rows lie in `[N, D]`.
    #[must_use]
    pub fn own(&self) -> Range<usize> {
        self.own_start * self.hidden..(self.own_start + self.own_rows) * self.hidden
    }

    pub(crate) fn attention(&self) -> Attention {
        Attention {
            batch: self.batch,
            sequence: self.sequence,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }

    pub(crate) fn normalise(&self, rows: usize) -> Normalise {
        Normalise { rows, width: self.hidden, kind: self.norm, epsilon: self.epsilon }
    }

    pub(crate) fn rotation(&self, rows: usize, inverse: bool) -> Rotary {
        Rotary {
            rows,
            width: self.qkv_width(),
            heads: self.heads + self.kv_heads,
            head_dim: self.head_dim,
            inverse,
        }
    }
}

/// What one layer makes of one micro-batch and its backward pass needs. What is computed again
/// instead is empty, and borrowed from the memory that all layers share while the layer runs.
pub struct LayerMemory<B: Backend> {
    /// The residual stream before the layer, `[R, D]`.
    pub x: B::Buffer,
    /// Normalised `x`.
    pub a1: B::Buffer,
    /// Its statistics, `[2, R]`.
    pub stats1: B::Buffer,
    /// Queries, keys and values, rotated.
    pub qkv: B::Buffer,
    /// Attention's output, `[N, H E / t]`.
    pub attended: B::Buffer,
    /// Its log-sums, `[B, H / t, T]`.
    pub lse: B::Buffer,
    /// The residual stream between attention and feed-forward, `[R, D]`.
    pub mid: B::Buffer,
    /// Normalised `mid`.
    pub a2: B::Buffer,
    /// Its statistics.
    pub stats2: B::Buffer,
    /// The up projection before the non-linearity, `[N, F / t]` or, with a gate, `[N, 2 F / t]`, which
    /// the backward pass replaces by its gradient.
    pub up: B::Buffer,
    /// After the non-linearity, `[N, F / t]`.
    pub act: B::Buffer,
}

/// A buffer as it is planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) elements: usize,
    /// Whether it holds activations, which a backend may keep as bf16; else it is f32.
    pub(crate) activation: bool,
    /// Whether it is kept from the forward to the backward pass.
    pub(crate) kept: bool,
}

impl Planned {
    fn alloc<B: Backend>(self, b: &B) -> Result<B::Buffer, TensorError> {
        if self.activation { b.alloc_activation(self.elements) } else { b.alloc(self.elements) }
    }

    /// Returns its size where activations are kept as `dtype`.
    pub(crate) fn bytes(self, dtype: DType) -> usize {
        self.elements * if self.activation { dtype } else { DType::F32 }.bytes()
    }
}

/// The buffers of a [`LayerMemory`], in their order. The residual stream and statistics are f32
/// everywhere: what every layer adds to must not lose what it adds.
pub(crate) fn layer_buffers(d: Dims, recompute: Recompute) -> [Planned; 11] {
    let (own, n) = (d.own_rows, d.rows);
    let unless_full = recompute != Recompute::Full;
    let unless_any = recompute == Recompute::None;
    let wide = |elements, kept| Planned { elements, activation: false, kept };
    let activation = |elements, kept| Planned { elements, activation: true, kept };
    [
        wide(own * d.hidden, true),
        activation(own * d.hidden, unless_any),
        wide(2 * own, unless_full),
        activation(n * d.qkv_width(), unless_full),
        activation(n * d.attention_width(), unless_full),
        wide(n * d.heads, unless_full),
        wide(own * d.hidden, unless_full),
        activation(own * d.hidden, unless_any),
        wide(2 * own, unless_full),
        activation(n * d.up, unless_full),
        activation(n * d.ffn, unless_any),
    ]
}

impl<B: Backend> LayerMemory<B> {
    /// Allocates the buffers that are kept, or those that are not.
    fn new(b: &B, d: Dims, recompute: Recompute, kept: bool) -> Result<Self, TensorError> {
        let mut buffers = layer_buffers(d, recompute).into_iter();
        let mut next = || match buffers.next() {
            Some(planned) if planned.kept == kept => planned.alloc(b),
            _ => b.alloc(0),
        };
        // In the order of `layer_buffers`, as fields are evaluated.
        Ok(Self {
            x: next()?,
            a1: next()?,
            stats1: next()?,
            qkv: next()?,
            attended: next()?,
            lse: next()?,
            mid: next()?,
            a2: next()?,
            stats2: next()?,
            up: next()?,
            act: next()?,
        })
    }

    /// Returns the buffers.
    pub(crate) fn buffers(&self) -> [&B::Buffer; 11] {
        let Self { x, a1, stats1, qkv, attended, lse, mid, a2, stats2, up, act } = self;
        [x, a1, stats1, qkv, attended, lse, mid, a2, stats2, up, act]
    }

    /// Exchanges the buffers that are not kept with the shared ones: lends them, and the second
    /// time takes them back.
    pub(crate) fn exchange(&mut self, shared: &mut Option<Self>, recompute: Recompute) {
        let Some(shared) = shared else { return };
        let swap = std::mem::swap::<B::Buffer>;
        swap(&mut self.a1, &mut shared.a1);
        swap(&mut self.a2, &mut shared.a2);
        swap(&mut self.act, &mut shared.act);
        if recompute == Recompute::Full {
            swap(&mut self.stats1, &mut shared.stats1);
            swap(&mut self.qkv, &mut shared.qkv);
            swap(&mut self.attended, &mut shared.attended);
            swap(&mut self.lse, &mut shared.lse);
            swap(&mut self.mid, &mut shared.mid);
            swap(&mut self.stats2, &mut shared.stats2);
            swap(&mut self.up, &mut shared.up);
        }
    }
}

/// What one micro-batch in flight keeps.
pub struct Slot<B: Backend> {
    /// Place of the first of its layers in the layout.
    pub first: usize,
    /// The layers of one chunk of this stage.
    pub layers: Vec<LayerMemory<B>>,
    /// The residual stream after the last of them, `[R, D]`.
    pub out: B::Buffer,
    /// On the last stage: normalised `out`, then the gradient of that.
    pub last: Option<LastMemory<B>>,
}

/// What the last stage keeps.
pub struct LastMemory<B: Backend> {
    /// Normalised output of the last layer, `[R, D]`.
    pub y: B::Buffer,
    /// Its statistics, `[2, R]`.
    pub stats: B::Buffer,
    /// The loss's gradient with respect to `y`.
    pub dy: B::Buffer,
}

/// What micro-batches share.
pub struct Scratch<B: Backend> {
    /// The output of a row-parallel projection, `[N, D]`.
    pub branch: B::Buffer,
    /// The gradient of the residual stream, `[R, D]`.
    pub gradient: B::Buffer,
    /// The gradient of a normalised input, `[N, D]`.
    pub da: B::Buffer,
    /// All rows of what is shared, `[N, D]`, where the tensor group shares rows.
    pub gathered: Option<B::Buffer>,
    /// The gradient of queries, keys and values.
    pub dqkv: B::Buffer,
    /// The gradient of attention's output.
    pub dattended: B::Buffer,
    /// The gradient after the non-linearity, `[N, F / t]`; then, without a gate, before it.
    pub dact: B::Buffer,
    /// What layers do not keep, where the backward pass computes it again.
    pub layer: Option<LayerMemory<B>>,
    /// A chunk of logits, `[chunk, V / t]`, on the last stage.
    pub logits: Option<B::Buffer>,
    /// Rows of that chunk.
    pub chunk: usize,
    /// Losses and statistics of the chunk's rows, `[4, chunk]`.
    pub row_values: B::Buffer,
    /// The losses of the chunk's rows on the host.
    pub host: Vec<f32>,
}

impl<B: Backend> Slot<B> {
    /// Allocates one slot, for `layers` of the layout.
    ///
    /// # Errors
    /// [`TensorError::OutOfMemory`].
    pub fn new(
        b: &B,
        d: Dims,
        recompute: Recompute,
        layers: Range<usize>,
        last: bool,
    ) -> Result<Self, TensorError> {
        let rows = d.own_rows;
        let last = if last {
            Some(LastMemory {
                y: b.alloc_activation(rows * d.hidden)?,
                stats: b.alloc(2 * rows)?,
                dy: b.alloc_activation(rows * d.hidden)?,
            })
        } else {
            None
        };
        let first = layers.start;
        let layers = layers
            .map(|_| LayerMemory::new(b, d, recompute, true))
            .collect::<Result<_, TensorError>>()?;
        Ok(Self { first, layers, out: b.alloc(rows * d.hidden)?, last })
    }

    /// Returns the bytes of its buffers.
    pub(crate) fn bytes(&self, b: &B) -> u64 {
        let layers = self.layers.iter().flat_map(LayerMemory::buffers);
        let last = self.last.iter().flat_map(|m| [&m.y, &m.stats, &m.dy]);
        layers.chain([&self.out]).chain(last).map(|buffer| b.bytes(buffer) as u64).sum()
    }
}

impl<B: Backend> Scratch<B> {
    /// Allocates what micro-batches share.
    ///
    /// # Errors
    /// [`TensorError::OutOfMemory`].
    pub fn new(b: &B, d: Dims, recompute: Recompute, layout: &Layout) -> Result<Self, TensorError> {
        let n = d.rows;
        let chunk = logits_rows(n, layout.vocab_rows);
        let optional =
            |wanted: bool, elements| wanted.then(|| b.alloc_activation(elements)).transpose();
        let layer = match recompute {
            Recompute::None => None,
            _ => Some(LayerMemory::new(b, d, recompute, false)?),
        };
        Ok(Self {
            branch: b.alloc_activation(n * d.hidden)?,
            gradient: b.alloc(d.own_rows * d.hidden)?,
            da: b.alloc_activation(n * d.hidden)?,
            gathered: optional(d.shares_rows(), n * d.hidden)?,
            dqkv: b.alloc_activation(n * d.qkv_width())?,
            dattended: b.alloc_activation(n * d.attention_width())?,
            dact: b.alloc_activation(n * d.ffn)?,
            layer,
            logits: optional(layout.head.is_some(), chunk * layout.vocab_rows)?,
            chunk,
            row_values: b.alloc(4 * chunk)?,
            host: vec![0.0; chunk],
        })
    }

    /// Returns the bytes of its buffers.
    pub(crate) fn bytes(&self, b: &B) -> u64 {
        let all = [&self.branch, &self.gradient, &self.da, &self.dqkv, &self.dattended, &self.dact];
        let layer = self.layer.iter().flat_map(LayerMemory::buffers);
        let optional = self.gathered.iter().chain(&self.logits).chain([&self.row_values]);
        let bytes = all.into_iter().chain(layer).chain(optional).map(|x| b.bytes(x));
        (bytes.sum::<usize>() + self.host.len() * size_of::<f32>()) as u64
    }
}

/// Returns the rows of logits that are computed at a time.
pub(crate) fn logits_rows(rows: usize, vocab_rows: usize) -> usize {
    (LOGITS_MAX / vocab_rows.max(1)).max(LOGITS_ROWS_MIN).min(rows)
}

/// Returns how many micro-batches a list of instructions keeps in flight at most in one chunk.
/// They follow one another, so that a micro-batch's number modulo this is a place of its own.
#[must_use]
pub fn in_flight(list: &[Instruction], of: u32) -> usize {
    let (mut now, mut most) = (0usize, 0usize);
    for instruction in list {
        match instruction {
            // Its memory is taken when its input arrives.
            Instruction::Forward { chunk, .. } if *chunk == of => now += 1,
            Instruction::Backward { chunk, .. } if *chunk == of => now = now.saturating_sub(1),
            _ => {}
        }
        most = most.max(now);
    }
    most
}

/// Builds the table of [`Backend::rotary`]: `[positions, E]`, cosines then sines.
#[must_use]
pub fn rotary_table(model: &ModelConfig, positions: usize) -> Vec<f32> {
    let e = model.head_dim() as usize;
    let half = e / 2;
    let mut table = vec![0.0; positions * e];
    for (position, row) in table.chunks_exact_mut(e).enumerate() {
        for i in 0..half {
            // In f64: at position 100,000 an f32 angle is off by a hundredth.
            let inverse = f64::from(model.rope_theta).powf(-2.0 * i as f64 / e as f64);
            let angle = position as f64 * inverse;
            row[i] = angle.cos() as f32;
            row[half + i] = angle.sin() as f32;
        }
    }
    table
}
