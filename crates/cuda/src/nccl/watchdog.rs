//! Ends a process whose collectives make no progress, after writing down where it stood.
//!
//! A collective hangs when a peer is gone or does something else, and then no call of the library
//! can be relied on to return. The queue of every channel is known here, so the thread needs no
//! lock that a hanging call could hold.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::place::Place;

/// How often queues are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long work of a communicator that has failed may stay.
const FAILED_FOR: Duration = Duration::from_secs(5);
/// Queued work that is remembered for each channel; of more, the oldest and the newest count.
const PENDING_MAX: usize = 1024;

/// Whose process it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rank {
    /// The job's id.
    pub job: String,
    /// The attempt.
    pub attempt: u32,
    /// The rank in the world.
    pub rank: u32,
}

/// One collective that was queued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whose it is.
    pub rank: Rank,
    /// The group's name, such as `tensor`.
    pub group: String,
    /// What it does.
    pub collective: &'static str,
    /// Its number within the channel, from 1: ranks that disagree about it are out of step.
    pub sequence: u64,
    /// The f32 values that this rank gives.
    pub elements: usize,
    /// When it was queued.
    pub since: Instant,
    /// What the library says of its communicator, where that has failed.
    pub failure: Option<String>,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rank { job, attempt, rank } = &self.rank;
        write!(
            f,
            "job {job} attempt {attempt} rank {rank}: {} number {} of group {}, f32[{}], has made no \
             progress for {:.1} s",
            self.collective,
            self.sequence,
            self.group,
            self.elements,
            self.since.elapsed().as_secs_f64()
        )?;
        self.failure.as_ref().map_or(Ok(()), |words| write!(f, ": NCCL: {words}"))
    }
}

/// What one channel has queued and not seen done.
pub(crate) struct Flight {
    pub(crate) group: String,
    place: Arc<dyn Place>,
    queued: Mutex<Queued>,
    /// Asks for an error of the communicator. Never waits.
    failure: OnceLock<Box<AskFailure>>,
}

/// Returns the library's words for an error of a communicator, if it has one.
pub(crate) type AskFailure = dyn Fn() -> Option<String> + Send + Sync;

#[derive(Default)]
struct Queued {
    sequence: u64,
    pending: VecDeque<Record>,
    /// Calls of the library that have not returned.
    inside: u32,
}

impl Flight {
    pub(crate) fn new(group: String, place: Arc<dyn Place>) -> Arc<Self> {
        Arc::new(Self { group, place, queued: Mutex::default(), failure: OnceLock::new() })
    }

    /// Says whom to ask for errors, once.
    pub(crate) fn ask_failure_of(&self, ask: Box<AskFailure>) {
        let _ = self.failure.set(ask);
    }

    fn queued(&self) -> std::sync::MutexGuard<'_, Queued> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something is about to be queued.
    pub(crate) fn begin(&self, rank: &Rank, collective: &'static str, elements: usize) {
        let mut queued = self.queued();
        queued.sequence += 1;
        queued.inside += 1;
        let record = Record {
            rank: rank.clone(),
            group: self.group.clone(),
            collective,
            sequence: queued.sequence,
            elements,
            since: Instant::now(),
            failure: None,
        };
        if queued.pending.len() == PENDING_MAX {
            queued.pending.pop_back();
        }
        queued.pending.push_back(record);
    }

    /// Notes that the communicator is there: collectives count from here.
    pub(crate) fn joined(&self) {
        *self.queued() = Queued::default();
    }

    /// Notes that the call has returned: the work is queued.
    pub(crate) fn queued_now(&self) {
        let mut queued = self.queued();
        queued.inside = queued.inside.saturating_sub(1);
    }

    /// Notes that everything that was queued is done.
    pub(crate) fn done(&self) {
        self.queued().pending.clear();
    }

    /// Returns the oldest work that is not done, if it is older than `deadline`.
    fn stuck(&self, deadline: Duration) -> Option<Record> {
        let (oldest, inside) = {
            let queued = self.queued();
            (queued.pending.front().cloned()?, queued.inside > 0)
        };
        // Whoever queues need not wait for it: that it is done may be seen here first. A call that
        // has not returned may not be in the stream yet.
        if !inside && self.place.is_idle() == Ok(true) {
            let mut queued = self.queued();
            if queued.inside == 0 && queued.pending.front() == Some(&oldest) {
                queued.pending.clear();
            }
            return None;
        }
        // Whoever queued it may see the error too, and end in its own way; whoever waits for the device
        // does not.
        let failure = self.failure.get().and_then(|ask| ask());
        let limit = if failure.is_some() { deadline.min(FAILED_FOR) } else { deadline };
        (oldest.since.elapsed() >= limit).then_some(Record { failure, ..oldest })
    }
}

/// Watches all channels of a process.
#[derive(Clone)]
pub struct Watchdog {
    rank: Rank,
    flights: Arc<Mutex<Vec<Weak<Flight>>>>,
}

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchdog").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl Watchdog {
    /// Starts a thread that calls `act` once when a collective makes no progress within `deadline`,
    /// with the oldest of every channel that stands still. It ends when the last clone is dropped.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        rank: Rank,
        deadline: Duration,
        act: impl FnOnce(&[Record]) + Send + 'static,
    ) -> std::io::Result<Self> {
        let watchdog = Self { rank, flights: Arc::default() };
        let flights = Arc::downgrade(&watchdog.flights);
        std::thread::Builder::new().name("nccl-watchdog".to_owned()).spawn(move || {
            let stuck = loop {
                let Some(flights) = flights.upgrade() else { return };
                let all: Vec<Arc<Flight>> = {
                    let mut flights = flights.lock().unwrap_or_else(PoisonError::into_inner);
                    flights.retain(|flight| flight.strong_count() > 0);
                    flights.iter().filter_map(Weak::upgrade).collect()
                };
                drop(flights);
                let mut stuck: Vec<Record> =
                    all.iter().filter_map(|flight| flight.stuck(deadline)).collect();
                if !stuck.is_empty() {
                    stuck.sort_by_key(|record| record.since);
                    break stuck;
                }
                drop(all);
                std::thread::sleep(LOOK_EVERY);
            };
            act(&stuck);
        })?;
        Ok(watchdog)
    }

    /// As [`Watchdog::start`]; writes where this rank stood to standard error, which is the rank's
    /// log, and ends the process. The last line is what the agent tells of it.
    ///
    /// # Errors
    /// As [`Watchdog::start`].
    pub fn that_ends_the_process(rank: Rank, deadline: Duration) -> std::io::Result<Self> {
        Self::start(rank, deadline, |records| {
            for record in records.iter().rev() {
                eprintln!("collective watchdog: {record}");
            }
            // Not `exit`: what runs at exit waits for the driver, which waits for the collective.
            std::process::abort();
        })
    }

    /// Returns whose process it is.
    #[must_use]
    pub fn rank(&self) -> &Rank {
        &self.rank
    }

    pub(crate) fn add(&self, flight: &Arc<Flight>) {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.push(Arc::downgrade(flight));
    }
}
