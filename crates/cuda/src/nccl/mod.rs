//! NCCL: collectives between GPUs, queued on a stream of their own.
//!
//! A thin wrapper of our own over the library's functions: cudarc's communicator can neither be sent
//! between threads nor be given up, and its loader knows the library under another name than the one
//! that is installed. [`library`] finds it, [`channel`] is one communicator with its stream,
//! [`group`] joins the channels of one group of ranks, [`link`] makes the groups of a gang, and
//! [`watchdog`] ends the process when a collective makes no progress: giving up a communicator can
//! hang, ending the process cannot.

pub mod channel;
mod device;
pub mod group;
pub mod library;
pub mod link;
pub mod place;
pub mod watchdog;

pub use channel::{Channel, Exchange, NcclError};
pub use group::{GroupOptions, NcclGroup, Peers};
pub use library::{Nccl, NcclProblem, UniqueId};
pub use link::{Linked, link};
pub use place::{CudaPlace, Place};
pub use watchdog::{Rank, Record, Watchdog};
