//! Answers what a large run needs before anyone reserves a GPU: split, memory, time, money.
//!
//! Pure: texts and numbers in, plans out. It reads no files, no clock, no environment, and the
//! same request gives the same plan, bit for bit. Every formula is in `docs/planner.md`.

pub mod calibrate;
pub mod catalogue;
pub mod comm;
pub mod error;
pub mod fit;
pub mod layer;
pub mod memory;
pub mod model;
pub mod ops;
pub mod published;
pub mod split;
pub mod step;

pub use catalogue::{Catalogue, Dtype, Gpu, Network};
pub use error::PlanError;
pub use model::Model;
pub use split::{Batch, Machines, Recompute, Split, Stack};
