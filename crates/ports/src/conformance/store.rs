//! What every [`Store`] must do. Each function is one property, and panics where it does not hold.
//!
//! An adapter implements [`Subject`] and calls [`store_conformance!`](crate::store_conformance) in
//! its tests. Each property works under keys of its own, but compaction touches the whole store:
//! give each property a store of its own.

pub mod election;
pub mod leases;
pub mod txns;
pub mod watches;
pub mod writes;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use crate::store::{Event, EventKind, Revision, Store, StoreError, Txn, TxnOutcome, WatchStream};

/// What shall go wrong with the next write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// It is applied; its acknowledgement is lost.
    Ack,
    /// It never arrives.
    Request,
}

/// One fresh store under test, and the means to get in its way.
#[async_trait]
pub trait Subject: Send + Sync {
    /// Returns a handle whose calls nothing gets in the way of.
    fn direct(&self) -> Arc<dyn Store>;

    /// Returns a handle to the same store that the other methods interfere with.
    fn disturbed(&self) -> Arc<dyn Store>;

    /// Lets the next write through [`Subject::disturbed`] be lost.
    fn lose_next(&self, what: Loss);

    /// Cuts what connects [`Subject::disturbed`] to its store, until [`Subject::restore`]. Does
    /// nothing where there is no connection.
    async fn cut(&self);

    /// Lets new connections through again.
    async fn restore(&self);
}

/// Longest that any step of a property may take; far beyond what a healthy store needs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for `future`, or panics naming `what` was waited for.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing within {PATIENCE:?}"),
    }
}

/// Applies a transaction that must be answered.
pub(crate) async fn apply(store: &dyn Store, txn: Txn) -> TxnOutcome {
    let what = txn.describe();
    match within(&what, store.txn(txn)).await {
        Ok(outcome) => outcome,
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Puts one key and returns the revision.
pub(crate) async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    let txn = Txn::new().then(crate::store::Op::put(key, value.to_owned()));
    apply(store, txn).await.revision
}

/// Reads one key as text.
pub(crate) async fn read(store: &dyn Store, key: &str) -> Option<String> {
    let found = within("get", store.get(key)).await.unwrap_or_else(|e| panic!("get {key}: {e}"));
    found.map(|kv| String::from_utf8_lossy(&kv.value).into_owned())
}

/// Takes events from a watch until it has at least `count`; checks order and wholeness on the way.
pub(crate) async fn take(watch: &mut WatchStream, count: usize) -> Result<Vec<Event>, StoreError> {
    use futures::StreamExt;
    let mut events: Vec<Event> = Vec::new();
    let mut through = Revision(0);
    while events.len() < count {
        let next = within("watch", watch.next()).await;
        let batch = next.unwrap_or_else(|| panic!("watch ended without an error"))?;
        assert!(batch.through >= through, "progress went back");
        for event in &batch.events {
            assert!(
                event.revision > through && event.revision <= batch.through,
                "event at {} outside ({through}, {}]: a revision was split or came late",
                event.revision,
                batch.through
            );
        }
        through = batch.through;
        events.extend(batch.events);
    }
    assert!(events.windows(2).all(|w| w[0].revision <= w[1].revision), "events out of order");
    Ok(events)
}

/// Shows an event as `+key=value@revision` or `-key@revision`.
pub(crate) fn show(event: &Event) -> String {
    let at = event.revision;
    match &event.kind {
        EventKind::Put(kv) => {
            format!("+{}={}@{at}", kv.key, String::from_utf8_lossy(&kv.value))
        }
        EventKind::Delete(key) => format!("-{key}@{at}"),
    }
}

/// Writes one test per property, on the subject that `$subject` (an async expression giving
/// `Option<impl Subject>`) makes for it; `None` means skipped, and says so itself.
#[macro_export]
macro_rules! store_conformance {
    ($subject:expr) => {
        $crate::store_conformance!(@ $subject;
            txns: revisions_count_changes, compares_decide, a_branch_is_atomic_and_in_order,
                limits_are_refused, a_prefix_is_a_prefix, a_listing_is_one_moment,
                a_large_listing_is_whole, concurrent_counters_lose_nothing;
            watches: a_watch_sees_all_in_order, a_watch_never_splits_a_revision,
                a_watch_of_the_past_replays_it, compaction_is_explicit,
                a_delete_at_the_compaction_is_not_lost, the_future_is_refused,
                a_slow_consumer_misses_nothing_silently, a_watcher_survives_cuts,
                a_watcher_lists_again_after_compaction;
            leases: keys_vanish_with_their_lease, keep_alive_keeps, revoke_is_one_change,
                a_put_detaches, a_dead_lease_takes_no_keys;
            writes: a_lost_ack_is_unknown, a_settled_write_survives_any_loss,
                settled_counters_count_exactly, a_superseded_writer_is_stopped;
            election: one_leads_and_terms_grow, an_old_leader_is_fenced, leaders_exclude_each_other,
                a_lost_bid_still_wins;
        );
    };
    (@ $subject:expr; $($module:ident: $($property:ident),+;)+) => {
        $($(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $property() {
                if let Some(subject) = $subject.await {
                    $crate::conformance::store::$module::$property(&subject).await;
                }
            }
        )+)+
    };
}
