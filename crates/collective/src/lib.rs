//! Collectives behind one trait: in-process for tests, shared memory and TCP between processes.
//!
//! A communicator belongs to one group of ranks. Every call names what it moves, blocks until its
//! part is done, and fails, rather than hangs, when a peer is gone or the deadline passes.

mod bell;
pub mod bench;
mod communicator;
pub mod conformance;
mod exchange;
mod frame;
mod group;
mod handshake;
pub mod host;
mod lane;
pub mod local;
mod mailbox;
mod peer;
mod pending;
mod plan;
mod reader;
mod reduce;
mod region;
mod ring;

use std::ops::Range;
use std::time::Duration;

pub use pending::{Pending, STARTED_MAX};

/// What an all-reduce or reduce-scatter computes from the ranks' values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// Sum, in the order of ranks, so that every run adds the same way.
    Sum,
    /// Greatest value.
    Max,
}

/// Why a collective failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A peer closed its connection or died.
    #[error("rank {peer} of the group is gone during {op}")]
    PeerGone {
        /// The peer's rank in the group.
        peer: usize,
        /// The collective.
        op: &'static str,
    },
    /// No progress within the deadline.
    #[error("{op} made no progress for {waited_ms} ms; rank {peer} of the group is silent")]
    TimedOut {
        /// The collective.
        op: &'static str,
        /// The peer that was waited for.
        peer: usize,
        /// How long, in milliseconds.
        waited_ms: u64,
    },
    /// Ranks disagree about what to do: a bug, or mixed versions.
    #[error("{op}: expected {expected}, got {got}")]
    Mismatch {
        /// The collective.
        op: &'static str,
        /// What this rank expected.
        expected: String,
        /// What its peer sent.
        got: String,
    },
    /// The operating system refused.
    #[error("{op}: {message}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// The system's words.
        message: String,
    },
    /// The communicator was aborted, by this rank or after an earlier error.
    #[error("the communicator is aborted")]
    Aborted,
}

/// A group of ranks that act together, seen from one of them.
///
/// All ranks of the group make the same calls in the same order. Buffers are `f32` in host memory.
/// Reductions add in rank order: same inputs, same bits, on every rank and in every run.
pub trait Collective: Send + Sync {
    /// Returns this rank's place in the group.
    fn rank(&self) -> usize;

    /// Returns the number of ranks in the group.
    fn size(&self) -> usize;

    /// Replaces `data` on every rank by the reduction over all ranks.
    ///
    /// # Errors
    /// [`CollectiveError`] when a peer is gone, silent or out of step.
    fn all_reduce(&self, data: &mut [f32], op: ReduceOp) -> Result<(), CollectiveError>;

    /// Starts [`Collective::all_reduce`] of `elements` values and returns at once: the reduction
    /// goes on whenever this rank looks at it, and its peers meanwhile take and bring what they
    /// can. The same bits as the call that waits.
    ///
    /// At most [`STARTED_MAX`] may be under way. They end in the order in which they were started;
    /// until then other collectives of this group are refused, messages are not.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`], and [`CollectiveError::Mismatch`] when too many are under
    /// way.
    fn start_all_reduce(
        &self,
        elements: usize,
        op: ReduceOp,
    ) -> Result<Box<dyn Pending + '_>, CollectiveError>;

    /// Gathers `send` of every rank, in rank order, into `recv`, of `size() * send.len()`.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn all_gather(&self, send: &[f32], recv: &mut [f32]) -> Result<(), CollectiveError>;

    /// Sums `send`, of `size() * recv.len()`, over all ranks and leaves this rank's part in
    /// `recv`.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn reduce_scatter(&self, send: &[f32], recv: &mut [f32]) -> Result<(), CollectiveError>;

    /// Starts a sum of which every rank gets only its own part, as
    /// [`Collective::start_all_reduce`] starts one of which all get the whole: the same sums in the
    /// same order. `parts` holds one range of the values for each rank: the first begins at 0, each
    /// where the one before ends. Once it is complete the own part holds sums, and what the rest
    /// holds means nothing.
    ///
    /// # Errors
    /// As [`Collective::start_all_reduce`]; [`CollectiveError::Mismatch`] for other `parts`.
    fn start_reduce_scatter(
        &self,
        parts: &[Range<usize>],
    ) -> Result<Box<dyn Pending + '_>, CollectiveError> {
        let elements = check_parts("reduce_scatter", self.size(), parts)?;
        self.start_all_reduce(elements, ReduceOp::Sum)
    }

    /// Sums `data` over all ranks and leaves each rank its own of `parts`, which are as
    /// [`Collective::start_reduce_scatter`] has them.
    ///
    /// # Errors
    /// As [`Collective::start_reduce_scatter`].
    fn reduce_scatter_parts(
        &self,
        data: &mut [f32],
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        let elements = check_parts("reduce_scatter", self.size(), parts)?;
        check_length("reduce_scatter", elements, data.len())?;
        self.start_reduce_scatter(parts)?.wait(data)
    }

    /// Fills `data` with each rank's own of `parts`, which are as
    /// [`Collective::start_reduce_scatter`] has them.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`]; [`CollectiveError::Mismatch`] for other `parts`.
    fn all_gather_parts(
        &self,
        data: &mut [f32],
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        let elements = check_parts("all_gather", self.size(), parts)?;
        check_length("all_gather", elements, data.len())?;
        for (root, part) in parts.iter().enumerate() {
            self.broadcast(&mut data[part.clone()], root)?;
        }
        Ok(())
    }

    /// Copies `data` of `root` to every rank.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn broadcast(&self, data: &mut [f32], root: usize) -> Result<(), CollectiveError>;

    /// Copies `root`'s bytes to every rank; others pass any vector and get it replaced. For
    /// control messages (which request to decode next), at most [`MESSAGE_MAX`] bytes.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CollectiveError>;

    /// Sends `data` to rank `to`. Returns once the data may be overwritten; does not wait for the
    /// receiver as long as no more than a few messages are under way, so that 1F1B's neighbours
    /// that send to one another do not deadlock.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn send(&self, data: &[f32], to: usize) -> Result<(), CollectiveError>;

    /// Receives exactly `data.len()` values from rank `from`, in the order sent.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn recv(&self, data: &mut [f32], from: usize) -> Result<(), CollectiveError>;

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// Makes every present and future call of this communicator fail, here and, as soon as they
    /// notice, on the peers.
    fn abort(&self);
}

/// The longest control message of [`Collective::broadcast_bytes`], in bytes.
pub const MESSAGE_MAX: usize = 64 << 20;

/// Longest time without progress before a collective fails, unless set otherwise.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(60);

/// Checks a caller's buffer before anything is sent.
fn check_length(op: &'static str, expected: usize, got: usize) -> Result<(), CollectiveError> {
    if expected == got {
        return Ok(());
    }
    Err(CollectiveError::Mismatch {
        op,
        expected: format!("{expected} values"),
        got: format!("{got} values"),
    })
}

/// Cuts `elements` values into one part for each of `size` ranks, in order, each a multiple of
/// `align` but for the last ones.
///
/// # Panics
/// When `size` or `align` is 0.
#[must_use]
pub fn parts(elements: usize, size: usize, align: usize) -> Vec<Range<usize>> {
    let each = elements.div_ceil(size).next_multiple_of(align);
    (0..size).map(|rank| (rank * each).min(elements)..((rank + 1) * each).min(elements)).collect()
}

/// Checks a caller's parts, one for each rank; returns the values that they cover.
fn check_parts(
    op: &'static str,
    size: usize,
    parts: &[Range<usize>],
) -> Result<usize, CollectiveError> {
    let mut end = 0;
    let follow = parts.iter().all(|part| {
        let fits = part.start == end && part.end >= end;
        end = part.end;
        fits
    });
    if parts.len() == size && follow {
        return Ok(end);
    }
    Err(CollectiveError::Mismatch {
        op,
        expected: format!("{size} parts, each where the one before ends"),
        got: format!("{parts:?}"),
    })
}

/// Checks a control message before anything is sent.
fn check_message(bytes: usize) -> Result<(), CollectiveError> {
    if bytes <= MESSAGE_MAX {
        return Ok(());
    }
    Err(CollectiveError::Mismatch {
        op: "broadcast_bytes",
        expected: format!("at most {MESSAGE_MAX} bytes"),
        got: format!("{bytes} bytes"),
    })
}
