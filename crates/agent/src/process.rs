//! One rank's process, seen from the agent: its supervisor, its log file, its notices.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;

use crate::supervise::{KILL, Notice, TERMINATE};

/// What to start.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The `drumline` binary, which holds the supervisor.
    pub supervisor: PathBuf,
    /// Program and arguments of the rank.
    pub argv: Vec<String>,
    /// Environment beyond the agent's own.
    pub environment: BTreeMap<String, String>,
    /// Working directory of the rank.
    pub workdir: PathBuf,
    /// File that takes standard output and standard error; appended to.
    pub log: PathBuf,
}

/// Asks of a running rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// SIGTERM to the process group.
    Terminate,
    /// SIGKILL to the process group.
    Kill,
}

/// A handle on a supervised rank. When it is dropped the rank is killed.
#[derive(Debug)]
pub struct RankProcess {
    asks: mpsc::Sender<Ask>,
}

impl RankProcess {
    /// Starts the supervisor and sends every notice with `key` to `notices`, the last of which is
    /// [`Notice::Refused`] or [`Notice::Ended`], even if the supervisor is killed.
    ///
    /// # Errors
    /// When the log file or the supervisor cannot be opened or started; the message names it.
    pub fn start<K: Clone + Send + 'static>(
        launch: &Launch,
        key: K,
        notices: mpsc::Sender<(K, Notice)>,
    ) -> io::Result<Self> {
        let log = open_log(&launch.log)?;
        let mut child = Command::new(&launch.supervisor)
            .arg("supervise")
            .arg("--")
            .args(&launch.argv)
            .envs(&launch.environment)
            .current_dir(&launch.workdir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log))
            .process_group(0)
            .spawn()
            .map_err(|error| annotate(error, "start the supervisor", &launch.supervisor))?;
        let mut input = child.stdin.take().ok_or_else(|| io::Error::other("no standard input"))?;
        let output = child.stdout.take().ok_or_else(|| io::Error::other("no standard output"))?;
        let (asks, mut asked) = mpsc::channel::<Ask>(4);
        tokio::spawn(async move {
            let mut lines = BufReader::new(output).lines();
            let mut ended = false;
            let mut open = true;
            let mut group = None;
            loop {
                tokio::select! {
                    line = lines.next_line() => match line {
                        Ok(Some(line)) => {
                            let Ok(notice) = serde_json::from_str::<Notice>(&line) else { continue };
                            if let Notice::Started { pid } = &notice {
                                group = rustix::process::Pid::from_raw(pid.cast_signed());
                            }
                            ended |= matches!(notice, Notice::Ended { .. } | Notice::Refused { .. });
                            let _ = notices.send((key.clone(), notice)).await;
                        }
                        Ok(None) | Err(_) => break,
                    },
                    ask = asked.recv(), if open => {
                        let byte = match ask {
                            Some(Ask::Terminate) => TERMINATE,
                            Some(Ask::Kill) => KILL,
                            None => { open = false; KILL }
                        };
                        // A supervisor that is gone reads nothing: its end is told by its output.
                        let _ = input.write_all(&[byte]).await;
                        let _ = input.flush().await;
                    }
                }
            }
            drop(input);
            // The supervisor's own end is quick; a bound keeps a stuck one from holding this task.
            let _ = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
            if !ended {
                // The supervisor was killed: the kernel ends the rank, and this what it started.
                if let Some(group) = group {
                    let _ =
                        rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
                }
                let lost = Notice::Ended { code: None, signal: Some(9) };
                let _ = notices.send((key, lost)).await;
            }
        });
        Ok(Self { asks })
    }

    /// Asks for a signal to the rank's process group. A full queue means that the same was asked
    /// already.
    pub fn ask(&self, ask: Ask) {
        let _ = self.asks.try_send(ask);
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|error| annotate(error, "open the log", path))
}

fn annotate(error: io::Error, what: &str, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {what} {}: {error}", path.display()))
}
