//! NVIDIA GPUs as NVML sees them: which there are, what they do, and what went wrong with them.
//!
//! The library is found at run time ([`library`]); a machine without it has no GPUs, and says so.
//! A thread of its own asks ([`watch`]), because a broken GPU can hold up whoever asks for it.
//! Nothing here judges: whether a device may be used is the agent's decision.

pub mod blank;
pub mod discover;
pub mod library;
pub mod sample;
pub mod watch;

pub use discover::{Gpu, Inventory, Near};
pub use library::{Nvml, NvmlProblem, Versions};
pub use sample::{Ecc, Profile, Recovery, Sample, Use};
pub use watch::{Reading, Watch, Xid};
