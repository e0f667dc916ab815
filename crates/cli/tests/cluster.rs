//! A whole cluster of processes, from `up` to its end: jobs, killed processes, nothing left behind.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A running `drumline up` in a folder of its own.
struct Up {
    state: tempfile::TempDir,
    child: Child,
    ready: Value,
}

impl Up {
    fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let mut child = command(state.path(), &["up", "-o", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut text = String::new();
        while !text.ends_with("}\n") {
            let line = lines.next().expect("up ended before it was ready").unwrap();
            text.push_str(&line);
            text.push('\n');
        }
        let ready = serde_json::from_str(&text).unwrap();
        Self { state, child, ready }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        command(self.state.path(), arguments).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let out = self.run(arguments);
        assert!(out.status.success(), "{arguments:?}: {out:?}");
        serde_json::from_slice(&out.stdout).unwrap()
    }

    fn submit(&self, manifest: &str) -> String {
        let file = self.state.path().join("job.yaml");
        std::fs::write(&file, manifest).unwrap();
        let out = self.run(&["submit", file.to_str().unwrap()]);
        assert!(out.status.success(), "{out:?}");
        text(&out.stdout).trim().to_owned()
    }

    fn control_pid(&self) -> u32 {
        let endpoint = std::fs::read(self.state.path().join("endpoint.json")).unwrap();
        let endpoint: Value = serde_json::from_slice(&endpoint).unwrap();
        u32::try_from(endpoint["pid"].as_u64().unwrap()).unwrap()
    }

    /// Ends it by a signal, and returns its exit code.
    fn end(mut self, signal: &str) -> Option<i32> {
        kill(signal, self.child.id());
        let code = within(PATIENCE, || self.child.try_wait().unwrap()).code();
        within(PATIENCE, || leftovers(self.state.path()).is_empty().then_some(()));
        code
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // A failed test leaves nothing behind either: the children see their input end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(state: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drumline"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    command.env_clear().env("PATH", path).env("DRUMLINE_STATE_DIR", state).args(arguments);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn kill(signal: &str, pid: u32) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// A busy machine may take its time; a wait that ends here has failed.
const PATIENCE: Duration = Duration::from_secs(120);

fn within<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < limit, "not within {limit:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Processes that name the state folder in their arguments or environment, this test apart.
fn leftovers(state: &Path) -> Vec<String> {
    let needle = state.to_str().unwrap();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid| {
            let read =
                |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let what = text(&read("cmdline")).replace('\0', " ");
            (what.contains(needle) || text(&read("environ")).contains(needle))
                .then(|| format!("{pid} {what}"))
        })
        .collect()
}

fn shell_job(script: &str, ranks: u32) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: CommandJob\nmetadata: {{name: shell}}\nspec:\n  \
         argv: [sh, -c, {script:?}]\n  ranks: {ranks}\n  restarts: {{limit: 0}}\n"
    )
}

#[test]
fn a_cluster_runs_commands_and_ends_cleanly() {
    let up = Up::start();
    assert_eq!(up.ready["nodes"], 2);
    assert_eq!(up.ready["devices"], 4);

    let second = up.run(&["up"]);
    assert_eq!(second.status.code(), Some(2), "{second:?}");
    assert!(text(&second.stderr).contains(&format!("process {}", up.child.id())), "{second:?}");

    let nodes = up.json(&["nodes", "-o", "json"]);
    assert_eq!(nodes.as_array().unwrap().len(), 2, "{nodes}");

    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/examples/torchrun-style.yaml");
    let out = up.run(&["submit", example]);
    let id = text(&out.stdout).trim().to_owned();
    let out = up.run(&["wait", &id, "--timeout", "120s"]);
    assert_eq!(out.status.code(), Some(0), "{out:?}\n{}", text(&up.run(&["logs", &id]).stdout));
    let logs = text(&up.run(&["logs", &id]).stdout);
    assert!(logs.contains("[0] all 4 ranks met"), "{logs}");
    for rank in 1..4 {
        assert!(logs.contains(&format!("[{rank}] rank {rank} of 4 said hello")), "{logs}");
    }

    let id = up.submit(&shell_job("echo about to fail; exit 7", 2));
    let out = up.run(&["logs", "-f", &id]);
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(text(&out.stdout).contains("about to fail"), "{out:?}");
    let out = up.run(&["wait", &id]);
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(text(&out.stderr).contains("exit code 7"), "{out:?}");

    let id = up.submit(&shell_job("sleep 60", 8));
    within(PATIENCE, || {
        let job = up.json(&["describe", "job", &id, "-o", "json"]);
        (job["reason"] == "ExceedsCluster").then_some(())
    });
    let out = up.run(&["cancel", &id]);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(up.run(&["wait", &id, "--timeout", "120s"]).status.code(), Some(1));
    assert_eq!(up.run(&["describe", "job", "no-such-job"]).status.code(), Some(2));

    // One that runs when the cluster ends is taken along.
    up.submit(&shell_job("sleep 300", 4));
    within(PATIENCE, || {
        let fleet = up.json(&["top", "-o", "json"]);
        (fleet["devices_allocated"] == 4).then_some(())
    });
    let state = up.state.path().to_owned();
    assert_eq!(up.end("-TERM"), Some(0));
    assert!(!state.join("endpoint.json").exists());
}

#[test]
fn a_killed_control_plane_comes_back_and_the_job_goes_on() {
    let up = Up::start();
    // It ends when it is told to, so that it is not over before the control plane is killed.
    let go = up.state.path().join("go");
    let script =
        format!("echo begin; until [ -e {} ]; do sleep 0.1; done; echo done", go.display());
    let id = up.submit(&shell_job(&script, 4));
    within(PATIENCE, || {
        let job = up.json(&["describe", "job", &id, "-o", "json"]);
        (job["phase"] == "running").then_some(())
    });
    let mut following = command(up.state.path(), &["logs", "-f", &id, "--rank", "0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    kill("-KILL", up.control_pid());
    within(PATIENCE, || up.run(&["describe", "job", &id]).status.success().then_some(()));
    std::fs::write(&go, "").unwrap();
    let out = up.run(&["wait", &id, "--timeout", "120s"]);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    let job = up.json(&["describe", "job", &id, "-o", "json"]);
    assert_eq!(job["attempt"], 1, "its ranks were found again, not started again: {job}");
    let code = within(PATIENCE, || following.try_wait().unwrap()).code();
    assert_eq!(code, Some(0), "logs -f returns the job's outcome");
    let mut shown = String::new();
    std::io::Read::read_to_string(&mut following.stdout.take().unwrap(), &mut shown).unwrap();
    assert_eq!(shown, "begin\ndone\n");
    assert_eq!(up.end("-INT"), Some(0));
}

#[test]
fn nothing_outlives_a_killed_up() {
    let up = Up::start();
    up.submit(&shell_job("sleep 300", 4));
    within(PATIENCE, || {
        let fleet = up.json(&["top", "-o", "json"]);
        (fleet["devices_allocated"] == 4).then_some(())
    });
    assert_eq!(up.end("-KILL"), None);
}
