//! The status that the operator writes: its type, and its schema beside it.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// One standard condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about, such as `Complete`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// A token of the one list of reasons.
    pub reason: String,
    /// The evidence, in one line.
    pub message: String,
    /// When `status` last changed, RFC 3339.
    pub last_transition_time: String,
    /// The generation of the spec that it is about.
    #[serde(default)]
    pub observed_generation: i64,
}

/// What is known of a job.
///
/// It is small on purpose, whatever the number of ranks: which rank runs where is in the pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub struct JobStatus {
    /// Where the job stands; the same words as everywhere else.
    #[serde(default)]
    pub phase: String,
    /// Why: a token of the one list of reasons.
    #[serde(default)]
    pub reason: String,
    /// The evidence, in one line.
    #[serde(default)]
    pub message: String,
    /// The newest attempt; 0 before the first. Written before any pod of the attempt exists.
    #[serde(default)]
    pub attempt: u32,
    /// Restarts so far.
    #[serde(default)]
    pub restarts: u32,
    /// Restarts since the last progress.
    #[serde(default)]
    pub fruitless: u32,
    /// No attempt starts before this moment, in milliseconds since 1970.
    #[serde(default)]
    pub not_before_ms: u64,
    /// When the newest attempt was launched, in milliseconds since 1970.
    #[serde(default)]
    pub launched_ms: u64,
    /// When every rank of the newest attempt ran, in milliseconds since 1970; 0: not yet.
    #[serde(default)]
    pub running_since_ms: u64,
    /// Ranks that run, of all: `7/8`.
    #[serde(default)]
    pub ready: String,
    /// Replicas that there are, the service itself included; services only.
    #[serde(default)]
    pub replicas: u32,
    /// Replicas that serve.
    #[serde(default)]
    pub ready_replicas: u32,
    /// Selects the job's pods.
    #[serde(default)]
    pub selector: String,
    /// The last finished step of a training run.
    #[serde(default)]
    pub step: Option<u64>,
    /// The loss of that step.
    #[serde(default)]
    pub loss: Option<String>,
    /// The step of the newest complete checkpoint.
    #[serde(default)]
    pub checkpoint: Option<u64>,
    /// The same when the newest attempt was launched: whether an attempt has brought the job on.
    #[serde(default)]
    pub checkpoint_at_launch: Option<u64>,
    /// Ranks of the newest attempt; 0 before the first.
    #[serde(default)]
    pub ranks: u32,
    /// The generation of the spec that this is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// `Complete`, `Failed` and `Ready`.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// Returns the schema of [`JobStatus`].
#[must_use]
pub fn job_schema() -> Value {
    let text = |doc: &str| json!({ "type": "string", "description": doc });
    let count = |doc: &str| json!({ "type": "integer", "format": "int64", "minimum": 0, "description": doc });
    let maybe = |doc: &str| {
        let mut schema = count(doc);
        schema["nullable"] = json!(true);
        schema
    };
    json!({
        "type": "object",
        "description": "Written by the operator; not read from manifests.",
        "properties": {
            "phase": text("pending, starting, running, restarting, succeeded or failed."),
            "reason": text("Why it is there: a token of the one list of reasons."),
            "message": text("The evidence, in one line."),
            "attempt": count("The newest attempt; 0 before the first."),
            "restarts": count("Restarts so far."),
            "fruitless": count("Restarts since the last progress."),
            "notBeforeMs": count("No attempt starts before this. Unit: milliseconds since 1970."),
            "launchedMs": count("When the newest attempt was launched. Unit: milliseconds since 1970."),
            "runningSinceMs": count("When every rank ran. Unit: milliseconds since 1970."),
            "ready": text("Ranks that run, of all."),
            "replicas": count("Replicas that there are, the service itself included; services only."),
            "readyReplicas": count("Replicas that serve."),
            "selector": text("Selects the job's pods; of a service those of all its replicas."),
            "step": maybe("The last finished step of a training run."),
            "loss": { "type": "string", "nullable": true, "description": "The loss of that step." },
            "checkpoint": maybe("The step of the newest complete checkpoint."),
            "checkpointAtLaunch": maybe("The same when the newest attempt was launched."),
            "ranks": count("Ranks of the newest attempt; 0 before the first."),
            "observedGeneration": count("The generation of the spec that this is about."),
            "conditions": conditions(),
        },
    })
}

/// Returns the schema of a queue's status.
#[must_use]
pub fn queue_schema() -> Value {
    json!({
        "type": "object",
        "description": "Written by the operator.",
        "properties": {
            "pending": { "type": "integer", "format": "int64", "description": "Jobs that wait." },
            "running": { "type": "integer", "format": "int64", "description": "Jobs that hold devices." },
            "conditions": conditions(),
        },
    })
}

fn conditions() -> Value {
    json!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": { "type": "string" },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                "reason": { "type": "string" },
                "message": { "type": "string" },
                "lastTransitionTime": { "type": "string", "format": "date-time" },
                "observedGeneration": { "type": "integer", "format": "int64" },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_knows_every_field_of_the_status() {
        let status = JobStatus::default();
        let written = serde_json::to_value(status).unwrap();
        let schema = job_schema();
        let known = schema["properties"].as_object().unwrap();
        let written = written.as_object().unwrap();
        assert!(written.keys().eq(known.keys()), "{:?} {:?}", written.keys(), known.keys());
    }
}
