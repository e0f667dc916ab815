//! The placement experiment of "Beware of Fragmentation" (Weng et al., USENIX ATC 2023).
//!
//! Pods arrive one after the other on a fleet of mixed GPU nodes and never leave; a pod that fits
//! is never refused. The figure is the share of the GPU capacity that is allocated once the demand
//! that has arrived is 130% of it. Published policies and Drumline's own run on the same arrivals.

#[cfg(feature = "clap")]
pub mod args;
pub mod fleet;
pub mod input;
pub mod policy;
pub mod report;
pub mod rng;
pub mod run;
pub mod typical;
pub mod values;
pub mod workload;

pub use input::{InputError, Trace};
pub use policy::PolicyName;
pub use report::{ClassFailures, PolicyReport, Report};
pub use run::{Kept, Options, RunError, run, run_kept};
pub use values::ValuesError;
pub use workload::Seeds;
