//! A control plane from start to stop: its servers, and one reign after the other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use drumline_ports::store::{Elector, LeaderError, Leadership, StoreError};
use drumline_wire::auth::RequireToken;
use drumline_wire::v1::agent_link_server::AgentLinkServer;
use drumline_wire::v1::control_server::ControlServer;
use drumline_wire::v1::services_server::ServicesServer;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};

use crate::api::{Handle, Reign};
use crate::audit_log::AuditLog;
use crate::board::Board;
use crate::core::Core;
use crate::dispatch::Dispatcher;
use crate::fleet::Fleet;
use crate::grpc::Api;
use crate::ledger::{LEADER, Ledger};
use crate::link::{Link, Sessions};
use crate::message::INBOX_MAX;
use crate::metrics::Metrics;
use crate::options::{Error, Options, ReignEnded};

/// How long one campaign lasts before it is begun anew.
const CAMPAIGN: Duration = Duration::from_secs(60);
/// Wait after a reign that ended by an error; it doubles up to the most.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long a unary call may take before the server gives it up.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// Longest time until a stranger has shown that it speaks TLS.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Calls of one connection that are answered at once.
const CALLS_MAX: usize = 128;
/// How long open calls may go on once the control plane stops.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// Ends when a listener does.
type Served = JoinHandle<Result<(), tonic::transport::Error>>;

/// A control plane that runs.
#[derive(Debug)]
pub struct Running {
    /// Where the API and the agents are served.
    pub address: SocketAddr,
    /// Where both are served by TLS, if they are.
    pub remote_address: Option<SocketAddr>,
    /// Where `/metrics` is served, if it is on its own.
    pub metrics_address: Option<SocketAddr>,
    /// The API in process.
    pub handle: Handle,
    stop: CancellationToken,
    served: Served,
    reigns: JoinHandle<()>,
}

impl Running {
    /// Waits until it has ended, because of its stop token or an error of its server.
    ///
    /// # Errors
    /// [`Error::Serve`].
    pub async fn wait(mut self) -> Result<(), Error> {
        let served = tokio::select! {
            served = &mut self.served => served,
            () = self.stop.cancelled() => {
                // Open watches would keep the server for ever.
                let patience = tokio::time::timeout(STOP_DEADLINE, &mut self.served).await;
                patience.unwrap_or(Ok(Ok(())))
            }
        };
        self.served.abort();
        self.stop.cancel();
        let _ = tokio::time::timeout(STOP_DEADLINE, &mut self.reigns).await;
        self.reigns.abort();
        match served {
            Ok(served) => Ok(served?),
            Err(_) => Ok(()),
        }
    }
}

/// Runs a control plane until `stop`.
///
/// # Errors
/// [`Error`] when it cannot start. Once started it lives through everything but `stop`.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), Error> {
    start(options, stop).await?.wait().await
}

/// Starts a control plane: when this returns, its address accepts calls.
///
/// # Errors
/// [`Error`] when it cannot start.
pub async fn start(options: Options, stop: CancellationToken) -> Result<Running, Error> {
    for address in [Some(options.listen), options.metrics_listen].into_iter().flatten() {
        drumline_web::plain_text_allowed(address).map_err(Error::PlainText)?;
    }
    let audit = AuditLog::open(options.state_dir.as_deref(), Arc::clone(&options.clock)).map_err(
        |source| {
            let path = options.state_dir.clone().unwrap_or_default().join("audit.jsonl");
            Error::AuditLog { path, source }
        },
    )?;
    let metrics = Metrics::register(&options.registry, &options.git_commit)?;
    let listener = bind(options.listen).await?;
    let address = local(&listener, options.listen)?;
    let metrics_listener = match options.metrics_listen {
        Some(address) => Some(bind(address).await?),
        None => None,
    };
    let metrics_address = match (&metrics_listener, options.metrics_listen) {
        (Some(listener), Some(asked)) => Some(local(listener, asked)?),
        _ => None,
    };
    let metrics_url = match metrics_address {
        Some(address) if options.metrics_url.is_empty() => format!("http://{address}/metrics"),
        _ => options.metrics_url.clone(),
    };
    let (reign, watched) = watch::channel(None);
    let handle = Handle::new(options.clone(), watched, audit, metrics.clone(), metrics_url);
    if let Some(listener) = metrics_listener {
        let (registry, refresh) = (options.registry.clone(), Some(handle.refresh()));
        let stop = stop.clone();
        tokio::spawn(async move {
            let served =
                drumline_telemetry::http::serve(listener, registry, None, refresh, stop).await;
            if let Err(error) = served {
                tracing::error!(%error, "the metrics server ended");
            }
        });
    }
    let (mut remote, mut remote_address) = (None, None);
    if let Some(asked) = &options.remote {
        let identity = Identity::from_pem(&asked.certificate, &asked.key);
        let tls = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE_DEADLINE);
        let server = Server::builder().tls_config(tls).map_err(Error::Certificate)?;
        let listener = bind(asked.listen).await?;
        remote_address = Some(local(&listener, asked.listen)?);
        remote = Some((listener, server));
    }
    let sessions = Arc::new(Sessions::new(options.heartbeat));
    let served = {
        let link = Link { handle: handle.clone(), sessions };
        let (options, stop) = (options.clone(), stop.clone());
        tokio::spawn(async move {
            let near =
                serve(listener, Server::builder(), options.clone(), link.clone(), stop.clone());
            match remote {
                Some((listener, server)) => {
                    let far = serve(listener, server, options, link, stop);
                    tokio::try_join!(near, far).map(|_| ())
                }
                None => near.await,
            }
        })
    };
    let reigns = tokio::spawn(reigns(options, metrics, reign, stop.clone()));
    tracing::info!(%address, "control plane started");
    Ok(Running { address, remote_address, metrics_address, handle, stop, served, reigns })
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })
}

fn local(listener: &TcpListener, asked: SocketAddr) -> Result<SocketAddr, Error> {
    listener.local_addr().map_err(|source| Error::Listen { address: asked, source })
}

async fn serve(
    listener: TcpListener,
    server: Server,
    options: Options,
    link: Link,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let handle = link.handle.clone();
    let services = ServicesServer::new(Api { handle: handle.clone() });
    let api = ControlServer::new(Api { handle })
        .max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES)
        .max_encoding_message_size(drumline_wire::MESSAGE_MAX_BYTES);
    let link =
        AgentLinkServer::new(link).max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES);
    let agents = RequireToken::new(options.token.clone()).or(options.agent_token);
    server
        .timeout(CALL_DEADLINE)
        .concurrency_limit_per_connection(CALLS_MAX)
        .max_concurrent_streams(Some(CALLS_MAX as u32 * 2))
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(InterceptedService::new(services, RequireToken::new(options.token.clone())))
        .add_service(InterceptedService::new(api, RequireToken::new(options.token)))
        .add_service(InterceptedService::new(link, agents))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            stop.cancelled_owned(),
        )
        .await
}

/// Stands for election, leads, and begins again, until `stop`.
async fn reigns(
    options: Options,
    metrics: Metrics,
    reign: watch::Sender<Option<Reign>>,
    stop: CancellationToken,
) {
    let mut pause = PAUSE_MIN;
    while !stop.is_cancelled() {
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            leadership = elect(&options) => match leadership {
                Ok(leadership) => {
                    let ended = lead(&options, &metrics, &reign, &leadership, stop.clone()).await;
                    reign.send_replace(None);
                    // A successor need not wait for the lease. It expires if this fails.
                    let _ = leadership.resign().await;
                    ended
                }
                Err(LeaderError::NotElected { .. }) => continue,
                Err(error) => Err(error.into()),
            },
        };
        match ended {
            Ok(()) => return,
            Err(error) => tracing::warn!(%error, "begins again from the store"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn elect(options: &Options) -> Result<Leadership, LeaderError> {
    let store = &options.store;
    let elector = Elector::new(Arc::clone(store), LEADER, options.identity.clone(), options.lease);
    if options.sole_user
        && let Some(before) = elector.holder().await?
    {
        // Its process is gone, or the store could not have been opened.
        match store.lease_revoke(before.candidate.lease).await {
            Ok(()) | Err(StoreError::LeaseNotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    elector.campaign(CAMPAIGN).await
}

/// Leads until `stop`, or until the reign is over.
async fn lead(
    options: &Options,
    metrics: &Metrics,
    reign: &watch::Sender<Option<Reign>>,
    leadership: &Leadership,
    stop: CancellationToken,
) -> Result<(), ReignEnded> {
    let term = leadership.term().0.0;
    let (inbox, inputs) = mpsc::channel(INBOX_MAX);
    let store = Arc::clone(&options.store);
    let ledger = Ledger::open(store, leadership, options.write_patience, metrics.clone()).await?;
    let loaded = ledger.load().await?;
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let heartbeat_ms = millis(options.heartbeat).max(50);
    let fleet = Fleet::new(heartbeat_ms, millis(options.node_grace));
    let now = options.clock.now();
    tracing::info!(term, jobs = loaded.jobs.len(), "leads");
    let core = Core::recover(loaded, fleet, metrics.clone(), term, options.ended_jobs_max, now);
    let board = Arc::new(Board::new(term, options.identity.clone()));
    let dispatcher = Dispatcher {
        core,
        ledger,
        board: Arc::clone(&board),
        clock: Arc::clone(&options.clock),
        inbox: inputs,
        heartbeat_ms,
        incidents: options.state_dir.as_ref().map(|folder| folder.join("incidents")),
        previews: Arc::new(tokio::sync::Semaphore::new(crate::dispatch::PREVIEWS_MAX)),
    };
    dispatcher
        .run(leadership, stop, || drop(reign.send_replace(Some(Reign { inbox, board }))))
        .await
}
