//! What the control plane answers, as JSON with stable names: the shape of `--output json`.

use drumline_wire::v1;
use serde_json::{Map, Value, json};

/// A job as JSON. What does not apply to it is left out.
#[must_use]
pub fn job(view: &v1::JobView) -> Value {
    let mut out = json!({
        "id": view.id,
        "name": view.name,
        "kind": view.kind,
        "phase": view.phase,
        "reason": view.reason,
        "message": view.message,
        "remedy": view.remedy,
        "queue": view.queue,
        "priority": view.priority,
        "device": view.device_kind,
        "ranks": view.world_size,
        "tensor": view.tensor,
        "pipeline": view.pipeline,
        "data": view.data,
        "attempt": view.attempt,
        "restarts": view.restarts,
        "created_ms": view.created_ms,
        "started_ms": moment(view.started_ms),
        "finished_ms": moment(view.finished_ms),
        "placement": view.ranks.iter().map(rank).collect::<Vec<_>>(),
    });
    let Some(entries) = out.as_object_mut() else { return out };
    if let Some(run) = &view.training {
        entries.insert("training".to_owned(), training(run));
    }
    if let Some(served) = &view.service {
        entries.insert("service".to_owned(), service(served));
    }
    if let Some(exit) = &view.first_failure {
        entries.insert("first_failure".to_owned(), rank_exit(exit));
    }
    if !view.spares.is_empty() {
        let spare = |spare: &v1::SpareView| json!({"node": spare.node, "device": spare.device, "lent_to": spare.lent_to});
        entries.insert("spares".to_owned(), view.spares.iter().map(spare).collect());
    }
    if !view.events.is_empty() {
        entries.insert("events".to_owned(), view.events.iter().map(event).collect());
    }
    if let Ok(spec) = serde_json::from_str::<Value>(&view.spec_json) {
        entries.insert("spec".to_owned(), spec);
    }
    out
}

/// A moment, or nothing when it has not come.
fn moment(ms: u64) -> Value {
    if ms == 0 { Value::Null } else { json!(ms) }
}

fn rank(view: &v1::RankView) -> Value {
    json!({
        "rank": view.rank,
        "node": view.node,
        "device": view.device,
        "tensor": view.tensor,
        "pipeline": view.pipeline,
        "data": view.data,
        "phase": view.phase,
        "pid": view.pid,
        "step": view.step,
        "exit_code": view.exit_code,
        "signal": view.signal,
        "log_bytes": view.log_bytes,
        "memory_bytes": view.memory_bytes,
        "cpu_cores": view.cpu_cores,
    })
}

fn training(view: &v1::TrainingView) -> Value {
    json!({
        "step": view.step,
        "steps": view.steps,
        "loss": view.loss,
        "loss_first": view.loss_first,
        "loss_validation": view.loss_validation,
        "grad_norm": view.grad_norm,
        "learning_rate": view.learning_rate,
        "tokens_per_second": view.tokens_per_second,
        "tokens": view.tokens,
        "parameters": view.parameters,
        "mfu": view.mfu,
        "eta_ms": view.eta_ms,
        "checkpoint_step": view.checkpoint_step,
        "checkpoint_path": view.checkpoint_path,
        "last_step_ms": moment(view.last_step_ms),
    })
}

fn service(view: &v1::ServiceView) -> Value {
    json!({
        "model": view.served_name,
        "ready": view.ready,
        "endpoint": gateway_v1(&view.gateway_url),
        "running": view.running,
        "waiting": view.waiting,
        "kv_usage": view.kv_usage,
        "tokens_per_second": view.tokens_per_second,
        "max_context": view.max_context,
        "max_batch": view.max_batch,
        "max_queue": view.max_queue,
        "last_step_ms": moment(view.last_step_ms),
        "replicas": view.replicas,
        "replicas_ready": view.replicas_ready,
        "replica_jobs": view.replica_jobs,
        "replica_of": view.replica_of,
        "replica": view.replica,
        "drains": view.drains,
    })
}

/// The base address that OpenAI clients are given, or nothing without a gateway.
#[must_use]
pub fn gateway_v1(gateway_url: &str) -> Value {
    if gateway_url.is_empty() {
        Value::Null
    } else {
        json!(format!("{}/v1", gateway_url.trim_end_matches('/')))
    }
}

fn rank_exit(view: &v1::RankExitView) -> Value {
    json!({
        "rank": view.rank,
        "node": view.node,
        "attempt": view.attempt,
        "exit_code": view.exit_code,
        "signal": view.signal,
        "message": view.message,
    })
}

/// An event as JSON.
#[must_use]
pub fn event(view: &v1::EventView) -> Value {
    let mut entries = Map::new();
    entries.insert("at_ms".to_owned(), json!(view.at_ms));
    for (name, text) in [
        ("severity", &view.severity),
        ("reason", &view.reason),
        ("message", &view.message),
        ("job", &view.job),
        ("node", &view.node),
    ] {
        if !text.is_empty() {
            entries.insert(name.to_owned(), json!(text));
        }
    }
    if view.attempt > 0 {
        entries.insert("attempt".to_owned(), json!(view.attempt));
    }
    Value::Object(entries)
}

/// A node as JSON.
#[must_use]
pub fn node(view: &v1::NodeView) -> Value {
    json!({
        "name": view.name,
        "phase": view.phase,
        "address": view.address,
        "last_seen_ms": moment(view.last_seen_ms),
        "cores": view.cores,
        "memory_bytes": view.memory_bytes,
        "cpu_cores_used": view.cpu_cores_used,
        "memory_used_bytes": view.memory_used_bytes,
        "agent_version": view.agent_version,
        "message": view.message,
        "metrics": view.metrics_url,
        "topology": view.topology.iter().map(step).collect::<Vec<_>>(),
        "devices": view.devices.iter().map(device).collect::<Vec<_>>(),
    })
}

fn step(view: &v1::TopologyStep) -> Value {
    let link = (view.link_mb_per_s > 0).then_some(view.link_mb_per_s);
    json!({ "level": view.level, "name": view.name, "link_mb_per_s": link })
}

fn device(view: &v1::DeviceView) -> Value {
    json!({
        "index": view.index,
        "kind": view.kind,
        "model": view.model,
        "memory_bytes": view.memory_bytes,
        "healthy": view.healthy,
        "message": view.message,
        "job": if view.job.is_empty() { Value::Null } else { json!(view.job) },
        "rank": if view.job.is_empty() { Value::Null } else { json!(view.rank) },
        "utilization": view.utilization,
        "memory_used_bytes": view.memory_used_bytes,
        "idle": view.idle,
        "action": view.action,
        "uuid": view.uuid,
    })
}

/// The fleet as JSON.
#[must_use]
pub fn fleet(view: &v1::FleetView) -> Value {
    json!({
        "now_ms": view.now_ms,
        "devices": view.devices_total,
        "devices_allocated": view.devices_allocated,
        "devices_idle": view.devices_idle,
        "devices_unhealthy": view.devices_unhealthy,
        "utilization": view.utilization,
        "jobs_running": view.jobs_running,
        "jobs_pending": view.jobs_pending,
        "nodes": view.nodes.iter().map(node).collect::<Vec<_>>(),
        "jobs": view.jobs.iter().map(job).collect::<Vec<_>>(),
    })
}

/// A submitted job as JSON.
#[must_use]
pub fn submitted(view: &v1::SubmittedJob, dry_run: bool) -> Value {
    let mut out = json!({
        "id": view.id, "kind": view.kind, "name": view.name, "ranks": view.ranks,
    });
    if let (false, Some(entries)) = (view.split.is_empty(), out.as_object_mut()) {
        entries.insert("split".to_owned(), json!(view.split));
    }
    if let (true, Some(entries)) = (dry_run, out.as_object_mut()) {
        entries.insert("placement".to_owned(), view.placement.iter().map(rank).collect());
        entries.insert("reason".to_owned(), json!(view.reason));
        entries.insert("message".to_owned(), json!(view.message));
    }
    out
}
