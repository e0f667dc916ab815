//! Who did what: one JSON line per change that someone asked for, appended and never rewritten.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use drumline_types::Clock;
use serde::Serialize;

/// Bytes after which the file is set aside as `audit.jsonl.1`, replacing the one before.
const FILE_MAX: u64 = 64 << 20;

/// One line.
#[derive(Debug, Serialize)]
struct Line<'a> {
    at_ms: u64,
    /// What the caller says who it is; the token decides what it may do.
    user: &'a str,
    /// Where the call came from.
    peer: &'a str,
    action: &'a str,
    jobs: &'a [String],
    /// `ok`, or why it was refused.
    outcome: &'a str,
}

/// The log; without a folder nothing is written.
#[derive(Clone)]
pub(crate) struct AuditLog {
    clock: Arc<dyn Clock>,
    file: Option<Arc<Mutex<(PathBuf, File)>>>,
}

impl AuditLog {
    pub(crate) fn open(folder: Option<&Path>, clock: Arc<dyn Clock>) -> std::io::Result<Self> {
        let file = match folder {
            None => None,
            Some(folder) => {
                std::fs::create_dir_all(folder)?;
                let path = folder.join("audit.jsonl");
                let file = append(&path)?;
                Some(Arc::new(Mutex::new((path, file))))
            }
        };
        Ok(Self { clock, file })
    }

    /// Appends a line. Durable against a crash of this process, not of the machine.
    pub(crate) async fn record(
        &self,
        user: &str,
        peer: &str,
        action: &str,
        jobs: &[String],
        outcome: &str,
    ) {
        let Some(file) = self.file.clone() else { return };
        let at_ms = self.clock.now().0;
        let outcome = crate::convert::cut(outcome, 1024);
        let line = Line { at_ms, user, peer, action, jobs, outcome: &outcome };
        let Ok(mut line) = serde_json::to_vec(&line) else { return };
        line.push(b'\n');
        let written = tokio::task::spawn_blocking(move || write(&file, &line)).await;
        if let Ok(Err(error)) = written {
            tracing::error!(%error, "the audit log cannot be written");
        }
    }
}

fn append(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

fn write(file: &Mutex<(PathBuf, File)>, line: &[u8]) -> std::io::Result<()> {
    let mut guard = file.lock().unwrap_or_else(PoisonError::into_inner);
    let (path, file) = &mut *guard;
    if file.metadata()?.len() + line.len() as u64 > FILE_MAX {
        std::fs::rename(&*path, path.with_extension("jsonl.1"))?;
        *file = append(path)?;
    }
    // One write, so that lines of two processes never mix.
    file.write_all(line)
}
