//! Watches: order, wholeness, compaction, and the watcher that outlives them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::{PATIENCE, Subject, apply, put, show, take, within};
use crate::store::{
    Change, Event, Mirror, Op, Revision, Store, StoreError, Txn, WatchStream, Watcher,
    WatcherOptions,
};

async fn watch(store: &dyn Store, prefix: &str, from: Revision) -> WatchStream {
    let opened = within("watch", store.watch(prefix, from)).await;
    opened.unwrap_or_else(|e| panic!("watch {prefix} from {from}: {e}"))
}

async fn now(store: &dyn Store) -> Revision {
    within("revision", store.revision()).await.expect("revision")
}

/// Opens a watch that must fail, be it at once or as its first item.
async fn refused(store: &dyn Store, prefix: &str, from: Revision) -> StoreError {
    match within("watch", store.watch(prefix, from)).await {
        Err(error) => error,
        Ok(mut stream) => match take(&mut stream, 1).await {
            Err(error) => error,
            Ok(events) => panic!("watch from {from} went on with {}", show(&events[0])),
        },
    }
}

/// Under concurrent writers, a watch from before, one from the middle and one from afterwards see
/// the same changes: every one, once, in order, and none of another prefix.
pub async fn a_watch_sees_all_in_order(subject: &impl Subject) {
    const WRITERS: usize = 4;
    const WRITES: usize = 40;
    const EVENTS: usize = WRITERS * WRITES;
    let store = subject.direct();
    let start = now(store.as_ref()).await.next();
    let mut live = watch(store.as_ref(), "order/", start).await;
    let mut writers = JoinSet::new();
    for w in 0..WRITERS {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            let mut written = Vec::new();
            for i in 0..WRITES {
                let key = format!("order/{w}/{}", i % 5);
                let at = if i % 7 == 6 {
                    let txn = Txn::new().then(Op::delete(key.clone()));
                    apply(store.as_ref(), txn).await.revision
                } else {
                    put(store.as_ref(), &key, &i.to_string()).await
                };
                put(store.as_ref(), &format!("order-not/{w}"), "noise").await;
                written.push(at);
            }
            written
        });
    }
    let first = take(&mut live, EVENTS / 2).await.expect("live events");
    let middle = first[first.len() - 1].revision;
    let mut halfway = watch(store.as_ref(), "order/", middle.next()).await;
    let rest = take(&mut live, EVENTS - first.len()).await.expect("live events");
    let rest_again = take(&mut halfway, EVENTS - first.len()).await.expect("events");
    let written: BTreeSet<Revision> = writers.join_all().await.into_iter().flatten().collect();
    assert_eq!(rest, rest_again, "two watches differ");
    let all: Vec<Event> = first.into_iter().chain(rest).collect();
    let seen: Vec<Revision> = all.iter().map(|e| e.revision).collect();
    assert_eq!(seen, written.iter().copied().collect::<Vec<_>>(), "gap or repetition");
    assert!(all.iter().all(|e| e.key().starts_with("order/")));
    let mut late = watch(store.as_ref(), "order/", start).await;
    assert_eq!(take(&mut late, EVENTS).await.expect("events"), all);
}

/// All changes of one transaction come in one batch.
pub async fn a_watch_never_splits_a_revision(subject: &impl Subject) {
    use futures::StreamExt;
    const KEYS: usize = 100;
    let store = subject.direct();
    let start = now(store.as_ref()).await.next();
    let mut stream = watch(store.as_ref(), "split/", start).await;
    for round in 0..5 {
        let txn = (0..KEYS)
            .fold(Txn::new(), |t, i| t.then(Op::put(format!("split/{i:03}"), format!("{round}"))));
        apply(store.as_ref(), txn).await;
    }
    let mut seen = 0;
    while seen < 5 * KEYS {
        let batch = within("watch", stream.next()).await.expect("open").expect("batch");
        assert_eq!(batch.events.len() % KEYS, 0, "a revision was split");
        seen += batch.events.len();
    }
    assert_eq!(seen, 5 * KEYS);
}

/// A watch from the past tells it as it was: values, deletions, versions.
pub async fn a_watch_of_the_past_replays_it(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let a = put(store, "past/k", "1").await;
    let b = put(store, "past/k", "2").await;
    let c = apply(store, Txn::new().then(Op::delete("past/k"))).await.revision;
    let d = put(store, "past/k", "3").await;
    let expected = [
        format!("+past/k=1@{a}"),
        format!("+past/k=2@{b}"),
        format!("-past/k@{c}"),
        format!("+past/k=3@{d}"),
    ];
    let mut stream = watch(store, "past/", a).await;
    let events = take(&mut stream, 4).await.expect("events");
    assert_eq!(events.iter().map(show).collect::<Vec<_>>(), expected);
    let mut stream = watch(store, "past/", b.next()).await;
    let events = take(&mut stream, 2).await.expect("events");
    assert_eq!(events.iter().map(show).collect::<Vec<_>>(), expected[2..]);
    let crate::store::EventKind::Put(last) = &events[1].kind else {
        panic!("a put came as something else");
    };
    assert_eq!((last.version, last.create_revision), (1, d));
}

/// What was compacted is refused with the oldest revision kept, and watching from there works.
/// Present values stay, compacting again is no error, compacting the future is one.
pub async fn compaction_is_explicit(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    let first = put(store, "comp/a", "1").await;
    for i in 0..5 {
        put(store, "comp/b", &i.to_string()).await;
    }
    let through = now(store).await;
    let after = put(store, "comp/c", "1").await;
    within("compact", store.compact(through)).await.expect("compact");
    let error = refused(store, "comp/", first).await;
    let StoreError::Compacted { requested, oldest } = error else {
        panic!("not told of the compaction: {error}");
    };
    assert_eq!((requested, oldest), (first, through.next()));
    let mut stream = watch(store, "comp/", oldest).await;
    let events = take(&mut stream, 1).await.expect("events");
    assert_eq!(show(&events[0]), format!("+comp/c=1@{after}"));
    let listing = within("range", store.range("comp/")).await.expect("range");
    assert_eq!(listing.items.len(), 3, "compaction took present values");
    within("compact", store.compact(through)).await.expect("compacting again");
    within("compact", store.compact(first)).await.expect("compacting less");
    let future = now(store).await.next();
    let error = within("compact", store.compact(future)).await.expect_err("compacting the future");
    assert!(matches!(error, StoreError::FutureRevision { .. }), "{error}");
}

/// A deletion at exactly the compacted revision is either delivered or the watch is refused: a
/// consumer that resumes there must not keep a key that is gone.
pub async fn a_delete_at_the_compaction_is_not_lost(subject: &impl Subject) {
    let store = subject.direct();
    let store = store.as_ref();
    put(store, "edge/k", "1").await;
    let deleted = apply(store, Txn::new().then(Op::delete("edge/k"))).await.revision;
    put(store, "edge/later", "1").await;
    within("compact", store.compact(deleted)).await.expect("compact");
    match within("watch", store.watch("edge/", deleted)).await {
        Err(StoreError::Compacted { .. }) => {}
        Err(other) => panic!("{other}"),
        Ok(mut stream) => match take(&mut stream, 1).await {
            Err(StoreError::Compacted { .. }) => {}
            Err(other) => panic!("{other}"),
            Ok(events) => assert_eq!(show(&events[0]), format!("-edge/k@{deleted}")),
        },
    }
}

/// A watch from beyond the next revision is refused: the store is not the one last seen.
pub async fn the_future_is_refused(subject: &impl Subject) {
    let store = subject.direct();
    let next = put(store.as_ref(), "future/k", "1").await.next();
    let error = refused(store.as_ref(), "future/", Revision(next.0 + 10)).await;
    assert!(matches!(error, StoreError::FutureRevision { .. }), "{error}");
    drop(watch(store.as_ref(), "future/", next).await);
}

/// A consumer that does not read while much happens and history is compacted sees all of it, or is
/// told; it never sees a gap.
pub async fn a_slow_consumer_misses_nothing_silently(subject: &impl Subject) {
    const WRITES: usize = 300;
    let store = subject.direct();
    let start = now(store.as_ref()).await.next();
    let mut stream = watch(store.as_ref(), "slow/", start).await;
    for i in 0..WRITES {
        put(store.as_ref(), "slow/k", &i.to_string()).await;
    }
    let through = now(store.as_ref()).await;
    within("compact", store.compact(through)).await.expect("compact");
    let mut expected = start;
    loop {
        match take(&mut stream, 1).await {
            Ok(events) => {
                for event in events {
                    assert_eq!(event.revision, expected, "a gap");
                    expected = expected.next();
                }
                if expected > through {
                    break;
                }
            }
            Err(StoreError::Compacted { oldest, .. }) => {
                assert_eq!(oldest, through.next());
                break;
            }
            Err(other) => panic!("{other}"),
        }
    }
}

fn impatient() -> WatcherOptions {
    WatcherOptions {
        pause_min: Duration::from_millis(10),
        pause_max: Duration::from_millis(100),
        attempts_max: 200,
        silence_max: PATIENCE,
    }
}

/// Follows until the mirror has reached `end`; returns every event with its revision.
async fn follow(watcher: &mut Watcher, mirror: &mut Mirror, end: Revision) -> Vec<String> {
    let mut events = Vec::new();
    while mirror.revision() < end {
        let change = within("watcher", watcher.next()).await.expect("watcher");
        mirror.apply(&change);
        if let Change::Events(fresh) = change {
            events.extend(fresh.iter().map(show));
        }
    }
    events
}

/// While its connection is cut again and again, a watcher reports every change exactly once.
pub async fn a_watcher_survives_cuts(subject: &impl Subject) {
    const CUTS: usize = 4;
    const WRITES: usize = 15;
    let direct = subject.direct();
    let mut watcher = Watcher::with_options(subject.disturbed(), "cuts/", impatient());
    let mut mirror = Mirror::default();
    let first = within("watcher", watcher.next()).await.expect("watcher");
    assert!(matches!(first, Change::Reset(_)), "{first:?}");
    mirror.apply(&first);
    let mut written = Vec::new();
    let mut seen = Vec::new();
    for cut in 0..CUTS {
        let mut last = Revision(0);
        for i in 0..WRITES {
            last = put(direct.as_ref(), "cuts/k", &format!("{cut}.{i}")).await;
            written.push(format!("+cuts/k={cut}.{i}@{last}"));
            if i == WRITES / 2 {
                subject.cut().await;
            }
        }
        subject.restore().await;
        seen.extend(follow(&mut watcher, &mut mirror, last).await);
    }
    assert_eq!(seen, written);
    assert_eq!(watcher.listings(), 1, "a cut is no reason to list again");
}

/// A watcher that was cut off (or did not read) while history was compacted lists again, and ends
/// with the same picture as the store.
pub async fn a_watcher_lists_again_after_compaction(subject: &impl Subject) {
    let direct = subject.direct();
    for key in ["again/stays", "again/goes", "again/changes"] {
        put(direct.as_ref(), key, "old").await;
    }
    let mut watcher = Watcher::with_options(subject.disturbed(), "again/", impatient());
    let mut mirror = Mirror::default();
    let ready = put(direct.as_ref(), "again/ready", "1").await;
    follow(&mut watcher, &mut mirror, ready).await;
    let last = put(direct.as_ref(), "again/ready", "2").await;
    follow(&mut watcher, &mut mirror, last).await;
    assert_eq!(mirror.len(), 4);

    subject.cut().await;
    apply(direct.as_ref(), Txn::new().then(Op::delete("again/goes"))).await;
    put(direct.as_ref(), "again/changes", "new").await;
    let through = put(direct.as_ref(), "again/comes", "new").await;
    within("compact", direct.compact(through)).await.expect("compact");
    let end = put(direct.as_ref(), "again/after", "new").await;
    subject.restore().await;
    follow(&mut watcher, &mut mirror, end).await;

    assert_eq!(watcher.listings(), 2, "compaction went unnoticed");
    let listing = within("range", direct.range("again/")).await.expect("range");
    assert_eq!(mirror.iter().cloned().collect::<Vec<_>>(), listing.items);
    // And on from there, without a further listing.
    let end = put(direct.as_ref(), "again/after", "newer").await;
    assert_eq!(follow(&mut watcher, &mut mirror, end).await, [format!("+again/after=newer@{end}")]);
    assert_eq!(watcher.listings(), 2);
}
