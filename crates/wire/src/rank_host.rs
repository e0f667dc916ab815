//! The `RankHost` service as messages: what ranks call on whoever started them, an agent or the
//! operator of a Kubernetes cluster. It checks nothing but the form; who answers decides.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use crate::auth::{Token, bearer};
use crate::v1;
use crate::v1::rank_host_server::{RankHost, RankHostServer};

/// Longest time that a join waits for its world; the start deadline of any job is shorter.
const JOIN_DEADLINE: Duration = Duration::from_secs(25 * 3600);
/// Longest time that a report waits for its answer.
const REPORT_DEADLINE: Duration = Duration::from_secs(10);

/// What a rank asks.
#[derive(Debug)]
pub enum RankCall {
    /// Join the world.
    Join {
        /// Who, and where it listens.
        join: v1::JoinWorld,
        /// The secret that it showed.
        secret: String,
        /// Takes the world, once all have joined.
        reply: oneshot::Sender<Result<v1::World, Status>>,
    },
    /// A report.
    Report {
        /// The report.
        report: Box<v1::RankReport>,
        /// The secret that it showed.
        secret: String,
        /// Takes what the rank shall do.
        reply: oneshot::Sender<Result<v1::RankCommand, Status>>,
    },
}

impl RankCall {
    /// Returns the secret that the rank showed.
    #[must_use]
    pub fn secret(&self) -> &str {
        match self {
            Self::Join { secret, .. } | Self::Report { secret, .. } => secret,
        }
    }

    /// Answers that nothing comes of it.
    pub fn refuse(self, status: Status) {
        match self {
            Self::Join { reply, .. } => drop(reply.send(Err(status))),
            Self::Report { reply, .. } => drop(reply.send(Err(status))),
        }
    }
}

/// Hands every call over to `calls`.
#[derive(Debug)]
pub struct Service {
    calls: mpsc::Sender<RankCall>,
}

/// Returns the service, whose calls go to `calls`.
#[must_use]
pub fn service(calls: mpsc::Sender<RankCall>) -> RankHostServer<Service> {
    RankHostServer::new(Service { calls }).max_decoding_message_size(crate::MESSAGE_MAX_BYTES)
}

fn secret_of<T>(request: &Request<T>) -> Result<String, Status> {
    let secret = bearer(request).ok_or_else(|| Status::unauthenticated("no secret is shown"))?;
    Token::new(secret).map_err(|_| Status::unauthenticated("the secret is malformed"))?;
    Ok(secret.to_owned())
}

impl Service {
    async fn ask<T>(
        &self,
        call: RankCall,
        answer: oneshot::Receiver<Result<T, Status>>,
        deadline: Duration,
    ) -> Result<Response<T>, Status> {
        let stopping = || Status::unavailable("whoever answers ranks here is stopping");
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
        self.ask(RankCall::Report { report, secret, reply }, answer, REPORT_DEADLINE).await
    }
}
