//! A job's object, its pods and its events, told as the control API tells jobs.

use drumline_spec::{JobSpec, Work};
use drumline_types::{JobPhase, Reason};
use drumline_wire::v1;
use k8s_openapi::api::events::v1::Event;
use kube::api::DynamicObject;

use crate::front::phase_of;
use crate::gang::{Member, Standing};
use crate::job::Job;

/// Returns what commands call a job: as `kubectl` does.
pub(crate) fn id(job: &Job) -> String {
    format!("{}/{}", job.kind.as_str().to_ascii_lowercase(), job.name)
}

/// Returns a job with what its status says; its pods and events where they were read.
pub(crate) fn view(job: &Job, members: &[Member], events: &[Event]) -> v1::JobView {
    let status = &job.status;
    let phase = phase_of(job);
    let (reason, message) = match (&job.spec, status.reason.as_str(), phase) {
        (_, _, JobPhase::Cancelling) => {
            (Reason::CancelledByUser.token(), "its deletion was asked for".to_owned())
        }
        (Err(mistakes), "", _) => {
            (Reason::NotYetConsidered.token(), format!("the spec is refused: {mistakes}"))
        }
        (Ok(_), "", JobPhase::Pending) if !job.has_status => (
            Reason::NotYetConsidered.token(),
            "no operator has looked at it yet; is one running?".to_owned(),
        ),
        (_, reason, _) => (reason, status.message.clone()),
    };
    let mut view = v1::JobView {
        id: id(job),
        name: job.name.clone(),
        kind: job.kind.as_str().to_owned(),
        phase: phase.as_str().to_owned(),
        reason: reason.to_owned(),
        message,
        remedy: Reason::from_token(reason).map(Reason::remedy).unwrap_or_default().to_owned(),
        attempt: status.attempt,
        restarts: status.restarts,
        created_ms: job.created_ms,
        started_ms: status.running_since_ms,
        finished_ms: finished_ms(job),
        events: events.iter().map(|event| told(event, status.attempt)).collect(),
        ..v1::JobView::default()
    };
    if let Ok(spec) = &job.spec {
        asked(&mut view, job, spec);
        view.ranks = members.iter().map(|member| rank(member, spec)).collect();
    }
    if phase == JobPhase::Failed || phase == JobPhase::Restarting {
        view.first_failure = members.iter().find_map(failure);
    }
    view
}

/// What the spec says.
fn asked(view: &mut v1::JobView, job: &Job, spec: &JobSpec) {
    let status = &job.status;
    let gang = spec.gang();
    let split = spec.parallelism();
    view.queue = spec.settings.queue.to_string();
    view.priority = spec.settings.priority;
    view.world_size = gang.ranks;
    gang.device.as_str().clone_into(&mut view.device_kind);
    (view.tensor, view.pipeline, view.data) = (split.tensor, split.pipeline, split.data);
    match &spec.work {
        Work::TrainingJob(run) if status.step.is_some() => {
            let step = status.step.unwrap_or_default();
            view.training = Some(v1::TrainingView {
                step,
                steps: run.steps,
                loss: status.loss.as_ref().and_then(|loss| loss.parse().ok()).unwrap_or_default(),
                tokens: step.saturating_mul(run.tokens_per_step()),
                parameters: run.model.parameters(),
                checkpoint_step: status.checkpoint.unwrap_or_default(),
                checkpoint_path: match status.checkpoint {
                    Some(_) => run.checkpoint.path.clone(),
                    None => String::new(),
                },
                ..v1::TrainingView::default()
            });
        }
        Work::ModelService(service) => {
            view.service = Some(v1::ServiceView {
                job: view.id.clone(),
                served_name: service.served_name.clone(),
                // Of a service the operator tells how many replicas serve; of one replica that it runs.
                ready: view.phase == JobPhase::Running.as_str()
                    && (job.replica_of.is_some() || status.ready_replicas > 0),
                max_context: service.max_context,
                max_batch: service.max_batch,
                max_queue: service.max_queue,
                replica_of: job
                    .replica_of
                    .as_ref()
                    .map(|of| of.service.clone())
                    .unwrap_or_default(),
                replica: job.replica_of.as_ref().map_or(0, |of| of.number),
                replicas: status.replicas,
                replicas_ready: status.ready_replicas,
                ..v1::ServiceView::default()
            });
        }
        _ => {}
    }
}

/// Adds what only one job alone is told with: its spec as it is stored.
pub(crate) fn in_full(view: &mut v1::JobView, object: &DynamicObject) {
    view.spec_json = object.data.get("spec").map(ToString::to_string).unwrap_or_default();
}

fn rank(member: &Member, spec: &JobSpec) -> v1::RankView {
    let split = spec.parallelism();
    // Innermost first: tensor, pipeline, data.
    let (tensor, pipeline) = (split.tensor.max(1), split.pipeline.max(1));
    let phase = match member.standing {
        Standing::Unbound => "launching",
        Standing::Bound => "started",
        Standing::Running => "running",
        Standing::Succeeded => "succeeded",
        Standing::Failed => "failed",
    };
    v1::RankView {
        rank: member.rank,
        node: member.node.clone().unwrap_or_default(),
        device: member.slot.unwrap_or_default(),
        tensor: member.rank % tensor,
        pipeline: member.rank / tensor % pipeline,
        data: member.rank / tensor / pipeline,
        phase: phase.to_owned(),
        exit_code: member.exit_code,
        ..v1::RankView::default()
    }
}

fn failure(member: &Member) -> Option<v1::RankExitView> {
    (member.standing == Standing::Failed).then(|| v1::RankExitView {
        rank: member.rank,
        node: member.node.clone().unwrap_or_default(),
        exit_code: member.exit_code,
        signal: None,
        message: member.told.clone(),
        attempt: member.attempt,
    })
}

/// When its end was written: the change of `Complete` or `Failed` to true.
fn finished_ms(job: &Job) -> u64 {
    let ends = |kind: &str| matches!(kind, "Complete" | "Failed");
    let mut conditions = job.status.conditions.iter();
    let ended = conditions.find(|one| ends(&one.kind) && one.status == "True");
    ended.map(|one| ms(&one.last_transition_time)).unwrap_or_default()
}

fn ms(rfc3339: &str) -> u64 {
    let moment: Option<k8s_openapi::jiff::Timestamp> = rfc3339.parse().ok();
    moment.and_then(|at| u64::try_from(at.as_millisecond()).ok()).unwrap_or_default()
}

/// Returns an event as it is told.
pub(crate) fn told(event: &Event, attempt: u32) -> v1::EventView {
    let first = event.event_time.as_ref().map(|at| at.0);
    let last = event.series.as_ref().map(|series| series.last_observed_time.0);
    let written = event.metadata.creation_timestamp.as_ref().map(|at| at.0);
    let at = last.or(first).or(written).map(|at| at.as_millisecond());
    let regarding = event.regarding.as_ref();
    let job = regarding.map(|one| {
        let kind = one.kind.as_deref().unwrap_or_default().to_ascii_lowercase();
        format!("{kind}/{}", one.name.as_deref().unwrap_or_default())
    });
    v1::EventView {
        at_ms: at.and_then(|at| u64::try_from(at).ok()).unwrap_or_default(),
        severity: match event.type_.as_deref() {
            Some("Warning") => "warning",
            _ => "info",
        }
        .to_owned(),
        reason: event.reason.clone().unwrap_or_default(),
        message: event.note.clone().unwrap_or_default(),
        job: job.unwrap_or_default(),
        node: String::new(),
        attempt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::resource;
    use drumline_spec::JobKind;
    use serde_json::{Value, json};

    fn job(status: Value, deleting: bool) -> Job {
        let kind = JobKind::TrainingJob;
        let mut object: DynamicObject = DynamicObject::new("demo", &resource(kind));
        object.metadata.namespace = Some("team".to_owned());
        object.metadata.uid = Some("0f3a1b2c-1111-2222-3333-444455556666".to_owned());
        object.metadata.resource_version = Some("7".to_owned());
        if deleting {
            object.metadata.deletion_timestamp =
                serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        }
        object.data = json!({ "status": status, "spec": {
            "model": { "family": "llama", "layers": 2, "hidden": 64, "ffn": 128, "heads": 4,
                       "vocab": 300, "context": 64 },
            "data": { "path": "data" }, "parallelism": { "tensor": 2 }, "batch": { "global": 8 }, "steps": 100,
            "learningRate": { "peak": 0.001 },
        }});
        Job::read(kind, &object).unwrap()
    }

    #[test]
    fn a_job_is_told_as_everywhere_else() {
        let waits = view(
            &job(
                json!({ "phase": "pending", "reason": "WaitingForDevices", "message": "0 of 2" }),
                false,
            ),
            &[],
            &[],
        );
        assert_eq!((waits.id.as_str(), waits.phase.as_str()), ("trainingjob/demo", "pending"));
        assert_eq!((waits.reason.as_str(), waits.world_size), ("WaitingForDevices", 2));
        assert!(!waits.remedy.is_empty());
        let done = json!({
            "phase": "succeeded", "reason": "Completed", "attempt": 2, "restarts": 1,
            "step": 100, "loss": "2.5", "checkpoint": 100,
            "conditions": [{ "type": "Complete", "status": "True", "reason": "Completed",
                "message": "", "lastTransitionTime": "1970-01-01T00:00:05Z" }],
        });
        let done = view(&job(done, false), &[], &[]);
        let run = done.training.unwrap();
        assert_eq!((run.step, run.steps, run.loss, run.checkpoint_step), (100, 100, 2.5, 100));
        assert_eq!((done.finished_ms, done.restarts), (5000, 1));
        let leaves = view(&job(json!({ "phase": "running" }), true), &[], &[]);
        assert_eq!(leaves.phase, "cancelling");
        let unseen = Job { has_status: false, ..job(json!({}), false) };
        let unseen = view(&unseen, &[], &[]);
        assert_eq!(
            (unseen.phase.as_str(), unseen.reason.as_str()),
            ("pending", "NotYetConsidered")
        );
    }
}
