//! What `kubectl get` shows of each kind.

use serde_json::{Value, json};

fn column(name: &str, kind: &str, path: &str) -> Value {
    json!({ "name": name, "type": kind, "jsonPath": path })
}

/// Details: shown with `-o wide` only.
fn wide(name: &str, kind: &str, path: &str) -> Value {
    json!({ "name": name, "type": kind, "jsonPath": path, "priority": 1 })
}

/// Returns the printer columns of a kind.
#[must_use]
pub fn of(kind: &str) -> Vec<Value> {
    let mut columns = Vec::new();
    if kind == "Queue" {
        columns.push(column("Parent", "string", ".spec.parent"));
        columns.push(column("Pending", "integer", ".status.pending"));
        columns.push(column("Running", "integer", ".status.running"));
    } else {
        columns.push(column("Phase", "string", ".status.phase"));
        columns.push(column("Reason", "string", ".status.reason"));
        if kind == "TrainingJob" {
            columns.push(column("Step", "integer", ".status.step"));
        }
        if kind == "ModelService" {
            columns.push(column("Replicas", "integer", ".status.replicas"));
            columns.push(column("Serving", "integer", ".status.readyReplicas"));
        }
        columns.push(column("Ranks", "string", ".status.ready"));
        columns.push(column("Queue", "string", ".spec.queue"));
        if kind == "TrainingJob" {
            columns.push(wide("Loss", "string", ".status.loss"));
            columns.push(wide("Checkpoint", "integer", ".status.checkpoint"));
        }
        columns.push(wide("Attempt", "integer", ".status.attempt"));
        columns.push(wide("Message", "string", ".status.message"));
    }
    columns.push(column("Age", "date", ".metadata.creationTimestamp"));
    columns
}
