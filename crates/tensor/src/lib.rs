//! Numbers in memory: element types, shapes, the operations of a decoder, and the CPU that runs them.
//!
//! Dimension letters, everywhere in this crate and in `engine`: B batch, T sequence, N = B x T rows,
//! D hidden, H query heads, K key and value heads, E head width, F feed-forward width, V vocabulary.
//!
//! The crate knows no model, no rank and no clock. `unsafe` is confined to the hot loops under
//! [`cpu`], each use with its reason; every kernel has a plain reference in [`reference`] and a
//! test that compares the two.

pub mod backend;
pub mod conformance;
pub mod cpu;
pub mod dtype;
pub mod peak;
pub mod reference;
pub mod sampling;
pub mod shape;

pub use backend::{AdamW, Backend, Rounding, TensorError};
pub use cpu::{Cpu, CpuMatrix, CpuOptions};
pub use dtype::{DType, MatmulPrecision};
pub use sampling::Draw;
pub use shape::{
    Attention, CachedAttention, CachedSegment, KV_BLOCK, Linear, Loss, NormKind, Normalise, Rotary,
    WeightLayout,
};
