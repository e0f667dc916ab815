//! `drumline supervise`: the small process that stands between an agent and one rank.
//!
//! It outlives its rank, and its rank never outlives it or the agent: when the agent dies, however
//! it dies, the pipe on standard input ends, and the whole process group of the rank is killed,
//! with every descendant that left the group. It reports on standard output, one JSON line each:
//! [`Notice`]. Standard error is the rank's log, shared with the rank.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

/// What the supervisor tells its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Notice {
    /// The rank's process runs.
    Started {
        /// Its process id, which is its process group's too.
        pid: u32,
    },
    /// The rank's process could not be started.
    Refused {
        /// The system's words, with the program's name.
        message: String,
    },
    /// The rank's process has ended, and its group is gone.
    Ended {
        /// Exit code, when it exited.
        code: Option<i32>,
        /// Signal, when one ended it.
        signal: Option<i32>,
    },
}

/// The byte on standard input that asks for SIGTERM to the rank's group.
pub const TERMINATE: u8 = b'T';
/// The byte on standard input that asks for SIGKILL to the rank's group.
pub const KILL: u8 = b'K';
/// Names the supervisor in the rank's environment, so that a rank can see that it is orphaned.
pub const SUPERVISOR_VARIABLE: &str = "DRUMLINE_SUPERVISOR_PID";

/// Longest time spent on killing what is left of the rank's group.
const REAP_DEADLINE: Duration = Duration::from_secs(3);

/// Runs `argv` as a rank until it has ended; the body of `drumline supervise`.
///
/// # Errors
/// When standard output is gone, which means that the agent is gone: the rank is dead by then.
pub fn run(argv: &[String]) -> io::Result<ExitCode> {
    // Descendants that leave the group become our children, so that they can be found and killed.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let log = io::stderr().as_fd().try_clone_to_owned()?;
    let Some((program, arguments)) = argv.split_first() else {
        notify(&Notice::Refused { message: "no program given".to_owned() })?;
        return Ok(ExitCode::from(2));
    };
    let spawned = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::from(log))
        .process_group(0)
        .env(SUPERVISOR_VARIABLE, std::process::id().to_string())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            notify(&Notice::Refused { message: format!("cannot start {program:?}: {error}") })?;
            return Ok(ExitCode::from(2));
        }
    };
    let group = Pid::from_child(&child);
    let started = notify(&Notice::Started { pid: child.id() });
    std::thread::spawn(move || obey_agent(group));
    if started.is_err() {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
    let status = child.wait()?;
    kill_descendants(group);
    notify(&Notice::Ended { code: status.code(), signal: status.signal() })?;
    Ok(ExitCode::SUCCESS)
}

/// Replaces this process by `argv`, to be killed when its supervisor dies; the body of
/// `drumline rank-exec`, for programs that cannot ask for that themselves.
///
/// # Errors
/// When the program cannot be started; on success it does not return.
pub fn exec(argv: &[String]) -> io::Result<std::convert::Infallible> {
    die_with_supervisor()?;
    let Some((program, arguments)) = argv.split_first() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program given"));
    };
    let error = Command::new(program).args(arguments).exec();
    Err(io::Error::new(error.kind(), format!("cannot start {program:?}: {error}")))
}

/// Asks the kernel to kill this process when its supervisor dies, and checks that it still lives.
///
/// Must be called from the main thread of a process that a supervisor started.
///
/// # Errors
/// When the supervisor is gone already.
pub fn die_with_supervisor() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let expected = std::env::var(SUPERVISOR_VARIABLE).ok().and_then(|pid| pid.parse::<i32>().ok());
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    match expected {
        Some(expected) if parent != Some(expected) => {
            Err(io::Error::other("the supervisor is gone"))
        }
        _ => Ok(()),
    }
}

fn notify(notice: &Notice) -> io::Result<()> {
    let mut line = serde_json::to_vec(notice).map_err(io::Error::other)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}

/// Carries out the agent's bytes; the end of the pipe means that the agent is dead.
fn obey_agent(group: Pid) {
    let mut input = io::stdin().lock();
    let mut byte = [0];
    loop {
        let signal = match input.read(&mut byte) {
            Ok(1) if byte[0] == TERMINATE => Signal::TERM,
            Ok(1) if byte[0] == KILL => Signal::KILL,
            Ok(1) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(_) | Err(_) => {
                let _ = rustix::process::kill_process_group(group, Signal::KILL);
                return;
            }
        };
        let _ = rustix::process::kill_process_group(group, signal);
    }
}

/// Kills what is left of the group and every descendant that was re-parented to this process.
fn kill_descendants(group: Pid) {
    let deadline = Instant::now() + REAP_DEADLINE;
    loop {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
        for pid in children() {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            _ => return,
        }
    }
}

/// Lists this process's present children from `/proc`.
fn children() -> Vec<Pid> {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()
        })
        .filter_map(Pid::from_raw)
        .collect()
}
