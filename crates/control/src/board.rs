//! What readers see: only what is durable, and the latest of what is merely known.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use drumline_types::{JobId, Timestamp};
use drumline_wire::v1;
use tokio::sync::watch;

use crate::job::Job;
use crate::series::SeriesStore;

/// Fleet-wide events that are kept.
const EVENTS_MAX: usize = 1000;

/// The published state of one reign.
#[derive(Debug)]
pub(crate) struct Board {
    jobs: RwLock<BTreeMap<JobId, Arc<Job>>>,
    nodes: RwLock<Arc<Vec<v1::NodeView>>>,
    events: Mutex<VecDeque<v1::EventView>>,
    pub(crate) series: Mutex<SeriesStore>,
    gateway: RwLock<Option<v1::GatewayReport>>,
    /// Goes up with each publication.
    version: watch::Sender<u64>,
    pub(crate) term: u64,
    pub(crate) leader: String,
}

impl Board {
    pub(crate) fn new(term: u64, leader: String) -> Self {
        Self {
            jobs: RwLock::default(),
            nodes: RwLock::default(),
            events: Mutex::default(),
            series: Mutex::default(),
            gateway: RwLock::default(),
            version: watch::Sender::new(0),
            term,
            leader,
        }
    }

    pub(crate) fn job(&self, id: &JobId) -> Option<Arc<Job>> {
        self.jobs.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Returns every job, oldest first.
    pub(crate) fn jobs(&self) -> Vec<Arc<Job>> {
        let guard = self.jobs.read().unwrap_or_else(PoisonError::into_inner);
        let mut jobs: Vec<Arc<Job>> = guard.values().cloned().collect();
        drop(guard);
        jobs.sort_by(|a, b| {
            let key = |job: &Job| (job.state().created, job.state().job.clone());
            key(a).cmp(&key(b))
        });
        jobs
    }

    pub(crate) fn nodes(&self) -> Arc<Vec<v1::NodeView>> {
        Arc::clone(&self.nodes.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn events(&self, job: &str, limit: usize) -> Vec<v1::EventView> {
        let guard = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = guard.iter().rev().filter(|event| job.is_empty() || event.job == job);
        wanted.take(limit).cloned().collect()
    }

    pub(crate) fn services(&self) -> Vec<v1::ServiceView> {
        let gateway = self.gateway_url();
        self.jobs().iter().filter_map(|job| crate::view::service(job, &gateway)).collect()
    }

    pub(crate) fn gateway_url(&self) -> String {
        let guard = self.gateway.read().unwrap_or_else(PoisonError::into_inner);
        guard.as_ref().map(|report| report.url.clone()).unwrap_or_default()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    pub(crate) fn publish_jobs(&self, jobs: Vec<(JobId, Option<Arc<Job>>)>) {
        if jobs.is_empty() {
            return;
        }
        let mut guard = self.jobs.write().unwrap_or_else(PoisonError::into_inner);
        for (id, job) in jobs {
            match job {
                Some(job) => drop(guard.insert(id, job)),
                None => drop(guard.remove(&id)),
            }
        }
        drop(guard);
        self.version.send_modify(|version| *version += 1);
    }

    pub(crate) fn publish_nodes(&self, nodes: Vec<v1::NodeView>) {
        *self.nodes.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(nodes);
        self.version.send_modify(|version| *version += 1);
    }

    pub(crate) fn publish_events(&self, events: Vec<v1::EventView>) {
        let mut guard = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            if guard.len() >= EVENTS_MAX {
                guard.pop_front();
            }
            guard.push_back(event);
        }
    }

    pub(crate) fn point(&self, name: &str, x: f64, y: f64) {
        self.series.lock().unwrap_or_else(PoisonError::into_inner).push(name, x, y);
    }

    /// Takes the gateway's account.
    pub(crate) fn report_gateway(&self, report: v1::GatewayReport, now: Timestamp) {
        let x = now.0 as f64;
        for model in report.models.iter().take(100) {
            let name = |what: &str| format!("service/{}/{what}", model.model);
            self.point(&name("ttft_p50_seconds"), x, model.ttft_p50_seconds);
            self.point(&name("ttft_p99_seconds"), x, model.ttft_p99_seconds);
            self.point(&name("tpot_p50_seconds"), x, model.tpot_p50_seconds);
            self.point(&name("in_flight"), x, f64::from(model.in_flight));
            self.point(&name("queued"), x, f64::from(model.queued));
        }
        *self.gateway.write().unwrap_or_else(PoisonError::into_inner) = Some(report);
        self.version.send_modify(|version| *version += 1);
    }
}
