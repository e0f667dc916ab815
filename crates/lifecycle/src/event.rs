//! What can happen to a gang, and what shall be done about it.

use drumline_audit::CheckedJob;
use drumline_types::{
    Attempt, DeviceId, Explanation, NodeName, RankExit, RankIndex, RankPhase, Timestamp,
};
use serde::{Deserialize, Serialize};

use crate::state::{Checkpoint, Join, Rendezvous};

/// What an agent tells of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Where it stands.
    pub phase: RankPhase,
    /// Its process id; 0: not known.
    pub pid: u32,
    /// Exit code, signal and message; looked at when the phase is an end.
    pub exit: RankExit,
    /// When that was, by the node's clock.
    pub at: Timestamp,
}

/// What a rank reports of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Steps finished.
    pub step: u64,
    /// A checkpoint that became complete.
    pub checkpoint: Option<Checkpoint>,
    /// Why it is about to end; empty: it is not.
    pub error: String,
    /// Where it stands within a step.
    pub position: String,
}

/// What can happen to a gang.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A checked plan has a place for every rank.
    Planned {
        /// The plan.
        plan: CheckedJob,
        /// How the ranks shall meet.
        rendezvous: Rendezvous,
    },
    /// It was considered and must wait.
    Waits(Explanation),
    /// An agent told where a rank stands.
    Status {
        /// The attempt.
        attempt: Attempt,
        /// The rank.
        rank: RankIndex,
        /// What was told.
        told: Told,
    },
    /// A rank wants to join its world.
    Joined {
        /// The attempt.
        attempt: Attempt,
        /// The rank.
        rank: RankIndex,
        /// How to reach it.
        join: Join,
    },
    /// A rank reported.
    Reported {
        /// The attempt.
        attempt: Attempt,
        /// The rank.
        rank: RankIndex,
        /// The report.
        report: Report,
    },
    /// A node is given up.
    NodeLost {
        /// The node.
        node: NodeName,
        /// What was seen of it.
        message: String,
    },
    /// Nothing can run on a device any more. May be told again and again.
    DeviceFailed {
        /// The device.
        device: DeviceId,
        /// What was seen of it, and what would help.
        message: String,
    },
    /// A rank that ran is not there any more, although its node is.
    RankLost {
        /// The attempt.
        attempt: Attempt,
        /// The rank.
        rank: RankIndex,
        /// What was seen.
        message: String,
    },
    /// The scheduler asks the attempt to leave its devices.
    Evicted {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        why: Explanation,
    },
    /// A user holds it back while it waits, or lets it go.
    Held(bool),
    /// A user asked to end it.
    Cancel {
        /// Who.
        user: String,
    },
    /// The moment that [`crate::deadline`] named has come, or may have.
    Tick,
    /// The state was just read from the store by a new control plane.
    Recovered,
}

/// How much a note matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Info,
    /// Not as it should be, and dealt with.
    Warning,
    /// Somebody must do something.
    Error,
}

impl Severity {
    /// Returns the word used in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One line of a job's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// When.
    pub at: Timestamp,
    /// How much it matters.
    pub severity: Severity,
    /// A token of the list of reasons, or the name of a change.
    pub reason: String,
    /// One line.
    pub message: String,
    /// The attempt that it is about; 0: none.
    pub attempt: Attempt,
}

/// What shall be done. The new state is stored before any of it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The state has changed in a way that must survive a crash.
    Persist,
    /// Add a line to the job's history.
    Record(Note),
    /// Start every rank of the state's attempt.
    Launch,
    /// End every rank of this attempt and of older ones.
    Stop {
        /// The attempt.
        attempt: Attempt,
        /// Time between SIGTERM and SIGKILL, in milliseconds; 0: SIGKILL at once.
        grace_ms: u64,
        /// Where its ranks are.
        nodes: Vec<NodeName>,
    },
    /// Every rank's end is recorded: agents need not remember this attempt any more.
    Forget {
        /// The attempt.
        attempt: Attempt,
        /// Where its ranks were.
        nodes: Vec<NodeName>,
    },
    /// Tell these nodes the world of the state's attempt.
    SendWorld {
        /// Where.
        nodes: Vec<NodeName>,
    },
}
