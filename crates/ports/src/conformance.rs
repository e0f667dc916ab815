//! Conformance suites: what every implementation of a port must do, as functions that panic.

pub mod store;
