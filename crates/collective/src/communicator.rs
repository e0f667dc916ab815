//! The communicator of one group: carries out collectives over the lanes to its peers.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::exchange::{Buffers, Call, Exchange, Step};
use crate::group::{Cause, Group};
use crate::host::World;
use crate::lane::Lane;
use crate::pending::{Pending, Turns};
use crate::plan::{self, Plan};
use crate::reduce::reduce_in_order;
use crate::{Collective, CollectiveError, ReduceOp};

/// How long to wait before looking again for what nobody rings for (nothing, as far as is known).
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// Looks at the lanes (some tens of nanoseconds each) before the core is offered to others.
const LOOKS_BEFORE_YIELD: u32 = 20;

/// A yield that takes longer gave the core to someone who computes. Who yields goes to the end of
/// the queue then, who sleeps and is woken does not; so for some waits it is better to sleep.
const YIELD_LONG: Duration = Duration::from_micros(100);

/// Waits without yielding after a long yield.
const CROWDED_WAITS: u32 = 100;

#[derive(Debug)]
struct State {
    /// By rank in the group; none for this rank.
    lanes: Vec<Option<Lane>>,
    /// Calls so far.
    sequence: u64,
    /// Of started calls.
    turns: Turns,
}

/// A group of ranks in processes of their own, seen from one of them.
///
/// One call at a time: a second thread that calls waits for the first. Threads that communicate
/// side by side need a group each.
#[derive(Debug)]
pub struct HostCollective {
    group: Arc<Group>,
    state: Mutex<State>,
    deadline: Duration,
    /// How long to look out for a peer before going to sleep.
    spin: Duration,
    /// Waits to come without yielding, because others compute on this core.
    crowded: AtomicU32,
    /// Keeps the links open.
    world: Arc<World>,
}

impl HostCollective {
    pub(crate) fn new(
        world: Arc<World>,
        group: Arc<Group>,
        lanes: Vec<Option<Lane>>,
        deadline: Duration,
        spin: Duration,
    ) -> Self {
        Self {
            group,
            state: Mutex::new(State { lanes, sequence: 0, turns: Turns::default() }),
            deadline,
            spin,
            crowded: AtomicU32::new(0),
            world,
        }
    }

    /// Returns whether the data to `peer`, a rank of the group, goes through shared memory.
    #[must_use]
    pub fn shares_memory_with(&self, peer: usize) -> bool {
        let state = self.lock();
        (state.lanes.get(peer)).and_then(Option::as_ref).is_some_and(Lane::is_shared)
    }

    /// A panic of another thread mid-call leaves streams out of step, which the next call's
    /// header check finds.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses new calls once the group is aborted. A call that has begun goes on for as long as
    /// it can: peers that ended it went on, and may have met the error after it.
    fn enter(&self, op: &'static str) -> Result<(), CollectiveError> {
        self.aborted(op).map_or(Ok(()), Err)
    }

    fn aborted(&self, op: &'static str) -> Option<CollectiveError> {
        self.group.aborted().map(|cause| match cause {
            Cause::Asked => CollectiveError::Aborted,
            Cause::PeerGone(peer) => CollectiveError::PeerGone { peer, op },
        })
    }

    /// Takes steps until all is done, sleeping while nothing can move.
    fn drive(
        &self,
        op: &'static str,
        lanes: &mut [Option<Lane>],
        mut step: impl FnMut(&mut [Option<Lane>]) -> Result<Step, CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let is_gone =
            |lanes: &[Option<Lane>], peer: usize| lanes[peer].as_ref().is_some_and(Lane::is_gone);
        let mut idle_since: Option<Instant> = None;
        'outer: loop {
            match step(lanes)? {
                Step::Done => return Ok(()),
                Step::Moved => {
                    idle_since = None;
                    continue;
                }
                Step::Waits(_) => {}
            }
            let since = *idle_since.get_or_insert_with(Instant::now);
            let crowded = self.crowded.load(Ordering::Relaxed);
            self.crowded.store(crowded.saturating_sub(1), Ordering::Relaxed);
            let mut now = Instant::now();
            let look_until = now + self.spin;
            for look in 0.. {
                // At first the peer is probably running; then it may be waiting for this core.
                let yields = look >= LOOKS_BEFORE_YIELD;
                if yields {
                    std::thread::yield_now();
                } else {
                    for _ in 0..8 {
                        std::hint::spin_loop();
                    }
                }
                match step(lanes)? {
                    Step::Done => return Ok(()),
                    Step::Moved => {
                        idle_since = None;
                        continue 'outer;
                    }
                    Step::Waits(_) => {}
                }
                let before = std::mem::replace(&mut now, Instant::now());
                if yields && now - before > YIELD_LONG {
                    self.crowded.store(CROWDED_WAITS, Ordering::Relaxed);
                }
                if now >= look_until || crowded > 0 && look + 1 >= LOOKS_BEFORE_YIELD {
                    break;
                }
            }

            let bell = self.group.bell();
            let count = bell.about_to_sleep();
            // What a peer wrote before it went or aborted counts, so look once more after this.
            let aborted = self.aborted(op);
            let gone: Vec<bool> = (0..lanes.len()).map(|peer| is_gone(lanes, peer)).collect();
            let peer = match step(lanes) {
                Ok(Step::Waits(peer)) => peer,
                Ok(Step::Moved) => {
                    bell.stay_awake();
                    idle_since = None;
                    continue;
                }
                Ok(Step::Done) => {
                    bell.stay_awake();
                    return Ok(());
                }
                Err(error) => {
                    bell.stay_awake();
                    return Err(error);
                }
            };
            if let Some(error) = aborted {
                bell.stay_awake();
                return Err(error);
            }
            if gone[peer] {
                bell.stay_awake();
                return Err(CollectiveError::PeerGone { peer, op });
            }
            let waited = since.elapsed();
            let Some(left) = self.deadline.checked_sub(waited) else {
                bell.stay_awake();
                return Err(CollectiveError::TimedOut {
                    op,
                    peer,
                    waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
                });
            };
            bell.sleep(count, left.min(SLEEP_MAX));
        }
    }

    /// Passes a result on; after an error the streams are out of step, so the group is aborted,
    /// here and on the peers.
    fn settle<T>(&self, result: Result<T, CollectiveError>) -> Result<T, CollectiveError> {
        if let Err(error) = &result {
            let cause = match error {
                CollectiveError::PeerGone { peer, .. } => Cause::PeerGone(*peer),
                _ => Cause::Asked,
            };
            self.world.abort_group(&self.group, cause);
        }
        result
    }

    fn run(
        &self,
        call: Call,
        plan: impl FnOnce(usize, usize) -> Plan,
        mut buffers: Buffers<'_>,
    ) -> Result<(), CollectiveError> {
        let mut state = self.lock();
        let state = &mut *state;
        state.turns.check_none(call.op)?;
        let call = Call { sequence: state.sequence, ..call };
        state.sequence += 1;
        if self.size() == 1 {
            return Ok(());
        }
        let plan = plan(self.size(), self.rank());
        let mut exchange = Exchange::new(call, plan, self.rank());
        let step = |lanes: &mut [_]| exchange.advance(lanes, &mut buffers);
        let result = self.drive(call.op, &mut state.lanes, step);
        self.settle(result)
    }

    fn check_peer(&self, op: &'static str, peer: usize) -> Result<(), CollectiveError> {
        if peer < self.size() && peer != self.rank() {
            return Ok(());
        }
        Err(CollectiveError::Mismatch {
            op,
            expected: format!("another rank below {}", self.size()),
            got: format!("rank {peer}"),
        })
    }

    fn check_root(&self, op: &'static str, root: usize) -> Result<(), CollectiveError> {
        if root < self.size() {
            return Ok(());
        }
        Err(CollectiveError::Mismatch {
            op,
            expected: format!("a rank below {}", self.size()),
            got: format!("rank {root}"),
        })
    }

    /// Brings everybody's values to everybody in log2 steps, and reduces them in rank order.
    fn all_reduce_doubling(&self, call: Call, data: &mut [f32]) -> Result<(), CollectiveError> {
        let (size, me, len) = (self.size(), self.rank(), data.len());
        let mut all = vec![0.0f32; size * len];
        all[me * len..(me + 1) * len].copy_from_slice(data);
        for step in plan::doubling(size, me, len) {
            self.run(call, |_, _| step, Buffers::Whole(&mut all))?;
        }
        let parts: Vec<&[f32]> = (0..size).map(|rank| &all[rank * len..(rank + 1) * len]).collect();
        data.copy_from_slice(parts[0]);
        reduce_in_order(call.reduce, data, &parts[1..], 0);
        Ok(())
    }

    /// Takes its place among the started calls.
    fn start(
        &self,
        call: Call,
        plan: impl FnOnce(usize, usize) -> Plan,
    ) -> Result<Box<dyn Pending + '_>, CollectiveError> {
        let (op, elements) = (call.op, call.elements);
        self.enter(op)?;
        let mut state = self.lock();
        let ticket = state.turns.start(op)?;
        let call = Call { sequence: state.sequence, ..call };
        state.sequence += 1;
        let exchange = Exchange::new(call, plan(self.size(), self.rank()), self.rank());
        Ok(Box::new(Started { owner: self, op, exchange, ticket, elements, over: false }))
    }

    fn call(&self, op: &'static str, elements: usize) -> Call {
        Call { op, reduce: ReduceOp::Sum, root: 0, elements, sequence: 0 }
    }
}

impl Collective for HostCollective {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.ranks().len()
    }

    fn all_reduce(&self, data: &mut [f32], op: ReduceOp) -> Result<(), CollectiveError> {
        self.enter("all_reduce")?;
        let len = data.len();
        let call = Call { reduce: op, ..self.call("all_reduce", len) };
        if plan::doubles(self.size(), len) {
            return self.all_reduce_doubling(call, data);
        }
        let plan = |size, me| plan::all_reduce(size, me, len);
        self.run(call, plan, Buffers::Whole(data))
    }

    fn start_all_reduce(
        &self,
        elements: usize,
        op: ReduceOp,
    ) -> Result<Box<dyn Pending + '_>, CollectiveError> {
        let call = Call { reduce: op, ..self.call("all_reduce", elements) };
        self.start(call, |size, me| plan::all_reduce_started(size, me, elements))
    }

    fn start_reduce_scatter(
        &self,
        parts: &[Range<usize>],
    ) -> Result<Box<dyn Pending + '_>, CollectiveError> {
        const OP: &str = "reduce_scatter";
        let elements = crate::check_parts(OP, self.size(), parts)?;
        let call = Call { root: fingerprint(parts), ..self.call(OP, elements) };
        self.start(call, |_, me| plan::reduce_scatter_parts(parts, me))
    }

    fn reduce_scatter_parts(
        &self,
        data: &mut [f32],
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        const OP: &str = "reduce_scatter";
        self.enter(OP)?;
        let elements = crate::check_parts(OP, self.size(), parts)?;
        crate::check_length(OP, elements, data.len())?;
        let call = Call { root: fingerprint(parts), ..self.call(OP, elements) };
        self.run(call, |_, me| plan::reduce_scatter_parts(parts, me), Buffers::Whole(data))
    }

    fn all_gather_parts(
        &self,
        data: &mut [f32],
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        const OP: &str = "all_gather";
        self.enter(OP)?;
        let elements = crate::check_parts(OP, self.size(), parts)?;
        crate::check_length(OP, elements, data.len())?;
        let call = Call { root: fingerprint(parts), ..self.call(OP, elements) };
        self.run(call, |_, me| plan::all_gather_parts(parts, me), Buffers::Whole(data))
    }

    fn all_gather(&self, send: &[f32], recv: &mut [f32]) -> Result<(), CollectiveError> {
        self.enter("all_gather")?;
        let len = send.len();
        crate::check_length("all_gather", self.size() * len, recv.len())?;
        recv[self.rank() * len..(self.rank() + 1) * len].copy_from_slice(send);
        let plan = |size, me| plan::all_gather(size, me, len);
        let buffers = Buffers::Apart { send, recv };
        self.run(self.call("all_gather", len), plan, buffers)
    }

    fn reduce_scatter(&self, send: &[f32], recv: &mut [f32]) -> Result<(), CollectiveError> {
        self.enter("reduce_scatter")?;
        let len = recv.len();
        crate::check_length("reduce_scatter", self.size() * len, send.len())?;
        recv.copy_from_slice(&send[self.rank() * len..(self.rank() + 1) * len]);
        let plan = |size, me| plan::reduce_scatter(size, me, len);
        let buffers = Buffers::Apart { send, recv };
        self.run(self.call("reduce_scatter", send.len()), plan, buffers)
    }

    fn broadcast(&self, data: &mut [f32], root: usize) -> Result<(), CollectiveError> {
        self.enter("broadcast")?;
        self.check_root("broadcast", root)?;
        let len = data.len();
        let call = Call { root, ..self.call("broadcast", len) };
        let plan = |size, me| plan::broadcast(size, me, root, len);
        self.run(call, plan, Buffers::Whole(data))
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CollectiveError> {
        const OP: &str = "broadcast_bytes";
        self.enter(OP)?;
        self.check_root(OP, root)?;
        let at_root = self.rank() == root;
        if at_root {
            crate::check_message(data.len())?;
        }
        // First the length, then the bytes as whole values: both only copied, never computed with.
        let call = |elements| Call { root, ..self.call(OP, elements) };
        let mut len = [if at_root { data.len() as u32 } else { 0 }];
        let values: &mut [f32] = bytemuck::cast_slice_mut(&mut len);
        let plan = |size, me| plan::broadcast(size, me, root, 1);
        self.run(call(1), plan, Buffers::Whole(values))?;
        let len = len[0] as usize;
        if let Err(error) = crate::check_message(len) {
            return self.settle(Err(error));
        }
        let mut values = vec![0.0f32; len.div_ceil(4)];
        if at_root {
            bytemuck::cast_slice_mut(&mut values)[..len].copy_from_slice(data);
        }
        let count = values.len();
        let plan = |size, me| plan::broadcast(size, me, root, count);
        self.run(call(count), plan, Buffers::Whole(&mut values))?;
        if !at_root {
            data.clear();
            data.extend_from_slice(&bytemuck::cast_slice(&values)[..len]);
        }
        Ok(())
    }

    fn send(&self, data: &[f32], to: usize) -> Result<(), CollectiveError> {
        self.check_peer("send", to)?;
        self.enter("send")?;
        let message: &[u8] = bytemuck::cast_slice(data);
        let mut state = self.lock();
        let mut at = 0;
        let mut begun = false;
        let result = self.drive("send", &mut state.lanes, |lanes| {
            let Some(lane) = &mut lanes[to] else {
                return Ok(Step::Done);
            };
            if begun && at == message.len() {
                return Ok(Step::Done);
            }
            if lane.is_gone() {
                return Err(CollectiveError::PeerGone { peer: to, op: "send" });
            }
            let posted = lane.post(message, at);
            match posted.map_err(|error| lane.failed("send", error))? {
                Some(len) => {
                    begun = true;
                    at += len;
                    Ok(Step::Moved)
                }
                None => Ok(Step::Waits(to)),
            }
        });
        self.settle(result)
    }

    fn recv(&self, data: &mut [f32], from: usize) -> Result<(), CollectiveError> {
        const OP: &str = "recv";
        self.check_peer(OP, from)?;
        self.enter(OP)?;
        let message: &mut [u8] = bytemuck::cast_slice_mut(data);
        let mut state = self.lock();
        let mut at = 0;
        let mut begun = false;
        let result = self.drive(OP, &mut state.lanes, |lanes| {
            let Some(lane) = &mut lanes[from] else {
                return Ok(Step::Done);
            };
            if begun && at == message.len() {
                return Ok(Step::Done);
            }
            let mismatch = |got: String| CollectiveError::Mismatch {
                op: OP,
                expected: format!("{} values", message.len() / 4),
                got,
            };
            let next = lane.next_fragment();
            let Some(fragment) = next.map_err(|why| mismatch(why.to_owned()))? else {
                return Ok(Step::Waits(from));
            };
            let len = fragment.bytes.len();
            if fragment.message != message.len() as u64 {
                return Err(mismatch(format!("{} values", fragment.message / 4)));
            }
            if fragment.offset != at as u64 || at + len > message.len() {
                return Err(mismatch("a fragment out of place".to_owned()));
            }
            message[at..at + len].copy_from_slice(fragment.bytes);
            let taken = lane.take_fragment(len);
            taken.map_err(|error| lane.failed(OP, error))?;
            at += len;
            begun = true;
            Ok(Step::Moved)
        });
        self.settle(result)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.enter("barrier")?;
        let call = self.call("barrier", 0);
        for round in plan::barrier(self.size(), self.rank()) {
            self.run(call, |_, _| round, Buffers::Whole(&mut []))?;
        }
        Ok(())
    }

    fn abort(&self) {
        self.world.abort_group(&self.group, Cause::Asked);
    }
}

/// A number by which ranks see that they cut the values alike: it takes the root's place in the
/// announcement.
fn fingerprint(parts: &[Range<usize>]) -> usize {
    parts.iter().fold(0, |sum, part| sum.wrapping_mul(31).wrapping_add(part.end))
}

/// A reduction that goes on whenever its rank looks at it.
#[derive(Debug)]
struct Started<'a> {
    owner: &'a HostCollective,
    op: &'static str,
    exchange: Exchange,
    ticket: u64,
    elements: usize,
    /// Done or failed.
    over: bool,
}

impl Started<'_> {
    /// Takes note of the end, and aborts the group after an error.
    fn end(
        &mut self,
        state: &mut State,
        result: Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        self.over = true;
        state.turns.finish();
        self.owner.settle(result)
    }
}

impl Pending for Started<'_> {
    fn poll(&mut self, data: &mut [f32]) -> Result<bool, CollectiveError> {
        let op = self.op;
        crate::check_length(op, self.elements, data.len())?;
        if self.over {
            return self.owner.enter(op).map(|()| true);
        }
        let owner = self.owner;
        let mut state = owner.lock();
        if !state.turns.is_turn(self.ticket) {
            return Ok(false);
        }
        let mut buffers = Buffers::Whole(data);
        let mut last_look = false;
        loop {
            match self.exchange.advance(&mut state.lanes, &mut buffers) {
                Ok(Step::Done) => return self.end(&mut state, Ok(())).map(|()| true),
                Ok(Step::Moved) => {}
                Ok(Step::Waits(peer)) => {
                    let gone = state.lanes[peer].as_ref().is_some_and(Lane::is_gone);
                    let error = owner
                        .aborted(op)
                        .or_else(|| gone.then_some(CollectiveError::PeerGone { peer, op }));
                    match error {
                        None => return Ok(false),
                        // What a peer wrote before it went counts, so look once more.
                        Some(_) if !last_look => last_look = true,
                        Some(error) => return self.end(&mut state, Err(error)).map(|()| false),
                    }
                }
                Err(error) => return self.end(&mut state, Err(error)).map(|()| false),
            }
        }
    }

    fn wait(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let op = self.op;
        crate::check_length(op, self.elements, data.len())?;
        if self.over {
            return self.owner.enter(op);
        }
        let owner = self.owner;
        let mut state = owner.lock();
        state.turns.check_turn(op, self.ticket)?;
        let mut buffers = Buffers::Whole(data);
        let exchange = &mut self.exchange;
        let step = |lanes: &mut [_]| exchange.advance(lanes, &mut buffers);
        let result = owner.drive(op, &mut state.lanes, step);
        self.end(&mut state, result)
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.owner.abort();
        }
    }
}

impl Drop for HostCollective {
    fn drop(&mut self) {
        self.world.leave_group(&self.group);
    }
}
