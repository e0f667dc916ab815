//! The memory of a training step, planned before the first one: what each micro-batch in flight
//! keeps for its backward pass, and what all share.

use std::ops::Range;

use drumline_mesh::Instruction;
use drumline_spec::{Family, ModelConfig};
use drumline_tensor::{Attention, Backend, NormKind, Normalise, Rotary, TensorError};

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
        Self {
            batch,
            sequence,
            rows: batch * sequence,
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

/// What one layer keeps of one micro-batch.
pub struct LayerMemory<B: Backend> {
    /// The residual stream before the layer, `[N, D]`.
    pub x: B::Buffer,
    /// Normalised `x`.
    pub a1: B::Buffer,
    /// Its statistics, `[2, N]`.
    pub stats1: B::Buffer,
    /// Queries, keys and values, rotated.
    pub qkv: B::Buffer,
    /// Attention's output, `[N, H E / t]`.
    pub attended: B::Buffer,
    /// Its log-sums, `[B, H / t, T]`.
    pub lse: B::Buffer,
    /// The residual stream between attention and feed-forward.
    pub mid: B::Buffer,
    /// Normalised `mid`.
    pub a2: B::Buffer,
    /// Its statistics.
    pub stats2: B::Buffer,
    /// The up projection before the non-linearity, `[N, F / t]` or `[N, 2 F / t]`; the backward
    /// pass replaces it by its gradient.
    pub up: B::Buffer,
    /// After the non-linearity, `[N, F / t]`.
    pub act: B::Buffer,
}

/// What one micro-batch in flight keeps.
pub struct Slot<B: Backend> {
    /// Place of the first of its layers in the layout.
    pub first: usize,
    /// The layers of one chunk of this stage.
    pub layers: Vec<LayerMemory<B>>,
    /// The residual stream after the last of them, `[N, D]`.
    pub out: B::Buffer,
    /// On the last stage: normalised `out`, then the gradient of that.
    pub last: Option<LastMemory<B>>,
}

/// What the last stage keeps.
pub struct LastMemory<B: Backend> {
    /// Normalised output of the last layer, `[N, D]`.
    pub y: B::Buffer,
    /// Its statistics.
    pub stats: B::Buffer,
    /// The loss's gradient with respect to `y`.
    pub dy: B::Buffer,
}

/// What micro-batches share.
pub struct Scratch<B: Backend> {
    /// The output of a row-parallel projection, `[N, D]`.
    pub branch: B::Buffer,
    /// The gradient of the residual stream, `[N, D]`.
    pub gradient: B::Buffer,
    /// The gradient of a normalised input, `[N, D]`.
    pub da: B::Buffer,
    /// The gradient of queries, keys and values.
    pub dqkv: B::Buffer,
    /// The gradient of attention's output.
    pub dattended: B::Buffer,
    /// The gradient after the non-linearity, `[N, F / t]`.
    pub dact: B::Buffer,
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
    pub fn new(b: &B, d: Dims, layers: Range<usize>, last: bool) -> Result<Self, TensorError> {
        let n = d.rows;
        let layer = || {
            Ok(LayerMemory {
                x: b.alloc(n * d.hidden)?,
                a1: b.alloc(n * d.hidden)?,
                stats1: b.alloc(2 * n)?,
                qkv: b.alloc(n * d.qkv_width())?,
                attended: b.alloc(n * d.attention_width())?,
                lse: b.alloc(n * d.heads)?,
                mid: b.alloc(n * d.hidden)?,
                a2: b.alloc(n * d.hidden)?,
                stats2: b.alloc(2 * n)?,
                up: b.alloc(n * d.up)?,
                act: b.alloc(n * d.ffn)?,
            })
        };
        let last = if last {
            Some(LastMemory {
                y: b.alloc(n * d.hidden)?,
                stats: b.alloc(2 * n)?,
                dy: b.alloc(n * d.hidden)?,
            })
        } else {
            None
        };
        let first = layers.start;
        let layers = layers.map(|_| layer()).collect::<Result<_, TensorError>>()?;
        Ok(Self { first, layers, out: b.alloc(n * d.hidden)?, last })
    }
}

impl<B: Backend> Scratch<B> {
    /// Allocates what micro-batches share.
    ///
    /// # Errors
    /// [`TensorError::OutOfMemory`].
    pub fn new(b: &B, d: Dims, layout: &Layout) -> Result<Self, TensorError> {
        let n = d.rows;
        let chunk = logits_rows(n, layout.vocab_rows);
        let logits = match layout.head {
            Some(_) => Some(b.alloc(chunk * layout.vocab_rows)?),
            None => None,
        };
        Ok(Self {
            branch: b.alloc(n * d.hidden)?,
            gradient: b.alloc(n * d.hidden)?,
            da: b.alloc(n * d.hidden)?,
            dqkv: b.alloc(n * d.qkv_width())?,
            dattended: b.alloc(n * d.attention_width())?,
            dact: b.alloc(n * d.ffn)?,
            logits,
            chunk,
            row_values: b.alloc(4 * chunk)?,
            host: vec![0.0; chunk],
        })
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
