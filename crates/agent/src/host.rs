//! The `RankHost` service: what ranks call on their agent, guarded by their attempt's secret.

use std::net::SocketAddr;
use std::time::Duration;

use drumline_wire::auth::{Token, bearer};
use drumline_wire::v1;
use drumline_wire::v1::rank_host_server::{RankHost, RankHostServer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Longest time that a join waits for its world; the control plane's own deadline is shorter.
const JOIN_DEADLINE: Duration = Duration::from_secs(25 * 3600);

/// What a rank asks of the dispatcher.
#[derive(Debug)]
pub enum RankCall {
    /// Join the world.
    Join {
        /// Who, and where it listens.
        join: v1::JoinWorld,
        /// The secret it showed.
        secret: String,
        /// Takes the world, once all have joined.
        reply: oneshot::Sender<Result<v1::World, Status>>,
    },
    /// A report.
    Report {
        /// The report.
        report: Box<v1::RankReport>,
        /// The secret it showed.
        secret: String,
        /// Takes what the rank shall do.
        reply: oneshot::Sender<Result<v1::RankCommand, Status>>,
    },
}

struct Service {
    calls: mpsc::Sender<RankCall>,
}

fn secret_of<T>(request: &Request<T>) -> Result<String, Status> {
    let secret = bearer(request).ok_or_else(|| Status::unauthenticated("no attempt secret"))?;
    // Only its form is checked here; the dispatcher compares it with the attempt's.
    Token::new(secret).map_err(|_| Status::unauthenticated("the attempt secret is malformed"))?;
    Ok(secret.to_owned())
}

impl Service {
    async fn ask<T>(
        &self,
        call: RankCall,
        answer: oneshot::Receiver<Result<T, Status>>,
        deadline: Duration,
    ) -> Result<Response<T>, Status> {
        let stopping = || Status::unavailable("the agent is stopping");
        self.calls.send(call).await.map_err(|_| stopping())?;
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(answer)) => answer.map(Response::new),
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(Status::deadline_exceeded("no answer within the deadline")),
        }
    }
}

#[tonic::async_trait]
impl RankHost for Service {
    async fn join(&self, request: Request<v1::JoinWorld>) -> Result<Response<v1::World>, Status> {
        let secret = secret_of(&request)?;
        let (reply, answer) = oneshot::channel();
        let join = request.into_inner();
        self.ask(RankCall::Join { join, secret, reply }, answer, JOIN_DEADLINE).await
    }

    async fn report(
        &self,
        request: Request<v1::RankReport>,
    ) -> Result<Response<v1::RankCommand>, Status> {
        let secret = secret_of(&request)?;
        let (reply, answer) = oneshot::channel();
        let report = Box::new(request.into_inner());
        self.ask(RankCall::Report { report, secret, reply }, answer, Duration::from_secs(10)).await
    }
}

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
    let service = RankHostServer::new(Service { calls })
        .max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    tokio::spawn(async move {
        let served = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the service for ranks ended");
        }
    });
    Ok(address)
}
