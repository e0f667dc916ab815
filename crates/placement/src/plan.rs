//! The plan: what starts where, and from which snapshot.

use drumline_cluster::{Commitment, Revision, Slice};
use drumline_mesh::{Coords, Mesh};
use drumline_spec::{Gang, Parallelism};
use drumline_types::{Attempt, DeviceId, JobId, RankIndex};
use serde::{Deserialize, Serialize};

use crate::place::Placed;

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

/// What starts now, in the order in which the jobs were considered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The revision of the snapshot that it was made from.
    pub parent: Revision,
    /// The jobs that start.
    pub jobs: Vec<JobPlan>,
}

impl JobPlan {
    /// Joins a job and its place.
    #[must_use]
    pub fn new(job: &JobId, attempt: Attempt, gang: &Gang, placed: Placed) -> Self {
        let mesh = Mesh::new(placed.split);
        let assignments = (0u32..)
            .zip(placed.devices)
            .map(|(rank, device)| Assignment {
                rank: RankIndex(rank),
                coords: mesh.coords(rank),
                device,
            })
            .collect();
        let (job, gang) = (job.clone(), gang.clone());
        Self { job, attempt, gang, split: placed.split, assignments }
    }

    /// Returns what the job holds when the plan is carried out.
    #[must_use]
    pub fn commitment(&self) -> Commitment {
        Commitment {
            job: self.job.clone(),
            attempt: self.attempt,
            devices: self.assignments.iter().map(|a| a.device.clone()).collect(),
            slice: Slice::of(&self.gang),
        }
    }
}

/// Mixes the bits of a number (the finalizer of SplitMix64).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::mix;

    #[test]
    fn it_is_splitmix64() {
        // The first outputs of the reference implementation (Vigna 2015) from the state 0.
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        for (state, output) in [
            (0, 0xe220_a839_7b1d_cdaf),
            (STEP, 0x6e78_9e6a_a1b9_65f4),
            (STEP.wrapping_mul(2), 0x06c4_5d18_8009_454f),
            (STEP.wrapping_mul(3), 0xf88b_b8a8_724c_81ec),
        ] {
            assert_eq!(mix(state), output, "{state:#x}");
        }
    }
}
