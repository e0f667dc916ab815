//! Revisions, compares, atomicity and listings.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::{Subject, apply, put, read, within};
use crate::store::{
    Compare, KeyValue, Op, OpResult, Revision, Store, StoreError, TXN_BYTES_MAX, TXN_OPS_MAX, Txn,
};

async fn get(store: &dyn Store, key: &str) -> Option<KeyValue> {
    within("get", store.get(key)).await.unwrap_or_else(|e| panic!("get {key}: {e}"))
}

async fn revision(store: &dyn Store) -> Revision {
    within("revision", store.revision()).await.unwrap_or_else(|e| panic!("revision: {e}"))
}

/// Each transaction that changes something raises the revision by one; others do not.
pub async fn revisions_count_changes(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let start = revision(store).await;
    assert_eq!(put(store, "rev/a", "1").await, start.next());
    let created = get(store, "rev/a").await.expect("just put");
    assert_eq!(created.create_revision, start.next());
    assert_eq!(created.mod_revision, start.next());
    assert_eq!((created.version, created.lease), (1, None));

    let second = put(store, "rev/a", "2").await;
    let changed = get(store, "rev/a").await.expect("just put");
    assert_eq!(changed.create_revision, created.create_revision);
    assert_eq!((changed.mod_revision, changed.version), (second, 2));

    let three = Txn::new()
        .then(Op::put("rev/b", "1"))
        .then(Op::put("rev/c", "1"))
        .then(Op::delete("rev/a"));
    assert_eq!(apply(store, three).await.revision, second.next());
    assert_eq!(get(store, "rev/a").await, None);

    for idle in [
        Txn::new().then(Op::get("rev/b")),
        Txn::new().then(Op::delete("rev/none")),
        Txn::new().then(Op::delete_prefix("rev/none/")),
        Txn::new().when(Compare::absent("rev/b")).then(Op::put("rev/b", "2")),
    ] {
        assert_eq!(apply(store, idle).await.revision, second.next());
    }
    assert_eq!(revision(store).await, second.next());

    let again = put(store, "rev/a", "3").await;
    let recreated = get(store, "rev/a").await.expect("just put");
    assert_eq!(recreated.create_revision, again, "a deleted key starts anew");
    assert_eq!(recreated.version, 1);
}

/// Every kind of compare is true and false where it should be.
pub async fn compares_decide(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let created = put(store, "cmp/k", "1").await;
    let modified = put(store, "cmp/k", "2").await;
    let none = Revision(0);
    let cases = [
        (Compare::absent("cmp/k"), false),
        (Compare::absent("cmp/none"), true),
        (Compare::present("cmp/k"), true),
        (Compare::present("cmp/none"), false),
        (Compare::mod_revision("cmp/k", modified), true),
        (Compare::mod_revision("cmp/k", created), false),
        (Compare::mod_revision("cmp/none", none), true),
        (Compare::mod_revision("cmp/k", none), false),
        (Compare::create_revision("cmp/k", created), true),
        (Compare::create_revision("cmp/k", modified), false),
        (Compare::create_revision("cmp/none", none), true),
        (Compare::value("cmp/k", "2"), true),
        (Compare::value("cmp/k", "1"), false),
        (Compare::value("cmp/none", ""), false),
    ];
    for (compare, expected) in cases {
        let txn = Txn::new().when(compare.clone()).then(Op::get("cmp/k"));
        assert_eq!(apply(store, txn).await.succeeded, expected, "{compare:?}");
        // One that fails decides, wherever it stands.
        let both = Txn::new().when(Compare::present("cmp/k")).when(compare.clone());
        let both = both.when(Compare::present("cmp/k")).then(Op::get("cmp/k"));
        assert_eq!(apply(store, both).await.succeeded, expected, "{compare:?}");
    }
    assert!(apply(store, Txn::new().then(Op::get("cmp/k"))).await.succeeded);
    let read = get(store, "cmp/k").await;
    let unchanged = Compare::unchanged("cmp/k", read.as_ref());
    let swap = Txn::new().when(unchanged).then(Op::put("cmp/k", "3"));
    assert!(apply(store, swap.clone()).await.succeeded);
    assert!(!apply(store, swap).await.succeeded, "the second swap saw the first");
}

/// One branch is done as a whole, in order; its results line up with its operations.
pub async fn a_branch_is_atomic_and_in_order(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    put(store, "br/old", "0").await;
    put(store, "br/dir/1", "x").await;
    put(store, "br/dir/2", "x").await;
    let txn = Txn::new()
        .then(Op::get("br/new"))
        .then(Op::put("br/new", "1"))
        .then(Op::get("br/new"))
        .then(Op::delete("br/old"))
        .then(Op::delete("br/none"))
        .then(Op::delete_prefix("br/dir/"))
        .then(Op::get("br/dir/1"))
        .otherwise(Op::put("br/wrong", "1"));
    let outcome = apply(store, txn).await;
    assert!(outcome.succeeded);
    let [absent, set, seen, gone, nothing, dir, after] = &outcome.results[..] else {
        panic!("7 operations, {} results", outcome.results.len());
    };
    assert_eq!((absent, set), (&OpResult::Got(None), &OpResult::Put));
    let OpResult::Got(Some(seen)) = seen else {
        panic!("a read does not see the write before it: {seen:?}");
    };
    assert_eq!(&seen.value[..], b"1");
    assert_eq!(seen.mod_revision, outcome.revision);
    assert_eq!((gone, nothing), (&OpResult::Deleted(1), &OpResult::Deleted(0)));
    assert_eq!((dir, after), (&OpResult::Deleted(2), &OpResult::Got(None)));
    assert_eq!(read(store, "br/wrong").await, None);

    let otherwise = Txn::new()
        .when(Compare::absent("br/new"))
        .then(Op::put("br/wrong", "1"))
        .otherwise(Op::get("br/new"))
        .otherwise(Op::put("br/else", "1"));
    let outcome = apply(store, otherwise).await;
    assert!(!outcome.succeeded);
    assert_eq!(outcome.got(0).map(|kv| &kv.value[..]), Some(&b"1"[..]));
    assert_eq!(read(store, "br/wrong").await, None);
    assert_eq!(read(store, "br/else").await.as_deref(), Some("1"));
}

/// What exceeds a limit is refused before it does anything; what just fits is taken.
pub async fn limits_are_refused(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let before = revision(store).await;
    let puts = |n: usize| (0..n).fold(Txn::new(), |t, i| t.then(Op::put(format!("lim/{i}"), "1")));
    let sized = |bytes: usize| Txn::new().then(Op::put("lim/big", vec![7u8; bytes]));
    for refused in [
        puts(TXN_OPS_MAX + 1),
        sized(TXN_BYTES_MAX),
        Txn::new().then(Op::put("", "1")),
        Txn::new().then(Op::put("lim/a", "1")).then(Op::put("lim/a", "2")),
    ] {
        let what = refused.describe();
        let error = within("txn", store.txn(refused)).await.expect_err(&what);
        assert!(matches!(error, StoreError::Invalid { .. }), "{what}: {error}");
    }
    assert_eq!(revision(store).await, before, "a refused write changed something");
    assert_eq!(apply(store, puts(TXN_OPS_MAX)).await.revision, before.next());
    let size = TXN_BYTES_MAX - "lim/big".len();
    apply(store, sized(size)).await;
    let big = get(store, "lim/big").await.expect("just put");
    assert_eq!(big.value.len(), size);
    assert!(big.value.iter().all(|b| *b == 7));
}

/// A listing holds exactly the keys that start with the prefix, in byte order.
pub async fn a_prefix_is_a_prefix(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let keys =
        ["pre", "pre.", "pre/", "pre/a", "pre/a/b", "pre/b", "pre/\u{10ffff}", "pre/ä", "pre0"];
    for key in keys {
        put(store, key, key).await;
    }
    let list = async |prefix: &str| -> Vec<String> {
        let listing = within("range", store.range(prefix)).await.expect("range");
        listing.items.into_iter().map(|kv| kv.key).collect()
    };
    assert_eq!(
        list("pre/").await,
        ["pre/", "pre/a", "pre/a/b", "pre/b", "pre/ä", "pre/\u{10ffff}"]
    );
    assert_eq!(list("pre/a").await, ["pre/a", "pre/a/b"]);
    assert_eq!(list("pre/\u{10ffff}").await, ["pre/\u{10ffff}"]);
    assert_eq!(list("pre").await.len(), keys.len());
    assert_eq!(list("").await.len(), keys.len());
    assert_eq!(list("qre").await, [""; 0]);
    let deleted = apply(store, Txn::new().then(Op::delete_prefix("pre/a"))).await;
    assert_eq!(deleted.results, [OpResult::Deleted(2)]);
    assert_eq!(list("pre/").await.len(), 4);
}

/// Two keys that always change together are never listed apart, and the listing's revision is
/// the one that they were changed at or a later one.
pub async fn a_listing_is_one_moment(subject: &impl Subject) {
    const WRITES: u32 = 60;
    let store = subject.direct();
    let writer = Arc::clone(&store);
    let writing = tokio::spawn(async move {
        for i in 0..WRITES {
            let value = i.to_string();
            let txn = Txn::new()
                .then(Op::put("one/left", value.clone()))
                .then(Op::put("one/right", value));
            apply(writer.as_ref(), txn).await;
        }
    });
    let mut seen = Revision(0);
    loop {
        let done = writing.is_finished();
        let listing = within("range", store.range("one/")).await.expect("range");
        assert!(listing.revision >= seen, "a later listing is older");
        seen = listing.revision;
        match &listing.items[..] {
            [] => {}
            [left, right] => {
                assert_eq!(left.value, right.value);
                assert_eq!(left.mod_revision, right.mod_revision);
                assert!(left.mod_revision <= listing.revision);
            }
            other => panic!("half a transaction was listed: {other:?}"),
        }
        if done {
            assert_eq!(&listing.items[0].value[..], (WRITES - 1).to_string().as_bytes());
            break;
        }
    }
    writing.await.expect("the writer");
}

/// A listing beyond one page or one message is whole.
pub async fn a_large_listing_is_whole(subject: &impl Subject) {
    const KEYS: usize = 1_500;
    const VALUE_BYTES: usize = 4_096;
    let store = subject.direct();
    let keys: Vec<String> = (0..KEYS).map(|i| format!("large/{i:05}")).collect();
    for chunk in keys.chunks(100) {
        let txn = chunk.iter().fold(Txn::new(), |t, k| {
            t.then(Op::put(k.clone(), vec![k.as_bytes()[10]; VALUE_BYTES]))
        });
        apply(store.as_ref(), txn).await;
    }
    let listing = within("range", store.range("large/")).await.expect("range");
    assert_eq!(listing.items.len(), KEYS);
    for (kv, key) in listing.items.iter().zip(&keys) {
        assert_eq!(&kv.key, key);
        assert_eq!(kv.value.len(), VALUE_BYTES);
        assert_eq!(kv.value[0], key.as_bytes()[10]);
    }
    // The same through a watch from before: one event each.
    let from = listing.items[0].mod_revision;
    let mut watch = within("watch", store.watch("large/", from)).await.expect("watch");
    let events = super::take(&mut watch, KEYS).await.expect("events");
    assert_eq!(events.len(), KEYS);
}

/// Counters raised by compare-and-swap from many sides end at the number of raises.
pub async fn concurrent_counters_lose_nothing(subject: &impl Subject) {
    const TASKS: u64 = 8;
    const RAISES: u64 = 15;
    let store = subject.direct();
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let mut lost_races = 0;
            for _ in 0..RAISES {
                loop {
                    let read = get(store.as_ref(), "count").await;
                    let now: u64 = read.as_ref().map_or(0, |kv| {
                        std::str::from_utf8(&kv.value).expect("utf-8").parse().expect("number")
                    });
                    // So that others get in between even where the store never waits.
                    tokio::task::yield_now().await;
                    let txn = Txn::new()
                        .when(Compare::unchanged("count", read.as_ref()))
                        .then(Op::put("count", (now + 1).to_string()));
                    if apply(store.as_ref(), txn).await.succeeded {
                        break;
                    }
                    lost_races += 1;
                }
            }
            lost_races
        });
    }
    let lost_races: u64 = tasks.join_all().await.into_iter().sum();
    let end = get(store.as_ref(), "count").await.expect("the counter");
    assert_eq!(&end.value[..], (TASKS * RAISES).to_string().as_bytes());
    assert_eq!(end.version, TASKS * RAISES);
    assert!(lost_races > 0, "the tasks never met: this test shows nothing");
}
