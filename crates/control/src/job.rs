//! One job as the control plane holds it: what is stored, and what is only known.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use drumline_lifecycle::{Note, State};
use drumline_ports::store::Revision;
use drumline_spec::{JobSpec, Parallelism, Work};
use drumline_types::{DeviceId, JobId, NodeName, Timestamp};
use drumline_wire::v1;
use serde::{Deserialize, Serialize};

use crate::replicas::{ReplicaOf, Shown};

/// Lines of history that are kept per job.
pub(crate) const NOTES_MAX: usize = 64;
/// Attempts of which it is remembered where they ran, for their logs.
const PLACES_MAX: usize = 4;

/// What is stored of a job once, at submission.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredSpec {
    pub(crate) spec: JobSpec,
    pub(crate) user: String,
}

/// What is stored of a job at each change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredState {
    pub(crate) state: State,
    pub(crate) notes: VecDeque<Note>,
    #[serde(default)]
    pub(crate) training: Training,
    /// Where the ranks of the last attempts ran.
    #[serde(default)]
    pub(crate) places: VecDeque<(u32, Vec<NodeName>)>,
    /// Devices that are kept ready beside it, so that the next reign keeps the same.
    #[serde(default)]
    pub(crate) spares: Vec<DeviceId>,
    /// The service whose replica it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replica_of: Option<ReplicaOf>,
    /// How many replicas a user asked for since it was submitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replicas: Option<u32>,
}

/// A job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) spec: Arc<JobSpec>,
    pub(crate) spec_json: Arc<str>,
    pub(crate) user: Arc<str>,
    pub(crate) stored: StoredState,
    /// The revision at which its state was last written; `None`: never.
    pub(crate) revision: Option<Revision>,
    /// What its ranks last reported as servers.
    pub(crate) serving: Serving,
    /// What its ranks use, by rank, of the present attempt.
    pub(crate) samples: BTreeMap<u32, v1::RankSample>,
    /// Devices that are kept ready beside it, each with the job that it is lent to.
    pub(crate) spares: Vec<(DeviceId, Option<JobId>)>,
    /// What is known of its replicas.
    pub(crate) replicas: Shown,
    /// Whether it gets no new requests, because it is to go.
    pub(crate) drains: bool,
}

/// How a training run stands, as its ranks report it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub(crate) struct Training {
    pub(crate) step: u64,
    pub(crate) loss: Option<f64>,
    pub(crate) loss_first: Option<f64>,
    pub(crate) loss_validation: Option<f64>,
    pub(crate) grad_norm: f64,
    pub(crate) learning_rate: f64,
    pub(crate) step_seconds: f64,
    /// Smoothed over some steps, for the time left.
    pub(crate) pace_seconds: f64,
    pub(crate) parameters: u64,
    pub(crate) flops_per_token: f64,
    pub(crate) mfu: f64,
    pub(crate) last_step: Timestamp,
    pub(crate) matmul_seconds: f64,
    pub(crate) attention_seconds: f64,
    pub(crate) other_seconds: f64,
    pub(crate) communication_seconds: f64,
    pub(crate) bubble_seconds: f64,
    #[serde(default)]
    pub(crate) hidden_seconds: f64,
    #[serde(default)]
    pub(crate) idle_seconds: f64,
    #[serde(default)]
    pub(crate) matmul_peak_share: f64,
    #[serde(default)]
    pub(crate) optimizer_bytes_per_second: f64,
}

/// How a service stands.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Serving {
    /// The last report of each rank that serves.
    pub(crate) last: Option<v1::ServeReport>,
    pub(crate) heard: Timestamp,
    pub(crate) last_step: Timestamp,
    pub(crate) tokens_per_second: f64,
    /// Tokens and time at which the rate was last measured.
    pub(crate) measured: (u64, Timestamp),
}

impl Job {
    pub(crate) fn new(spec: JobSpec, user: &str, state: State) -> Self {
        let json = serde_json::to_string(&spec).unwrap_or_default();
        let stored = StoredState {
            state,
            notes: VecDeque::new(),
            training: Training::default(),
            places: VecDeque::new(),
            spares: Vec::new(),
            replica_of: None,
            replicas: None,
        };
        Self::from_stored(StoredSpec { spec, user: user.to_owned() }, json, stored, None)
    }

    pub(crate) fn from_stored(
        spec: StoredSpec,
        spec_json: String,
        stored: StoredState,
        revision: Option<Revision>,
    ) -> Self {
        Self {
            spec: Arc::new(spec.spec),
            spec_json: spec_json.into(),
            user: spec.user.into(),
            stored,
            revision,
            serving: Serving::default(),
            samples: BTreeMap::new(),
            spares: Vec::new(),
            replicas: Shown::default(),
            drains: false,
        }
    }

    pub(crate) fn state(&self) -> &State {
        &self.stored.state
    }

    pub(crate) fn note(&mut self, note: Note) {
        self.stored.notes.push_back(note);
        while self.stored.notes.len() > NOTES_MAX {
            self.stored.notes.pop_front();
        }
    }

    /// Remembers where the present attempt runs.
    pub(crate) fn remember_places(&mut self) {
        let state = &self.stored.state;
        let nodes = state.ranks.iter().map(|rank| rank.device.node.clone()).collect();
        self.stored.places.push_back((state.attempt.0, nodes));
        while self.stored.places.len() > PLACES_MAX {
            self.stored.places.pop_front();
        }
    }

    /// Returns the spec for the ranks of the newest attempt, as JSON.
    pub(crate) fn launch_spec(&self) -> String {
        let Some(split) = self.state().split else { return self.spec_json.to_string() };
        let spec = self.spec.at(split);
        serde_json::to_string(&spec).unwrap_or_else(|_| self.spec_json.to_string())
    }

    /// Returns how the ranks divide the work.
    pub(crate) fn split(&self) -> Parallelism {
        self.state().split.unwrap_or_else(|| self.spec.parallelism())
    }
}

impl Training {
    /// Takes a report of the last finished step. Returns whether it told a newer loss.
    pub(crate) fn take(
        &mut self,
        spec: &JobSpec,
        step: u64,
        report: &v1::TrainReport,
        peak_flops: f64,
        now: Timestamp,
    ) -> bool {
        let Work::TrainingJob(training) = &spec.work else { return false };
        let is_loss = |loss: f64| loss.is_finite() && loss != 0.0;
        if let Some(loss) = report.loss_validation.filter(|loss| is_loss(*loss)) {
            self.loss_validation = Some(loss);
        }
        // Ranks without the last stage know no loss.
        if !is_loss(report.loss) {
            return false;
        }
        let new = step != self.step || self.loss.is_none();
        self.step = step;
        self.loss = Some(report.loss);
        if self.loss_first.is_none() || step <= 1 {
            self.loss_first = Some(report.loss);
        }
        self.grad_norm = report.grad_norm;
        self.learning_rate = report.learning_rate;
        if report.step_seconds.is_finite() && report.step_seconds > 0.0 {
            self.step_seconds = report.step_seconds;
            self.pace_seconds = match self.pace_seconds {
                0.0 => report.step_seconds,
                pace => 0.9 * pace + 0.1 * report.step_seconds,
            };
        }
        self.parameters = self.parameters.max(report.parameters);
        self.flops_per_token = self.flops_per_token.max(report.flops_per_token);
        let rate = self.tokens_per_second(training.tokens_per_step());
        self.mfu = if peak_flops > 0.0 { rate * self.flops_per_token / peak_flops } else { 0.0 };
        self.last_step = now;
        self.matmul_seconds = report.matmul_seconds;
        self.attention_seconds = report.attention_seconds;
        self.other_seconds = report.other_seconds;
        self.communication_seconds = report.communication_seconds;
        self.bubble_seconds = report.bubble_seconds;
        self.hidden_seconds = report.communication_hidden_seconds;
        self.idle_seconds = report.idle_seconds;
        let rate = |amount: f64, seconds: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        let matmul = rate(report.matmul_flops, report.matmul_seconds);
        // The reporting rank's part, against the peak of one device.
        let device_peak = peak_flops / f64::from(training.parallelism.world_size().max(1));
        self.matmul_peak_share = rate(matmul, device_peak);
        self.optimizer_bytes_per_second = rate(report.optimizer_bytes, report.optimizer_seconds);
        new
    }

    pub(crate) fn tokens_per_second(&self, tokens_per_step: u64) -> f64 {
        if self.step_seconds > 0.0 { tokens_per_step as f64 / self.step_seconds } else { 0.0 }
    }
}

impl Serving {
    /// Takes a report of a rank that serves.
    pub(crate) fn take(&mut self, step: u64, report: v1::ServeReport, now: Timestamp) {
        let _ = step;
        self.heard = now;
        self.last_step = now;
        let total = report.completion_tokens_total;
        let (before, at) = self.measured;
        let passed = now.since_ms(at);
        if total < before || at == Timestamp(0) {
            self.measured = (total, now);
        } else if passed >= 1000 {
            self.tokens_per_second = (total - before) as f64 * 1000.0 / passed as f64;
            self.measured = (total, now);
        }
        self.last = Some(report);
    }
}
