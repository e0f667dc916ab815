//! The phases of a job and of a rank.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a job stands. Training and command jobs end; a service runs until it is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobPhase {
    /// Accepted and stored; waits for devices. Its reason says for what.
    Pending,
    /// A plan is checked and its ranks are being started.
    Starting,
    /// Every rank has joined its world.
    Running,
    /// The attempt ended and the gang is being taken down before the next attempt.
    Restarting,
    /// Cancelled by a user; ranks are being taken down.
    Cancelling,
    /// Every rank finished and reported success.
    Succeeded,
    /// Ended without success, and will not be tried again.
    Failed,
    /// Ended because a user asked.
    Cancelled,
}

impl JobPhase {
    /// Returns whether the job has ended for good.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Returns whether the job may hold devices.
    #[must_use]
    pub fn holds_devices(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Restarting | Self::Cancelling)
    }

    /// Returns the word used in every API, table and label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Restarting => "restarting",
            Self::Cancelling => "cancelling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for JobPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Where one rank of the present attempt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RankPhase {
    /// Sent to its agent; its process is not known to run yet.
    Launching,
    /// Its process runs and has not joined the world yet.
    Started,
    /// It has joined the world.
    Running,
    /// Its process ended with exit code 0.
    Succeeded,
    /// Its process ended otherwise, or was lost with its node.
    Failed,
}

impl RankPhase {
    /// Returns the word used in every API, table and label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Launching => "launching",
            Self::Started => "started",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }

    /// Returns whether the rank's process has ended.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

impl fmt::Display for RankPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
