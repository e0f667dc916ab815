//! How ranks form a mesh: coordinates, groups, shard ranges and pipeline schedules.
//!
//! Pure arithmetic. It knows no model, no process and no network.

pub mod coords;
pub mod shard;

pub use coords::{Axis, Coords, Mesh};
pub use shard::ShardSpec;
