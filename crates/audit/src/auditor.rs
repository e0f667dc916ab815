//! The auditor: books of its own, and a check of every cycle against them.

use std::collections::BTreeSet;

use drumline_cluster::Change;
use drumline_placement::{Cycle, JobPlan};
use drumline_spec::{Gang, QueueSpec};
use drumline_types::{DeviceId, JobId, QueueName, Timestamp};

use crate::books::Books;
use crate::check::{CheckedPlan, check_once};
use crate::gang::{Given, check_gang};
use crate::leave::{Kept, check_evictions, legal_size};
use crate::ledger::{Ledger, Standing};
use crate::quota::{Charge, Quota};
use crate::spares::check_spares;
use crate::violation::Violation;

/// Folds the changes that the scheduler is told, and judges each cycle by them.
///
/// It costs what the plan costs, and with quotas the queues beside; the fleet is looked at only
/// when somebody is asked to leave.
#[derive(Debug, Clone)]
pub struct Auditor {
    ledger: Ledger,
}

impl Default for Auditor {
    fn default() -> Self {
        Self::new()
    }
}

impl Auditor {
    /// Returns an auditor that knows no node, and only the queue `default`, without limits, as a
    /// new scheduler does.
    #[must_use]
    pub fn new() -> Self {
        let mut ledger = Ledger::default();
        let default = QueueSpec::open(QueueName::default_queue());
        ledger.queues.insert(default.name.clone(), default);
        Self { ledger }
    }

    /// Takes note of one thing that happened. Give it every change that the scheduler took, and
    /// none that it refused.
    pub fn apply(&mut self, change: &Change) {
        self.ledger.apply(change);
    }

    /// Forgets a queue list that a saved state replaces: a new scheduler has `default`, a restored
    /// one what was saved.
    pub fn restore_queues(&mut self, queues: impl IntoIterator<Item = QueueSpec>) {
        self.ledger.queues = queues.into_iter().map(|queue| (queue.name.clone(), queue)).collect();
    }

    /// Takes note that a job was disrupted before this auditor looked, and whether it was asked to
    /// leave and still holds its devices.
    pub fn recall(&mut self, job: &JobId, disrupted: &[Timestamp], asked: bool) {
        let Some(entry) = self.ledger.jobs.get_mut(job) else { return };
        entry.disrupted = disrupted.to_vec();
        if let Standing::Placed { leaving, .. } = &mut entry.standing {
            *leaving = asked;
        }
    }

    /// Checks what a cycle decided, and takes it as done when it breaks no rule.
    ///
    /// `kept` says for which job the scheduler keeps a device after the cycle
    /// ([`drumline_cluster::NodeState::reserved`]); it is asked only when somebody is asked to leave or
    /// devices are kept ready.
    ///
    /// # Errors
    /// Every [`Violation`] found. The books are as they were, so the scheduler must take the cycle
    /// back.
    pub fn check(
        &mut self,
        cycle: &Cycle,
        kept: impl Fn(&DeviceId) -> Option<JobId>,
    ) -> Result<CheckedPlan, Vec<Violation>> {
        let mut found = Vec::new();
        self.check_starts(cycle, &kept, &mut found);
        check_evictions(&self.ledger, cycle, &kept, &mut found);
        check_spares(&self.ledger, cycle, &kept, &mut found);
        if !found.is_empty() {
            return Err(found);
        }
        for job in &cycle.plan.jobs {
            let devices = job.assignments.iter().map(|a| a.device.clone()).collect();
            self.ledger.give(&job.job, devices, cycle.now);
        }
        for eviction in &cycle.evictions {
            let Some(entry) = self.ledger.jobs.get_mut(&eviction.job) else { continue };
            entry.disrupted.push(cycle.now);
            let settings = &entry.request.settings;
            let per_ms = settings.disruptions.map_or(0, |budget| budget.per_ms);
            entry.disrupted.retain(|at| cycle.now.since_ms(*at) <= per_ms);
            if let Standing::Placed { leaving, .. } = &mut entry.standing {
                *leaving = true;
            }
        }
        Ok(CheckedPlan::new(cycle.plan.clone()))
    }

    fn check_starts(&self, cycle: &Cycle, kept: &Kept<'_>, found: &mut Vec<Violation>) {
        let plan = &cycle.plan;
        check_once(plan, found);
        let starts: BTreeSet<&JobId> = plan.jobs.iter().map(|job| &job.job).collect();
        for (job, _) in &cycle.told {
            if !self.ledger.jobs.contains_key(job) {
                found.push(Violation::UnknownJob { job: job.clone() });
            } else if starts.contains(job) {
                found.push(Violation::JobTwice { job: job.clone() });
            }
        }
        let mut given = Given::default();
        let mut quota = Quota::new(&self.ledger);
        for job in &plan.jobs {
            let Some(entry) = self.ledger.jobs.get(&job.job) else {
                found.push(Violation::UnknownJob { job: job.job.clone() });
                continue;
            };
            self.check_turn(job, cycle.now, &quota, found);
            let gang = &entry.request.gang;
            check_asked(job, gang, entry.request.split, found);
            check_gang(&self.ledger, job, gang, &mut given, found);
            let devices: Vec<&DeviceId> = job.assignments.iter().map(|a| &a.device).collect();
            quota.add(&entry.request.settings.queue, &charge(&self.ledger, gang, &devices));
        }
        if !plan.jobs.is_empty() {
            let mut broken = quota.broken();
            if broken.iter().any(Violation::is_about_lending) {
                // What is kept for a job of a queue is what the queue keeps.
                self.count_kept(&mut quota, kept);
                self.count_spares(&mut quota, cycle);
                let still = quota.broken().iter().any(Violation::is_about_lending);
                broken.retain(|violation| still || !violation.is_about_lending());
            }
            found.extend(broken);
        }
    }

    /// Counts devices that are kept for waiting jobs as used by their queues.
    fn count_kept(&self, quota: &mut Quota<'_>, kept: &Kept<'_>) {
        for (name, machine) in &self.ledger.machines {
            let devices = machine.node.iter().flat_map(|node| (0u32..).zip(&node.devices));
            for (index, device) in devices {
                let id = DeviceId { node: name.clone(), index };
                let Some(entry) = kept(&id).and_then(|job| self.ledger.jobs.get(&job)) else {
                    continue;
                };
                if matches!(entry.standing, Standing::Waiting { .. }) {
                    let share = u64::from(entry.request.gang.share_milli);
                    let charge = [((device.kind, device.model.clone()), share)].into();
                    quota.add(&entry.request.settings.queue, &charge);
                }
            }
        }
    }

    /// Counts devices that are kept ready and lent to nobody as used by their queues.
    fn count_spares(&self, quota: &mut Quota<'_>, cycle: &Cycle) {
        let starts = cycle.plan.jobs.iter().flat_map(|job| &job.assignments);
        let taken: BTreeSet<&DeviceId> = starts.map(|assignment| &assignment.device).collect();
        for spares in &cycle.spares {
            let Some(entry) = self.ledger.jobs.get(&spares.job) else { continue };
            let idle = |device: &&DeviceId| {
                !taken.contains(device) && self.ledger.holder(device).is_none()
            };
            let idle: Vec<&DeviceId> = spares.devices.iter().filter(idle).collect();
            let gang = Gang { leader: None, ..entry.request.gang.clone() };
            quota.add(&entry.request.settings.queue, &charge(&self.ledger, &gang, &idle));
        }
    }

    /// Checks that a job waits, and may start now.
    fn check_turn(
        &self,
        plan: &JobPlan,
        now: Timestamp,
        quota: &Quota<'_>,
        found: &mut Vec<Violation>,
    ) {
        let Some(entry) = self.ledger.jobs.get(&plan.job) else { return };
        let job = plan.job.clone();
        let queue = &entry.request.settings.queue;
        if let Some(why) = quota.closed(queue) {
            found.push(Violation::QueueClosed { job: job.clone(), queue: queue.clone(), why });
        }
        match &entry.standing {
            Standing::Placed { .. } => {
                let (held, planned) = (entry.attempt, plan.attempt);
                found.push(Violation::JobHoldsDevices { job, held, planned });
                return;
            }
            Standing::Waiting { not_before } if *not_before > now => {
                let why = format!("may not before {} ms", not_before.0);
                found.push(Violation::NotYet { job: job.clone(), why });
            }
            Standing::Waiting { .. } if entry.held => {
                let why = "is held by a user".to_owned();
                found.push(Violation::NotYet { job: job.clone(), why });
            }
            Standing::Waiting { .. } => {}
        }
        if plan.attempt != entry.attempt {
            let (planned, next) = (plan.attempt, entry.attempt);
            found.push(Violation::WrongAttempt { job, planned, next });
        }
    }
}

/// Checks that the plan starts what was asked for, at a size that it may have.
fn check_asked(
    plan: &JobPlan,
    gang: &Gang,
    split: drumline_spec::Parallelism,
    found: &mut Vec<Violation>,
) {
    let ranks = plan.gang.ranks;
    let asked = Gang { ranks, ..gang.clone() };
    let kept = (split.tensor, split.pipeline) == (plan.split.tensor, plan.split.pipeline);
    if plan.gang != asked || !kept {
        found.push(Violation::OtherGang { job: plan.job.clone() });
    }
    if !legal_size(gang, ranks) {
        found.push(Violation::IllegalSize { job: plan.job.clone(), ranks });
    }
}

/// Returns what a queue is charged with for devices, in thousandths.
pub(crate) fn charge(ledger: &Ledger, gang: &Gang, devices: &[&DeviceId]) -> Charge {
    let mut charge = Charge::new();
    for device in devices {
        let node = ledger.node(&device.node);
        if let Some(known) = node.and_then(|node| node.devices.get(device.index as usize)) {
            let class = (known.kind, known.model.clone());
            *charge.entry(class).or_default() += u64::from(gang.share_milli);
        }
    }
    charge
}
