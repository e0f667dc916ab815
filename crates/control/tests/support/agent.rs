//! A node whose ranks exist on paper. It keeps them over lost streams, as a real agent does, and
//! notes every launch and every moment at which something ran that must not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drumline_wire::auth::{AddToken, Token};
use drumline_wire::v1;
use drumline_wire::v1::agent_down::Kind as Down;
use drumline_wire::v1::agent_link_client::AgentLinkClient;
use drumline_wire::v1::agent_up::Kind as Up;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::{channel, token};

/// What a rank does once it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// Exits with code 0 after so many milliseconds.
    SucceedAfter(u64),
    /// Exits with this code after so many milliseconds.
    FailAfter(u64, i32),
    /// Runs until it is stopped.
    Hold,
    /// Starts, and never joins its world.
    NeverJoin,
}

/// Says what a rank does: job, attempt, rank.
pub(crate) type Script = Arc<dyn Fn(&str, u32, u32) -> Act + Send + Sync>;

type Key = (String, u32, u32);

/// What is known of the ranks of all nodes of a test.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Ranks that live now, with their node.
    pub(crate) live: BTreeMap<Key, String>,
    /// How often each rank of each attempt was launched.
    pub(crate) launches: BTreeMap<Key, u32>,
    /// What must never happen and did.
    pub(crate) violations: Vec<String>,
    /// Worlds as they were told, by job and attempt.
    pub(crate) worlds: BTreeMap<(String, u32), v1::World>,
    pub(crate) launched: BTreeMap<(String, u32), v1::LaunchGang>,
}

impl Ledger {
    fn start(&mut self, key: &Key, node: &str) {
        *self.launches.entry(key.clone()).or_default() += 1;
        let other = self
            .live
            .keys()
            .find(|(job, attempt, rank)| *job == key.0 && (*attempt != key.1 || *rank == key.2));
        if let Some(other) = other {
            let holder = &self.live[other];
            self.violations.push(format!("{key:?} starts on {node} beside {other:?} on {holder}"));
        }
        self.live.insert(key.clone(), node.to_owned());
    }
}

struct RankRecord {
    phase: &'static str,
    exit_code: Option<i32>,
    signal: Option<i32>,
    task: Option<JoinHandle<()>>,
}

struct State {
    node: String,
    ranks: BTreeMap<Key, RankRecord>,
    newest: BTreeMap<String, u32>,
    worlds: BTreeSet<(String, u32)>,
    joins: BTreeMap<Key, v1::JoinWorld>,
    up: Option<mpsc::Sender<v1::AgentUp>>,
    spoken: Vec<String>,
    native: BTreeSet<String>,
    forget: BTreeSet<(String, u32)>,
}

/// A node.
pub(crate) struct FakeAgent {
    pub(crate) node: String,
    state: Arc<Mutex<State>>,
    ledger: Arc<Mutex<Ledger>>,
    connection: JoinHandle<()>,
}

impl FakeAgent {
    /// Starts a node with CPU devices that connects, and connects again, to `url`.
    pub(crate) fn start(
        url: &str,
        node: &str,
        devices: u32,
        ledger: &Arc<Mutex<Ledger>>,
        script: Script,
    ) -> Self {
        Self::start_with(url, node, devices, ledger, script, token())
    }

    pub(crate) fn start_with(
        url: &str,
        node: &str,
        devices: u32,
        ledger: &Arc<Mutex<Ledger>>,
        script: Script,
        token: Token,
    ) -> Self {
        let state = Arc::new(Mutex::new(State {
            node: node.to_owned(),
            ranks: BTreeMap::new(),
            newest: BTreeMap::new(),
            worlds: BTreeSet::new(),
            joins: BTreeMap::new(),
            up: None,
            spoken: Vec::new(),
            native: BTreeSet::new(),
            forget: BTreeSet::new(),
        }));
        let runner = Runner { state: Arc::clone(&state), ledger: Arc::clone(ledger), script };
        let url = url.to_owned();
        let instance = format!("{node}-{}", fresh());
        let connection = tokio::spawn(async move {
            loop {
                let _ = runner.connect(&url, devices, &instance, &token).await;
                runner.state.lock().unwrap().up = None;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self { node: node.to_owned(), state, ledger: Arc::clone(ledger), connection }
    }

    /// Ends the agent as SIGKILL would: its ranks die with it, and it says nothing.
    pub(crate) fn kill(self) {
        self.connection.abort();
        let mut state = self.state.lock().unwrap();
        let mut ledger = self.ledger.lock().unwrap();
        for (key, rank) in &mut state.ranks {
            if let Some(task) = rank.task.take() {
                task.abort();
            }
            ledger.live.remove(key);
        }
        state.up = None;
    }

    /// Ends a rank by a signal.
    pub(crate) fn kill_rank(&self, job: &str, attempt: u32, rank: u32, signal: i32) {
        let key = (job.to_owned(), attempt, rank);
        end(&self.state, &self.ledger, &key, None, Some(signal));
    }

    /// Sends a report as a rank would, once the node is connected.
    pub(crate) async fn report(&self, report: v1::RankReport) {
        let started = std::time::Instant::now();
        let up = loop {
            if let Some(up) = self.state.lock().unwrap().up.clone() {
                break up;
            }
            assert!(started.elapsed() < super::PATIENCE, "{} is not connected", self.node);
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        up.send(v1::AgentUp { kind: Some(Up::Report(report)) }).await.unwrap();
    }

    /// Adds a line to what a rank's log holds.
    pub(crate) fn speak(&self, line: &str) {
        self.state.lock().unwrap().spoken.push(line.to_owned());
    }
}

fn fresh() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[derive(Clone)]
struct Runner {
    state: Arc<Mutex<State>>,
    ledger: Arc<Mutex<Ledger>>,
    script: Script,
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    since.as_millis() as u64
}

fn status(key: &Key, rank: &RankRecord) -> v1::RankStatus {
    v1::RankStatus {
        job: key.0.clone(),
        attempt: key.1,
        rank: key.2,
        phase: rank.phase.to_owned(),
        pid: 4242,
        exit_code: rank.exit_code,
        signal: rank.signal,
        message: String::new(),
        at_ms: now_ms(),
    }
}

/// Sends a message if a stream is open. A rank's end is kept anyway, for the next hello.
fn tell(state: &State, kind: Up) {
    if let Some(up) = &state.up {
        let _ = up.try_send(v1::AgentUp { kind: Some(kind) });
    }
}

fn end(
    state: &Arc<Mutex<State>>,
    ledger: &Arc<Mutex<Ledger>>,
    key: &Key,
    code: Option<i32>,
    signal: Option<i32>,
) {
    let mut state = state.lock().unwrap();
    let Some(rank) = state.ranks.get_mut(key) else { return };
    if matches!(rank.phase, "succeeded" | "failed") {
        return;
    }
    rank.phase = if code == Some(0) { "succeeded" } else { "failed" };
    (rank.exit_code, rank.signal) = (code, signal);
    ledger.lock().unwrap().live.remove(key);
    let told = status(key, rank);
    tell(&state, Up::RankStatus(told));
    let forget = state.forget.clone();
    state.ranks.retain(|(job, attempt, _), rank| {
        !(forget.contains(&(job.clone(), *attempt)) && matches!(rank.phase, "succeeded" | "failed"))
    });
}

impl Runner {
    async fn connect(
        &self,
        url: &str,
        devices: u32,
        instance: &str,
        token: &Token,
    ) -> Result<(), String> {
        let channel = channel(url).await.map_err(|error| error.to_string())?;
        let mut client = AgentLinkClient::with_interceptor(channel, AddToken::new(token));
        let (up, outgoing) = mpsc::channel(1024);
        let hello = {
            let mut state = self.state.lock().unwrap();
            let ranks = state.ranks.iter().map(|(key, rank)| status(key, rank)).collect();
            let hello = v1::Hello {
                node: state.node.clone(),
                version: "test".to_owned(),
                instance: instance.to_owned(),
                cores: devices,
                memory_bytes: 1 << 30,
                devices: (0..devices)
                    .map(|index| v1::AgentDevice {
                        index,
                        kind: "cpu".to_owned(),
                        model: "cpu".to_owned(),
                        memory_bytes: 1 << 28,
                        healthy: true,
                        message: String::new(),
                        matmul_flops: 1e9,
                        uuid: String::new(),
                    })
                    .collect(),
                ranks,
                metrics_url: String::new(),
                address: "127.0.0.1".to_owned(),
                topology: Vec::new(),
            };
            up.try_send(v1::AgentUp { kind: Some(Up::Hello(hello)) }).unwrap();
            for (key, join) in &state.joins {
                if !state.worlds.contains(&(key.0.clone(), key.1)) {
                    let join = v1::AgentUp { kind: Some(Up::Join(join.clone())) };
                    up.try_send(join).unwrap();
                }
            }
            state.up = Some(up.clone());
            client.connect(ReceiverStream::new(outgoing))
        };
        let mut down = hello.await.map_err(|status| status.to_string())?.into_inner();
        let mut beat = tokio::time::interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                message = down.message() => match message {
                    Ok(Some(message)) => self.take(message),
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(status.to_string()),
                },
                _ = beat.tick() => {
                    let beat = v1::Heartbeat {
                        devices: (0..devices)
                            .map(|index| v1::DeviceSample {
                                index,
                                utilization: 0.5,
                                healthy: true,
                                ..v1::DeviceSample::default()
                            })
                            .collect(),
                        ..v1::Heartbeat::default()
                    };
                    let _ = up.try_send(v1::AgentUp { kind: Some(Up::Heartbeat(beat)) });
                }
            }
        }
    }

    fn take(&self, down: v1::AgentDown) {
        match down.kind {
            Some(Down::Launch(launch)) => self.launch(&launch),
            Some(Down::Stop(stop)) => self.stop(&stop),
            Some(Down::World(world)) => self.world(&world),
            Some(Down::ReadLog(read)) => self.read_log(&read),
            _ => {}
        }
    }

    fn launch(&self, launch: &v1::LaunchGang) {
        let native = !launch.spec_json.contains("\"kind\":\"CommandJob\"");
        let mut state = self.state.lock().unwrap();
        let known = state.ranks.keys().any(|key| key.0 == launch.job && key.1 == launch.attempt);
        let newest = state.newest.get(&launch.job).copied().unwrap_or(0);
        if known || launch.attempt < newest {
            let told: Vec<_> = state
                .ranks
                .iter()
                .filter(|(key, _)| key.0 == launch.job && key.1 == launch.attempt)
                .map(|(key, rank)| status(key, rank))
                .collect();
            for status in told {
                tell(&state, Up::RankStatus(status));
            }
            return;
        }
        state.newest.insert(launch.job.clone(), launch.attempt);
        if native {
            state.native.insert(launch.job.clone());
        }
        self.ledger
            .lock()
            .unwrap()
            .launched
            .insert((launch.job.clone(), launch.attempt), launch.clone());
        for rank in &launch.ranks {
            let key = (launch.job.clone(), launch.attempt, rank.rank);
            self.ledger.lock().unwrap().start(&key, &state.node);
            let phase = if native { "started" } else { "running" };
            let record = RankRecord { phase, exit_code: None, signal: None, task: None };
            tell(&state, Up::RankStatus(status(&key, &record)));
            state.ranks.insert(key.clone(), record);
            let act = (self.script)(&key.0, key.1, key.2);
            if native {
                if act == Act::NeverJoin {
                    continue;
                }
                let join = v1::JoinWorld {
                    job: key.0.clone(),
                    attempt: key.1,
                    rank: key.2,
                    collective_address: format!("127.0.0.1:{}", 40_000 + key.2),
                    inference_url: if key.2 == 0 {
                        "http://127.0.0.1:9".into()
                    } else {
                        String::new()
                    },
                    host: "host".to_owned(),
                };
                state.joins.insert(key, join.clone());
                tell(&state, Up::Join(join));
            } else {
                let task = self.act(&key, act);
                state.ranks.get_mut(&key).unwrap().task = task;
            }
        }
    }

    fn act(&self, key: &Key, act: Act) -> Option<JoinHandle<()>> {
        let (after, code) = match act {
            Act::SucceedAfter(after) => (after, 0),
            Act::FailAfter(after, code) => (after, code),
            Act::Hold | Act::NeverJoin => return None,
        };
        let (state, ledger, key) = (Arc::clone(&self.state), Arc::clone(&self.ledger), key.clone());
        Some(tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(after)).await;
            end(&state, &ledger, &key, Some(code), None);
        }))
    }

    fn world(&self, world: &v1::World) {
        let mut state = self.state.lock().unwrap();
        let gang = (world.job.clone(), world.attempt);
        if !world.error.is_empty() || !state.worlds.insert(gang.clone()) {
            return;
        }
        self.ledger.lock().unwrap().worlds.insert(gang, world.clone());
        let here: Vec<Key> = state
            .ranks
            .keys()
            .filter(|key| key.0 == world.job && key.1 == world.attempt)
            .cloned()
            .collect();
        for key in here {
            let act = (self.script)(&key.0, key.1, key.2);
            let task = self.act(&key, act);
            if let Some(rank) = state.ranks.get_mut(&key)
                && rank.phase == "started"
            {
                rank.phase = "running";
                rank.task = task;
            }
            let told = state.ranks.get(&key).map(|rank| status(&key, rank));
            if let Some(told) = told {
                tell(&state, Up::RankStatus(told));
            }
        }
    }

    fn stop(&self, stop: &v1::StopGang) {
        let keys: Vec<Key> = {
            let mut state = self.state.lock().unwrap();
            if stop.forget {
                state.forget.insert((stop.job.clone(), stop.attempt));
            }
            let mine = |key: &&Key| key.0 == stop.job && key.1 <= stop.attempt;
            let keys: Vec<Key> = state.ranks.keys().filter(mine).cloned().collect();
            for key in &keys {
                if let Some(task) = state.ranks.get_mut(key).and_then(|rank| rank.task.take()) {
                    task.abort();
                }
                state.joins.remove(key);
            }
            keys
        };
        for key in &keys {
            end(&self.state, &self.ledger, key, None, Some(15));
        }
        let mut state = self.state.lock().unwrap();
        if stop.forget {
            state.ranks.retain(|key, rank| {
                !(key.0 == stop.job
                    && key.1 <= stop.attempt
                    && matches!(rank.phase, "succeeded" | "failed"))
            });
        }
    }

    /// Serves a log whose bytes are the lines spoken so far, and further ones as they are spoken.
    fn read_log(&self, read: &v1::ReadLog) {
        let (runner, read) = (self.clone(), *Box::new(read.clone()));
        tokio::spawn(async move {
            let mut offset = read.offset;
            let key = (read.job.clone(), read.attempt, read.rank);
            loop {
                let (text, up, over) = {
                    let state = runner.state.lock().unwrap();
                    let over = state
                        .ranks
                        .get(&key)
                        .is_none_or(|rank| matches!(rank.phase, "succeeded" | "failed"));
                    (state.spoken.concat(), state.up.clone(), over)
                };
                let Some(up) = up else { return };
                let bytes = text.into_bytes();
                if read.tail_bytes > 0 && offset == read.offset {
                    offset = offset.max((bytes.len() as u64).saturating_sub(read.tail_bytes));
                }
                let mut fresh = bytes.get(offset as usize..).unwrap_or_default().to_vec();
                fresh.truncate(64 << 10);
                let end = fresh.is_empty() && (over || !read.follow);
                if !fresh.is_empty() || end {
                    let data = v1::LogData {
                        request: read.request,
                        offset,
                        data: fresh.clone(),
                        end,
                        error: String::new(),
                    };
                    offset += fresh.len() as u64;
                    if up.send(v1::AgentUp { kind: Some(Up::Log(data)) }).await.is_err() || end {
                        return;
                    }
                }
                if fresh.is_empty() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        });
    }
}
