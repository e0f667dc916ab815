//! The ports of Drumline: traits that the control plane consumes and adapters implement.
//!
//! Each port is a trait, a fake that can misbehave on purpose, and a conformance suite that every
//! implementation passes. Nothing here opens a file or a socket.

pub mod conformance;
pub mod store;
