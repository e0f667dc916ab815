//! The processes of a cluster, as hidden commands of the one binary: each joins a crate's
//! `run(Options)` to the state folder, to signals and to the process that started it.

mod control;
mod node_agent;
mod operator;
mod pod_gateway;

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use drumline_agent::ControlAddress;
use drumline_types::NodeName;
use drumline_wire::auth::Token;
use drumline_wire::line::Credential;
use drumline_wire::v1;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::args::Global;
use crate::client::Access;
use crate::failure::Failure;
use crate::state::{GatewayEndpoint, StateDir, read_token, write_json};

/// The hidden commands.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// The control plane, with the dashboard.
    #[command(hide = true)]
    Control(ControlArgs),
    /// The node agent of one node.
    #[command(hide = true)]
    Agent(AgentArgs),
    /// The OpenAI-compatible gateway.
    #[command(hide = true)]
    Gateway(GatewayArgs),
    /// The control plane of a Kubernetes cluster.
    #[command(hide = true)]
    Operator(Box<operator::OperatorArgs>),
    /// What watches one node of a Kubernetes cluster.
    #[command(hide = true)]
    NodeAgent(node_agent::NodeAgentArgs),
    /// The gateway of a Kubernetes cluster.
    #[command(hide = true)]
    PodGateway(pod_gateway::PodGatewayArgs),
    /// One rank of a gang that trains or serves.
    #[command(hide = true)]
    Rank,
    /// One process of `bench collective`.
    #[command(hide = true)]
    BenchCollectiveWorker {
        /// Its values are on a GPU.
        #[arg(long)]
        gpu: bool,
    },
    /// The tests of one GPU for `doctor`.
    #[command(hide = true)]
    DoctorGpu,
    /// Stands between an agent and one rank.
    #[command(hide = true)]
    Supervise {
        /// The rank's program and arguments.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Becomes a program that dies with its supervisor.
    #[command(hide = true)]
    RankExec {
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
}

/// What every long-lived role takes.
#[derive(Debug, Args)]
pub struct Attached {
    /// Stop when standard input ends: the process that started this one is gone.
    #[arg(long)]
    pub attached: bool,
}

/// Arguments of `agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// This node's name.
    #[arg(long)]
    pub node: String,
    /// What it offers.
    #[command(flatten)]
    pub node_args: NodeArgs,
    /// How it ends.
    #[command(flatten)]
    pub attached: Attached,
}

/// Join another machine's cluster as a node, in the foreground. The cluster was started with `up --remote`;
/// `--endpoint` is that address, `--ca` its `tls.crt` and `--token-file` its `agent-token`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// This node's name [default: this machine's].
    #[arg(long)]
    pub node: Option<String>,
    /// What it offers.
    #[command(flatten)]
    pub node_args: NodeArgs,
}

/// What a node offers.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// CPU devices to offer.
    #[arg(long, default_value_t = 2)]
    pub devices: u32,
    /// Cores that the devices share; 0: all.
    #[arg(long, default_value_t = 0)]
    pub cores: u32,
    /// The first of them: agents that share a machine each have their own.
    #[arg(long, default_value_t = 0)]
    pub first_core: u32,
    /// Whether the node's GPUs are offered.
    #[arg(long, value_enum, default_value_t = Gpus::Auto)]
    pub gpus: Gpus,
    /// A step of the node's place in the fleet, outermost level first, such as rack=r7; after an `@`,
    /// what a device can send to another in that domain, in GB/s.
    #[arg(long, value_name = "LEVEL=NAME[@GB/S]")]
    pub topology: Vec<String>,
    /// Address at which this node's ranks are reached by those of other nodes [default of `join`: the
    /// one that it reaches the control plane from]. What ranks send each other is not encrypted.
    #[arg(long, value_name = "IP")]
    pub listen_ip: Option<IpAddr>,
    /// Folder that all nodes share, for what ranks write together [default: in the state folder].
    #[arg(long, value_name = "DIR")]
    pub shared_dir: Option<PathBuf>,
}

/// Reads one step of a node's place.
fn place(text: &str) -> Result<v1::TopologyStep, Failure> {
    let wrong = |why: String| Failure::user(format!("--topology {text}: {why}"));
    let (pair, link_mb_per_s) = drumline_cluster::split_link(text).map_err(wrong)?;
    match pair.split_once('=') {
        Some((level, name)) if !level.is_empty() && !name.is_empty() => {
            Ok(v1::TopologyStep { level: level.to_owned(), name: name.to_owned(), link_mb_per_s })
        }
        _ => Err(wrong("LEVEL=NAME or LEVEL=NAME@GB/S is wanted, such as rack=r7@50".to_owned())),
    }
}

/// Whether a node offers its GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Gpus {
    /// Those that are there, if any.
    #[default]
    Auto,
    /// None.
    Off,
    /// At least one, or the agent does not start.
    Required,
}

impl Gpus {
    /// Returns the word on the command line.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Required => "required",
        }
    }

    fn policy(self) -> drumline_agent::gpus::Policy {
        match self {
            Self::Auto => drumline_agent::gpus::Policy::Auto,
            Self::Off => drumline_agent::gpus::Policy::Off,
            Self::Required => drumline_agent::gpus::Policy::Required,
        }
    }
}

/// Arguments of `control`.
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// Where the API and the agents are served.
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    pub listen: SocketAddr,
    /// Where both are served with TLS, for other machines.
    #[arg(long)]
    pub remote: Option<SocketAddr>,
    /// Where the dashboard is served.
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    pub dashboard: SocketAddr,
    /// Where metrics are served.
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    pub metrics: SocketAddr,
    /// Further HOST or HOST:PORT under which the dashboard may be called.
    #[arg(long)]
    pub allow_host: Vec<String>,
    /// The store; without it, a file in the state folder.
    #[arg(long)]
    pub store: Option<String>,
    /// How it ends.
    #[command(flatten)]
    pub attached: Attached,
}

/// Arguments of `gateway`.
#[derive(Debug, Args)]
pub struct GatewayArgs {
    /// Where to listen.
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    pub listen: SocketAddr,
    /// Further HOST or HOST:PORT under which clients may call.
    #[arg(long)]
    pub allow_host: Vec<String>,
    /// How it ends.
    #[command(flatten)]
    pub attached: Attached,
}

/// Longest time that a role gets to end by itself once it was asked to.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

impl Role {
    /// Runs the roles that must own the main thread and have no runtime.
    ///
    /// # Errors
    /// Gives the role back when it is not one of them.
    pub fn run_plain(self) -> Result<ExitCode, Box<Self>> {
        match self {
            Self::Supervise { argv } => {
                Ok(drumline_agent::supervise::run(&argv).unwrap_or_else(|error| {
                    crate::output::note(&format!("supervisor: {error}"));
                    ExitCode::FAILURE
                }))
            }
            Self::RankExec { argv } => {
                let Err(error) = drumline_agent::supervise::exec(&argv);
                crate::output::note(&format!("rank: {error}"));
                // What shells say of a program that cannot be run.
                Ok(ExitCode::from(127))
            }
            Self::Rank => {
                // From the main thread, whose end is the process's.
                if let Err(error) = drumline_agent::supervise::die_with_supervisor() {
                    crate::output::note(&format!("rank: {error}"));
                    return Ok(ExitCode::FAILURE);
                }
                crate::log_to_stderr();
                Ok(drumline_rank::run())
            }
            Self::BenchCollectiveWorker { gpu } => Ok(ended(crate::bench::collective_worker(gpu))),
            Self::DoctorGpu => Ok(ended(crate::doctor::test_gpu())),
            other => Err(Box::new(other)),
        }
    }

    /// Runs a long-lived role until it is asked to stop.
    ///
    /// # Errors
    /// Failed, when it cannot start.
    pub async fn run(self, global: &Global) -> Result<(), Failure> {
        // Their state is the cluster's, and their identity the kubeconfig's or service account's.
        let this = match self {
            Self::Operator(args) => {
                return operator::run(*args, stop_token(&Attached { attached: false })?).await;
            }
            Self::NodeAgent(args) => {
                return node_agent::run(args, stop_token(&Attached { attached: false })?).await;
            }
            Self::PodGateway(args) => {
                return pod_gateway::run(args, stop_token(&Attached { attached: false })?).await;
            }
            other => other,
        };
        let access = global.access()?;
        let state = access.state.clone();
        state.create()?;
        match this {
            Self::Control(args) => {
                let stop = stop_token(&args.attached)?;
                control::run(args, state, access.token()?, stop).await
            }
            Self::Agent(args) => {
                let stop = stop_token(&args.attached)?;
                let token = match (&global.token_file, &global.endpoint) {
                    (Some(_), _) => access.token()?,
                    (None, Some(_)) => read_token(&state.agent_token_file())?,
                    (None, None) => state.agent_token_or_new()?,
                };
                let control = control_address(&access)?;
                agent(&args.node, args.node_args, &access, control, token, stop).await
            }
            Self::Gateway(args) => {
                let stop = stop_token(&args.attached)?;
                let control = control_address(&access)?;
                let token = access.token()?;
                let options = drumline_gateway::Options {
                    listen: args.listen,
                    allow_hosts: args.allow_host,
                    control: Arc::new(move || control.resolve()),
                    control_ca: access.certificate()?,
                    credential: Credential::Fixed(token.clone()),
                    keys: vec![state.gateway_key_or_new()?, token],
                    in_pod: None,
                };
                let (ready, listening) = oneshot::channel();
                tokio::spawn(tell_gateway(state, listening));
                drumline_gateway::run(options, ready, stop)
                    .await
                    .map_err(|error| Failure::failed(error.to_string()))
            }
            Self::Operator(_)
            | Self::NodeAgent(_)
            | Self::PodGateway(_)
            | Self::Rank
            | Self::BenchCollectiveWorker { .. }
            | Self::DoctorGpu
            | Self::Supervise { .. }
            | Self::RankExec { .. } => Err(Failure::failed("this role has no runtime")),
        }
    }
}

/// Runs the agent of a node until `stop`.
async fn agent(
    name: &str,
    args: NodeArgs,
    access: &Access,
    control: ControlAddress,
    token: Token,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let node: NodeName = name.parse().map_err(|error| Failure::user(format!("--node: {error}")))?;
    let measured = tokio::task::spawn_blocking(core_flops).await;
    let state = &access.state;
    let shared = args.shared_dir.unwrap_or_else(|| state.shared_dir());
    let shared = std::path::absolute(&shared)
        .map_err(|error| Failure::user(format!("--shared-dir {}: {error}", shared.display())))?;
    let options = drumline_agent::Options {
        control_ca: access.certificate()?,
        cpu_devices: args.devices,
        cores: args.cores,
        first_core: args.first_core,
        core_flops: measured.unwrap_or_default(),
        gpus: args.gpus.policy(),
        topology: args.topology.iter().map(|text| place(text)).collect::<Result<_, _>>()?,
        listen_ip: args.listen_ip.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        shared_dir: shared,
        ..drumline_agent::Options::loopback(
            node,
            control,
            token,
            state.node_dir(name),
            std::env::current_exe()?,
        )
    };
    drumline_agent::run(options, stop).await.map_err(|error| Failure::failed(error.to_string()))
}

/// Runs `drumline join` until Ctrl-C.
///
/// # Errors
/// The user's mistake, when it is not said whom to join, or with what; failed, when it cannot start.
pub async fn join(mut args: JoinArgs, global: &Global) -> Result<(), Failure> {
    let access = global.access()?;
    let Some(url) = access.endpoint.as_deref().filter(|url| url.starts_with("http")) else {
        return Err(Failure::user("join: no --endpoint says whom to join").hint(
            "`drumline up --remote IP:PORT` on the other machine prints its address; give it as \
             `--endpoint https://IP:PORT`",
        ));
    };
    if access.token_file.is_none() {
        return Err(Failure::user("join: no --token-file").hint(
            "copy `agent-token` and `tls.crt` from the other machine's state folder, and name them \
             with `--token-file` and `--ca`",
        ));
    }
    let (address, token) = (access.address()?, access.token()?);
    // Refused now rather than again and again later: a wrong address or certificate.
    access.reach(&address).await?;
    access.state.create()?;
    let listen_ip = args.node_args.listen_ip.or_else(|| reached_from(&address));
    if listen_ip.is_none() {
        return Err(Failure::user(format!("join: no address of this machine leads to {address}"))
            .hint("name the one at which its ranks are reached with `--listen-ip`"));
    }
    args.node_args.listen_ip = listen_ip;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name = args.node.clone().unwrap_or_else(|| host.to_lowercase());
    let control = ControlAddress::Url(address);
    crate::output::note(&format!("node {name} joins {url}; press Ctrl-C to leave"));
    let stop = stop_token(&Attached { attached: false })?;
    agent(&name, args.node_args, &access, control, token, stop).await
}

/// Returns the address of this machine from which it reaches `url`. Nothing is sent.
fn reached_from(url: &str) -> Option<IpAddr> {
    let authority = url.split("//").nth(1)?.split('/').next()?;
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|socket| socket.connect(authority).map(|()| socket))
        .or_else(|_| {
            let socket = std::net::UdpSocket::bind((std::net::Ipv6Addr::UNSPECIFIED, 0))?;
            socket.connect(authority).map(|()| socket)
        });
    socket.and_then(|socket| socket.local_addr()).ok().map(|address| address.ip())
}

/// Says why a helper process failed, if it did.
fn ended<E: std::fmt::Display>(worked: Result<(), E>) -> ExitCode {
    match worked {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::output::note(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// Measures one core's f32 matmul rate, FLOP/s: what the runs on this node are held against. Takes
/// about a tenth of a second; 0 when it cannot be measured.
fn core_flops() -> f64 {
    let start = std::time::Instant::now();
    drumline_tensor::peak::matmul_f32(1, 4, || start.elapsed().as_secs_f64()).unwrap_or_default()
}

/// Where the control plane is: fixed, or what the state folder says at each try.
fn control_address(access: &Access) -> Result<ControlAddress, Failure> {
    Ok(match &access.endpoint {
        Some(_) => ControlAddress::Url(access.address()?),
        None => ControlAddress::File(access.state.endpoint_file()),
    })
}

/// Writes where the gateway listens, once it does.
async fn tell_gateway(state: StateDir, listening: oneshot::Receiver<SocketAddr>) {
    let Ok(address) = listening.await else { return };
    let endpoint =
        GatewayEndpoint { gateway: format!("http://{address}"), pid: std::process::id() };
    if let Err(error) = write_json(&state.gateway_file(), &endpoint) {
        tracing::error!(%error, "cannot tell where the gateway listens");
    }
}

/// Returns a token that is cancelled by SIGTERM, SIGINT or the end of standard input. Who does not
/// end in time after that is ended by force.
fn stop_token(attached: &Attached) -> Result<CancellationToken, Failure> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let asked = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = asked.cancelled() => {}
        }
        asked.cancel();
        tokio::time::sleep(STOP_DEADLINE).await;
        tracing::error!("did not end in time");
        std::process::exit(1);
    });
    if attached.attached {
        let ended = stop.clone();
        std::thread::spawn(move || {
            let mut input = std::io::stdin().lock();
            let mut byte = [0];
            loop {
                match input.read(&mut byte) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            ended.cancel();
        });
    }
    Ok(stop)
}
