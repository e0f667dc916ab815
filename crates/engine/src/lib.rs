//! Decoders and what ranks do with them: the parallel training step and the inference step.
//!
//! Generic over [`drumline_tensor::Backend`] and [`drumline_collective::Collective`]. It opens no
//! socket or file and reads no clock, and only [`bench`] starts threads: batches, weights, seeds and
//! plans come in as values, and the same values give the same results.
//!
//! Dimension letters: B batch, T sequence, N = B x T rows, L layers, D hidden, H query heads,
//! K key and value heads, E head width, F feed-forward width, V vocabulary. A letter with `/ t` is
//! this rank's share of it.

pub mod activations;
mod backward;
pub mod bench;
pub mod error;
pub mod gradients;
pub mod groups;
pub mod head;
pub mod infer;
pub mod init;
pub mod layer;
pub mod layout;
pub mod memory;
pub mod optimizer;
mod pipeline;
pub mod probe;
pub mod shards;
mod state;
pub mod train;
pub mod work;

pub use error::EngineError;
pub use gradients::Gradients;
pub use groups::{DeviceGroup, DeviceGroups, Groups};
pub use layout::{Layout, Parameter, Split};
pub use memory::Memory;
pub use probe::{NoProbe, Probe, Span};
pub use shards::Snapshot;
pub use train::{Batch, StepReport, Trainer};
pub use work::Work;
