//! Divides a gang over the nodes of a domain that holds it: the fewest domains and nodes, and what
//! is left over where it is least.

use drumline_cluster::{DomainAt, NodeAt, state::NODE_FIRST};

use crate::shape::Shape;
use crate::survey::{Basis, Room, Survey};

/// Ranks on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) pool: u32,
    pub(crate) node: NodeAt,
    pub(crate) ranks: u32,
}

/// One of several places that share the work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bin {
    pub(crate) room: Room,
    /// Devices there: of places that hold as much, the one with the fewest is taken.
    pub(crate) devices: u64,
    pub(crate) key: u64,
    /// What it got.
    pub(crate) got: Room,
}

/// Divides `need` over bins: the roomiest are filled, and what is left goes where it fits best.
/// Returns the bin with the last, smaller run. The bins must hold it in all.
fn divide(bins: &mut [Bin], need: Room) -> Option<usize> {
    let mut order: Vec<usize> = (0..bins.len()).collect();
    order.sort_by_key(|&i| {
        let bin = &bins[i];
        (std::cmp::Reverse((bin.room.full, bin.room.tail)), bin.devices, bin.key)
    });
    divide_in(&order, bins, need)
}

/// As [`divide`], filling the bins in this order.
pub(crate) fn divide_in(order: &[usize], bins: &mut [Bin], need: Room) -> Option<usize> {
    let mut left = need;
    for (next, &i) in order.iter().enumerate() {
        if left == Room::default() {
            return None;
        }
        if bins[i].room.holds(left) {
            let holds = order[next..].iter().copied().filter(|&i| bins[i].room.holds(left));
            let best = holds.min_by_key(|&i| (bins[i].devices, bins[i].key)).unwrap_or(i);
            bins[best].got = left;
            return (left.tail > 0).then_some(best);
        }
        let full = bins[i].room.full.min(left.full);
        bins[i].got.full = full;
        left.full -= full;
    }
    if left.tail == 0 {
        return None;
    }
    let beside = |i: &usize| {
        let bin = &bins[*i];
        bin.room.holds(Room { full: bin.got.full, tail: left.tail })
    };
    let host = order.iter().copied().filter(beside).min_by_key(|&i| {
        let bin = &bins[i];
        (bin.got.full == 0, bin.devices, bin.key)
    })?;
    bins[host].got.tail = left.tail;
    Some(host)
}

impl Survey<'_> {
    /// Puts `need`, in runs of `step`, on the nodes of a domain that holds it, in rank order. The
    /// last, smaller run comes last.
    pub(crate) fn fill(
        &self,
        shape: &Shape,
        at: DomainAt,
        step: usize,
        need: Room,
        out: &mut Vec<Part>,
    ) {
        let place = self.fleet.topology().place(at);
        if step > 0 && shape.chain[step - 1].0 == place.level() {
            // Inside one domain of the level, only the finer rules are left.
            let ranks = need.full * shape.run(step) + need.tail;
            let finer = Room::of(ranks, shape.run(step - 1));
            return self.fill(shape, at, step - 1, finer, out);
        }
        let children: Vec<DomainAt> =
            place.children().filter(|child| self.nodes(*child) > 0).collect();
        if children.is_empty() {
            return self.fill_nodes(shape, at, need, out);
        }
        let bin = |room, devices, key| Bin { room, devices, key, got: Room::default() };
        let mut bins: Vec<Bin> = children
            .iter()
            .map(|&child| {
                let key = self.fleet.topology().place(child).key();
                bin(self.room(shape, child, step), self.devices(child), key)
            })
            .collect();
        if step == 0 {
            // The nodes that are right here, beside the domains, are one more.
            let right_here = self.nodes_right_in(at);
            let mut room = Room::default();
            for (pool, node) in right_here {
                let here = Room::of(u64::from(self.ranks_now(pool, node)), shape.group);
                room = Room { full: room.full + here.full, tail: room.tail.max(here.tail) };
            }
            bins.push(bin(room, u64::MAX, 0));
        }
        let host = divide(&mut bins, need);
        let in_order = (0..bins.len()).filter(|&i| Some(i) != host).chain(host);
        for i in in_order {
            let got = bins[i].got;
            if got == Room::default() {
                continue;
            }
            match children.get(i) {
                Some(&child) => self.fill(shape, child, step, got, out),
                None => self.fill_nodes(shape, at, got, out),
            }
        }
    }

    /// Returns the ranks that a node holds, asked or counted as the survey is made.
    fn ranks_now(&self, pool: u32, node: NodeAt) -> u32 {
        let state = self.fleet.at(node);
        if self.exact { self.ranks_on(pool, state) } else { state.free_in_pool(pool) }
    }

    fn fill_nodes(&self, shape: &Shape, at: DomainAt, need: Room, out: &mut Vec<Part>) {
        debug_assert_eq!(self.basis, Basis::Free, "only what is free can be given");
        let group = shape.group;
        let part = |pool, node, got: Room| Part {
            pool,
            node,
            ranks: (got.full * group + got.tail) as u32,
        };
        if let ([(number, pool)], false) = (self.pools.as_slice(), self.exact) {
            // Node by node from the roomiest, without looking at those that are not needed.
            let order = pool.counts(at).order();
            let (mut left, mut chosen) = (need, Vec::new());
            for &(free, _, node) in order.iter().rev() {
                let room = Room::of(u64::from(free), group);
                if left == Room::default() {
                    break;
                }
                if room.holds(left) {
                    let ranks = left.full * group + left.tail;
                    let least = u32::try_from(ranks).unwrap_or(u32::MAX);
                    let best = order.range((least, 0, NODE_FIRST)..).next();
                    let node = best.map_or(node, |best| best.2);
                    chosen.push((node, left));
                    left = Room::default();
                    break;
                }
                if room.full == 0 || left.full == 0 {
                    break;
                }
                let full = room.full.min(left.full);
                chosen.push((node, Room { full, tail: 0 }));
                left.full -= full;
            }
            if left == Room::default() {
                // The one that was taken last may have the smaller run, and it stays last.
                let last = if need.tail > 0 { chosen.pop() } else { None };
                let name = |node: &NodeAt| self.fleet.at(*node).node().name.clone();
                chosen.sort_by_cached_key(|(node, _)| name(node));
                out.extend(
                    chosen.into_iter().chain(last).map(|(node, got)| part(*number, node, got)),
                );
                return;
            }
        }
        let mut nodes = self.nodes_right_in(at);
        nodes.sort_by(|a, b| {
            let name = |node: &(u32, NodeAt)| &self.fleet.at(node.1).node().name;
            name(a).cmp(name(b))
        });
        let mut bins: Vec<Bin> = nodes
            .iter()
            .map(|&(pool, node)| Bin {
                room: Room::of(u64::from(self.ranks_now(pool, node)), group),
                devices: u64::from(self.ranks_now(pool, node)),
                key: self.fleet.at(node).key(),
                got: Room::default(),
            })
            .collect();
        let host = divide(&mut bins, need);
        for i in (0..bins.len()).filter(|&i| Some(i) != host).chain(host) {
            if bins[i].got != Room::default() {
                out.push(part(nodes[i].0, nodes[i].1, bins[i].got));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bins(rooms: &[(u64, u64)]) -> Vec<Bin> {
        let bin = |(key, &(full, tail)): (u64, &(u64, u64))| Bin {
            room: Room { full, tail },
            devices: full * 2 + tail,
            key,
            got: Room::default(),
        };
        (0..).zip(rooms).map(bin).collect()
    }

    fn got(bins: &[Bin]) -> Vec<(u64, u64)> {
        bins.iter().map(|bin| (bin.got.full, bin.got.tail)).collect()
    }

    #[test]
    fn only_a_smaller_run_comes_last() {
        // Each goes where it fits best; the roomiest is filled only by what fits nowhere.
        for (need, given, last) in [
            ((2, 0), [(0, 0), (2, 0), (0, 0)], None),
            ((2, 1), [(0, 0), (2, 1), (0, 0)], Some(1)),
            ((3, 0), [(3, 0), (0, 0), (0, 0)], None),
            ((5, 0), [(3, 0), (2, 0), (0, 0)], None),
            ((5, 1), [(3, 0), (2, 1), (0, 0)], Some(1)),
            ((0, 1), [(0, 0), (0, 0), (0, 1)], Some(2)),
        ] {
            let mut bins = bins(&[(3, 0), (2, 1), (0, 1)]);
            let found = divide(&mut bins, Room { full: need.0, tail: need.1 });
            assert_eq!((got(&bins), found), (given.to_vec(), last), "{need:?}");
        }
    }

    #[test]
    fn a_smaller_run_goes_beside_whole_ones_before_it_opens_another_place() {
        let mut bins = bins(&[(0, 1), (1, 1), (1, 0)]);
        let found = divide_in(&[0, 1, 2], &mut bins, Room { full: 2, tail: 1 });
        assert_eq!((got(&bins), found), (vec![(0, 0), (1, 1), (1, 0)], Some(1)));
        // Where nothing is beside them it opens one.
        let mut bins = super::tests::bins(&[(0, 1), (1, 0), (1, 0)]);
        let found = divide_in(&[0, 1, 2], &mut bins, Room { full: 2, tail: 1 });
        assert_eq!((got(&bins), found), (vec![(0, 1), (1, 0), (1, 0)], Some(0)));
    }
}
