//! A `drumline up` for one test, its commands, and the search for what it leaves behind.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The program under test.
pub(crate) const DRUMLINE: &str = env!("CARGO_BIN_EXE_drumline");
/// A busy machine may take its time; a wait that ends here has failed.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(180);

/// A running cluster in a temporary state folder.
pub(crate) struct Cluster {
    up: Child,
    folder: tempfile::TempDir,
    /// What `up` said when it was ready: addresses of everything.
    pub(crate) ready: Value,
}

impl Cluster {
    /// Starts a cluster and waits until it is ready.
    pub(crate) fn start(nodes: u32, devices: u32) -> Self {
        Self::start_with(nodes, devices, |_| {})
    }

    /// As [`Self::start`], with changes to how it is started.
    pub(crate) fn start_with(nodes: u32, devices: u32, change: impl Fn(&mut Command)) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (up, ready) = Self::up(folder.path(), nodes, devices, change);
        Self { up, folder, ready }
    }

    /// As [`Self::start`], and serves other machines too.
    pub(crate) fn start_serving_others(nodes: u32, devices: u32) -> Self {
        Self::start_with(nodes, devices, serve_others)
    }

    /// Stops it as Ctrl-C does, and starts it again in the same folder, for other machines too.
    pub(crate) fn again(mut self, nodes: u32, devices: u32) -> Self {
        self.interrupt();
        let (up, ready) = Self::up(self.folder(), nodes, devices, serve_others);
        (self.up, self.ready) = (up, ready);
        self
    }

    fn up(
        folder: &Path,
        nodes: u32,
        devices: u32,
        change: impl Fn(&mut Command),
    ) -> (Child, Value) {
        let mut command = Command::new(DRUMLINE);
        command
            .args(["up", "--output", "json", "--nodes", &nodes.to_string()])
            .args(["--devices", &devices.to_string(), "--state-dir"])
            .arg(folder);
        change(&mut command);
        let mut up =
            command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("drumline starts");
        let mut text = String::new();
        let mut output = BufReader::new(up.stdout.take().expect("a pipe"));
        // The JSON may span lines: it is over when it parses.
        let ready = loop {
            let count = output.read_line(&mut text).expect("a line");
            assert!(count > 0, "`drumline up` ended before it was ready: {text}");
            if let Ok(value) = serde_json::from_str(&text) {
                break value;
            }
        };
        (up, ready)
    }

    /// The state folder.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs a command of the program against this cluster.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        run_in(self.folder(), arguments)
    }

    /// Runs a command and returns its JSON; panics when it fails.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let output = self.run(&all);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {told}");
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {told}"))
    }

    /// Submits a manifest and returns the job's id.
    pub(crate) fn submit(&self, manifest: &str) -> String {
        let file = self.folder().join("manifest.yaml");
        std::fs::write(&file, manifest).expect("a file");
        let output = self.run(&["submit", file.to_str().expect("UTF-8")]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{told}");
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    }

    /// Returns what is known of a job.
    pub(crate) fn job(&self, id: &str) -> Value {
        self.json(&["describe", "job", id])
    }

    /// Waits until something holds of a job, and returns the job.
    pub(crate) fn wait_for(&self, id: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        self.wait_within(WAIT_MAX, id, what, holds)
    }

    /// As [`Self::wait_for`], for ranks whose first step may have to wait for a compiler.
    pub(crate) fn wait_for_long(
        &self,
        id: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Value {
        self.wait_within(Duration::from_secs(400), id, what, holds)
    }

    /// Waits as long for a job's end, and returns the job.
    pub(crate) fn wait_long(&self, id: &str) -> Value {
        let ends = ["succeeded", "failed", "cancelled"];
        self.wait_for_long(id, "the end", |job| ends.iter().any(|phase| job["phase"] == *phase))
    }

    fn wait_within(
        &self,
        most: Duration,
        id: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Value {
        let deadline = Instant::now() + most;
        loop {
            // While the control plane is away, commands fail; that passes.
            let output = self.run(&["describe", "job", id, "--output", "json"]);
            let job: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
            if output.status.success() && holds(&job) {
                return job;
            }
            assert!(Instant::now() < deadline, "{what} within {most:?}; the job is {job:#}");
            std::thread::sleep(Duration::from_millis(40));
        }
    }

    /// Waits for a job's end with `drumline wait` and returns its exit code.
    pub(crate) fn wait(&self, id: &str) -> Option<i32> {
        self.run(&["wait", id, "--timeout", "300s"]).status.code()
    }

    /// Builds a small dataset of this project's own text, once for each cluster.
    pub(crate) fn build_data(&self) {
        let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
        let folder = self.folder().join("shared/data/docs");
        let (text, folder) = (text.to_str().expect("UTF-8"), folder.to_str().expect("UTF-8"));
        let output = self.run(&["data", "build", text, folder, "--vocab", "512"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Returns the process ids whose command line starts as given, within this cluster.
    pub(crate) fn pids(&self, role: &str) -> Vec<u32> {
        pids_in(&self.folder().display().to_string(), role)
    }

    /// Lets the ranks run a small part of the time, so that a run is not over before a test has done
    /// to it what it is about.
    pub(crate) fn slowly(&self) -> Slowly {
        let (folder, over) =
            (self.folder().display().to_string(), Arc::new(AtomicBool::new(false)));
        let ended = over.clone();
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let ranks = pids_in(&folder, "rank");
                signal(&ranks, Signal::STOP);
                std::thread::sleep(Slowly::STOPPED);
                signal(&ranks, Signal::CONT);
                std::thread::sleep(Slowly::RUNNING);
            }
        });
        Slowly { over, thread: Some(thread) }
    }

    /// Stops the cluster as Ctrl-C does; panics when anything is left behind.
    pub(crate) fn stop(mut self) {
        self.interrupt();
    }

    fn interrupt(&mut self) {
        kill_process(Pid::from_child(&self.up), Signal::INT).expect("it runs");
        let status = self.up.wait().expect("it ends");
        assert!(status.success(), "`drumline up` ended with {status}");
        assert_nothing_left(self.folder.path());
    }
}

/// Serves other machines, at any free port; what a shell names for commands is not the children's.
fn serve_others(up: &mut Command) {
    up.args(["--remote", "127.0.0.1:0"]);
    up.env("DRUMLINE_ENDPOINT", "https://192.0.2.1:1").env("DRUMLINE_CA", "/nowhere/tls.crt");
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // After a failed test: the children see their pipe end.
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}

/// Ranks that run slowly until this is dropped.
pub(crate) struct Slowly {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Slowly {
    const STOPPED: Duration = Duration::from_millis(50);
    const RUNNING: Duration = Duration::from_millis(10);
}

impl Drop for Slowly {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It lets the ranks go on before it ends, and panics nowhere.
            let _ = thread.join();
        }
    }
}

/// Sends a signal to processes; one that has just ended is none the wiser.
fn signal(pids: &[u32], signal: Signal) {
    for pid in pids.iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
        let _ = kill_process(pid, signal);
    }
}

fn pids_in(folder: &str, role: &str) -> Vec<u32> {
    processes()
        .into_iter()
        .filter(|process| process.arguments.get(1).is_some_and(|word| word == role))
        .filter(|process| process.mentions(folder))
        .map(|process| process.pid)
        .collect()
}

/// Runs a command of the program with a state folder.
pub(crate) fn run_in(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(DRUMLINE)
        .args(arguments)
        .arg("--state-dir")
        .arg(folder)
        .stdin(Stdio::null())
        .output()
        .expect("drumline starts")
}

/// Panics when a process still names the folder in its command line or environment.
pub(crate) fn assert_nothing_left(folder: &Path) {
    let name = folder.display().to_string();
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        let left: Vec<String> = processes()
            .into_iter()
            .filter(|process| process.mentions(&name) && process.pid != std::process::id())
            .map(|process| format!("{} {:?}", process.pid, process.arguments))
            .collect();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {left:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Process {
    pid: u32,
    arguments: Vec<String>,
    environment: String,
}

impl Process {
    fn mentions(&self, text: &str) -> bool {
        self.environment.contains(text) || self.arguments.iter().any(|word| word.contains(text))
    }
}

/// Lists the processes that run; those that only wait to be collected do not.
fn processes() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let folder: PathBuf = entry.path();
            let read = |name: &str| {
                let bytes = std::fs::read(folder.join(name)).ok()?;
                Some(String::from_utf8_lossy(&bytes).into_owned())
            };
            let stat = read("stat")?;
            if matches!(stat.rsplit(')').next()?.split_whitespace().next()?, "Z" | "X") {
                return None;
            }
            let arguments = read("cmdline")?.split('\0').map(str::to_owned).collect();
            Some(Process { pid, arguments, environment: read("environ").unwrap_or_default() })
        })
        .collect()
}

/// Kills a process as hard as can be.
pub(crate) fn kill(pid: u32) {
    signal(&[pid], Signal::KILL);
}

/// A small training job that takes long enough to be broken.
pub(crate) fn training(name: &str, tensor: u32, pipeline: u32, data: u32, steps: u64) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1
kind: TrainingJob
metadata:
  name: {name}
spec:
  model: {{family: llama, layers: 2, hidden: 64, ffn: 128, heads: 4, kvHeads: 2, vocab: 512, context: 64}}
  data: {{path: data/docs}}
  parallelism: {{tensor: {tensor}, pipeline: {pipeline}, data: {data}}}
  batch: {{global: 8, micro: 2, sequence: 64}}
  steps: {steps}
  seed: 3
  learningRate: {{peak: 1e-3, warmupSteps: 5}}
  checkpoint: {{intervalSteps: 10, keep: 2}}
  eval: {{sequences: 4}}
  restarts: {{limit: 5, backoff: 50ms}}
"
    )
}

/// Returns the page of metrics beside `address`, as Prometheus would scrape it.
pub(crate) fn metrics(address: &str) -> String {
    let host = address.trim_start_matches("http://").split('/').next().expect("a host");
    let mut stream = TcpStream::connect(host).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a deadline");
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        .expect("it reads");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("text");
    page
}

/// Returns the loss of every step from a job's record, as bits; panics when a step has two.
pub(crate) fn losses(cluster: &Cluster, id: &str) -> Vec<(u64, u32)> {
    let path = cluster.folder().join("shared/jobs").join(id).join("losses.jsonl");
    let text = std::fs::read_to_string(&path).expect("a record");
    let mut all = std::collections::BTreeMap::new();
    for line in text.lines() {
        let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
        let step = entry["step"].as_u64().expect("a step");
        let bits = (entry["loss"].as_f64().expect("a loss") as f32).to_bits();
        let before = all.insert(step, bits);
        assert!(before.is_none_or(|before| before == bits), "step {step} had another loss before");
    }
    all.into_iter().collect()
}
