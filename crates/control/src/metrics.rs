//! What the control plane counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drumline_lifecycle::Severity;
use drumline_spec::{DeviceKind, JobKind};
use drumline_telemetry::table;
use drumline_types::JobPhase;
use drumline_wire::v1;
use prometheus::{GaugeVec, HistogramVec, IntCounterVec, IntGaugeVec, Registry};

use crate::board::Board;
use crate::core::Was;
use crate::job::Job;

/// Training runs that have ended and whose last figures are still exported.
const ENDED_SERIES_MAX: usize = 50;

/// Counters, gauges and histograms. Cloning shares them.
#[derive(Debug, Clone)]
pub(crate) struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    leader_term: IntGaugeVec,
    agents: IntGaugeVec,
    nodes: IntGaugeVec,
    devices: IntGaugeVec,
    allocated: IntGaugeVec,
    idle: IntGaugeVec,
    unhealthy: IntGaugeVec,
    utilization: GaugeVec,
    jobs: IntGaugeVec,
    pending: IntGaugeVec,
    submitted: IntCounterVec,
    ended: IntCounterVec,
    gang_wait: HistogramVec,
    gang_start: HistogramVec,
    restarts: IntCounterVec,
    placement: HistogramVec,
    audit: HistogramVec,
    violations: IntCounterVec,
    store_txn: HistogramVec,
    inbox: IntGaugeVec,
    step: GaugeVec,
    loss: GaugeVec,
    loss_validation: GaugeVec,
    tokens_per_second: GaugeVec,
    tokens: GaugeVec,
    mfu: GaugeVec,
    step_seconds: GaugeVec,
    matmul_peak: GaugeVec,
    optimizer_rate: GaugeVec,
    checkpoint_step: GaugeVec,
    service_ready: IntGaugeVec,
    service_running: IntGaugeVec,
    service_waiting: IntGaugeVec,
    service_kv: GaugeVec,
    service_tokens: IntCounterVec,
    /// Label values that were set, so that those of vanished jobs can be removed.
    shown: Mutex<BTreeSet<String>>,
}

const NONE: &[&str] = &[];

impl Metrics {
    pub(crate) fn register(registry: &Registry, commit: &str) -> Result<Self, prometheus::Error> {
        let info = table::BUILD_INFO.int_gauge(registry)?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION"), commit]).set(1);
        Ok(Self(Arc::new(Inner {
            leader_term: table::LEADER_TERM.int_gauge(registry)?,
            agents: table::AGENTS_CONNECTED.int_gauge(registry)?,
            nodes: table::NODES.int_gauge(registry)?,
            devices: table::DEVICES.int_gauge(registry)?,
            allocated: table::DEVICES_ALLOCATED.int_gauge(registry)?,
            idle: table::DEVICES_IDLE.int_gauge(registry)?,
            unhealthy: table::DEVICES_UNHEALTHY.int_gauge(registry)?,
            utilization: table::FLEET_UTILIZATION.gauge(registry)?,
            jobs: table::JOBS.int_gauge(registry)?,
            pending: table::JOBS_PENDING.int_gauge(registry)?,
            submitted: table::JOBS_SUBMITTED.int_counter(registry)?,
            ended: table::JOBS_ENDED.int_counter(registry)?,
            gang_wait: table::GANG_WAIT.histogram(registry)?,
            gang_start: table::GANG_START.histogram(registry)?,
            restarts: table::GANG_RESTARTS.int_counter(registry)?,
            placement: table::PLACEMENT_DURATION.histogram(registry)?,
            audit: table::AUDIT_DURATION.histogram(registry)?,
            violations: table::AUDIT_VIOLATIONS.int_counter(registry)?,
            store_txn: table::STORE_TXN_DURATION.histogram(registry)?,
            inbox: table::CONTROL_INBOX.int_gauge(registry)?,
            step: table::JOB_STEP.gauge(registry)?,
            loss: table::JOB_LOSS.gauge(registry)?,
            loss_validation: table::JOB_LOSS_VALIDATION.gauge(registry)?,
            tokens_per_second: table::JOB_TOKENS_PER_SECOND.gauge(registry)?,
            tokens: table::JOB_TOKENS.gauge(registry)?,
            mfu: table::JOB_MFU.gauge(registry)?,
            step_seconds: table::JOB_STEP_SECONDS.gauge(registry)?,
            matmul_peak: table::JOB_MATMUL_PEAK.gauge(registry)?,
            optimizer_rate: table::JOB_OPTIMIZER_RATE.gauge(registry)?,
            checkpoint_step: table::JOB_CHECKPOINT_STEP.gauge(registry)?,
            service_ready: table::SERVICE_READY.int_gauge(registry)?,
            service_running: table::SERVICE_RUNNING.int_gauge(registry)?,
            service_waiting: table::SERVICE_WAITING.int_gauge(registry)?,
            service_kv: table::SERVICE_KV_USAGE.gauge(registry)?,
            service_tokens: table::SERVICE_TOKENS.int_counter(registry)?,
            shown: Mutex::new(BTreeSet::new()),
        })))
    }

    pub(crate) fn leader_term(&self, term: u64) {
        self.0.leader_term.with_label_values(NONE).set(i64::try_from(term).unwrap_or(i64::MAX));
    }

    pub(crate) fn store_txn(&self, outcome: &str, took: Duration) {
        self.0.store_txn.with_label_values(&[outcome]).observe(took.as_secs_f64());
    }

    pub(crate) fn placement(&self, took: Duration) {
        self.0.placement.with_label_values(NONE).observe(took.as_secs_f64());
    }

    pub(crate) fn audit(&self, took: Duration, violations: usize) {
        self.0.audit.with_label_values(NONE).observe(took.as_secs_f64());
        self.0.violations.with_label_values(NONE).inc_by(violations as u64);
    }

    pub(crate) fn submitted(&self, kind: JobKind) {
        self.0.submitted.with_label_values(&[kind.as_str()]).inc();
    }

    pub(crate) fn inbox(&self, depth: usize) {
        self.0.inbox.with_label_values(NONE).set(depth as i64);
    }

    /// Counts what changed in a job's life.
    pub(crate) fn moved(&self, was: &Was, after: &Job) {
        let is = after.state();
        let kind = after.spec.kind().as_str();
        if is.attempt > was.attempt && is.attempt.0 == 1 {
            let waited = is.launched.unwrap_or_default().since_ms(is.created) as f64 / 1000.0;
            let queue = after.spec.settings.queue.as_str();
            self.0.gang_wait.with_label_values(&[queue]).observe(waited);
        }
        if !was.ran
            && let (Some(running), Some(launched)) = (is.running, is.launched)
        {
            let took = running.since_ms(launched) as f64 / 1000.0;
            self.0.gang_start.with_label_values(&[kind]).observe(took);
        }
        if is.restarts > was.restarts {
            let cause = after.stored.notes.iter().rev().find(|n| n.severity == Severity::Warning);
            let reason = cause.map_or("Unknown", |note| note.reason.as_str());
            self.0.restarts.with_label_values(&[kind, reason]).inc();
        }
        if is.phase.is_terminal() && !was.phase.is_terminal() {
            self.0.ended.with_label_values(&[kind, is.phase.as_str()]).inc();
        }
    }

    pub(crate) fn service_tokens(&self, service: &str, kind: &str, tokens: u64) {
        self.0.service_tokens.with_label_values(&[service, kind]).inc_by(tokens);
    }

    /// Brings the gauges up to date, just before they are read.
    pub(crate) fn refresh(&self, board: &Board) {
        self.fleet(board);
        let jobs = board.jobs();
        for kind in JobKind::ALL {
            for phase in PHASES {
                let count =
                    jobs.iter().filter(|j| j.spec.kind() == kind && j.state().phase == phase);
                let labels = [kind.as_str(), phase.as_str()];
                self.0.jobs.with_label_values(&labels).set(count.count() as i64);
            }
        }
        self.0.pending.reset();
        for job in jobs.iter().filter(|job| job.state().phase == JobPhase::Pending) {
            self.0.pending.with_label_values(&[job.state().why.reason.token()]).inc();
        }
        let mut now_shown = BTreeSet::new();
        let ended = jobs.iter().rev().filter(|job| job.state().phase.is_terminal());
        let live = jobs.iter().filter(|job| !job.state().phase.is_terminal());
        for job in live.chain(ended.take(ENDED_SERIES_MAX)) {
            self.training(job, &mut now_shown);
        }
        let mut shown = self.0.shown.lock().unwrap_or_else(PoisonError::into_inner);
        for gone in shown.difference(&now_shown) {
            for gauge in [
                &self.0.step,
                &self.0.loss,
                &self.0.loss_validation,
                &self.0.tokens_per_second,
                &self.0.tokens,
                &self.0.mfu,
                &self.0.matmul_peak,
                &self.0.optimizer_rate,
                &self.0.checkpoint_step,
            ] {
                // A figure that was never told was never set.
                let _ = gauge.remove_label_values(&[gone]);
            }
            for part in STEP_PARTS {
                let _ = self.0.step_seconds.remove_label_values(&[gone, part]);
            }
        }
        *shown = now_shown;
        drop(shown);
        for gauge in [&self.0.service_ready, &self.0.service_running, &self.0.service_waiting] {
            gauge.reset();
        }
        self.0.service_kv.reset();
        let mut of_model: BTreeMap<String, Vec<v1::ServiceView>> = BTreeMap::new();
        for service in board.services() {
            of_model.entry(service.served_name.clone()).or_default().push(service);
        }
        for (name, replicas) in of_model {
            let name = [name.as_str()];
            let sum = |of: &dyn Fn(&v1::ServiceView) -> i64| replicas.iter().map(of).sum::<i64>();
            let ready = sum(&|one| i64::from(one.ready));
            self.0.service_ready.with_label_values(&name).set(ready);
            self.0.service_running.with_label_values(&name).set(sum(&|one| one.running.into()));
            self.0.service_waiting.with_label_values(&name).set(sum(&|one| one.waiting.into()));
            let used: f64 = replicas.iter().map(|one| one.kv_usage).sum();
            self.0.service_kv.with_label_values(&name).set(used / ready.max(1) as f64);
        }
    }

    fn fleet(&self, board: &Board) {
        let nodes = board.nodes();
        for phase in ["ready", "silent", "gone"] {
            let count = nodes.iter().filter(|node| node.phase == phase).count();
            self.0.nodes.with_label_values(&[phase]).set(count as i64);
        }
        let connected = nodes.iter().filter(|node| node.phase == "ready").count();
        self.0.agents.with_label_values(NONE).set(connected as i64);
        let devices = || nodes.iter().flat_map(|node| &node.devices);
        for kind in [DeviceKind::Cpu, DeviceKind::Gpu] {
            let label = [kind.as_str()];
            let count = |wanted: &dyn Fn(&drumline_wire::v1::DeviceView) -> bool| {
                devices().filter(|d| d.kind == kind.as_str() && wanted(d)).count() as i64
            };
            self.0.devices.with_label_values(&label).set(count(&|_| true));
            self.0.allocated.with_label_values(&label).set(count(&|d| !d.job.is_empty()));
            self.0.idle.with_label_values(&label).set(count(&|d| d.idle));
            self.0.unhealthy.with_label_values(&label).set(count(&|d| !d.healthy));
        }
        let mean = crate::view::mean_utilization(&nodes);
        self.0.utilization.with_label_values(NONE).set(mean);
    }

    fn training(&self, job: &Job, shown: &mut BTreeSet<String>) {
        let training = &job.stored.training;
        let drumline_spec::Work::TrainingJob(spec) = &job.spec.work else { return };
        let id = job.state().job.as_str();
        let Some(loss) = training.loss else { return };
        shown.insert(id.to_owned());
        let label = [id];
        self.0.step.with_label_values(&label).set(training.step as f64);
        self.0.loss.with_label_values(&label).set(loss);
        if let Some(loss) = training.loss_validation {
            self.0.loss_validation.with_label_values(&label).set(loss);
        }
        let per_step = spec.tokens_per_step();
        let live = !job.state().phase.is_terminal();
        let rate = if live { training.tokens_per_second(per_step) } else { 0.0 };
        self.0.tokens_per_second.with_label_values(&label).set(rate);
        self.0.tokens.with_label_values(&label).set((training.step * per_step) as f64);
        self.0.mfu.with_label_values(&label).set(if live { training.mfu } else { 0.0 });
        let seconds = [
            training.matmul_seconds,
            training.attention_seconds,
            training.other_seconds,
            training.communication_seconds,
            training.hidden_seconds,
            training.bubble_seconds,
            training.idle_seconds,
        ];
        let live = |value: f64| if live { value } else { 0.0 };
        for (part, seconds) in STEP_PARTS.iter().zip(seconds) {
            self.0.step_seconds.with_label_values(&[id, part]).set(live(seconds));
        }
        self.0.matmul_peak.with_label_values(&label).set(live(training.matmul_peak_share));
        let rate = live(training.optimizer_bytes_per_second);
        self.0.optimizer_rate.with_label_values(&label).set(rate);
        if let Some(checkpoint) = &job.state().checkpoint {
            self.0.checkpoint_step.with_label_values(&label).set(checkpoint.step as f64);
        }
    }
}

/// Where a step's time goes, in the order in which it is told.
const STEP_PARTS: [&str; 7] =
    ["matmul", "attention", "other", "communication", "communication_hidden", "bubble", "idle"];

const PHASES: [JobPhase; 8] = [
    JobPhase::Pending,
    JobPhase::Starting,
    JobPhase::Running,
    JobPhase::Restarting,
    JobPhase::Cancelling,
    JobPhase::Succeeded,
    JobPhase::Failed,
    JobPhase::Cancelled,
];
