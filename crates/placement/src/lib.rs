//! Where each rank of a gang runs, and why a gang that is not placed waits.
//!
//! [`place`] puts one gang on a fleet, or says in a [`Misfit`] what was missing:
//!
//! ```
//! use drumline_cluster::{Device, Node, Snapshot};
//! use drumline_placement::{Constraints, place};
//! use drumline_spec::{DeviceKind, Gang, Parallelism};
//! use drumline_types::Bytes;
//!
//! let mut fleet = Snapshot::new();
//! let gpu = || Device::new(DeviceKind::Gpu, "H100", Bytes(80 << 30));
//! fleet.upsert_node(Node::new("a".parse()?, vec![gpu(), gpu()]));
//! let gang = Gang { ranks: 2, device: DeviceKind::Gpu, ..Gang::default() };
//! let split = Parallelism { data: 2, ..Parallelism::SINGLE };
//! let placed = place(&fleet, &gang, split, &Constraints::default()).map_err(|m| m.to_string())?;
//! assert_eq!(placed.devices.len(), 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - It reads the fleet and changes nothing: give the devices out with
//!   [`Placed::commitment`] and [`drumline_cluster::Snapshot::hold`] (or `Trial::hold`) before the
//!   next gang is placed.
//! - To see what an eviction would bring, evict in a [`drumline_cluster::Trial`], place on its
//!   `snapshot()`, and roll back or commit.
//! - Devices that are kept for a job ([`drumline_cluster::Snapshot::reserve`]) are free for nobody;
//!   for that job itself, `unreserve` first, in a trial.
//! - A gang that did not fit cannot fit until [`drumline_cluster::Snapshot::grown`] has grown.
//! - With a leader, rank 0 stands alone: groups and runs are counted from rank 1. A rule for the
//!   whole gang binds the leader too.
//! - An elastic gang gets the greatest legal size that fits, at most [`Constraints::most`];
//!   [`Placed::split`] has that size.
//!
//! It checks nothing for others: `audit` judges every plan with logic of its own.

mod cycle;
pub mod misfit;
pub mod place;
pub mod plan;
pub mod scoring;

mod baseline;
mod devices;
mod fill;
mod leader;
mod search;
mod shape;
mod survey;

pub use cycle::{Cycle, Eviction, EvictionCause, Spares};
pub use misfit::Misfit;
pub use place::{Placed, place, try_place};
pub use plan::{Assignment, JobPlan, Plan, Seed};
pub use scoring::{Constraints, Scoring};
