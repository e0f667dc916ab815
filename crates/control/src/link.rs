//! The `AgentLink` service: one long-lived stream per agent.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use drumline_types::NodeName;
use drumline_wire::v1;
use drumline_wire::v1::agent_link_server::AgentLink;
use drumline_wire::v1::agent_up::Kind as Up;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::api::Handle;
use crate::convert;
use crate::message::{DOWN_MAX, Input, Session};

/// How long an agent may take to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

/// The service.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) handle: Handle,
    pub(crate) sessions: AtomicU64,
}

type Down = Pin<Box<dyn Stream<Item = Result<v1::AgentDown, Status>> + Send>>;

#[tonic::async_trait]
impl AgentLink for Link {
    type ConnectStream = Down;

    async fn connect(
        &self,
        request: Request<Streaming<v1::AgentUp>>,
    ) -> Result<Response<Down>, Status> {
        let mut up = request.into_inner();
        let reign = self.handle.reign()?;
        let first = tokio::time::timeout(HELLO_DEADLINE, up.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello within 5 s"))??;
        let Some(Up::Hello(hello)) = first.and_then(|up| up.kind) else {
            return Err(Status::invalid_argument("the first message of an agent must be Hello"));
        };
        let node = convert::check_hello(&hello).map_err(Status::invalid_argument)?;
        let id = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        let (down, outgoing) = mpsc::channel(DOWN_MAX);
        let logs = self.handle.logs().clone();
        logs.opened(&node, id, down.downgrade());
        let session = Session { id, down };
        let hello = Box::new(hello);
        let connected = Input::Connected { node: node.clone(), hello, session };
        if reign.inbox.send(connected).await.is_err() {
            logs.closed(&node, id);
            return Err(Status::unavailable("this control plane does not lead any more"));
        }
        let inbox = reign.inbox.clone();
        let handle = self.handle.clone();
        tokio::spawn(async move {
            read(&node, id, up, &inbox, &handle).await;
            handle.logs().closed(&node, id);
            let _ = inbox.send(Input::Disconnected { node, session: id }).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing).map(Ok))))
    }
}

/// Reads a stream until it ends, or this reign does.
async fn read(
    node: &NodeName,
    session: u64,
    mut up: Streaming<v1::AgentUp>,
    inbox: &mpsc::Sender<Input>,
    handle: &Handle,
) {
    loop {
        let message = tokio::select! {
            message = up.message() => message,
            () = inbox.closed() => return,
        };
        let kind = match message {
            Ok(Some(v1::AgentUp { kind: Some(kind) })) => kind,
            // A kind of message that only newer agents know.
            Ok(Some(v1::AgentUp { kind: None })) => continue,
            Ok(None) => return,
            Err(status) => {
                tracing::debug!(%node, %status, "an agent's stream broke");
                return;
            }
        };
        if let Up::Log(data) = kind {
            handle.logs().take(node, data);
            continue;
        }
        let input = Input::Up { node: node.clone(), session, message: Box::new(kind) };
        if inbox.send(input).await.is_err() {
            return;
        }
    }
}
