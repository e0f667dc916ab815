//! Where each rank of an admitted gang runs, and why a job that is not placed waits.
//!
//! A function of the snapshot, the admitted jobs in their order, and a seed. It checks nothing
//! for others: `audit` judges every plan with logic of its own.

pub mod choose;
pub mod cycle;
pub mod explain;
pub mod plan;

pub use cycle::{Cycle, Eviction, EvictionCause};
pub use plan::{Assignment, JobPlan, Plan, Seed, plan};
