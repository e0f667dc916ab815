//! Fragmentation gradient descent (Weng et al., USENIX ATC 2023).
//!
//! A node's fragmentation is the GPU capacity left that a pod drawn from the typical pods could
//! not use: all of it when the pod does not fit, else what is left of the devices that are too
//! full for it. A pod goes where fragmentation grows least.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::openb::fleet::{Node, affinity};
use crate::openb::input::Shape;
use crate::openb::policy::{Score, Scorer};
use crate::openb::typical::Typical;

/// What fragmentation depends on: two nodes of equal state have the same. Devices are sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    low: u64,
    high: u64,
}

impl State {
    /// Packs a node's remainder: 10 bits for each device, the processor time, the model.
    #[must_use]
    pub fn of(node: &Node) -> Self {
        let mut gpu = node.gpu;
        gpu.sort_unstable();
        let bits = |from: usize| {
            gpu[from..from + 4].iter().fold(0u64, |bits, &left| bits << 10 | u64::from(left))
        };
        let model = u64::from(node.model.trailing_zeros());
        Self {
            low: bits(0) << 24 | (node.cpu as u64 & 0xff_ffff),
            high: bits(4) << 24
                | (node.cpu as u64 >> 24) << 12
                | model << 4
                | u64::from(node.gpus)
                | u64::from(node.is_kept()) << 10,
        }
    }
}

/// Multiplies and folds: states are few and not chosen by an adversary.
#[derive(Debug, Default, Clone)]
pub struct StateHasher(u64);

impl Hasher for StateHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, word: u64) {
        let mixed = u128::from(self.0 ^ word) * u128::from(0x9e37_79b9_7f4a_7c15_u64);
        self.0 = (mixed as u64) ^ ((mixed >> 64) as u64);
    }
}

/// A table by state. It is only looked up, never walked: its order decides nothing.
pub type StateMap<T> = HashMap<State, T, BuildHasherDefault<StateHasher>>;

/// Returns the fragmentation of a node, in thousandths of a GPU.
#[must_use]
pub fn fragmentation(node: &Node, typical: &[Typical]) -> f64 {
    let left = node.gpu_left();
    let mut sum = 0.0;
    for Typical { shape, share } in typical {
        let unusable = if shape.gpus > 0 && node.fits(shape) {
            node.devices().iter().filter(|&&d| d < shape.gpu_milli).map(|&d| i64::from(d)).sum()
        } else {
            left
        };
        sum += share * unusable as f64;
    }
    sum
}

/// The policy.
#[derive(Debug)]
pub struct Fgd {
    typical: Vec<Typical>,
    known: StateMap<f64>,
}

impl Fgd {
    /// Starts with the typical pods of a workload.
    #[must_use]
    pub fn new(typical: Vec<Typical>) -> Self {
        Self { typical, known: StateMap::default() }
    }

    fn fragmentation(&mut self, node: &Node) -> f64 {
        let typical = &self.typical;
        *self.known.entry(State::of(node)).or_insert_with(|| fragmentation(node, typical))
    }
}

/// Maps a change of fragmentation to a whole number from 0 to 100.
fn level(change_milli: f64) -> i64 {
    (100.0 / (1.0 + (-change_milli / 1000.0).exp())) as i64
}

impl Scorer for Fgd {
    fn score(&mut self, node: &Node, shape: &Shape) -> Score {
        let before = self.fragmentation(node);
        let mut best: Option<(i64, u8)> = None;
        for device in candidates(node, shape) {
            let mut after = *node;
            after.take(shape, 0, usize::from(device));
            let score = level(before - self.fragmentation(&after));
            if best.is_none_or(|(best, _)| score > best) {
                best = Some((score, device));
            }
        }
        let (score, device) = best.unwrap_or((0, 0));
        Score { value: score as f32, device }
    }
}

/// Returns the devices worth trying for a pod: for a share of one GPU, the first of each distinct
/// remainder that has room; otherwise one place-holder.
pub fn candidates<'a>(node: &'a Node, shape: &'a Shape) -> impl Iterator<Item = u8> + 'a {
    let share = affinity(shape) == Some(0);
    (0u8..).zip(node.devices().iter().chain((node.gpus == 0).then_some(&0))).filter_map(
        move |(at, &left)| {
            if !share {
                return (at == 0).then_some(0);
            }
            let first = !node.devices()[..usize::from(at)].contains(&left);
            (left >= shape.gpu_milli && first).then_some(at)
        },
    )
}
