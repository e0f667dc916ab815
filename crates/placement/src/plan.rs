//! The plan: what starts where, from which snapshot, and who waits for what.

use std::collections::BTreeMap;

use drumline_cluster::{Revision, Snapshot};
use drumline_mesh::{Coords, Mesh};
use drumline_queue::{Admitted, Waiting};
use drumline_spec::{DeviceKind, Gang, Parallelism};
use drumline_types::{Attempt, DeviceId, Explanation, JobId, RankIndex};
use serde::{Deserialize, Serialize};

use crate::choose::{Fleet, choose};
use crate::explain::explain;

/// Decides among equals. The same seed and input give the same plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Seed(pub u64);

/// Where one rank runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The rank.
    pub rank: RankIndex,
    /// Its place in the mesh.
    pub coords: Coords,
    /// The node and device that it gets.
    pub device: DeviceId,
}

/// Where every rank of one job's attempt runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobPlan {
    /// The job.
    pub job: JobId,
    /// The attempt that starts.
    pub attempt: Attempt,
    /// The gang that was asked for.
    pub gang: Gang,
    /// How the ranks divide the work.
    pub split: Parallelism,
    /// One per rank, in rank order.
    pub assignments: Vec<Assignment>,
}

/// What starts now and what waits, in the order in which the jobs were considered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The revision of the snapshot that it was made from.
    pub parent: Revision,
    /// The jobs that start.
    pub jobs: Vec<JobPlan>,
    /// The admitted jobs that wait, each with its reason.
    pub waiting: Vec<(JobId, Explanation)>,
}

/// Places the admitted jobs one after the other, each as a whole or not at all.
///
/// A gang goes to the fewest nodes, inside the smallest topology domain that holds it, and of
/// those where it leaves the least free devices behind; `seed` decides among equals. Tensor groups
/// (`node_group` consecutive ranks) never span nodes. A job that cannot be placed holds nothing,
/// and those behind it may still go.
#[must_use]
pub fn plan(snapshot: &Snapshot, admitted: &[Admitted], seed: Seed) -> Plan {
    let mut plan = Plan { parent: snapshot.revision(), jobs: Vec::new(), waiting: Vec::new() };
    let mut fleet = Fleet::new(snapshot, seed);
    // Devices only get fewer while a plan is made: a shape that did not fit once will not fit now.
    let mut hopeless: BTreeMap<(DeviceKind, u32, u32), Explanation> = BTreeMap::new();
    for waiting in admitted.iter().map(Admitted::waiting) {
        let gang = &waiting.gang;
        let shape = (gang.device, gang.node_group, gang.ranks);
        if let Some(why) = hopeless.get(&shape) {
            plan.waiting.push((waiting.job.clone(), why.clone()));
            continue;
        }
        match choose(&mut fleet, gang) {
            Some(devices) => plan.jobs.push(job_plan(waiting, devices)),
            None => {
                let why = explain(&fleet, gang);
                hopeless.insert(shape, why.clone());
                plan.waiting.push((waiting.job.clone(), why));
            }
        }
    }
    plan
}

fn job_plan(waiting: &Waiting, devices: Vec<DeviceId>) -> JobPlan {
    let mesh = Mesh::new(waiting.split);
    let assignments = (0..waiting.gang.ranks)
        .zip(devices)
        .map(|(rank, device)| Assignment {
            rank: RankIndex(rank),
            coords: mesh.coords(rank),
            device,
        })
        .collect();
    JobPlan {
        job: waiting.job.clone(),
        attempt: waiting.attempt,
        gang: waiting.gang.clone(),
        split: waiting.split,
        assignments,
    }
}
