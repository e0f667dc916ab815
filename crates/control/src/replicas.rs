//! Services of several replicas: one job for each, started and ended as the service asks.
//!
//! The job that was submitted is number 0 and runs a gang like any other. The others are jobs of the
//! same spec, which the control plane submits itself and knows by [`ReplicaOf`]; each waits, restarts
//! and is preempted by itself. What is stored of a set is that mark and the number that a user last
//! asked for: the next leader finds the same set.

use std::collections::{BTreeMap, BTreeSet};

use drumline_lifecycle::replicas::{Autoscaler, Draining, Load, Standing};
use drumline_lifecycle::{Event, Note, Severity};
use drumline_spec::table::REPLICAS_MAX;
use drumline_spec::{JobSpec, ModelService, Work};
use drumline_types::{Attempt, JobId, JobPhase, Timestamp};
use drumline_wire::v1;
use serde::{Deserialize, Serialize};

use crate::api::ApiError;
use crate::core::Core;
use crate::job::{Job, Serving};

/// Marks a job as one of a service's replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReplicaOf {
    /// The service.
    pub(crate) service: JobId,
    /// Its number; the service itself is number 0.
    pub(crate) number: u32,
}

/// What readers are told of a service's replicas.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Shown {
    /// How many there should be.
    pub(crate) wanted: u32,
    /// How many serve.
    pub(crate) ready: u32,
    /// The jobs beside the service itself, in the order of their numbers.
    pub(crate) jobs: Vec<JobId>,
}

/// The replicas of one service.
#[derive(Debug, Default)]
pub(crate) struct Set {
    /// The newest job of each number.
    jobs: BTreeMap<u32, JobId>,
    scaler: Autoscaler,
    draining: Draining,
    /// When it has to be looked at again.
    again: Option<Timestamp>,
}

fn service(spec: &JobSpec) -> Option<&ModelService> {
    match &spec.work {
        Work::ModelService(service) => Some(service),
        _ => None,
    }
}

/// Returns what one replica has to do; `None`: it is not ready.
fn load(job: &Job, spec: &ModelService) -> Option<Load> {
    let last = job.serving.last.filter(|last| last.ready)?;
    (job.state().phase == JobPhase::Running).then(|| Load {
        running: last.running,
        waiting: last.waiting,
        max_batch: last.max_batch.max(spec.max_batch),
        kv_usage: last.kv_usage,
    })
}

fn standing(job: &Job) -> Option<Standing> {
    let requests = || job.serving.last.map(|last| last.running + last.waiting);
    match job.state().phase {
        JobPhase::Cancelled | JobPhase::Succeeded => None,
        JobPhase::Failed => Some(Standing::Failed(job.state().finished.unwrap_or_default())),
        JobPhase::Cancelling => Some(Standing::Ending),
        JobPhase::Running => {
            Some(Standing::Active { requests: Some(requests().unwrap_or(u32::MAX)) })
        }
        _ => Some(Standing::Active { requests: None }),
    }
}

impl Core {
    /// Finds the sets again that the store tells of.
    pub(crate) fn recover_replicas(&mut self) {
        for (id, job) in &self.jobs {
            match &job.stored.replica_of {
                Some(of) => {
                    let set = self.sets.entry(of.service.clone()).or_default();
                    // Of two of one number the one that has not ended counts.
                    let known = set.jobs.get(&of.number);
                    if known.is_none_or(|known| !self.active.contains(known)) {
                        set.jobs.insert(of.number, id.clone());
                    }
                }
                None if service(&job.spec).is_some() && self.active.contains(id) => {
                    self.sets.entry(id.clone()).or_default();
                }
                None => {}
            }
        }
    }

    /// Looks after the replicas of every service. Returns whether anything was begun.
    pub(crate) fn keep_replicas(&mut self, now: Timestamp) -> bool {
        let ids: Vec<JobId> = self.sets.keys().cloned().collect();
        let mut begun = false;
        for id in ids {
            let Some(mut set) = self.sets.remove(&id) else { continue };
            begun |= self.keep_set(&id, &mut set, now);
            // A set without its service lasts as long as one of its jobs.
            let lasts = self.active.contains(&id)
                || set.jobs.values().any(|replica| self.active.contains(replica));
            if lasts {
                self.sets.insert(id, set);
            }
        }
        begun
    }

    /// Returns when [`Self::keep_replicas`] may have something to do by itself.
    pub(crate) fn replicas_due(&self) -> Option<Timestamp> {
        self.sets.values().filter_map(|set| set.again).min()
    }

    fn keep_set(&mut self, id: &JobId, set: &mut Set, now: Timestamp) -> bool {
        set.again = None;
        let Some(job) = self.jobs.get(id) else { return false };
        let Some(spec) = service(&job.spec).cloned() else { return false };
        set.jobs.retain(|_, replica| self.jobs.get(replica).and_then(standing).is_some());
        let phase = job.state().phase;
        if phase.is_terminal() || phase == JobPhase::Cancelling {
            // Who is cancelled takes its replicas along. One that has failed leaves them serving.
            return phase != JobPhase::Failed && self.end_replicas(id, set, now);
        }
        let members = || {
            let others = set.jobs.values().filter_map(|replica| self.jobs.get(replica));
            std::iter::once(job).chain(others)
        };
        let loads: Vec<Load> = members().filter_map(|job| load(job, &spec)).collect();
        let present = 1 + set.jobs.len() as u32;
        let wanted = match &spec.autoscale {
            Some(rule) => set.scaler.wanted(rule, present, &loads, now),
            None => job.stored.replicas.unwrap_or(spec.replicas),
        };
        let is_held = job.state().held;
        let there = set.jobs.iter().filter_map(|(number, replica)| {
            Some((*number, self.jobs.get(replica).and_then(standing)?))
        });
        let steps = set.draining.steps(wanted, &there.collect(), now);
        set.again = steps.again;
        let begun = !steps.end.is_empty() || !(steps.start.is_empty() || is_held);
        for number in steps.end {
            if let Some(replica) = set.jobs.remove(&number) {
                self.end_replica(&replica, id, now);
                if !self.jobs.get(&replica).is_some_and(|job| job.state().phase.is_terminal()) {
                    set.jobs.insert(number, replica);
                }
            }
        }
        if !is_held {
            for number in steps.start {
                match self.start_replica(id, number, now) {
                    Some(replica) => drop(set.jobs.insert(number, replica)),
                    None => break,
                }
            }
        }
        self.show_set(id, set, wanted, loads.len() as u32);
        begun
    }

    /// Lets readers know of a set, if it has changed.
    fn show_set(&mut self, id: &JobId, set: &Set, wanted: u32, ready: u32) {
        for (number, replica) in &set.jobs {
            let drains = set.draining.holds(*number);
            if let Some(job) = self.jobs.get_mut(replica)
                && job.drains != drains
            {
                job.drains = drains;
                self.stale.insert(replica.clone());
            }
        }
        let shown = Shown { wanted, ready, jobs: set.jobs.values().cloned().collect() };
        if let Some(job) = self.jobs.get_mut(id)
            && job.replicas != shown
        {
            job.replicas = shown;
            self.stale.insert(id.clone());
        }
    }

    /// Returns what the replicas of a service, which this job is or belongs to, last told.
    pub(crate) fn serving_with(&self, id: &JobId) -> Vec<(&Serving, v1::ServeReport)> {
        let Some(job) = self.jobs.get(id) else { return Vec::new() };
        let service = job.stored.replica_of.as_ref().map_or(id, |of| &of.service);
        let others = self.sets.get(service).into_iter().flat_map(|set| set.jobs.values());
        std::iter::once(service)
            .chain(others)
            .filter_map(|id| self.jobs.get(id))
            .filter(|job| job.state().phase == JobPhase::Running)
            .filter_map(|job| Some((&job.serving, job.serving.last?)))
            .collect()
    }

    fn start_replica(&mut self, of: &JobId, number: u32, now: Timestamp) -> Option<JobId> {
        if self.active.len() >= crate::core::ACTIVE_JOBS_MAX {
            return None;
        }
        let parent = self.jobs.get(of)?;
        let mut spec = JobSpec::clone(&parent.spec);
        if let Work::ModelService(service) = &mut spec.work {
            (service.replicas, service.autoscale) = (1, None);
        }
        let user = parent.user.to_string();
        let message = format!("replica {number} of {of}");
        let replica = ReplicaOf { service: of.clone(), number };
        let id = self.take_in(spec, &user, Some(replica), message, now).ok()?;
        self.new.push(crate::core::NewJobs { ids: vec![id.clone()], key: String::new() });
        Some(id)
    }

    fn end_replica(&mut self, replica: &JobId, of: &JobId, now: Timestamp) {
        let user = format!("{of}, which needs it no more");
        self.apply(replica, Event::Cancel { user }, now);
    }

    fn end_replicas(&mut self, id: &JobId, set: &Set, now: Timestamp) -> bool {
        let active: BTreeSet<JobId> = set
            .jobs
            .values()
            .filter(|replica| {
                let phase = self.jobs.get(*replica).map(|job| job.state().phase);
                phase.is_some_and(|phase| !phase.is_terminal() && phase != JobPhase::Cancelling)
            })
            .cloned()
            .collect();
        for replica in &active {
            self.end_replica(replica, id, now);
        }
        !active.is_empty()
    }

    /// Ends what is left of a set whose service a user cancels.
    pub(crate) fn cancel_replicas(&mut self, id: &JobId, now: Timestamp) {
        if let Some(set) = self.sets.remove(id) {
            self.end_replicas(id, &set, now);
            self.sets.insert(id.clone(), set);
        }
    }

    /// Sets the number of a service's replicas.
    pub(crate) fn scale(
        &mut self,
        id: &JobId,
        replicas: u32,
        user: &str,
        now: Timestamp,
    ) -> Result<(), ApiError> {
        let Some(job) = self.jobs.get_mut(id) else {
            return Err(ApiError::no_such_job(id.as_str()));
        };
        let invalid = |message: String| Err(ApiError::Invalid(message));
        let Some(spec) = service(&job.spec) else {
            let kind = job.spec.kind();
            return invalid(format!("{id} is a {kind}; only a ModelService has replicas"));
        };
        if let Some(of) = &job.stored.replica_of {
            return invalid(format!("{id} is a replica of {}; scale that one", of.service));
        }
        if let Some(rule) = &spec.autoscale {
            let (min, max) = (rule.min, rule.max);
            return invalid(format!("autoscale of {id} decides, from {min} to {max}"));
        }
        if job.state().phase.is_terminal() || job.state().phase == JobPhase::Cancelling {
            return invalid(format!("{id} has ended; submit it again"));
        }
        if replicas == 0 || i64::from(replicas) > REPLICAS_MAX {
            return invalid(format!(
                "{replicas} replicas; from 1 to {REPLICAS_MAX} are possible, and `drumline cancel \
                 {id}` ends the service"
            ));
        }
        let before = job.stored.replicas.unwrap_or(spec.replicas);
        if before != replicas {
            job.stored.replicas = Some(replicas);
            let who = if user.is_empty() { "a user" } else { user };
            let note = Note {
                at: now,
                severity: Severity::Info,
                reason: "Scaled".to_owned(),
                message: format!("from {before} to {replicas} replicas, by {who}"),
                attempt: Attempt(0),
            };
            self.events.push(crate::view::event(id.as_str(), &note));
            job.note(note);
            self.dirty.insert(id.clone());
            self.stale.insert(id.clone());
        }
        self.keep_replicas(now);
        Ok(())
    }
}
