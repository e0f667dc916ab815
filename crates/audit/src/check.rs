//! A plan against a snapshot, without memory of what came before.

use std::collections::BTreeSet;

use drumline_cluster::Snapshot;
use drumline_placement::{JobPlan, Plan};
use drumline_types::JobId;

use crate::gang::{Given, check_gang};
use crate::violation::Violation;

/// A plan that breaks no rule. Only this crate makes one, and only this may be launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedPlan {
    plan: Plan,
}

impl CheckedPlan {
    pub(crate) fn new(plan: Plan) -> Self {
        Self { plan }
    }

    /// Returns the plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns the jobs that start, each as something that may be launched.
    pub fn jobs(&self) -> impl Iterator<Item = CheckedJob> + '_ {
        self.plan.jobs.iter().map(|job| CheckedJob { job: job.clone() })
    }
}

/// One job of a checked plan. It can be had from a [`CheckedPlan`] and from nowhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedJob {
    job: JobPlan,
}

impl CheckedJob {
    /// Returns where the job's ranks run.
    #[must_use]
    pub fn plan(&self) -> &JobPlan {
        &self.job
    }
}

/// Checks a plan against the snapshot that it was made from. Who waits, quotas and evictions are
/// [`crate::Auditor`]'s to check.
///
/// # Errors
/// Every [`Violation`] found, in the order of the plan.
pub fn check(snapshot: &Snapshot, plan: &Plan) -> Result<CheckedPlan, Vec<Violation>> {
    let mut found = Vec::new();
    if plan.parent != snapshot.revision() {
        found.push(Violation::Stale { parent: plan.parent, now: snapshot.revision() });
    }
    check_once(plan, &mut found);
    let mut given = Given::default();
    for job in &plan.jobs {
        if let Some(held) = snapshot.commitment(&job.job) {
            found.push(Violation::JobHoldsDevices {
                job: job.job.clone(),
                held: held.attempt,
                planned: job.attempt,
            });
        }
        check_gang(snapshot, job, &job.gang, &mut given, &mut found);
    }
    if found.is_empty() { Ok(CheckedPlan::new(plan.clone())) } else { Err(found) }
}

/// Checks that a job is named once.
pub(crate) fn check_once(plan: &Plan, found: &mut Vec<Violation>) {
    let mut seen: BTreeSet<&JobId> = BTreeSet::new();
    for job in plan.jobs.iter().map(|job| &job.job) {
        if !seen.insert(job) {
            found.push(Violation::JobTwice { job: job.clone() });
        }
    }
}
