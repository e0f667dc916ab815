//! One child process of an embedded cluster: started, started again when it dies, and ended.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::args::{CA_VARIABLE, ENDPOINT_VARIABLE, TOKEN_FILE_VARIABLE};
use crate::cluster::{ClusterError, Pids};
use crate::told;

/// What to start.
#[derive(Debug, Clone)]
pub struct ChildSpec {
    /// Its name, in messages and for its log.
    pub name: String,
    /// The program.
    pub binary: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The file that takes what it says.
    pub log: PathBuf,
}

/// A process that ends more often than this within [`WINDOW`] is not started again.
const DEATHS_MAX: usize = 5;
/// Who lived at least this long did its work: then it did not die of itself, and the count of deaths
/// begins anew.
const STEADY: Duration = Duration::from_secs(2);
/// The time within which deaths count.
const WINDOW: Duration = Duration::from_secs(60);
/// Wait before the first start after a death; it doubles with each within the window.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// A log that is longer than this at the start makes room for a new one.
const LOG_MAX_BYTES: u64 = 16 << 20;
/// The end of a log that is shown when its process is given up.
const TAIL_BYTES: u64 = 2048;

/// Keeps one process running until `stop`; then ends it, by force after `grace`.
pub async fn keep(
    spec: ChildSpec,
    pids: Pids,
    stop: CancellationToken,
    grace: Duration,
    gave_up: watch::Sender<Option<Arc<ClusterError>>>,
) {
    let mut deaths: VecDeque<Instant> = VecDeque::new();
    loop {
        let began = Instant::now();
        let how = match start(&spec) {
            Ok(mut child) => {
                let pid = child.id();
                note_pid(&pids, &spec.name, pid);
                // Waiting for a child closes its standard input, which is its sign to stop: held
                // here for as long as it shall run.
                let _lifeline = child.stdin.take();
                let how = tokio::select! {
                    status = child.wait() => match status {
                        Ok(status) => told_status(status),
                        Err(error) => error.to_string(),
                    },
                    () = stop.cancelled() => {
                        end(&mut child, grace).await;
                        note_pid(&pids, &spec.name, None);
                        return;
                    }
                };
                note_pid(&pids, &spec.name, None);
                if let Some(pid) = pid {
                    // Nothing of its group may hold ports or files when the next one starts.
                    signal_group(pid, Signal::KILL);
                }
                how
            }
            Err(error) => format!("cannot start {}: {error}", spec.binary.display()),
        };
        if began.elapsed() >= STEADY {
            deaths.clear();
        }
        deaths.push_back(Instant::now());
        while deaths.front().is_some_and(|death| death.elapsed() > WINDOW) {
            deaths.pop_front();
        }
        tracing::warn!(process = %spec.name, %how, "ended");
        if deaths.len() >= DEATHS_MAX {
            let error = ClusterError::GaveUp {
                process: spec.name.clone(),
                times: deaths.len(),
                how,
                log: spec.log.display().to_string(),
                tail: tail(&spec.log),
            };
            gave_up.send_replace(Some(Arc::new(error)));
            stop.cancelled().await;
            return;
        }
        let doublings = u32::try_from(deaths.len() - 1).unwrap_or(0);
        tokio::select! {
            () = tokio::time::sleep(FIRST_DELAY * 2u32.pow(doublings)) => {}
            () = stop.cancelled() => return,
        }
    }
}

fn start(spec: &ChildSpec) -> io::Result<Child> {
    if std::fs::metadata(&spec.log).is_ok_and(|log| log.len() > LOG_MAX_BYTES) {
        std::fs::rename(&spec.log, spec.log.with_extension("log.1"))?;
    }
    let log = OpenOptions::new().create(true).append(true).open(&spec.log)?;
    let mut command = Command::new(&spec.binary);
    // What a shell names for commands is another cluster's.
    for name in [ENDPOINT_VARIABLE, TOKEN_FILE_VARIABLE, CA_VARIABLE] {
        command.env_remove(name);
    }
    command
        .args(&spec.arguments)
        // Held open: its end tells the child that this process is gone.
        .stdin(Stdio::piped())
        .stdout(Stdio::from(log.try_clone()?))
        .stderr(Stdio::from(log))
        // Its own group, so that Ctrl-C reaches this process alone, which then ends all in order.
        .process_group(0)
        .spawn()
}

/// Ends a child: SIGTERM, and SIGKILL to its whole group after `grace`.
async fn end(child: &mut Child, grace: Duration) {
    let Some(pid) = child.id() else { return };
    signal_group(pid, Signal::TERM);
    if tokio::time::timeout(grace, child.wait()).await.is_err() {
        tracing::warn!(pid, "did not end in time and is killed");
        signal_group(pid, Signal::KILL);
        let _ = tokio::time::timeout(Duration::from_secs(2), child.wait()).await;
    }
}

fn signal_group(pid: u32, signal: Signal) {
    if let Some(group) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // An error means that the group is gone, which is what was wanted.
        let _ = kill_process_group(group, signal);
    }
}

fn note_pid(pids: &Pids, name: &str, pid: Option<u32>) {
    if let Ok(mut pids) = pids.lock() {
        match pid {
            Some(pid) => drop(pids.insert(name.to_owned(), pid)),
            None => drop(pids.remove(name)),
        }
    }
}

fn told_status(status: ExitStatus) -> String {
    told::exit(status.code(), status.signal())
}

/// Returns the last lines of a log.
#[must_use]
pub fn tail(log: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_else(|error| error.to_string());
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(10);
    lines[from..].iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
