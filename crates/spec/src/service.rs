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

/// A served model, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelService {
    /// A checkpoint folder of Drumline, a run's folder (its latest complete checkpoint), or a
    /// folder in the Hugging Face layout.
    pub model: String,
    /// The name under which clients ask for it.
    pub served_name: String,
    /// How the model is split. `data` is the number of replicas, each a world of its own: 1 today.
    pub parallelism: Parallelism,
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
