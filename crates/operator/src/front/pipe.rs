//! A connection to a service within this process: what its clients call is the same as elsewhere,
//! and nobody else can.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use drumline_wire::v1::control_server::ControlServer;
use futures::StreamExt;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint, Error, Server};

use crate::front::Front;

/// Bytes that are on their way.
const PIPE_BYTES: usize = 256 << 10;
/// Connections that wait to be taken.
const CONNECTIONS_MAX: usize = 4;

/// Makes a new pipe whenever the channel needs a connection.
#[derive(Clone)]
struct Connector(mpsc::Sender<DuplexStream>);

impl Service<Uri> for Connector {
    type Response = TokioIo<DuplexStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let server = self.0.clone();
        Box::pin(async move {
            let (near, far) = tokio::io::duplex(PIPE_BYTES);
            let is_over = |_| io::Error::from(io::ErrorKind::BrokenPipe);
            server.send(far).await.map_err(is_over)?;
            Ok(TokioIo::new(near))
        })
    }
}

/// Serves `front` until the channel and its clones are dropped.
///
/// # Errors
/// When the channel cannot be made.
pub(crate) async fn serve(front: Front) -> Result<Channel, Error> {
    let (sender, taken) = mpsc::channel(CONNECTIONS_MAX);
    let service = ControlServer::new(front)
        .max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES)
        .max_encoding_message_size(drumline_wire::MESSAGE_MAX_BYTES);
    let connections = ReceiverStream::new(taken).map(Ok::<_, io::Error>);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(connections));
    // The name is never looked up.
    Endpoint::from_static("http://kube.invalid").connect_with_connector(Connector(sender)).await
}
