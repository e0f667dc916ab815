//! Where this node's ranks call their agent: plain text, on loopback.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use drumline_wire::rank_host::{RankCall, service};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;

use crate::service::AgentError;

/// Listens on loopback: ranks alone are reached from other machines.
pub(crate) async fn bind(port: u16) -> Result<(TcpListener, SocketAddr), AgentError> {
    let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let failed = |source| AgentError::Listen { ip, source };
    let listener = TcpListener::bind((ip, port)).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// Starts the service and returns where it listens: ranks call from this machine alone.
///
/// # Errors
/// [`AgentError::Listen`].
pub async fn serve(
    calls: mpsc::Sender<RankCall>,
    stop: tokio_util::sync::CancellationToken,
) -> Result<SocketAddr, AgentError> {
    let (listener, address) = bind(0).await?;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    tokio::spawn(async move {
        let served = tonic::transport::Server::builder()
            .add_service(service(calls))
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the service for ranks ended");
        }
    });
    Ok(address)
}
