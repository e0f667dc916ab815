//! Where ranks and gateways call, by TLS.
//!
//! A follower listens too, and answers that it does not lead: callers come again.

use std::net::SocketAddr;
use std::time::Duration;

use drumline_wire::rank_host::{RankCall, service};
use drumline_wire::v1::services_server::ServicesServer;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Server, ServerTlsConfig};

use crate::ranks::keys::Keys;
use crate::ranks::services::Services;

/// Calls of ranks that wait to be looked at.
pub(crate) const CALLS_MAX: usize = 4096;

/// Why nobody can call.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// The certificate is refused.
    #[error("the operator's certificate cannot be used: {0}")]
    Tls(#[from] tonic::transport::Error),
}

/// Starts to serve, and returns where.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    address: SocketAddr,
    keys: &Keys,
    calls: mpsc::Sender<RankCall>,
    services: Services,
    stop: CancellationToken,
) -> Result<SocketAddr, ServeError> {
    let failed = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let listens = listener.local_addr().map_err(failed)?;
    let router = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(keys.identity()))?
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(service(calls))
        .add_service(ServicesServer::new(services));
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    tokio::spawn(async move {
        let ended = stop.cancelled_owned();
        if let Err(error) = router.serve_with_incoming_shutdown(incoming, ended).await {
            tracing::error!(%error, "the operator's listener ended");
        }
    });
    Ok(listens)
}
