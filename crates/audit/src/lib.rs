//! An independent check of every plan against the snapshot; the only maker of [`CheckedPlan`].
//!
//! It shares no logic with `placement`: it knows what must hold, not how to reach it.

pub mod check;
pub mod violation;

pub use check::{CheckedJob, CheckedPlan, check};
pub use violation::Violation;
