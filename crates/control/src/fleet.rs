//! The nodes: who is heard, who is silent, and who is given up.

use std::collections::BTreeMap;

use drumline_cluster::Snapshot;
use drumline_types::{NodeName, Timestamp, format_duration_ms};
use drumline_wire::v1;
use tokio::sync::mpsc::error::TrySendError;

use crate::convert;
use crate::desk::Desk;
use crate::message::Session;

/// A device that does less than this share of its work does nothing.
const BUSY_SHARE: f64 = 0.02;
/// An allocated device that did nothing for so long is idle, in milliseconds.
const IDLE_MS: u64 = 60_000;
/// A node that is given up and holds nothing is forgotten after this time, in milliseconds.
const FORGET_MS: u64 = 3_600_000;

/// Whether a node's agent is heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NodePhase {
    /// It is.
    Ready,
    /// Not since this moment; its ranks may still run.
    Silent(Timestamp),
    /// Not for so long that its ranks were given up.
    Gone(Timestamp),
}

impl NodePhase {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Silent(_) => "silent",
            Self::Gone(_) => "gone",
        }
    }
}

/// One node.
#[derive(Debug)]
pub(crate) struct NodeRecord {
    pub(crate) phase: NodePhase,
    /// What its agent last said of it; `None` when it was never heard in this reign.
    pub(crate) hello: Option<v1::Hello>,
    pub(crate) heartbeat: Option<v1::Heartbeat>,
    pub(crate) session: Option<Session>,
    pub(crate) last_seen: Timestamp,
    /// When each device was last seen to work.
    pub(crate) busy: Vec<Timestamp>,
    pub(crate) message: String,
}

/// Every node that was heard or is waited for.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    pub(crate) nodes: BTreeMap<NodeName, NodeRecord>,
    pub(crate) silent_after_ms: u64,
    pub(crate) grace_ms: u64,
    /// Something that readers see has changed.
    pub(crate) changed: bool,
}

impl Fleet {
    pub(crate) fn new(heartbeat_ms: u64, grace_ms: u64) -> Self {
        Self { silent_after_ms: heartbeat_ms * 4, grace_ms, ..Self::default() }
    }

    /// Waits for a node that holds ranks according to the store.
    pub(crate) fn expect(&mut self, name: &NodeName, now: Timestamp) {
        self.nodes.entry(name.clone()).or_insert_with(|| NodeRecord {
            phase: NodePhase::Silent(now),
            hello: None,
            heartbeat: None,
            session: None,
            last_seen: Timestamp(0),
            busy: Vec::new(),
            message: "not heard since this control plane started".to_owned(),
        });
        self.changed = true;
    }

    /// Takes a hello. The newest stream of a node is the one that counts.
    pub(crate) fn connected(
        &mut self,
        name: &NodeName,
        mut hello: v1::Hello,
        session: Session,
        desk: &mut Desk,
        now: Timestamp,
    ) {
        hello.ranks.clear();
        desk.upsert_node(convert::node(name, &hello, None, true), now);
        let record = NodeRecord {
            phase: NodePhase::Ready,
            busy: vec![now; hello.devices.len()],
            hello: Some(hello),
            heartbeat: None,
            session: Some(session),
            last_seen: now,
            message: String::new(),
        };
        self.nodes.insert(name.clone(), record);
        self.changed = true;
    }

    /// Whether a message comes from the stream that counts.
    pub(crate) fn is_current(&self, name: &NodeName, session: u64) -> bool {
        let record = self.nodes.get(name);
        record.and_then(|r| r.session.as_ref()).is_some_and(|s| s.id == session)
    }

    /// Notes that a node was heard.
    pub(crate) fn heard(&mut self, name: &NodeName, desk: &mut Desk, now: Timestamp) {
        let Some(record) = self.nodes.get_mut(name) else { return };
        record.last_seen = now;
        if record.phase != NodePhase::Ready && record.session.is_some() {
            record.phase = NodePhase::Ready;
            record.message.clear();
            self.changed = true;
            self.update(name, desk, now);
        }
    }

    /// Takes a heartbeat.
    pub(crate) fn beat(
        &mut self,
        name: &NodeName,
        beat: v1::Heartbeat,
        desk: &mut Desk,
        now: Timestamp,
    ) {
        let Some(record) = self.nodes.get_mut(name) else { return };
        for sample in &beat.devices {
            if sample.utilization >= BUSY_SHARE
                && let Some(busy) = record.busy.get_mut(sample.index as usize)
            {
                *busy = now;
            }
        }
        record.heartbeat = Some(beat);
        self.changed = true;
        self.update(name, desk, now);
    }

    fn update(&self, name: &NodeName, desk: &mut Desk, now: Timestamp) {
        let Some(record) = self.nodes.get(name) else { return };
        let Some(hello) = &record.hello else { return };
        let ready = record.phase == NodePhase::Ready;
        desk.upsert_node(convert::node(name, hello, record.heartbeat.as_ref(), ready), now);
    }

    /// Takes the end of a stream: the node may come back within its grace.
    pub(crate) fn disconnected(
        &mut self,
        name: &NodeName,
        why: &str,
        desk: &mut Desk,
        now: Timestamp,
    ) {
        let Some(record) = self.nodes.get_mut(name) else { return };
        record.session = None;
        if record.phase == NodePhase::Ready {
            record.phase = NodePhase::Silent(now);
            why.clone_into(&mut record.message);
        }
        self.changed = true;
        self.update(name, desk, now);
    }

    /// Sends a message down. A node that cannot take it is cut off: it will say hello again, and
    /// is then told what it should know.
    pub(crate) fn send(
        &mut self,
        name: &NodeName,
        kind: v1::agent_down::Kind,
        desk: &mut Desk,
        now: Timestamp,
    ) {
        let session = self.nodes.get(name).and_then(|record| record.session.as_ref());
        let Some(session) = session else { return };
        let why = match session.down.try_send(v1::AgentDown { kind: Some(kind) }) {
            Ok(()) => return,
            Err(TrySendError::Full(_)) => "it does not read what it is told",
            Err(TrySendError::Closed(_)) => "its stream broke",
        };
        self.disconnected(name, why, desk, now);
    }

    /// Moves nodes on whose time is over. Returns those that are given up now, with what was seen.
    pub(crate) fn tick(&mut self, desk: &mut Desk, now: Timestamp) -> Vec<(NodeName, String)> {
        let mut given_up = Vec::new();
        let mut update = Vec::new();
        for (name, record) in &mut self.nodes {
            match record.phase {
                NodePhase::Ready if now.since_ms(record.last_seen) >= self.silent_after_ms => {
                    record.phase = NodePhase::Silent(now);
                    let silence = format_duration_ms(now.since_ms(record.last_seen));
                    record.message = format!("no heartbeat for {silence}");
                    update.push(name.clone());
                }
                NodePhase::Silent(since) if now.since_ms(since) >= self.grace_ms => {
                    record.phase = NodePhase::Gone(now);
                    // If it is only slow, it must say hello again: what it runs is wanted no more.
                    record.session = None;
                    let silence = format_duration_ms(now.since_ms(since));
                    given_up.push((name.clone(), format!("{} for {silence}", record.message)));
                }
                _ => {}
            }
        }
        self.changed |= !given_up.is_empty() || !update.is_empty();
        for name in update {
            self.update(&name, desk, now);
        }
        let forgotten: Vec<NodeName> = self
            .nodes
            .iter()
            .filter(|(name, record)| {
                matches!(record.phase, NodePhase::Gone(since) if now.since_ms(since) >= FORGET_MS)
                    && !desk
                        .fleet()
                        .commitments()
                        .any(|c| c.devices.iter().any(|d| d.node == **name))
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in forgotten {
            self.nodes.remove(&name);
            desk.remove_node(&name, now);
            self.changed = true;
        }
        given_up
    }

    /// Returns the next moment at which [`Self::tick`] may change something.
    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        self.nodes
            .values()
            .map(|record| match record.phase {
                NodePhase::Ready => record.last_seen.plus_ms(self.silent_after_ms),
                NodePhase::Silent(since) => since.plus_ms(self.grace_ms),
                NodePhase::Gone(since) => since.plus_ms(FORGET_MS),
            })
            .min()
    }

    /// Returns the address of a node for its peers.
    pub(crate) fn address(&self, name: &NodeName) -> String {
        let hello = self.nodes.get(name).and_then(|record| record.hello.as_ref());
        hello.map(|hello| hello.address.clone()).filter(|a| !a.is_empty()).unwrap_or_default()
    }

    /// Returns how many threads a rank on this node may use: its device's share of the cores.
    pub(crate) fn threads(&self, name: &NodeName) -> u32 {
        let hello = self.nodes.get(name).and_then(|record| record.hello.as_ref());
        hello.map_or(1, |hello| (hello.cores / (hello.devices.len() as u32).max(1)).max(1))
    }

    /// Returns a node's cores; 0: not known.
    pub(crate) fn cores(&self, name: &NodeName) -> u32 {
        let hello = self.nodes.get(name).and_then(|record| record.hello.as_ref());
        hello.map_or(0, |hello| hello.cores)
    }

    /// Returns the measured matmul rate of a device in FLOP/s; 0: not known.
    pub(crate) fn peak_flops(&self, name: &NodeName, index: u32) -> f64 {
        let hello = self.nodes.get(name).and_then(|record| record.hello.as_ref());
        let device = hello.and_then(|hello| hello.devices.get(index as usize));
        device.map_or(0.0, |device| device.matmul_flops)
    }

    /// Returns every node as readers see it.
    pub(crate) fn views(
        &self,
        snapshot: &Snapshot,
        ranks: &Holders,
        now: Timestamp,
    ) -> Vec<v1::NodeView> {
        self.nodes.iter().map(|(name, record)| record.view(name, snapshot, ranks, now)).collect()
    }
}

/// The rank that holds each device.
pub(crate) type Holders = BTreeMap<(NodeName, u32), u32>;

impl NodeRecord {
    fn view(
        &self,
        name: &NodeName,
        snapshot: &Snapshot,
        ranks: &Holders,
        now: Timestamp,
    ) -> v1::NodeView {
        let hello = self.hello.clone().unwrap_or_default();
        let beat = self.heartbeat.clone().unwrap_or_default();
        let state = snapshot.node(name);
        let devices = hello
            .devices
            .iter()
            .map(|device| {
                let sample = beat.devices.iter().find(|sample| sample.index == device.index);
                let holder = state.and_then(|state| state.holder(device.index));
                let busy = self.busy.get(device.index as usize).copied().unwrap_or(now);
                let ready = self.phase == NodePhase::Ready;
                v1::DeviceView {
                    index: device.index,
                    kind: device.kind.clone(),
                    model: device.model.clone(),
                    memory_bytes: device.memory_bytes,
                    healthy: sample.map_or(device.healthy, |sample| sample.healthy),
                    message: sample
                        .map_or_else(|| device.message.clone(), |sample| sample.message.clone()),
                    job: holder.map(ToString::to_string).unwrap_or_default(),
                    rank: ranks.get(&(name.clone(), device.index)).copied().unwrap_or_default(),
                    utilization: sample.filter(|_| ready).map_or(0.0, |sample| sample.utilization),
                    memory_used_bytes: sample.map_or(0, |sample| sample.memory_used_bytes),
                    action: sample.map_or_else(String::new, |sample| sample.action.clone()),
                    uuid: device.uuid.clone(),
                    idle: holder.is_some() && ready && now.since_ms(busy) >= IDLE_MS,
                }
            })
            .collect();
        v1::NodeView {
            name: name.to_string(),
            phase: self.phase.as_str().to_owned(),
            address: hello.address,
            last_seen_ms: self.last_seen.0,
            cores: hello.cores,
            memory_bytes: hello.memory_bytes,
            cpu_cores_used: beat.cpu_cores_used,
            memory_used_bytes: beat.memory_used_bytes,
            devices,
            agent_version: hello.version,
            message: self.message.clone(),
            metrics_url: hello.metrics_url,
            topology: hello.topology,
        }
    }
}
