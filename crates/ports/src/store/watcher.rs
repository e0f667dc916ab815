//! An endless feed of a prefix: list, watch, resume, and list again when history is gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::time::{sleep, timeout};

use super::error::StoreError;
use super::model::{Event, EventKind, KeyValue, Listing, Revision, WatchBatch};
use super::{Store, WatchStream};

/// How a [`Watcher`] waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatcherOptions {
    /// First pause after a failure; doubles with each further one. Default 50 ms.
    pub pause_min: Duration,
    /// Longest pause between attempts. Default 2 s.
    pub pause_max: Duration,
    /// Failures in a row, without any batch or listing between, after which the watcher gives its
    /// last error to the caller. Default 30, about a minute.
    pub attempts_max: u32,
    /// A watch that stayed silent this long is opened anew, in case its connection is dead without
    /// anyone having noticed. Default 60 s.
    pub silence_max: Duration,
}

impl Default for WatcherOptions {
    fn default() -> Self {
        Self {
            pause_min: Duration::from_millis(50),
            pause_max: Duration::from_secs(2),
            attempts_max: 30,
            silence_max: Duration::from_secs(60),
        }
    }
}

/// What a [`Watcher`] reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The prefix as a whole: forget what was known. First of all, and after a compaction.
    Reset(Listing),
    /// Changes since, oldest first, none of them reported before.
    Events(Vec<Event>),
}

/// Follows a prefix for ever: across lost connections, repeated events and compaction.
///
/// Reports one [`Change::Reset`] first. Between two resets it reports every change exactly once, in
/// order. After a reset, changes in between may have been merged into the listing.
pub struct Watcher {
    store: Arc<dyn Store>,
    prefix: String,
    options: WatcherOptions,
    /// Everything up to here was reported; `None` before the first listing.
    seen: Option<Revision>,
    stream: Option<WatchStream>,
    failures: u32,
    reconnects: u64,
    listings: u64,
}

impl Watcher {
    /// Creates a watcher of `prefix` with default options. Nothing is read until the first
    /// [`Watcher::next`].
    pub fn new(store: Arc<dyn Store>, prefix: impl Into<String>) -> Self {
        Self::with_options(store, prefix, WatcherOptions::default())
    }

    /// Creates a watcher that waits as told.
    pub fn with_options(
        store: Arc<dyn Store>,
        prefix: impl Into<String>,
        options: WatcherOptions,
    ) -> Self {
        Self {
            store,
            prefix: prefix.into(),
            options,
            seen: None,
            stream: None,
            failures: 0,
            reconnects: 0,
            listings: 0,
        }
    }

    /// Returns how often a watch was opened again after it broke.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.reconnects
    }

    /// Returns how often the prefix was listed, 1 for the first time.
    #[must_use]
    pub fn listings(&self) -> u64 {
        self.listings
    }

    /// Waits for the next change. Safe to cancel: nothing is lost that was not returned.
    ///
    /// # Errors
    /// The last error after [`WatcherOptions::attempts_max`] failures in a row, or at once one that
    /// waiting cannot mend. The watcher may be used again; it goes on where it was.
    pub async fn next(&mut self) -> Result<Change, StoreError> {
        loop {
            match self.step().await {
                Ok(Some(change)) => {
                    self.failures = 0;
                    return Ok(change);
                }
                Ok(None) => self.failures = 0,
                Err(error) => self.after(error).await?,
            }
        }
    }

    /// Does one thing: list, open the watch, or take one batch from it.
    async fn step(&mut self) -> Result<Option<Change>, StoreError> {
        let Some(seen) = self.seen else {
            let listing = self.store.range(&self.prefix).await?;
            self.listings += 1;
            self.seen = Some(listing.revision);
            return Ok(Some(Change::Reset(listing)));
        };
        let Some(stream) = self.stream.as_mut() else {
            self.stream = Some(self.store.watch(&self.prefix, seen.next()).await?);
            return Ok(None);
        };
        match timeout(self.options.silence_max, stream.next()).await {
            Ok(Some(Ok(batch))) => Ok(self.accept(seen, batch)),
            Ok(Some(Err(error))) => Err(error),
            Ok(None) => {
                let op = format!("watch of {:?}", self.prefix);
                Err(StoreError::unavailable(op, "the watch ended without an error"))
            }
            Err(_) => {
                self.stream = None;
                self.reconnects += 1;
                Ok(None)
            }
        }
    }

    fn accept(&mut self, seen: Revision, batch: WatchBatch) -> Option<Change> {
        self.seen = Some(batch.through.max(seen));
        let fresh = |event: &Event| event.revision > seen;
        let events: Vec<Event> = batch.events.into_iter().filter(fresh).collect();
        (!events.is_empty()).then_some(Change::Events(events))
    }

    async fn after(&mut self, error: StoreError) -> Result<(), StoreError> {
        if self.stream.take().is_some() {
            self.reconnects += 1;
        }
        let mendable = matches!(
            error,
            StoreError::Unavailable { .. }
                | StoreError::Compacted { .. }
                | StoreError::FutureRevision { .. }
        );
        if error.needs_listing() {
            self.seen = None;
        }
        self.failures += 1;
        if !mendable || self.failures >= self.options.attempts_max {
            self.failures = 0;
            return Err(error);
        }
        let doublings = (self.failures - 1).min(16);
        let pause = self.options.pause_min * 2u32.pow(doublings);
        sleep(pause.min(self.options.pause_max)).await;
        Ok(())
    }
}

/// The present keys of a prefix, kept true by the changes of a [`Watcher`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mirror {
    items: BTreeMap<String, KeyValue>,
    revision: Revision,
}

impl Mirror {
    /// Applies one change.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Reset(listing) => {
                let keyed = listing.items.iter().map(|kv| (kv.key.clone(), kv.clone()));
                self.items = keyed.collect();
                self.revision = listing.revision;
            }
            Change::Events(events) => {
                for event in events {
                    self.revision = self.revision.max(event.revision);
                    match &event.kind {
                        EventKind::Put(kv) => {
                            self.items.insert(kv.key.clone(), kv.clone());
                        }
                        EventKind::Delete(key) => {
                            self.items.remove(key);
                        }
                    }
                }
            }
        }
    }

    /// Returns one key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.items.get(key)
    }

    /// Returns all keys, in order.
    pub fn iter(&self) -> impl Iterator<Item = &KeyValue> {
        self.items.values()
    }

    /// Returns how many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are no keys.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Returns the newest revision applied.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }
}
