//! The process of the control plane: its store, its API, its metrics and the dashboard.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, OnceLock};

use drumline_store::OpenOptions;
use drumline_wire::auth::Token;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::ControlArgs;
use crate::failure::Failure;
use crate::state::{Endpoint, StateDir, write_json};

/// Runs it until `stop`.
///
/// The dashboard listens first, because the control plane tells everyone where it is.
pub(super) async fn run(
    args: ControlArgs,
    state: StateDir,
    token: Token,
    stop: CancellationToken,
) -> Result<(), Failure> {
    // Where the process before this one listened: who is connected finds this one there again.
    let before = state.endpoint().unwrap_or_default();
    let embedded = args.store.is_none();
    let address = args
        .store
        .unwrap_or_else(|| format!("embedded:{}", state.path().join("store.redb").display()));
    let store = drumline_store::open(&address, &OpenOptions::default())
        .await
        .map_err(|error| Failure::failed(error.to_string()))?;

    let own: Arc<OnceLock<String>> = Arc::default();
    let find = own.clone();
    let dashboard = drumline_dashboard::Options {
        listen: again(args.dashboard, &before.dashboard),
        allow_hosts: args.allow_host,
        control: Arc::new(move || {
            find.get().cloned().ok_or_else(|| "the control plane is starting".to_owned())
        }),
        cluster_token: token.clone(),
        keys: vec![state.dashboard_key_or_new()?],
    };
    let (ready, listening) = oneshot::channel();
    let pages = tokio::spawn(drumline_dashboard::run(dashboard, ready, stop.clone()));
    let Ok(dashboard) = listening.await else {
        return match pages.await {
            Ok(Err(error)) => Err(Failure::failed(error.to_string())),
            _ => Err(Failure::failed("the dashboard ended before it listened")),
        };
    };
    let dashboard_url = format!("http://{dashboard}");

    let remote = match args.remote {
        Some(listen) => {
            let (certificate, key) = state.certificate_or_new()?;
            Some(drumline_control::Remote {
                listen: again(listen, &before.remote),
                certificate,
                key,
            })
        }
        None => None,
    };
    let options = drumline_control::Options {
        sole_user: embedded,
        remote,
        agent_token: Some(state.agent_token_or_new()?),
        listen: again(args.listen, &before.control),
        state_dir: Some(state.path().to_owned()),
        metrics_listen: Some(again(args.metrics, &before.metrics)),
        dashboard_url: dashboard_url.clone(),
        git_commit: option_env!("DRUMLINE_GIT_COMMIT").unwrap_or_default().to_owned(),
        ..drumline_control::Options::loopback(store, token)
    };
    let running = drumline_control::start(options, stop.clone())
        .await
        .map_err(|error| Failure::failed(error.to_string()))?;
    let control = format!("http://{}", running.address);
    let _ = own.set(control.clone());
    let endpoint = Endpoint {
        control,
        remote: running.remote_address.map_or_else(String::new, |at| format!("https://{at}")),
        dashboard: dashboard_url,
        metrics: running
            .metrics_address
            .map_or_else(String::new, |at| format!("http://{at}/metrics")),
        pid: std::process::id(),
    };
    write_json(&state.endpoint_file(), &endpoint)?;
    running.wait().await.map_err(|error| Failure::failed(error.to_string()))?;
    stop.cancel();
    // Live pages end with the stop token; one that does not is cut off with the process.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), pages).await;
    Ok(())
}

/// Returns where to listen: with any port allowed, the one of `before` if it is still free.
fn again(asked: SocketAddr, before: &str) -> SocketAddr {
    if asked.port() != 0 {
        return asked;
    }
    let rest = before.strip_prefix("http://").or_else(|| before.strip_prefix("https://"));
    let authority = rest.and_then(|rest| rest.split('/').next());
    match authority.and_then(|authority| authority.parse::<SocketAddr>().ok()) {
        Some(before) if before.ip() == asked.ip() && TcpListener::bind(before).is_ok() => before,
        _ => asked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_of_before_is_taken_again_when_it_is_free() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        // Between two looks somebody else may be given the port: hardly three times in a row.
        let is_taken_again = || {
            let held = TcpListener::bind(any).unwrap();
            let port = held.local_addr().unwrap();
            assert_eq!(again(any, &format!("http://{port}/metrics")), any, "in use");
            drop(held);
            again(any, &format!("http://{port}/metrics")) == port
        };
        assert!((0..3).any(|_| is_taken_again()));
        assert_eq!(again(any, ""), any);
        let fixed: SocketAddr = "127.0.0.1:9".parse().unwrap();
        assert_eq!(again(fixed, "http://127.0.0.1:10"), fixed);
    }
}
