//! What the demo found, as one JSON object.

use drumline_wire::v1;
use serde::Serialize;
use serde_json::Value;

/// The demo's findings.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    /// The cluster that was started.
    pub cluster: ClusterReport,
    /// The training run.
    pub training: TrainingReport,
    /// Its last checkpoint.
    pub checkpoint: CheckpointReport,
    /// The served model.
    pub serving: ServingReport,
    /// The dashboard's address, with the key that opens it.
    pub dashboard: String,
    /// The control plane's metrics.
    pub metrics: String,
}

/// The cluster that was started.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ClusterReport {
    /// Node agents.
    pub nodes: u32,
    /// Their devices.
    pub devices: u32,
}

/// The training run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct TrainingReport {
    /// The job's id.
    pub job: String,
    /// Rank processes.
    pub ranks: u32,
    /// Ranks that share each layer.
    pub tensor: u32,
    /// Pipeline stages.
    pub pipeline: u32,
    /// Copies of the model.
    pub data: u32,
    /// Parameters of the model.
    pub parameters: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens trained on, repeated steps counted once.
    pub tokens: u64,
    /// Loss of the first step.
    pub loss_first: f64,
    /// Loss of the last step.
    pub loss_last: f64,
    /// Loss on the held-out split at the end.
    pub loss_validation: f64,
    /// Tokens over the time between the first and the last report of a step, without restarts.
    pub tokens_per_second: f64,
    /// Restarts of the gang.
    pub restarts: u32,
}

/// The last checkpoint.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CheckpointReport {
    /// Its folder.
    pub path: String,
    /// Its step.
    pub step: u64,
}

/// The served model.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ServingReport {
    /// Base address for OpenAI clients.
    pub endpoint: String,
    /// The model's name in requests.
    pub model: String,
    /// What it said.
    pub completion: String,
}

impl TrainingReport {
    /// Sums up a finished training job; `tokens_per_second` is measured over the whole run.
    #[must_use]
    pub(super) fn new(job: &v1::JobView, tokens_per_second: f64) -> Self {
        let training = job.training.clone().unwrap_or_default();
        Self {
            job: job.id.clone(),
            ranks: job.world_size,
            tensor: job.tensor,
            pipeline: job.pipeline,
            data: job.data,
            parameters: training.parameters,
            steps: training.step,
            tokens: training.tokens,
            loss_first: training.loss_first,
            loss_last: training.loss,
            loss_validation: training.loss_validation,
            tokens_per_second,
            restarts: job.restarts,
        }
    }
}

impl Report {
    /// Returns the JSON object.
    ///
    /// # Panics
    /// Never: the fields are plain numbers and texts.
    #[must_use]
    pub(super) fn json(&self) -> Value {
        serde_json::to_value(self).expect("plain fields become JSON")
    }
}
