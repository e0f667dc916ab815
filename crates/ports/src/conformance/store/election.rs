//! Leadership: one at a time, and fenced.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Loss, PATIENCE, Subject, read, within};
use crate::store::{
    Elector, KeyValue, LeaderError, Lease, LeaseId, Listing, Op, Revision, Store, StoreError, Txn,
    TxnOutcome, WatchStream,
};

/// The lease of an office whose renewals are waited for.
const TTL: Duration = Duration::from_secs(3);
/// The lease where nobody may wait for its end, nor lose the office because the machine is busy.
const LONG: Duration = Duration::from_secs(20);

fn elector(store: &Arc<dyn Store>, identity: &str, ttl: Duration) -> Elector {
    Elector::new(Arc::clone(store), "office/leader", identity, ttl)
}

fn mark(value: &str) -> Txn {
    Txn::new().then(Op::put("office/mark", value.to_owned()))
}

/// While one leads, another is not elected; once it resigns, the next is, in a greater term.
pub async fn one_leads_and_terms_grow(subject: &impl Subject) {
    let store = subject.direct();
    let (a, b) = (elector(&store, "a", TTL), elector(&store, "b", LONG));
    assert_eq!(within("holder", a.holder()).await.expect("holder"), None);
    let first = within("campaign", a.campaign(PATIENCE)).await.expect("elected");
    let holder = within("holder", b.holder()).await.expect("holder").expect("a leads");
    assert_eq!((holder.candidate.identity.as_str(), holder.term), ("a", first.term()));
    // Longer than the lease: it must be the renewal that keeps the office.
    let patience = TTL * 2;
    let error = within("campaign", b.campaign(patience)).await.err().expect("a leads");
    assert!(matches!(error, LeaderError::NotElected { .. }), "{error}");
    assert!(first.is_valid());
    within("write", first.fenced_txn(mark("a"))).await.expect("a leads");

    let waiting = tokio::spawn(async move { b.campaign(PATIENCE).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (term, resigned) = (first.term(), Instant::now());
    within("resign", first.resign()).await.expect("resign");
    let second = within("campaign", waiting).await.expect("task").expect("elected");
    assert!(resigned.elapsed() < LONG / 2, "the successor waited for a timeout");
    assert!(second.term() > term);
}

/// A leader whose lease ended cannot write any more, whatever it believes; it learns who leads.
pub async fn an_old_leader_is_fenced(subject: &impl Subject) {
    let store = subject.direct();
    let (a, b) = (elector(&store, "a", LONG), elector(&store, "b", LONG));
    let old = within("campaign", a.campaign(PATIENCE)).await.expect("elected");
    within("write", old.fenced_txn(mark("old"))).await.expect("it leads");
    // As if its process had been stopped for longer than its lease.
    within("revoke", store.lease_revoke(old.lease())).await.expect("revoke");
    let error = within("write", old.fenced_txn(mark("late"))).await.expect_err("nobody leads");
    assert!(matches!(error, LeaderError::Fenced { now: None, .. }), "{error}");
    let new = within("campaign", b.campaign(PATIENCE)).await.expect("elected");
    let error = within("write", old.fenced_txn(mark("late"))).await.expect_err("b leads");
    let LeaderError::Fenced { term, now: Some(now) } = error else {
        panic!("{error}");
    };
    assert_eq!(term, old.term());
    assert_eq!((now.candidate.identity.as_str(), now.term), ("b", new.term()));
    assert_eq!(read(store.as_ref(), "office/mark").await.as_deref(), Some("old"));
    within("write", new.fenced_txn(mark("new"))).await.expect("b leads");
    let cause = within("lost", old.lost()).await;
    assert!(cause.contains("lease"), "{cause}");
    assert!(!old.is_valid());
}

/// Candidates that lead in turns, each reading, thinking and writing without any other lock than
/// the fence, never overwrite each other.
pub async fn leaders_exclude_each_other(subject: &impl Subject) {
    const CANDIDATES: u64 = 3;
    const REIGNS: u64 = 3;
    const WRITES: u64 = 4;
    let store = subject.direct();
    let mut tasks = JoinSet::new();
    for i in 0..CANDIDATES {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let mut terms = Vec::new();
            for _ in 0..REIGNS {
                let elector = elector(&store, &format!("c{i}"), LONG);
                let reign = within("campaign", elector.campaign(PATIENCE)).await.expect("elected");
                terms.push(reign.term());
                for _ in 0..WRITES {
                    let now = read(store.as_ref(), "office/count").await;
                    let now: u64 = now.map_or(0, |text| text.parse().expect("number"));
                    let txn = Txn::new().then(Op::put("office/count", (now + 1).to_string()));
                    within("write", reign.fenced_txn(txn)).await.expect("it leads");
                }
                within("resign", reign.resign()).await.expect("resign");
            }
            terms
        });
    }
    let mut terms: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();
    let reigns = terms.len();
    terms.sort_unstable();
    terms.dedup();
    assert_eq!(terms.len(), reigns, "two reigns shared a term");
    let count = read(store.as_ref(), "office/count").await;
    assert_eq!(count, Some((CANDIDATES * REIGNS * WRITES).to_string()));
}

/// A candidate whose winning bid lost its acknowledgement finds out that it leads; one whose bid
/// never arrived bids again.
pub async fn a_lost_bid_still_wins(subject: &impl Subject) {
    for loss in [Loss::Ack, Loss::Request] {
        let (about_to_bid, announced) = oneshot::channel();
        let (go, may_bid) = oneshot::channel();
        let store: Arc<dyn Store> = Arc::new(Announcing {
            inner: subject.disturbed(),
            first: Mutex::new(Some((about_to_bid, may_bid))),
        });
        let candidate = elector(&store, "a", LONG);
        let arm = async {
            announced.await.expect("it bids");
            subject.lose_next(loss);
            go.send(()).expect("it waits");
        };
        let campaign = within("campaign", candidate.campaign(PATIENCE));
        let (reign, ()) = tokio::join!(campaign, arm);
        let reign = reign.unwrap_or_else(|e| panic!("{loss:?}: {e}"));
        within("write", reign.fenced_txn(mark("a"))).await.expect("it leads");
        within("resign", reign.resign()).await.expect("resign");
    }
}

/// Announces the first transaction, and waits for leave to make it.
struct Announcing {
    inner: Arc<dyn Store>,
    first: Mutex<Option<(oneshot::Sender<()>, oneshot::Receiver<()>)>>,
}

#[async_trait]
impl Store for Announcing {
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let first = self.first.lock().expect("no panic before").take();
        if let Some((announce, leave)) = first {
            announce.send(()).expect("someone listens");
            leave.await.expect("leave");
        }
        self.inner.txn(txn).await
    }

    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        self.inner.get(key).await
    }

    async fn range(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.inner.range(prefix).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream, StoreError> {
        self.inner.watch(prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.inner.revision().await
    }

    async fn compact(&self, through: Revision) -> Result<(), StoreError> {
        self.inner.compact(through).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.inner.lease_grant(ttl).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.inner.lease_keep_alive(lease).await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.lease_revoke(lease).await
    }
}
