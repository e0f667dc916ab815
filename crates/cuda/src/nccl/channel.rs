//! One communicator and the stream on which its work is queued.
#![allow(unsafe_code, reason = "calls of a C library that reads and writes device memory")]

use std::ffi::{CStr, c_int};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use drumline_collective::ReduceOp;

use super::library::{Config, IN_PROGRESS, Nccl, RawComm, SUCCESS, UniqueId};
use super::place::Place;
use super::watchdog::{AskFailure, Flight, Watchdog};
use crate::memory::Kind;

/// Returns the library's number for a kind of values: `ncclFloat32`, `ncclBfloat16`.
fn type_of(kind: Kind) -> c_int {
    match kind {
        Kind::Wide => 7,
        Kind::Narrow => 9,
    }
}
/// Longest pause between two looks at a stream.
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// Why something failed between GPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// The library refused, or told an error of work that was queued before.
    #[error("{what}: NCCL: {words}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The library's words.
        words: String,
    },
    /// The driver refused.
    #[error("{what}: {words}")]
    Device {
        /// What was tried.
        what: &'static str,
        /// The driver's words.
        words: String,
    },
    /// No progress within the deadline.
    #[error("{what} of group {group} made no progress for {waited_ms} ms")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// The group.
        group: String,
        /// How long, in milliseconds.
        waited_ms: u64,
    },
    /// It failed before.
    #[error("the communicator of group {group} has failed before")]
    Broken {
        /// The group.
        group: String,
    },
}

/// What ranks do together. `elements` of a call is what one rank gives, but for
/// [`Exchange::ReduceScatter`], where it is what one rank gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// Everybody gets the reduction.
    AllReduce(ReduceOp),
    /// Everybody gets everybody's, in rank order.
    AllGather,
    /// Everybody gets its part of the sum.
    ReduceScatter,
    /// Everybody gets the root's.
    Broadcast {
        /// The root.
        root: usize,
    },
    /// One rank's go to another.
    Send {
        /// The other.
        to: usize,
    },
    /// They come from another.
    Recv {
        /// The other.
        from: usize,
    },
}

impl Exchange {
    /// Returns its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce(_) => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast { .. } => "broadcast",
            Self::Send { .. } => "send",
            Self::Recv { .. } => "recv",
        }
    }
}

/// The library's communicator. It may be used from any thread, one at a time.
struct Comm(RawComm);

// SAFETY: `nccl.h` allows calls from any thread; the lock around it keeps them apart.
unsafe impl Send for Comm {}

/// One communicator and its stream.
pub struct Channel {
    nccl: Arc<Nccl>,
    comm: Arc<Mutex<Comm>>,
    place: Arc<dyn Place>,
    flight: Arc<Flight>,
    watchdog: Watchdog,
    deadline: Duration,
    broken: AtomicBool,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Channel of group {}", self.flight.group)
    }
}

impl Channel {
    /// Joins the communicator `id` as rank `rank` of `size`, which ends when all have joined.
    ///
    /// # Errors
    /// [`NcclError::TimedOut`] when that takes longer than `deadline`. Its thread is left behind
    /// then: nothing can end a call into the library.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is needed, and they have nothing in common"
    )]
    pub fn open(
        nccl: &Arc<Nccl>,
        place: Arc<dyn Place>,
        id: UniqueId,
        rank: usize,
        size: usize,
        group: &str,
        deadline: Duration,
        watchdog: &Watchdog,
    ) -> Result<Self, NcclError> {
        const WHAT: &str = "joining a communicator";
        // Joining can hang too, and is what the watchdog tells of then.
        let flight = Flight::new(group.to_owned(), Arc::clone(&place));
        watchdog.add(&flight);
        flight.begin(watchdog.rank(), "init", 0);
        let (opened, opening) = mpsc::sync_channel(1);
        let (theirs, there) = (Arc::clone(nccl), Arc::clone(&place));
        let given_up = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&given_up);
        let work = move || {
            let joined = there
                .bind()
                .map_err(|words| NcclError::Device { what: WHAT, words })
                .and_then(|()| join(&theirs, id, rank, size, &stop));
            let _ = opened.send(joined);
        };
        let spawned = std::thread::Builder::new().name("nccl-init".to_owned()).spawn(work);
        if let Err(error) = spawned {
            return Err(NcclError::Device { what: WHAT, words: error.to_string() });
        }
        let comm = opening.recv_timeout(deadline).map_err(|_| {
            given_up.store(true, Ordering::Release);
            let waited_ms = deadline.as_millis() as u64;
            NcclError::TimedOut { what: WHAT, group: group.to_owned(), waited_ms }
        })??;
        flight.joined();
        let comm = Arc::new(Mutex::new(comm));
        flight.ask_failure_of(ask_failure(nccl, &comm));
        Ok(Self {
            nccl: Arc::clone(nccl),
            comm,
            place,
            flight,
            watchdog: watchdog.clone(),
            deadline,
            broken: AtomicBool::new(false),
        })
    }

    /// Returns where its buffers are.
    #[must_use]
    pub fn place(&self) -> &Arc<dyn Place> {
        &self.place
    }

    /// Whether it has failed.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Takes it out of use: whatever is queued may never end.
    pub fn break_off(&self) {
        self.broken.store(true, Ordering::Release);
    }

    fn fail(&self, error: NcclError) -> NcclError {
        self.break_off();
        error
    }

    fn check(&self) -> Result<(), NcclError> {
        if self.is_broken() {
            return Err(NcclError::Broken { group: self.flight.group.clone() });
        }
        Ok(())
    }

    /// Queues one exchange of f32 values and returns at once. It begins after what the device has
    /// been given to compute before.
    ///
    /// # Safety
    /// `from` and `to` are device addresses with room for what the exchange reads and writes, and
    /// stay so until a later [`Channel::wait`] has succeeded. Where an exchange reads or writes
    /// nothing, the address is not looked at.
    ///
    /// # Errors
    /// [`NcclError`]; the channel is of no use then.
    pub unsafe fn queue(
        &self,
        what: Exchange,
        from: u64,
        to: u64,
        elements: usize,
    ) -> Result<(), NcclError> {
        // SAFETY: the caller's promise.
        unsafe { self.queue_together(&[(what, from, to, elements)]) }
    }

    /// Queues several exchanges that go on together, such as a send and a receive between two ranks
    /// that would otherwise wait for one another.
    ///
    /// # Safety
    /// As [`Channel::queue`], for each.
    ///
    /// # Errors
    /// As [`Channel::queue`].
    pub unsafe fn queue_together(
        &self,
        all: &[(Exchange, u64, u64, usize)],
    ) -> Result<(), NcclError> {
        // SAFETY: the caller's promise.
        unsafe { self.queue_kind(Kind::Wide, all) }
    }

    /// As [`Channel::queue_together`], of values that are kept so.
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn queue_kind(
        &self,
        kind: Kind,
        all: &[(Exchange, u64, u64, usize)],
    ) -> Result<(), NcclError> {
        self.check()?;
        let Some((first, ..)) = all.first() else { return Ok(()) };
        let name = first.name();
        let device = |words| self.fail(NcclError::Device { what: name, words });
        self.place.bind().map_err(device)?;
        self.place.after_compute().map_err(device)?;
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let elements = all.iter().map(|(.., elements)| *elements).sum();
        self.flight.begin(self.watchdog.rank(), name, elements);
        let f = &self.nccl.functions;
        let grouped = all.len() > 1;
        let mut answer = SUCCESS;
        if grouped {
            // SAFETY: no arguments.
            answer = unsafe { (f.group_start)() };
        }
        for (what, from, to, elements) in all {
            if answer == SUCCESS || answer == IN_PROGRESS {
                // SAFETY: the communicator is open, and the caller's promise.
                answer = unsafe { self.call(&comm, kind, *what, *from, *to, *elements) };
            }
        }
        if grouped {
            // SAFETY: no arguments; a group that was begun is always ended.
            let ended = unsafe { (f.group_end)() };
            answer = if answer == SUCCESS || answer == IN_PROGRESS { ended } else { answer };
        }
        // A communicator that does not block may still be about to queue it.
        let queued = self.settle(&comm, name, answer);
        self.flight.queued_now();
        queued.map_err(|error| self.fail(error))
    }

    /// Makes one call of the library.
    ///
    /// # Safety
    /// As [`Channel::queue`].
    unsafe fn call(
        &self,
        comm: &Comm,
        kind: Kind,
        what: Exchange,
        from: u64,
        to: u64,
        elements: usize,
    ) -> c_int {
        let (f, kind) = (&self.nccl.functions, type_of(kind));
        let (read, write) = (from as *const _, to as *mut _);
        let (comm, stream) = (comm.0, self.place.stream());
        let number = |rank: usize| rank as c_int;
        // SAFETY: the communicator and the stream are open, and the caller's promise.
        unsafe {
            match what {
                Exchange::AllReduce(op) => {
                    let op = match op {
                        ReduceOp::Sum => 0,
                        ReduceOp::Max => 2,
                    };
                    (f.all_reduce)(read, write, elements, kind, op, comm, stream)
                }
                Exchange::AllGather => (f.all_gather)(read, write, elements, kind, comm, stream),
                Exchange::ReduceScatter => {
                    (f.reduce_scatter)(read, write, elements, kind, 0, comm, stream)
                }
                Exchange::Broadcast { root } => {
                    (f.broadcast)(read, write, elements, kind, number(root), comm, stream)
                }
                Exchange::Send { to } => (f.send)(read, elements, kind, number(to), comm, stream),
                Exchange::Recv { from } => {
                    (f.recv)(write, elements, kind, number(from), comm, stream)
                }
            }
        }
    }

    /// Waits until a call that does not block has done its part, and looks for errors of earlier
    /// ones.
    fn settle(&self, comm: &Comm, what: &'static str, answer: c_int) -> Result<(), NcclError> {
        let begin = Instant::now();
        let mut state = answer;
        let mut pause = Duration::from_micros(1);
        while state == IN_PROGRESS {
            if begin.elapsed() >= self.deadline {
                return Err(self.timed_out(what, begin));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
            state = async_error(&self.nccl, comm);
        }
        if state == SUCCESS {
            return Ok(());
        }
        Err(refused(&self.nccl, comm, what, state))
    }

    fn timed_out(&self, what: &'static str, since: Instant) -> NcclError {
        let waited_ms = since.elapsed().as_millis() as u64;
        NcclError::TimedOut { what, group: self.flight.group.clone(), waited_ms }
    }

    /// Returns whether everything that was queued is done.
    ///
    /// # Errors
    /// [`NcclError`] of anything that was queued; the channel is of no use then.
    pub fn poll(&self, what: &'static str) -> Result<bool, NcclError> {
        self.check()?;
        let state = {
            let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
            let state = async_error(&self.nccl, &comm);
            if state != SUCCESS && state != IN_PROGRESS {
                return Err(self.fail(refused(&self.nccl, &comm, what, state)));
            }
            state
        };
        let idle = self.place.is_idle();
        let idle = idle.map_err(|words| self.fail(NcclError::Device { what, words }))?;
        let done = idle && state == SUCCESS;
        if done {
            self.flight.done();
        }
        Ok(done)
    }

    /// Returns once everything that was queued is done.
    ///
    /// # Errors
    /// As [`Channel::poll`]; [`NcclError::TimedOut`] when that takes longer than the deadline.
    pub fn wait(&self, what: &'static str) -> Result<(), NcclError> {
        let begin = Instant::now();
        let mut pause = Duration::from_micros(1);
        while !self.poll(what)? {
            if begin.elapsed() >= self.deadline {
                return Err(self.fail(self.timed_out(what, begin)));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Ok(())
    }

    /// Makes what the device computes from now on wait for what is queued, without waiting here.
    ///
    /// # Errors
    /// As [`Channel::poll`].
    pub fn before_compute(&self, what: &'static str) -> Result<(), NcclError> {
        self.check()?;
        let words = self.place.before_compute();
        words.map_err(|words| self.fail(NcclError::Device { what, words }))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // One that has failed, or that still works, is left behind: ending it can hang.
        if !self.is_broken() && self.place.is_idle() == Ok(true) {
            let mut comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: it is open, and nobody uses it again: the watchdog sees that it is null.
            let _ = unsafe { (self.nccl.functions.destroy)(comm.0) };
            comm.0 = std::ptr::null_mut();
        }
    }
}

/// Joins a communicator; returns when all have, or when `stop` turns true.
fn join(
    nccl: &Nccl,
    id: UniqueId,
    rank: usize,
    size: usize,
    stop: &AtomicBool,
) -> Result<Comm, NcclError> {
    const WHAT: &str = "joining a communicator";
    let mut config = Config::non_blocking();
    let mut comm = Comm(std::ptr::null_mut());
    let (size, rank) = (size as c_int, rank as c_int);
    // SAFETY: places for the results are valid, and the configuration has the form of its version.
    let mut state =
        unsafe { (nccl.functions.init)(&raw mut comm.0, size, id, rank, &raw mut config) };
    while state == IN_PROGRESS && !stop.load(Ordering::Acquire) {
        std::thread::sleep(PAUSE_MAX);
        state = async_error(nccl, &comm);
    }
    if state == SUCCESS { Ok(comm) } else { Err(refused(nccl, &comm, WHAT, state)) }
}

/// Makes the question for an error of a communicator. It does not wait for one that is in use.
fn ask_failure(nccl: &Arc<Nccl>, comm: &Arc<Mutex<Comm>>) -> Box<AskFailure> {
    let (nccl, comm) = (Arc::clone(nccl), Arc::downgrade(comm));
    Box::new(move || {
        let comm = comm.upgrade()?;
        let comm = comm.try_lock().ok()?;
        if comm.0.is_null() {
            return None;
        }
        let state = async_error(&nccl, &comm);
        (state != SUCCESS && state != IN_PROGRESS).then(|| nccl.words(state))
    })
}

fn async_error(nccl: &Nccl, comm: &Comm) -> c_int {
    let mut state = SUCCESS;
    // SAFETY: the communicator exists, and the place for the result is valid.
    let answer = unsafe { (nccl.functions.async_error)(comm.0, &raw mut state) };
    if answer == SUCCESS { state } else { answer }
}

fn refused(nccl: &Nccl, comm: &Comm, what: &'static str, code: c_int) -> NcclError {
    let mut words = nccl.words(code);
    if !comm.0.is_null() {
        // SAFETY: the communicator exists; the text is its own, and lives until its next error.
        let more = unsafe { (nccl.functions.last_error)(comm.0) };
        if !more.is_null() {
            // SAFETY: not null, and ends with a zero.
            let more = unsafe { CStr::from_ptr(more) }.to_string_lossy();
            if !more.trim().is_empty() {
                words = format!("{words} ({})", more.trim());
            }
        }
    }
    NcclError::Refused { what, words }
}
