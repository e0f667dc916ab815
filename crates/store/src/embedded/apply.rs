//! Applies requests to the tables within one write transaction. Decides nothing about time.

use redb::{ReadableTable, StorageError, Table, WriteTransaction};

use drumline_ports::store::{
    KeyValue, LeaseId, Op, OpResult, Revision, StoreError, Txn, TxnOutcome,
};

use super::tables::{
    self, COMPACTED, CURRENT, Change, HISTORY, HISTORY_BYTES, LEASE_KEYS, LEASES, META, NEXT_LEASE,
    Place, REVISION, Record,
};

/// The counters of the store, written with every batch that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) revision: u64,
    pub(super) compacted: u64,
    pub(super) history_bytes: u64,
    pub(super) next_lease: u64,
}

impl Counters {
    /// Those of an empty store, the same as etcd's.
    pub(super) const EMPTY: Self =
        Self { revision: 1, compacted: 0, history_bytes: 0, next_lease: 1 };
}

/// The bound on history that is kept without anyone compacting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HistoryBound {
    pub(super) revisions: u64,
    pub(super) bytes: u64,
}

/// Most history entries that one batch removes on its own account, so that no batch stalls.
const TRIM_STEP: usize = 2048;

/// The tables of one open write transaction.
pub(super) struct Batch<'txn> {
    current: Table<'txn, &'static str, Record>,
    history: Table<'txn, Place, Change>,
    leases: Table<'txn, u64, u64>,
    lease_keys: Table<'txn, (u64, &'static str), ()>,
    pub(super) counters: Counters,
    /// Whether anything has to be committed.
    pub(super) changed: bool,
}

impl<'txn> Batch<'txn> {
    pub(super) fn open(
        txn: &'txn WriteTransaction,
        counters: Counters,
    ) -> Result<Self, redb::TableError> {
        Ok(Self {
            current: txn.open_table(CURRENT)?,
            history: txn.open_table(HISTORY)?,
            leases: txn.open_table(LEASES)?,
            lease_keys: txn.open_table(LEASE_KEYS)?,
            counters,
            changed: false,
        })
    }

    /// Writes the counters; the last thing before the commit.
    pub(super) fn finish(self, txn: &WriteTransaction) -> Result<Counters, redb::Error> {
        let counters = self.counters;
        let mut meta = txn.open_table(META)?;
        meta.insert(REVISION, counters.revision)?;
        meta.insert(COMPACTED, counters.compacted)?;
        meta.insert(HISTORY_BYTES, counters.history_bytes)?;
        meta.insert(NEXT_LEASE, counters.next_lease)?;
        Ok(counters)
    }

    /// Applies a checked transaction. An inner `Err` has changed nothing.
    pub(super) fn txn(
        &mut self,
        txn: &Txn,
    ) -> Result<Result<TxnOutcome, StoreError>, StorageError> {
        let mut succeeded = true;
        for compare in &txn.compares {
            let found = tables::read(&self.current, compare.key())?;
            succeeded = succeeded && compare.holds(found.as_ref());
        }
        let branch = if succeeded { &txn.then_ops } else { &txn.else_ops };
        for op in branch {
            if let Op::Put { lease: Some(lease), .. } = op
                && self.leases.get(lease.0)?.is_none()
            {
                return Ok(Err(StoreError::LeaseNotFound { lease: *lease }));
            }
        }
        let mut change = Revising::after(self.counters.revision);
        let mut results = Vec::with_capacity(branch.len());
        for op in branch {
            results.push(match op {
                Op::Put { key, value, lease } => {
                    self.put(&mut change, key, value, *lease)?;
                    OpResult::Put
                }
                Op::Delete { key } => OpResult::Deleted(u64::from(self.delete(&mut change, key)?)),
                Op::DeletePrefix { prefix } => {
                    let doomed = tables::read_prefix(&self.current, prefix)?;
                    for kv in &doomed {
                        self.delete(&mut change, &kv.key)?;
                    }
                    OpResult::Deleted(doomed.len() as u64)
                }
                Op::Get { key } => OpResult::Got(tables::read(&self.current, key)?),
            });
        }
        self.adopt(&change);
        Ok(Ok(TxnOutcome { succeeded, revision: Revision(self.counters.revision), results }))
    }

    pub(super) fn grant(&mut self, ttl_ms: u64) -> Result<LeaseId, StorageError> {
        let id = self.counters.next_lease;
        self.counters.next_lease += 1;
        self.leases.insert(id, ttl_ms)?;
        self.changed = true;
        Ok(LeaseId(id))
    }

    /// Ends a lease; whether it existed.
    pub(super) fn revoke(&mut self, lease: LeaseId) -> Result<bool, StorageError> {
        if self.leases.remove(lease.0)?.is_none() {
            return Ok(false);
        }
        self.changed = true;
        let mut keys = Vec::new();
        for entry in self.lease_keys.range((lease.0, "")..)? {
            let (id_and_key, _) = entry?;
            let (id, key) = id_and_key.value();
            if id != lease.0 {
                break;
            }
            keys.push(key.to_owned());
        }
        let mut change = Revising::after(self.counters.revision);
        for key in &keys {
            self.delete(&mut change, key)?;
        }
        self.adopt(&change);
        Ok(true)
    }

    /// Forgets history through a revision.
    pub(super) fn compact(
        &mut self,
        through: Revision,
    ) -> Result<Result<(), StoreError>, StorageError> {
        if through.0 > self.counters.revision {
            return Ok(Err(StoreError::FutureRevision {
                requested: through,
                current: Revision(self.counters.revision),
            }));
        }
        if through.0 > self.counters.compacted {
            self.counters.compacted = through.0;
            self.changed = true;
            self.forget(TRIM_STEP)?;
        }
        Ok(Ok(()))
    }

    /// Keeps history within its bound, a step at a time.
    pub(super) fn trim(&mut self, bound: HistoryBound) -> Result<(), StorageError> {
        let by_count = self.counters.revision.saturating_sub(bound.revisions);
        self.counters.compacted = self.counters.compacted.max(by_count);
        let forgotten = self.forget(TRIM_STEP)?;
        if self.counters.history_bytes > bound.bytes && forgotten < TRIM_STEP {
            // Where bytes are the problem, give up an eighth of the revisions that are left.
            let kept = self.counters.revision - self.counters.compacted;
            self.counters.compacted += (kept / 8).max(1).min(kept);
            self.forget(TRIM_STEP)?;
        }
        Ok(())
    }

    /// Removes history that is compacted, oldest first; returns how many entries.
    fn forget(&mut self, entries_max: usize) -> Result<usize, StorageError> {
        let end = (self.counters.compacted.saturating_add(1), 0);
        let mut doomed = Vec::new();
        for entry in self.history.range(..end)?.take(entries_max) {
            let (place, change) = entry?;
            let (key, _, _, _, _, value) = change.value();
            doomed.push((place.value(), tables::change_bytes(key, value)));
        }
        for (place, bytes) in &doomed {
            self.history.remove(*place)?;
            self.counters.history_bytes = self.counters.history_bytes.saturating_sub(*bytes);
            self.changed = true;
        }
        Ok(doomed.len())
    }

    fn put(
        &mut self,
        change: &mut Revising,
        key: &str,
        value: &[u8],
        lease: Option<LeaseId>,
    ) -> Result<(), StorageError> {
        let old = tables::read(&self.current, key)?;
        self.detach(old.as_ref())?;
        let create = old.as_ref().map_or(change.revision, |kv| kv.create_revision.0);
        let version = old.as_ref().map_or(1, |kv| kv.version + 1);
        let lease = lease.map_or(0, |l| l.0);
        if lease != 0 {
            self.lease_keys.insert((lease, key), ())?;
        }
        let record = (create, change.revision, version, lease, value);
        self.current.insert(key, record)?;
        let entry = (key, true, create, version, lease, value);
        self.history.insert(change.place(), entry)?;
        self.counters.history_bytes += tables::change_bytes(key, value);
        Ok(())
    }

    fn delete(&mut self, change: &mut Revising, key: &str) -> Result<bool, StorageError> {
        let Some(old) = tables::read(&self.current, key)? else {
            return Ok(false);
        };
        self.detach(Some(&old))?;
        self.current.remove(key)?;
        let entry = (key, false, 0, 0, 0, &[][..]);
        self.history.insert(change.place(), entry)?;
        self.counters.history_bytes += tables::change_bytes(key, &[]);
        Ok(true)
    }

    fn detach(&mut self, old: Option<&KeyValue>) -> Result<(), StorageError> {
        if let Some(kv) = old
            && let Some(lease) = kv.lease
        {
            self.lease_keys.remove((lease.0, kv.key.as_str()))?;
        }
        Ok(())
    }

    fn adopt(&mut self, change: &Revising) {
        if change.places > 0 {
            self.counters.revision = change.revision;
            self.changed = true;
        }
    }
}

/// The changes of one transaction: all of one revision, which counts only if there is one.
struct Revising {
    revision: u64,
    places: u32,
}

impl Revising {
    fn after(revision: u64) -> Self {
        Self { revision: revision + 1, places: 0 }
    }

    fn place(&mut self) -> Place {
        let place = (self.revision, self.places);
        self.places += 1;
        place
    }
}
