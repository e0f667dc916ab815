//! The Hugging Face layout: `config.json`, `model.safetensors`, `tokenizer.json`.
//!
//! Checkpoints have the same tensor names and orientations, so that export is a copy without the
//! optimizer, and import needs no conversion but of the element type.

mod config;
mod export;
mod import;
mod tensors;

pub use export::export;
pub use import::open;
pub use tensors::weights;

/// The model's shape.
pub const CONFIG_FILE: &str = "config.json";
/// The weights, in one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Which of several files holds which weight.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
