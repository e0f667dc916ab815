//! How a rank and a job ended.

use serde::{Deserialize, Serialize};

use crate::ids::RankIndex;

/// How one rank's process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankExit {
    /// The rank that ended.
    pub rank: RankIndex,
    /// Its exit code, when it exited by itself.
    pub code: Option<i32>,
    /// The signal that ended it, when one did.
    pub signal: Option<i32>,
    /// One line of evidence: the error that the rank reported, or what its agent saw.
    pub message: String,
}

impl RankExit {
    /// Returns whether the process ended with exit code 0.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.code == Some(0)
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether the job did what it was for.
    pub success: bool,
    /// One line that says how it ended.
    pub message: String,
    /// The first rank that failed in the last attempt, when one did.
    pub first_failure: Option<RankExit>,
}
