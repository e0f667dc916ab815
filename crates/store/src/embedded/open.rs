//! Opens the file of an embedded store, or says what is wrong with it and what would help.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, atomic::AtomicU8};
use std::time::Duration;

use redb::{Database, ReadableTable, StorageError};
use tokio::sync::{Semaphore, watch};

use drumline_ports::store::{LeaseId, Revision};

use super::apply::{Counters, HistoryBound};
use super::tables::{
    COMPACTED, CURRENT, FORMAT, FORMAT_VERSION, HISTORY, HISTORY_BYTES, LEASE_KEYS, LEASES, META,
    NEXT_LEASE, REVISION,
};
use super::worker::Worker;
use super::{EmbeddedOptions, EmbeddedStore, NO_FAULT, Shared};

/// Why an embedded store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedOpenError {
    /// Another process (or this one) has it open.
    #[error(
        "state store {} is in use by another process; stop the other `drumline`, or choose another \
         state folder", .path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file is no state store, or its checksums do not hold.
    #[error(
        "state store {} is corrupt or no state store ({cause}); restore it from a backup, or move it \
         away to start with an empty one (accepted jobs are then lost)", .path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        cause: String,
    },
    /// The file was written by a version with another layout.
    #[error(
        "state store {} has format {found}, this version reads format {FORMAT_VERSION}; use the \
         version of drumline that wrote it", .path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// The operating system refused.
    #[error("state store {} cannot be opened: {source}; check that the folder exists, is writable and \
             has free space", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
}

/// Opens the file and starts the store on it.
pub(super) fn open(
    path: &Path,
    options: &EmbeddedOptions,
) -> Result<EmbeddedStore, EmbeddedOpenError> {
    let refused = |source: io::Error| EmbeddedOpenError::Io { path: path.to_owned(), source };
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty() && !f.exists()) {
        create_private_folder(folder).map_err(refused)?;
    }
    let db = Database::builder()
        .set_cache_size(options.cache_bytes)
        .set_check_integrity_on_open(options.check_on_open)
        .create(path)
        .map_err(|e| explain(path, e.into()))?;
    start(path, db, options)
}

/// Takes over an open database and starts the writer thread.
pub(super) fn start(
    path: &Path,
    db: Database,
    options: &EmbeddedOptions,
) -> Result<EmbeddedStore, EmbeddedOpenError> {
    let (counters, leases) = load(path, &db)?;
    let (committed, _) = watch::channel(Revision(counters.revision));
    let shared = Arc::new(Shared { db, path: path.to_owned(), committed });
    let bound = HistoryBound { revisions: options.history_revisions, bytes: options.history_bytes };
    let worker = Worker::new(Arc::clone(&shared), counters, bound, leases);
    let (queue, requests) = channel();
    let thread = std::thread::Builder::new()
        .name("store-writer".to_owned())
        .spawn(move || worker.run(&requests))
        .map_err(|source| EmbeddedOpenError::Io { path: path.to_owned(), source })?;
    Ok(EmbeddedStore {
        shared,
        queue,
        places: Arc::new(Semaphore::new(options.queue_max.clamp(1, 1 << 20))),
        deadline: options.deadline,
        fault: AtomicU8::new(NO_FAULT),
        thread: Some(thread),
    })
}

#[cfg(unix)]
fn create_private_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    // Manifests may hold what others on the machine should not read.
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

#[cfg(not(unix))]
fn create_private_folder(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)
}

/// Reads the counters and leases; makes the tables of a new store.
fn load(
    path: &Path,
    db: &Database,
) -> Result<(Counters, Vec<(LeaseId, Duration)>), EmbeddedOpenError> {
    let failed = |e: redb::Error| explain(path, e);
    let stored = initialise(db).map_err(failed)?;
    match stored {
        Ok(loaded) => Ok(loaded),
        Err(found) => Err(EmbeddedOpenError::Format { path: path.to_owned(), found }),
    }
}

type Loaded = (Counters, Vec<(LeaseId, Duration)>);

/// An inner error is the format that was found instead of ours.
fn initialise(db: &Database) -> Result<Result<Loaded, u64>, redb::Error> {
    let txn = db.begin_write()?;
    let mut leases = Vec::new();
    let counters = {
        let mut meta = txn.open_table(META)?;
        let found = meta.get(FORMAT)?.map(|v| v.value());
        match found {
            Some(FORMAT_VERSION) => {}
            Some(other) => return Ok(Err(other)),
            None => {
                meta.insert(FORMAT, FORMAT_VERSION)?;
                meta.insert(REVISION, Counters::EMPTY.revision)?;
                meta.insert(COMPACTED, Counters::EMPTY.compacted)?;
                meta.insert(HISTORY_BYTES, Counters::EMPTY.history_bytes)?;
                meta.insert(NEXT_LEASE, Counters::EMPTY.next_lease)?;
            }
        }
        txn.open_table(CURRENT)?;
        txn.open_table(HISTORY)?;
        txn.open_table(LEASE_KEYS)?;
        for entry in txn.open_table(LEASES)?.iter()? {
            let (id, ttl_ms) = entry?;
            leases.push((LeaseId(id.value()), Duration::from_millis(ttl_ms.value())));
        }
        let read = |name: &str, empty: u64| -> Result<u64, StorageError> {
            Ok(meta.get(name)?.map_or(empty, |v| v.value()))
        };
        Counters {
            revision: read(REVISION, Counters::EMPTY.revision)?,
            compacted: read(COMPACTED, Counters::EMPTY.compacted)?,
            history_bytes: read(HISTORY_BYTES, Counters::EMPTY.history_bytes)?,
            next_lease: read(NEXT_LEASE, Counters::EMPTY.next_lease)?,
        }
    };
    txn.commit()?;
    Ok(Ok((counters, leases)))
}

/// Sorts redb's errors by what the reader of the message can do about them.
fn explain(path: &Path, error: redb::Error) -> EmbeddedOpenError {
    let path = path.to_owned();
    match error {
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => {
            EmbeddedOpenError::Locked { path }
        }
        redb::Error::Io(source)
            if !matches!(
                source.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
            ) =>
        {
            EmbeddedOpenError::Io { path, source }
        }
        other => EmbeddedOpenError::Corrupt { path, cause: other.to_string() },
    }
}
