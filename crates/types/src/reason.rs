//! The one ordered list of reasons for every wait and every failure.
//!
//! The same token is shown by the API, the command line, metric labels and the dashboard. When
//! several reasons hold, the first in this order is told, so that the answer is stable.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $token:literal, $help:literal;)*) => {
        /// Why a job waits, restarts or has ended, in the order in which reasons are told.
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        pub enum Reason {
            $($(#[$doc])* #[serde(rename = $token)] $name,)*
        }

        impl Reason {
            /// Every reason, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Returns the token used in every API, table and label.
            #[must_use]
            pub fn token(self) -> &'static str {
                match self { $(Self::$name => $token,)* }
            }

            /// Returns what would help, in one sentence.
            #[must_use]
            pub fn remedy(self) -> &'static str {
                match self { $(Self::$name => $help,)* }
            }

            /// Returns the reason with this token.
            #[must_use]
            pub fn from_token(token: &str) -> Option<Self> {
                match token { $($token => Some(Self::$name),)* _ => None }
            }
        }
    };
}

reasons! {
    /// The user asked for it to be held.
    Held = "Held", "Release the job.";
    /// The queue it names does not exist.
    QueueMissing = "QueueMissing", "Create the queue, or name one that exists.";
    /// No node has devices of the wanted kind.
    NoMatchingDevice = "NoMatchingDevice", "Ask for a device kind that the fleet has, or add nodes that have it; `drumline doctor` says why a machine offers no GPU.";
    /// The whole fleet, idle, could not hold it.
    ExceedsCluster = "ExceedsCluster", "Ask for fewer ranks, or add nodes.";
    /// More than its queue may ever use.
    ExceedsQuota = "ExceedsQuota", "Ask for fewer devices, or raise the queue's quota or borrowing limit.";
    /// Enough devices exist, but their nodes are not reachable or not healthy.
    NodesNotReady = "NodesNotReady", "Bring the nodes back; `drumline nodes` shows which are not ready.";
    /// Its queue's share is used up.
    WaitingForQuota = "WaitingForQuota", "Wait for jobs of the queue to end, or raise its quota.";
    /// Enough devices are free, but not where its topology needs them.
    TopologyDoesNotFit = "TopologyDoesNotFit", "Relax the required topology, use a smaller tensor group, or wait.";
    /// Devices are busy.
    WaitingForDevices = "WaitingForDevices", "Wait for running jobs to end, or add nodes.";
    /// Devices are being freed for it.
    WaitingForPreempted = "WaitingForPreempted", "Wait until the preempted jobs have left.";
    /// It was ended for a job of higher priority.
    Preempted = "Preempted", "Wait until devices are free again, or raise its priority; it goes on from its last checkpoint.";
    /// Its queue had borrowed the devices, and their owner took them back.
    Reclaimed = "Reclaimed", "Wait until devices are idle again, or raise the queue's quota; it goes on from its last checkpoint.";
    /// It was ended to start again elsewhere, at another size, or off a node that is being emptied.
    Moved = "Moved", "Nothing to do: it goes on from its last checkpoint.";
    /// A restart waits out its delay.
    BackingOff = "BackingOff", "Wait for the delay to pass; the last failure is in the job's events.";
    /// The gang is being started.
    StartingRanks = "StartingRanks", "Wait until every rank has joined; the deadline is in the job's events.";
    /// Accepted; the scheduler has not looked at it yet.
    NotYetConsidered = "NotYetConsidered", "Wait for the next scheduling cycle.";
    /// A rank exited with an error.
    RankFailed = "RankFailed", "Read the log of the first failing rank: `drumline logs JOB --rank N`.";
    /// A rank was ended by a signal.
    RankKilled = "RankKilled", "Signal 9 is often the kernel's out-of-memory killer: see the node's memory.";
    /// A device turned bad under a rank.
    DeviceFailed = "DeviceFailed", "The gang restarts on other devices; `drumline nodes --devices` says what must be done about the bad one.";
    /// A node went silent with ranks on it.
    NodeLost = "NodeLost", "See the node's agent; the gang restarts elsewhere when it can.";
    /// No step was finished within the watchdog's time.
    Stalled = "Stalled", "See where each rank stood in the job's events.";
    /// Its ranks did not all join in time.
    RendezvousTimedOut = "RendezvousTimedOut", "See the logs of the ranks that did not join.";
    /// Every allowed restart is used up.
    RestartsExhausted = "RestartsExhausted", "Mend the cause shown by the first failing rank, then submit again.";
    /// A user cancelled it.
    CancelledByUser = "CancelledByUser", "Submit it again if that was a mistake.";
    /// Done.
    Completed = "Completed", "Nothing to do.";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.token())
    }
}

/// A reason with its evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The reason.
    pub reason: Reason,
    /// One line of evidence: what is missing, where it stopped, what would help.
    pub message: String,
}

impl Explanation {
    /// Joins a reason and its evidence.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_leads_back_to_its_reason() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_token(reason.token()), Some(*reason));
        }
        assert_eq!(Reason::from_token("Whatever"), None);
    }
}
