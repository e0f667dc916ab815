//! An embedded store whose process is killed keeps every acknowledged write.
//!
//! The test runs itself as a child process that makes numbered transactions and prints each
//! acknowledgement; the parent kills it with SIGKILL at a random moment, reopens, and compares.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_ports::store::{Compare, EventKind, Op, Revision, Store, Txn};
use drumline_store::embedded::{EmbeddedOptions, EmbeddedStore};
use futures::StreamExt;

/// Set for the child: where its store lies.
const CHILD: &str = "DRUMLINE_KILL_TEST_STORE";
const KILLS: u64 = 25;
const WRITERS: u64 = 8;

/// History is kept short, so that kills also hit the compaction that the store does by itself.
fn options() -> EmbeddedOptions {
    EmbeddedOptions { history_revisions: 500, ..EmbeddedOptions::default() }
}

/// The child's whole life: each writer counts its key up, and acknowledges on standard output.
async fn write_until_killed(path: &Path) {
    let store = Arc::new(EmbeddedStore::open(path, &options()).expect("opens"));
    let lease = store.lease_grant(Duration::from_secs(600)).await.expect("lease");
    let writers = (0..WRITERS).map(|writer| {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            let key = format!("k/{writer}");
            loop {
                let read = store.get(&key).await.expect("get");
                let next = read.as_ref().map_or(0, |kv| kv.version) + 1;
                let txn = Txn::new()
                    .when(Compare::unchanged(&key, read.as_ref()))
                    .then(Op::put(&key, next.to_string()))
                    // The second half of the transaction: it must never be seen without the first.
                    .then(Op::put_leased(format!("twin/{writer}"), next.to_string(), lease.id));
                let outcome = store.txn(txn).await.expect("txn");
                assert!(outcome.succeeded, "nobody else writes {key}");
                let mut out = std::io::stdout().lock();
                writeln!(out, "ack {writer} {next} {}", outcome.revision).expect("a pipe");
                out.flush().expect("a pipe");
            }
        })
    });
    futures::future::join_all(writers).await;
}

/// Not a test of its own: what the child runs. Does nothing unless told where.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    if let Some(path) = std::env::var_os(CHILD) {
        write_until_killed(Path::new(&path)).await;
    }
}

/// Runs the child for about `lifetime` after its first acknowledgement, kills it, and returns the
/// last acknowledged number and revision of each writer.
fn run_and_kill(path: &Path, lifetime: Duration) -> BTreeMap<u64, (u64, u64)> {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
        .env(CHILD, path)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("the child starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut acks = BTreeMap::new();
    let mut kill_at = None;
    let mut killed = false;
    // After the kill, what is still in the pipe was acknowledged too.
    while let Some(Ok(line)) = lines.next() {
        let Some(ack) = line.split("ack ").nth(1) else {
            continue;
        };
        let numbers: Vec<u64> = ack.split(' ').map_while(|n| n.parse().ok()).collect();
        let [writer, number, revision] = numbers[..] else {
            assert!(killed, "a garbled line: {line}");
            continue;
        };
        acks.insert(writer, (number, revision));
        let at = *kill_at.get_or_insert_with(|| Instant::now() + lifetime);
        if !killed && Instant::now() >= at {
            child.kill().expect("the child runs");
            killed = true;
        }
    }
    let status = child.wait().expect("the child ends");
    assert!(killed && !status.success(), "the child ended by itself: {status}");
    acks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_sigkill() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("store.redb");
    let mut revision_before = Revision(0);
    let mut total = 0;
    for round in 0..KILLS {
        // Spread over the phases of a commit; odd numbers so that no rhythm repeats.
        let lifetime = Duration::from_micros(1_000 + (round * 7_919 + 37) % 60_000);
        let acks = tokio::task::block_in_place(|| run_and_kill(&path, lifetime));
        let store =
            EmbeddedStore::open(&path, &options()).unwrap_or_else(|e| panic!("round {round}: {e}"));
        let revision = store.revision().await.expect("revision");
        assert!(revision >= revision_before, "round {round}: the revision went back");
        for (writer, (number, acked_at)) in &acks {
            let found = store.get(&format!("k/{writer}")).await.expect("get");
            let found = found.unwrap_or_else(|| panic!("round {round}: k/{writer} is gone"));
            assert!(
                found.version >= *number && found.mod_revision.0 >= *acked_at,
                "round {round}: writer {writer} was told {number} at {acked_at}, found {} at {}",
                found.version,
                found.mod_revision
            );
            assert_eq!(found.value, found.version.to_string(), "round {round}");
            let twin = store.get(&format!("twin/{writer}")).await.expect("get").expect("twin");
            assert_eq!(twin.value, found.value, "round {round}: half a transaction");
            assert_eq!(twin.mod_revision, found.mod_revision);
            assert!(revision.0 >= *acked_at);
            total += 1;
        }
        history_is_whole(&store, revision).await;
        revision_before = revision;
    }
    assert!(total >= KILLS, "hardly anything was acknowledged: this test shows nothing");
}

/// What history is left has every revision once (each transaction writes at least one key), and
/// ends at the present values.
async fn history_is_whole(store: &EmbeddedStore, revision: Revision) {
    let oldest = match store.watch("", Revision(1)).await {
        Ok(_) => Revision(2),
        Err(drumline_ports::store::StoreError::Compacted { oldest, .. }) => oldest,
        Err(error) => panic!("{error}"),
    };
    if oldest > revision {
        return;
    }
    let mut watch = store.watch("", oldest).await.expect("history is kept from there");
    let mut expected = oldest;
    let mut last = BTreeMap::new();
    while expected <= revision {
        let batch = watch.next().await.expect("open").expect("batch");
        for event in batch.events {
            assert!(
                event.revision == expected || event.revision.next() == expected,
                "revision {expected} is missing, found {}",
                event.revision
            );
            expected = event.revision.next();
            if let EventKind::Put(kv) = event.kind {
                last.insert(kv.key.clone(), kv);
            }
        }
    }
    for (key, kv) in last {
        assert_eq!(store.get(&key).await.expect("get"), Some(kv));
    }
}
