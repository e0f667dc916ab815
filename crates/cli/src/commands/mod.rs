//! One file for each group of commands. Each takes its arguments and an [`Access`], writes data to
//! standard output, and ends with a [`Failure`] or without.
//!
//! [`Access`]: crate::client::Access
//! [`Failure`]: crate::failure::Failure

pub mod clear;
pub mod complete;
pub mod data;
pub mod describe;
pub mod export;
pub mod jobs;
pub mod logs;
pub mod manifests;
pub mod nodes;
pub mod plan;
pub mod queues;
pub mod serve;
pub mod sim;
pub mod submit;
pub mod version;
pub mod wait;
