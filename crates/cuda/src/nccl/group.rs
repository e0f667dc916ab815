//! The channels of one group of ranks, as a [`Collective`] on host values and for values that are on
//! the device already.
//!
//! Collectives share one communicator. Messages between neighbours have communicators of their own,
//! one for each direction, because the library does the work of a communicator in order: two ranks
//! that send to one another before either receives must not wait for each other. Control messages
//! and barriers go over the host's links, which also carry the ids by which communicators meet: the
//! links are the rendezvous's, and authenticated.
#![allow(unsafe_code, reason = "device memory is named by its address")]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drumline_collective::{Collective, CollectiveError, Pending, ReduceOp, STARTED_MAX};

use super::channel::{Channel, Exchange, NcclError};
use super::library::{Nccl, UniqueId};
use super::place::{Buffer, Place};
use super::watchdog::Watchdog;
use crate::memory::Kind;

/// Sends of one direction that may be under way; a further one waits.
const SENDS_MAX: usize = 8;

/// Between which ranks of a group messages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peers {
    /// None: there are collectives alone.
    None,
    /// Neighbours, the last and the first among them: the stages of a pipeline.
    Ring,
}

/// Makes a place for each channel: each works on a stream of its own.
pub type MakePlace<'a> = &'a dyn Fn() -> Result<Arc<dyn Place>, String>;

/// How a group is formed.
pub struct GroupOptions<'a> {
    /// The library.
    pub nccl: Arc<Nccl>,
    /// The same ranks over the host.
    pub control: Arc<dyn Collective>,
    /// The group's name, for people.
    pub name: &'a str,
    /// Between whom messages go.
    pub peers: Peers,
    /// Makes places.
    pub place: MakePlace<'a>,
    /// Longest time without progress.
    pub deadline: Duration,
    /// Watches the channels.
    pub watchdog: &'a Watchdog,
}

/// A directed way between two neighbours.
struct Way {
    channel: Channel,
    /// The sender's buffers whose values may not have left yet.
    under_way: Mutex<VecDeque<Buffer>>,
}

/// The channels of one group.
pub struct NcclGroup {
    control: Arc<dyn Collective>,
    main: Option<Channel>,
    to: BTreeMap<usize, Way>,
    from: BTreeMap<usize, Way>,
    turns: Mutex<Turns>,
    /// Kept from one collective to the next.
    spare: Mutex<Vec<Buffer>>,
}

#[derive(Debug, Default)]
struct Turns {
    started: u64,
    finished: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NcclGroup {
    /// Forms a group; every rank of it calls this at the same time.
    ///
    /// # Errors
    /// [`CollectiveError`] when a communicator cannot be made within the deadline.
    pub fn form(options: &GroupOptions<'_>) -> Result<Self, CollectiveError> {
        let (rank, size) = (options.control.rank(), options.control.size());
        let mut group = Self {
            control: Arc::clone(&options.control),
            main: None,
            to: BTreeMap::new(),
            from: BTreeMap::new(),
            turns: Mutex::default(),
            spare: Mutex::default(),
        };
        if size == 1 {
            return Ok(group);
        }
        let edges = edges(size, options.peers);
        let mut ids = Vec::new();
        if rank == 0 {
            for _ in 0..=edges.len() {
                let id = options.nccl.unique_id();
                ids.extend(id.map_err(|problem| io("all_gather", problem.to_string()))?.0);
            }
        }
        options.control.broadcast_bytes(&mut ids, 0)?;
        let id = |at: usize| {
            let bytes = ids.get(at * 128..(at + 1) * 128);
            bytes.and_then(UniqueId::from_bytes).ok_or_else(|| CollectiveError::Mismatch {
                op: "form",
                expected: format!("{} ids", edges.len() + 1),
                got: format!("{} bytes", ids.len()),
            })
        };
        let open = |id: UniqueId, rank: usize, size: usize, name: &str| {
            let place = (options.place)().map_err(|words| io("form", words))?;
            let (deadline, watchdog) = (options.deadline, options.watchdog);
            Channel::open(&options.nccl, place, id, rank, size, name, deadline, watchdog)
                .map_err(|error| told("form", error))
        };
        group.main = Some(open(id(0)?, rank, size, options.name)?);
        // In the same order everywhere, so that no two ranks wait for each other's next one.
        for (at, (from, to)) in edges.iter().enumerate() {
            let name = format!("{} {from}->{to}", options.name);
            let way = |channel| Way { channel, under_way: Mutex::default() };
            if *from == rank {
                group.to.insert(*to, way(open(id(at + 1)?, 0, 2, &name)?));
            } else if *to == rank {
                group.from.insert(*from, way(open(id(at + 1)?, 1, 2, &name)?));
            }
        }
        Ok(group)
    }

    fn break_off(&self) {
        let ways = self.to.values().chain(self.from.values()).map(|way| &way.channel);
        self.main.iter().chain(ways).for_each(Channel::break_off);
    }

    /// Takes the device's channels out of use when the host's links fail: a peer is gone or has
    /// given up, and would be waited for in vain.
    fn heed<T>(&self, outcome: Result<T, CollectiveError>) -> Result<T, CollectiveError> {
        if outcome.as_ref().is_err_and(|e| !matches!(e, CollectiveError::Mismatch { .. })) {
            self.break_off();
        }
        outcome
    }

    fn main(&self) -> Result<&Channel, CollectiveError> {
        self.main.as_ref().ok_or(CollectiveError::Aborted)
    }

    fn alone(&self) -> bool {
        self.control.size() == 1
    }

    /// Reduces values that are on the device, in place, in the order of what it computes; returns at
    /// once. What is computed afterwards sees the result.
    ///
    /// # Safety
    /// There are `elements` f32 at `address`, and they stay there until the device has done all.
    ///
    /// # Errors
    /// [`CollectiveError`]; the group is of no use then.
    pub unsafe fn all_reduce_on_device(
        &self,
        address: u64,
        elements: usize,
        op: ReduceOp,
    ) -> Result<(), CollectiveError> {
        // SAFETY: the caller's promise.
        unsafe {
            self.collective_on_device(Exchange::AllReduce(op), address, address, elements)?;
        }
        self.join_compute("all_reduce")
    }

    /// As [`NcclGroup::all_reduce_on_device`], but what is computed afterwards does not wait for it:
    /// that begins with [`NcclGroup::join_compute`].
    ///
    /// # Safety
    /// As there; nothing else may use the values until then.
    ///
    /// # Errors
    /// As there.
    pub unsafe fn collective_on_device(
        &self,
        what: Exchange,
        from: u64,
        to: u64,
        elements: usize,
    ) -> Result<(), CollectiveError> {
        if self.alone() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.main()?.queue(what, from, to, elements) }
            .map_err(|error| told(what.name(), error))
    }

    /// Makes what the device computes from now on wait for the collectives that were queued.
    ///
    /// # Errors
    /// As [`NcclGroup::all_reduce_on_device`].
    pub fn join_compute(&self, what: &'static str) -> Result<(), CollectiveError> {
        match &self.main {
            None => Ok(()),
            Some(main) => main.before_compute(what).map_err(|error| told(what, error)),
        }
    }

    fn check_turn(&self, op: &'static str) -> Result<(), CollectiveError> {
        let turns = lock(&self.turns);
        if turns.started == turns.finished {
            return Ok(());
        }
        Err(CollectiveError::Mismatch {
            op,
            expected: "earlier started calls to have ended".to_owned(),
            got: format!("{} that have not", turns.started - turns.finished),
        })
    }

    /// Returns a buffer for at least `elements`.
    fn buffer(
        &self,
        channel: &Channel,
        op: &'static str,
        elements: usize,
    ) -> Result<Buffer, CollectiveError> {
        let mut spare = lock(&self.spare);
        let fitting = spare.iter().position(|buffer| buffer.elements() >= elements);
        match fitting {
            Some(at) => Ok(spare.swap_remove(at)),
            None => Buffer::new(channel.place(), elements).map_err(|words| io(op, words)),
        }
    }

    fn give_back(&self, buffer: Buffer) {
        let mut spare = lock(&self.spare);
        if spare.len() < SENDS_MAX {
            spare.push(buffer);
        }
    }

    /// Does one collective on host values, through buffers on the device.
    fn staged(
        &self,
        what: Exchange,
        send: Option<&[f32]>,
        recv: &mut [f32],
        elements: usize,
    ) -> Result<(), CollectiveError> {
        let op = what.name();
        self.check_turn(op)?;
        let channel = self.main()?;
        let from = self.buffer(channel, op, send.map_or(recv.len(), <[f32]>::len))?;
        let to = self.buffer(channel, op, recv.len())?;
        from.upload(send.unwrap_or(&*recv)).map_err(|words| io(op, words))?;
        // SAFETY: both are as large as the exchange needs, by the callers' checks, and live until it
        // is done: they are leaked when that cannot be known.
        let queued = unsafe { channel.queue(what, from.address(), to.address(), elements) };
        match queued.and_then(|()| channel.wait(op)) {
            Ok(()) => {
                let read = to.download(recv).map_err(|words| io(op, words));
                self.give_back(from);
                self.give_back(to);
                read
            }
            Err(error) => {
                from.leak();
                to.leak();
                Err(told(op, error))
            }
        }
    }

    /// Sends `elements` values from a buffer of the group's own, which `fill` fills.
    fn send_copy(
        &self,
        way: &Way,
        elements: usize,
        fill: impl FnOnce(&Buffer) -> Result<(), String>,
    ) -> Result<(), CollectiveError> {
        const OP: &str = "send";
        let mut under_way = lock(&way.under_way);
        let done = way.channel.poll(OP).map_err(|error| told(OP, error))?;
        if !done && under_way.len() >= SENDS_MAX {
            way.channel.wait(OP).map_err(|error| told(OP, error))?;
        }
        if done || under_way.len() >= SENDS_MAX {
            under_way.drain(..).for_each(|buffer| self.give_back(buffer));
        }
        // A spare one was seen idle: nothing that is queued anywhere uses it.
        let buffer = self.buffer(&way.channel, OP, elements)?;
        fill(&buffer).map_err(|words| io(OP, words))?;
        // SAFETY: the buffer is large enough, and kept until the channel is idle.
        let queued =
            unsafe { way.channel.queue(Exchange::Send { to: 1 }, buffer.address(), 0, elements) };
        under_way.push_back(buffer);
        queued.map_err(|error| told(OP, error))
    }

    /// Sends values that are on the device; they may be overwritten by what is computed afterwards.
    ///
    /// # Safety
    /// There are `elements` f32 at `address`, and they stay there until the device has done all.
    ///
    /// # Errors
    /// [`CollectiveError`]; the group is of no use then.
    pub unsafe fn send_on_device(
        &self,
        address: u64,
        elements: usize,
        to: usize,
    ) -> Result<(), CollectiveError> {
        let way = self.way(&self.to, "send", to)?;
        if elements == 0 {
            return Ok(());
        }
        // What sends would else hold up what is computed: two neighbours that send to one another
        // would wait for each other's receives for ever.
        self.send_copy(way, elements, |buffer| {
            let place = way.channel.place();
            // SAFETY: the caller's promise, and the buffer is made to fit.
            unsafe { place.copy_computed(address, buffer.address(), elements) }
        })
    }

    /// Receives values where what is computed afterwards finds them; returns at once.
    ///
    /// # Safety
    /// There is room for `elements` f32 at `address`, and it stays until the device has done all.
    ///
    /// # Errors
    /// [`CollectiveError`]; the group is of no use then.
    pub unsafe fn recv_on_device(
        &self,
        address: u64,
        elements: usize,
        from: usize,
    ) -> Result<(), CollectiveError> {
        const OP: &str = "recv";
        let way = self.way(&self.from, OP, from)?;
        if elements == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { way.channel.queue(Exchange::Recv { from: 0 }, 0, address, elements) }
            .and_then(|()| way.channel.before_compute(OP))
            .map_err(|error| told(OP, error))
    }

    /// Tells an error of anything that was queued. Does not wait.
    ///
    /// # Errors
    /// [`CollectiveError`]; the group is of no use then.
    pub fn check_queued(&self) -> Result<(), CollectiveError> {
        const OP: &str = "earlier collectives";
        let ways = self.to.values().chain(self.from.values()).map(|way| &way.channel);
        for channel in self.main.iter().chain(ways) {
            channel.poll(OP).map_err(|error| told(OP, error))?;
        }
        Ok(())
    }

    /// Queues exchanges of values that are kept so, which go on together on the device; what is computed afterwards sees what they
    /// bring.
    ///
    /// # Safety
    /// As [`Channel::queue_together`].
    ///
    /// # Errors
    /// [`CollectiveError`]; the group is of no use then.
    pub(crate) unsafe fn together_on_device(
        &self,
        what: &'static str,
        kind: Kind,
        all: &[(Exchange, u64, u64, usize)],
    ) -> Result<(), CollectiveError> {
        if self.alone() || all.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.main()?.queue_kind(kind, all) }.map_err(|error| told(what, error))?;
        self.join_compute(what)
    }

    fn way<'a>(
        &self,
        ways: &'a BTreeMap<usize, Way>,
        op: &'static str,
        peer: usize,
    ) -> Result<&'a Way, CollectiveError> {
        ways.get(&peer).ok_or_else(|| CollectiveError::Mismatch {
            op,
            expected: "a neighbour".to_owned(),
            got: format!("rank {peer} of {}", self.control.size()),
        })
    }
}

impl std::fmt::Debug for NcclGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NcclGroup, rank {} of {}", self.control.rank(), self.control.size())
    }
}

/// Returns the directed ways of a group, in an order that all ranks share.
fn edges(size: usize, peers: Peers) -> Vec<(usize, usize)> {
    if peers == Peers::None {
        return Vec::new();
    }
    let mut all: Vec<(usize, usize)> = (0..size)
        .map(|rank| (rank, (rank + 1) % size))
        .flat_map(|(one, two)| [(one, two), (two, one)])
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn io(op: &'static str, message: String) -> CollectiveError {
    CollectiveError::Io { op, message }
}

fn told(op: &'static str, error: NcclError) -> CollectiveError {
    match error {
        NcclError::Broken { .. } => CollectiveError::Aborted,
        error => io(op, error.to_string()),
    }
}

fn check(op: &'static str, expected: usize, got: usize) -> Result<(), CollectiveError> {
    if expected == got {
        return Ok(());
    }
    Err(CollectiveError::Mismatch {
        op,
        expected: format!("{expected} values"),
        got: format!("{got} values"),
    })
}

impl Collective for NcclGroup {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn size(&self) -> usize {
        self.control.size()
    }

    fn all_reduce(&self, data: &mut [f32], op: ReduceOp) -> Result<(), CollectiveError> {
        if self.alone() || data.is_empty() {
            return self.check_turn("all_reduce");
        }
        let elements = data.len();
        self.staged(Exchange::AllReduce(op), None, data, elements)
    }

    fn start_all_reduce(
        &self,
        elements: usize,
        op: ReduceOp,
    ) -> Result<Box<dyn Pending + '_>, CollectiveError> {
        let mut turns = lock(&self.turns);
        if turns.started - turns.finished >= STARTED_MAX {
            return Err(CollectiveError::Mismatch {
                op: "all_reduce",
                expected: format!("at most {STARTED_MAX} started calls under way"),
                got: "one more".to_owned(),
            });
        }
        turns.started += 1;
        let ticket = turns.started - 1;
        Ok(Box::new(Started { group: self, ticket, elements, op, buffer: None, complete: false }))
    }

    fn all_gather(&self, send: &[f32], recv: &mut [f32]) -> Result<(), CollectiveError> {
        check("all_gather", send.len() * self.size(), recv.len())?;
        if self.alone() || send.is_empty() {
            recv.copy_from_slice(send);
            return self.check_turn("all_gather");
        }
        self.staged(Exchange::AllGather, Some(send), recv, send.len())
    }

    fn reduce_scatter(&self, send: &[f32], recv: &mut [f32]) -> Result<(), CollectiveError> {
        check("reduce_scatter", recv.len() * self.size(), send.len())?;
        if self.alone() || recv.is_empty() {
            recv.copy_from_slice(send);
            return self.check_turn("reduce_scatter");
        }
        let elements = recv.len();
        self.staged(Exchange::ReduceScatter, Some(send), recv, elements)
    }

    fn broadcast(&self, data: &mut [f32], root: usize) -> Result<(), CollectiveError> {
        if root >= self.size() {
            return Err(CollectiveError::Mismatch {
                op: "broadcast",
                expected: format!("a root below {}", self.size()),
                got: root.to_string(),
            });
        }
        if self.alone() || data.is_empty() {
            return self.check_turn("broadcast");
        }
        let elements = data.len();
        self.staged(Exchange::Broadcast { root }, None, data, elements)
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CollectiveError> {
        self.heed(self.control.broadcast_bytes(data, root))
    }

    fn send(&self, data: &[f32], to: usize) -> Result<(), CollectiveError> {
        const OP: &str = "send";
        let way = self.way(&self.to, OP, to)?;
        if data.is_empty() {
            return Ok(());
        }
        self.send_copy(way, data.len(), |buffer| buffer.upload(data))
    }

    fn recv(&self, data: &mut [f32], from: usize) -> Result<(), CollectiveError> {
        const OP: &str = "recv";
        let way = self.way(&self.from, OP, from)?;
        if data.is_empty() {
            return Ok(());
        }
        let buffer = self.buffer(&way.channel, OP, data.len())?;
        // SAFETY: the buffer is large enough, and lives until the receive is done, or is leaked.
        let queued = unsafe {
            way.channel.queue(Exchange::Recv { from: 0 }, 0, buffer.address(), data.len())
        };
        match queued.and_then(|()| way.channel.wait(OP)) {
            Ok(()) => {
                let read = buffer.download(data).map_err(|words| io(OP, words));
                self.give_back(buffer);
                read
            }
            Err(error) => {
                buffer.leak();
                Err(told(OP, error))
            }
        }
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.check_turn("barrier")?;
        self.heed(self.control.barrier())
    }

    fn abort(&self) {
        // The library's own abort can hang. Peers learn of it over the host's links.
        self.break_off();
        self.control.abort();
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        // What a rank sent before it left still arrives, unless nobody takes it.
        for way in self.to.values() {
            let sent = way.channel.wait("send").is_ok();
            for buffer in lock(&way.under_way).drain(..).filter(|_| !sent) {
                buffer.leak();
            }
        }
    }
}

/// A reduction that was started.
struct Started<'a> {
    group: &'a NcclGroup,
    ticket: u64,
    elements: usize,
    op: ReduceOp,
    /// Where it is reduced, once it is queued.
    buffer: Option<Buffer>,
    complete: bool,
}

impl Started<'_> {
    const OP: &'static str = "all_reduce";

    /// Queues the reduction if its turn has come and it is not queued yet.
    fn begin(&mut self, data: &[f32]) -> Result<(), CollectiveError> {
        check(Self::OP, self.elements, data.len())?;
        if self.buffer.is_some() || self.group.alone() || data.is_empty() {
            return Ok(());
        }
        let channel = self.group.main()?;
        let buffer = self.group.buffer(channel, Self::OP, data.len())?;
        buffer.upload(data).map_err(|words| io(Self::OP, words))?;
        let address = buffer.address();
        // SAFETY: the buffer is large enough, and lives until the reduction is done, or is leaked.
        let queued =
            unsafe { channel.queue(Exchange::AllReduce(self.op), address, address, data.len()) };
        self.buffer = Some(buffer);
        queued.map_err(|error| told(Self::OP, error))
    }

    fn end(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        if let Some(buffer) = self.buffer.take() {
            buffer.download(data).map_err(|words| io(Self::OP, words))?;
            self.group.give_back(buffer);
        }
        self.complete = true;
        lock(&self.group.turns).finished += 1;
        Ok(())
    }

    fn is_turn(&self) -> bool {
        lock(&self.group.turns).finished == self.ticket
    }
}

impl Pending for Started<'_> {
    fn poll(&mut self, data: &mut [f32]) -> Result<bool, CollectiveError> {
        if self.complete {
            return Ok(true);
        }
        check(Self::OP, self.elements, data.len())?;
        if !self.is_turn() {
            return Ok(false);
        }
        self.begin(data)?;
        let done = match (&self.buffer, &self.group.main) {
            (Some(_), Some(main)) => main.poll(Self::OP).map_err(|error| told(Self::OP, error))?,
            _ => true,
        };
        if done {
            self.end(data)?;
        }
        Ok(done)
    }

    fn wait(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        if self.complete {
            return Ok(());
        }
        check(Self::OP, self.elements, data.len())?;
        if !self.is_turn() {
            let ahead = self.ticket - lock(&self.group.turns).finished;
            return Err(CollectiveError::Mismatch {
                op: Self::OP,
                expected: "earlier started calls to have ended".to_owned(),
                got: format!("{ahead} that have not"),
            });
        }
        self.begin(data)?;
        if let (Some(_), Some(main)) = (&self.buffer, &self.group.main) {
            main.wait(Self::OP).map_err(|error| told(Self::OP, error))?;
        }
        self.end(data)
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        if !self.complete {
            if let Some(buffer) = self.buffer.take() {
                buffer.leak();
            }
            self.group.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_have_a_way_in_each_direction_and_no_way_twice() {
        assert_eq!(edges(2, Peers::Ring), [(0, 1), (1, 0)]);
        assert_eq!(edges(3, Peers::Ring).len(), 6);
        assert_eq!(edges(5, Peers::Ring).len(), 10);
        assert!(edges(4, Peers::None).is_empty());
    }
}
