//! Drumline on Kubernetes: the only crate that knows it.
//!
//! Custom resources come in, gangs of pods go out, each bound whole to the nodes that the same
//! decision core chose as everywhere else. What there is to know is on the API server: an operator
//! that is killed anywhere is followed by one that comes to the same answer.

pub mod admission;
pub mod ask;
pub mod budgets;
mod core;
pub mod crd;
pub mod deploy;
pub mod desk;
pub mod devices;
pub mod dra;
mod figures;
pub mod fleet;
pub mod front;
pub mod gang;
pub mod guard;
pub mod job;
pub mod launch;
pub mod lease;
mod ledger;
pub mod node;
pub mod observe;
pub mod pods;
mod promise;
pub mod quantity;
pub mod queues;
pub mod ranks;
mod replicas;
pub mod service;
pub mod status;
pub mod step;
mod sweep;
pub mod template;
mod waits;
mod wake;

pub use devices::{DeviceRules, GpuResource};
pub use dra::Driver;
pub use fleet::{FleetRules, LevelRule};
pub use guard::{GuardRules, WhenAway};
pub use lease::LeaseRules;
pub use observe::Observe;
pub use pods::PodRules;
pub use ranks::RankRules;
pub use service::{Options, ServiceError, config_here, run};
