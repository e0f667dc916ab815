//! A scheduler's whole state as a value that can be written to a file.

use std::collections::{BTreeMap, BTreeSet};

use drumline_cluster::{Commitment, Node, Request};
use drumline_placement::EvictionCause;
use drumline_queue::History;
use drumline_spec::{Gang, QueueSpec};
use drumline_types::{Attempt, DeviceId, Explanation, JobId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::holds::Hold;
use crate::lines::By;
use crate::options::Options;
use crate::vain::{Priced, Vain};

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
        /// When it is expected to end, as corrected so far.
        #[serde(default)]
        ends: Timestamp,
        /// Why it was asked to leave, if it was.
        #[serde(default)]
        leaving: Option<Leaving>,
    },
}

/// A gang that was asked to leave and still holds its devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Why.
    pub cause: EvictionCause,
    /// Who gets the devices.
    pub beneficiary: Option<JobId>,
    /// Its next size in ranks, when that changes.
    pub resize_to: Option<u32>,
    /// When it was asked.
    pub since: Timestamp,
}

/// What is remembered of a job from one attempt to the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Past {
    /// Work that is safe, from earlier attempts, in milliseconds.
    pub done_ms: u64,
    /// When it began to wait again after its last attempt.
    pub since: Timestamp,
    /// What disruptions cost it and it has not made up for yet, in milliseconds.
    pub lost_ms: u64,
    /// It is left alone until this moment.
    pub immune: Timestamp,
    /// When it was disrupted, as far back as its budget counts.
    pub disrupted: Vec<Timestamp>,
    /// The greatest size that it may start at, in ranks, when it was shrunk or grown.
    pub size: Option<u32>,
}

/// Spares from before the scheduler started, whose nodes are still to be heard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaited {
    /// The devices.
    pub devices: Vec<DeviceId>,
    /// They are given up at this moment.
    pub until: Timestamp,
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
    /// What is remembered of it.
    #[serde(default)]
    pub past: Past,
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
    /// Devices that are kept for waiting jobs.
    #[serde(default)]
    pub holds: BTreeMap<JobId, Hold>,
    /// Those of them whose devices may not be what they were, or free later than was thought.
    #[serde(default)]
    pub doubted: BTreeSet<JobId>,
    /// Spares from before the scheduler started that are still to be kept again.
    #[serde(default)]
    pub awaited: BTreeMap<JobId, Awaited>,
    /// What the queues have used lately.
    #[serde(default)]
    pub history: Vec<History>,
    /// What is known about waiting jobs that are alike.
    #[serde(default)]
    pub classes: Vec<SavedClass>,
    /// Gangs that fit nowhere as things are.
    #[serde(default)]
    pub shapes: Vec<SavedShape>,
    /// Costly searches that found nothing and are not made again yet.
    #[serde(default)]
    pub vain: Vec<Vain>,
    /// Claims that cost others more than they win, and are not priced again yet.
    #[serde(default)]
    pub priced: Vec<Priced>,
    /// Gangs that lack spares and would find none now.
    #[serde(default)]
    pub sought: BTreeSet<JobId>,
    /// Whether the next cycle has something to decide.
    #[serde(default = "yes")]
    pub dirty: bool,
}

/// What is known about a class of waiting jobs that are alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedClass {
    /// The first of its jobs.
    pub job: JobId,
    /// What it lacked when it was tried, and whether nothing of that has been freed since.
    pub blocked: Option<(By, bool)>,
    /// What its jobs are told.
    pub why: Option<Explanation>,
    /// Whether its reason is news.
    pub telling: bool,
    /// The last job that has been told the news.
    pub told_to: Option<JobId>,
    /// The job that looked for victims or a reservation in vain, when it looks again, and whether
    /// nothing has been freed since.
    pub asked: Option<(JobId, Timestamp, bool)>,
}

/// A gang that fits nowhere as things are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedShape {
    /// The gang.
    pub gang: Gang,
    /// Why not.
    pub why: Explanation,
}

const fn yes() -> bool {
    true
}

impl Saved {
    /// The layout that this program writes.
    pub const VERSION: u32 = 1;
}
