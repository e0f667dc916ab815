//! A served model.

use serde::{Deserialize, Serialize};

use crate::gang::Parallelism;

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
}
