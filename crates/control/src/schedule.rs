//! Who starts, who leaves, and what is said to those who wait.

use std::collections::BTreeSet;
use std::time::Instant;

use drumline_lifecycle::{Event, Rendezvous};
use drumline_placement::{Eviction, EvictionCause, Spares};
use drumline_scheduler::Scheduler;
use drumline_spec::{JobSpec, QueueSpec, SplitChoice};
use drumline_types::{Explanation, JobId, Reason, Timestamp};
use drumline_wire::v1;

use crate::api::ApiError;
use crate::core::{Core, check_size, request};
use crate::identity;

impl Core {
    /// Lets the scheduler look at the fleet, if anything has changed since the last time.
    pub(crate) fn schedule(&mut self, now: Timestamp) {
        if !self.desk.due(now) {
            return;
        }
        let started = Instant::now();
        let decided = self.desk.decide(now);
        self.metrics.placement(started.elapsed().saturating_sub(decided.audit));
        self.metrics.audit(decided.audit, decided.violations.len());
        for (id, why) in decided.cycle.told {
            self.apply(&id, Event::Waits(why), now);
        }
        let Some(checked) = decided.checked else {
            // A plan that breaks a rule is a bug: nothing of it is carried out.
            let first = decided.violations.first().cloned().unwrap_or_default();
            tracing::error!(violations = decided.violations.len(), %first, "a plan failed its audit");
            self.incident = decided.incident;
            return;
        };
        self.show_spares(&decided.cycle.spares);
        for eviction in decided.cycle.evictions {
            let why = eviction_reason(&eviction);
            let event = Event::Evicted { attempt: eviction.attempt, why };
            self.apply(&eviction.job, event, now);
        }
        for job in checked.jobs() {
            let Some(first) = job.plan().assignments.first() else { continue };
            let rendezvous = self.rendezvous(&first.device.node);
            let id = job.plan().job.clone();
            self.apply(&id, Event::Planned { plan: job, rendezvous }, now);
            self.fleet.changed = true;
        }
    }

    /// Lets readers see what is kept ready beside which job, and to whom it is lent.
    fn show_spares(&mut self, all: &[Spares]) {
        let now = all.iter().map(|spares| spares.job.clone());
        let known: BTreeSet<JobId> =
            std::mem::take(&mut self.spared).into_iter().chain(now).collect();
        for id in known {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let kept = self.desk.kept_ready(&id);
            let any = !kept.is_empty();
            if job.stored.spares != kept {
                job.stored.spares = kept;
                self.dirty.insert(id.clone());
            }
            let spares = self.desk.spares(&id);
            if job.spares != spares {
                job.spares = spares;
                self.stale.insert(id.clone());
            }
            if any {
                self.spared.insert(id);
            }
        }
    }

    fn rendezvous(&self, first: &drumline_types::NodeName) -> Rendezvous {
        let master_addr = self.fleet.address(first);
        let taken: Vec<u16> = self
            .active
            .iter()
            .map(|id| self.jobs[id].state())
            .filter(|state| state.phase.holds_devices())
            .map(|state| state.rendezvous.master_port)
            .collect();
        let master_port = identity::master_port(&master_addr, &taken);
        Rendezvous { secret: identity::secret(), master_addr, master_port }
    }

    /// Prepares to say where jobs would go now. Nothing is kept.
    pub(crate) fn preview(
        &self,
        specs: &[JobSpec],
        queues: Vec<QueueSpec>,
        now: Timestamp,
    ) -> Result<Preview, ApiError> {
        let specs = self.choose_splits(specs.to_vec())?;
        check_size(&specs)?;
        let trial =
            self.desk.trial(queues, now).map_err(|error| ApiError::Invalid(error.to_string()))?;
        Ok(Preview { specs, trial, now })
    }
}

/// A look at what would be decided, apart from what is.
pub(crate) struct Preview {
    specs: Vec<JobSpec>,
    trial: Scheduler,
    now: Timestamp,
}

impl Preview {
    /// Looks. With many jobs waiting it takes a while, and disturbs nobody.
    pub(crate) fn look(self) -> Result<Vec<v1::SubmittedJob>, ApiError> {
        let Self { specs, trial, now } = self;
        let id = |index: usize| -> Result<JobId, ApiError> {
            let name = format!("preview-{index}");
            name.parse().map_err(|_| ApiError::Invalid("too many jobs".to_owned()))
        };
        let mut asked = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            asked.push(request(&id(index)?, spec, now));
        }
        let cycle = trial.into_preview(&asked, now);
        let mut answers = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            let id = id(index)?;
            let mut answer = v1::SubmittedJob {
                kind: spec.kind().as_str().to_owned(),
                name: spec.name.clone(),
                ranks: spec.gang().ranks,
                split: chosen(spec),
                ..v1::SubmittedJob::default()
            };
            if let Some(job) = cycle.plan.jobs.iter().find(|job| job.job == id) {
                answer.placement = job.assignments.iter().map(placed).collect();
            } else if let Some((_, why)) = cycle.told.iter().find(|(told, _)| *told == id) {
                why.reason.token().clone_into(&mut answer.reason);
                answer.message.clone_from(&why.message);
            }
            answers.push(answer);
        }
        Ok(answers)
    }
}

/// Says which split was chosen and why; empty when the manifest gave one.
pub(crate) fn chosen(spec: &JobSpec) -> String {
    match &spec.split {
        SplitChoice::Chosen { why } => why.clone(),
        SplitChoice::Given | SplitChoice::Auto { .. } => String::new(),
    }
}

fn placed(assignment: &drumline_placement::Assignment) -> v1::RankView {
    v1::RankView {
        rank: assignment.rank.0,
        node: assignment.device.node.to_string(),
        device: assignment.device.index,
        tensor: assignment.coords.tensor,
        pipeline: assignment.coords.pipeline,
        data: assignment.coords.data,
        ..v1::RankView::default()
    }
}

fn eviction_reason(eviction: &Eviction) -> Explanation {
    let reason = match eviction.cause {
        EvictionCause::Preempted => Reason::Preempted,
        EvictionCause::Reclaimed | EvictionCause::Recalled => Reason::Reclaimed,
        EvictionCause::Consolidated | EvictionCause::Resized | EvictionCause::Drained => {
            Reason::Moved
        }
    };
    Explanation::new(reason, eviction.message.clone())
}
