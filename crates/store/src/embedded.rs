//! The embedded store: one redb file, one writer thread, durable when a write returns.
//!
//! Reads run on the caller's thread against redb's snapshots (listings on tokio's blocking pool).
//! Writes go through a bounded queue to one thread, which makes all that has queued up durable with
//! one sync. Watches read the history that lies in the file, so they need no queue.

mod apply;
mod open;
#[cfg(test)]
mod power_cut;
mod tables;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use redb::{Database, ReadableDatabase};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant as Deadline, timeout_at};

use drumline_ports::store::tail::{Chunk, History, follow};
use drumline_ports::store::{
    KeyValue, Lease, LeaseId, Listing, Revision, Store, StoreError, Txn, TxnOutcome, WatchStream,
};

use tables::{COMPACTED, CURRENT, HISTORY, META, REVISION};
use worker::{Reply, Request, Work};

pub use open::EmbeddedOpenError;

/// How an [`EmbeddedStore`] behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedOptions {
    /// Longest wait for an answer to a write; afterwards its outcome is unknown. Default 5 s.
    pub deadline: Duration,
    /// Most writes queued or under way; more wait in their callers. Default 1024, at least 1.
    pub queue_max: usize,
    /// Revisions of history kept for watches without anyone compacting. Default 100,000.
    pub history_revisions: u64,
    /// Bytes of history kept, about; the older part goes first. Default 256 MiB.
    pub history_bytes: u64,
    /// Memory for redb's page cache. Default 64 MiB.
    pub cache_bytes: usize,
    /// Check every page's checksum when opening: a corrupt file is refused rather than believed.
    /// Takes about as long as reading the file. Default true.
    pub check_on_open: bool,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(5),
            queue_max: 1024,
            history_revisions: 100_000,
            history_bytes: 256 << 20,
            cache_bytes: 64 << 20,
            check_on_open: true,
        }
    }
}

/// What [`EmbeddedStore::inject`] lets go wrong with the next write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The write is applied, but its acknowledgement is lost.
    LoseAck,
    /// The write is lost before it is applied, and so is the news of that.
    LoseRequest,
}

const NO_FAULT: u8 = 0;
const LOSE_ACK: u8 = 1;
const LOSE_REQUEST: u8 = 2;

/// The longest lease: a year. Keeps the arithmetic of clocks in range.
const TTL_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// What readers and the writer thread share.
pub(crate) struct Shared {
    db: Database,
    path: PathBuf,
    /// The newest revision that is durable.
    committed: watch::Sender<Revision>,
}

/// A [`Store`] in one file. Ends its thread when dropped, after what was queued.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    queue: Sender<Request>,
    places: Arc<Semaphore>,
    deadline: Duration,
    fault: AtomicU8,
    thread: Option<JoinHandle<()>>,
}

impl EmbeddedStore {
    /// Opens the store at `path`, creating it (and its folder, with mode 0700) if it is missing.
    ///
    /// Blocks: reads the file once when it checks its integrity.
    ///
    /// # Errors
    /// [`EmbeddedOpenError`], which names the path and a remedy.
    pub fn open(path: &Path, options: &EmbeddedOptions) -> Result<Self, EmbeddedOpenError> {
        open::open(path, options)
    }

    /// Returns where the store lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Lets the next transaction fail in a way that cannot be provoked otherwise. For tests.
    pub fn inject(&self, fault: Fault) {
        let code = match fault {
            Fault::LoseAck => LOSE_ACK,
            Fault::LoseRequest => LOSE_REQUEST,
        };
        self.fault.store(code, Ordering::SeqCst);
    }

    /// Queues work and waits for its answer. Past the deadline, work that got a place in the queue
    /// has an unknown outcome.
    async fn ask<T>(&self, op: &str, work: impl FnOnce(Reply<T>) -> Work) -> Result<T, StoreError> {
        let deadline = Deadline::now() + self.deadline;
        let place = Arc::clone(&self.places).acquire_owned();
        let permit = match timeout_at(deadline, place).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(StoreError::unavailable(op, "the store is closed")),
            Err(_) => return Err(StoreError::unavailable(op, "the write queue is full")),
        };
        let (reply, answer) = oneshot::channel();
        let request = Request { work: work(reply), permit: Some(permit) };
        if self.queue.send(request).is_err() {
            return Err(StoreError::unavailable(op, "the store is closed"));
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(StoreError::unknown(op, "the writer thread ended")),
            Err(_) => {
                let cause = format!("no answer from the disk within {:?}", self.deadline);
                Err(StoreError::unknown(op, cause))
            }
        }
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        let close = Request { work: Work::Close, permit: None };
        // Fails only if the thread is gone already.
        let _ = self.queue.send(close);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by its own message.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn get(&self, key: &str) -> Result<Option<KeyValue>, redb::Error> {
        let txn = self.db.begin_read()?;
        Ok(tables::read(&txn.open_table(CURRENT)?, key)?)
    }

    fn list(&self, prefix: &str) -> Result<Listing, redb::Error> {
        let txn = self.db.begin_read()?;
        Ok(Listing {
            revision: Revision(meta(&txn, REVISION)?),
            items: tables::read_prefix(&txn.open_table(CURRENT)?, prefix)?,
        })
    }

    fn read_history(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<Result<Chunk, StoreError>, redb::Error> {
        let txn = self.db.begin_read()?;
        let newest = Revision(meta(&txn, REVISION)?);
        let compacted = Revision(meta(&txn, COMPACTED)?);
        if from <= compacted {
            return Ok(Err(StoreError::Compacted { requested: from, oldest: compacted.next() }));
        }
        let mut events = Vec::new();
        let mut bytes = 0;
        let mut last = from.0;
        for (scanned, entry) in txn.open_table(HISTORY)?.range((from.0, 0)..)?.enumerate() {
            let (place, change) = entry?;
            let (revision, _) = place.value();
            // Only at the edge of a revision: a batch never splits one.
            if revision != last && (scanned >= CHUNK_EVENTS || bytes >= CHUNK_BYTES) {
                let through = Revision(last);
                return Ok(Ok(Chunk { through, events }));
            }
            last = revision;
            let change = change.value();
            if change.0.starts_with(prefix) {
                bytes += tables::change_bytes(change.0, change.5);
                events.push(tables::event(revision, change));
            }
        }
        Ok(Ok(Chunk { through: newest, events }))
    }
}

/// Most history entries looked at for one batch of a watch.
const CHUNK_EVENTS: usize = 1024;

/// Most bytes of events in one batch of a watch, give or take a revision.
const CHUNK_BYTES: u64 = 1 << 20;

fn meta(txn: &redb::ReadTransaction, name: &str) -> Result<u64, redb::Error> {
    let found = txn.open_table(META)?.get(name)?;
    Ok(found.map_or(0, |value| value.value()))
}

impl History for Shared {
    fn read(&self, prefix: &str, from: Revision) -> Result<Chunk, StoreError> {
        let op = || format!("watch of {prefix:?}");
        self.read_history(prefix, from).map_err(|e| StoreError::unavailable(op(), e))?
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let op = || format!("get {key:?}");
        self.shared.get(key).map_err(|e| StoreError::unavailable(op(), e))
    }

    async fn range(&self, prefix: &str) -> Result<Listing, StoreError> {
        let op = format!("range {prefix:?}");
        let (shared, prefix) = (Arc::clone(&self.shared), prefix.to_owned());
        match tokio::task::spawn_blocking(move || shared.list(&prefix)).await {
            Ok(Ok(listing)) => Ok(listing),
            Ok(Err(error)) => Err(StoreError::unavailable(op, error)),
            Err(error) => Err(StoreError::unavailable(op, error)),
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let op = txn.describe();
        let fault =
            if txn.is_read_only() { NO_FAULT } else { self.fault.swap(NO_FAULT, Ordering::SeqCst) };
        if fault == LOSE_REQUEST {
            return Err(StoreError::unknown(op, "injected: request lost"));
        }
        let outcome = self.ask(&op, |reply| Work::Txn(txn, reply)).await;
        if fault == LOSE_ACK {
            return Err(StoreError::unknown(op, "injected: acknowledgement lost"));
        }
        outcome
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream, StoreError> {
        let committed = self.shared.committed.subscribe();
        let current = *committed.borrow();
        if from > current.next() {
            return Err(StoreError::FutureRevision { requested: from, current });
        }
        // Fails now rather than at the first event when history is gone.
        self.shared.read(prefix, from)?;
        Ok(follow(&self.shared, committed, prefix, from))
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        Ok(*self.shared.committed.borrow())
    }

    async fn compact(&self, through: Revision) -> Result<(), StoreError> {
        let op = format!("compact {through}");
        self.ask(&op, |reply| Work::Compact(through, reply)).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        if ttl.is_zero() || ttl > TTL_MAX {
            return Err(StoreError::Invalid {
                op: "lease grant".to_owned(),
                what: format!("time to live {ttl:?}, more than 0 and at most a year is allowed"),
            });
        }
        // Whole milliseconds are what the file keeps.
        let ttl = Duration::from_millis(u64::try_from(ttl.as_millis()).unwrap_or(1).max(1));
        self.ask("lease grant", |reply| Work::Grant(ttl, reply)).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        let op = format!("keep-alive of lease {lease}");
        let asked = Instant::now();
        let answer = self.ask(&op, |reply| Work::KeepAlive(lease, asked, reply)).await;
        // Asking again is harmless, so there is nothing unknown about a renewal.
        answer.map_err(|error| match error {
            StoreError::Unknown { op, cause } => StoreError::Unavailable { op, cause },
            other => other,
        })
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let op = format!("revoke of lease {lease}");
        self.ask(&op, |reply| Work::Revoke(lease, reply)).await
    }
}
