//! Tests the embedded store on a disk that loses power: what was not synced may be there or not.
//!
//! A killed process keeps what the operating system has; a power cut does not. The disk here
//! remembers which writes were not synced, and at the cut keeps a random part of them, in any order.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use drumline_ports::store::{Op, Store, StoreError, Txn};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use redb::{Database, StorageBackend};

use super::{EmbeddedOptions, EmbeddedStore, open};

/// One write that was not synced yet.
#[derive(Debug, Clone)]
enum Pending {
    Write(u64, Vec<u8>),
    SetLen(u64),
}

#[derive(Debug, Default)]
struct Disk {
    /// What survives a cut for sure.
    durable: Vec<u8>,
    /// What the store sees.
    cached: Vec<u8>,
    pending: Vec<Pending>,
    syncs: u64,
    /// Operations until the power goes.
    operations_left: Option<u64>,
}

#[derive(Debug, Clone, Default)]
struct Power(Arc<Mutex<Disk>>);

fn apply(image: &mut Vec<u8>, pending: &Pending) {
    match pending {
        Pending::Write(offset, data) => {
            let start = *offset as usize;
            let end = start + data.len();
            if image.len() < end {
                image.resize(end, 0);
            }
            image[start..end].copy_from_slice(data);
        }
        Pending::SetLen(len) => image.resize(*len as usize, 0),
    }
}

impl Power {
    fn on<T>(&self, operation: impl FnOnce(&mut Disk) -> T) -> io::Result<T> {
        let mut disk = self.0.lock().expect("no panic before");
        match &mut disk.operations_left {
            Some(0) => return Err(io::Error::other("no power")),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(operation(&mut disk))
    }

    fn change(&self, pending: Pending) -> io::Result<()> {
        self.on(|disk| {
            apply(&mut disk.cached, &pending);
            disk.pending.push(pending);
        })
    }

    /// What the disk holds when the power is back.
    fn after_cut(&self, rng: &mut ChaCha8Rng) -> Self {
        let disk = self.0.lock().expect("no panic before");
        let mut image = disk.durable.clone();
        // Some of what was under way made it, in an order of the disk's own: none, half, nearly
        // all, or all of it.
        let percent = [0, 50, 90, 100][rng.next_u32() as usize % 4];
        let mut lucky: Vec<&Pending> = disk.pending.iter().collect();
        lucky.retain(|_| rng.next_u32() % 100 < percent);
        for i in (1..lucky.len()).rev() {
            lucky.swap(i, rng.next_u32() as usize % (i + 1));
        }
        for pending in lucky {
            apply(&mut image, pending);
        }
        Self(Arc::new(Mutex::new(Disk {
            durable: image.clone(),
            cached: image,
            ..Disk::default()
        })))
    }
}

impl StorageBackend for Power {
    fn len(&self) -> io::Result<u64> {
        self.on(|disk| disk.cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.on(|disk| {
            let start = offset as usize;
            let found = disk.cached.get(start..start + out.len());
            found.map(|bytes| out.copy_from_slice(bytes))
        })?
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Pending::SetLen(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.on(|disk| {
            disk.syncs += 1;
            disk.pending.clear();
            disk.durable = disk.cached.clone();
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Pending::Write(offset, data.to_vec()))
    }
}

fn power_on(disk: &Power) -> EmbeddedStore {
    let options = EmbeddedOptions {
        // Short, so that cuts also hit the trimming of history.
        history_revisions: 20,
        cache_bytes: 1 << 20,
        ..EmbeddedOptions::default()
    };
    let database = Database::builder()
        .set_cache_size(options.cache_bytes)
        .set_check_integrity_on_open(true)
        .create_with_backend(disk.clone())
        .expect("the file is whole after a cut");
    open::start(Path::new("disk-under-test"), database, &options).expect("starts")
}

#[tokio::test]
async fn an_acknowledged_write_survives_a_power_cut() {
    const CUTS: u64 = 100;
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut disk = Power::default();
    let (mut acked, mut revision) = (0u64, 0);
    // Whether the last write failed with an unknown outcome, rather than surely not applied.
    let mut unsure = false;
    let mut unsure_and_there = 0;
    for cut in 0..CUTS {
        let store = power_on(&disk);
        let found = store.get("n").await.expect("get");
        let number: u64 = found.map_or(0, |kv| {
            std::str::from_utf8(&kv.value).expect("utf-8").parse().expect("a number")
        });
        // A write of unknown outcome may be there; nothing acknowledged may be missing, and nothing
        // may be there that was reported as surely not applied.
        assert!(
            number == acked || (unsure && number == acked + 1),
            "cut {cut}: acknowledged {acked}, found {number}, unsure: {unsure}"
        );
        unsure_and_there += number - acked;
        acked = number;
        let now = store.revision().await.expect("revision").0;
        assert!(now >= revision, "cut {cut}: the revision went back");
        revision = now;
        {
            let mut state = disk.0.lock().expect("no panic before");
            state.operations_left = Some(u64::from(rng.next_u32() % 150));
        }
        loop {
            let next = (acked + 1).to_string();
            let txn = Txn::new()
                .then(Op::put("n", next))
                .then(Op::put(format!("pad/{}", acked % 7), vec![1u8; 3_000]));
            match store.txn(txn).await {
                Ok(outcome) => {
                    acked += 1;
                    revision = outcome.revision.0;
                }
                Err(error @ (StoreError::Unknown { .. } | StoreError::Unavailable { .. })) => {
                    unsure = error.is_unknown();
                    break;
                }
                Err(other) => panic!("cut {cut}: {other}"),
            }
        }
        // Nothing more is accepted by a store that does not know what its disk holds.
        let late = store.txn(Txn::new().then(Op::put("n", "late"))).await;
        assert!(matches!(late, Err(StoreError::Unavailable { .. })), "{late:?}");
        drop(store);
        disk = disk.after_cut(&mut rng);
    }
    assert!(acked > CUTS, "hardly anything was written: this test shows nothing");
    assert!(unsure_and_there > 0, "no cut hit a commit after its last sync");
}

#[tokio::test]
async fn many_writers_share_a_sync_and_each_write_has_one() {
    const WRITERS: u64 = 64;
    let disk = Power::default();
    let store = Arc::new(power_on(&disk));
    let syncs = || disk.0.lock().expect("no panic before").syncs;
    let put = |i: u64| Txn::new().then(Op::put(format!("k/{i}"), "1"));
    let before = syncs();
    for i in 0..10 {
        store.txn(put(i)).await.expect("put");
    }
    let alone = syncs() - before;
    assert!(alone >= 10, "10 writes one after the other, {alone} syncs");
    let before = syncs();
    let together = (0..WRITERS).map(|i| store.txn(put(i)));
    for outcome in futures::future::join_all(together).await {
        outcome.expect("put");
    }
    let shared = syncs() - before;
    assert!((1..WRITERS / 2).contains(&shared), "{WRITERS} writes at once, {shared} syncs");
}
