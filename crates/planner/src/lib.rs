//! Answers what a large run needs before anyone reserves a GPU: split, memory, time, money.
//!
//! Pure: texts and numbers in, plans out. It reads no files, no clock, no environment, and the
//! same request gives the same plan, bit for bit. Every formula is in `docs/planner.md`.

pub mod auto;
pub mod calibrate;
pub mod catalogue;
pub mod comm;
pub mod command;
pub mod dtype;
pub mod error;
pub mod explain;
pub mod fit;
pub mod hf;
pub mod layer;
pub mod manifest;
pub mod memory;
pub mod model;
pub mod money;
pub mod ops;
pub mod plot;
pub mod profile;
pub mod published;
pub mod quantity;
pub mod reliability;
pub mod scaling;
pub mod search;
pub mod serve;
pub mod split;
pub mod step;

pub use catalogue::{Catalogue, Dtype, Gpu, Network};
pub use error::PlanError;
pub use model::Model;
pub use split::{Batch, Machines, Recompute, Split, Stack};
