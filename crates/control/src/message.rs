//! What the dispatcher takes, one at a time.

use drumline_scheduler::Saved;
use drumline_spec::{JobSpec, QueueSpec};
use drumline_types::{Explanation, JobId, NodeName, QueueName};
use drumline_wire::v1;
use tokio::sync::{mpsc, oneshot};

use crate::api::ApiError;

/// Inputs that wait for the dispatcher; senders wait beyond it.
pub(crate) const INBOX_MAX: usize = 1024;
/// Messages under way to one agent. An agent that is further behind is cut off, and told anew
/// what it should know once it says hello again.
pub(crate) const DOWN_MAX: usize = 1024;

/// Answers a caller.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// One input.
#[derive(Debug)]
pub(crate) enum Input {
    /// Store these jobs, all or none.
    Submit {
        specs: Vec<JobSpec>,
        queues: Vec<QueueSpec>,
        user: String,
        /// The key and the hash of what came with it; empty: none.
        idempotency_key: String,
        hash: u64,
        reply: Reply<Vec<JobId>>,
    },
    /// Say where these jobs would go now.
    Preview { specs: Vec<JobSpec>, queues: Vec<QueueSpec>, reply: Reply<Vec<v1::SubmittedJob>> },
    /// Delete a queue.
    DeleteQueue { queue: QueueName, reply: Reply<()> },
    /// Hold a waiting job back, or let it go.
    Hold { job: JobId, held: bool, reply: Reply<()> },
    /// Set the number of a service's replicas.
    Scale { job: JobId, replicas: u32, user: String, reply: Reply<()> },
    /// Somebody has dealt with an unhealthy device.
    ClearDevice { node: NodeName, index: u32, reply: Reply<()> },
    /// Return all that decisions depend on.
    Snapshot { reply: Reply<Box<Saved>> },
    /// Explain in full why a job waits.
    Explain { job: JobId, reply: Reply<Option<Explanation>> },
    /// Return the queues.
    Queues { reply: Reply<Vec<v1::QueueView>> },
    /// End a job.
    Cancel { job: JobId, user: String, reply: Reply<()> },
    /// An agent said hello.
    Connected { node: NodeName, hello: Box<v1::Hello>, session: Session },
    /// An agent told something.
    Up { node: NodeName, session: u64, message: Box<v1::agent_up::Kind> },
    /// An agent's stream has ended.
    Disconnected { node: NodeName, session: u64 },
}

/// The way down to one agent, for as long as its stream lasts.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    /// Tells one stream from the next.
    pub(crate) id: u64,
    pub(crate) down: mpsc::Sender<v1::AgentDown>,
}
