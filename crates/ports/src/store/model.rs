//! The words of the store: keys, revisions, transactions, events and leases.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::error::StoreError;

/// Most operations in one branch of a transaction, and most compares: etcd's own default limit.
pub const TXN_OPS_MAX: usize = 128;

/// Most bytes of keys and values in one transaction: etcd refuses requests over 1.5 MiB.
pub const TXN_BYTES_MAX: usize = 1_310_720;

/// Most bytes of one key.
pub const KEY_BYTES_MAX: usize = 1024;

/// A moment in the store's history. 0 is before everything; an empty store is at 1.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// Returns the revision after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a lease; unique for the life of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A lease as granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// How long it lives without a keep-alive: at least what was asked for.
    pub ttl: Duration,
}

/// One key with its value and its place in history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value; opaque to the store.
    pub value: Bytes,
    /// The revision that created the key (anew, if it was deleted before).
    pub create_revision: Revision,
    /// The revision of the last change.
    pub mod_revision: Revision,
    /// Puts since the key was created, from 1.
    pub version: u64,
    /// The lease that the key lives by.
    pub lease: Option<LeaseId>,
}

/// Every key under a prefix, at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The revision at which all of `items` were read.
    pub revision: Revision,
    /// The keys, in order.
    pub items: Vec<KeyValue>,
}

/// What happened to one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The revision of the change.
    pub revision: Revision,
    /// The change.
    pub kind: EventKind,
}

impl Event {
    /// Returns the key that changed.
    #[must_use]
    pub fn key(&self) -> &str {
        match &self.kind {
            EventKind::Put(kv) => &kv.key,
            EventKind::Delete(key) => key,
        }
    }
}

/// The two ways a key changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// The key has this value now.
    Put(KeyValue),
    /// The key is gone.
    Delete(String),
}

/// Some whole revisions of a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// Every change under the prefix up to this revision has been delivered: resume from the next.
    pub through: Revision,
    /// The changes, oldest first. Empty where the batch only reports progress.
    pub events: Vec<Event>,
}

/// A condition on one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent {
        /// The key.
        key: String,
    },
    /// The key exists.
    Present {
        /// The key.
        key: String,
    },
    /// The key was last changed at this revision; revision 0 means that it does not exist.
    ModRevision {
        /// The key.
        key: String,
        /// The revision expected.
        is: Revision,
    },
    /// The key was created at this revision; revision 0 means that it does not exist.
    CreateRevision {
        /// The key.
        key: String,
        /// The revision expected.
        is: Revision,
    },
    /// The key has exactly this value; false when it does not exist.
    Value {
        /// The key.
        key: String,
        /// The value expected.
        is: Bytes,
    },
}

impl Compare {
    /// Requires that `key` does not exist.
    pub fn absent(key: impl Into<String>) -> Self {
        Self::Absent { key: key.into() }
    }

    /// Requires that `key` exists.
    pub fn present(key: impl Into<String>) -> Self {
        Self::Present { key: key.into() }
    }

    /// Requires that `key` was last changed at `is`.
    pub fn mod_revision(key: impl Into<String>, is: Revision) -> Self {
        Self::ModRevision { key: key.into(), is }
    }

    /// Requires that `key` is as it was read: unchanged, or still absent.
    pub fn unchanged(key: impl Into<String>, read: Option<&KeyValue>) -> Self {
        Self::mod_revision(key, read.map_or(Revision(0), |kv| kv.mod_revision))
    }

    /// Requires that `key` was created at `is`.
    pub fn create_revision(key: impl Into<String>, is: Revision) -> Self {
        Self::CreateRevision { key: key.into(), is }
    }

    /// Requires that `key` holds exactly `is`.
    pub fn value(key: impl Into<String>, is: impl Into<Bytes>) -> Self {
        Self::Value { key: key.into(), is: is.into() }
    }

    /// Returns the key that the condition is about.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Absent { key }
            | Self::Present { key }
            | Self::ModRevision { key, .. }
            | Self::CreateRevision { key, .. }
            | Self::Value { key, .. } => key,
        }
    }

    /// Whether the condition holds for the key's present state. The semantics in one place, for
    /// adapters that evaluate compares themselves.
    #[must_use]
    pub fn holds(&self, found: Option<&KeyValue>) -> bool {
        let revision_is = |read: Option<Revision>, is: Revision| read.unwrap_or_default() == is;
        match self {
            Self::Absent { .. } => found.is_none(),
            Self::Present { .. } => found.is_some(),
            Self::ModRevision { is, .. } => revision_is(found.map(|kv| kv.mod_revision), *is),
            Self::CreateRevision { is, .. } => revision_is(found.map(|kv| kv.create_revision), *is),
            Self::Value { is, .. } => found.is_some_and(|kv| kv.value == *is),
        }
    }
}

/// One operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Bytes,
        /// The lease to live by; `None` detaches the key from a lease it had.
        lease: Option<LeaseId>,
    },
    /// Deletes a key; no error if it does not exist.
    Delete {
        /// The key.
        key: String,
    },
    /// Deletes every key that starts with a prefix, which must not be empty.
    DeletePrefix {
        /// The prefix.
        prefix: String,
    },
    /// Reads a key; sees what the operations before it in the same branch did.
    Get {
        /// The key.
        key: String,
    },
}

impl Op {
    /// Sets `key` to `value`.
    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Sets `key` to `value`, to live by `lease`.
    pub fn put_leased(key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }

    /// Deletes `key`.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// Deletes every key under `prefix`.
    pub fn delete_prefix(prefix: impl Into<String>) -> Self {
        Self::DeletePrefix { prefix: prefix.into() }
    }

    /// Reads `key`.
    pub fn get(key: impl Into<String>) -> Self {
        Self::Get { key: key.into() }
    }

    /// Returns the key or prefix that the operation is about.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } | Self::Get { key } => key,
            Self::DeletePrefix { prefix } => prefix,
        }
    }

    /// Whether the operation can change anything.
    #[must_use]
    pub fn writes(&self) -> bool {
        !matches!(self, Self::Get { .. })
    }
}

/// What one operation did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpResult {
    /// The key was set.
    Put,
    /// So many keys were deleted.
    Deleted(u64),
    /// The key as read.
    Got(Option<KeyValue>),
}

/// Conditions, and what to do if they hold or not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// All must hold for `then_ops`; none at all always holds.
    pub compares: Vec<Compare>,
    /// Done when every compare holds.
    pub then_ops: Vec<Op>,
    /// Done otherwise.
    pub else_ops: Vec<Op>,
}

impl Txn {
    /// Starts an empty transaction.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds an operation for when all conditions hold.
    #[must_use]
    pub fn then(mut self, op: Op) -> Self {
        self.then_ops.push(op);
        self
    }

    /// Adds an operation for when a condition does not hold.
    #[must_use]
    pub fn otherwise(mut self, op: Op) -> Self {
        self.else_ops.push(op);
        self
    }

    /// Says what the transaction is, in a few words, for errors.
    #[must_use]
    pub fn describe(&self) -> String {
        let key = self.then_ops.iter().map(Op::key).next();
        let key = key.or_else(|| self.compares.iter().map(Compare::key).next());
        format!("txn on {:?}", key.unwrap_or(""))
    }

    /// Whether neither branch can change anything.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        !self.then_ops.iter().chain(&self.else_ops).any(Op::writes)
    }

    /// Checks the limits that hold for every adapter.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] when there are more than [`TXN_OPS_MAX`] operations or compares, more
    /// than [`TXN_BYTES_MAX`] bytes, an empty or too long key, or a key written twice in a branch.
    pub fn check(&self) -> Result<(), StoreError> {
        let refuse = |what: String| Err(StoreError::Invalid { op: self.describe(), what });
        let longest = self.compares.len().max(self.then_ops.len());
        let longest = longest.max(self.else_ops.len());
        if longest > TXN_OPS_MAX {
            return refuse(format!(
                "{longest} compares or operations, at most {TXN_OPS_MAX} are allowed"
            ));
        }
        let ops = || self.then_ops.iter().chain(&self.else_ops);
        for key in self.compares.iter().map(Compare::key).chain(ops().map(Op::key)) {
            if key.is_empty() || key.len() > KEY_BYTES_MAX {
                let shown: String = key.chars().take(40).collect();
                return refuse(format!(
                    "key {shown:?} has {} bytes, 1 to {KEY_BYTES_MAX} are allowed",
                    key.len()
                ));
            }
        }
        let bytes = self.bytes();
        if bytes > TXN_BYTES_MAX {
            return refuse(format!("{bytes} bytes, at most {TXN_BYTES_MAX} are allowed"));
        }
        for branch in [&self.then_ops, &self.else_ops] {
            if let Some(key) = written_twice(branch) {
                return refuse(format!("{key:?} is written twice in one branch"));
            }
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        let compares = self.compares.iter().map(|c| match c {
            Compare::Value { key, is } => key.len() + is.len(),
            other => other.key().len(),
        });
        let ops = self.then_ops.iter().chain(&self.else_ops).map(|op| match op {
            Op::Put { key, value, .. } => key.len() + value.len(),
            other => other.key().len(),
        });
        compares.chain(ops).sum()
    }
}

/// Finds a key that a branch writes more than once, which etcd refuses and which has no clear event.
fn written_twice(branch: &[Op]) -> Option<&str> {
    let mut seen = BTreeSet::new();
    for op in branch {
        if let Op::Put { key, .. } | Op::Delete { key } = op
            && !seen.insert(key.as_str())
        {
            return Some(key);
        }
    }
    let prefixes = branch.iter().filter_map(|op| match op {
        Op::DeletePrefix { prefix } => Some(prefix.as_str()),
        _ => None,
    });
    let mut earlier: Vec<&str> = Vec::new();
    for prefix in prefixes {
        let covers = |other: &&str| other.starts_with(prefix) || prefix.starts_with(*other);
        if seen.range(prefix..).next().is_some_and(|key| key.starts_with(prefix))
            || earlier.iter().any(covers)
        {
            return Some(prefix);
        }
        earlier.push(prefix);
    }
    None
}

/// What a transaction did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether every compare held.
    pub succeeded: bool,
    /// The store's revision right after: that of the changes, if there were any.
    pub revision: Revision,
    /// One per operation of the branch that was done.
    pub results: Vec<OpResult>,
}

impl TxnOutcome {
    /// Returns what the operation at `index` of the branch read, if it was a read of a present key.
    #[must_use]
    pub fn got(&self, index: usize) -> Option<&KeyValue> {
        match self.results.get(index) {
            Some(OpResult::Got(found)) => found.as_ref(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_beyond_a_limit_is_refused_with_the_figure() {
        let many = (0..=TXN_OPS_MAX).fold(Txn::new(), |t, i| t.then(Op::get(format!("k{i}"))));
        let cases = [
            (many, "129"),
            (Txn::new().then(Op::get("")), "0 bytes"),
            (Txn::new().then(Op::delete_prefix("")), "0 bytes"),
            (Txn::new().when(Compare::absent("k".repeat(1025))), "1025"),
            (Txn::new().then(Op::put("k", vec![0; TXN_BYTES_MAX])), "1310721"),
            (Txn::new().then(Op::put("k", "1")).then(Op::delete("k")), "twice"),
            (Txn::new().otherwise(Op::put("a/k", "1")).otherwise(Op::delete_prefix("a/")), "twice"),
            (Txn::new().then(Op::delete_prefix("a/")).then(Op::delete_prefix("a/b")), "twice"),
        ];
        for (txn, evidence) in cases {
            let error = txn.check().unwrap_err().to_string();
            assert!(error.contains(evidence), "{error} lacks {evidence}");
        }
    }

    #[test]
    fn the_same_key_in_both_branches_is_fine() {
        let txn = Txn::new().then(Op::put("k", "1")).otherwise(Op::put("k", "2"));
        assert_eq!(txn.check(), Ok(()));
        let txn = Txn::new().then(Op::put("k", "1")).then(Op::get("k"));
        assert_eq!(txn.check(), Ok(()));
    }
}
