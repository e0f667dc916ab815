//! Drumline on Kubernetes: the only crate that knows it.
//!
//! Custom resources come in, gangs of pods go out, each bound whole to the nodes that the same
//! decision core chose as everywhere else. What there is to know is on the API server: an operator
//! that is killed anywhere is followed by one that comes to the same answer.

mod core;
pub mod crd;
pub mod decide;
pub mod deploy;
pub mod fleet;
pub mod gang;
pub mod job;
pub mod launch;
pub mod lease;
pub mod pods;
pub mod quantity;
pub mod service;
pub mod status;
pub mod step;

pub use fleet::FleetRules;
pub use lease::LeaseRules;
pub use pods::PodRules;
pub use service::{Options, ServiceError, run};
