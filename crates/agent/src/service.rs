//! The dispatcher: owns the agent's state and handles one input at a time.

mod gpus;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drumline_spec::{JobSpec, Work};
use drumline_telemetry::gpu::NvmlProblem;
use drumline_telemetry::http as telemetry;
use drumline_types::{JobId, NodeName, RankPhase};
use drumline_wire::auth::Token;
use drumline_wire::rank_host::RankCall;
use drumline_wire::v1::agent_down::Kind as Down;
use drumline_wire::v1::agent_up::Kind as Up;
use drumline_wire::{now_ms, v1};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::devices::Devices;
use crate::environment::{LaunchContext, variables};
use crate::gpus::{Gpus, Policy};
use crate::host;
use crate::link::{self, LinkEvent};
use crate::logs;
use crate::metrics::Metrics;
use crate::process::{Ask, Launch, RankProcess};
use crate::ranks::{Gangs, LocalGang, Rank, RankKey, status};
use crate::sampling::Sampler;
use crate::supervise::Notice;

/// Where the control plane is.
#[derive(Debug, Clone)]
pub enum ControlAddress {
    /// A fixed `http://HOST:PORT`, or `https://HOST:PORT`.
    Url(String),
    /// A JSON file with a field `control`, read again before every try, so that a control plane
    /// that comes back on another port is found.
    File(PathBuf),
}

impl ControlAddress {
    /// Returns the URL as it is now.
    ///
    /// # Errors
    /// When the file is missing or has no such field; the text names it.
    pub fn resolve(&self) -> Result<String, String> {
        match self {
            Self::Url(url) => Ok(url.clone()),
            Self::File(path) => {
                let place = path.display();
                let text = fs::read_to_string(path).map_err(|error| format!("{place}: {error}"))?;
                let json: serde_json::Value =
                    serde_json::from_str(&text).map_err(|error| format!("{place}: {error}"))?;
                let url = json.get("control").and_then(serde_json::Value::as_str);
                url.map(str::to_owned).ok_or_else(|| format!("{place}: no field \"control\""))
            }
        }
    }
}

/// What an agent needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// This node's name.
    pub node: NodeName,
    /// The control plane.
    pub control: ControlAddress,
    /// The one certificate, in PEM, that is trusted there, where it is reached by TLS.
    pub control_ca: Option<String>,
    /// The cluster's token, or the agents'.
    pub token: Token,
    /// Folder for logs, specs and work folders of this node's ranks.
    pub state_dir: PathBuf,
    /// Folder that all nodes share, for what ranks write together (checkpoints).
    pub shared_dir: PathBuf,
    /// Number of CPU devices to offer.
    pub cpu_devices: u32,
    /// Cores that this node's devices share; 0: all that the machine has.
    pub cores: u32,
    /// The first of them, among those that this process may run on: agents that share a machine
    /// each have their own.
    pub first_core: u32,
    /// Measured f32 matmul rate of one core, FLOP/s; 0: not known. A run's share of the peak is
    /// told against it.
    pub core_flops: f64,
    /// IP address on which this node's ranks listen; the agent itself does on loopback.
    pub listen_ip: IpAddr,
    /// The `drumline` binary, for supervisors and native ranks.
    pub binary: PathBuf,
    /// Where metrics are served; port 0: any free one.
    pub metrics_port: u16,
    /// Whether its GPUs are offered.
    pub gpus: Policy,
    /// NVML's file; `None`: the system's.
    pub nvml: Option<OsString>,
    /// The node's place in the fleet, outermost level first.
    pub topology: Vec<v1::TopologyStep>,
}

impl Options {
    /// Returns options with an address on loopback and metrics on a free port.
    #[must_use]
    pub fn loopback(
        node: NodeName,
        control: ControlAddress,
        token: Token,
        state_dir: PathBuf,
        binary: PathBuf,
    ) -> Self {
        Self {
            node,
            control,
            control_ca: None,
            token,
            shared_dir: state_dir.clone(),
            state_dir,
            cpu_devices: 2,
            cores: 0,
            first_core: 0,
            core_flops: 0.0,
            listen_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            binary,
            metrics_port: 0,
            gpus: Policy::Auto,
            nvml: None,
            topology: Vec::new(),
        }
    }
}

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A folder cannot be made.
    #[error("cannot create {path}: {source}")]
    StateDir {
        /// The folder.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {ip}: {source}")]
    Listen {
        /// The address.
        ip: IpAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// GPUs are required, and cannot be used.
    #[error("no GPU can be offered: {problem}. {} `drumline doctor` shows the rest", problem.remedy())]
    Gpus {
        /// Why.
        problem: NvmlProblem,
    },
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

/// Longest time that ranks get to end when the agent stops.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// Messages kept for the control plane while it is away; the oldest reports go first.
const OUTBOX_MAX: usize = 4096;
/// Log reads at one time.
const LOG_READS_MAX: usize = 64;
/// Bytes of a failed rank's log that are searched for its last line.
const LOG_TAIL: u64 = 4096;

/// Runs an agent until `stop`. Ranks are ended before it returns.
///
/// # Errors
/// [`AgentError`] when it cannot start. Once started, it lives through everything but `stop`.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), AgentError> {
    for path in [&options.state_dir, &options.shared_dir] {
        make_dir(path).map_err(|source| AgentError::StateDir { path: path.clone(), source })?;
    }
    let (calls_in, calls) = mpsc::channel(256);
    let servers = CancellationToken::new();
    let _servers_end = servers.clone().drop_guard();
    let rank_host = host::serve(calls_in, servers.clone()).await?;
    let gpus = gpus::find(&options).await?;
    let devices = Devices::discover(&options, &gpus);
    let metrics = Metrics::new(options.node.as_str(), &devices, &gpus)?;
    let (listener, address) = host::bind(options.metrics_port).await?;
    let metrics_url = format!("http://{address}/metrics");
    tokio::spawn(telemetry::serve(listener, metrics.registry.clone(), None, None, servers));
    let (link_in, link) = mpsc::channel(256);
    let (notices_in, notices) = mpsc::channel(256);
    let (timers_in, timers) = mpsc::channel(256);
    tokio::spawn(link::run(
        options.control.clone(),
        options.control_ca.clone(),
        options.token.clone(),
        link_in,
        stop.child_token(),
    ));
    tracing::info!(node = %options.node, devices = devices.list.len(), "agent started");
    Agent {
        instance: format!("{}-{}", std::process::id(), now_ms()),
        agent_url: format!("http://{rank_host}"),
        host: host_name(),
        metrics_url,
        devices,
        gpus,
        sampler: Sampler::default(),
        metrics,
        gangs: Gangs::default(),
        outbox: VecDeque::new(),
        up: None,
        opening: None,
        leader_term: 0,
        heartbeat: Duration::from_secs(1),
        notices: notices_in,
        timers: timers_in,
        log_reads: BTreeMap::new(),
        options,
    }
    .dispatch(Inputs { link, calls, notices, timers }, stop)
    .await;
    Ok(())
}

struct Inputs {
    link: mpsc::Receiver<LinkEvent>,
    calls: mpsc::Receiver<RankCall>,
    notices: mpsc::Receiver<(RankKey, Notice)>,
    timers: mpsc::Receiver<Timer>,
}

/// Something that was put off.
#[derive(Debug)]
enum Timer {
    /// The grace of a stopped gang is over.
    Kill { job: String, attempt: u32 },
    /// A log read has ended.
    LogReadEnded(u64),
}

struct Agent {
    options: Options,
    instance: String,
    agent_url: String,
    host: String,
    metrics_url: String,
    devices: Devices,
    gpus: Gpus,
    sampler: Sampler,
    metrics: Metrics,
    gangs: Gangs,
    outbox: VecDeque<v1::AgentUp>,
    up: Option<mpsc::Sender<v1::AgentUp>>,
    /// A stream that has not answered yet.
    opening: Option<mpsc::Sender<v1::AgentUp>>,
    leader_term: u64,
    heartbeat: Duration,
    notices: mpsc::Sender<(RankKey, Notice)>,
    timers: mpsc::Sender<Timer>,
    log_reads: BTreeMap<u64, CancellationToken>,
}

impl Agent {
    async fn dispatch(mut self, mut inputs: Inputs, stop: CancellationToken) {
        let mut beat = tokio::time::interval(self.heartbeat);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let up = self.up.clone();
            let room = async {
                match &up {
                    Some(up) => up.reserve().await.ok(),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => break,
                permit = room, if !self.outbox.is_empty() => match permit {
                    Some(permit) => {
                        if let Some(message) = self.outbox.pop_front() {
                            permit.send(message);
                        }
                    }
                    None => self.up = None,
                },
                Some(event) = inputs.link.recv() => {
                    let before = self.heartbeat;
                    self.link_event(event);
                    if self.heartbeat != before {
                        beat = tokio::time::interval(self.heartbeat);
                    }
                }
                Some(call) = inputs.calls.recv() => self.rank_call(call),
                Some((key, notice)) = inputs.notices.recv() => self.notice(&key, &notice),
                Some(timer) = inputs.timers.recv() => self.timer(timer),
                _ = beat.tick() => self.beat(),
            }
        }
        self.end_all(&mut inputs.notices).await;
    }

    /// Ends every rank: SIGTERM, then SIGKILL after the grace.
    async fn end_all(&mut self, notices: &mut mpsc::Receiver<(RankKey, Notice)>) {
        for (ask, wait) in [(Ask::Terminate, STOP_GRACE), (Ask::Kill, STOP_GRACE)] {
            let live = |gangs: &Gangs| gangs.iter().any(|(_, gang)| !gang.has_ended());
            for rank in self.gangs.iter().flat_map(|(_, gang)| gang.ranks.values()) {
                if let Some(process) = &rank.process {
                    process.ask(ask);
                }
            }
            let _ = tokio::time::timeout(wait, async {
                while live(&self.gangs) {
                    let Some((key, notice)) = notices.recv().await else { break };
                    self.notice(&key, &notice);
                }
            })
            .await;
        }
    }

    fn send(&mut self, kind: Up) {
        if self.outbox.len() >= OUTBOX_MAX {
            // A step report is the only thing that a later one makes up for.
            let report = self.outbox.iter().position(|up| {
                matches!(&up.kind, Some(Up::Report(r)) if r.checkpoint.is_none() && r.error.is_empty())
                    || matches!(up.kind, Some(Up::Heartbeat(_)))
            });
            match report {
                Some(at) => drop(self.outbox.remove(at)),
                // A new stream begins with a hello, which tells every status again.
                None => {
                    self.up = None;
                    self.opening = None;
                    self.outbox.retain(|up| matches!(up.kind, Some(Up::Report(_))));
                }
            }
        }
        self.outbox.push_back(v1::AgentUp { kind: Some(kind) });
    }

    fn send_status(&mut self, key: &RankKey) {
        let Some(rank) = self.gangs.rank_mut(key) else { return };
        let message = status(&key.job, key.attempt, key.rank, rank);
        self.send(Up::RankStatus(message));
    }

    fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Opened(up) => {
                // The hello tells every status, so queued ones would only repeat it.
                self.outbox.retain(|up| matches!(up.kind, Some(Up::Report(_))));
                let mut hello = self.hello();
                let ends = self.ends_after_reports(&hello.ranks);
                // Those whose end is told later are shown as running still.
                for status in hello.ranks.iter_mut().filter(|status| ends.contains(status)) {
                    RankPhase::Running.as_str().clone_into(&mut status.phase);
                    status.exit_code = None;
                    status.signal = None;
                    status.message.clear();
                }
                let _ = up.try_send(v1::AgentUp { kind: Some(Up::Hello(hello)) });
                for status in ends {
                    self.outbox.push_back(v1::AgentUp { kind: Some(Up::RankStatus(status)) });
                }
                let joins: Vec<_> = self
                    .gangs
                    .iter()
                    .filter(|(_, gang)| gang.world.is_none())
                    .flat_map(|(_, gang)| gang.ranks.values())
                    .filter_map(|rank| rank.waiting.as_ref().map(|(join, _)| join.clone()))
                    .collect();
                for join in joins {
                    self.send(Up::Join(join));
                }
                // Nothing more is handed over before something has come down: a control plane that
                // does not lead yet would take it and lose it.
                self.up = None;
                self.opening = Some(up);
            }
            LinkEvent::Closed => {
                self.up = None;
                self.opening = None;
                for read in self.log_reads.values() {
                    read.cancel();
                }
            }
            LinkEvent::Down(down) => {
                if let Some(up) = self.opening.take() {
                    self.up = Some(up);
                }
                self.down(down.kind);
            }
        }
    }

    fn down(&mut self, kind: Option<Down>) {
        match kind {
            Some(Down::Welcome(welcome)) => {
                self.leader_term = self.leader_term.max(welcome.leader_term);
                let interval = welcome.heartbeat_interval_ms.clamp(50, 60_000);
                self.heartbeat = Duration::from_millis(interval);
            }
            Some(Down::Launch(launch)) => self.launch(&launch),
            Some(Down::Stop(stop)) => self.stop_gang(stop),
            Some(Down::World(world)) => self.world(&world),
            Some(Down::ReadLog(read)) => self.read_log(read),
            Some(Down::ClearDevice(clear)) => self.clear_device(clear.index),
            Some(Down::StopReadLog(stop)) => {
                if let Some(read) = self.log_reads.get(&stop.request) {
                    read.cancel();
                }
            }
            None => tracing::warn!("an empty message came down; a newer control plane?"),
        }
    }

    /// Returns the ends of ranks whose reports still wait to be sent: told before them, the end
    /// would make them late news of a rank that is over.
    fn ends_after_reports(&self, statuses: &[v1::RankStatus]) -> Vec<v1::RankStatus> {
        let reported = |status: &v1::RankStatus| {
            self.outbox.iter().any(|up| {
                matches!(&up.kind, Some(Up::Report(report))
                    if report.job == status.job && report.attempt == status.attempt)
            })
        };
        let ended = |status: &&v1::RankStatus| {
            [RankPhase::Succeeded, RankPhase::Failed]
                .iter()
                .any(|phase| phase.as_str() == status.phase)
        };
        statuses.iter().filter(ended).filter(|status| reported(status)).cloned().collect()
    }

    fn hello(&self) -> v1::Hello {
        v1::Hello {
            node: self.options.node.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: self.instance.clone(),
            cores: self.devices.cores,
            memory_bytes: self.devices.memory_bytes,
            devices: self.devices.list.clone(),
            topology: self.topology(),
            ranks: self.gangs.statuses(),
            metrics_url: self.metrics_url.clone(),
            address: self.options.listen_ip.to_string(),
        }
    }

    fn launch(&mut self, launch: &v1::LaunchGang) {
        if self.gangs.get(&launch.job, launch.attempt).is_some() {
            // Sent again after a reconnect: what runs is told again, nothing starts twice.
            for rank in &launch.ranks {
                self.send_status(&rank_key(launch, rank.rank));
            }
            return;
        }
        if let Err(reason) = self.try_launch(launch) {
            tracing::warn!(job = %launch.job, attempt = launch.attempt, %reason, "launch refused");
            for rank in &launch.ranks {
                let mut refused = Rank::launching(rank.device, now_ms());
                refused.end(None, None, &reason);
                let told = status(&launch.job, launch.attempt, rank.rank, &refused);
                self.send(Up::RankStatus(told));
            }
        }
    }

    fn try_launch(&mut self, launch: &v1::LaunchGang) -> Result<(), String> {
        let job: JobId = launch.job.parse().map_err(|error| format!("{error}"))?;
        if launch.leader_term < self.leader_term {
            return Err(format!(
                "leader term {} is older than {}",
                launch.leader_term, self.leader_term
            ));
        }
        self.leader_term = launch.leader_term;
        let newest = self.gangs.newest_attempt(job.as_str());
        if launch.attempt < newest {
            return Err(format!("attempt {} is older than {newest}", launch.attempt));
        }
        let spec: JobSpec = serde_json::from_str(&launch.spec_json)
            .map_err(|error| format!("the spec cannot be read: {error}"))?;
        let secret = Token::new(&launch.secret).map_err(|error| error.to_string())?;
        for (_, older) in self.gangs.up_to_mut(job.as_str(), launch.attempt) {
            older.stopping = true;
            older.forget = true;
            for rank in older.ranks.values().filter_map(|rank| rank.process.as_ref()) {
                rank.ask(Ask::Kill);
            }
        }
        let folder = logs::attempt_dir(&self.options.state_dir, job.as_str(), launch.attempt);
        make_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let job_dir = self.options.shared_dir.join("jobs").join(job.as_str());
        make_dir(&job_dir).map_err(|error| format!("{}: {error}", job_dir.display()))?;
        let spec_file = folder.join("spec.json");
        fs::write(&spec_file, &launch.spec_json)
            .map_err(|error| format!("{}: {error}", spec_file.display()))?;

        let joins = !matches!(spec.work, Work::CommandJob(_));
        let mut gang = LocalGang {
            secret,
            joins,
            ranks: BTreeMap::new(),
            world: None,
            stopping: false,
            forget: false,
        };
        let context = LaunchContext {
            launch,
            spec: &spec,
            spec_file: &spec_file,
            job_dir: &job_dir,
            shared_dir: &self.options.shared_dir,
            agent_url: &self.agent_url,
            host: &self.host,
            listen_ip: &self.options.listen_ip.to_string(),
            devices: &self.devices,
            gpus: &self.gpus,
        };
        for rank in &launch.ranks {
            let mut state = Rank::launching(rank.device, now_ms());
            match self.start_rank(&context, rank, &folder) {
                Ok(process) => {
                    self.metrics.rank_started();
                    state.process = Some(process);
                }
                Err(error) => state.end(None, None, &error.to_string()),
            }
            gang.ranks.insert(rank.rank, state);
        }
        self.gangs.insert(job.as_str(), launch.attempt, gang);
        for rank in &launch.ranks {
            self.send_status(&rank_key(launch, rank.rank));
        }
        Ok(())
    }

    fn start_rank(
        &self,
        context: &LaunchContext<'_>,
        rank: &v1::LaunchRank,
        folder: &Path,
    ) -> std::io::Result<RankProcess> {
        let binary = self.options.binary.display().to_string();
        let (argv, workdir) = match &context.spec.work {
            Work::CommandJob(command) if command.workdir.is_empty() => {
                (command.argv.clone(), folder.to_owned())
            }
            Work::CommandJob(command) => (command.argv.clone(), command.workdir.clone().into()),
            Work::TrainingJob(_) | Work::ModelService(_) => {
                (vec![binary.clone(), "rank".to_owned()], folder.to_owned())
            }
        };
        // Killed with its supervisor, whatever the program is.
        let argv = [binary, "rank-exec".to_owned(), "--".to_owned()].into_iter().chain(argv);
        let launch = Launch {
            supervisor: self.options.binary.clone(),
            argv: argv.collect(),
            environment: variables(context, rank),
            workdir,
            log: folder.join(format!("rank-{}.log", rank.rank)),
        };
        RankProcess::start(&launch, rank_key(context.launch, rank.rank), self.notices.clone())
    }

    fn stop_gang(&mut self, stop: v1::StopGang) {
        let ask = if stop.grace_ms == 0 { Ask::Kill } else { Ask::Terminate };
        let mut live = false;
        let mut keys = Vec::new();
        for (attempt, gang) in self.gangs.up_to_mut(&stop.job, stop.attempt) {
            gang.stopping = true;
            gang.forget |= stop.forget;
            for (rank, state) in &gang.ranks {
                keys.push(RankKey { job: stop.job.clone(), attempt, rank: *rank });
                if let Some(process) = &state.process {
                    process.ask(ask);
                    live = true;
                }
            }
        }
        for key in &keys {
            self.send_status(key);
        }
        if live && ask == Ask::Terminate {
            let timers = self.timers.clone();
            let grace = Duration::from_millis(stop.grace_ms.min(600_000));
            tokio::spawn(async move {
                tokio::time::sleep(grace).await;
                let _ = timers.send(Timer::Kill { job: stop.job, attempt: stop.attempt }).await;
            });
        }
        self.gangs.forget_ended();
    }

    fn timer(&mut self, timer: Timer) {
        match timer {
            Timer::Kill { job, attempt } => {
                for (_, gang) in self.gangs.up_to_mut(&job, attempt) {
                    for process in gang.ranks.values().filter_map(|rank| rank.process.as_ref()) {
                        process.ask(Ask::Kill);
                    }
                }
            }
            Timer::LogReadEnded(request) => {
                self.log_reads.remove(&request);
            }
        }
    }

    fn world(&mut self, world: &v1::World) {
        let Some(gang) = self.gangs.get_mut(&world.job, world.attempt) else { return };
        let mut joined = Vec::new();
        for (rank, state) in &mut gang.ranks {
            let Some((_, reply)) = state.waiting.take() else { continue };
            let answer = if world.error.is_empty() {
                state.phase = RankPhase::Running;
                state.at_ms = now_ms();
                joined.push(*rank);
                Ok(world.clone())
            } else {
                Err(Status::aborted(world.error.clone()))
            };
            let _ = reply.send(answer);
        }
        if world.error.is_empty() {
            gang.world = Some(world.clone());
        }
        for rank in joined {
            let key = RankKey { job: world.job.clone(), attempt: world.attempt, rank };
            self.send_status(&key);
        }
    }

    fn rank_call(&mut self, call: RankCall) {
        match call {
            RankCall::Join { join, secret, reply } => {
                let key = RankKey { job: join.job.clone(), attempt: join.attempt, rank: join.rank };
                if let Err(status) = self.admit(&key, &secret) {
                    let _ = reply.send(Err(status));
                    return;
                }
                let world =
                    self.gangs.get(&key.job, key.attempt).and_then(|gang| gang.world.clone());
                if let Some(world) = world {
                    let _ = reply.send(Ok(world));
                    return;
                }
                if let Some(rank) = self.gangs.rank_mut(&key) {
                    rank.waiting = Some((join.clone(), reply));
                }
                self.send(Up::Join(join));
            }
            RankCall::Report { report, secret, reply } => {
                let key =
                    RankKey { job: report.job.clone(), attempt: report.attempt, rank: report.rank };
                let _ = reply.send(self.take_report(&key, &secret, *report));
            }
        }
    }

    fn take_report(
        &mut self,
        key: &RankKey,
        secret: &str,
        report: v1::RankReport,
    ) -> Result<v1::RankCommand, Status> {
        self.admit(key, secret)?;
        let stop = self.gangs.get(&key.job, key.attempt).is_some_and(|gang| gang.stopping);
        if !report.error.is_empty()
            && let Some(rank) = self.gangs.rank_mut(key)
        {
            report.error.clone_into(&mut rank.message);
        }
        self.send(Up::Report(report));
        Ok(v1::RankCommand { stop, ..v1::RankCommand::default() })
    }

    /// Lets a rank in that shows its attempt's secret and still runs here.
    fn admit(&self, key: &RankKey, secret: &str) -> Result<(), Status> {
        let gang = self
            .gangs
            .get(&key.job, key.attempt)
            .filter(|gang| gang.secret.matches(secret))
            .ok_or_else(|| Status::unauthenticated("no such attempt, or not its secret"))?;
        match gang.ranks.get(&key.rank) {
            Some(rank) if !rank.phase.is_terminal() => Ok(()),
            Some(_) => Err(Status::failed_precondition("this rank has ended")),
            None => Err(Status::not_found("this rank does not run here")),
        }
    }

    fn notice(&mut self, key: &RankKey, notice: &Notice) {
        let log = logs::path(&self.options.state_dir, &key.job, key.attempt, key.rank);
        let Some(gang) = self.gangs.get_mut(&key.job, key.attempt) else { return };
        let joins = gang.joins;
        let Some(rank) = gang.ranks.get_mut(&key.rank) else { return };
        rank.notice(notice, joins, now_ms());
        if rank.phase == RankPhase::Failed {
            self.metrics.rank_failed();
            if rank.message.is_empty() {
                rank.message = last_line(&log);
            }
        }
        self.send_status(key);
        self.gangs.forget_ended();
    }

    fn read_log(&mut self, mut read: v1::ReadLog) {
        let Some(up) = self.up.clone() else { return };
        let request = read.request;
        let refuse = |error: String| {
            let data = v1::LogData { request, end: true, error, ..v1::LogData::default() };
            Up::Log(data)
        };
        if self.log_reads.len() >= LOG_READS_MAX {
            self.send(refuse(format!("{LOG_READS_MAX} logs are being read; try again later")));
            return;
        }
        let state_dir = &self.options.state_dir;
        if read.job.parse::<JobId>().is_err() {
            self.send(refuse(format!("{:?} is no job id", read.job)));
            return;
        }
        if read.attempt == 0 {
            read.attempt = logs::newest_attempt(state_dir, &read.job, read.rank).unwrap_or(0);
        }
        let file = logs::path(state_dir, &read.job, read.attempt, read.rank);
        let ended = self
            .gangs
            .get(&read.job, read.attempt)
            .and_then(|gang| gang.ranks.get(&read.rank))
            .map_or_else(|| watch::Sender::new(true).subscribe(), |rank| rank.ended.subscribe());
        let cancel = CancellationToken::new();
        self.log_reads.insert(request, cancel.clone());
        let timers = self.timers.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = logs::stream(read, file, ended, up) => {}
            }
            let _ = timers.send(Timer::LogReadEnded(request)).await;
        });
    }

    fn beat(&mut self) {
        self.look_at_gpus();
        let state_dir = &self.options.state_dir;
        let heartbeat = self.sampler.sample(&self.devices, &self.gpus, &self.gangs, state_dir);
        self.metrics.update(&heartbeat, &self.gangs, &self.gpus);
        // Health is of use only while it is fresh.
        if self.up.is_some() {
            self.send(Up::Heartbeat(heartbeat));
        }
    }
}

fn rank_key(launch: &v1::LaunchGang, rank: u32) -> RankKey {
    RankKey { job: launch.job.clone(), attempt: launch.attempt, rank }
}

fn make_dir(path: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Returns the last line of a log that says something, as evidence of a failure.
fn last_line(log: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> std::io::Result<String> {
        let mut file = fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.chars().take(400).collect()
}

fn host_name() -> String {
    // Ranks of two hosts must never try to share memory: the boot id tells hosts apart even where
    // their names are the same.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{name}/{}", boot.trim())
}
