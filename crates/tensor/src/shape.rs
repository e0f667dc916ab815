//! The shapes that operations are asked for.

use crate::dtype::DType;

/// How the matrix of a linear layer lies in memory, row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightLayout {
    /// `[output, input]`, as PyTorch's `Linear` has it.
    OutIn,
    /// `[input, output]`, as GPT-2's `Conv1D` has it.
    InOut,
}

/// A linear layer: `y [rows, output] = x [rows, input] . w (+ bias)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    /// Rows of `x` and `y`, N.
    pub rows: usize,
    /// Columns of `x`.
    pub input: usize,
    /// Columns of `y`.
    pub output: usize,
    /// How `w` lies in memory.
    pub layout: WeightLayout,
}

/// Which normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Subtract the mean, divide by the standard deviation.
    Layer,
    /// Divide by the root mean square.
    Rms,
}

/// A normalisation of every row of `[rows, width]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalise {
    /// Number of rows, N.
    pub rows: usize,
    /// Width of a row, D.
    pub width: usize,
    /// Which normalisation.
    pub kind: NormKind,
    /// Added to the variance or mean square.
    pub epsilon: f32,
}

/// A rotation of the first `heads` heads of every row, in place.
///
/// Pairs are `(i, i + E / 2)`, as the Hugging Face layout of LLaMA weights expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotary {
    /// Number of rows, N.
    pub rows: usize,
    /// Width of a row; heads beyond `heads` are left alone.
    pub width: usize,
    /// Heads that are rotated: queries and keys, H + K.
    pub heads: usize,
    /// Width of a head, E, even.
    pub head_dim: usize,
    /// Rotate backwards: the gradient of the rotation.
    pub inverse: bool,
}

/// Causal self-attention over whole sequences.
///
/// `qkv` is `[B * T, (H + 2 K) * E]`: queries, then keys, then values. The output is
/// `[B * T, H * E]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Sequences, B.
    pub batch: usize,
    /// Tokens in each, T.
    pub sequence: usize,
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, K; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, E.
    pub head_dim: usize,
}

impl Attention {
    /// Returns the width of a row of queries, keys and values, (H + 2 K) E.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Returns the factor on scores, 1 / sqrt(E).
    #[must_use]
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Tokens in one block of the key and value cache.
pub const KV_BLOCK: usize = 16;

/// Attention of new rows to a paged cache of keys and values.
///
/// A block of keys is `[K, E, KV_BLOCK]`, so that the scores of a block's tokens come out of one
/// vector; a block of values is `[K, KV_BLOCK, E]`. Stored as halves, two elements lie in one of the buffer's
/// f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachedAttention {
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, K.
    pub kv_heads: usize,
    /// Width of a head, E.
    pub head_dim: usize,
    /// How keys and values are stored: [`DType::F32`], [`DType::F16`] or [`DType::Bf16`].
    pub stored: DType,
}

impl CachedAttention {
    /// Returns the f32 of a buffer that one block of keys, or of values, takes.
    ///
    /// # Panics
    /// When a cache is not stored so.
    #[must_use]
    pub fn block_elements(&self) -> usize {
        self.kv_heads * self.head_words()
    }

    /// Returns the f32 of a buffer that one head's part of a block takes.
    ///
    /// # Panics
    /// When a cache is not stored so.
    #[must_use]
    pub fn head_words(&self) -> usize {
        assert!(self.stored != DType::I8, "a cache of bytes");
        self.head_dim * KV_BLOCK * self.stored.bytes() / size_of::<f32>()
    }
}

/// New rows of one sequence, and where its past lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachedSegment<'a> {
    /// First row of the batch that belongs to it.
    pub row: usize,
    /// Number of its rows.
    pub rows: usize,
    /// Position of its first row in the sequence.
    pub position: usize,
    /// The cache blocks of the sequence, in order; they cover `position + rows` tokens.
    pub blocks: &'a [u32],
}

/// The logits of a slice of the vocabulary, and what is asked about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loss {
    /// Number of rows, N.
    pub rows: usize,
    /// Columns of the logits: this rank's slice, padding included.
    pub columns: usize,
    /// Columns that stand for tokens; the rest is padding and has no probability.
    pub used: usize,
    /// The token of column 0.
    pub offset: usize,
}
