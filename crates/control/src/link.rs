//! The `AgentLink` service: one long-lived stream per agent.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) handle: Handle,
    pub(crate) sessions: Arc<Sessions>,
}

/// The streams of agents, over all listeners.
#[derive(Debug)]
pub(crate) struct Sessions {
    next: AtomicU64,
    live: Mutex<BTreeMap<NodeName, Live>>,
    /// An agent that was not heard for so long holds its name no more.
    silent_after: Duration,
}

#[derive(Debug)]
struct Live {
    session: u64,
    instance: String,
    heard: Instant,
}

impl Sessions {
    /// Of agents that are heard every `heartbeat`.
    pub(crate) fn new(heartbeat: Duration) -> Self {
        Self { next: AtomicU64::new(0), live: Mutex::default(), silent_after: heartbeat * 4 }
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<NodeName, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names a new stream. A node's name belongs to the agent that is heard under it: another that came
    /// by the same name would make its ranks pass for lost.
    fn open(&self, node: &NodeName, instance: &str) -> Result<u64, Status> {
        let mut live = self.live();
        if live.get(node).is_some_and(|held| {
            held.instance != instance && held.heard.elapsed() < self.silent_after
        }) {
            return Err(Status::already_exists(format!(
                "another agent is connected as node {node}; each needs a name of its own"
            )));
        }
        let session = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let instance = instance.to_owned();
        live.insert(node.clone(), Live { session, instance, heard: Instant::now() });
        Ok(session)
    }

    fn heard(&self, node: &NodeName, session: u64) {
        if let Some(held) = self.live().get_mut(node).filter(|held| held.session == session) {
            held.heard = Instant::now();
        }
    }

    fn close(&self, node: &NodeName, session: u64) {
        let mut live = self.live();
        if live.get(node).is_some_and(|held| held.session == session) {
            live.remove(node);
        }
    }
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
        let id = self.sessions.open(&node, &hello.instance)?;
        let (down, outgoing) = mpsc::channel(DOWN_MAX);
        let logs = self.handle.logs().clone();
        logs.opened(&node, id, down.downgrade());
        let session = Session { id, down };
        let hello = Box::new(hello);
        let connected = Input::Connected { node: node.clone(), hello, session };
        if reign.inbox.send(connected).await.is_err() {
            logs.closed(&node, id);
            self.sessions.close(&node, id);
            return Err(Status::unavailable("this control plane does not lead any more"));
        }
        let inbox = reign.inbox.clone();
        let link = self.clone();
        tokio::spawn(async move {
            read(&node, id, up, &inbox, &link).await;
            link.sessions.close(&node, id);
            link.handle.logs().closed(&node, id);
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
    link: &Link,
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
        link.sessions.heard(node, session);
        if let Up::Log(data) = kind {
            link.handle.logs().take(node, data);
            continue;
        }
        let input = Input::Up { node: node.clone(), session, message: Box::new(kind) };
        if inbox.send(input).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_belongs_to_the_agent_that_is_heard_under_it() {
        let sessions = Sessions::new(Duration::from_secs(3600));
        let node: NodeName = "a".parse().unwrap();
        let first = sessions.open(&node, "one").unwrap();
        // The same agent again, over a stream of its own: the older one has nothing to close any more.
        let again = sessions.open(&node, "one").unwrap();
        sessions.close(&node, first);
        let refused = sessions.open(&node, "two").unwrap_err();
        assert!(refused.message().contains("connected as node a"), "{refused}");
        assert!(sessions.open(&"b".parse().unwrap(), "two").unwrap() > again);
        sessions.close(&node, again);
        let second = sessions.open(&node, "two").unwrap();
        assert!(second > again, "no number comes twice");
        // One that is not heard any more loses its name.
        let silent = Sessions::new(Duration::ZERO);
        silent.open(&node, "one").unwrap();
        silent.open(&node, "two").unwrap();
    }
}
