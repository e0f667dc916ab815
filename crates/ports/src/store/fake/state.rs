//! What the fake store holds: present keys, history and leases, without any fault.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::super::error::StoreError;
use super::super::model::{
    Event, EventKind, KeyValue, LeaseId, Listing, Op, OpResult, Revision, Txn, TxnOutcome,
};
use super::super::tail::Chunk;

/// Most events in one batch of a watch; small, so that tests see several batches.
const CHUNK_EVENTS: usize = 16;

/// History kept without anyone compacting, in events.
const HISTORY_MAX: usize = 100_000;

struct LeaseState {
    ttl: Duration,
    expires: Instant,
    keys: BTreeSet<String>,
}

/// The whole store.
pub(super) struct State {
    revision: u64,
    compacted: u64,
    current: BTreeMap<String, KeyValue>,
    history: VecDeque<Event>,
    leases: BTreeMap<LeaseId, LeaseState>,
    next_lease: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            revision: 1,
            compacted: 0,
            current: BTreeMap::new(),
            history: VecDeque::new(),
            leases: BTreeMap::new(),
            next_lease: 1,
        }
    }
}

impl State {
    pub(super) fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    pub(super) fn get(&self, key: &str) -> Option<&KeyValue> {
        self.current.get(key)
    }

    pub(super) fn list(&self, prefix: &str) -> Listing {
        let from = self.current.range(prefix.to_owned()..);
        let items = from.map(|(_, kv)| kv).take_while(|kv| kv.key.starts_with(prefix));
        Listing { revision: self.revision(), items: items.cloned().collect() }
    }

    pub(super) fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome, StoreError> {
        let succeeded = txn.compares.iter().all(|c| c.holds(self.get(c.key())));
        let branch = if succeeded { &txn.then_ops } else { &txn.else_ops };
        for op in branch {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseNotFound { lease: *lease });
            }
        }
        let at = Revision(self.revision + 1);
        let mut changed = false;
        let mut results = Vec::new();
        for op in branch {
            results.push(match op {
                Op::Put { key, value, lease } => {
                    let old = self.current.get(key);
                    let kv = KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: old.map_or(at, |kv| kv.create_revision),
                        mod_revision: at,
                        version: old.map_or(1, |kv| kv.version + 1),
                        lease: *lease,
                    };
                    self.detach(key);
                    if let Some(state) = lease.and_then(|l| self.leases.get_mut(&l)) {
                        state.keys.insert(key.clone());
                    }
                    self.current.insert(key.clone(), kv.clone());
                    self.note(at, EventKind::Put(kv));
                    changed = true;
                    OpResult::Put
                }
                Op::Delete { key } => {
                    let deleted = self.delete(at, key);
                    changed |= deleted;
                    OpResult::Deleted(u64::from(deleted))
                }
                Op::DeletePrefix { prefix } => {
                    let doomed = self.list(prefix).items;
                    for kv in &doomed {
                        self.delete(at, &kv.key);
                    }
                    changed |= !doomed.is_empty();
                    OpResult::Deleted(doomed.len() as u64)
                }
                Op::Get { key } => OpResult::Got(self.get(key).cloned()),
            });
        }
        self.revision += u64::from(changed);
        Ok(TxnOutcome { succeeded, revision: self.revision(), results })
    }

    fn delete(&mut self, at: Revision, key: &str) -> bool {
        self.detach(key);
        let found = self.current.remove(key).is_some();
        if found {
            self.note(at, EventKind::Delete(key.to_owned()));
        }
        found
    }

    fn detach(&mut self, key: &str) {
        let lease = self.current.get(key).and_then(|kv| kv.lease);
        if let Some(state) = lease.and_then(|l| self.leases.get_mut(&l)) {
            state.keys.remove(key);
        }
    }

    fn note(&mut self, revision: Revision, kind: EventKind) {
        self.history.push_back(Event { revision, kind });
        while self.history.len() > HISTORY_MAX {
            if let Some(oldest) = self.history.pop_front() {
                self.forget(oldest.revision.0);
            }
        }
    }

    pub(super) fn compact(&mut self, through: Revision) -> Result<(), StoreError> {
        if through.0 > self.revision {
            return Err(StoreError::FutureRevision {
                requested: through,
                current: self.revision(),
            });
        }
        self.forget(through.0);
        Ok(())
    }

    fn forget(&mut self, through: u64) {
        self.compacted = self.compacted.max(through);
        while self.history.front().is_some_and(|e| e.revision.0 <= through) {
            self.history.pop_front();
        }
    }

    pub(super) fn read(&self, prefix: &str, from: Revision) -> Result<Chunk, StoreError> {
        if from.0 <= self.compacted {
            return Err(StoreError::Compacted {
                requested: from,
                oldest: Revision(self.compacted + 1),
            });
        }
        let start = self.history.partition_point(|e| e.revision < from);
        let mut events: Vec<Event> = Vec::new();
        let mut last = from;
        for event in self.history.range(start..) {
            if event.revision != last && events.len() >= CHUNK_EVENTS {
                return Ok(Chunk { through: last, events });
            }
            last = event.revision;
            if event.key().starts_with(prefix) {
                events.push(event.clone());
            }
        }
        Ok(Chunk { through: self.revision(), events })
    }

    pub(super) fn grant(&mut self, ttl: Duration, now: Instant) -> LeaseId {
        let id = LeaseId(self.next_lease);
        self.next_lease += 1;
        let state = LeaseState { ttl, expires: now + ttl, keys: BTreeSet::new() };
        self.leases.insert(id, state);
        id
    }

    pub(super) fn keep_alive(
        &mut self,
        lease: LeaseId,
        now: Instant,
    ) -> Result<Duration, StoreError> {
        let state = self.leases.get_mut(&lease);
        let state = state.ok_or(StoreError::LeaseNotFound { lease })?;
        state.expires = now + state.ttl;
        Ok(state.ttl)
    }

    pub(super) fn revoke(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        let state = self.leases.get(&lease);
        let keys = state.ok_or(StoreError::LeaseNotFound { lease })?.keys.clone();
        let at = Revision(self.revision + 1);
        for key in &keys {
            self.delete(at, key);
        }
        self.revision += u64::from(!keys.is_empty());
        self.leases.remove(&lease);
        Ok(())
    }

    pub(super) fn lease_expires(&self, lease: LeaseId) -> Option<Instant> {
        self.leases.get(&lease).map(|state| state.expires)
    }

    /// Ends every lease whose time has come.
    pub(super) fn expire(&mut self, now: Instant) {
        let due = self.leases.iter().filter(|(_, state)| state.expires <= now);
        for lease in due.map(|(id, _)| *id).collect::<Vec<_>>() {
            // Just found, so it exists.
            let _ = self.revoke(lease);
        }
    }
}
