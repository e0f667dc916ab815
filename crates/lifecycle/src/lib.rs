//! What happens next to a job's gang: `step(state, spec, event, now) -> (state, actions)`.
//!
//! Pure. It sends nothing, stores nothing and reads no clock: whoever calls it persists the new
//! state first and then carries out the actions. Events may come late, twice, out of order, or for
//! an attempt that is over; none of that may start a gang twice or wake a job that has ended.
//!
//! # Invariants
//! - An attempt is launched only when every rank of the one before it has ended or is lost.
//! - Attempt numbers only grow. A job that has ended stays as it is.
//! - A gang starts only from a plan that `audit` has checked.

pub mod cause;
pub mod deadline;
pub mod event;
pub mod policy;
pub mod replicas;
pub mod state;
pub mod step;
mod takedown;

pub use deadline::deadline;
pub use event::{Action, Event, Note, Report, Severity, Told};
pub use state::{Checkpoint, Ending, Failure, Join, RankState, Rendezvous, State};
pub use step::step;
