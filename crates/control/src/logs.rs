//! Logs on their way from an agent to a reader, past the dispatcher.
//!
//! A reader that is too slow must not hold up its agent's stream, which also carries statuses. Its
//! channel is then dropped, and the reader asks again from where it stopped.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use drumline_types::NodeName;
use drumline_wire::v1;
use drumline_wire::v1::agent_down::Kind as Down;
use tokio::sync::mpsc;

/// Chunks that wait for one reader.
const CHUNKS_MAX: usize = 64;

/// Every log that is being read.
#[derive(Debug, Clone, Default)]
pub(crate) struct LogHub(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    reads: Mutex<HashMap<u64, Read>>,
    /// The ways down to the agents. Weak: who cuts an agent off drops the only strong one.
    links: Mutex<HashMap<NodeName, (u64, mpsc::WeakSender<v1::AgentDown>)>>,
}

#[derive(Debug)]
struct Read {
    node: NodeName,
    chunks: mpsc::Sender<v1::LogData>,
}

/// A log that is being read. Dropping it ends the reading.
#[derive(Debug)]
pub(crate) struct LogRead {
    hub: LogHub,
    request: u64,
    chunks: mpsc::Receiver<v1::LogData>,
}

impl LogHub {
    /// An agent's stream is open.
    pub(crate) fn opened(
        &self,
        node: &NodeName,
        session: u64,
        down: mpsc::WeakSender<v1::AgentDown>,
    ) {
        let mut links = self.0.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.insert(node.clone(), (session, down));
        drop(links);
        // What was read over the stream before this one has ended with it: readers ask again, from
        // where they are.
        let mut reads = self.0.reads.lock().unwrap_or_else(PoisonError::into_inner);
        reads.retain(|_, read| read.node != *node);
    }

    /// An agent's stream has ended: so have its logs, for now.
    pub(crate) fn closed(&self, node: &NodeName, session: u64) {
        let mut links = self.0.links.lock().unwrap_or_else(PoisonError::into_inner);
        if links.get(node).is_some_and(|(current, _)| *current == session) {
            links.remove(node);
            drop(links);
            let mut reads = self.0.reads.lock().unwrap_or_else(PoisonError::into_inner);
            reads.retain(|_, read| read.node != *node);
        }
    }

    /// Asks a node for a log; `None` when its agent is not there.
    pub(crate) fn open(&self, node: &NodeName, mut ask: v1::ReadLog) -> Option<LogRead> {
        let request = self.0.next.fetch_add(1, Ordering::Relaxed) + 1;
        ask.request = request;
        let (sender, chunks) = mpsc::channel(CHUNKS_MAX);
        let read = Read { node: node.clone(), chunks: sender };
        self.0.reads.lock().unwrap_or_else(PoisonError::into_inner).insert(request, read);
        let read = LogRead { hub: self.clone(), request, chunks };
        self.send(node, Down::ReadLog(ask)).then_some(read)
    }

    fn send(&self, node: &NodeName, kind: Down) -> bool {
        let links = self.0.links.lock().unwrap_or_else(PoisonError::into_inner);
        let down = links.get(node).and_then(|(_, down)| down.upgrade());
        drop(links);
        down.is_some_and(|down| down.try_send(v1::AgentDown { kind: Some(kind) }).is_ok())
    }

    /// Takes a chunk from an agent. Never waits.
    pub(crate) fn take(&self, node: &NodeName, data: v1::LogData) {
        let mut reads = self.0.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let request = data.request;
        let Some(read) = reads.get(&request).filter(|read| read.node == *node) else { return };
        let over = data.end || !data.error.is_empty();
        let fell_behind = read.chunks.try_send(data).is_err();
        if over || fell_behind {
            reads.remove(&request);
        }
        drop(reads);
        if fell_behind {
            self.send(node, Down::StopReadLog(v1::StopReadLog { request }));
        }
    }
}

impl LogRead {
    /// Returns the next chunk; `None` when the reader fell behind or the agent's stream broke.
    pub(crate) async fn next(&mut self) -> Option<v1::LogData> {
        self.chunks.recv().await
    }
}

impl Drop for LogRead {
    fn drop(&mut self) {
        let mut reads = self.hub.0.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let read = reads.remove(&self.request);
        drop(reads);
        if let Some(read) = read {
            let stop = v1::StopReadLog { request: self.request };
            self.hub.send(&read.node, Down::StopReadLog(stop));
        }
    }
}
