//! `drumline up`: a cluster in the foreground, until Ctrl-C.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::client::Access;
use crate::cluster::{Addresses, ClusterError, ClusterOptions, EmbeddedCluster};
use crate::failure::Failure;
use crate::output::{self, Format, note};
use crate::roles::Gpus;

/// Run a cluster on this machine, in the foreground.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Number of nodes, each an agent process of its own.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub nodes: u32,
    /// CPU devices of each node.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub devices: u32,
    /// Whether the first node offers this machine's GPUs.
    #[arg(long, value_enum, default_value_t = Gpus::Auto)]
    pub gpus: Gpus,
    /// Keep state in etcd, as etcd://HOST:PORT, instead of the state folder.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub store: String,
    /// Port of the control API; 0 takes any free one.
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// Port of the dashboard; 0 takes any free one.
    #[arg(long, default_value_t = 0)]
    pub dashboard_port: u16,
    /// Port of the control plane's metrics; 0 takes any free one.
    #[arg(long, default_value_t = 0)]
    pub metrics_port: u16,
    /// Port of the OpenAI-compatible gateway; 0 takes any free one.
    #[arg(long, default_value_t = 0)]
    pub gateway_port: u16,
    /// Serve other machines too, with TLS: commands with `--endpoint`, and nodes with `drumline join`.
    #[arg(long, value_name = "IP:PORT")]
    pub remote: Option<SocketAddr>,
    /// Address at which this machine's ranks are reached by those of other machines [default: that of
    /// `--remote`]. What ranks send each other is not encrypted: name one of a network that you trust.
    #[arg(long, value_name = "IP")]
    pub listen_ip: Option<IpAddr>,
}

/// Longest time until every part answers.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the command.
///
/// # Errors
/// The user's mistake, when the state folder is in use; failed, when a part keeps ending.
pub async fn run(args: &UpArgs, access: &Access, format: Format) -> Result<(), Failure> {
    if !args.store.is_empty()
        && let Err(error) = args.store.parse::<drumline_store::Address>()
    {
        return Err(Failure::user(format!("--store: {error}")));
    }
    let mut options = ClusterOptions::new(access.state.clone())?;
    options.nodes = args.nodes;
    options.devices = args.devices;
    options.gpus = args.gpus.word();
    options.store.clone_from(&args.store);
    options.port = args.port;
    options.dashboard_port = args.dashboard_port;
    options.metrics_port = args.metrics_port;
    options.gateway_port = args.gateway_port;
    options.remote = args.remote;
    let listen_ip = listen_ip(args)?;
    options.listen_ip = listen_ip;
    // Before anything is started, so that no signal finds children without an end.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let cluster = EmbeddedCluster::start(options).map_err(failure)?;
    note(&format!("starting in {}", access.state.path().display()));
    let ready = tokio::select! {
        ready = cluster.wait_ready(READY_TIMEOUT) => Some(ready),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
        _ = hang_up.recv() => None,
    };
    let outcome = match ready {
        None => Ok(()),
        Some(Err(error)) => Err(failure(error)),
        Some(Ok(addresses)) => match tell(&reachable(addresses, listen_ip), access, format) {
            Err(failure) => Err(failure),
            Ok(()) => tokio::select! {
                _ = interrupt.recv() => Ok(()),
                _ = terminate.recv() => Ok(()),
                _ = hang_up.recv() => Ok(()),
                error = cluster.gave_up() => Err(failure(error)),
            },
        },
    };
    note("stopping; jobs that run go on at the next `drumline up` with this state folder");
    tokio::select! {
        () = cluster.shutdown() => {}
        // Whoever asks twice does not want to wait: the children see their input end and stop.
        _ = interrupt.recv() => {}
    }
    outcome
}

/// Where ranks listen: where they were told to, where other machines are served, or on loopback.
fn listen_ip(args: &UpArgs) -> Result<IpAddr, Failure> {
    match (args.listen_ip, args.remote) {
        (Some(ip), _) => Ok(ip),
        (None, Some(remote)) if remote.ip().is_unspecified() => Err(Failure::user(format!(
            "--remote {remote}: no address says where ranks are reached"
        ))
        .hint("name one of this machine's with `--listen-ip`")),
        (None, Some(remote)) => Ok(remote.ip()),
        (None, None) => Ok(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    }
}

/// Names the address of this machine where it listens at all of them.
fn reachable(addresses: Addresses, ip: IpAddr) -> Addresses {
    let authority = addresses.remote.strip_prefix("https://");
    match authority.and_then(|authority| authority.parse::<SocketAddr>().ok()) {
        Some(at) if at.ip().is_unspecified() => {
            let remote = format!("https://{}", SocketAddr::new(ip, at.port()));
            Addresses { remote, ..addresses }
        }
        _ => addresses,
    }
}

fn tell(addresses: &Addresses, access: &Access, format: Format) -> Result<(), Failure> {
    let gateway = format!("{}/v1", addresses.gateway);
    let value = json!({
        "nodes": addresses.nodes,
        "devices": addresses.devices,
        "control": addresses.control,
        "remote": addresses.remote,
        "dashboard": addresses.dashboard,
        "metrics": addresses.metrics,
        "gateway": gateway,
    });
    output::value(format, &value, || {
        let mut text = format!("ready: {} nodes, {} devices\n", addresses.nodes, addresses.devices);
        for (name, url) in [
            ("control", &addresses.control),
            ("remote", &addresses.remote),
            ("dashboard", &addresses.dashboard),
            ("metrics", &addresses.metrics),
            ("gateway", &gateway),
        ] {
            if !url.is_empty() {
                text.push_str(&format!("  {name:<10}{url}\n"));
            }
        }
        text
    })?;
    if !addresses.remote.is_empty() {
        note(&format!(
            "another machine joins with copies of {} and {}:\n  drumline join --endpoint {} --ca tls.crt \
             --token-file agent-token --shared-dir DIR",
            access.state.certificate_file().display(),
            access.state.agent_token_file().display(),
            addresses.remote
        ));
    }
    note("press Ctrl-C to stop");
    Ok(())
}

/// Sorts a cluster's error: a folder in use is the user's to mend.
#[must_use]
pub fn failure(error: ClusterError) -> Failure {
    match &error {
        ClusterError::Locked(crate::cluster::lock::LockError::Held { .. }) => {
            Failure::user(error.to_string())
                .hint("stop that cluster first, or name another folder with `--state-dir`")
        }
        ClusterError::NotReady { .. } => {
            Failure::failed(error.to_string()).hint("the logs are in the state folder, under log/")
        }
        _ => Failure::failed(error.to_string()),
    }
}
