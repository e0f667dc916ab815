//! What happened to the fleet and its jobs: the only input of the scheduler and of its auditor.
//!
//! Both fold the same stream of changes into views of their own. A saved state and the changes
//! after it lead to the same decisions, bit for bit.

use drumline_spec::{Gang, GangSettings, Parallelism, QueueSpec};
use drumline_types::{Attempt, DeviceId, JobId, NodeName, QueueName, Timestamp};
use serde::{Deserialize, Serialize};

use crate::node::Node;

/// A job as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The job.
    pub job: JobId,
    /// The gang that it needs.
    pub gang: Gang,
    /// How the ranks divide the work at the gang's wanted size; an elastic gang changes `data`.
    pub split: Parallelism,
    /// Queue, priority, limits.
    pub settings: GangSettings,
    /// When it was submitted. A restart keeps the first time, so that it does not queue again.
    pub submitted: Timestamp,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "camelCase")]
pub enum Change {
    /// A node joined, or what is known about it changed.
    Node {
        /// All that is known about it now.
        node: Box<Node>,
    },
    /// A node left. What jobs hold on it stays held until they end.
    NodeGone {
        /// The node.
        node: NodeName,
    },
    /// A queue was made or changed.
    Queue {
        /// All of it.
        queue: Box<QueueSpec>,
    },
    /// A queue was deleted.
    QueueGone {
        /// The queue.
        queue: QueueName,
    },
    /// A job waits for its first attempt; or its request changed while it waits.
    Submitted {
        /// The job.
        request: Box<Request>,
        /// The attempt that would start.
        attempt: Attempt,
        /// It may not start before this moment.
        not_before: Timestamp,
    },
    /// A user holds a waiting job back, or lets it go.
    Held {
        /// The job.
        job: JobId,
        /// Whether it is held.
        held: bool,
    },
    /// A job that nobody told of holds these devices: it ran before the scheduler started.
    Adopted {
        /// The job.
        request: Box<Request>,
        /// Its attempt.
        attempt: Attempt,
        /// What it holds, in rank order.
        devices: Vec<DeviceId>,
        /// When the attempt started.
        started: Timestamp,
    },
    /// These devices were kept ready beside a job that was adopted, before the scheduler started.
    /// They are kept again as their nodes are heard.
    Spared {
        /// The job.
        job: JobId,
        /// The devices, lent or not.
        devices: Vec<DeviceId>,
    },
    /// Every rank of the attempt runs.
    Running {
        /// The job.
        job: JobId,
    },
    /// What the job has done so far is safe: a restart would repeat nothing before this moment.
    Checkpointed {
        /// The job.
        job: JobId,
    },
    /// The attempt is over, its devices are free, and the job waits for the next one.
    Requeued {
        /// The job.
        job: JobId,
        /// The attempt that would start.
        attempt: Attempt,
        /// It may not start before this moment.
        not_before: Timestamp,
    },
    /// The job is over; it holds nothing and waits for nothing.
    Ended {
        /// The job.
        job: JobId,
    },
}

/// Why a change was refused. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The job is not known.
    #[error("{0} is not known")]
    UnknownJob(JobId),
    /// The queue cannot be as described.
    #[error("queue {queue}: {why}")]
    Queue {
        /// The queue.
        queue: QueueName,
        /// What is wrong, and what would help.
        why: String,
    },
    /// Devices could not be given.
    #[error(transparent)]
    Devices(#[from] crate::snapshot::ClusterError),
}
