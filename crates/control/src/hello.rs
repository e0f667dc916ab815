//! An agent says hello: what it runs is compared with what the store wants.
//!
//! Gangs that still run are adopted without a restart. Ranks that nobody wants are stopped. Ranks
//! that should be there and are not were either never launched, and are launched now, or are lost.

use std::collections::BTreeSet;

use drumline_lifecycle::Event;
use drumline_types::{Attempt, JobId, NodeName, RankIndex, RankPhase, Timestamp};
use drumline_wire::v1;
use drumline_wire::v1::agent_down::Kind as Down;

use crate::core::{Core, Send, launch};
use crate::message::Session;

/// Time between SIGTERM and SIGKILL for a gang that was being stopped when its agent was away.
const GRACE_MS: u64 = 2_000;

impl Core {
    /// Takes a hello.
    pub(crate) fn connected(
        &mut self,
        node: &NodeName,
        mut hello: v1::Hello,
        session: Session,
        heartbeat_ms: u64,
        now: Timestamp,
    ) {
        let ranks = std::mem::take(&mut hello.ranks);
        let known = self.fleet.nodes.get(node).and_then(|record| record.hello.as_ref());
        let again = known.is_some_and(|known| known.instance == hello.instance);
        self.events.push(v1::EventView {
            at_ms: now.0,
            severity: "info".to_owned(),
            reason: if again { "AgentReconnected" } else { "AgentConnected" }.to_owned(),
            message: format!(
                "agent {} with {} devices and {} ranks",
                hello.version,
                hello.devices.len(),
                ranks.len()
            ),
            node: node.to_string(),
            ..v1::EventView::default()
        });
        self.fleet.connected(node, hello, session, &mut self.desk, now);
        let welcome = v1::Welcome { leader_term: self.term, heartbeat_interval_ms: heartbeat_ms };
        self.sends.push(Send { node: node.clone(), kind: Down::Welcome(welcome) });
        for status in &ranks {
            self.rank_status(node, status, now);
        }
        let listed: BTreeSet<(&str, u32, u32)> =
            ranks.iter().map(|rank| (rank.job.as_str(), rank.attempt, rank.rank)).collect();
        let holders: Vec<JobId> = self
            .active
            .iter()
            .filter(|id| {
                let state = self.jobs[*id].state();
                state.phase.holds_devices() && state.nodes().contains(node)
            })
            .cloned()
            .collect();
        for id in holders {
            self.compare(node, &id, &listed, now);
        }
    }

    /// Compares what a node runs of one job with what it should.
    fn compare(
        &mut self,
        node: &NodeName,
        id: &JobId,
        listed: &BTreeSet<(&str, u32, u32)>,
        now: Timestamp,
    ) {
        let job = &self.jobs[id];
        let state = job.state();
        let attempt = state.attempt;
        let here = || state.ranks.iter().filter(|rank| rank.device.node == *node);
        let missing: Vec<(RankIndex, RankPhase)> = here()
            .filter(|rank| !rank.phase.is_terminal())
            .filter(|rank| !listed.contains(&(id.as_str(), attempt.0, rank.rank.0)))
            .map(|rank| (rank.rank, rank.phase))
            .collect();
        let ending = state.ending.is_some();
        if ending && missing.len() < here().filter(|rank| !rank.phase.is_terminal()).count() {
            let stop = v1::StopGang {
                job: id.to_string(),
                attempt: attempt.0,
                grace_ms: GRACE_MS,
                forget: false,
            };
            self.sends.push(Send { node: node.clone(), kind: Down::Stop(stop) });
        }
        if missing.is_empty() {
            return;
        }
        let never_launched = missing.iter().all(|(_, phase)| *phase == RankPhase::Launching)
            && missing.len() == here().count();
        if never_launched && !ending {
            let launch = launch(job, state, node, &self.fleet, self.term);
            self.sends.push(Send { node: node.clone(), kind: Down::Launch(launch) });
            return;
        }
        let message = if never_launched {
            "it was never launched"
        } else {
            "its agent was started anew and no longer has it"
        };
        for (rank, _) in missing {
            let event =
                Event::RankLost { attempt: Attempt(attempt.0), rank, message: message.to_owned() };
            self.apply(id, event, now);
        }
    }
}
