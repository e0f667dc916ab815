//! Manifests: what a user writes, checked into values that are always legal.
//!
//! Pure: text in, specs or a list of mistakes out. It reads no files and knows no cluster.

pub mod command;
mod document;
pub mod explain;
pub mod field;
pub mod gang;
pub mod job;
pub mod manifest;
pub mod memory;
mod mig;
pub mod mistake;
pub mod model;
pub mod object;
pub mod queue;
pub mod reference;
pub mod scheduling;
pub mod schema;
pub mod service;
pub mod table;
pub mod training;
mod walk;

pub use command::CommandJob;
pub use explain::explain;
pub use gang::{
    DeviceKind, DisruptionBudget, Elastic, Gang, GangSettings, Parallelism, RestartPolicy,
    Toleration, TopologyRule, WHOLE_DEVICE,
};
pub use job::{JobKind, JobSpec, SplitChoice, Work};
pub use memory::{MemoryOptions, Recompute};
pub use mig::{is_mig_instance, means_mig_instances};
pub use mistake::{Mistake, Place};
pub use model::{Activation, Family, ModelConfig, ModelError, Norm, Position};
pub use queue::{DeviceClass, QueueSpec, Reclaim};
pub use scheduling::Wishes;
pub use schema::schema;
pub use service::{Autoscale, KvCacheStorage, ModelService, WeightStorage};
pub use training::{
    Checkpointing, DataSource, LearningRate, Optimizer, Precision, TrainingJob, WeightRounding,
};
