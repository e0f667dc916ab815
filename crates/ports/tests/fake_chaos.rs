//! The helpers above the store hold their promises on a store that misbehaves, seed after seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumline_ports::store::fake::{Doom, FakeStore, Faults};
use drumline_ports::store::{
    Change, Compare, Elector, EventKind, Mirror, Op, Revision, Store, StoreError, Txn, Watcher,
    WatcherOptions, Writer,
};
use tokio::time::{sleep, timeout};

const SEEDS: u64 = 60;

/// Everything goes wrong now and then, and late.
const ROUGH: Faults = Faults {
    lost_ack_permille: 60,
    lost_request_permille: 60,
    delayed_request_permille: 60,
    refused_permille: 40,
    watch_drop_permille: 80,
    watch_repeat_permille: 120,
    watch_delay_permille: 100,
    compact_permille: 20,
    delay_max: Duration::from_millis(300),
};

/// Raises a counter through a writer; returns how often.
async fn count_up(store: Arc<dyn Store>, key: &str, times: u64) {
    let patience = Duration::from_secs(60);
    let writer = Writer::open(Arc::clone(&store), "writers", key, 1, patience);
    let writer = writer.await.expect("opens");
    for i in 0..times {
        let txn = if i == 0 {
            Txn::new().when(Compare::absent(key))
        } else {
            Txn::new().when(Compare::value(key, i.to_string()))
        };
        let outcome = writer.txn(txn.then(Op::put(key, (i + 1).to_string()))).await;
        let outcome = outcome.expect("settled in the end");
        // Unhurried, so that watches see many batches.
        sleep(Duration::from_millis(20)).await;
        assert!(outcome.succeeded, "write {i} of {key} met another write of its own");
    }
}

/// Follows a prefix until `done` says so; checks that no event comes twice or late.
async fn follow(store: Arc<dyn Store>, done: impl Fn(&Mirror) -> bool) -> (Mirror, u64) {
    let options = WatcherOptions { attempts_max: 1000, ..WatcherOptions::default() };
    let mut watcher = Watcher::with_options(store, "c/", options);
    let mut mirror = Mirror::default();
    let mut newest = Revision(0);
    let mut versions = BTreeMap::new();
    while !done(&mirror) {
        let change = watcher.next().await.expect("faults pass");
        match &change {
            Change::Reset(listing) => {
                assert!(listing.revision >= newest, "a listing older than what was reported");
                newest = listing.revision;
                let listed = listing.items.iter().map(|kv| (kv.key.clone(), kv.version));
                versions = listed.collect();
            }
            Change::Events(events) => {
                for event in events {
                    assert!(event.revision > newest, "an event came twice or out of order");
                    newest = event.revision;
                    let EventKind::Put(kv) = &event.kind else {
                        panic!("nobody deletes");
                    };
                    let version = versions.entry(kv.key.clone()).or_insert(0);
                    *version += 1;
                    assert_eq!(kv.version, *version, "an event of {} was skipped", kv.key);
                }
            }
        }
        mirror.apply(&change);
    }
    (mirror, watcher.reconnects() + watcher.listings())
}

async fn rough_run(seed: u64) -> (u64, String) {
    const WRITERS: u64 = 3;
    const TIMES: u64 = 30;
    let fake = FakeStore::with_faults(seed, ROUGH);
    let store: Arc<dyn Store> = Arc::new(fake.clone());
    let writing: Vec<_> = (0..WRITERS)
        .map(|w| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { count_up(store, &format!("c/{w}"), TIMES).await })
        })
        .collect();
    let all = |mirror: &Mirror| {
        mirror.len() as u64 == WRITERS && mirror.iter().all(|kv| kv.value == TIMES.to_string())
    };
    let followed = timeout(Duration::from_secs(600), follow(store, all)).await;
    let (mirror, trouble) =
        followed.unwrap_or_else(|_| panic!("seed {seed}: the watcher is stuck"));
    for task in writing {
        task.await.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
    // Nothing late may still turn up.
    sleep(ROUGH.delay_max * 2).await;
    fake.set_faults(Faults::default());
    let listing = fake.range("c/").await.expect("range");
    assert_eq!(mirror.iter().cloned().collect::<Vec<_>>(), listing.items, "seed {seed}");
    for kv in &listing.items {
        assert_eq!(kv.version, TIMES, "seed {seed}: {} was written twice", kv.key);
    }
    let trace = format!("{:?}", fake.range("").await.expect("range"));
    (trouble, trace)
}

#[tokio::test(start_paused = true)]
async fn writers_and_watchers_hold_on_a_rough_store() {
    let mut trouble = 0;
    for seed in 0..SEEDS {
        trouble += rough_run(seed).await.0;
    }
    assert!(
        trouble > SEEDS * 5,
        "{trouble} reconnects and listings in {SEEDS} runs: this test shows nothing"
    );
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_run() {
    let runs = [rough_run(5).await.1, rough_run(5).await.1, rough_run(6).await.1];
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0], runs[2]);
}

#[tokio::test(start_paused = true)]
async fn a_write_that_comes_late_can_no_longer_be_applied() {
    let fake = FakeStore::new();
    let store: Arc<dyn Store> = Arc::new(fake.clone());
    let writer = Writer::open(Arc::clone(&store), "writers", "w", 1, Duration::from_secs(60));
    let writer = writer.await.expect("opens");
    fake.doom_next_write(Doom::Delay(Duration::from_secs(30)));
    let put = |value: &str| Txn::new().then(Op::put("k", value.to_owned()));
    writer.txn(put("first")).await.expect("settled");
    writer.txn(put("second")).await.expect("settled");
    sleep(Duration::from_secs(60)).await;
    let found = store.get("k").await.expect("get").expect("written");
    assert_eq!((&found.value[..], found.version), (&b"second"[..], 2));
    // The bare store shows the danger: there the late write overwrites.
    fake.doom_next_write(Doom::Delay(Duration::from_secs(30)));
    store.txn(put("late")).await.expect_err("unknown");
    store.txn(put("newer")).await.expect("put");
    sleep(Duration::from_secs(60)).await;
    assert_eq!(store.get("k").await.expect("get").expect("written").value, "late");
}

#[tokio::test(start_paused = true)]
async fn a_write_that_cannot_be_settled_stays_unknown() {
    let fake = FakeStore::new();
    let store: Arc<dyn Store> = Arc::new(fake.clone());
    let patience = Duration::from_secs(5);
    let writer = Writer::open(Arc::clone(&store), "writers", "w", 1, patience);
    let writer = writer.await.expect("opens");
    fake.set_faults(Faults { lost_ack_permille: 1000, ..Faults::default() });
    let error = writer.txn(Txn::new().then(Op::put("k", "1"))).await.expect_err("never settled");
    assert!(matches!(error, drumline_ports::store::WriteError::Store(StoreError::Unknown { .. })));
    fake.set_faults(Faults::default());
    writer.txn(Txn::new().then(Op::put("k", "2"))).await.expect("the slot is claimed anew");
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_cannot_renew_gives_up_before_its_lease_ends() {
    let fake = FakeStore::new();
    let store: Arc<dyn Store> = Arc::new(Stalling(fake.clone()));
    let ttl = Duration::from_secs(9);
    let elector = Elector::new(store, "leader", "a", ttl);
    let reign = elector.campaign(Duration::from_secs(1)).await.expect("elected");
    let granted = tokio::time::Instant::now();
    let cause = timeout(ttl * 2, reign.lost()).await.expect("it notices");
    assert!(cause.contains("renewed"), "{cause}");
    assert!(granted.elapsed() <= ttl, "it believed in its lease for too long");
    assert!(!reign.is_valid());
}

/// A store whose renewals hang for ever.
struct Stalling(FakeStore);

#[async_trait::async_trait]
impl Store for Stalling {
    async fn lease_keep_alive(
        &self,
        _: drumline_ports::store::LeaseId,
    ) -> Result<Duration, StoreError> {
        std::future::pending().await
    }

    async fn get(&self, key: &str) -> Result<Option<drumline_ports::store::KeyValue>, StoreError> {
        self.0.get(key).await
    }

    async fn range(&self, prefix: &str) -> Result<drumline_ports::store::Listing, StoreError> {
        self.0.range(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<drumline_ports::store::TxnOutcome, StoreError> {
        self.0.txn(txn).await
    }

    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<drumline_ports::store::WatchStream, StoreError> {
        self.0.watch(prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.0.revision().await
    }

    async fn compact(&self, through: Revision) -> Result<(), StoreError> {
        self.0.compact(through).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<drumline_ports::store::Lease, StoreError> {
        self.0.lease_grant(ttl).await
    }

    async fn lease_revoke(&self, lease: drumline_ports::store::LeaseId) -> Result<(), StoreError> {
        self.0.lease_revoke(lease).await
    }
}
