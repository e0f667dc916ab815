//! How ranks form a mesh: coordinates, groups, shard ranges and pipeline schedules.
//!
//! Pure arithmetic. It knows no model, no process and no network.

pub mod coords;
pub mod schedule;
pub mod shard;
pub mod simulate;

pub use coords::{Axis, Coords, Mesh};
pub use schedule::{Instruction, Schedule, ScheduleError};
pub use shard::{ShardSpec, split};
pub use simulate::{Costs, Report, ScheduleFault, simulate};
