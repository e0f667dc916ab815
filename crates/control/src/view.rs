//! Jobs as readers see them.

use drumline_lifecycle::{Note, RankState};
use drumline_spec::Work;
use drumline_types::{DeviceId, JobId, JobPhase, Timestamp};
use drumline_wire::{convert, v1};

use crate::job::Job;

/// A service whose ranks were not heard for so long is not ready, in milliseconds.
const READY_MS: u64 = 5_000;

/// Returns a job. The spec is long, so only those who ask for one job get it.
pub(crate) fn job(job: &Job, gateway_url: &str, with_spec: bool) -> v1::JobView {
    let state = job.state();
    let split = job.split();
    let gang = job.spec.gang();
    let mut view = v1::JobView {
        id: state.job.to_string(),
        name: job.spec.name.clone(),
        kind: job.spec.kind().as_str().to_owned(),
        phase: state.phase.as_str().to_owned(),
        queue: job.spec.settings.queue.to_string(),
        priority: job.spec.settings.priority,
        attempt: state.attempt.0,
        restarts: state.restarts,
        created_ms: state.created.0,
        started_ms: state.started.unwrap_or_default().0,
        finished_ms: state.finished.unwrap_or_default().0,
        ranks: state.ranks.iter().map(|rank| self::rank(job, rank)).collect(),
        world_size: gang.ranks,
        tensor: split.tensor,
        pipeline: split.pipeline,
        data: split.data,
        training: training(job),
        service: service(job, gateway_url)
            .map(|view| v1::ServiceView { secret: String::new(), ..view }),
        first_failure: state.first_failure.as_ref().map(|failure| v1::RankExitView {
            node: failure.node.to_string(),
            attempt: failure.attempt.0,
            ..v1::RankExitView::from(&failure.exit)
        }),
        device_kind: gang.device.as_str().to_owned(),
        spares: job.spares.iter().map(spare).collect(),
        ..v1::JobView::default()
    };
    convert::explain(&mut view, &state.why);
    if state.phase == JobPhase::Running {
        // It waits for nothing; how it came to run is in its history.
        view.reason.clear();
        view.message.clear();
        view.remedy.clear();
    }
    if with_spec {
        view.spec_json = job.spec_json.to_string();
        view.events = job.stored.notes.iter().map(|note| event(state.job.as_str(), note)).collect();
    }
    view
}

/// Returns a line of a job's history.
pub(crate) fn event(job: &str, note: &Note) -> v1::EventView {
    v1::EventView {
        at_ms: note.at.0,
        severity: note.severity.as_str().to_owned(),
        reason: note.reason.clone(),
        message: note.message.clone(),
        job: job.to_owned(),
        node: String::new(),
        attempt: note.attempt.0,
    }
}

fn spare((device, lent_to): &(DeviceId, Option<JobId>)) -> v1::SpareView {
    v1::SpareView {
        node: device.node.to_string(),
        device: device.index,
        lent_to: lent_to.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}

fn rank(job: &Job, rank: &RankState) -> v1::RankView {
    let sample = job.samples.get(&rank.rank.0).cloned().unwrap_or_default();
    let live = !rank.phase.is_terminal();
    v1::RankView {
        rank: rank.rank.0,
        node: rank.device.node.to_string(),
        device: rank.device.index,
        tensor: rank.coords.tensor,
        pipeline: rank.coords.pipeline,
        data: rank.coords.data,
        phase: rank.phase.as_str().to_owned(),
        pid: rank.pid,
        step: rank.step,
        exit_code: rank.exit.as_ref().and_then(|exit| exit.code),
        signal: rank.exit.as_ref().and_then(|exit| exit.signal),
        log_bytes: sample.log_bytes,
        memory_bytes: if live { sample.memory_bytes } else { 0 },
        cpu_cores: if live { sample.cpu_cores } else { 0.0 },
    }
}

fn training(job: &Job) -> Option<v1::TrainingView> {
    let Work::TrainingJob(spec) = &job.spec.work else { return None };
    let (state, training) = (job.state(), &job.stored.training);
    let loss = training.loss?;
    let per_step = spec.tokens_per_step();
    let running = state.phase == JobPhase::Running;
    let left = spec.steps.saturating_sub(training.step) as f64;
    let rate = if running { training.tokens_per_second(per_step) } else { 0.0 };
    let checkpoint = state.checkpoint.clone();
    Some(v1::TrainingView {
        step: training.step,
        steps: spec.steps,
        loss,
        loss_first: training.loss_first.unwrap_or(loss),
        loss_validation: training.loss_validation.unwrap_or(0.0),
        grad_norm: training.grad_norm,
        learning_rate: training.learning_rate,
        // After the end: the last step's, so that the record of a run tells how fast it was.
        tokens_per_second: if state.phase.is_terminal() {
            training.tokens_per_second(per_step)
        } else {
            rate
        },
        tokens: training.step * per_step,
        parameters: training.parameters,
        mfu: training.mfu,
        eta_ms: if running { (left * training.pace_seconds * 1000.0) as u64 } else { 0 },
        checkpoint_step: checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step),
        checkpoint_path: checkpoint.map(|checkpoint| checkpoint.path).unwrap_or_default(),
        last_step_ms: training.last_step.0,
        breakdown: Some(v1::StepBreakdown {
            matmul_seconds: training.matmul_seconds,
            attention_seconds: training.attention_seconds,
            other_seconds: training.other_seconds,
            communication_seconds: training.communication_seconds,
            bubble_seconds: training.bubble_seconds,
            communication_hidden_seconds: training.hidden_seconds,
            idle_seconds: training.idle_seconds,
            matmul_peak_share: training.matmul_peak_share,
            optimizer_bytes_per_second: training.optimizer_bytes_per_second,
            step_seconds: training.step_seconds,
        }),
    })
}

/// Returns a service, with the secret of its present attempt; `None` for other kinds.
pub(crate) fn service(job: &Job, gateway_url: &str) -> Option<v1::ServiceView> {
    let Work::ModelService(spec) = &job.spec.work else { return None };
    let state = job.state();
    if state.phase.is_terminal() {
        return None;
    }
    let running = state.phase == JobPhase::Running;
    let leader = state.ranks.iter().filter_map(|rank| rank.join.as_ref());
    let endpoint = leader.map(|join| join.inference_url.clone()).find(|url| !url.is_empty());
    let last = job.serving.last.unwrap_or_default();
    let ready = running && last.ready && endpoint.is_some() && !job.drains;
    Some(v1::ServiceView {
        job: state.job.to_string(),
        served_name: spec.served_name.clone(),
        endpoint: endpoint.filter(|_| running).unwrap_or_default(),
        ready,
        last_step_ms: job.serving.last_step.0,
        running: last.running,
        waiting: last.waiting,
        kv_usage: last.kv_usage,
        tokens_per_second: if running { job.serving.tokens_per_second } else { 0.0 },
        max_context: last.max_context.max(spec.max_context),
        max_batch: last.max_batch.max(spec.max_batch),
        max_queue: spec.max_queue,
        secret: state.rendezvous.secret.clone(),
        gateway_url: gateway_url.to_owned(),
        replica_of: job
            .stored
            .replica_of
            .as_ref()
            .map(|of| of.service.to_string())
            .unwrap_or_default(),
        replica: job.stored.replica_of.as_ref().map_or(0, |of| of.number),
        replicas: job.replicas.wanted,
        replicas_ready: job.replicas.ready,
        replica_jobs: job.replicas.jobs.iter().map(ToString::to_string).collect(),
        drains: job.drains,
    })
}

/// Whether a service's last report is recent enough to believe.
pub(crate) fn is_fresh(heard: Timestamp, now: Timestamp) -> bool {
    now.since_ms(heard) < READY_MS
}

/// Returns the mean utilization of all healthy devices, 0 to 1.
pub(crate) fn mean_utilization(nodes: &[v1::NodeView]) -> f64 {
    let healthy = || nodes.iter().flat_map(|node| &node.devices).filter(|device| device.healthy);
    let count = healthy().count();
    if count == 0 { 0.0 } else { healthy().map(|d| d.utilization).sum::<f64>() / count as f64 }
}
