//! The state store port: etcd's semantics behind one trait.
//!
//! # The contract
//! - **Revisions.** One counter for the whole store. It starts at 1 (empty), and each transaction
//!   that changes something raises it by exactly one; all its changes carry that revision. It never
//!   goes back, not even across a crash.
//! - **Durable and linearizable.** A write that returned `Ok` survives a crash; a read that starts
//!   after it sees it.
//! - **Unknown outcomes.** A write may fail with [`StoreError::Unknown`]: it may have been applied,
//!   or may still be. It is never retried blindly and never assumed; [`Writer`] settles it by reading
//!   back. Every other error of a write means that nothing was changed.
//! - **Watches.** Every change under a prefix from a revision on, in order, without a gap or a
//!   repetition, never splitting a revision. A stream that cannot keep that promise ends with an
//!   error. [`Watcher`] turns that into an endless feed.
//! - **Leases.** Keys put with a lease vanish in one transaction when it expires or is revoked.
//!
//! # Which layer to use
//! | Need | Use |
//! |---|---|
//! | read, compare-and-swap | [`Store`] |
//! | a write whose outcome is always settled | [`Writer`] |
//! | follow a prefix for ever | [`Watcher`], [`Mirror`] |
//! | be the only one who acts | [`Elector`], [`Leadership::fenced_txn`] |
//! | typed values | [`json`] |

pub mod election;
pub mod error;
pub mod fake;
pub mod json;
pub mod model;
pub mod tail;
pub mod watcher;
pub mod writer;

use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use futures::Stream;

pub use election::{Candidate, Elector, Holder, LeaderError, Leadership, Term};
pub use error::StoreError;
pub use model::{
    Compare, Event, EventKind, KEY_BYTES_MAX, KeyValue, Lease, LeaseId, Listing, Op, OpResult,
    Revision, TXN_BYTES_MAX, TXN_OPS_MAX, Txn, TxnOutcome, WatchBatch,
};
pub use watcher::{Change, Mirror, Watcher, WatcherOptions};
pub use writer::{WriteError, Writer};

/// Changes under a prefix, oldest first; ends after its first error.
pub type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchBatch, StoreError>> + Send>>;

/// A transactional key-value store with revisions, watches and leases.
///
/// Every call ends within the adapter's deadline. See the [module](self) for the contract.
#[async_trait]
pub trait Store: Send + Sync {
    /// Reads one key.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when the store could not answer in time.
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError>;

    /// Reads every key that starts with `prefix`, in key order, all at one revision.
    ///
    /// An empty prefix reads everything. A watch from [`Listing::revision`] + 1 misses nothing.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when the store could not answer in time.
    async fn range(&self, prefix: &str) -> Result<Listing, StoreError>;

    /// Applies `then_ops` if every compare holds, else `else_ops`, atomically.
    ///
    /// # Errors
    /// - [`StoreError::Unknown`]: the acknowledgement was lost; read back before anything else.
    /// - [`StoreError::Invalid`]: beyond a limit, or one key written twice; nothing was changed.
    /// - [`StoreError::LeaseNotFound`]: a put names a lease that is gone; nothing was changed.
    /// - [`StoreError::Unavailable`]: surely not applied.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Follows the changes under `prefix` with a revision of at least `from`.
    ///
    /// Memory is bounded: a slow consumer falls behind in the store's history, and is told
    /// [`StoreError::Compacted`] once that history is gone.
    ///
    /// # Errors
    /// - [`StoreError::Compacted`]: the history from `from` on is gone; list again.
    /// - [`StoreError::FutureRevision`]: `from` is beyond the next revision, so this store is not
    ///   the one the caller last saw (restored from a backup); list again.
    /// - [`StoreError::Unavailable`]: the watch could not be set up in time.
    ///
    /// The stream may end with any of them too; `None` never comes without an error before it.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream, StoreError>;

    /// Returns the store's present revision.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when the store could not answer in time.
    async fn revision(&self) -> Result<Revision, StoreError>;

    /// Forgets the history up to and including `through`; present values stay.
    ///
    /// Compacting what is compacted already is no error.
    ///
    /// # Errors
    /// - [`StoreError::FutureRevision`]: `through` is beyond the present revision.
    /// - [`StoreError::Unknown`], [`StoreError::Unavailable`] as for a write; repeating is harmless.
    async fn compact(&self, through: Revision) -> Result<(), StoreError>;

    /// Grants a lease of at least `ttl` (an adapter may round up, see [`Lease::ttl`]).
    ///
    /// # Errors
    /// [`StoreError::Unknown`] leaves at worst an unused lease that expires by itself.
    async fn lease_grant(&self, ttl: Duration) -> Result<Lease, StoreError>;

    /// Gives the lease its full time again, and returns that time.
    ///
    /// # Errors
    /// [`StoreError::LeaseNotFound`] when it has expired or was revoked.
    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError>;

    /// Ends the lease and deletes its keys.
    ///
    /// # Errors
    /// [`StoreError::LeaseNotFound`] when it has expired or was revoked already.
    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError>;
}
