//! Manifests: what a user writes, checked into values that are always legal.
//!
//! Pure: text in, specs or a list of mistakes out. It reads no files and knows no cluster.

pub mod command;
pub mod gang;
pub mod job;
pub mod model;
pub mod service;
pub mod training;

pub use command::CommandJob;
pub use gang::{DeviceKind, Gang, GangSettings, Parallelism, RestartPolicy};
pub use job::{JobKind, JobSpec, Work};
pub use model::{Activation, Family, ModelConfig, ModelError, Norm, Position};
pub use service::ModelService;
pub use training::{Checkpointing, DataSource, LearningRate, Optimizer, TrainingJob};
