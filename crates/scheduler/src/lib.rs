//! The decision core: what happened goes in, who starts and who leaves comes out.
//!
//! A [`Scheduler`] folds [`drumline_cluster::Change`]s and is asked for a
//! [`drumline_placement::Cycle`]. The control plane, the simulator and the operator call exactly
//! this. It reads no clock: the caller says what time it is. Saved and restored, it decides the
//! same, bit for bit.

pub mod options;
pub mod saved;
pub mod scheduler;

pub use options::{Options, Order, Scoring};
pub use saved::Saved;
pub use scheduler::Scheduler;
