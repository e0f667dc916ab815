//! Where this node's ranks call their agent: plain text, on loopback.

use std::net::SocketAddr;

use drumline_wire::rank_host::{RankCall, service};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;

/// Starts the service on `listener` and returns where it listens.
///
/// # Errors
/// When the listener's address cannot be read.
pub fn serve(
    listener: TcpListener,
    calls: mpsc::Sender<RankCall>,
    stop: tokio_util::sync::CancellationToken,
) -> std::io::Result<SocketAddr> {
    let address = listener.local_addr()?;
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
