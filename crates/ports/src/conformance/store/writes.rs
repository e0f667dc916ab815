//! Writes whose acknowledgement or request is lost.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{Loss, PATIENCE, Subject, put, read, within};
use crate::store::{Compare, Op, StoreError, Txn, WriteError, Writer};

async fn writer(subject: &impl Subject, slots: usize) -> Writer {
    let opened = Writer::open(subject.disturbed(), "writers", "w", slots, PATIENCE);
    within("writer", opened).await.expect("writer")
}

/// A bare write with a lost acknowledgement says "unknown", and was applied; with a lost request
/// it says the same, and was not.
pub async fn a_lost_ack_is_unknown(subject: &impl Subject) {
    let store = subject.disturbed();
    put(store.as_ref(), "lost/warm", "1").await;
    for (loss, key, expected) in
        [(Loss::Ack, "lost/ack", Some("1")), (Loss::Request, "lost/request", None)]
    {
        subject.lose_next(loss);
        let txn = Txn::new().then(Op::put(key, "1"));
        let error = within("txn", store.txn(txn)).await.expect_err("the answer was lost");
        assert!(matches!(error, StoreError::Unknown { .. }), "{loss:?}: {error}");
        // A lost request must not turn up late either.
        sleep(Duration::from_millis(200)).await;
        let found = read(subject.direct().as_ref(), key).await;
        assert_eq!(found.as_deref(), expected, "{loss:?}");
    }
    put(store.as_ref(), "lost/after", "1").await;
}

/// A writer settles every loss by itself: the write is applied exactly once, and the revision
/// that it reports is the right one.
pub async fn a_settled_write_survives_any_loss(subject: &impl Subject) {
    let direct = subject.direct();
    let writer = writer(subject, 1).await;
    for (i, loss) in
        [None, Some(Loss::Ack), Some(Loss::Request), Some(Loss::Ack)].into_iter().enumerate()
    {
        if let Some(loss) = loss {
            subject.lose_next(loss);
        }
        let key = format!("settled/{i}");
        let txn = Txn::new().when(Compare::absent(&key)).then(Op::put(&key, "1"));
        let outcome = within("write", writer.txn(txn)).await.expect("settled");
        assert!(outcome.succeeded, "{loss:?}: its own first attempt stood in its way");
        let found = within("get", direct.get(&key)).await.expect("get").expect("written");
        assert_eq!(found.version, 1, "{loss:?}: applied twice");
        assert_eq!(found.mod_revision, outcome.revision, "{loss:?}");
    }
    let refused = Txn::new().when(Compare::absent("settled/0")).then(Op::put("settled/x", "1"));
    subject.lose_next(Loss::Ack);
    let refused = refused.otherwise(Op::get("settled/0"));
    let outcome = within("write", writer.txn(refused)).await.expect("settled");
    assert!(!outcome.succeeded);
    assert_eq!(outcome.results.len(), 1);
    assert!(outcome.got(0).is_some(), "a failed compare still reads");
    assert_eq!(read(direct.as_ref(), "settled/x").await, None);
}

/// Several tasks raise counters through one writer while acknowledgements get lost: each raise
/// that was reported counts exactly once.
pub async fn settled_counters_count_exactly(subject: &impl Subject) {
    const TASKS: usize = 3;
    const RAISES: u64 = 8;
    let direct = subject.direct();
    let writer = Arc::new(writer(subject, TASKS).await);
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (writer, direct) = (Arc::clone(&writer), Arc::clone(&direct));
        tasks.spawn(async move {
            let key = format!("exact/{task}");
            for _ in 0..RAISES {
                let read = within("get", direct.get(&key)).await.expect("get");
                let version = read.as_ref().map_or(0, |kv| kv.version);
                let txn = Txn::new()
                    .when(Compare::unchanged(&key, read.as_ref()))
                    .then(Op::put(&key, (version + 1).to_string()));
                let outcome = within("write", writer.txn(txn)).await.expect("settled");
                assert!(outcome.succeeded, "nobody else writes {key}");
            }
        });
    }
    for loss in [Loss::Ack, Loss::Request, Loss::Ack, Loss::Request] {
        sleep(Duration::from_millis(10)).await;
        subject.lose_next(loss);
    }
    tasks.join_all().await;
    for task in 0..TASKS {
        let key = format!("exact/{task}");
        let end = within("get", direct.get(&key)).await.expect("get").expect("counter");
        assert_eq!(end.version, RAISES);
        assert_eq!(&end.value[..], RAISES.to_string().as_bytes());
    }
}

/// A writer is stopped by the next one of its name; nothing of it is applied any more.
pub async fn a_superseded_writer_is_stopped(subject: &impl Subject) {
    let old = writer(subject, 1).await;
    let first = Txn::new().then(Op::put("super/k", "old"));
    within("write", old.txn(first)).await.expect("alone");
    let new = writer(subject, 1).await;
    let late = Txn::new().then(Op::put("super/k", "late"));
    let error = within("write", old.txn(late)).await.expect_err("superseded");
    assert!(matches!(error, WriteError::Superseded { .. }), "{error}");
    assert_eq!(read(subject.direct().as_ref(), "super/k").await.as_deref(), Some("old"));
    let next = Txn::new().then(Op::put("super/k", "new"));
    within("write", new.txn(next)).await.expect("the only one left");
}
