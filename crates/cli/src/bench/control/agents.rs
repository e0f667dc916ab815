//! Agents that speak the real protocol and whose ranks only sleep: as long as their command says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use drumline_wire::auth::{AddToken, Token};
use drumline_wire::v1;
use drumline_wire::v1::agent_down::Kind as Down;
use drumline_wire::v1::agent_link_client::AgentLinkClient;
use drumline_wire::v1::agent_up::Kind as Up;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::output::note;

/// Messages of one agent that wait to be sent.
const UP_MAX: usize = 4096;

/// What all agents saw.
#[derive(Debug, Default)]
struct Seen {
    /// When each job was first launched, by its manifest's name.
    admitted: BTreeMap<String, Instant>,
    /// Ranks of attempts that have finished well, by job.
    left: BTreeMap<String, u32>,
    finished: usize,
    /// Attempts that were stopped.
    stopped: BTreeSet<(String, u32)>,
    later: BTreeSet<(String, u32)>,
}

/// The simulated agents.
pub(super) struct Agents {
    seen: Arc<Mutex<Seen>>,
}

impl Agents {
    /// Starts `nodes` agents that connect to `url` until `stop`.
    pub(super) fn start(
        url: &str,
        token: &Token,
        nodes: u32,
        devices: u32,
        stop: &CancellationToken,
    ) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        for node in 0..nodes {
            let agent = Agent {
                node: format!("sim-{node:04}"),
                devices,
                seen: Arc::clone(&seen),
                runs: Arc::default(),
            };
            let (url, token, stop) = (url.to_owned(), token.clone(), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    error = agent.connect(&url, &token) => {
                        if let Err(error) = error {
                            note(&format!("{}: {error}", agent.node));
                        }
                    }
                }
            });
        }
        Self { seen }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many jobs have finished.
    pub(super) fn finished(&self) -> usize {
        self.seen().finished
    }

    /// Returns when each job was first launched, by name.
    pub(super) fn admitted(&self) -> BTreeMap<String, Instant> {
        self.seen().admitted.clone()
    }

    /// Returns how many gangs were stopped, and how many attempts were not the first.
    pub(super) fn stopped(&self) -> (u64, u64) {
        let seen = self.seen();
        (seen.stopped.len() as u64, seen.later.len() as u64)
    }
}

/// Ranks that run, by job and attempt.
type Runs = Arc<Mutex<BTreeMap<(String, u32), CancellationToken>>>;

struct Agent {
    node: String,
    devices: u32,
    seen: Arc<Mutex<Seen>>,
    runs: Runs,
}

impl Agent {
    async fn connect(&self, url: &str, token: &Token) -> Result<(), String> {
        let told = |error: &dyn std::error::Error| error.to_string();
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| told(&error))?;
        let channel = endpoint.tcp_nodelay(true).connect().await.map_err(|error| told(&error))?;
        let mut client = AgentLinkClient::with_interceptor(channel, AddToken::new(token));
        let (up, outgoing) = mpsc::channel(UP_MAX);
        let hello = v1::Hello {
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: format!("{}-1", self.node),
            cores: self.devices,
            memory_bytes: 64 << 30,
            devices: (0..self.devices)
                .map(|index| v1::AgentDevice {
                    index,
                    kind: "cpu".to_owned(),
                    model: "simulated".to_owned(),
                    memory_bytes: 1 << 30,
                    healthy: true,
                    ..v1::AgentDevice::default()
                })
                .collect(),
            address: "127.0.0.1".to_owned(),
            ..v1::Hello::default()
        };
        let send = |kind| v1::AgentUp { kind: Some(kind) };
        up.send(send(Up::Hello(hello))).await.map_err(|error| told(&error))?;
        let mut down = client
            .connect(ReceiverStream::new(outgoing))
            .await
            .map_err(|error| told(&error))?
            .into_inner();
        let mut beat = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                message = down.message() => match message.map_err(|error| told(&error))? {
                    Some(message) => self.take(message, &up).await?,
                    None => return Ok(()),
                },
                _ = beat.tick() => {
                    let beat = v1::Heartbeat {
                        devices: (0..self.devices)
                            .map(|index| v1::DeviceSample {
                                index,
                                utilization: 0.5,
                                healthy: true,
                                ..v1::DeviceSample::default()
                            })
                            .collect(),
                        ..v1::Heartbeat::default()
                    };
                    up.send(send(Up::Heartbeat(beat))).await.map_err(|error| told(&error))?;
                }
            }
        }
    }

    async fn take(
        &self,
        down: v1::AgentDown,
        up: &mpsc::Sender<v1::AgentUp>,
    ) -> Result<(), String> {
        match down.kind {
            Some(Down::Launch(launch)) => self.launch(launch, up).await,
            Some(Down::Stop(stop)) if !stop.forget => {
                self.stop(&stop);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn launch(
        &self,
        launch: v1::LaunchGang,
        up: &mpsc::Sender<v1::AgentUp>,
    ) -> Result<(), String> {
        let spec: serde_json::Value =
            serde_json::from_str(&launch.spec_json).map_err(|error| error.to_string())?;
        let sleeps = spec["work"]["argv"][1].as_str().and_then(|ms| ms.parse::<u64>().ok());
        let (Some(name), Some(sleeps)) = (spec["name"].as_str(), sleeps) else {
            return Err(format!("{}: not a job of this benchmark", launch.job));
        };
        {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.admitted.entry(name.to_owned()).or_insert_with(Instant::now);
            if launch.attempt > 1 {
                seen.later.insert((launch.job.clone(), launch.attempt));
            }
        }
        let key = (launch.job.clone(), launch.attempt);
        let run = CancellationToken::new();
        {
            let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
            if runs.insert(key.clone(), run.clone()).is_some() {
                return Ok(());
            }
        }
        let ranks: Vec<u32> = launch.ranks.iter().map(|rank| rank.rank).collect();
        for rank in &ranks {
            tell(up, &key, *rank, "running", None, None).await?;
        }
        let (up, runs, seen) = (up.clone(), Arc::clone(&self.runs), Arc::clone(&self.seen));
        let world = launch.world_size;
        tokio::spawn(async move {
            let ended = tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(sleeps)) => true,
                () = run.cancelled() => false,
            };
            runs.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            let (phase, code, signal) =
                if ended { ("succeeded", Some(0), None) } else { ("failed", None, Some(15)) };
            for rank in &ranks {
                if tell(&up, &key, *rank, phase, code, signal).await.is_err() {
                    return;
                }
            }
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            if !ended {
                seen.stopped.insert(key);
                return;
            }
            let left = seen.left.entry(format!("{} {}", key.0, key.1)).or_insert(world);
            *left = left.saturating_sub(ranks.len() as u32);
            if *left == 0 {
                seen.left.remove(&format!("{} {}", key.0, key.1));
                seen.finished += 1;
            }
        });
        Ok(())
    }

    fn stop(&self, stop: &v1::StopGang) {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, run) in runs.range((stop.job.clone(), 0)..=(stop.job.clone(), stop.attempt)) {
            run.cancel();
        }
    }
}

async fn tell(
    up: &mpsc::Sender<v1::AgentUp>,
    (job, attempt): &(String, u32),
    rank: u32,
    phase: &str,
    exit_code: Option<i32>,
    signal: Option<i32>,
) -> Result<(), String> {
    let status = v1::RankStatus {
        job: job.clone(),
        attempt: *attempt,
        rank,
        phase: phase.to_owned(),
        pid: 1,
        exit_code,
        signal,
        message: String::new(),
        at_ms: drumline_wire::now_ms(),
    };
    up.send(v1::AgentUp { kind: Some(Up::RankStatus(status)) })
        .await
        .map_err(|_| "the stream to the control plane broke".to_owned())
}
