//! The vocabulary of Drumline: typed ids, units, waiting reasons and the clock.
//!
//! Pure data. Nothing here does IO, reads the time or draws a random number.

pub mod clock;
pub mod ids;
pub mod outcome;
pub mod phase;
pub mod reason;
pub mod units;

pub use clock::{Clock, ManualClock, Timestamp};
pub use ids::{Attempt, DeviceId, JobId, NameError, NodeName, QueueName, RankIndex};
pub use outcome::{Outcome, RankExit};
pub use phase::{JobPhase, RankPhase};
pub use reason::{Explanation, Reason};
pub use units::{Bytes, format_bytes, format_duration_ms};
