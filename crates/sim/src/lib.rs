//! The decision core over virtual time: generated workloads, traces, replays, policies side by
//! side; and the placement experiment on the openb trace.

#[cfg(feature = "clap")]
pub mod args;
pub mod draw;
pub mod fault;
pub mod job;
pub mod measure;
pub mod openb;
pub mod policy;
pub mod record;
pub mod replay;
pub mod report;
pub mod scenario;
pub mod trace;
pub mod workload;
pub mod world;

pub use fault::FileFault;
pub use policy::{POLICIES, Policy};
pub use report::{PolicyReport, Report};
pub use scenario::Scenario;
pub use workload::{PRESETS, Preset, Workload};
pub use world::{Limits, Observer, SimError, Status, run};
