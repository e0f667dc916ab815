//! A whole cluster on one machine, as separate processes under this one: a control plane, node
//! agents and a gateway. `up`, `demo` and the tests use it alike.
//!
//! It supervises only these: what ranks do is the agents' and the control plane's affair. Every
//! child watches its standard input, so that none outlives this process, however it ends.

pub mod child;
pub mod lock;
pub mod probe;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::client::Access;
use crate::cluster::child::{ChildSpec, keep};
use crate::cluster::lock::{Lock, LockError};
use crate::state::StateDir;

/// What cluster to start.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// The state folder; created when it is missing.
    pub state: StateDir,
    /// Number of node agents.
    pub nodes: u32,
    /// CPU devices of each node.
    pub devices: u32,
    /// Whether the first node offers the machine's GPUs: `auto`, `off` or `required`.
    pub gpus: &'static str,
    /// Where state is kept: empty for the embedded store, or `etcd://HOST:PORT`.
    pub store: String,
    /// The `drumline` program, for the children.
    pub binary: PathBuf,
    /// Port of the control API; 0: any free one.
    pub port: u16,
    /// Port of the dashboard; 0: any free one.
    pub dashboard_port: u16,
    /// Port of the control plane's metrics; 0: any free one.
    pub metrics_port: u16,
    /// Port of the gateway; 0: any free one.
    pub gateway_port: u16,
    /// Where the control API is served to other machines.
    pub remote: Option<SocketAddr>,
    /// Where the nodes' ranks are reached by those of other machines.
    pub listen_ip: IpAddr,
}

impl ClusterOptions {
    /// Two nodes of two devices on free ports, with this very program.
    ///
    /// # Errors
    /// When this program cannot be found on disk.
    pub fn new(state: StateDir) -> io::Result<Self> {
        Ok(Self {
            state,
            nodes: 2,
            devices: 2,
            gpus: "auto",
            store: String::new(),
            binary: std::env::current_exe()?,
            port: 0,
            dashboard_port: 0,
            metrics_port: 0,
            gateway_port: 0,
            remote: None,
            listen_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        })
    }
}

/// Why a cluster cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The state folder is in use.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// The state folder cannot be prepared.
    #[error("cannot prepare the state folder: {0}")]
    State(#[source] io::Error),
    /// A process ended again and again.
    #[error("{process} ended {times} times ({how}); the end of {log}:\n{tail}")]
    GaveUp {
        /// Which one.
        process: String,
        /// How often it ended within a minute.
        times: usize,
        /// How it ended the last time.
        how: String,
        /// Its log.
        log: String,
        /// The log's last lines.
        tail: String,
    },
    /// Not everything answered in time.
    #[error("not ready within {waited_s} s: {missing}")]
    NotReady {
        /// The seconds that were waited.
        waited_s: u64,
        /// What is missing.
        missing: String,
    },
}

/// Where a running cluster's parts are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Addresses {
    /// `http://HOST:PORT` of the control API.
    pub control: String,
    /// The dashboard's address, with the key that opens it to read.
    pub dashboard: String,
    /// `https://HOST:PORT` for other machines; empty: they are not served.
    pub remote: String,
    /// The control plane's metrics.
    pub metrics: String,
    /// `http://HOST:PORT` of the gateway.
    pub gateway: String,
    /// Nodes that are ready.
    pub nodes: u32,
    /// Their devices.
    pub devices: u32,
}

/// Process ids of the children, by name: `control`, `gateway`, `node-0` and so on.
pub type Pids = Arc<Mutex<BTreeMap<String, u32>>>;

/// The longest time that each group of children gets to end by itself.
const STOP_GRACE: Duration = Duration::from_secs(8);

/// A running cluster. Dropping it ends the children too, without waiting for them.
#[derive(Debug)]
pub struct EmbeddedCluster {
    options: ClusterOptions,
    pids: Pids,
    gave_up: watch::Receiver<Option<Arc<ClusterError>>>,
    /// The control plane and the gateway; then the agents.
    groups: [(CancellationToken, Vec<JoinHandle<()>>); 2],
    _lock: Lock,
}

impl EmbeddedCluster {
    /// Starts the processes. They are not ready yet: see [`EmbeddedCluster::wait_ready`].
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the state folder is in use by another cluster, or cannot be prepared.
    pub fn start(options: ClusterOptions) -> Result<Self, ClusterError> {
        let state = &options.state;
        state.create().map_err(ClusterError::State)?;
        let lock = Lock::take(state)?;
        state.token_or_new().map_err(ClusterError::State)?;
        state.dashboard_key_or_new().map_err(ClusterError::State)?;
        state.gateway_key_or_new().map_err(ClusterError::State)?;
        // Before two agents make it at once.
        state.agent_token_or_new().map_err(ClusterError::State)?;
        // Left by a cluster that was killed: nobody must send the token to who has the port now.
        for stale in [state.endpoint_file(), state.gateway_file()] {
            match std::fs::remove_file(&stale) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(ClusterError::State(error));
                }
                _ => {}
            }
        }
        let pids = Pids::default();
        let (gave_up_in, gave_up) = watch::channel(None);
        let group = |specs: Vec<ChildSpec>| {
            let stop = CancellationToken::new();
            let tasks = specs
                .into_iter()
                .map(|spec| {
                    tokio::spawn(keep(
                        spec,
                        pids.clone(),
                        stop.clone(),
                        STOP_GRACE,
                        gave_up_in.clone(),
                    ))
                })
                .collect();
            (stop, tasks)
        };
        let groups = [
            group(vec![control(&options), gateway(&options)]),
            group((0..options.nodes).map(|index| agent(&options, index)).collect()),
        ];
        Ok(Self { options, pids, gave_up, groups, _lock: lock })
    }

    /// Waits until every part answers and every agent has registered.
    ///
    /// # Errors
    /// When time is up, with what is missing, or when a process ended again and again.
    pub async fn wait_ready(&self, timeout: Duration) -> Result<Addresses, ClusterError> {
        let begin = Instant::now();
        let mut gave_up = self.gave_up.clone();
        loop {
            if let Some(error) = gave_up.borrow_and_update().clone() {
                return Err(unshare(&error));
            }
            let missing = match probe::probe(&self.access(), &self.options, &self.pids).await {
                Ok(addresses) => return Ok(addresses),
                Err(missing) => missing,
            };
            if begin.elapsed() > timeout {
                return Err(ClusterError::NotReady { waited_s: timeout.as_secs(), missing });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Returns how a client finds this cluster.
    #[must_use]
    pub fn access(&self) -> Access {
        Access { state: self.options.state.clone(), endpoint: None, token_file: None, ca: None }
    }

    /// Returns a child's present process id.
    #[must_use]
    pub fn pid(&self, process: &str) -> Option<u32> {
        self.pids.lock().ok()?.get(process).copied()
    }

    /// Waits until a child has ended too often to be started again.
    pub async fn gave_up(&self) -> ClusterError {
        let mut gave_up = self.gave_up.clone();
        loop {
            if let Some(error) = gave_up.borrow_and_update().clone() {
                return unshare(&error);
            }
            if gave_up.changed().await.is_err() {
                // Every keeper has ended, which only a shutdown does.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ends every process: the control plane first, so that it does not take the agents' end for
    /// failures of their nodes. Jobs that run are found again at the next start.
    pub async fn shutdown(self) {
        let Self { options, groups, _lock, .. } = self;
        for (stop, tasks) in groups {
            stop.cancel();
            for task in tasks {
                let _ = task.await;
            }
        }
        let _ = std::fs::remove_file(options.state.endpoint_file());
        let _ = std::fs::remove_file(options.state.gateway_file());
    }
}

fn unshare(error: &ClusterError) -> ClusterError {
    match error {
        ClusterError::GaveUp { process, times, how, log, tail } => ClusterError::GaveUp {
            process: process.clone(),
            times: *times,
            how: how.clone(),
            log: log.clone(),
            tail: tail.clone(),
        },
        other => ClusterError::State(io::Error::other(other.to_string())),
    }
}

fn base(options: &ClusterOptions, name: &str, role: &[&str]) -> ChildSpec {
    let mut arguments: Vec<String> = role.iter().map(|word| (*word).to_owned()).collect();
    arguments.push("--state-dir".to_owned());
    arguments.push(options.state.path().display().to_string());
    ChildSpec {
        name: name.to_owned(),
        binary: options.binary.clone(),
        arguments,
        log: options.state.log_file(name),
    }
}

fn control(options: &ClusterOptions) -> ChildSpec {
    let mut spec = base(options, "control", &["control", "--attached"]);
    spec.arguments.extend([
        "--listen".to_owned(),
        format!("127.0.0.1:{}", options.port),
        "--dashboard".to_owned(),
        format!("127.0.0.1:{}", options.dashboard_port),
        "--metrics".to_owned(),
        format!("127.0.0.1:{}", options.metrics_port),
    ]);
    if let Some(remote) = options.remote {
        spec.arguments.extend(["--remote".to_owned(), remote.to_string()]);
    }
    if !options.store.is_empty() {
        spec.arguments.extend(["--store".to_owned(), options.store.clone()]);
    }
    spec
}

fn gateway(options: &ClusterOptions) -> ChildSpec {
    let mut spec = base(options, "gateway", &["gateway", "--attached"]);
    let listen = format!("127.0.0.1:{}", options.gateway_port);
    spec.arguments.extend(["--listen".to_owned(), listen]);
    spec
}

fn agent(options: &ClusterOptions, index: u32) -> ChildSpec {
    let node = format!("node-{index}");
    // The nodes share one machine, so each offers its part of the cores.
    let machine = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cores = u32::try_from(machine).unwrap_or(1) / options.nodes.max(1);
    // More nodes than cores: past the last one, so that none claims a core as its own.
    let first_core = if cores == 0 { machine } else { (index * cores) as usize };
    // The GPUs are the machine's, and can be offered once.
    let gpus = if index == 0 { options.gpus } else { "off" };
    let mut spec = base(options, &node, &["agent", "--attached"]);
    for (name, value) in [
        ("--node", node.clone()),
        ("--devices", options.devices.to_string()),
        ("--cores", cores.max(1).to_string()),
        ("--first-core", first_core.to_string()),
        ("--gpus", gpus.to_owned()),
        ("--listen-ip", options.listen_ip.to_string()),
    ] {
        spec.arguments.extend([name.to_owned(), value]);
    }
    spec
}
