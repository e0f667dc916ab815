//! A store in memory that can misbehave on purpose, the same way for the same seed.
//!
//! Time is tokio's, so that leases expire in no time under `tokio::time::pause`. Nothing is durable.

mod faults;
mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::error::StoreError;
use super::model::{KeyValue, Lease, LeaseId, Listing, Revision, Txn, TxnOutcome};
use super::tail::{Chunk, History, follow};
use super::{Store, WatchStream};

pub use faults::Faults;
use faults::{Dice, Fate, disturb};
use state::State;

/// An in-memory [`Store`]. Clones share everything.
#[derive(Clone)]
pub struct FakeStore {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    dice: Mutex<Dice>,
    committed: watch::Sender<Revision>,
    /// Raised to cut every watch that is open.
    cuts: watch::Sender<u64>,
}

/// What becomes of the next write, see [`FakeStore::doom_next_write`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doom {
    /// It is applied, but the caller only learns that the outcome is unknown.
    LoseAck,
    /// It is never applied, and the caller only learns that the outcome is unknown.
    LoseRequest,
    /// The caller learns that the outcome is unknown, and it is applied so much later.
    Delay(Duration),
    /// It is surely not applied, and the caller learns just that.
    Refuse,
}

impl FakeStore {
    /// Creates an empty store that behaves.
    #[must_use]
    pub fn new() -> Self {
        Self::with_faults(0, Faults::default())
    }

    /// Creates an empty store that misbehaves at the given rates, as `seed` has it.
    #[must_use]
    pub fn with_faults(seed: u64, faults: Faults) -> Self {
        let state = State::default();
        let (committed, _) = watch::channel(state.revision());
        let (cuts, _) = watch::channel(0);
        Self {
            inner: Arc::new(Inner {
                state: Mutex::new(state),
                dice: Mutex::new(Dice::new(seed, faults)),
                committed,
                cuts,
            }),
        }
    }

    /// Changes the rates from here on; watches that are open keep theirs.
    pub fn set_faults(&self, faults: Faults) {
        self.dice().faults = faults;
    }

    /// Decides the fate of the next transaction that can write.
    pub fn doom_next_write(&self, doom: Doom) {
        self.dice().doomed = Some(doom);
    }

    /// Cuts every open watch, as a lost connection would.
    pub fn cut_watches(&self) {
        self.inner.cuts.send_modify(|n| *n += 1);
    }

    fn dice(&self) -> MutexGuard<'_, Dice> {
        self.inner.dice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for FakeStore {
    fn default() -> Self {
        Self::new()
    }
}

impl Inner {
    /// Runs `f` on the state as of now, then lets watchers see what changed.
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.expire(Instant::now());
        let result = f(&mut state);
        let newest = state.revision();
        self.committed.send_if_modified(|seen| {
            let moved = newest > *seen;
            *seen = newest;
            moved
        });
        result
    }
}

impl History for Inner {
    fn read(&self, prefix: &str, from: Revision) -> Result<Chunk, StoreError> {
        self.with(|state| state.read(prefix, from))
    }
}

/// Ends a lease when its time has come, for the sake of watchers; as long as it and the store live.
async fn expire_in_time(inner: std::sync::Weak<Inner>, lease: LeaseId) {
    loop {
        let expires = match inner.upgrade() {
            Some(inner) => inner.with(|state| state.lease_expires(lease)),
            None => return,
        };
        match expires {
            Some(at) => sleep_until(at).await,
            None => return,
        }
    }
}

#[async_trait]
impl Store for FakeStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        self.dice().refuse_read(&format!("get {key:?}"))?;
        Ok(self.inner.with(|state| state.get(key).cloned()))
    }

    async fn range(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.dice().refuse_read(&format!("range {prefix:?}"))?;
        Ok(self.inner.with(|state| state.list(prefix)))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let op = txn.describe();
        let fate = if txn.is_read_only() { Fate::default() } else { self.dice().fate() };
        match fate.doom {
            None => {}
            Some(Doom::Refuse) => return Err(StoreError::unavailable(op, "fake: refused")),
            Some(Doom::LoseRequest) => return Err(StoreError::unknown(op, "fake: request lost")),
            Some(Doom::LoseAck) => {
                // What it did is nobody's to know.
                let _ = self.inner.with(|state| state.txn(&txn));
                return Err(StoreError::unknown(op, "fake: acknowledgement lost"));
            }
            Some(Doom::Delay(by)) => {
                let inner = Arc::clone(&self.inner);
                tokio::spawn(async move {
                    sleep(by).await;
                    let _ = inner.with(|state| state.txn(&txn));
                });
                return Err(StoreError::unknown(op, "fake: request delayed"));
            }
        }
        self.inner.with(|state| {
            let outcome = state.txn(&txn)?;
            if fate.compact {
                state.compact(outcome.revision)?;
            }
            Ok(outcome)
        })
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream, StoreError> {
        let op = format!("watch of {prefix:?}");
        self.dice().refuse_read(&op)?;
        let current = self.inner.with(|state| state.revision());
        if from > current.next() {
            return Err(StoreError::FutureRevision { requested: from, current });
        }
        self.inner.read(prefix, from)?;
        let committed = self.inner.committed.subscribe();
        let honest = follow(&self.inner, committed, prefix, from);
        let dice = self.dice().fork();
        Ok(disturb(honest, dice, self.inner.cuts.subscribe(), op))
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        Ok(self.inner.with(|state| state.revision()))
    }

    async fn compact(&self, through: Revision) -> Result<(), StoreError> {
        self.inner.with(|state| state.compact(through))
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        if ttl.is_zero() {
            return Err(StoreError::Invalid {
                op: "lease grant".to_owned(),
                what: "time to live is 0, more is needed".to_owned(),
            });
        }
        let id = self.inner.with(|state| state.grant(ttl, Instant::now()));
        tokio::spawn(expire_in_time(Arc::downgrade(&self.inner), id));
        Ok(Lease { id, ttl })
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.inner.with(|state| state.keep_alive(lease, Instant::now()))
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.with(|state| state.revoke(lease))
    }
}
