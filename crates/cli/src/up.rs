//! `drumline up`: a cluster in the foreground, until Ctrl-C.

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
        Some(Ok(addresses)) => match tell(&addresses, format) {
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

fn tell(addresses: &Addresses, format: Format) -> Result<(), Failure> {
    let gateway = format!("{}/v1", addresses.gateway);
    let value = json!({
        "nodes": addresses.nodes,
        "devices": addresses.devices,
        "control": addresses.control,
        "dashboard": addresses.dashboard,
        "metrics": addresses.metrics,
        "gateway": gateway,
    });
    output::value(format, &value, || {
        let mut text = format!("ready: {} nodes, {} devices\n", addresses.nodes, addresses.devices);
        for (name, url) in [
            ("control", &addresses.control),
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
