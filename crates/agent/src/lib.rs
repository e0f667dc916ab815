//! The node agent: registers devices, starts and supervises ranks, streams logs and health.
//!
//! One dispatcher ([`service`]) owns all state and handles one input at a time; links, rank
//! processes, log readers and the rank-facing server only exchange messages with it. The agent
//! decides nothing: it carries out checked plans and reports what happened. Its judgement of a
//! device ([`health`]) is a report, too.

pub mod devices;
pub mod environment;
pub mod gpu_metrics;
pub mod gpus;
pub mod health;
pub mod host;
pub mod link;
pub mod logs;
pub mod metrics;
pub mod process;
pub mod ranks;
pub mod sampling;
pub mod service;
pub mod supervise;

pub use service::{AgentError, ControlAddress, Options, run};
