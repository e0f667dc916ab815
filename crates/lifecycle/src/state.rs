//! Everything that is known of a job's gang, as it is stored.

use drumline_mesh::Coords;
use drumline_spec::Parallelism;
use drumline_types::{
    Attempt, DeviceId, Explanation, JobId, JobPhase, NodeName, Outcome, RankExit, RankIndex,
    RankPhase, Reason, Timestamp,
};
use serde::{Deserialize, Serialize};

/// How the ranks of an attempt find and trust each other.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Rendezvous {
    /// Secret of the attempt; never shown.
    pub secret: String,
    /// For `MASTER_ADDR`: the address of rank 0's node.
    pub master_addr: String,
    /// For `MASTER_PORT`.
    pub master_port: u16,
}

impl std::fmt::Debug for Rendezvous {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rendezvous({}:{}, secret ..)", self.master_addr, self.master_port)
    }
}

/// What a rank says when it joins its world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// host:port of its collective listener.
    pub collective_address: String,
    /// URL of its inference service; serving leaders only.
    pub inference_url: String,
    /// Names its host.
    pub host: String,
}

/// One rank of the present attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankState {
    /// Its place in the world.
    pub rank: RankIndex,
    /// Its place in the mesh.
    pub coords: Coords,
    /// The node and device that it got.
    pub device: DeviceId,
    /// Where it stands.
    pub phase: RankPhase,
    /// Its process id on its node; 0: not known.
    pub pid: u32,
    /// How it joined.
    pub join: Option<Join>,
    /// Its last finished step. Not written at each step.
    pub step: u64,
    /// Where it stands within a step, for the watchdog's account.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub position: String,
    /// When its last report came.
    #[serde(skip)]
    pub reported: Option<Timestamp>,
    /// The error that it reported before it ended.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub error: String,
    /// How it ended.
    pub exit: Option<RankExit>,
    /// When it ended, by its node's clock.
    pub ended: Option<Timestamp>,
    /// It ended after the gang was told to stop.
    #[serde(default)]
    pub after_stop: bool,
    /// Nobody saw it end: its node or its agent is gone.
    #[serde(default)]
    pub lost: bool,
}

/// A checkpoint that is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Its step.
    pub step: u64,
    /// Its folder.
    pub path: String,
}

/// The first failing rank of an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// How it ended.
    pub exit: RankExit,
    /// Where it ran.
    pub node: NodeName,
    /// The attempt.
    pub attempt: Attempt,
}

/// Why the present attempt is being taken down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// What ended it, as far as it was known when it ended.
    pub why: Explanation,
    /// A user asked for it.
    pub cancelled: bool,
    /// The scheduler asked for it: nothing failed, and no restart is counted.
    #[serde(default)]
    pub evicted: bool,
    /// When stopping was last asked for.
    pub asked: Timestamp,
    /// How often it was asked for.
    pub asks: u32,
}

impl Ending {
    pub(crate) fn asked_at(asked: Timestamp) -> Self {
        let why = Explanation::new(Reason::Moved, "");
        Self { why, cancelled: false, evicted: false, asked, asks: 1 }
    }
}

/// What is known of a job's gang.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The job.
    pub job: JobId,
    /// Where it stands.
    pub phase: JobPhase,
    /// Why it is there.
    pub why: Explanation,
    /// The newest attempt; 0 before the first launch.
    pub attempt: Attempt,
    /// When it was submitted.
    pub created: Timestamp,
    /// When the newest attempt was launched.
    pub launched: Option<Timestamp>,
    /// When every rank of the newest attempt had joined.
    pub running: Option<Timestamp>,
    /// When that happened for the first time.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub finished: Option<Timestamp>,
    /// The last sign of progress in this attempt. Not written at each step.
    #[serde(skip)]
    pub progressed: Option<Timestamp>,
    /// A user holds it back: no attempt starts until it is released.
    #[serde(default)]
    pub held: bool,
    /// No attempt starts before this moment.
    pub not_before: Timestamp,
    /// Restarts so far.
    pub restarts: u32,
    /// Restarts since the last progress.
    pub fruitless: u32,
    /// The ranks of the newest attempt, in order; empty while it waits.
    pub ranks: Vec<RankState>,
    /// How the ranks of the newest attempt divide the work, where that is not what the spec says:
    /// an elastic gang at another size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Parallelism>,
    /// How often the scheduler ended an attempt for another job's sake, or to move it.
    #[serde(default)]
    pub evictions: u32,
    /// How they meet.
    pub rendezvous: Rendezvous,
    /// Set while an attempt is being taken down.
    pub ending: Option<Ending>,
    /// The newest complete checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// The step of the newest complete checkpoint when the attempt was launched.
    pub checkpoint_at_launch: Option<u64>,
    /// The first failing rank of the last attempt that failed.
    pub first_failure: Option<Failure>,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

impl State {
    /// Returns the state of a job that was just accepted.
    #[must_use]
    pub fn submitted(job: JobId, now: Timestamp) -> Self {
        Self {
            job,
            phase: JobPhase::Pending,
            why: Explanation::new(Reason::NotYetConsidered, "accepted"),
            attempt: Attempt(0),
            created: now,
            launched: None,
            running: None,
            started: None,
            finished: None,
            progressed: None,
            held: false,
            not_before: Timestamp(0),
            restarts: 0,
            fruitless: 0,
            ranks: Vec::new(),
            split: None,
            evictions: 0,
            rendezvous: Rendezvous::default(),
            ending: None,
            checkpoint: None,
            checkpoint_at_launch: None,
            first_failure: None,
            outcome: None,
        }
    }

    /// Returns the nodes that hold ranks of the newest attempt, by name, each once.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeName> {
        let mut nodes: Vec<_> = self.ranks.iter().map(|rank| rank.device.node.clone()).collect();
        nodes.sort();
        nodes.dedup();
        nodes
    }

    /// Returns whether every rank has joined, so that the world is known.
    #[must_use]
    pub fn has_world(&self) -> bool {
        !self.ranks.is_empty() && self.ranks.iter().all(|rank| rank.join.is_some())
    }

    /// Returns whether every rank has ended or is lost.
    #[must_use]
    pub fn has_ended_ranks(&self) -> bool {
        self.ranks.iter().all(|rank| rank.phase.is_terminal())
    }

    /// Returns a rank, if there is one of that number.
    #[must_use]
    pub fn rank(&self, rank: RankIndex) -> Option<&RankState> {
        self.ranks.get(rank.0 as usize)
    }

    pub(crate) fn rank_mut(&mut self, rank: RankIndex) -> Option<&mut RankState> {
        self.ranks.get_mut(rank.0 as usize)
    }
}
