//! Drumline's own policy: each pod goes where the expected final waste grows least.
//!
//! Fragmentation gradient descent asks what a pod that arrives next could not use. This policy
//! asks what will finally be left of a device once the fleet is full, which it has learned by
//! simulating arrivals of the typical pods ([`crate::openb::policy::learn`]). Pods that need every
//! GPU of a node are too rare to be typical, so a few nodes are kept whole for as many of them as
//! the pods arrived so far let expect.

use crate::openb::fleet::{NOT_KEPT, Node};
use crate::openb::input::{GPUS_MAX, Shape, WHOLE};
use crate::openb::policy::frag::{State, StateMap, candidates};
use crate::openb::policy::placer::{Placed, Placer};
use crate::openb::policy::worth::{Worth, period};
use crate::openb::policy::{Score, Scorer};

/// The settings of the policy and of its learning, tuned on the workload `default` alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuning {
    /// Rounds of learning, each with the policy that the round before found.
    pub rounds: usize,
    /// Simulated fillings of the fleet in each round.
    pub fillings: usize,
    /// Share of simulated pods that go to any node instead, so that every state is seen.
    pub explore: f64,
    /// How much what was seen in a round counts in the next.
    pub keep: f64,
    /// Devices' worth of weight that estimates for idle devices are drawn to guesses with.
    pub pull: f64,
    /// The part of the guess that is believed where nothing was seen; above 0, so that what was
    /// never tried is not chosen for want of bad experience.
    pub caution: f64,
    /// Devices' worth of weight that estimates for remainders are drawn to their best filling with.
    pub fill_pull: f64,
    /// The part of the cores at hand that fillings count on: other pods take some of them.
    pub fill_cores: f64,
    /// How much of its price a pod charges the device that it lands on.
    pub price_weight: f64,
    /// The worth of room for pods without GPUs in the first round; 1: a share of all cores is worth
    /// the same share of all GPUs.
    pub room_start: f64,
    /// How fast the worth of room for pods without GPUs follows what they lack, per round.
    pub room_step: f64,
    /// By how much more of these pods are to be placed than under fragmentation gradient descent,
    /// while learning, where pods go astray.
    pub room_margin: f64,
    /// The same for what is finally chosen, where none go astray; fillings flatter us a little less
    /// than the other.
    pub room_spare: f64,
    /// How much what single shapes would leave counts beside what was learned.
    pub rest_weight: f64,
    /// Changes of waste closer than this, in thousandths of a GPU, are equals.
    pub grain_milli: f64,
    /// Whole-node pods assumed seen before the first, and pods in all among which they were.
    pub whole_node_prior: (f64, f64),
    /// Demand over capacity at which no node is kept any more: the fleet is full.
    pub keep_until: f64,
    /// The cost of breaking into a kept node, in thousandths of a GPU.
    pub keep_cost_milli: f64,
    /// The seed of the simulated arrivals.
    pub seed: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            rounds: 12,
            fillings: 4,
            explore: 0.05,
            keep: 0.9,
            pull: 10.0,
            caution: 0.5,
            fill_pull: 30.0,
            fill_cores: 0.7,
            price_weight: 0.7,
            room_start: 0.12,
            room_step: 0.8,
            room_margin: 0.03,
            room_spare: -0.005,
            rest_weight: 0.15,
            grain_milli: 10.0,
            whole_node_prior: (2.0, 400.0),
            keep_until: 1.0,
            keep_cost_milli: 3000.0,
            seed: 777,
        }
    }
}

/// Scores by expected waste.
#[derive(Debug)]
pub struct Drumline<'a> {
    worth: &'a Worth,
    tuning: &'a Tuning,
    period: usize,
    known: StateMap<Known>,
}

/// What is known about one state of a node.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// Does not depend on the time.
    rest: f64,
    /// The cost in `period`.
    cost: f64,
    period: usize,
}

impl Drumline<'_> {
    /// Returns what a node in this state will cost, in thousandths of a GPU.
    fn cost(&mut self, node: &Node) -> f64 {
        let (worth, tuning, period) = (self.worth, self.tuning, self.period);
        let cost = |rest: f64| {
            let kept = if node.is_kept() { tuning.keep_cost_milli } else { 0.0 };
            worth.wasted(node, period) + rest - kept
        };
        let known = self.known.entry(State::of(node)).or_insert_with(|| {
            let rest = tuning.rest_weight * worth.rest(node);
            Known { rest, cost: cost(rest), period }
        });
        if known.period != period {
            *known = Known { cost: cost(known.rest), period, ..*known };
        }
        known.cost
    }
}

impl Scorer for Drumline<'_> {
    fn score(&mut self, node: &Node, shape: &Shape) -> Score {
        let before = self.cost(node);
        let grain = self.tuning.grain_milli;
        let mut best = Score { value: f32::NEG_INFINITY, device: 0 };
        for device in candidates(node, shape) {
            let mut after = *node;
            after.take(shape, 0, usize::from(device));
            let gain = before - self.cost(&after);
            let value = if grain > 0.0 { (gain / grain).round() } else { gain } as f32;
            if value > best.value {
                best = Score { value, device };
            }
        }
        best
    }
}

/// Places pods as they arrive, keeping count of the time and of whole-node pods.
#[derive(Debug)]
pub struct Dispatcher<'a> {
    placer: Placer<Drumline<'a>>,
    shapes: &'a [Shape],
    tuning: &'a Tuning,
    capacity_milli: f64,
    arrived_milli: f64,
    pods: f64,
    /// Pods that need all GPUs of the largest nodes: how many came, and the most cores of each.
    whole_node: Vec<i32>,
    largest: u8,
    /// Nine tenths of the most cores of such a node.
    most_cores: i32,
    /// When the kept nodes are chosen again.
    review: f64,
}

/// Demand over capacity that arrives between two choices of the nodes to keep whole.
const REVIEW_EVERY: f64 = 0.02;

impl<'a> Dispatcher<'a> {
    /// Starts with these nodes.
    #[must_use]
    pub fn new(
        nodes: Vec<Node>,
        worth: &'a Worth,
        tuning: &'a Tuning,
        shapes: &'a [Shape],
    ) -> Self {
        let capacity: i64 = nodes.iter().map(|n| i64::from(n.gpus) * i64::from(WHOLE)).sum();
        let largest = nodes.iter().map(|n| n.gpus).max().unwrap_or(0);
        let most_cores = nodes.iter().filter(|n| n.gpus == largest).map(|n| n.cpu).max();
        let most_cores = (f64::from(most_cores.unwrap_or(0)) * 0.9) as i32;
        let scorer = Drumline { worth, tuning, period: 0, known: StateMap::default() };
        let mut dispatcher = Self {
            placer: Placer::new(nodes, scorer, shapes.len()),
            shapes,
            tuning,
            capacity_milli: capacity as f64,
            arrived_milli: 0.0,
            pods: 0.0,
            whole_node: Vec::new(),
            largest,
            most_cores,
            review: 0.0,
        };
        dispatcher.keep_nodes();
        dispatcher
    }

    /// Returns the nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.placer.nodes
    }

    /// Returns the GPU demand that has arrived, over the capacity.
    #[must_use]
    pub fn arrived(&self) -> f64 {
        if self.capacity_milli > 0.0 { self.arrived_milli / self.capacity_milli } else { 0.0 }
    }

    /// Returns the period that the next pod arrives in.
    #[must_use]
    pub fn period(&self) -> usize {
        self.placer.scorer.period
    }

    /// Places a pod, or returns `None` when it fits nowhere.
    pub fn place(&mut self, id: usize, memory_mib: i32) -> Option<Placed> {
        self.count(id);
        self.placer.place(id, &self.shapes[id], memory_mib)
    }

    /// Places a pod on a given node and device.
    pub fn put(&mut self, id: usize, node: usize, device: usize) -> Placed {
        self.count(id);
        self.placer.put(node, &self.shapes[id], 0, device)
    }

    fn count(&mut self, id: usize) {
        let shape = &self.shapes[id];
        self.arrived_milli += shape.gpu_total() as f64;
        self.pods += 1.0;
        if shape.gpus == self.largest && shape.gpu_milli == WHOLE {
            self.whole_node.push(shape.cpu_milli);
        }
        let now = period(self.arrived());
        if now != self.placer.scorer.period {
            self.placer.scorer.period = now;
            self.placer.forget();
        }
        if self.arrived() >= self.review {
            self.review = self.arrived() + REVIEW_EVERY;
            self.keep_nodes();
        }
    }

    /// Marks the idle nodes that are kept for the whole-node pods still expected.
    fn keep_nodes(&mut self) {
        let mut kept = vec![NOT_KEPT; self.placer.nodes.len()];
        for need in self.expected() {
            // The smallest that does, so that the others stay free for what needs more.
            let fitting = (0..kept.len()).rev().filter(|&at| {
                let node = &self.placer.nodes[at];
                let idle = node.gpus == self.largest && node.idle() == usize::from(node.gpus);
                idle && kept[at] == NOT_KEPT && node.cpu >= need
            });
            if let Some(at) = fitting.min_by_key(|&at| self.placer.nodes[at].cpu) {
                kept[at] = need;
            }
        }
        for (at, kept_for) in kept.into_iter().enumerate() {
            if self.placer.nodes[at].kept_for != kept_for {
                self.placer.nodes[at].kept_for = kept_for;
                self.placer.touch(at);
            }
        }
    }

    /// Returns the cores that the whole-node pods still to come will need, by what came so far.
    fn expected(&self) -> Vec<i32> {
        let left = self.tuning.keep_until - self.arrived();
        if left <= 0.0 || self.largest == 0 {
            return Vec::new();
        }
        let (prior, prior_pods) = self.tuning.whole_node_prior;
        let pods = self.pods + prior_pods;
        let rate = (self.whole_node.len() as f64 + prior) / pods;
        let demand = (self.arrived_milli + PRIOR_DEMAND_MILLI * prior_pods) / pods;
        let count = (rate * left * self.capacity_milli / demand.max(1.0)).round() as usize;
        // Those that came stand for those to come; with them one that needs the usual cores, and
        // one that needs the largest node, so that it is not gone before the first such pod comes.
        let largest = f64::from(self.largest);
        let usual = (self.placer.scorer.worth.cores_per_gpu() * largest) as i32;
        let mut like = vec![usual, self.most_cores];
        like.extend(&self.whole_node);
        (0..count.min(self.placer.nodes.len())).map(|i| like[i % like.len()]).collect()
    }
}

/// The GPU demand of a pod before any has arrived, in thousandths.
const PRIOR_DEMAND_MILLI: f64 = 750.0;

const _: () = assert!(GPUS_MAX <= 8, "the state of a node packs eight devices");
