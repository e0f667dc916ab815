//! The file of an embedded store: locked, damaged, reopened, bounded.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use drumline_ports::store::{Change, Op, Revision, Store, StoreError, Txn, Watcher};
use drumline_store::embedded::{EmbeddedOpenError, EmbeddedOptions, EmbeddedStore};
use drumline_store::{OpenOptions, open};
use futures::StreamExt;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("store.redb")
    }
}

fn opened(path: &Path) -> EmbeddedStore {
    EmbeddedStore::open(path, &EmbeddedOptions::default()).expect("opens")
}

fn put(key: &str, value: &str) -> Txn {
    Txn::new().then(Op::put(key, value.to_owned()))
}

fn refused(path: &Path) -> EmbeddedOpenError {
    let error = EmbeddedStore::open(path, &EmbeddedOptions::default()).err().expect("refused");
    let message = error.to_string();
    assert!(message.contains(&path.display().to_string()), "no path in: {message}");
    assert!(message.contains(';'), "no remedy in: {message}");
    error
}

#[tokio::test]
async fn a_store_in_use_is_refused() {
    let folder = Folder::new();
    let store = opened(&folder.file());
    assert!(matches!(refused(&folder.file()), EmbeddedOpenError::Locked { .. }));
    drop(store);
    opened(&folder.file());
}

#[tokio::test]
async fn another_kind_of_file_is_refused_and_left_alone() {
    let folder = Folder::new();
    let text = "this is no state store\n".repeat(1000);
    std::fs::write(folder.file(), &text).expect("written");
    assert!(matches!(refused(&folder.file()), EmbeddedOpenError::Corrupt { .. }));
    assert_eq!(std::fs::read_to_string(folder.file()).expect("read"), text);
}

#[tokio::test]
async fn a_damaged_or_cut_file_is_refused() {
    let folder = Folder::new();
    let store = opened(&folder.file());
    for i in 0..200 {
        store.txn(put(&format!("k/{i}"), &"marker-".repeat(100))).await.expect("put");
    }
    drop(store);
    let good = std::fs::read(folder.file()).expect("read");
    let needle = b"marker-marker-";
    let places: Vec<usize> = good
        .windows(needle.len())
        .enumerate()
        .filter(|(_, w)| w == needle)
        .map(|(i, _)| i)
        .collect();
    let middle = places[places.len() / 2];
    // Some copies lie in pages that are free by now, where damage does no harm: damage them all.
    let mut damaged = good.clone();
    for place in places {
        damaged[place] ^= 0x20;
    }
    for bad in [damaged, good[..middle].to_vec()] {
        std::fs::write(folder.file(), bad).expect("written");
        assert!(matches!(refused(&folder.file()), EmbeddedOpenError::Corrupt { .. }));
    }
    std::fs::write(folder.file(), good).expect("written");
    assert_eq!(opened(&folder.file()).range("k/").await.expect("range").items.len(), 200);
}

#[tokio::test]
async fn a_path_that_cannot_be_is_refused() {
    let folder = Folder::new();
    std::fs::write(folder.0.path().join("file"), "x").expect("written");
    let error = refused(&folder.0.path().join("file/store.redb"));
    assert!(matches!(error, EmbeddedOpenError::Io { .. }), "{error}");
    let error = refused(folder.0.path());
    assert!(matches!(error, EmbeddedOpenError::Io { .. }), "{error}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_state_folder_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    let state = folder.0.path().join("new/state");
    opened(&state.join("store.redb"));
    let mode = std::fs::metadata(&state).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test]
async fn everything_is_there_after_reopening() {
    let folder = Folder::new();
    let store = opened(&folder.file());
    let first = store.txn(put("a", "1")).await.expect("put").revision;
    store.txn(put("a", "2")).await.expect("put");
    let last = store.txn(Txn::new().then(Op::delete("a")).then(Op::put("b", "1"))).await;
    let last = last.expect("txn").revision;
    drop(store);

    let store = opened(&folder.file());
    assert_eq!(store.revision().await.expect("revision"), last);
    let mut watch = store.watch("", first).await.expect("history is kept");
    let batch = watch.next().await.expect("open").expect("batch");
    assert_eq!(batch.events.len(), 4);
    assert_eq!(store.txn(put("c", "1")).await.expect("put").revision, last.next());
}

#[tokio::test]
async fn leases_outlive_the_process_and_then_expire() {
    let folder = Folder::new();
    // A few writes must fit into it, on a disk that others use too.
    let ttl = Duration::from_secs(2);
    let store = opened(&folder.file());
    let lease = store.lease_grant(ttl).await.expect("lease").id;
    let txn = Txn::new().then(Op::put_leased("leased", "1", lease));
    store.txn(txn).await.expect("put");
    drop(store);
    // While nobody runs, nobody can renew: the time away does not count.
    tokio::time::sleep(ttl + Duration::from_millis(200)).await;
    let store = opened(&folder.file());
    assert!(store.get("leased").await.expect("get").is_some());
    assert_eq!(store.lease_keep_alive(lease).await, Ok(ttl));
    let next = store.revision().await.expect("revision").next();
    let mut watch = store.watch("leased", next).await.expect("watch");
    let gone = tokio::time::timeout(ttl * 30, watch.next()).await;
    gone.expect("expires").expect("open").expect("batch");
    assert!(store.get("leased").await.expect("get").is_none());
    let another = store.lease_grant(ttl).await.expect("lease").id;
    assert_ne!(another, lease, "ids are not used again");
}

#[tokio::test]
async fn history_keeps_to_its_bounds_by_itself() {
    for (options, writes, value) in [
        (EmbeddedOptions { history_revisions: 50, ..EmbeddedOptions::default() }, 300, 10),
        (EmbeddedOptions { history_bytes: 100_000, ..EmbeddedOptions::default() }, 300, 2_000),
    ] {
        let folder = Folder::new();
        let store = EmbeddedStore::open(&folder.file(), &options).expect("opens");
        for _ in 0..writes {
            store.txn(put("k", &"x".repeat(value))).await.expect("put");
        }
        let newest = store.revision().await.expect("revision");
        let error = store.watch("", Revision(2)).await.err().expect("compacted by itself");
        let StoreError::Compacted { oldest, .. } = error else {
            panic!("{error}");
        };
        let kept = newest.0 - oldest.0 + 1;
        assert!((10..=60).contains(&kept), "{kept} revisions kept with {options:?}");
        let mut watch = store.watch("", oldest).await.expect("watch");
        let batch = watch.next().await.expect("open").expect("batch");
        assert_eq!(batch.events[0].revision, oldest);
        assert_eq!(store.get("k").await.expect("get").expect("there").version, writes);
    }
}

#[tokio::test]
async fn a_closed_store_ends_its_watches_and_frees_its_file() {
    let folder = Folder::new();
    let store: Arc<dyn Store> = Arc::new(opened(&folder.file()));
    let mut watch = store.watch("", Revision(2)).await.expect("watch");
    drop(store);
    let end = tokio::time::timeout(Duration::from_secs(60), watch.next()).await.expect("ends");
    assert!(matches!(end, Some(Err(StoreError::Unavailable { .. }))), "{end:?}");
    assert!(watch.next().await.is_none());
    opened(&folder.file());
}

#[tokio::test]
async fn a_watcher_is_told_of_a_store_that_went_back_in_time() {
    let folder = Folder::new();
    let store = opened(&folder.file());
    store.txn(put("k", "1")).await.expect("put");
    drop(store);
    let backup = std::fs::read(folder.file()).expect("read");
    let store = opened(&folder.file());
    let last = (0..5).map(|i| put("k", &i.to_string()));
    let mut seen = Revision(0);
    for txn in last {
        seen = store.txn(txn).await.expect("put").revision;
    }
    drop(store);
    std::fs::write(folder.file(), backup).expect("restored");
    let store = opened(&folder.file());
    let error = store.watch("", seen.next()).await.err().expect("from the future");
    assert!(error.needs_listing(), "{error}");
}

#[tokio::test]
async fn an_address_opens_the_store() {
    let folder = Folder::new();
    let address = format!("embedded:{}", folder.file().display());
    let store = open(&address, &OpenOptions::default()).await.expect("opens");
    store.txn(put("k", "1")).await.expect("put");
    let mut watcher = Watcher::new(Arc::clone(&store), "k");
    let Ok(Change::Reset(listing)) = watcher.next().await else {
        panic!("no listing first");
    };
    assert_eq!(listing.items.len(), 1);
    let error = open("sqlite:x", &OpenOptions::default()).await.err().expect("refused").to_string();
    assert!(error.contains("embedded:PATH") && error.contains("etcd://HOST:PORT"), "{error}");
}
