//! Finds the best node for each pod, scoring only nodes that changed since the shape was last seen.

use crate::openb::fleet::Node;
use crate::openb::input::{GPUS_MAX, Shape};
use crate::openb::policy::{Score, Scorer};

/// A pod does not fit.
const NOWHERE: f32 = f32::NEG_INFINITY;

/// What is known about one shape: the score of every node, up to a point in the log of changes.
#[derive(Debug, Clone)]
struct Known {
    scores: Vec<f32>,
    devices: Vec<u8>,
    upto: usize,
}

/// Where a pod went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// The node's place in [`Placer::nodes`].
    pub node: usize,
    /// What was left of its devices before.
    pub before: [u16; GPUS_MAX],
}

/// Places pods one after the other.
#[derive(Debug)]
pub struct Placer<S> {
    /// The nodes, in the order that decides among equals.
    pub nodes: Vec<Node>,
    /// The policy.
    pub scorer: S,
    known: Vec<Option<Known>>,
    /// The nodes that changed, in order.
    log: Vec<u32>,
    /// Per node, the last query that scored it: a node that changed twice is scored once.
    stamp: Vec<u32>,
    query: u32,
}

impl<S: Scorer> Placer<S> {
    /// Starts with these nodes, for pods of this many shapes.
    #[must_use]
    pub fn new(nodes: Vec<Node>, scorer: S, shapes: usize) -> Self {
        let stamp = vec![0; nodes.len()];
        Self { nodes, scorer, known: vec![None; shapes], log: Vec::new(), stamp, query: 0 }
    }

    /// Places a pod of the shape with number `id`, or returns `None` when it fits nowhere.
    pub fn place(&mut self, id: usize, shape: &Shape, memory_mib: i32) -> Option<Placed> {
        self.refresh(id, shape);
        let known = self.known[id].as_ref()?;
        let mut best: Option<(usize, f32)> = None;
        for (at, &score) in known.scores.iter().enumerate() {
            if score > best.map_or(NOWHERE, |(_, best)| best) && self.nodes[at].memory >= memory_mib
            {
                best = Some((at, score));
            }
        }
        let (at, _) = best?;
        let device = usize::from(known.devices[at]);
        Some(self.put(at, shape, memory_mib, device))
    }

    /// Puts a pod on a node that it fits on, whatever the scores.
    pub fn put(&mut self, at: usize, shape: &Shape, memory_mib: i32, device: usize) -> Placed {
        let before = self.nodes[at].gpu;
        self.nodes[at].take(shape, memory_mib, device);
        self.log.push(at as u32);
        Placed { node: at, before }
    }

    /// Tells that a node was changed from outside.
    pub fn touch(&mut self, at: usize) {
        self.log.push(at as u32);
    }

    /// Forgets every score: the policy has changed.
    pub fn forget(&mut self) {
        self.known.fill(None);
    }

    fn refresh(&mut self, id: usize, shape: &Shape) {
        let Self { nodes, scorer, known, log, stamp, query } = self;
        let mut rate = |node: &Node| {
            if node.fits(shape) {
                scorer.score(node, shape)
            } else {
                Score { value: NOWHERE, device: 0 }
            }
        };
        match &mut known[id] {
            Some(known) => {
                *query += 1;
                for &at in &log[known.upto..] {
                    let at = at as usize;
                    if stamp[at] != *query {
                        stamp[at] = *query;
                        let score = rate(&nodes[at]);
                        known.scores[at] = score.value;
                        known.devices[at] = score.device;
                    }
                }
                known.upto = log.len();
            }
            slot => {
                let scores: Vec<Score> = nodes.iter().map(rate).collect();
                *slot = Some(Known {
                    scores: scores.iter().map(|s| s.value).collect(),
                    devices: scores.iter().map(|s| s.device).collect(),
                    upto: log.len(),
                });
            }
        }
    }
}
