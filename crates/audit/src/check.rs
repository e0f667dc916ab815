//! The check itself: every rule, on every job, with all that is wrong reported at once.

use std::collections::{BTreeMap, BTreeSet};

use drumline_cluster::{Health, Snapshot};
use drumline_placement::{Assignment, JobPlan, Plan};
use drumline_types::{DeviceId, JobId, RankIndex};

use crate::violation::Violation;

/// A plan that breaks no rule. Only [`check`] makes one, and only this may be launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedPlan {
    plan: Plan,
}

impl CheckedPlan {
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

/// Checks a plan against the snapshot that it was made from.
///
/// # Errors
/// Every [`Violation`] found, in the order of the plan.
pub fn check(snapshot: &Snapshot, plan: &Plan) -> Result<CheckedPlan, Vec<Violation>> {
    let mut found = Vec::new();
    if plan.parent != snapshot.revision() {
        found.push(Violation::Stale { parent: plan.parent, now: snapshot.revision() });
    }
    let mut seen: BTreeSet<&JobId> = BTreeSet::new();
    let mut given: BTreeMap<&DeviceId, &JobId> = BTreeMap::new();
    for job in &plan.jobs {
        if !seen.insert(&job.job) {
            found.push(Violation::JobTwice { job: job.job.clone() });
        }
        check_gang(snapshot, job, &mut found);
        for assignment in &job.assignments {
            if let Some(first) = given.insert(&assignment.device, &job.job) {
                found.push(Violation::DeviceTwice {
                    device: assignment.device.clone(),
                    first: first.clone(),
                    second: job.job.clone(),
                });
            }
            check_device(snapshot, job, &assignment.device, &mut found);
        }
    }
    for (job, _) in &plan.waiting {
        if !seen.insert(job) {
            found.push(Violation::JobTwice { job: job.clone() });
        }
    }
    if found.is_empty() { Ok(CheckedPlan { plan: plan.clone() }) } else { Err(found) }
}

fn check_gang(snapshot: &Snapshot, job: &JobPlan, found: &mut Vec<Violation>) {
    if let Some(held) = snapshot.commitment(&job.job) {
        found.push(Violation::JobHoldsDevices {
            job: job.job.clone(),
            held: held.attempt,
            planned: job.attempt,
        });
    }
    let got: Vec<RankIndex> = job.assignments.iter().map(|a| a.rank).collect();
    let whole = got.len() == job.gang.ranks as usize
        && got.iter().enumerate().all(|(place, rank)| rank.0 as usize == place);
    if !whole || got.is_empty() {
        found.push(Violation::GangNotWhole { job: job.job.clone(), needs: job.gang.ranks, got });
    }
    let split = job.split;
    let world = u64::from(split.tensor) * u64::from(split.pipeline) * u64::from(split.data);
    if world != u64::from(job.gang.ranks) {
        found.push(Violation::SplitDisagrees {
            job: job.job.clone(),
            ranks: job.gang.ranks,
            tensor: split.tensor,
            pipeline: split.pipeline,
            data: split.data,
        });
    } else {
        check_coordinates(job, found);
    }
    check_groups(job, found);
}

/// Counts through the mesh, tensor innermost, instead of computing each rank's place.
fn check_coordinates(job: &JobPlan, found: &mut Vec<Violation>) {
    let (mut tensor, mut pipeline, mut data) = (0, 0, 0);
    for assignment in &job.assignments {
        let coords = assignment.coords;
        if (coords.tensor, coords.pipeline, coords.data) != (tensor, pipeline, data) {
            let (job, rank) = (job.job.clone(), assignment.rank);
            found.push(Violation::WrongCoordinates { job, rank });
        }
        tensor += 1;
        if tensor == job.split.tensor {
            tensor = 0;
            pipeline += 1;
        }
        if pipeline == job.split.pipeline {
            pipeline = 0;
            data += 1;
        }
    }
}

fn check_groups(job: &JobPlan, found: &mut Vec<Violation>) {
    let mut first: Option<&Assignment> = None;
    for assignment in &job.assignments {
        let starts_group =
            assignment.rank.0.checked_rem(job.gang.node_group).is_none_or(|r| r == 0);
        match first {
            Some(first) if !starts_group => {
                if first.device.node != assignment.device.node {
                    found.push(Violation::GroupSplit {
                        job: job.job.clone(),
                        first: first.rank,
                        rank: assignment.rank,
                        there: first.device.node.clone(),
                        here: assignment.device.node.clone(),
                    });
                }
            }
            _ => first = Some(assignment),
        }
    }
}

fn check_device(snapshot: &Snapshot, plan: &JobPlan, id: &DeviceId, found: &mut Vec<Violation>) {
    let (job, device) = (plan.job.clone(), id.clone());
    let state = snapshot.node(&id.node);
    let Some((node, spec)) = state
        .map(drumline_cluster::NodeState::node)
        .and_then(|node| node.devices.get(id.index as usize).map(|spec| (node, spec)))
    else {
        found.push(Violation::NoSuchDevice { device, job });
        return;
    };
    if let Some(holder) = snapshot.holder(id) {
        let (device, job, holder) = (device.clone(), job.clone(), holder.clone());
        found.push(Violation::DeviceHeld { device, job, holder });
    }
    if spec.kind != plan.gang.device {
        let (device, job) = (device.clone(), job.clone());
        found.push(Violation::WrongKind { device, job, needs: plan.gang.device, got: spec.kind });
    }
    if let Health::Failed(evidence) = &spec.health {
        let (device, job) = (device.clone(), job.clone());
        found.push(Violation::DeviceFailed { device, job, evidence: evidence.clone() });
    }
    if let Some(cause) = node.ineligible() {
        found.push(Violation::NodeIneligible { node: node.name.clone(), job, cause });
    }
}
