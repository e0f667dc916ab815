//! What is measured while a simulation runs: in bounded memory, without a log.

pub mod fairness;
pub mod histogram;
pub mod ledger;
pub mod timeline;

pub use fairness::{Fairness, Share};
pub use histogram::{Histogram, Stats};
pub use ledger::{Cause, Ledger};
pub use timeline::{Level, Timeline};
