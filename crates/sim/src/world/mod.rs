//! The simulation: virtual time, one queue of events, and the real scheduler in the middle.
//!
//! Whatever is drawn is drawn from the scenario's seed, apart from the policy: every policy meets
//! the same arrivals and the same failures. Nothing is logged per event.

mod attempt;
mod clock;
mod machines;
mod observe;
mod run;
mod tally;

pub use observe::{Nobody, Observer};
pub use run::{Limits, SimError, Status, run};
