//! What the fleet has and who holds it: nodes, devices, commitments, and counts over them.
//!
//! A [`Snapshot`] is kept up to date by small changes (a node joins, a job is released), and with
//! it counts of what is free per device model in every topology domain, so that a decision looks
//! at domains and at the nodes that it takes, not at all of them. [`Trial`] tries changes in place
//! and undoes them. It decides nothing: what is placed where is the business of `placement`.
//!
//! Invariant: two snapshots that came to the same nodes, commitments and reservations in different
//! ways are read in the same order; numbers such as [`NodeAt`] never decide between equals, keys
//! made from names do.

pub mod change;
pub mod node;
pub mod pool;
pub mod snapshot;
pub mod state;
pub mod stock;
pub mod topology;
pub mod trial;

pub use change::{Change, ChangeError, Request};
pub use node::{Device, Domain, External, Health, Ineligible, Node, Taint, split_link};
pub use pool::{Counts, Pool};
pub use snapshot::{ClusterError, Commitment, Revision, Slice, Snapshot};
pub use state::{NodeAt, NodeState};
pub use stock::Stock;
pub use topology::{DomainAt, LevelAt, Place, Topology};
pub use trial::{Mark, Trial};
