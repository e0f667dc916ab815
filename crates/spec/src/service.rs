//! A served model.

use serde::{Deserialize, Serialize};

use crate::gang::Parallelism;

/// How a served model's matrices are stored. Activations and sums are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightStorage {
    /// f32, as they were trained.
    #[default]
    F32,
    /// bf16; what they are multiplied by is rounded to bf16 too.
    Bf16,
    /// f16, multiplied by f32.
    F16,
    /// Signed bytes with a scale for each output; what they are multiplied by is rounded to bf16.
    Int8,
}

impl WeightStorage {
    /// Returns the word used in manifests.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

/// How the keys and values of past tokens are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheStorage {
    /// As the weights are, where the device can: bf16 beside [`WeightStorage::Int8`].
    #[default]
    Auto,
    /// f32, as they were computed.
    F32,
    /// bf16.
    Bf16,
    /// f16; what is beyond 65,504 becomes that.
    F16,
}

/// How many replicas serve, by what is asked of them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Autoscale {
    /// The fewest replicas; at least 1.
    pub min: u32,
    /// The most replicas.
    pub max: u32,
    /// Requests that may wait at each replica before another one is started.
    pub waiting: u32,
    /// Share of the KV cache in use, 0 to 1, beyond which another replica is started.
    pub kv_usage: f64,
    /// A replica goes once it was not needed for so long. Unit: milliseconds.
    pub down_after_ms: u64,
}

/// A served model, checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelService {
    /// A checkpoint folder of Drumline, a run's folder (its latest complete checkpoint), or a
    /// folder in the Hugging Face layout.
    pub model: String,
    /// The name under which clients ask for it.
    pub served_name: String,
    /// How each replica is split. `data` is 1: copies are [`Self::replicas`].
    pub parallelism: Parallelism,
    /// How many gangs serve it, each a world of its own; 1 where [`Self::autoscale`] decides.
    #[serde(default = "one")]
    pub replicas: u32,
    /// What decides the number of replicas instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<Autoscale>,
    /// Greatest number of sequences decoded in one batch.
    pub max_batch: u32,
    /// Greatest number of tokens of prompt and completion together; 0: the model's context.
    pub max_context: u32,
    /// Requests that may wait for a place in the batch before the gateway answers 429.
    pub max_queue: u32,
    /// How matrices are stored.
    #[serde(default)]
    pub weights: WeightStorage,
    /// How the keys and values of past tokens are stored.
    #[serde(default)]
    pub kv_cache: KvCacheStorage,
}

fn one() -> u32 {
    1
}
