//! An independent check of every plan; the only maker of [`CheckedPlan`].
//!
//! It shares no logic with `placement`, `queue` and `scheduler`: it knows what must hold, not how
//! to reach it. [`Auditor`] keeps books of its own from the same changes and judges whole cycles:
//! devices, gangs, topology, whose turn it is, quotas, and who is asked to leave. [`check`] judges
//! a plan alone against a snapshot.

pub mod auditor;
pub mod check;
pub mod violation;

mod books;
mod gang;
mod leave;
mod ledger;
mod quota;
mod spares;

pub use auditor::Auditor;
pub use check::{CheckedJob, CheckedPlan, check};
pub use violation::Violation;
