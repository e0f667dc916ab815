//! Who sends what to whom in a collective: pure arithmetic over ranges of elements.
//!
//! Every algorithm here adds in rank order, so that all of them, and the in-process reference,
//! give the same bits. That rules out the usual ring (its order turns with the segment) and
//! reduction trees; what is left:
//! - *direct*, small: everybody sends everything to everybody; one hop;
//! - *direct*, large: rank `i` reduces the `i`-th piece of each block and sends the result to all;
//!   as few bytes as a ring, two hops, the next block's pieces travel while one is reduced;
//! - *chain*, large with many ranks: partial sums go up the ranks, results come down, in pieces,
//!   so that each rank talks to its two neighbours only;
//! - *doubling*, small with many ranks: what each rank brings goes round in log2 steps, each of
//!   which doubles what a rank has, and is then added up in order by everybody;
//! - *tree*, for a broadcast to more than a few ranks.

use std::ops::Range;

/// Elements of a block's piece: small enough that what is under way stays in the cache.
const PIECE: usize = 32 << 10;

/// Bytes that a rank may send in all for everybody-to-everybody to be the quickest.
const SMALL_BYTES: usize = 32 << 10;

/// Bytes that a rank may take in all for doubling to be the quickest.
const DOUBLING_BYTES: usize = 128 << 10;

/// Ranks up to which each talks to all others when the data is large.
const DIRECT_MAX: usize = 8;

/// Ranks up to which a root sends to all others itself.
const STAR_MAX: usize = 4;

/// When a range may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// At once.
    Open,
    /// Once so many incoming ranges have been reduced.
    Reduced(usize),
    /// Once so many incoming ranges have been copied.
    Copied(usize),
}

/// A range to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Out {
    pub(crate) range: Range<usize>,
    pub(crate) gate: Gate,
}

/// A range to receive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct In {
    pub(crate) range: Range<usize>,
    /// Reduced into the buffer, together with the same range of the other peers; else copied.
    pub(crate) reduce: bool,
}

/// What passes between this rank and one peer, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PeerPlan {
    pub(crate) outs: Vec<Out>,
    pub(crate) ins: Vec<In>,
    /// Whether the call is announced to the peer, even if nothing follows.
    pub(crate) announce: bool,
    /// Whether the peer announces the call.
    pub(crate) expect: bool,
}

/// A collective as one rank carries it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// One per rank of the group; this rank's own is empty.
    pub(crate) peers: Vec<PeerPlan>,
    /// Whether the buffer is sent from and reduced into at the same place, so that nothing may be
    /// reduced before everything has been sent.
    pub(crate) reduce_last: bool,
}

impl Plan {
    fn new(size: usize) -> Self {
        Self { peers: vec![PeerPlan::default(); size], reduce_last: false }
    }

    /// A plan in which all announce the call to all.
    fn all_to_all(size: usize, me: usize) -> Self {
        let mut plan = Self::new(size);
        for (_, peer) in plan.others(me) {
            peer.announce = true;
            peer.expect = true;
        }
        plan
    }

    fn others(&mut self, me: usize) -> impl Iterator<Item = (usize, &mut PeerPlan)> {
        self.peers.iter_mut().enumerate().filter(move |(rank, _)| *rank != me)
    }
}

/// Part `index` of `parts` of `0..total`; the first ones have one more if it does not divide.
fn split(total: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (total / parts, total % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

/// Ranges of at most `PIECE` elements that cover `0..len`.
fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(PIECE)).map(move |i| i * PIECE..len.min((i + 1) * PIECE))
}

/// Ranges of at most `PIECE` elements that cover `part`.
fn within(part: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let start = part.start;
    pieces(part.len()).map(move |piece| start + piece.start..start + piece.end)
}

/// Blocks that a started all-reduce sends ahead of its results: its ranks look at it now and then
/// only, so what moves between two looks must fill a ring rather than a cache.
const STARTED_AHEAD: usize = 3;

/// All-reduce of `len` elements in place.
pub(crate) fn all_reduce(size: usize, me: usize, len: usize) -> Plan {
    all_reduce_ahead(size, me, len, 1)
}

/// As [`all_reduce`], for a call that goes on while its ranks do something else. The same sums in
/// the same order.
pub(crate) fn all_reduce_started(size: usize, me: usize, len: usize) -> Plan {
    all_reduce_ahead(size, me, len, STARTED_AHEAD)
}

/// Whether everybody's values had better go round by doubling: few bytes, and so many ranks that a
/// message to each would cost more than the steps, of which there are log2.
pub(crate) fn doubles(size: usize, len: usize) -> bool {
    size > DIRECT_MAX && len * 4 * (size - 1) <= DOUBLING_BYTES
}

/// The steps that bring `len` elements of each rank to all, to a place of its own in rank order;
/// the own part is in place. In each, a rank passes on all that it has, or what is missing.
///
/// Source: Bruck et al. 1997, section 3, for any number of ranks.
pub(crate) fn doubling(size: usize, me: usize, len: usize) -> Vec<Plan> {
    let blocks = |first: usize, count: usize| {
        let end = first + count;
        let wrapped = end.saturating_sub(size);
        [first * len..end.min(size) * len, 0..wrapped * len].into_iter().filter(|r| !r.is_empty())
    };
    std::iter::successors(Some(1), |distance| Some(distance * 2))
        .take_while(|distance| *distance < size)
        .map(|distance| {
            let count = distance.min(size - distance);
            let (to, from) = ((me + size - distance) % size, (me + distance) % size);
            let mut plan = Plan::new(size);
            plan.peers[to].announce = true;
            plan.peers[to].outs =
                blocks(me, count).map(|range| Out { range, gate: Gate::Open }).collect();
            plan.peers[from].expect = true;
            plan.peers[from].ins =
                blocks(from, count).map(|range| In { range, reduce: false }).collect();
            plan
        })
        .collect()
}

fn all_reduce_ahead(size: usize, me: usize, len: usize, ahead: usize) -> Plan {
    if len * 4 * (size - 1) <= SMALL_BYTES {
        let mut plan = Plan::all_to_all(size, me);
        plan.reduce_last = true;
        for (_, peer) in plan.others(me) {
            peer.outs.push(Out { range: 0..len, gate: Gate::Open });
            peer.ins.push(In { range: 0..len, reduce: true });
        }
        plan
    } else if size <= DIRECT_MAX {
        all_reduce_direct(size, me, len, ahead)
    } else {
        all_reduce_chain(size, me, len)
    }
}

fn all_reduce_direct(size: usize, me: usize, len: usize, ahead: usize) -> Plan {
    let blocks = len.div_ceil(PIECE * size);
    let piece = |block: usize, rank: usize| {
        let whole = split(len, blocks, block);
        let part = split(whole.len(), size, rank);
        whole.start + part.start..whole.start + part.end
    };
    let mut plan = Plan::all_to_all(size, me);
    for (rank, peer) in plan.others(me) {
        // The next blocks' pieces go out before a block's results, which are not there yet.
        for step in 0..blocks + ahead {
            if step < blocks {
                peer.outs.push(Out { range: piece(step, rank), gate: Gate::Open });
                peer.ins.push(In { range: piece(step, me), reduce: true });
            }
            if let Some(block) = step.checked_sub(ahead) {
                peer.outs.push(Out { range: piece(block, me), gate: Gate::Reduced(block + 1) });
                peer.ins.push(In { range: piece(block, rank), reduce: false });
            }
        }
    }
    plan
}

fn all_reduce_chain(size: usize, me: usize, len: usize) -> Plan {
    let mut plan = Plan::new(size);
    let last = me == size - 1;
    let outs = |gate: fn(usize) -> Gate| {
        pieces(len).enumerate().map(move |(i, range)| Out { range, gate: gate(i + 1) })
    };
    let ins = |reduce| pieces(len).map(move |range| In { range, reduce });
    if let Some(below) = me.checked_sub(1) {
        let results = if last { Gate::Reduced } else { Gate::Copied };
        plan.peers[below] = PeerPlan {
            outs: outs(results).collect(),
            ins: ins(true).collect(),
            announce: true,
            expect: true,
        };
    }
    if !last {
        let partial = if me == 0 { |_| Gate::Open } else { Gate::Reduced };
        plan.peers[me + 1] = PeerPlan {
            outs: outs(partial).collect(),
            ins: ins(false).collect(),
            announce: true,
            expect: true,
        };
    }
    plan
}

/// All-gather of `len` elements of each rank; the own part is in place.
pub(crate) fn all_gather(size: usize, me: usize, len: usize) -> Plan {
    let mut plan = Plan::all_to_all(size, me);
    for (rank, peer) in plan.others(me) {
        peer.outs.push(Out { range: 0..len, gate: Gate::Open });
        peer.ins.push(In { range: rank * len..(rank + 1) * len, reduce: false });
    }
    plan
}

/// Reduce-scatter into `len` elements of each rank; the own part is in place.
pub(crate) fn reduce_scatter(size: usize, me: usize, len: usize) -> Plan {
    let mut plan = Plan::all_to_all(size, me);
    for (rank, peer) in plan.others(me) {
        peer.outs.push(Out { range: rank * len..(rank + 1) * len, gate: Gate::Open });
        peer.ins.push(In { range: 0..len, reduce: true });
    }
    plan
}

/// Reduce-scatter in place: each rank's part is summed where it lies.
pub(crate) fn reduce_scatter_parts(parts: &[Range<usize>], me: usize) -> Plan {
    let mut plan = Plan::all_to_all(parts.len(), me);
    for (rank, peer) in plan.others(me) {
        let open = |range| Out { range, gate: Gate::Open };
        peer.outs = within(&parts[rank]).map(open).collect();
        peer.ins = within(&parts[me]).map(|range| In { range, reduce: true }).collect();
    }
    plan
}

/// All-gather in place of each rank's part.
pub(crate) fn all_gather_parts(parts: &[Range<usize>], me: usize) -> Plan {
    let mut plan = Plan::all_to_all(parts.len(), me);
    for (rank, peer) in plan.others(me) {
        peer.outs.push(Out { range: parts[me].clone(), gate: Gate::Open });
        peer.ins.push(In { range: parts[rank].clone(), reduce: false });
    }
    plan
}

/// Broadcast of `len` elements from `root`: a star for few ranks, else a binomial tree.
pub(crate) fn broadcast(size: usize, me: usize, root: usize, len: usize) -> Plan {
    let mut plan = Plan::new(size);
    // Places in the tree count from the root.
    let place = (me + size - root) % size;
    let rank = |place: usize| (place + root) % size;
    let (parent, children): (Option<usize>, Vec<usize>) = if size <= STAR_MAX {
        match place {
            0 => (None, (1..size).collect()),
            _ => (Some(0), Vec::new()),
        }
    } else {
        // The parent lacks the lowest bit; the children set one below it, the farthest first.
        let lowest = match place {
            0 => size.next_power_of_two(),
            _ => place & place.wrapping_neg(),
        };
        let children = std::iter::successors(Some(lowest >> 1), |bit| Some(bit >> 1))
            .take_while(|bit| *bit > 0)
            .map(|bit| place + bit)
            .filter(|child| *child < size)
            .collect();
        ((place > 0).then(|| place - lowest), children)
    };
    if let Some(parent) = parent {
        let peer = &mut plan.peers[rank(parent)];
        peer.expect = true;
        peer.ins = pieces(len).map(|range| In { range, reduce: false }).collect();
    }
    for child in children {
        let peer = &mut plan.peers[rank(child)];
        peer.announce = true;
        peer.outs = pieces(len)
            .enumerate()
            .map(|(i, range)| Out {
                range,
                gate: if place == 0 { Gate::Open } else { Gate::Copied(i + 1) },
            })
            .collect();
    }
    plan
}

/// The rounds of a barrier: in each, a rank tells one peer and waits for another (dissemination).
///
/// Source: Hensgen, Finkel and Manber 1988.
pub(crate) fn barrier(size: usize, me: usize) -> Vec<Plan> {
    std::iter::successors(Some(1), |distance| Some(distance * 2))
        .take_while(|distance| *distance < size)
        .map(|distance| {
            let mut plan = Plan::new(size);
            plan.peers[(me + distance) % size].announce = true;
            plan.peers[(me + size - distance) % size].expect = true;
            plan
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Carries a plan out on paper, every rank in turn, moving whole ranges with unbounded
    /// streams; returns the buffers. Sums are lists of the ranks added, in order.
    fn carry_out(plans: &[Plan], data: &mut [Vec<Vec<usize>>]) -> Result<(), String> {
        let size = plans.len();
        let mut streams = vec![vec![VecDeque::new(); size]; size];
        let mut out_at = vec![vec![0; size]; size];
        let mut in_at = vec![vec![0; size]; size];
        let mut reduced = vec![0; size];
        let mut copied = vec![0; size];
        loop {
            let mut moved = false;
            for me in 0..size {
                for peer in 0..size {
                    while let Some(out) = plans[me].peers[peer].outs.get(out_at[me][peer]) {
                        let open = match out.gate {
                            Gate::Open => true,
                            Gate::Reduced(n) => reduced[me] >= n,
                            Gate::Copied(n) => copied[me] >= n,
                        };
                        if !open {
                            break;
                        }
                        streams[me][peer].push_back(data[me][out.range.clone()].to_vec());
                        out_at[me][peer] += 1;
                        moved = true;
                    }
                }
                let all_sent = (0..size).all(|p| out_at[me][p] == plans[me].peers[p].outs.len());
                let reducers: Vec<usize> = (0..size)
                    .filter(|p| plans[me].peers[*p].ins.iter().any(|i| i.reduce))
                    .collect();
                for peer in 0..size {
                    if let Some(item) = plans[me].peers[peer].ins.get(in_at[me][peer])
                        && !item.reduce
                        && let Some(part) = streams[peer][me].pop_front()
                    {
                        if part.len() != item.range.len() {
                            return Err(format!("{peer} -> {me}: lengths differ"));
                        }
                        data[me][item.range.clone()].clone_from_slice(&part);
                        in_at[me][peer] += 1;
                        copied[me] += 1;
                        moved = true;
                    }
                }
                let ready = |p: &usize| {
                    !streams[*p][me].is_empty()
                        && plans[me].peers[*p].ins.get(in_at[me][*p]).is_some_and(|i| i.reduce)
                };
                if !reducers.is_empty()
                    && reducers.iter().all(ready)
                    && (all_sent || !plans[me].reduce_last)
                {
                    let range =
                        plans[me].peers[reducers[0]].ins[in_at[me][reducers[0]]].range.clone();
                    let mut parts: Vec<(usize, Vec<Vec<usize>>)> =
                        vec![(me, data[me][range.clone()].to_vec())];
                    for &peer in &reducers {
                        if plans[me].peers[peer].ins[in_at[me][peer]].range != range {
                            return Err(format!("{me} reduces different ranges"));
                        }
                        parts.push((peer, streams[peer][me].pop_front().unwrap()));
                        in_at[me][peer] += 1;
                    }
                    parts.sort_by_key(|(rank, _)| *rank);
                    for (i, place) in range.enumerate() {
                        data[me][place] =
                            parts.iter().flat_map(|(_, part)| part[i].clone()).collect();
                    }
                    reduced[me] += 1;
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        for me in 0..size {
            for peer in 0..size {
                let plan = &plans[me].peers[peer];
                if out_at[me][peer] < plan.outs.len() || in_at[me][peer] < plan.ins.len() {
                    return Err(format!("{me} and {peer} are stuck"));
                }
                if plan.announce != plans[peer].peers[me].expect {
                    return Err(format!("{me} -> {peer}: announced but not expected"));
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn all_reduce_adds_every_rank_once_in_rank_order_by_every_algorithm(
            size in 2usize..12, len in prop_oneof![0usize..40, 30_000usize..40_000, 250_000usize..300_000],
        ) {
            // One tag per stretch of elements would hide off-by-one errors; so every element, but
            // only for lengths that this stays quick for.
            let len = len / 16;
            let small = |plan: fn(usize, usize, usize) -> Plan| -> Result<(), TestCaseError> {
                let plans: Vec<Plan> = (0..size).map(|me| plan(size, me, len)).collect();
                let mut data: Vec<Vec<Vec<usize>>> =
                    (0..size).map(|me| vec![vec![me]; len]).collect();
                carry_out(&plans, &mut data).map_err(TestCaseError::fail)?;
                let expected: Vec<usize> = (0..size).collect();
                for rank in &data {
                    prop_assert!(rank.iter().all(|sum| *sum == expected));
                }
                Ok(())
            };
            small(all_reduce)?;
            if len > 0 {
                small(|size, me, len| all_reduce_direct(size, me, len, 1))?;
                small(|size, me, len| all_reduce_direct(size, me, len, STARTED_AHEAD))?;
            }
            small(all_reduce_chain)?;
        }

        #[test]
        fn each_part_is_summed_where_it_lies_and_comes_to_everyone(
            cuts in proptest::collection::vec(prop_oneof![9 => 0usize..50, 1 => 32_760usize..32_780], 2..6),
        ) {
            let size = cuts.len();
            let mut end = 0;
            let parts: Vec<Range<usize>> =
                cuts.iter().map(|len| { end += len; end - len..end }).collect();
            let mut data: Vec<Vec<Vec<usize>>> = (0..size).map(|me| vec![vec![me]; end]).collect();
            let plans: Vec<Plan> = (0..size).map(|me| reduce_scatter_parts(&parts, me)).collect();
            carry_out(&plans, &mut data).map_err(TestCaseError::fail)?;
            let all: Vec<usize> = (0..size).collect();
            for (rank, part) in parts.iter().enumerate() {
                prop_assert!(data[rank][part.clone()].iter().all(|sum| *sum == all));
            }
            let plans: Vec<Plan> = (0..size).map(|me| all_gather_parts(&parts, me)).collect();
            carry_out(&plans, &mut data).map_err(TestCaseError::fail)?;
            for rank in &data {
                prop_assert!(rank.iter().all(|sum| *sum == all));
            }
        }

        #[test]
        fn doubling_brings_everything_to_everyone(size in 1usize..40, len in 0usize..3) {
            let steps: Vec<Vec<Plan>> = (0..size).map(|me| doubling(size, me, len)).collect();
            let mut data: Vec<Vec<Vec<usize>>> = (0..size)
                .map(|me| {
                    let tag = |place| if place / len == me { vec![me] } else { Vec::new() };
                    (0..size * len).map(tag).collect()
                })
                .collect();
            prop_assert_eq!(steps[0].len(), size.next_power_of_two().ilog2() as usize);
            for step in 0..steps[0].len() {
                let plans: Vec<Plan> = steps.iter().map(|all| all[step].clone()).collect();
                carry_out(&plans, &mut data).map_err(TestCaseError::fail)?;
            }
            for rank in &data {
                prop_assert!(rank.iter().enumerate().all(|(place, tag)| *tag == [place / len]));
            }
        }

        #[test]
        fn a_broadcast_reaches_everyone(size in 2usize..20, root in 0usize..20, len in 0usize..100) {
            let root = root % size;
            let plans: Vec<Plan> = (0..size).map(|me| broadcast(size, me, root, len)).collect();
            let mut data: Vec<Vec<Vec<usize>>> = (0..size).map(|me| vec![vec![me]; len]).collect();
            carry_out(&plans, &mut data).map_err(TestCaseError::fail)?;
            for rank in &data {
                prop_assert!(rank.iter().all(|tag| *tag == [root]));
            }
            // Everyone but the root hears from exactly one peer, even if nothing is sent.
            for (me, plan) in plans.iter().enumerate() {
                let heard = plan.peers.iter().filter(|p| p.expect).count();
                prop_assert_eq!(heard, usize::from(me != root));
            }
        }

        #[test]
        fn a_barrier_makes_everyone_hear_of_everyone(size in 1usize..40) {
            let plans: Vec<Vec<Plan>> = (0..size).map(|me| barrier(size, me)).collect();
            let mut heard: Vec<Vec<bool>> =
                (0..size).map(|me| (0..size).map(|r| r == me).collect()).collect();
            let mut rounds: Vec<_> = plans.into_iter().map(Vec::into_iter).collect();
            while let Some(round) = rounds.iter_mut().map(Iterator::next).collect::<Option<Vec<Plan>>>() {
                if round.is_empty() {
                    break;
                }
                let before = heard.clone();
                for me in 0..size {
                    for peer in 0..size {
                        let expect = round[me].peers[peer].expect;
                        prop_assert_eq!(expect, round[peer].peers[me].announce);
                        if expect {
                            for (known, new) in heard[me].iter_mut().zip(&before[peer]) {
                                *known |= *new;
                            }
                        }
                    }
                }
            }
            prop_assert!(heard.iter().flatten().all(|h| *h));
        }
    }
}
