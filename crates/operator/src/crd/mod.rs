//! The custom resources, made from the same table that parses manifests.

pub mod columns;
pub mod define;
pub mod rules;
pub mod status;
pub mod structural;
pub mod yaml;

pub use define::{GROUP, VERSION, all};
pub use yaml::to_yaml;
