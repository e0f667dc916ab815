//! One collective under way on one rank: moves what can be moved, never waits.

use crate::lane::Lane;
use crate::peer::SendError;
use crate::plan::{Gate, Plan};
use crate::reduce::reduce_in_order;
use crate::{CollectiveError, ReduceOp};

/// Precedes a call's data on every stream. A cache line, so that data stays aligned.
const HEADER_BYTES: usize = 64;

/// What all ranks of a group must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) op: &'static str,
    pub(crate) reduce: ReduceOp,
    pub(crate) root: usize,
    pub(crate) elements: usize,
    /// Counts the calls of the group.
    pub(crate) sequence: u64,
}

const OPS: [&str; 6] =
    ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "broadcast_bytes", "barrier"];

impl Call {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let op = OPS.iter().position(|op| *op == self.op).unwrap_or(OPS.len()) as u64;
        let reduce = match self.reduce {
            ReduceOp::Sum => 0,
            ReduceOp::Max => 1,
        };
        let words = [self.sequence, op, reduce, self.root as u64, self.elements as u64];
        let mut bytes = [0; HEADER_BYTES];
        for (at, word) in words.into_iter().enumerate() {
            bytes[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn describe(bytes: &[u8]) -> String {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at * 8 + i]));
        let op = OPS.get(word(1) as usize).unwrap_or(&"an unknown call");
        let reduce = if word(2) == 0 { "sum" } else { "max" };
        format!("call {}: {op} ({reduce}) of {} values, root {}", word(0), word(4), word(3))
    }
}

/// What is sent from and received into.
#[derive(Debug)]
pub(crate) enum Buffers<'a> {
    /// The same values.
    Whole(&'a mut [f32]),
    /// Two buffers.
    Apart { send: &'a [f32], recv: &'a mut [f32] },
}

impl Buffers<'_> {
    fn outgoing(&self) -> &[f32] {
        match self {
            Self::Whole(data) => data,
            Self::Apart { send, .. } => send,
        }
    }

    fn incoming(&mut self) -> &mut [f32] {
        match self {
            Self::Whole(data) => data,
            Self::Apart { recv, .. } => recv,
        }
    }
}

/// What an attempt to go on came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// All is done.
    Done,
    /// Something moved.
    Moved,
    /// Nothing can move before this rank of the group does something.
    Waits(usize),
}

/// How far the exchange with one peer has come.
#[derive(Debug, Clone, Copy, Default)]
struct Cursor {
    header_sent: usize,
    header_read: bool,
    out: usize,
    out_done: usize,
    into: usize,
    into_done: usize,
}

/// A collective under way.
///
/// It holds no buffers: the caller hands the same ones to every step.
#[derive(Debug)]
pub(crate) struct Exchange {
    call: Call,
    header: [u8; HEADER_BYTES],
    plan: Plan,
    me: usize,
    cursors: Vec<Cursor>,
    /// Peers whose values are reduced.
    reducers: Vec<usize>,
    reduced: usize,
    copied: usize,
}

impl Exchange {
    pub(crate) fn new(call: Call, plan: Plan, me: usize) -> Self {
        let reducers = (0..plan.peers.len())
            .filter(|peer| plan.peers[*peer].ins.iter().any(|i| i.reduce))
            .collect();
        Self {
            header: call.encode(),
            cursors: vec![Cursor::default(); plan.peers.len()],
            call,
            plan,
            me,
            reducers,
            reduced: 0,
            copied: 0,
        }
    }

    /// Moves what can be moved now.
    pub(crate) fn advance(
        &mut self,
        lanes: &mut [Option<Lane>],
        buffers: &mut Buffers<'_>,
    ) -> Result<Step, CollectiveError> {
        let mut moved = false;
        for (peer, lane) in lanes.iter_mut().enumerate() {
            let Some(lane) = lane else { continue };
            let op = self.call.op;
            let sent = self.send_to(peer, lane, buffers.outgoing());
            moved |= sent.map_err(|error| lane.failed(op, error))?;
            moved |= self.read_header(peer, lane)?;
            let copied = self.copy_from(peer, lane, buffers.incoming());
            moved |= copied.map_err(|error| lane.failed(op, error))?;
        }
        moved |= self.reduce(lanes, buffers.incoming())?;
        if moved {
            return Ok(Step::Moved);
        }
        Ok(match self.awaited(lanes) {
            Some(peer) => Step::Waits(peer),
            None => Step::Done,
        })
    }

    fn is_open(&self, gate: Gate) -> bool {
        match gate {
            Gate::Open => true,
            Gate::Reduced(n) => self.reduced >= n,
            Gate::Copied(n) => self.copied >= n,
        }
    }

    /// One write: the rest of the header and what is next.
    fn send_to(
        &mut self,
        peer: usize,
        lane: &mut Lane,
        outgoing: &[f32],
    ) -> Result<bool, SendError> {
        let plan = &self.plan.peers[peer];
        let mut cursor = self.cursors[peer];
        if !plan.announce {
            return Ok(false);
        }
        while plan.outs.get(cursor.out).is_some_and(|o| o.range.is_empty()) {
            cursor.out += 1;
        }
        let header = &self.header[cursor.header_sent..];
        let values = match plan.outs.get(cursor.out) {
            Some(out) if self.is_open(out.gate) => {
                &outgoing[out.range.start + cursor.out_done / 4..out.range.end]
            }
            _ => &[],
        };
        let values = bytemuck::cast_slice::<f32, u8>(values);
        let mut wrote = 0;
        if header.len() + values.len() > 0 {
            wrote = lane.write([header, values])?;
            // Rings and windows are whole values long, so a value is never cut.
            debug_assert!(wrote.is_multiple_of(4));
            let of_header = wrote.min(header.len());
            cursor.header_sent += of_header;
            cursor.out_done += wrote - of_header;
            if let Some(out) = plan.outs.get(cursor.out)
                && cursor.out_done == out.range.len() * 4
            {
                cursor.out += 1;
                cursor.out_done = 0;
            }
        }
        self.cursors[peer] = cursor;
        Ok(wrote > 0)
    }

    fn read_header(&mut self, peer: usize, lane: &mut Lane) -> Result<bool, CollectiveError> {
        let cursor = &mut self.cursors[peer];
        if !self.plan.peers[peer].expect || cursor.header_read {
            return Ok(false);
        }
        let mut header = [0; HEADER_BYTES];
        if !lane.peek(&mut header) {
            return Ok(false);
        }
        if header != self.header {
            return Err(CollectiveError::Mismatch {
                op: self.call.op,
                expected: Call::describe(&self.header),
                got: format!("{} of rank {peer}", Call::describe(&header)),
            });
        }
        let consumed = lane.consume(HEADER_BYTES);
        consumed.map_err(|error| lane.failed(self.call.op, error))?;
        cursor.header_read = true;
        Ok(true)
    }

    /// Copies what has come, up to the next range that is to be reduced.
    fn copy_from(
        &mut self,
        peer: usize,
        lane: &mut Lane,
        incoming: &mut [f32],
    ) -> Result<bool, SendError> {
        let mut cursor = self.cursors[peer];
        if !cursor.header_read {
            return Ok(false);
        }
        let mut moved = false;
        while let Some(item) = self.plan.peers[peer].ins.get(cursor.into)
            && !item.reduce
        {
            let left = item.range.len() * 4 - cursor.into_done;
            let start = item.range.start * 4 + cursor.into_done;
            let got = lane.readable();
            let len = (got.len() / 4 * 4).min(left);
            if len > 0 {
                let target: &mut [u8] = bytemuck::cast_slice_mut(incoming);
                target[start..start + len].copy_from_slice(&got[..len]);
                lane.consume(len)?;
                cursor.into_done += len;
                moved = true;
            }
            if len < left {
                break;
            }
            cursor.into += 1;
            cursor.into_done = 0;
            self.copied += 1;
            moved = true;
        }
        self.cursors[peer] = cursor;
        Ok(moved)
    }

    /// Reduces what all peers have brought of the range that is next.
    fn reduce(
        &mut self,
        lanes: &mut [Option<Lane>],
        incoming: &mut [f32],
    ) -> Result<bool, CollectiveError> {
        let Some(&first) = self.reducers.first() else {
            return Ok(false);
        };
        if self.plan.reduce_last && !(0..lanes.len()).all(|peer| self.is_sent(peer)) {
            return Ok(false);
        }
        let mut moved = false;
        loop {
            let Some(item) = self.plan.peers[first].ins.get(self.cursors[first].into) else {
                return Ok(moved);
            };
            let done = self.cursors[first].into_done / 4;
            let mut len = item.range.len() - done;
            let mut inputs: Vec<&[f32]> = Vec::with_capacity(self.reducers.len());
            for &peer in &self.reducers {
                let cursor = &self.cursors[peer];
                let at_reduce = (self.plan.peers[peer].ins.get(cursor.into))
                    .is_some_and(|item| item.reduce && cursor.header_read);
                let Some(lane) = lanes[peer].as_ref().filter(|_| at_reduce) else {
                    return Ok(moved);
                };
                let input = whole_values(lane.readable());
                len = len.min(input.len());
                inputs.push(input);
            }
            if len == 0 && done < item.range.len() {
                return Ok(moved);
            }
            for input in &mut inputs {
                *input = &input[..len];
            }
            let start = item.range.start + done;
            let own = &mut incoming[start..start + len];
            let before = self.reducers.iter().filter(|peer| **peer < self.me).count();
            reduce_in_order(self.call.reduce, own, &inputs, before);
            let finished = done + len == item.range.len();
            for &peer in &self.reducers {
                if let Some(lane) = &mut lanes[peer] {
                    let consumed = lane.consume(len * 4);
                    consumed.map_err(|error| lane.failed(self.call.op, error))?;
                }
                let cursor = &mut self.cursors[peer];
                cursor.into_done += len * 4;
                if finished {
                    cursor.into += 1;
                    cursor.into_done = 0;
                }
            }
            self.reduced += usize::from(finished);
            moved = true;
            // Results go out before the next range is looked at.
            if finished {
                return Ok(true);
            }
        }
    }

    fn is_sent(&self, peer: usize) -> bool {
        let (plan, cursor) = (&self.plan.peers[peer], &self.cursors[peer]);
        !plan.announce
            || cursor.header_sent == HEADER_BYTES
                && plan.outs[cursor.out..].iter().all(|out| out.range.is_empty())
    }

    fn is_received(&self, peer: usize) -> bool {
        let (plan, cursor) = (&self.plan.peers[peer], &self.cursors[peer]);
        !plan.expect || cursor.header_read && cursor.into == plan.ins.len()
    }

    /// Returns the peer that something is still awaited from, one that is gone before others.
    fn awaited(&self, lanes: &[Option<Lane>]) -> Option<usize> {
        let open = |peer: &usize| {
            let lane = lanes[*peer].as_ref();
            let nothing_here = lane.is_some_and(|lane| lane.readable().len() < 4);
            let (plan, cursor) = (&self.plan.peers[*peer], &self.cursors[*peer]);
            let may_send = (cursor.header_sent < HEADER_BYTES && plan.announce)
                || plan.outs.get(cursor.out).is_some_and(|out| self.is_open(out.gate));
            (!self.is_received(*peer) && nothing_here) || (!self.is_sent(*peer) && may_send)
        };
        let gone = |peer: &usize| lanes[*peer].as_ref().is_some_and(Lane::is_gone);
        let peers = || 0..lanes.len();
        peers()
            .find(|peer| open(peer) && gone(peer))
            .or_else(|| peers().find(open))
            .or_else(|| peers().find(|peer| !self.is_received(*peer) || !self.is_sent(*peer)))
    }
}

/// The part of `bytes` that is whole values.
fn whole_values(bytes: &[u8]) -> &[f32] {
    // Streams carry whole values after headers of a multiple of 4 bytes, and rings start aligned,
    // so what is read starts aligned too.
    bytemuck::cast_slice(&bytes[..bytes.len() / 4 * 4])
}
