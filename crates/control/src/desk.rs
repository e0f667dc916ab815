//! The scheduler's desk: every change of fleet and jobs is laid on it once, and what the scheduler
//! decides leaves it audited, or not at all.

use drumline_audit::{Auditor, CheckedPlan};
use drumline_cluster::{Change, Node, Snapshot};
use drumline_placement::{Cycle, Seed};
use drumline_scheduler::{Options, Saved, Scheduler};
use drumline_spec::QueueSpec;
use drumline_types::{DeviceId, Explanation, JobId, NodeName, Reason, Timestamp};

/// What one look at the fleet led to.
pub(crate) struct Decided {
    pub(crate) cycle: Cycle,
    /// The starts; `None`: the plan broke a rule, and nothing of it may be done.
    pub(crate) checked: Option<CheckedPlan>,
    /// What was broken.
    pub(crate) violations: Vec<String>,
    /// The state that the refused plan was made from.
    pub(crate) incident: Option<Box<Saved>>,
    pub(crate) audit: std::time::Duration,
}

/// The scheduler and its auditor.
pub(crate) struct Desk {
    scheduler: Scheduler,
    /// Keeps books of its own, from the same changes.
    auditor: Auditor,
    /// When the passing of time alone may change a decision.
    wake: Option<Timestamp>,
}

impl Desk {
    pub(crate) fn new(term: u64) -> Self {
        let options = Options { seed: Seed(term), ..Options::default() };
        Self { scheduler: Scheduler::new(options), auditor: Auditor::new(), wake: None }
    }

    /// Returns the fleet and who holds what.
    pub(crate) fn fleet(&self) -> &Snapshot {
        self.scheduler.fleet()
    }

    /// Lays one change on the desk.
    pub(crate) fn apply(&mut self, change: Change, now: Timestamp) {
        if let Err(error) = self.try_apply(change, now) {
            // The ledger never lets it come to that: what it holds has been decided here.
            tracing::error!(%error, "the scheduler refuses what has happened");
        }
    }

    /// As [`Self::apply`], for changes that a user asks for and may get wrong.
    pub(crate) fn try_apply(
        &mut self,
        change: Change,
        now: Timestamp,
    ) -> Result<(), drumline_cluster::ChangeError> {
        self.scheduler.apply(change.clone(), now)?;
        self.auditor.apply(&change);
        Ok(())
    }

    pub(crate) fn upsert_node(&mut self, node: Node, now: Timestamp) {
        // Most heartbeats change nothing that matters here.
        if self.fleet().node(&node.name).is_some_and(|known| *known.node() == node) {
            return;
        }
        self.apply(Change::Node { node: Box::new(node) }, now);
    }

    pub(crate) fn remove_node(&mut self, node: &NodeName, now: Timestamp) {
        self.apply(Change::NodeGone { node: node.clone() }, now);
    }

    /// Returns when to look again although nothing happens.
    pub(crate) fn wake(&self) -> Option<Timestamp> {
        self.wake
    }

    /// Returns whether a look may lead to anything.
    pub(crate) fn due(&self, now: Timestamp) -> bool {
        self.scheduler.dirty() || self.wake.is_some_and(|at| at <= now)
    }

    /// Decides, and has it audited.
    pub(crate) fn decide(&mut self, now: Timestamp) -> Decided {
        let cycle = self.scheduler.cycle(now);
        self.wake = cycle.wake;
        let started = std::time::Instant::now();
        let fleet = self.scheduler.fleet();
        let kept = |device: &DeviceId| fleet.node(&device.node)?.reserved(device.index).cloned();
        let checked = self.auditor.check(&cycle, kept);
        let audit = started.elapsed();
        match checked {
            Ok(checked) => Decided {
                cycle,
                checked: Some(checked),
                violations: Vec::new(),
                incident: None,
                audit,
            },
            Err(found) => {
                let violations: Vec<String> = found.iter().map(ToString::to_string).collect();
                let first = violations.first().cloned().unwrap_or_default();
                let message = format!("the plan for it failed its audit: {first}");
                let why = Explanation::new(Reason::NotYetConsidered, message);
                self.scheduler.reject(&cycle, &why);
                let incident = Some(Box::new(self.scheduler.save()));
                Decided { cycle, checked: None, violations, incident, audit }
            }
        }
    }

    /// Returns a copy of the scheduler with these queues, for a preview.
    pub(crate) fn trial(
        &self,
        queues: Vec<QueueSpec>,
        now: Timestamp,
    ) -> Result<Scheduler, drumline_cluster::ChangeError> {
        let mut trial = self.scheduler.clone();
        for queue in queues {
            trial.apply(Change::Queue { queue: Box::new(queue) }, now)?;
        }
        Ok(trial)
    }

    /// Returns what is kept ready beside a job, and to whom each device is lent.
    pub(crate) fn spares(&self, job: &JobId) -> Vec<(DeviceId, Option<JobId>)> {
        self.scheduler.spares(job)
    }

    /// Returns the devices that are kept ready beside a job, those among them that are still to be
    /// heard of after a restart.
    pub(crate) fn kept_ready(&self, job: &JobId) -> Vec<DeviceId> {
        self.scheduler.kept_ready(job)
    }

    /// Explains in full why a job waits.
    pub(crate) fn explain(&self, job: &JobId, now: Timestamp) -> Option<Explanation> {
        self.scheduler.explain(job, now)
    }

    /// Returns everything that decisions depend on.
    pub(crate) fn save(&self) -> Saved {
        self.scheduler.save()
    }
}
