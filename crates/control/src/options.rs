//! What a control plane needs to know, and why it cannot start or go on.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drumline_ports::store::{LeaderError, Store, StoreError, WriteError};
use drumline_types::Clock;
use drumline_web::PlainTextRefused;
use drumline_wire::auth::Token;
use prometheus::Registry;

use crate::clock::ProcessClock;

/// What a control plane needs to know.
#[derive(Clone)]
pub struct Options {
    /// Where jobs are kept.
    pub store: Arc<dyn Store>,
    /// No other process can have the store open (the embedded one is locked): whoever led before is
    /// surely gone, and its lease need not be waited for.
    pub sole_user: bool,
    /// Where the API and the agents are served; port 0: any free one. Loopback only.
    pub listen: SocketAddr,
    /// The cluster's token, for the API and the agents.
    pub token: Token,
    /// Where both are served by TLS, for other machines; `None`: nowhere.
    pub remote: Option<Remote>,
    /// A token that agents may show instead of the cluster's, and that is good for nothing else.
    pub agent_token: Option<Token>,
    /// Folder for the audit log `audit.jsonl`; `None`: none is written.
    pub state_dir: Option<PathBuf>,
    /// Where `/metrics` is served on its own; `None`: only through [`crate::Handle::registry`].
    /// Loopback only.
    pub metrics_listen: Option<SocketAddr>,
    /// Takes the metrics.
    pub registry: Registry,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Names this control plane to people and in elections.
    pub identity: String,
    /// The dashboard's address, for `version`; empty: none.
    pub dashboard_url: String,
    /// The address of the metrics, for `version`; empty: that of `metrics_listen`.
    pub metrics_url: String,
    /// The commit this was built from; empty: not known.
    pub git_commit: String,
    /// How often agents say that they are well. Default 1 s.
    pub heartbeat: Duration,
    /// How long a node may be silent before its ranks are given up. Default 8 s.
    pub node_grace: Duration,
    /// A leader that vanishes is replaced after this time. Default 5 s.
    pub lease: Duration,
    /// How long an unsettled write is pursued before this leader steps down. Default 10 s.
    pub write_patience: Duration,
    /// Jobs that have ended and are kept; the oldest go first. Default 1000.
    pub ended_jobs_max: usize,
}

impl Options {
    /// Returns options for a loopback address with the defaults above.
    #[must_use]
    pub fn loopback(store: Arc<dyn Store>, token: Token) -> Self {
        Self {
            store,
            sole_user: false,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            token,
            remote: None,
            agent_token: None,
            state_dir: None,
            metrics_listen: None,
            registry: Registry::new(),
            clock: Arc::new(ProcessClock::default()),
            identity: format!("control-{}", std::process::id()),
            dashboard_url: String::new(),
            metrics_url: String::new(),
            git_commit: String::new(),
            heartbeat: Duration::from_secs(1),
            node_grace: Duration::from_secs(8),
            lease: Duration::from_secs(5),
            write_patience: Duration::from_secs(10),
            ended_jobs_max: 1000,
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("listen", &self.listen)
            .field("identity", &self.identity)
            .field("state_dir", &self.state_dir)
            .finish_non_exhaustive()
    }
}

/// A listener with TLS. `Debug` does not show its key.
#[derive(Clone)]
pub struct Remote {
    /// The address; port 0: any free one.
    pub listen: SocketAddr,
    /// The certificate, in PEM, for [`drumline_wire::line::CERTIFICATE_NAME`].
    pub certificate: String,
    /// Its private key, in PEM.
    pub key: String,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// Why a control plane cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address may not be listened on without TLS.
    #[error(
        "refusing to listen on {}: this listener speaks without TLS, so only loopback addresses \
         are served; other machines are served with TLS by `--remote`", .0.address
    )]
    PlainText(PlainTextRefused),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// What is shown to other machines is no certificate with its key.
    #[error("the certificate for other machines and its key cannot be used: {}", drumline_wire::line::deepest(.0))]
    Certificate(#[source] tonic::transport::Error),
    /// The audit log cannot be written.
    #[error("audit log {path}: {source}")]
    AuditLog {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// The server ended.
    #[error("the gRPC server ended: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Why a leader's reign ended. Another one begins from the store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReignEnded {
    #[error("leadership is lost: {0}")]
    Lost(String),
    #[error(transparent)]
    Leader(#[from] LeaderError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("{key} was changed by someone else, at revision {found} instead of {left}")]
    Conflict { key: String, left: u64, found: u64 },
}
