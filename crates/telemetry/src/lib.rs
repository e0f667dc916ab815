//! Metrics: every name in one table, the exporter that serves them, and collectors over `/proc`
//! and NVIDIA's management library.
//!
//! There is no global registry: whoever counts is handed one.

pub mod gpu;
pub mod http;
pub mod metric;
pub mod proc;
pub mod table;

pub use metric::{Kind, Metric, Origin};
