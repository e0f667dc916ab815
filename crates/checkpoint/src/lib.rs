//! Sharded checkpoints: written beside the step loop, committed by one rename, read by any split.
//!
//! A run's folder holds `step-00000120/` and its like. In each, every writing rank leaves one
//! safetensors file of f32 and a part that lists it; the first writer waits for all parts, merges
//! them into `manifest.json` and renames that into place. The checkpoint exists when the manifest
//! does, and not before: [`latest`] never sees a partial one, whenever a process is killed.
//!
//! Everything is keyed by global tensor name, shape and offset (unpadded), so that [`Reader`]
//! serves any other split, and the Hugging Face layout can be written ([`hf::export`]) and read
//! ([`hf::open`]).
//!
//! What a checkpoint does not hold: the data cursor is the step itself, because batches are a
//! function of the step; random numbers are functions of the seed likewise.

pub mod durable;
pub mod error;
pub mod file;
pub mod hf;
pub mod manifest;
mod map;
pub mod reader;
pub mod run;
pub mod source;
pub mod writer;

pub use error::{CheckpointError, Problem};
pub use file::{Shards, Tensor};
pub use manifest::{Manifest, RunState};
pub use reader::{DType, Reader};
pub use run::{Checkpoint, Found, Refused, clean, latest, step_folder, steps};
pub use source::{ModelSource, open_model};
pub use writer::{Outcome, Writer, WriterOptions, Written};
