//! What the ranks of running jobs tell, as metrics: the same ones as off Kubernetes.

use std::collections::BTreeMap;

use drumline_spec::Work;
use drumline_telemetry::table;
use drumline_types::JobPhase;
use drumline_wire::v1;
use prometheus::{GaugeVec, IntGaugeVec, Registry};

use crate::job::Job;
use crate::ranks::worlds::Worlds;
use crate::step::phase;

/// What one running job's ranks told last.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Figures {
    /// `NAMESPACE/NAME`.
    job: String,
    of: Of,
}

#[derive(Debug, Clone, PartialEq)]
enum Of {
    Training {
        report: Box<v1::TrainReport>,
        loss_validation: Option<f64>,
        step: u64,
        tokens_per_step: u64,
        checkpoint: Option<u64>,
    },
    /// `served` is the model's name; a report that is too old is none.
    Service { served: String, report: Option<v1::ServeReport> },
}

impl Figures {
    /// Returns what is known of a job; `None` when it does not run, or tells nothing.
    pub(crate) fn of(job: &Job, worlds: &Worlds, now_ms: u64) -> Option<Self> {
        if phase(&job.status) != JobPhase::Running {
            return None;
        }
        let told = worlds.told(&job.uid, job.status.attempt);
        let of = match &job.spec.as_ref().ok()?.work {
            Work::TrainingJob(run) => {
                let told = told?;
                Of::Training {
                    report: Box::new(told.train?),
                    loss_validation: told.loss_validation,
                    step: told.step,
                    tokens_per_step: run.tokens_per_step(),
                    checkpoint: told.checkpoint.max(job.status.checkpoint),
                }
            }
            Work::ModelService(service) => Of::Service {
                served: format!("{}/{}", job.namespace, service.served_name),
                report: told.and_then(|told| told.fresh(now_ms)),
            },
            Work::CommandJob(_) => return None,
        };
        Some(Self { job: format!("{}/{}", job.namespace, job.name), of })
    }
}

/// The gauges.
#[derive(Clone)]
pub(crate) struct Gauges {
    loss: GaugeVec,
    loss_validation: GaugeVec,
    rate: GaugeVec,
    tokens: GaugeVec,
    parts: GaugeVec,
    checkpoint: GaugeVec,
    ready: IntGaugeVec,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    kv: GaugeVec,
}

impl Gauges {
    pub(crate) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            loss: table::JOB_LOSS.gauge(registry)?,
            loss_validation: table::JOB_LOSS_VALIDATION.gauge(registry)?,
            rate: table::JOB_TOKENS_PER_SECOND.gauge(registry)?,
            tokens: table::JOB_TOKENS.gauge(registry)?,
            parts: table::JOB_STEP_SECONDS.gauge(registry)?,
            checkpoint: table::JOB_CHECKPOINT_STEP.gauge(registry)?,
            ready: table::SERVICE_READY.int_gauge(registry)?,
            running: table::SERVICE_RUNNING.int_gauge(registry)?,
            waiting: table::SERVICE_WAITING.int_gauge(registry)?,
            kv: table::SERVICE_KV_USAGE.gauge(registry)?,
        })
    }

    /// Fills all of them; what is not there any more has no series.
    pub(crate) fn show(&self, figures: &[Figures]) {
        for gauge in [
            &self.loss,
            &self.loss_validation,
            &self.rate,
            &self.tokens,
            &self.parts,
            &self.checkpoint,
            &self.kv,
        ] {
            gauge.reset();
        }
        for gauge in [&self.ready, &self.running, &self.waiting] {
            gauge.reset();
        }
        let mut services: BTreeMap<&str, Vec<v1::ServeReport>> = BTreeMap::new();
        for one in figures {
            match &one.of {
                Of::Training { report, loss_validation, step, tokens_per_step, checkpoint } => {
                    let job = [one.job.as_str()];
                    self.loss.with_label_values(&job).set(report.loss);
                    if let Some(loss) = loss_validation {
                        self.loss_validation.with_label_values(&job).set(*loss);
                    }
                    if report.step_seconds > 0.0 {
                        let rate = *tokens_per_step as f64 / report.step_seconds;
                        self.rate.with_label_values(&job).set(rate);
                    }
                    let tokens = step.saturating_mul(*tokens_per_step);
                    self.tokens.with_label_values(&job).set(tokens as f64);
                    if let Some(checkpoint) = checkpoint {
                        self.checkpoint.with_label_values(&job).set(*checkpoint as f64);
                    }
                    for (part, seconds) in [
                        ("matmul", report.matmul_seconds),
                        ("attention", report.attention_seconds),
                        ("other", report.other_seconds),
                        ("communication", report.communication_seconds),
                        ("communication_hidden", report.communication_hidden_seconds),
                        ("bubble", report.bubble_seconds),
                        ("idle", report.idle_seconds),
                    ] {
                        self.parts.with_label_values(&[&*one.job, part]).set(seconds);
                    }
                }
                Of::Service { served, report } => {
                    services.entry(served).or_default().extend(report);
                }
            }
        }
        for (name, replicas) in services {
            let name = [name];
            let sum = |of: fn(&v1::ServeReport) -> u32| {
                replicas.iter().map(|report| i64::from(of(report))).sum::<i64>()
            };
            let ready = replicas.iter().filter(|report| report.ready).count();
            self.ready.with_label_values(&name).set(ready as i64);
            self.running.with_label_values(&name).set(sum(|report| report.running));
            self.waiting.with_label_values(&name).set(sum(|report| report.waiting));
            let used: f64 = replicas.iter().map(|report| report.kv_usage).sum();
            self.kv.with_label_values(&name).set(used / replicas.len().max(1) as f64);
        }
    }
}
