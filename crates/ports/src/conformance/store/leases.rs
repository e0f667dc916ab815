//! Leases: keys that live as long as someone renews.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Subject, apply, put, read, show, take, within};
use crate::store::{Lease, LeaseId, Op, Store, StoreError, Txn};

/// What is asked for where its end is waited for; an adapter may round up. A few writes must fit into
/// it, on a disk that others use too.
const TTL: Duration = Duration::from_secs(2);
/// What is asked for where it must not end by itself.
const LONG: Duration = Duration::from_secs(600);

/// How late an expiry may come: etcd looks twice a second, and test machines are busy.
const SLACK: Duration = Duration::from_secs(30);

async fn grant(store: &dyn Store, ttl: Duration) -> Lease {
    within("grant", store.lease_grant(ttl)).await.expect("grant")
}

async fn put_leased(store: &dyn Store, key: &str, lease: LeaseId) {
    apply(store, Txn::new().then(Op::put_leased(key, "1", lease))).await;
}

/// Keys are there until the lease's time is over, and gone soon after; watches see it as one
/// change.
pub async fn keys_vanish_with_their_lease(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let asked = Instant::now();
    let lease = grant(store, TTL).await;
    assert!(lease.ttl >= TTL, "granted less than asked for");
    put(store, "exp/other", "1").await;
    put_leased(store, "exp/a", lease.id).await;
    put_leased(store, "exp/b", lease.id).await;
    let next = within("revision", store.revision()).await.expect("revision").next();
    let found = within("get", store.get("exp/a")).await.expect("get").expect("just put");
    assert_eq!(found.lease, Some(lease.id));
    let mut watch = within("watch", store.watch("exp/", next)).await.expect("watch");
    let events = take(&mut watch, 2).await.expect("events");
    let lived = asked.elapsed();
    assert!(lived >= lease.ttl, "gone after {lived:?} of {:?}", lease.ttl);
    assert!(lived < lease.ttl + SLACK, "gone only after {lived:?}");
    let mut gone: Vec<String> = events.iter().map(show).collect();
    gone.sort();
    assert_eq!(gone, [format!("-exp/a@{next}"), format!("-exp/b@{next}")]);
    assert_eq!(read(store, "exp/a").await, None);
    assert_eq!(read(store, "exp/other").await.as_deref(), Some("1"));
    let error = within("renew", store.lease_keep_alive(lease.id)).await.expect_err("expired");
    assert_eq!(error, StoreError::LeaseNotFound { lease: lease.id });
}

/// A lease that is renewed lives on past its time, and ends once nobody renews it.
pub async fn keep_alive_keeps(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let lease = grant(store, TTL).await;
    put_leased(store, "keep/a", lease.id).await;
    let until = Instant::now() + lease.ttl * 2;
    while Instant::now() < until {
        let ttl = within("renew", store.lease_keep_alive(lease.id)).await.expect("renew");
        assert_eq!(ttl, lease.ttl);
        sleep(lease.ttl / 8).await;
        assert!(read(store, "keep/a").await.is_some(), "gone although it was renewed");
    }
    let end = Instant::now() + lease.ttl + SLACK;
    while read(store, "keep/a").await.is_some() {
        assert!(Instant::now() < end, "still there although nobody renews");
        sleep(Duration::from_millis(50)).await;
    }
}

/// Revoking deletes at once and in one revision; a second time it is not found.
pub async fn revoke_is_one_change(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let lease = grant(store, LONG).await;
    for key in ["rvk/a", "rvk/b", "rvk/c"] {
        put_leased(store, key, lease.id).await;
    }
    let before = within("revision", store.revision()).await.expect("revision");
    within("revoke", store.lease_revoke(lease.id)).await.expect("revoke");
    let listing = within("range", store.range("rvk/")).await.expect("range");
    assert_eq!(listing.items, []);
    assert_eq!(listing.revision, before.next());
    let error = within("revoke", store.lease_revoke(lease.id)).await.expect_err("revoked");
    assert_eq!(error, StoreError::LeaseNotFound { lease: lease.id });
}

/// A put without the lease, or a deletion, takes a key out of it.
pub async fn a_put_detaches(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let (one, two) = (grant(store, LONG).await, grant(store, LONG).await);
    for key in ["det/plain", "det/moved", "det/anew", "det/kept"] {
        put_leased(store, key, one.id).await;
    }
    put(store, "det/plain", "2").await;
    put_leased(store, "det/moved", two.id).await;
    apply(store, Txn::new().then(Op::delete("det/anew"))).await;
    put(store, "det/anew", "2").await;
    within("revoke", store.lease_revoke(one.id)).await.expect("revoke");
    let left = async || -> Vec<String> {
        let listing = within("range", store.range("det/")).await.expect("range");
        listing.items.into_iter().map(|kv| kv.key).collect()
    };
    assert_eq!(left().await, ["det/anew", "det/moved", "det/plain"]);
    within("revoke", store.lease_revoke(two.id)).await.expect("revoke");
    assert_eq!(left().await, ["det/anew", "det/plain"]);
}

/// A put with a lease that is gone fails, and nothing of its transaction is done.
pub async fn a_dead_lease_takes_no_keys(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let lease = grant(store, LONG).await;
    within("revoke", store.lease_revoke(lease.id)).await.expect("revoke");
    let before = within("revision", store.revision()).await.expect("revision");
    let txn = Txn::new().then(Op::put("dead/plain", "1")).then(Op::put_leased(
        "dead/leased",
        "1",
        lease.id,
    ));
    let error = within("txn", store.txn(txn)).await.expect_err("the lease is gone");
    assert_eq!(error, StoreError::LeaseNotFound { lease: lease.id });
    assert_eq!(read(store, "dead/plain").await, None);
    assert_eq!(within("revision", store.revision()).await.expect("revision"), before);
}
