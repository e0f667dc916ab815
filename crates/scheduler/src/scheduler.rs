//! The fold over changes, and the cycle.

use std::collections::BTreeMap;

use drumline_cluster::{Change, ChangeError, Request, Snapshot};
use drumline_placement::{Cycle, plan};
use drumline_queue::{QueueLimits, Queues, Usage, Waiting, admit};
use drumline_spec::QueueSpec;
use drumline_types::{Attempt, Explanation, JobId, QueueName, Reason, Timestamp};

use crate::options::Options;
use crate::saved::{Saved, SavedJob, Stands};

/// The scheduler: a fleet, its queues and jobs, and what it decides about them.
#[derive(Debug, Clone)]
pub struct Scheduler {
    options: Options,
    now: Timestamp,
    fleet: Snapshot,
    queues: BTreeMap<QueueName, QueueSpec>,
    jobs: BTreeMap<JobId, SavedJob>,
    dirty: bool,
}

impl Scheduler {
    /// Returns a scheduler that knows no node, and only the queue `default`, without limits.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let default = QueueSpec::open(QueueName::default_queue());
        Self {
            options,
            now: Timestamp(0),
            fleet: Snapshot::new(),
            queues: BTreeMap::from([(default.name.clone(), default)]),
            jobs: BTreeMap::new(),
            dirty: true,
        }
    }

    /// Returns the fleet as the scheduler sees it.
    #[must_use]
    pub fn fleet(&self) -> &Snapshot {
        &self.fleet
    }

    /// Takes note of one thing that happened.
    ///
    /// # Errors
    /// [`ChangeError`]; nothing is changed then.
    pub fn apply(&mut self, change: Change, now: Timestamp) -> Result<(), ChangeError> {
        self.now = self.now.max(now);
        self.dirty = true;
        match change {
            Change::Node { node } => self.fleet.upsert_node(*node),
            Change::NodeGone { node } => {
                self.fleet.remove_node(&node);
            }
            Change::Queue { queue } => {
                self.queues.insert(queue.name.clone(), *queue);
            }
            Change::QueueGone { queue } => {
                self.queues.remove(&queue);
            }
            Change::Submitted { request, attempt, not_before } => {
                let stands = Stands::Waiting { not_before, told: None };
                let job = request.job.clone();
                self.jobs.insert(job, SavedJob { request: *request, attempt, held: false, stands });
            }
            Change::Held { job, held } => self.job(&job)?.held = held,
            Change::Adopted { request, attempt, devices, started } => {
                let job = request.job.clone();
                self.fleet.commit(&job, attempt, devices)?;
                let stands = Stands::Placed { started, running: false, safe: started };
                self.jobs.insert(job, SavedJob { request: *request, attempt, held: false, stands });
            }
            Change::Running { job } => {
                if let Stands::Placed { running, .. } = &mut self.job(&job)?.stands {
                    *running = true;
                }
            }
            Change::Checkpointed { job } => {
                if let Stands::Placed { safe, .. } = &mut self.job(&job)?.stands {
                    *safe = now;
                }
            }
            Change::Requeued { job, attempt, not_before } => {
                let entry = self.job(&job)?;
                entry.attempt = attempt;
                entry.stands = Stands::Waiting { not_before, told: None };
                self.fleet.release(&job);
            }
            Change::Ended { job } => {
                self.job(&job)?;
                self.jobs.remove(&job);
                self.fleet.release(&job);
            }
        }
        Ok(())
    }

    fn job(&mut self, job: &JobId) -> Result<&mut SavedJob, ChangeError> {
        self.jobs.get_mut(job).ok_or_else(|| ChangeError::UnknownJob(job.clone()))
    }

    /// Decides who starts and who leaves now. What it decides is taken as done: the caller
    /// launches and evicts, and reports what comes of it as changes.
    pub fn cycle(&mut self, now: Timestamp) -> Cycle {
        self.now = self.now.max(now);
        let waiting: Vec<Waiting> = self.jobs.values().filter_map(waiting).collect();
        let limits = |queue: &QueueSpec| QueueLimits {
            devices: [drumline_spec::DeviceKind::Cpu, drumline_spec::DeviceKind::Gpu]
                .into_iter()
                .filter_map(|kind| Some((kind, *queue.quota.get(kind.as_str())?)))
                .collect(),
        };
        let queues =
            Queues::named(self.queues.values().map(|queue| (queue.name.clone(), limits(queue))));
        let mut usage = Usage::default();
        for job in self.jobs.values().filter(|job| matches!(job.stands, Stands::Placed { .. })) {
            let gang = &job.request.gang;
            usage.add(&job.request.settings.queue, gang.device, gang.ranks);
        }
        let admission = admit(&queues, &usage, &waiting, now);
        let mut plan = plan(&self.fleet, &admission.admitted, self.options.seed);
        for job in &plan.jobs {
            let devices = job.assignments.iter().map(|a| a.device.clone()).collect();
            if self.fleet.commit(&job.job, job.attempt, devices).is_ok()
                && let Some(entry) = self.jobs.get_mut(&job.job)
            {
                entry.stands = Stands::Placed { started: now, running: false, safe: now };
            }
        }
        let refused = admission.refused.into_iter().chain(std::mem::take(&mut plan.waiting));
        let mut told: Vec<(JobId, Explanation)> = Vec::new();
        let mut wake: Option<Timestamp> = None;
        for (job, why) in refused {
            let Some(entry) = self.jobs.get_mut(&job) else { continue };
            let Stands::Waiting { not_before, told: last } = &mut entry.stands else { continue };
            if *not_before > now {
                wake = Some(wake.map_or(*not_before, |wake| wake.min(*not_before)));
            }
            if last.as_ref() != Some(&why) {
                *last = Some(why.clone());
                told.push((job, why));
            }
        }
        told.sort_by(|a, b| a.0.cmp(&b.0));
        self.dirty = false;
        let considered = waiting.len() as u64;
        Cycle { now, plan, evictions: Vec::new(), told, wake, considered }
    }

    /// Takes back what the last cycle started: its plan failed the audit, or could not be stored.
    pub fn reject(&mut self, cycle: &Cycle, why: &Explanation) {
        for job in &cycle.plan.jobs {
            self.fleet.release(&job.job);
            if let Some(entry) = self.jobs.get_mut(&job.job) {
                let (not_before, told) = (cycle.now, Some(why.clone()));
                entry.stands = Stands::Waiting { not_before, told };
            }
        }
        self.dirty = true;
    }

    /// Returns whether anything has changed since the last cycle.
    #[must_use]
    pub fn dirty(&self) -> bool {
        self.dirty
    }

    /// Says where jobs would go now, and to whose cost, if they were submitted. Nothing is kept.
    #[must_use]
    pub fn preview(&self, requests: &[Request], now: Timestamp) -> Cycle {
        let mut trial = self.clone();
        for request in requests {
            let request = Box::new(request.clone());
            let change =
                Change::Submitted { request, attempt: Attempt(1), not_before: Timestamp(0) };
            // A new job is always accepted; what is wrong with it is said by the cycle.
            let _ = trial.apply(change, now);
        }
        let mut cycle = trial.cycle(now);
        let asked = |job: &JobId| requests.iter().any(|request| request.job == *job);
        cycle.plan.jobs.retain(|job| asked(&job.job));
        cycle.told.retain(|(job, _)| asked(job));
        cycle
    }

    /// Explains in full why a job waits, with evidence and, where it can be had, the estimated
    /// start. `None`: it does not wait.
    #[must_use]
    pub fn explain(&self, job: &JobId, _now: Timestamp) -> Option<Explanation> {
        match &self.jobs.get(job)?.stands {
            Stands::Waiting { told, .. } => Some(told.clone().unwrap_or_else(|| {
                Explanation::new(Reason::NotYetConsidered, "the next cycle looks at it")
            })),
            Stands::Placed { .. } => None,
        }
    }

    /// Returns the whole state.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved {
            version: Saved::VERSION,
            now: self.now,
            options: self.options.clone(),
            nodes: self.fleet.nodes().map(|state| state.node().clone()).collect(),
            commitments: self.fleet.commitments().cloned().collect(),
            queues: self.queues.values().cloned().collect(),
            jobs: self.jobs.clone(),
        }
    }

    /// Returns a scheduler that decides what the saved one would have decided.
    ///
    /// # Errors
    /// [`ChangeError`] when the state contradicts itself.
    pub fn restore(saved: Saved) -> Result<Self, ChangeError> {
        let mut scheduler = Self::new(saved.options);
        scheduler.now = saved.now;
        for node in saved.nodes {
            scheduler.fleet.upsert_node(node);
        }
        for held in saved.commitments {
            scheduler.fleet.commit(&held.job, held.attempt, held.devices)?;
        }
        scheduler.queues =
            saved.queues.into_iter().map(|queue| (queue.name.clone(), queue)).collect();
        scheduler.jobs = saved.jobs;
        Ok(scheduler)
    }
}

fn waiting(job: &SavedJob) -> Option<Waiting> {
    let Stands::Waiting { not_before, .. } = &job.stands else { return None };
    Some(Waiting {
        job: job.request.job.clone(),
        attempt: job.attempt,
        gang: job.request.gang.clone(),
        split: job.request.split,
        settings: job.request.settings.clone(),
        submitted: job.request.submitted,
        held: job.held,
        not_before: *not_before,
    })
}
