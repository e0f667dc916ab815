//! Reads rank logs by offset, to the end or as they grow.

use std::io::SeekFrom;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drumline_wire::v1;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::{mpsc, watch};

/// Bytes in one message.
const CHUNK: usize = 64 << 10;
/// How often a followed log is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Returns where a rank's log is.
#[must_use]
pub fn path(state_dir: &Path, job: &str, attempt: u32, rank: u32) -> PathBuf {
    attempt_dir(state_dir, job, attempt).join(format!("rank-{rank}.log"))
}

/// Returns the folder of one attempt's logs and spec on this node.
#[must_use]
pub fn attempt_dir(state_dir: &Path, job: &str, attempt: u32) -> PathBuf {
    state_dir.join("ranks").join(job).join(attempt.to_string())
}

/// Returns the newest attempt of the job that this node has a log of `rank` for.
#[must_use]
pub fn newest_attempt(state_dir: &Path, job: &str, rank: u32) -> Option<u32> {
    let attempts = std::fs::read_dir(state_dir.join("ranks").join(job)).ok()?;
    attempts
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|attempt| path(state_dir, job, *attempt, rank).is_file())
        .max()
}

/// Sends a log's bytes from `read.offset` on; when following, until `ended` is true and all was
/// sent. Every request ends with one message whose `end` or `error` is set, unless the link goes
/// away first.
pub async fn stream(
    read: v1::ReadLog,
    file: PathBuf,
    mut ended: watch::Receiver<bool>,
    link: mpsc::Sender<v1::AgentUp>,
) {
    let request = read.request;
    let message = |offset, data, end, error| v1::AgentUp {
        kind: Some(v1::agent_up::Kind::Log(v1::LogData { request, offset, data, end, error })),
    };
    if let Err(error) = send_all(&read, &file, &mut ended, &link, message).await {
        let text = format!("log {} of rank {}: {error}", read.job, read.rank);
        let _ = link.send(message(read.offset, Vec::new(), true, text)).await;
    }
}

async fn send_all(
    read: &v1::ReadLog,
    file: &Path,
    ended: &mut watch::Receiver<bool>,
    link: &mpsc::Sender<v1::AgentUp>,
    message: impl Fn(u64, Vec<u8>, bool, String) -> v1::AgentUp,
) -> std::io::Result<()> {
    let mut log = tokio::fs::File::open(file).await?;
    let length = log.metadata().await?.len();
    let mut offset = read.offset;
    if read.tail_bytes > 0 {
        offset = offset.max(length.saturating_sub(read.tail_bytes));
    }
    log.seek(SeekFrom::Start(offset)).await?;
    let mut buffer = vec![0; CHUNK];
    loop {
        // Asked before reading: what was written before the end is then surely read.
        let over = *ended.borrow_and_update() || ended.has_changed().is_err();
        let count = log.read(&mut buffer).await?;
        if count > 0 {
            let data = buffer[..count].to_vec();
            if link.send(message(offset, data, false, String::new())).await.is_err() {
                return Ok(());
            }
            offset += count as u64;
        } else if over || !read.follow {
            let _ = link.send(message(offset, Vec::new(), true, String::new())).await;
            return Ok(());
        } else {
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                _ = ended.changed() => {}
                () = link.closed() => return Ok(()),
            }
        }
    }
}
