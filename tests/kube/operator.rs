//! An operator under test: inside this process, or as a process of its own that can be killed.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use drumline_operator::{
    FleetRules, GuardRules, LeaseRules, Options, PodRules, RankRules, WhenAway,
};
use kube::Config;
use tokio_util::sync::CancellationToken;

/// An operator that stops when it is dropped.
pub(crate) struct Operator {
    stop: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
}

/// Returns what an operator of a test needs.
pub(crate) fn options(client: Config, identity: &str) -> Options {
    Options {
        client,
        namespace: "drumline-system".to_owned(),
        lease: LeaseRules { identity: identity.to_owned(), duration: Duration::from_secs(3) },
        fleet: FleetRules::default(),
        pods: PodRules { image: "test".to_owned(), ..PodRules::default() },
        ranks: RankRules {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            url: "https://127.0.0.1:7443".to_owned(),
            pod: String::new(),
        },
        observe: None,
        guard: None,
    }
}

/// Returns a guard on loopback.
pub(crate) fn guard(port: u16, when_away: WhenAway) -> GuardRules {
    GuardRules {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        url: Some(format!("https://127.0.0.1:{port}")),
        when_away,
    }
}

impl Operator {
    /// Starts one.
    pub(crate) fn start(client: Config, identity: &str) -> Self {
        Self::run(options(client, identity))
    }

    /// Starts one with these options.
    pub(crate) fn run(options: Options) -> Self {
        let stop = CancellationToken::new();
        let asked = stop.clone();
        let task = tokio::spawn(async move {
            drumline_operator::run(options, asked).await.expect("the operator starts");
        });
        Self { stop, task: Some(task) }
    }

    /// Stops it, and waits until it has handed its lease back.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            tokio::time::timeout(Duration::from_secs(60), task).await.unwrap().unwrap();
        }
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
