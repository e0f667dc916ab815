//! The gateway: OpenAI-compatible HTTP in front of served models.
//!
//! It knows where models are from the control plane ([`routes`]), turns a request into a strict
//! set of parameters ([`params`]), lets in only as many as a model's queue holds ([`routes`]),
//! and streams what the leader rank sends ([`generate`]). It keeps no state: any number may run.

pub mod chat;
pub mod completions;
pub mod error;
pub mod generate;
pub mod meter;
pub mod params;
pub mod routes;
pub mod server;
pub mod template;

pub use server::{GatewayError, Options, run};
