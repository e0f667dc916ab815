//! Who may start now: `queue`, `placement`, `audit`, and what they say to those who wait.

use std::time::Instant;

use drumline_audit::check;
use drumline_lifecycle::{Event, Rendezvous};
use drumline_placement::{Plan, Seed, plan};
use drumline_queue::{QueueLimits, Queues, Usage, Waiting, admit};
use drumline_spec::JobSpec;
use drumline_types::{Attempt, Explanation, JobId, JobPhase, Reason, Timestamp};
use drumline_wire::v1;

use crate::api::ApiError;
use crate::core::{Core, check_size};
use crate::identity;
use crate::job::split;

/// The one queue of this version: without limits.
fn queues() -> Queues {
    let default = "default".parse().map(|name| (name, QueueLimits::default()));
    Queues::named(default)
}

impl Core {
    /// Looks at every waiting job once, if anything has changed since the last time.
    pub(crate) fn schedule(&mut self, now: Timestamp) {
        if !std::mem::take(&mut self.replan) {
            return;
        }
        self.planned = now;
        let waiting: Vec<Waiting> = self
            .active
            .iter()
            .filter(|id| self.jobs[*id].state().phase == JobPhase::Pending)
            .map(|id| {
                let job = &self.jobs[id];
                let state = job.state();
                waiting(id, &job.spec, state.attempt.next(), state.created, state.not_before)
            })
            .collect();
        if waiting.is_empty() {
            return;
        }
        let started = Instant::now();
        let admission = admit(&queues(), &self.usage(), &waiting, now);
        let plan = plan(&self.snapshot, &admission.admitted, Seed(self.term));
        self.metrics.placement(started.elapsed());
        let started = Instant::now();
        let checked = check(&self.snapshot, &plan);
        let violations = checked.as_ref().err().map_or(0, Vec::len);
        self.metrics.audit(started.elapsed(), violations);
        for (id, why) in admission.refused.into_iter().chain(plan.waiting.clone()) {
            self.apply(&id, Event::Waits(why), now);
        }
        let checked = match checked {
            Ok(checked) => checked,
            Err(violations) => {
                self.distrust(&plan, &violations, now);
                return;
            }
        };
        for job in checked.jobs() {
            let id = job.plan().job.clone();
            let (attempt, devices) = (
                job.plan().attempt,
                job.plan().assignments.iter().map(|a| a.device.clone()).collect::<Vec<_>>(),
            );
            let rendezvous = self.rendezvous(&devices[0].node);
            self.apply(&id, Event::Planned { plan: job, rendezvous }, now);
            if self.jobs[&id].state().attempt != attempt {
                continue;
            }
            if let Err(error) = self.snapshot.commit(&id, attempt, devices) {
                // The plan was checked against this very snapshot.
                tracing::error!(job = %id, %error, "a checked plan cannot be committed");
            }
            self.fleet.changed = true;
        }
    }

    /// A plan that breaks a rule is a bug: nothing of it is carried out, and its jobs say so.
    fn distrust(&mut self, plan: &Plan, violations: &[drumline_audit::Violation], now: Timestamp) {
        let first = violations.first().map(ToString::to_string).unwrap_or_default();
        tracing::error!(violations = violations.len(), %first, "a plan failed its audit");
        for job in &plan.jobs {
            let message = format!("the plan for it failed its audit: {first}");
            let why = Explanation::new(Reason::NotYetConsidered, message);
            self.apply(&job.job, Event::Waits(why), now);
        }
    }

    fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for id in &self.active {
            let job = &self.jobs[id];
            if job.state().phase.holds_devices() {
                let gang = job.spec.gang();
                usage.add(&job.spec.settings.queue, gang.device, gang.ranks);
            }
        }
        usage
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

    /// Says where jobs would go now if they were the only ones waiting. Nothing is kept.
    pub(crate) fn preview(
        &self,
        specs: &[JobSpec],
        now: Timestamp,
    ) -> Result<Vec<v1::SubmittedJob>, ApiError> {
        check_size(specs)?;
        let id = |index: usize| -> Result<JobId, ApiError> {
            let name = format!("preview-{index}");
            name.parse().map_err(|_| ApiError::Invalid("too many jobs".to_owned()))
        };
        let mut asked = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            asked.push(waiting(&id(index)?, spec, Attempt(1), now, Timestamp(0)));
        }
        let admission = admit(&queues(), &self.usage(), &asked, now);
        let plan = plan(&self.snapshot, &admission.admitted, Seed(self.term));
        if let Err(violations) = check(&self.snapshot, &plan) {
            let first = violations.first().map(ToString::to_string).unwrap_or_default();
            return Err(ApiError::Internal(format!("the plan failed its audit: {first}")));
        }
        let refusals: Vec<_> = admission.refused.iter().chain(&plan.waiting).collect();
        let mut answers = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            let id = id(index)?;
            let mut answer = v1::SubmittedJob {
                kind: spec.kind().as_str().to_owned(),
                name: spec.name.clone(),
                ranks: spec.gang().ranks,
                ..v1::SubmittedJob::default()
            };
            if let Some(job) = plan.jobs.iter().find(|job| job.job == id) {
                answer.placement = job.assignments.iter().map(placed).collect();
            } else if let Some((_, why)) = refusals.iter().find(|(refused, _)| *refused == id) {
                why.reason.token().clone_into(&mut answer.reason);
                answer.message.clone_from(&why.message);
            }
            answers.push(answer);
        }
        Ok(answers)
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

fn waiting(
    id: &JobId,
    spec: &JobSpec,
    attempt: Attempt,
    submitted: Timestamp,
    not_before: Timestamp,
) -> Waiting {
    Waiting {
        job: id.clone(),
        attempt,
        gang: spec.gang(),
        split: split(spec),
        settings: spec.settings.clone(),
        submitted,
        held: false,
        not_before,
    }
}
