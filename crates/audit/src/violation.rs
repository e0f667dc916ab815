//! What can be wrong with a plan, with the evidence.

use drumline_cluster::{Ineligible, Revision};
use drumline_spec::DeviceKind;
use drumline_types::{Attempt, DeviceId, JobId, NodeName, QueueName, RankIndex};
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
    /// More of a device is given than is left of it.
    #[error("{job} gets {asks} thousandths of {device}, of which {left} are left")]
    DeviceOverfull {
        /// The device.
        device: DeviceId,
        /// Who would get it.
        job: JobId,
        /// Thousandths that it would get.
        asks: u32,
        /// Thousandths that nobody uses.
        left: u32,
    },
    /// A device of a model that the gang does not accept.
    #[error("{device} is a {got}; {job} takes {wanted}")]
    WrongModel {
        /// The device.
        device: DeviceId,
        /// Who would get it.
        job: JobId,
        /// Its model.
        got: String,
        /// What the gang accepts.
        wanted: String,
    },
    /// Ranks of one gang get devices of different models.
    #[error("{job} gets devices of two models: {first} and {other}")]
    MixedModels {
        /// The job.
        job: JobId,
        /// The first rank's model.
        first: String,
        /// Another's.
        other: String,
    },
    /// Ranks that must be in one domain are not.
    #[error("ranks {first} and {rank} of {job} must share a {level} and do not")]
    TopologyBroken {
        /// The job.
        job: JobId,
        /// The level.
        level: String,
        /// The first rank of the run.
        first: RankIndex,
        /// The rank that is elsewhere, or in no domain of the level.
        rank: RankIndex,
    },
    /// More processor time is given than the node has.
    #[error("{node} has {left} thousandths of a core left and {job} gets {asks} of it")]
    CpuOverfull {
        /// The node.
        node: NodeName,
        /// Who would get it.
        job: JobId,
        /// What the ranks there need.
        asks: u64,
        /// What is left.
        left: u64,
    },
    /// More memory is given than the node has.
    #[error("{node} has {left} bytes of memory left and {job} gets {asks}")]
    MemoryOverfull {
        /// The node.
        node: NodeName,
        /// Who would get it.
        job: JobId,
        /// What the ranks there need, in bytes.
        asks: u64,
        /// What is left, in bytes.
        left: u64,
    },
    /// A job is planned or told of that nobody submitted, or that is over.
    #[error("{job} is not known")]
    UnknownJob {
        /// The job.
        job: JobId,
    },
    /// A job starts with another gang than it asked for.
    #[error("{job} starts with another gang or split than it asked for")]
    OtherGang {
        /// The job.
        job: JobId,
    },
    /// A gang starts at a size that it may not have.
    #[error("{job} starts with {ranks} ranks, which is not one of its sizes")]
    IllegalSize {
        /// The job.
        job: JobId,
        /// The size.
        ranks: u32,
    },
    /// An attempt starts that is not the next one.
    #[error("{job} starts attempt {planned}, and its next is {next}")]
    WrongAttempt {
        /// The job.
        job: JobId,
        /// The attempt in the plan.
        planned: Attempt,
        /// The attempt that is due.
        next: Attempt,
    },
    /// A job starts that is held, or before its time.
    #[error("{job} starts and {why}")]
    NotYet {
        /// The job.
        job: JobId,
        /// Why it may not.
        why: String,
    },
    /// A job starts from a queue that takes none.
    #[error("{job} starts from queue {queue}, which {why}")]
    QueueClosed {
        /// The job.
        job: JobId,
        /// The queue.
        queue: QueueName,
        /// Why it takes none.
        why: String,
    },
    /// Starts carry a queue past what it may use.
    #[error(
        "queue {queue} would use {used} thousandths of {class} devices; it may use {limit} at most"
    )]
    QuotaBroken {
        /// The queue.
        queue: QueueName,
        /// The class of devices.
        class: String,
        /// What it would use, with what is kept from others below it.
        used: u64,
        /// What it may use.
        limit: u64,
    },
    /// Starts use idle quota that its queue does not lend.
    #[error(
        "{used} thousandths of {class} devices would be used or kept by queues; there are {has}"
    )]
    LentTooMuch {
        /// The class of devices.
        class: String,
        /// What is used, and what is kept by those who do not lend it.
        used: u64,
        /// What the fleet has.
        has: u64,
    },
    /// A gang is asked to leave that may not be.
    #[error("{job} is asked to leave and {why}")]
    MayNotLeave {
        /// The gang.
        job: JobId,
        /// Why it may not be asked.
        why: String,
    },
    /// A gang is asked to leave and nobody gains by it.
    #[error("{job} is asked to leave for {beneficiary} without need: {why}")]
    NeedlessVictim {
        /// The gang.
        job: JobId,
        /// Who should gain.
        beneficiary: String,
        /// What shows that there is no need.
        why: String,
    },
    /// Devices are kept ready that could not serve, or that others use who may not.
    #[error("devices are kept ready for {job} and {why}")]
    WrongSpares {
        /// The gang that they are kept for.
        job: JobId,
        /// What is wrong with them.
        why: String,
    },
}

impl Violation {
    /// Returns whether it says that what a queue keeps for itself is used by others.
    pub(crate) fn is_about_lending(&self) -> bool {
        matches!(self, Self::LentTooMuch { .. })
    }
}
