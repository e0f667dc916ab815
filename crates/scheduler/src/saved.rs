//! A scheduler's whole state as a value that can be written to a file.

use std::collections::BTreeMap;

use drumline_cluster::{Commitment, Node, Request};
use drumline_spec::QueueSpec;
use drumline_types::{Attempt, Explanation, JobId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::options::Options;

/// Where a job stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stands", rename_all = "camelCase")]
pub enum Stands {
    /// It waits.
    Waiting {
        /// It may not start before this moment.
        not_before: Timestamp,
        /// What it was told last.
        told: Option<Explanation>,
    },
    /// It holds devices.
    Placed {
        /// When its attempt started.
        started: Timestamp,
        /// Whether every rank runs.
        running: bool,
        /// Its work is safe up to this moment.
        safe: Timestamp,
    },
}

/// One job of a saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedJob {
    /// What it asks for.
    pub request: Request,
    /// Its present attempt, or the next when it waits.
    pub attempt: Attempt,
    /// Whether a user holds it back.
    pub held: bool,
    /// Where it stands.
    pub stands: Stands,
}

/// All that decisions depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The layout of this file; readers refuse one that they do not know.
    pub version: u32,
    /// The moment of the last cycle.
    pub now: Timestamp,
    /// How it decides.
    pub options: Options,
    /// The fleet.
    pub nodes: Vec<Node>,
    /// Who holds what.
    pub commitments: Vec<Commitment>,
    /// The queues.
    pub queues: Vec<QueueSpec>,
    /// The jobs.
    pub jobs: BTreeMap<JobId, SavedJob>,
}

impl Saved {
    /// The layout that this program writes.
    pub const VERSION: u32 = 1;
}
