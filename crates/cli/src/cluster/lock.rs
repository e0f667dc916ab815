//! The lock on a state folder: one cluster at a time, and the second is told whose it is.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{FlockOperation, flock};

use crate::state::StateDir;

/// The lock, held until it is dropped; the kernel frees it when the process dies.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held for its lock")] File);

/// Why the lock was not given.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("the state folder {folder} is in use by process {pid}")]
    Held {
        /// The folder.
        folder: String,
        /// The holder's process id, as it wrote it.
        pid: String,
    },
    /// The lock file cannot be used.
    #[error("cannot lock {folder}: {source}")]
    Io {
        /// The folder.
        folder: String,
        /// The system's words.
        source: io::Error,
    },
}

impl Lock {
    /// Takes the lock, or says who has it.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take(state: &StateDir) -> Result<Self, LockError> {
        let folder = state.path().display().to_string();
        let failed = |source| LockError::Io { folder: folder.clone(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(state.lock_file())
            .map_err(failed)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            let pid = pid.trim();
            let pid = if pid.is_empty() { "unknown" } else { pid }.to_owned();
            return Err(LockError::Held { folder, pid });
        }
        file.set_len(0).map_err(failed)?;
        file.rewind().map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_names_the_first_holder() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path())).unwrap();
        state.create().unwrap();
        let first = Lock::take(&state).unwrap();
        match Lock::take(&state) {
            Err(LockError::Held { pid, .. }) => assert_eq!(pid, std::process::id().to_string()),
            other => panic!("{other:?}"),
        }
        drop(first);
        assert!(Lock::take(&state).is_ok());
    }
}
