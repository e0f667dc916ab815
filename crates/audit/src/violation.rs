//! What can be wrong with a plan, with the evidence.

use drumline_cluster::{Ineligible, Revision};
use drumline_spec::DeviceKind;
use drumline_types::{Attempt, DeviceId, JobId, NodeName, RankIndex};
use serde::{Deserialize, Serialize};

/// One rule that a plan breaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Violation {
    /// The fleet has changed since the plan was made.
    #[error("the plan was made from revision {} and the fleet is at {}", parent.0, now.0)]
    Stale {
        /// The revision that it was made from.
        parent: Revision,
        /// The revision of the snapshot given.
        now: Revision,
    },
    /// A job is planned twice, or planned and said to wait.
    #[error("{job} is in the plan more than once")]
    JobTwice {
        /// The job.
        job: JobId,
    },
    /// A job that holds devices is planned again.
    #[error("{job} holds devices of attempt {held} and is planned for attempt {planned}")]
    JobHoldsDevices {
        /// The job.
        job: JobId,
        /// The attempt that holds devices.
        held: Attempt,
        /// The attempt in the plan.
        planned: Attempt,
    },
    /// The ranks are not 0, 1, 2 and so on up to the gang's size.
    #[error("{job} needs ranks 0 to {needs} (exclusive), in order; the plan has {got:?}")]
    GangNotWhole {
        /// The job.
        job: JobId,
        /// The gang's size.
        needs: u32,
        /// The ranks in the plan.
        got: Vec<RankIndex>,
    },
    /// The split does not give the gang's number of ranks.
    #[error("{job} has {ranks} ranks and a split of {tensor} x {pipeline} x {data}")]
    SplitDisagrees {
        /// The job.
        job: JobId,
        /// The gang's size.
        ranks: u32,
        /// The tensor axis.
        tensor: u32,
        /// The pipeline axis.
        pipeline: u32,
        /// The data axis.
        data: u32,
    },
    /// A rank's coordinates are not those of its place in the rank order.
    #[error("rank {rank} of {job} has the coordinates of another rank")]
    WrongCoordinates {
        /// The job.
        job: JobId,
        /// The rank.
        rank: RankIndex,
    },
    /// Ranks of one group are on different nodes.
    #[error("ranks {first} and {rank} of {job} must share a node and are on {there} and {here}")]
    GroupSplit {
        /// The job.
        job: JobId,
        /// The first rank of the group.
        first: RankIndex,
        /// The rank that is elsewhere.
        rank: RankIndex,
        /// The first rank's node.
        there: NodeName,
        /// This rank's node.
        here: NodeName,
    },
    /// A device is given twice by the plan.
    #[error("{device} is given to {first} and to {second}")]
    DeviceTwice {
        /// The device.
        device: DeviceId,
        /// Who got it first.
        first: JobId,
        /// Who got it again; may be the same job.
        second: JobId,
    },
    /// A device is given that a job holds.
    #[error("{device} is given to {job} and held by {holder}")]
    DeviceHeld {
        /// The device.
        device: DeviceId,
        /// Who would get it.
        job: JobId,
        /// Who holds it.
        holder: JobId,
    },
    /// A device is given that the fleet does not have.
    #[error("{device} is given to {job} and does not exist")]
    NoSuchDevice {
        /// The device.
        device: DeviceId,
        /// Who would get it.
        job: JobId,
    },
    /// A device of another kind is given.
    #[error("{device} is a {got:?} device and {job} needs {needs:?}")]
    WrongKind {
        /// The device.
        device: DeviceId,
        /// Who would get it.
        job: JobId,
        /// The kind that the gang needs.
        needs: DeviceKind,
        /// The kind that it is.
        got: DeviceKind,
    },
    /// A device is given that does not work.
    #[error("{device} is given to {job} and has failed: {evidence}")]
    DeviceFailed {
        /// The device.
        device: DeviceId,
        /// Who would get it.
        job: JobId,
        /// What is wrong with it.
        evidence: String,
    },
    /// A node is used that takes no new work.
    #[error("{node} is used for {job} and is {cause}")]
    NodeIneligible {
        /// The node.
        node: NodeName,
        /// Who would use it.
        job: JobId,
        /// Why it takes no new work.
        cause: Ineligible,
    },
}
