//! Real processes under real supervisors, killed in every order: none may be left behind.
//!
//! This file is its own harness, because the supervisor under test is this very binary.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use drumline_agent::process::{Ask, Launch, RankProcess};
use drumline_agent::supervise::{self, Notice};
use tokio::sync::mpsc;

/// How often the kill tests repeat.
const REPETITIONS: usize = 20;
/// A busy machine may take its time; a wait that ends here has failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("supervise") => supervise::run(&arguments[3..]).unwrap_or(ExitCode::FAILURE),
        Some("rank-exec") => match supervise::exec(&arguments[3..]) {
            Ok(never) => match never {},
            Err(error) => {
                eprintln!("{error}");
                ExitCode::from(127)
            }
        },
        Some("parent") => parent(Path::new(&arguments[2])),
        _ => run_tests(),
    }
}

type Test = (&'static str, fn(&Path));

fn run_tests() -> ExitCode {
    let tests: [Test; 6] = [
        ("an_exit_code_and_all_output_arrive", an_exit_code_and_all_output_arrive),
        ("a_program_that_is_missing_is_named", a_program_that_is_missing_is_named),
        ("a_signal_is_told_apart_from_an_exit", a_signal_is_told_apart_from_an_exit),
        ("sigkill_ends_what_ignores_sigterm", sigkill_ends_what_ignores_sigterm),
        ("a_killed_supervisor_takes_its_rank_along", a_killed_supervisor_takes_its_rank_along),
        ("a_killed_agent_leaves_no_process", a_killed_agent_leaves_no_process),
    ];
    let mut failed = 0;
    for (name, test) in tests {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let outcome = std::panic::catch_unwind(|| test(folder.path()));
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        failed += usize::from(outcome.is_err());
    }
    println!("supervision: {} passed, {failed} failed", tests.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn this() -> PathBuf {
    std::env::current_exe().expect("this binary has a path")
}

fn launch(folder: &Path, argv: &[&str]) -> Launch {
    let own = this().display().to_string();
    let mut full = vec![own, "rank-exec".to_owned(), "--".to_owned()];
    full.extend(argv.iter().map(|&word| word.to_owned()));
    Launch {
        supervisor: this(),
        argv: full,
        environment: BTreeMap::from([("COLOUR".to_owned(), "green".to_owned())]),
        workdir: folder.to_owned(),
        log: folder.join("rank.log"),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Starts `argv`, calls `act` when it runs, and returns its last notice.
fn last_notice(folder: &Path, argv: &[&str], act: impl FnOnce(&RankProcess, u32)) -> Notice {
    runtime().block_on(async {
        let (notices, mut inbox) = mpsc::channel(8);
        let process = RankProcess::start(&launch(folder, argv), (), notices).unwrap();
        let mut act = Some(act);
        loop {
            let next = tokio::time::timeout(PATIENCE, inbox.recv());
            match next.await.expect("a notice in time").expect("a last notice") {
                ((), Notice::Started { pid }) => {
                    if let Some(act) = act.take() {
                        act(&process, pid);
                    }
                }
                ((), last) => return last,
            }
        }
    })
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process runs; one that has ended and only waits to be collected does not.
fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next());
    !matches!(state, None | Some("Z" | "X"))
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a process id");
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

fn an_exit_code_and_all_output_arrive(folder: &Path) {
    let script = "echo out $COLOUR; echo err >&2; exit 7";
    let last = last_notice(folder, &["sh", "-c", script], |_, _| {});
    assert_eq!(last, Notice::Ended { code: Some(7), signal: None });
    let log = std::fs::read_to_string(folder.join("rank.log")).unwrap();
    assert_eq!(log, "out green\nerr\n");
}

fn a_program_that_is_missing_is_named(folder: &Path) {
    let last = last_notice(folder, &["no-such-program"], |_, _| {});
    assert_eq!(last, Notice::Ended { code: Some(127), signal: None });
    let log = std::fs::read_to_string(folder.join("rank.log")).unwrap();
    assert!(log.contains("no-such-program"), "{log}");
}

fn a_signal_is_told_apart_from_an_exit(folder: &Path) {
    let last = last_notice(folder, &["sleep", "600"], |_, pid| kill(pid));
    assert_eq!(last, Notice::Ended { code: None, signal: Some(9) });
    let last = last_notice(folder, &["sleep", "600"], |process, _| process.ask(Ask::Terminate));
    assert_eq!(last, Notice::Ended { code: None, signal: Some(15) });
}

fn sigkill_ends_what_ignores_sigterm(folder: &Path) {
    let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let log = folder.join("rank.log");
    let last = last_notice(folder, &["sh", "-c", script], |process, pid| {
        let ready = || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("ready"));
        wait_until("the trap is set", ready);
        process.ask(Ask::Terminate);
        std::thread::sleep(Duration::from_millis(200));
        assert!(alive(pid), "SIGTERM is ignored");
        process.ask(Ask::Kill);
    });
    assert_eq!(last, Notice::Ended { code: None, signal: Some(9) });
}

fn a_killed_supervisor_takes_its_rank_along(folder: &Path) {
    let note = folder.join("child");
    for _ in 0..REPETITIONS {
        let _ = std::fs::remove_file(&note);
        let (mut rank, mut child) = (0, 0);
        let script = "sleep 600 & echo $! > child; wait";
        let last = last_notice(folder, &["sh", "-c", script], |_, pid| {
            rank = pid;
            wait_until("the child is started", || {
                let text = std::fs::read_to_string(&note).unwrap_or_default();
                child = text.trim().parse().unwrap_or(0);
                child > 0 && alive(child)
            });
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let parent = stat.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap();
            kill(parent.parse().unwrap());
        });
        assert_eq!(last, Notice::Ended { code: None, signal: Some(9) });
        wait_until("the rank is gone", || !alive(rank));
        wait_until("what it started is gone", || !alive(child));
    }
}

/// Plays the agent that is killed: starts a rank with a child that has left its process group,
/// and waits for its own end.
fn parent(folder: &Path) -> ExitCode {
    runtime().block_on(async {
        let (notices, mut inbox) = mpsc::channel(8);
        let script = "setsid sleep 600 & echo $! > child; exec sleep 600";
        let process =
            RankProcess::start(&launch(folder, &["sh", "-c", script]), (), notices).unwrap();
        if let Some(((), Notice::Started { pid })) = inbox.recv().await {
            println!("{pid}");
            let _ = std::io::stdout().flush();
        }
        tokio::time::sleep(Duration::from_secs(600)).await;
        drop(process);
    });
    ExitCode::SUCCESS
}

fn a_killed_agent_leaves_no_process(folder: &Path) {
    for _ in 0..REPETITIONS {
        let note = folder.join("child");
        let _ = std::fs::remove_file(&note);
        let mut agent =
            Command::new(this()).arg("parent").arg(folder).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut output = std::io::BufReader::new(agent.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        let rank: u32 = line.trim().parse().unwrap();
        let mut child = 0;
        wait_until("the child is started", || {
            let text = std::fs::read_to_string(&note).unwrap_or_default();
            child = text.trim().parse().unwrap_or(0);
            child > 0 && alive(child)
        });
        assert!(alive(rank));
        agent.kill().unwrap();
        agent.wait().unwrap();
        wait_until("the rank is gone", || !alive(rank));
        wait_until("what it started is gone", || !alive(child));
    }
}
