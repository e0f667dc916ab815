//! A watch as a reader of history: pulls what it has not seen, so it needs no queue of its own.
//!
//! Adapters that hold their own history implement [`History`] and get a [`WatchStream`] that has no
//! gap, repeats nothing, and holds at most one chunk however slow its consumer is.

use std::sync::{Arc, Weak};

use futures::stream;
use tokio::sync::watch;

use super::WatchStream;
use super::error::StoreError;
use super::model::{Event, Revision, WatchBatch};

/// Some whole revisions read from history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Everything up to here was looked at.
    pub through: Revision,
    /// What was found under the prefix, oldest first.
    pub events: Vec<Event>,
}

/// History that can be read from a revision on.
pub trait History: Send + Sync + 'static {
    /// Reads the events under `prefix` from `from` on, as many whole revisions as fit a chunk.
    ///
    /// `through` of the answer is at least `from`, unless nothing that new exists yet.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] when `from` is no longer kept.
    fn read(&self, prefix: &str, from: Revision) -> Result<Chunk, StoreError>;
}

/// Report progress after so many revisions without an event under the prefix, so that a consumer
/// of a quiet prefix resumes from a revision that is still kept.
const PROGRESS_EVERY: u64 = 256;

struct Tail<H> {
    /// Weak: a watch must not keep a store open that its owner has closed.
    history: Weak<H>,
    committed: watch::Receiver<Revision>,
    prefix: String,
    next: Revision,
    reported: Revision,
    ended: bool,
}

/// Follows `history` from `from` on; `committed` tells the newest readable revision.
///
/// The stream ends with [`StoreError::Unavailable`] when `history` or the sender of `committed` is
/// gone.
pub fn follow<H: History>(
    history: &Arc<H>,
    committed: watch::Receiver<Revision>,
    prefix: &str,
    from: Revision,
) -> WatchStream {
    let tail = Tail {
        history: Arc::downgrade(history),
        committed,
        prefix: prefix.to_owned(),
        next: from,
        reported: from,
        ended: false,
    };
    Box::pin(stream::unfold(tail, |mut tail| async move {
        if tail.ended {
            return None;
        }
        let item = tail.next_batch().await;
        tail.ended = item.is_err();
        Some((item, tail))
    }))
}

impl<H: History> Tail<H> {
    async fn next_batch(&mut self) -> Result<WatchBatch, StoreError> {
        loop {
            let newest = *self.committed.borrow_and_update();
            if newest >= self.next {
                let history = self.history.upgrade().ok_or_else(|| self.closed())?;
                let chunk = history.read(&self.prefix, self.next)?;
                if chunk.through >= self.next {
                    self.next = chunk.through.next();
                    let quiet = chunk.through.0.saturating_sub(self.reported.0);
                    if !chunk.events.is_empty() || quiet >= PROGRESS_EVERY {
                        self.reported = chunk.through;
                        return Ok(WatchBatch { through: chunk.through, events: chunk.events });
                    }
                    continue;
                }
            }
            if self.committed.changed().await.is_err() {
                return Err(self.closed());
            }
        }
    }

    fn closed(&self) -> StoreError {
        let op = format!("watch of {:?}", self.prefix);
        StoreError::unavailable(op, "the store was closed")
    }
}
