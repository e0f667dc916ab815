//! Writes whose outcome is always settled: each carries an id that can be read back.
//!
//! # How
//! A [`Writer`] owns a few slot keys, `<prefix>/<name>/<n>`. Each transaction also puts a fresh id
//! into a slot, and requires that the slot is at the revision where this writer left it. When the
//! acknowledgement is lost, the writer moves the slot on *if it is still there*, and looks at it
//! otherwise. Either the slot has been moved on, and the write can no longer be applied even if it
//! is still under way somewhere; or the slot holds the id, and the write was applied at the slot's
//! revision. A plain read would not settle the first case, and any write to a slot that is not
//! bound to the slot's revision could itself come late.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout_at};

use super::Store;
use super::error::StoreError;
use super::model::{Compare, Op, Revision, Txn, TxnOutcome};

/// Why a settled write failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The store refused, or stayed away; see the error for what is known.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another process opened a writer of the same name; this one must stop. Nothing was changed.
    #[error("writer {name:?} was superseded: slot {slot:?} is at revision {found}, left at {left}")]
    Superseded {
        /// The writer's name.
        name: String,
        /// The slot key.
        slot: String,
        /// Where this writer left it.
        left: Revision,
        /// Where it is now.
        found: Revision,
    },
}

/// Makes writes whose outcome is settled before it returns. One per process and name.
pub struct Writer {
    store: Arc<dyn Store>,
    name: String,
    give_up_after: Duration,
    permits: Semaphore,
    free: Mutex<Vec<Slot>>,
}

struct Slot {
    key: String,
    /// The slot's revision as this writer left it; `None` when a write stayed unsettled.
    left: Option<Revision>,
    writes: u64,
}

/// Pause between attempts to settle a write.
const PAUSE: Duration = Duration::from_millis(100);

/// Most writes in flight at once through one writer.
pub const SLOTS_MAX: usize = 64;

impl Writer {
    /// Opens the writer `name` with `slots` writes in flight at most (1 to [`SLOTS_MAX`]), keeping
    /// its slots under `prefix`. Fences an earlier writer of the same name and prefix out.
    ///
    /// A write gives up settling after `give_up_after`, and is then [`StoreError::Unknown`].
    ///
    /// # Errors
    /// Whatever the store answers for the first write.
    pub async fn open(
        store: Arc<dyn Store>,
        prefix: &str,
        name: &str,
        slots: usize,
        give_up_after: Duration,
    ) -> Result<Self, WriteError> {
        let slots = slots.clamp(1, SLOTS_MAX);
        let deadline = Instant::now() + give_up_after;
        let mut free = Vec::with_capacity(slots);
        for index in 0..slots {
            let mut slot = Slot {
                key: format!("{}/{name}/{index}", prefix.trim_end_matches('/')),
                left: None,
                writes: 0,
            };
            claim(store.as_ref(), &mut slot, deadline).await?;
            free.push(slot);
        }
        Ok(Self {
            store,
            name: name.to_owned(),
            give_up_after,
            permits: Semaphore::new(slots),
            free: Mutex::new(free),
        })
    }

    /// Applies a transaction and settles its outcome.
    ///
    /// `else_ops` may only read. When the write had to be read back, [`TxnOutcome::results`] is
    /// empty: what the operations returned went with the lost acknowledgement.
    ///
    /// # Errors
    /// [`WriteError::Superseded`], or the store's error. [`StoreError::Unknown`] remains only when
    /// the store stayed away for the whole time given.
    pub async fn txn(&self, txn: Txn) -> Result<TxnOutcome, WriteError> {
        if txn.else_ops.iter().any(Op::writes) {
            return Err(StoreError::Invalid {
                op: txn.describe(),
                what: "else_ops of a settled write may only read".to_owned(),
            }
            .into());
        }
        let permit = self.permits.acquire().await;
        let slot = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let (Ok(_permit), Some(mut slot)) = (permit, slot) else {
            return Err(StoreError::unavailable(txn.describe(), "no free slot").into());
        };
        let deadline = Instant::now() + self.give_up_after;
        // A slot lost to a cancelled caller is claimed anew by whoever takes it next.
        let mut held = Held {
            writer: self,
            slot: Some(Slot { key: slot.key.clone(), left: None, writes: slot.writes + 1 }),
        };
        let result = self.settle(&mut slot, txn, deadline).await;
        held.slot = Some(slot);
        result
    }

    async fn settle(
        &self,
        slot: &mut Slot,
        txn: Txn,
        deadline: Instant,
    ) -> Result<TxnOutcome, WriteError> {
        let left = match slot.left {
            Some(left) => left,
            None => claim(self.store.as_ref(), slot, deadline).await?,
        };
        slot.writes += 1;
        // Unique for ever: no other write of this slot saw the same revision before it.
        let id = format!("{left}.{}", slot.writes);
        let own_reads = txn.else_ops.len();
        let mut marked = txn.clone();
        marked.compares.push(Compare::mod_revision(&slot.key, left));
        marked.then_ops.push(Op::put(&slot.key, id.clone()));
        marked.else_ops.push(Op::get(&slot.key));
        loop {
            match self.store.txn(marked.clone()).await {
                Ok(mut outcome) if outcome.succeeded => {
                    slot.left = Some(outcome.revision);
                    outcome.results.pop();
                    return Ok(outcome);
                }
                Ok(mut outcome) => {
                    let found = outcome.got(own_reads).map_or(Revision(0), |kv| kv.mod_revision);
                    if found != left {
                        slot.left = None;
                        return Err(WriteError::Superseded {
                            name: self.name.clone(),
                            slot: slot.key.clone(),
                            left,
                            found,
                        });
                    }
                    outcome.results.truncate(own_reads);
                    return Ok(outcome);
                }
                Err(error) if error.is_unknown() => {
                    slot.left = None;
                    return match self.read_back(slot, left, &id, deadline).await? {
                        Some(revision) => {
                            Ok(TxnOutcome { succeeded: true, revision, results: Vec::new() })
                        }
                        // Surely not applied: begin again from the slot as it now is.
                        None => Box::pin(self.settle(slot, txn, deadline)).await,
                    };
                }
                Err(error) if error.is_transient() && Instant::now() + PAUSE < deadline => {
                    sleep(PAUSE).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Finds out whether the write `id` was applied, and at which revision; afterwards it can no
    /// longer be.
    async fn read_back(
        &self,
        slot: &mut Slot,
        left: Revision,
        id: &str,
        deadline: Instant,
    ) -> Result<Option<Revision>, StoreError> {
        let refuted = format!("not {id}");
        let question = Txn::new()
            .when(Compare::mod_revision(&slot.key, left))
            .then(Op::put(&slot.key, refuted.clone()))
            .otherwise(Op::get(&slot.key));
        let answer = persist(self.store.as_ref(), &question, deadline).await?;
        if answer.succeeded {
            slot.left = Some(answer.revision);
            return Ok(None);
        }
        match answer.got(0) {
            Some(kv) if kv.value == id => {
                slot.left = Some(kv.mod_revision);
                Ok(Some(kv.mod_revision))
            }
            // An earlier attempt of this very question had moved it on.
            Some(kv) if kv.value == refuted => {
                slot.left = Some(kv.mod_revision);
                Ok(None)
            }
            // Whoever took the slot over also took the answer away.
            _ => Err(StoreError::unknown(
                question.describe(),
                format!("writer {:?} was superseded before it could read back", self.name),
            )),
        }
    }
}

/// Returns a slot to its writer, also when the caller's future was dropped half-way.
struct Held<'a> {
    writer: &'a Writer,
    slot: Option<Slot>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let free = self.writer.free.lock();
            free.unwrap_or_else(PoisonError::into_inner).push(slot);
        }
    }
}

/// Takes a slot over: moves it on, so that nothing sent before can be applied, including earlier
/// attempts of this function.
async fn claim(
    store: &dyn Store,
    slot: &mut Slot,
    deadline: Instant,
) -> Result<Revision, StoreError> {
    let look = Txn::new().then(Op::get(&slot.key));
    loop {
        let seen = persist(store, &look, deadline).await?;
        let take = Txn::new()
            .when(Compare::unchanged(&slot.key, seen.got(0)))
            .then(Op::put(&slot.key, "claimed"));
        let error = match store.txn(take).await {
            Ok(outcome) if outcome.succeeded => {
                slot.left = Some(outcome.revision);
                return Ok(outcome.revision);
            }
            Ok(_) => StoreError::unavailable("claim", "others keep changing the slot"),
            Err(error) if error.is_unknown() || error.is_transient() => error,
            Err(error) => return Err(error),
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(error);
        }
        sleep(PAUSE).await;
    }
}

/// Repeats a transaction that can be applied once at most until its outcome is known.
async fn persist(
    store: &dyn Store,
    txn: &Txn,
    deadline: Instant,
) -> Result<TxnOutcome, StoreError> {
    loop {
        let attempt = timeout_at(deadline, store.txn(txn.clone())).await;
        let error = match attempt {
            Ok(Ok(outcome)) => return Ok(outcome),
            Ok(Err(error)) if error.is_unknown() || error.is_transient() => error,
            Ok(Err(error)) => return Err(error),
            Err(_) => StoreError::unknown(txn.describe(), "no answer before the deadline"),
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(StoreError::unknown(txn.describe(), error));
        }
        sleep(PAUSE).await;
    }
}
