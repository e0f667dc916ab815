//! What the agent knows of its gangs: the part of each that runs here.

use std::collections::BTreeMap;

use drumline_types::RankPhase;
use drumline_wire::auth::Token;
use drumline_wire::v1;
use tokio::sync::{oneshot, watch};
use tonic::Status;

use crate::process::RankProcess;
use crate::supervise::Notice;

/// Names one rank of one attempt.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RankKey {
    /// The job's id.
    pub job: String,
    /// The attempt.
    pub attempt: u32,
    /// The rank.
    pub rank: u32,
}

/// One rank on this node.
#[derive(Debug)]
pub struct Rank {
    /// Where it stands.
    pub phase: RankPhase,
    /// Its device.
    pub device: u32,
    /// Its process id, once known.
    pub pid: u32,
    /// How it ended.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The last error it reported, or what the agent saw.
    pub message: String,
    /// Its process; dropped once it has ended.
    pub process: Option<RankProcess>,
    /// Turns true when the process has ended: ends followed logs.
    pub ended: watch::Sender<bool>,
    /// A join that waits for its world.
    pub waiting: Option<(v1::JoinWorld, oneshot::Sender<Result<v1::World, Status>>)>,
    /// Milliseconds since the epoch of the last change.
    pub at_ms: u64,
}

impl Rank {
    /// Creates a rank that is about to be started.
    #[must_use]
    pub fn launching(device: u32, at_ms: u64) -> Self {
        Self {
            phase: RankPhase::Launching,
            device,
            pid: 0,
            exit_code: None,
            signal: None,
            message: String::new(),
            process: None,
            ended: watch::Sender::new(false),
            waiting: None,
            at_ms,
        }
    }

    /// Takes a notice of the supervisor. `joins` tells whether the rank runs only once it has
    /// joined its world.
    pub fn notice(&mut self, notice: &Notice, joins: bool, at_ms: u64) {
        self.at_ms = at_ms;
        match notice {
            Notice::Started { pid } => {
                self.pid = *pid;
                self.phase = if joins { RankPhase::Started } else { RankPhase::Running };
            }
            Notice::Refused { message } => self.end(None, None, message),
            Notice::Ended { code, signal } => self.end(*code, *signal, ""),
        }
    }

    /// Records the end of the rank's process.
    pub fn end(&mut self, code: Option<i32>, signal: Option<i32>, message: &str) {
        self.phase = if code == Some(0) { RankPhase::Succeeded } else { RankPhase::Failed };
        self.exit_code = code;
        self.signal = signal;
        if !message.is_empty() {
            message.clone_into(&mut self.message);
        }
        self.process = None;
        self.waiting = None;
        self.ended.send_replace(true);
    }
}

/// The part of one attempt's gang that runs on this node.
#[derive(Debug)]
pub struct LocalGang {
    /// The attempt's secret.
    pub secret: Token,
    /// Whether its ranks join a world (native) or are any program (command).
    pub joins: bool,
    /// Its ranks here.
    pub ranks: BTreeMap<u32, Rank>,
    /// The world, once it is there.
    pub world: Option<v1::World>,
    /// It is being stopped.
    pub stopping: bool,
    /// Forget it as soon as every rank has ended.
    pub forget: bool,
}

impl LocalGang {
    /// Returns whether every rank here has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ranks.values().all(|rank| rank.phase.is_terminal())
    }
}

/// Every gang on this node, and the newest attempt seen of each job.
#[derive(Debug, Default)]
pub struct Gangs {
    gangs: BTreeMap<(String, u32), LocalGang>,
    newest: BTreeMap<String, u32>,
}

impl Gangs {
    /// Returns the newest attempt seen of `job`, 0 if none was.
    #[must_use]
    pub fn newest_attempt(&self, job: &str) -> u32 {
        self.newest.get(job).copied().unwrap_or(0)
    }

    /// Adds a gang.
    pub fn insert(&mut self, job: &str, attempt: u32, gang: LocalGang) {
        self.newest.insert(job.to_owned(), attempt.max(self.newest_attempt(job)));
        self.gangs.insert((job.to_owned(), attempt), gang);
    }

    /// Returns a gang.
    #[must_use]
    pub fn get(&self, job: &str, attempt: u32) -> Option<&LocalGang> {
        self.gangs.get(&(job.to_owned(), attempt))
    }

    /// Returns a gang, to change it.
    pub fn get_mut(&mut self, job: &str, attempt: u32) -> Option<&mut LocalGang> {
        self.gangs.get_mut(&(job.to_owned(), attempt))
    }

    /// Returns a rank, to change it.
    pub fn rank_mut(&mut self, key: &RankKey) -> Option<&mut Rank> {
        self.get_mut(&key.job, key.attempt)?.ranks.get_mut(&key.rank)
    }

    /// Iterates over all gangs.
    pub fn iter(&self) -> impl Iterator<Item = (&(String, u32), &LocalGang)> {
        self.gangs.iter()
    }

    /// Iterates over all gangs, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&(String, u32), &mut LocalGang)> {
        self.gangs.iter_mut()
    }

    /// Iterates over the gangs of `job` whose attempt is at most `attempt`.
    pub fn up_to_mut<'a>(
        &'a mut self,
        job: &'a str,
        attempt: u32,
    ) -> impl Iterator<Item = (u32, &'a mut LocalGang)> {
        self.gangs
            .iter_mut()
            .filter(move |((name, number), _)| name == job && *number <= attempt)
            .map(|((_, number), gang)| (*number, gang))
    }

    /// Removes every gang that has ended and is to be forgotten.
    pub fn forget_ended(&mut self) {
        self.gangs.retain(|_, gang| !(gang.forget && gang.has_ended()));
    }

    /// Returns the status of every rank of every gang.
    #[must_use]
    pub fn statuses(&self) -> Vec<v1::RankStatus> {
        self.gangs
            .iter()
            .flat_map(|((job, attempt), gang)| {
                gang.ranks.iter().map(|(rank, state)| status(job, *attempt, *rank, state))
            })
            .collect()
    }
}

/// Returns a rank's state as the control plane is told.
#[must_use]
pub fn status(job: &str, attempt: u32, rank: u32, state: &Rank) -> v1::RankStatus {
    v1::RankStatus {
        job: job.to_owned(),
        attempt,
        rank,
        phase: state.phase.as_str().to_owned(),
        pid: state.pid,
        exit_code: state.exit_code,
        signal: state.signal,
        message: state.message.clone(),
        at_ms: state.at_ms,
    }
}
