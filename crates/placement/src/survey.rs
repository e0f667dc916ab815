//! How many ranks each domain holds under a gang's rules, from the counts of the fleet.

use drumline_cluster::{Counts, DomainAt, NodeAt, NodeState, Pool, Slice, Snapshot};
use drumline_spec::{Toleration, WHOLE_DEVICE};

use crate::shape::Shape;

/// What is asked of the devices that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Basis {
    /// Free now.
    Free,
    /// Healthy, and free if nobody used anything.
    Idle,
}

/// Whole runs that a domain holds, and the ranks that fit beside them as a last, smaller run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Room {
    pub(crate) full: u64,
    pub(crate) tail: u64,
}

impl Room {
    pub(crate) fn of(ranks: u64, run: u64) -> Self {
        Self { full: ranks / run, tail: ranks % run }
    }

    /// Returns whether it holds `full` runs and a last one of `tail` ranks.
    pub(crate) fn holds(self, need: Room) -> bool {
        self.full > need.full || (self.full == need.full && self.tail >= need.tail)
    }

    fn add(&mut self, other: Self) {
        self.full += other.full;
        self.tail = self.tail.max(other.tail);
    }
}

/// The devices of one model that a gang may use.
pub(crate) struct Survey<'a> {
    pub(crate) fleet: &'a Snapshot,
    pub(crate) pools: Vec<(u32, &'a Pool)>,
    pub(crate) slice: Slice,
    pub(crate) basis: Basis,
    /// Whether every node is asked, because counts of whole devices do not tell.
    pub(crate) exact: bool,
}

impl<'a> Survey<'a> {
    pub(crate) fn new(
        fleet: &'a Snapshot,
        model: u32,
        tolerations: &[Toleration],
        slice: Slice,
        basis: Basis,
    ) -> Self {
        let open = |(_, pool): &(u32, &Pool)| pool.model() == model && pool.open_to(tolerations);
        let mut pools: Vec<_> = fleet.pools().filter(open).collect();
        // Their numbers tell which was heard first, and that decides nothing.
        pools.sort_by(|a, b| a.1.taints().cmp(b.1.taints()));
        Self { fleet, pools, slice, basis, exact: slice.share_milli < WHOLE_DEVICE }
    }

    /// Returns whether a node must be asked for more than whole devices.
    pub(crate) fn needs_more_than_devices(&self) -> bool {
        self.slice.cpu_milli > 0 || self.slice.memory.0 > 0
    }

    /// Returns the ranks that a node holds, by asking the node.
    pub(crate) fn ranks_on(&self, pool: u32, state: &NodeState) -> u32 {
        if !state.open() {
            return 0;
        }
        let slice = &self.slice;
        let devices = match (self.basis, slice.share_milli) {
            (Basis::Free, WHOLE_DEVICE) => state.free_in_pool(pool),
            (Basis::Free, share) => state
                .in_pool(pool)
                .filter(|&index| state.reserved(index).is_none())
                .map(|index| state.left_milli(index) / share.max(1))
                .sum(),
            (Basis::Idle, share) => {
                let kind = self.fleet.stock(self.fleet.pool(pool).model()).kind();
                let usable: Vec<u32> = state.usable(kind).collect();
                let count = state.in_pool(pool).filter(|index| usable.contains(index)).count();
                count as u32 * (WHOLE_DEVICE / share.max(1))
            }
        };
        let others = match self.basis {
            Basis::Free => state.ranks_left(slice),
            Basis::Idle => {
                let node = state.node();
                let cpu = node.cpu_milli.checked_div(slice.cpu_milli).unwrap_or(u64::MAX);
                let memory = node.memory.0.checked_div(slice.memory.0).unwrap_or(u64::MAX);
                u32::try_from(cpu.min(memory)).unwrap_or(u32::MAX)
            }
        };
        devices.min(others)
    }

    /// Returns the devices in a domain by the basis: the measure of how much is left over.
    pub(crate) fn devices(&self, at: DomainAt) -> u64 {
        let devices = |counts: &Counts| match self.basis {
            Basis::Free => counts.free(),
            Basis::Idle => counts.usable(),
        };
        self.pools.iter().map(|(_, pool)| devices(pool.counts(at))).sum()
    }

    /// Returns the nodes in a domain.
    pub(crate) fn nodes(&self, at: DomainAt) -> u64 {
        self.pools.iter().map(|(_, pool)| u64::from(pool.counts(at).nodes())).sum()
    }

    /// Returns what a domain holds in runs of step `step` of the shape's chain.
    pub(crate) fn room(&self, shape: &Shape, at: DomainAt, step: usize) -> Room {
        if self.nodes(at) == 0 {
            return Room::default();
        }
        let place = self.fleet.topology().place(at);
        if step == 0 {
            return if self.exact { self.asked(shape, at) } else { self.counted(shape, at) };
        }
        let (level, run) = shape.chain[step - 1];
        if place.level() == level {
            let inner = self.room(shape, at, step - 1);
            let small = shape.run(step - 1);
            let per_run = run / small;
            let left = inner.full % per_run * small + inner.tail;
            return Room { full: inner.full / per_run, tail: left };
        }
        let mut sum = Room::default();
        for child in place.children() {
            sum.add(self.room(shape, child, step));
        }
        sum
    }

    fn counted(&self, shape: &Shape, at: DomainAt) -> Room {
        let mut sum = Room::default();
        for (_, pool) in &self.pools {
            let counts = pool.counts(at);
            let by = match self.basis {
                Basis::Free => counts.by_free(),
                Basis::Idle => counts.by_usable(),
            };
            for (ranks, &nodes) in (0u64..).zip(by) {
                if nodes > 0 {
                    let each = Room::of(ranks, shape.group);
                    sum.add(Room { full: each.full * u64::from(nodes), tail: each.tail });
                }
            }
        }
        sum
    }

    fn asked(&self, shape: &Shape, at: DomainAt) -> Room {
        let mut sum = Room::default();
        for (pool, node) in self.nodes_in(at) {
            let ranks = u64::from(self.ranks_on(pool, self.fleet.at(node)));
            sum.add(Room::of(ranks, shape.group));
        }
        sum
    }

    /// Returns every node in a domain and below.
    pub(crate) fn nodes_in(&self, at: DomainAt) -> Vec<(u32, NodeAt)> {
        let of = |&(number, _): &(u32, &Pool)| {
            let fleet = self.fleet;
            fleet.nodes_in(number, at).into_iter().map(move |node| (number, node))
        };
        self.pools.iter().flat_map(of).collect()
    }

    /// Returns the nodes right in a domain.
    pub(crate) fn nodes_right_in(&self, at: DomainAt) -> Vec<(u32, NodeAt)> {
        let of = |&(number, pool): &(u32, &'a Pool)| {
            pool.counts(at).order().iter().map(move |(_, _, node)| (number, *node))
        };
        self.pools.iter().flat_map(of).collect()
    }
}
