//! Queues: made, changed, deleted, and shown with what they use.

use std::collections::BTreeMap;

use drumline_cluster::Change;
use drumline_lifecycle::Event;
use drumline_spec::{DeviceKind, QueueSpec};
use drumline_types::{JobId, JobPhase, QueueName, Timestamp};
use drumline_wire::v1;

use crate::api::ApiError;
use crate::core::Core;
use crate::ledger::Group;
use crate::options::ReignEnded;

/// Queues that may exist. Each costs time in every decision.
const QUEUES_MAX: usize = 10_000;

impl Core {
    /// Makes or changes queues, all or none.
    pub(crate) fn put_queues(
        &mut self,
        queues: Vec<QueueSpec>,
        now: Timestamp,
    ) -> Result<(), ApiError> {
        if self.queues.len() + queues.len() > QUEUES_MAX {
            let message = format!("at most {QUEUES_MAX} queues may exist");
            return Err(ApiError::Exhausted(message));
        }
        let mut done: Vec<(QueueName, Option<QueueSpec>)> = Vec::new();
        for queue in queues {
            let name = queue.name.clone();
            let change = Change::Queue { queue: Box::new(queue.clone()) };
            if let Err(error) = self.desk.try_apply(change, now) {
                for (name, before) in done.into_iter().rev() {
                    self.undo_queue(name, before, now);
                }
                return Err(ApiError::Invalid(error.to_string()));
            }
            done.push((name.clone(), self.queues.insert(name, queue)));
        }
        self.dirty_queues.extend(done.into_iter().map(|(name, _)| name));
        Ok(())
    }

    /// Takes the queues that the store holds, parents before their children.
    pub(crate) fn recover_queues(
        &mut self,
        queues: BTreeMap<QueueName, QueueSpec>,
        now: Timestamp,
    ) {
        let mut left: Vec<QueueSpec> = queues.into_values().collect();
        while !left.is_empty() {
            let known = |queue: &QueueSpec| match &queue.parent {
                Some(parent) => self.queues.contains_key(parent),
                None => true,
            };
            let (ready, later): (Vec<_>, Vec<_>) = left.into_iter().partition(known);
            if ready.is_empty() {
                // A parent that is not there: the store never lets it come to that.
                tracing::error!(queues = later.len(), "stored queues have no way to a root");
                return;
            }
            for queue in ready {
                self.desk.apply(Change::Queue { queue: Box::new(queue.clone()) }, now);
                self.queues.insert(queue.name.clone(), queue);
            }
            left = later;
        }
    }

    fn undo_queue(&mut self, name: QueueName, before: Option<QueueSpec>, now: Timestamp) {
        match before {
            Some(queue) => {
                self.desk.apply(Change::Queue { queue: Box::new(queue.clone()) }, now);
                self.queues.insert(name, queue);
            }
            None => {
                self.desk.apply(gone(&name), now);
                self.queues.remove(&name);
            }
        }
    }

    /// Deletes a queue that nothing needs.
    pub(crate) fn delete_queue(
        &mut self,
        name: &QueueName,
        now: Timestamp,
    ) -> Result<(), ApiError> {
        if !self.queues.contains_key(name) {
            return Err(no_such_queue(name.as_str(), self.queues.keys()));
        }
        if let Some(child) = self.queues.values().find(|queue| queue.parent.as_ref() == Some(name))
        {
            let message = format!("queue {name} has the child {}; delete that first", child.name);
            return Err(ApiError::Invalid(message));
        }
        let uses = |id: &&JobId| self.jobs[*id].spec.settings.queue == *name;
        if let Some(job) = self.active.iter().find(uses) {
            let message =
                format!("job {job} is in queue {name}; cancel it, or wait until it has ended");
            return Err(ApiError::Invalid(message));
        }
        self.desk
            .try_apply(gone(name), now)
            .map_err(|error| ApiError::Invalid(error.to_string()))?;
        self.queues.remove(name);
        self.dirty_queues.insert(name.clone());
        Ok(())
    }

    /// Holds a waiting job back, or lets it go.
    pub(crate) fn hold(&mut self, id: &JobId, held: bool, now: Timestamp) -> Result<(), ApiError> {
        let Some(job) = self.jobs.get(id) else { return Err(ApiError::no_such_job(id.as_str())) };
        let phase = job.state().phase;
        if phase != JobPhase::Pending {
            let message = format!("{id} is {phase}; only a waiting job can be held or released");
            return Err(ApiError::Invalid(message));
        }
        self.apply(id, Event::Held(held), now);
        self.desk.apply(Change::Held { job: id.clone(), held }, now);
        Ok(())
    }

    /// Returns the writes of queues that have changed.
    pub(crate) fn take_queue_writes(&mut self) -> Result<Vec<Group>, ReignEnded> {
        let mut groups = Vec::new();
        for name in std::mem::take(&mut self.dirty_queues) {
            let mut group = Group::default();
            group.put_queue(&name, self.queues.get(&name))?;
            groups.push(group);
        }
        Ok(groups)
    }

    /// Returns every queue with what it uses, parents before their children.
    pub(crate) fn queue_views(&self) -> Vec<v1::QueueView> {
        let mut all: BTreeMap<QueueName, QueueSpec> = self.queues.clone();
        let default = QueueName::default_queue();
        all.entry(default.clone()).or_insert_with(|| QueueSpec::open(default));
        let mut views: BTreeMap<QueueName, v1::QueueView> = BTreeMap::new();
        for (name, spec) in &all {
            let view = v1::QueueView {
                name: name.to_string(),
                parent: spec.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
                quota: spec.quota.iter().map(|(class, count)| (class.clone(), *count)).collect(),
                weight: spec.weight,
                held: spec.held,
                spec_json: serde_json::to_string(spec).unwrap_or_default(),
                ..v1::QueueView::default()
            };
            views.insert(name.clone(), view);
        }
        for id in &self.active {
            let job = &self.jobs[id];
            let (holds, devices) = (job.state().phase.holds_devices(), job.state().ranks.len());
            let (own, leader) = (job.spec.device, job.spec.wishes.leader);
            // A tree that is too deep to be one ends here.
            let mut at = Some(&job.spec.settings.queue);
            for _ in 0..all.len() {
                let Some(spec) = at.and_then(|name| all.get(name)) else { break };
                if let Some(view) = views.get_mut(&spec.name) {
                    if holds {
                        view.running += 1;
                        let mut count = |kind: DeviceKind, devices: usize| {
                            *view.used.entry(kind.as_str().to_owned()).or_default() +=
                                devices as u32;
                        };
                        let leads = usize::from(leader.is_some() && devices > 0);
                        count(own, devices - leads);
                        if let Some(kind) = leader {
                            count(kind, leads);
                        }
                    } else {
                        view.pending += 1;
                    }
                }
                at = spec.parent.as_ref();
            }
        }
        let depth = |name: &str| {
            let mut at = name.parse::<QueueName>().ok();
            let parent = |name: &QueueName| all.get(name).and_then(|spec| spec.parent.clone());
            let mut path = Vec::new();
            while let Some(name) = at.filter(|_| path.len() <= all.len()) {
                at = parent(&name);
                path.insert(0, name);
            }
            path
        };
        let mut views: Vec<v1::QueueView> = views.into_values().collect();
        views.sort_by_cached_key(|view| depth(&view.name));
        views
    }
}

/// Returns what it means that nobody's queue of this name exists any more: it is gone, or, for the
/// one that jobs are in who name none, open again.
fn gone(name: &QueueName) -> Change {
    if *name == QueueName::default_queue() {
        Change::Queue { queue: Box::new(QueueSpec::open(name.clone())) }
    } else {
        Change::QueueGone { queue: name.clone() }
    }
}

/// Says that a queue does not exist, and which do.
pub(crate) fn no_such_queue<'a>(
    name: &str,
    known: impl Iterator<Item = &'a QueueName>,
) -> ApiError {
    let known: Vec<&str> = known.map(QueueName::as_str).take(10).collect();
    let known = if known.is_empty() { "none is made yet".to_owned() } else { known.join(", ") };
    ApiError::NotFound(format!("there is no queue {name}; known: {known}"))
}
