//! What the fleet has and who holds it: a snapshot of nodes, devices and commitments.
//!
//! A [`Snapshot`] is a value. It is kept up to date by small changes (a node joins, a job is
//! released), it is cheap to clone, and [`Trial`] tries changes on it that may be undone. It
//! decides nothing: what is placed where is the business of `placement`.

pub mod change;
pub mod node;
pub mod snapshot;
pub mod trial;

pub use change::{Change, ChangeError, Request};
pub use node::{Device, Domain, Health, Ineligible, Node, Taint};
pub use snapshot::{ClusterError, Commitment, NodeState, Revision, Snapshot};
pub use trial::{Mark, Trial};
