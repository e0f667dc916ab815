//! Published rules for the choice of a node, to compare with: each says what a node costs, and the
//! least goes first.

use std::collections::BTreeMap;

use drumline_cluster::{NodeState, Slice, Snapshot};
use drumline_spec::WHOLE_DEVICE;

use crate::scoring::Scoring;

/// What is left of a node for one kind of device.
#[derive(Debug, Clone)]
struct Left {
    /// Thousandths left of each device.
    devices: Vec<u32>,
    cpu_milli: u64,
    memory: u64,
    all: u32,
}

impl Left {
    fn of(state: &NodeState, pool: u32) -> Self {
        let all = state.in_pool(pool).count() as u32;
        let open = state.in_pool(pool).filter(|&index| state.reserved(index).is_none());
        let mut devices: Vec<u32> = open.map(|index| state.left_milli(index)).collect();
        devices.sort_unstable();
        Self { devices, cpu_milli: state.cpu_left_milli(), memory: state.memory_left().0, all }
    }

    fn sum(&self) -> u64 {
        self.devices.iter().map(|&left| u64::from(left)).sum()
    }

    /// Takes what so many ranks need, from the fullest devices that will do.
    fn take(&mut self, slice: &Slice, ranks: u32) {
        let mut ranks_left = ranks;
        for left in &mut self.devices {
            while ranks_left > 0 && *left >= slice.share_milli.max(1) {
                *left -= slice.share_milli.max(1);
                ranks_left -= 1;
            }
        }
        self.cpu_milli = self.cpu_milli.saturating_sub(slice.cpu_milli * u64::from(ranks));
        self.memory = self.memory.saturating_sub(slice.memory.0 * u64::from(ranks));
    }

    /// Returns the thousandths of devices that ranks of one shape cannot use.
    fn fragments(&self, slice: &Slice, ranks: u32) -> u64 {
        let share = slice.share_milli.max(1);
        let fitting: u32 = self.devices.iter().map(|left| left / share).sum();
        let enough = fitting >= ranks
            && self.cpu_milli >= slice.cpu_milli * u64::from(ranks)
            && self.memory >= slice.memory.0 * u64::from(ranks);
        if !enough {
            return self.sum();
        }
        self.devices.iter().filter(|&&left| left < share).map(|&left| u64::from(left)).sum()
    }
}

/// The rule, and what it knows beside the node.
#[derive(Debug)]
pub(crate) struct Baseline {
    scoring: Scoring,
    slice: Slice,
    /// Ranks that one node gets.
    ranks: u32,
    /// The shapes that typical work asks of one node, each as often as it is there: those of the
    /// gangs that hold devices now.
    typical: BTreeMap<(Slice, u32), u64>,
}

impl Baseline {
    pub(crate) fn new(fleet: &Snapshot, scoring: Scoring, slice: Slice, ranks: u32) -> Self {
        let mut typical: BTreeMap<(Slice, u32), u64> = BTreeMap::from([((slice, ranks), 1)]);
        if scoring == Scoring::FragmentationGradient {
            for held in fleet.commitments() {
                for on_node in held.devices.chunk_by(|a, b| a.node == b.node) {
                    *typical.entry((held.slice, on_node.len() as u32)).or_default() += 1;
                }
            }
        }
        Self { scoring, slice, ranks, typical }
    }

    /// Returns what a node costs.
    pub(crate) fn cost(&self, state: &NodeState, pool: u32) -> i64 {
        let left = Left::of(state, pool);
        match self.scoring {
            Scoring::DotProduct => self.product(state, &left),
            Scoring::GpuPacking => self.packing(&left),
            Scoring::FragmentationGradient => self.gradient(left),
            Scoring::Drumline | Scoring::Random | Scoring::FirstFit | Scoring::BestFit => 0,
        }
    }

    /// The product of what is left and what is asked for, each as a part of the node, in
    /// millionths.
    fn product(&self, state: &NodeState, left: &Left) -> i64 {
        let part = |amount: u64, of: u64| amount as f64 / of.max(1) as f64;
        let ranks = u64::from(self.ranks);
        let node = state.node();
        let whole = u64::from(left.all) * u64::from(WHOLE_DEVICE);
        let devices =
            part(left.sum(), whole) * part(u64::from(self.slice.share_milli) * ranks, whole);
        let cpu = part(left.cpu_milli, node.cpu_milli)
            * part(self.slice.cpu_milli * ranks, node.cpu_milli);
        ((devices + cpu) * 1e6) as i64
    }

    /// Devices in use first, then free ones of a node in use, then idle nodes.
    fn packing(&self, left: &Left) -> i64 {
        let share = self.slice.share_milli;
        let in_use = |left: &&u32| **left < WHOLE_DEVICE && **left >= share;
        let shared: u32 = left.devices.iter().filter(in_use).map(|left| left / share.max(1)).sum();
        let idle = left.devices.iter().filter(|&&left| left == WHOLE_DEVICE).count() as u32;
        let rank = if shared >= self.ranks {
            0
        } else if idle < left.all {
            1
        } else {
            2
        };
        rank * 1_000_000 + left.sum() as i64
    }

    /// By how much the expected fragmentation grows (Weng et al. 2023), in thousandths of a device,
    /// times the number of typical gangs.
    fn gradient(&self, mut left: Left) -> i64 {
        let fragments = |left: &Left| -> i64 {
            let of = |((slice, ranks), count): (&(Slice, u32), &u64)| {
                (left.fragments(slice, *ranks) * count) as i64
            };
            self.typical.iter().map(of).sum()
        };
        let before = fragments(&left);
        left.take(&self.slice, self.ranks);
        fragments(&left) - before
    }
}
