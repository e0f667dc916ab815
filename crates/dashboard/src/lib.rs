//! The dashboard: read-only pages over the control API.
//!
//! Every page is rendered on the server and complete without a script. A few lines of script
//! swap the page's main part whenever the server sends it anew. Nothing comes from elsewhere.

pub mod chart;
pub mod client;
pub mod events;
pub mod fleet;
pub mod job;
pub mod jobs;
pub mod layout;
pub mod queues;
pub mod server;
pub mod services;
pub mod show;

pub use server::{DashboardError, Options, run};
