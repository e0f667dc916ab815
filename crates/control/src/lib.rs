//! The control plane: the API, the agents, and the reconciler that stands between them.
//!
//! One dispatcher owns every job and node and takes one input at a time. For each batch of inputs it
//! asks the pure crates what follows (`lifecycle`, `queue`, `placement`, `audit`), makes the result
//! durable in one transaction that the leader's term fences, and only then answers and acts. What
//! readers see is what is durable. When a write fails, the dispatcher ends, and the next one begins
//! from the store: nothing is kept that was not written.
//!
//! It starts no process and opens no rank's socket: that is the agents' business.

pub mod api;
mod audit_log;
mod auto;
mod board;
pub mod clock;
mod convert;
mod core;
mod desk;
mod devices;
mod dispatch;
mod fleet;
mod grpc;
mod hello;
mod identity;
mod incident;
mod job;
mod ledger;
mod link;
mod logs;
mod message;
mod metrics;
pub mod options;
mod queues;
mod replicas;
mod schedule;
mod series;
pub mod service;
mod view;

pub use api::{ApiError, Handle};
pub use options::{Error, Options, Remote};
pub use service::{Running, run, start};
