//! Collectives between threads of one process: for tests and for ranks that share a process.
//!
//! Deliberately plain (a lock, a condition variable, whole copies), so that it can be trusted as
//! the reference for the transports. It does not chunk, overlap or go round the allocator.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::pending::{Pending, Turns};
use crate::{Collective, CollectiveError, DEADLINE_DEFAULT, MESSAGE_MAX, ReduceOp};

/// Messages that may wait between two ranks before a send waits.
const IN_FLIGHT_MAX: usize = 64;

/// What one rank brings to a collective.
#[derive(Debug, Clone, PartialEq)]
enum Payload {
    Values(Vec<f32>),
    Bytes(Vec<u8>),
    Nothing,
}

/// What all ranks must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Call {
    op: &'static str,
    reduce: Option<ReduceOp>,
    root: usize,
    elements: usize,
}

type Deposit = (Call, Payload);

#[derive(Debug)]
struct State {
    deposits: Vec<Option<Deposit>>,
    /// Collectives completed so far, and what the last one brought together. It stays until every
    /// rank has come to the next, so a slow reader cannot miss it.
    round: u64,
    gathered: Arc<Vec<Deposit>>,
    messages: Vec<VecDeque<Vec<f32>>>,
    gone: Vec<bool>,
    aborted: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    deadline: Duration,
}

/// One rank of an in-process group; give each to its own thread.
#[derive(Debug)]
pub struct LocalCollective {
    rank: usize,
    size: usize,
    shared: Arc<Shared>,
    /// Of this rank's started calls.
    turns: Mutex<Turns>,
}

/// Creates a group of `n` ranks in this process, in rank order.
#[must_use]
pub fn group(n: usize) -> Vec<LocalCollective> {
    group_with_deadline(n, DEADLINE_DEFAULT)
}

/// Creates a group of `n` ranks in this process that fail after `deadline` without progress.
#[must_use]
pub fn group_with_deadline(n: usize, deadline: Duration) -> Vec<LocalCollective> {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            deposits: vec![None; n],
            round: 0,
            gathered: Arc::new(Vec::new()),
            messages: vec![VecDeque::new(); n * n],
            gone: vec![false; n],
            aborted: false,
        }),
        changed: Condvar::new(),
        deadline,
    });
    let rank = |rank| LocalCollective {
        rank,
        size: n,
        shared: Arc::clone(&shared),
        turns: Mutex::new(Turns::default()),
    };
    (0..n).map(rank).collect()
}

impl Shared {
    /// The state stays consistent at every unlock, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LocalCollective {
    /// Waits until `ready` gives a value. `waits_for` names the peer that is awaited.
    fn wait<T>(
        &self,
        op: &'static str,
        mut state: MutexGuard<'_, State>,
        waits_for: impl Fn(&State) -> usize,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, CollectiveError> {
        let start = Instant::now();
        loop {
            if state.aborted {
                return Err(CollectiveError::Aborted);
            }
            if let Some(value) = ready(&mut state) {
                return Ok(value);
            }
            let peer = waits_for(&state);
            if state.gone[peer] {
                return Err(CollectiveError::PeerGone { peer, op });
            }
            let waited = start.elapsed();
            let Some(left) = self.shared.deadline.checked_sub(waited) else {
                state.aborted = true;
                self.shared.changed.notify_all();
                return Err(CollectiveError::TimedOut {
                    op,
                    peer,
                    waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
                });
            };
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Brings this rank's part and returns everybody's, in rank order, all for the same call.
    fn exchange(&self, call: Call, payload: Payload) -> Result<Arc<Vec<Deposit>>, CollectiveError> {
        self.turns().check_none(call.op)?;
        let round = self.bring(call, payload)?;
        self.gather(call, round)
    }

    /// Brings this rank's part; returns the round that it is for.
    fn bring(&self, call: Call, payload: Payload) -> Result<u64, CollectiveError> {
        let mut state = self.shared.lock();
        if state.aborted {
            return Err(CollectiveError::Aborted);
        }
        let round = state.round;
        state.deposits[self.rank] = Some((call, payload));
        if state.deposits.iter().all(Option::is_some) {
            let gathered = state.deposits.iter_mut().filter_map(Option::take).collect();
            state.gathered = Arc::new(gathered);
            state.round += 1;
            self.shared.changed.notify_all();
        }
        Ok(round)
    }

    /// Waits for everybody's parts of a round.
    fn gather(&self, call: Call, round: u64) -> Result<Arc<Vec<Deposit>>, CollectiveError> {
        let missing = |state: &State| self.missing(state);
        let gathered = self.wait(call.op, self.shared.lock(), missing, |state| {
            (state.round > round).then(|| Arc::clone(&state.gathered))
        })?;
        self.check_same(call, &gathered)?;
        Ok(gathered)
    }

    /// Returns a rank that has not brought its part.
    fn missing(&self, state: &State) -> usize {
        let absent = |rank: &usize| state.deposits[*rank].is_none() && *rank != self.rank;
        // One that is gone explains the wait better than one that is merely late.
        (0..self.size).filter(absent).min_by_key(|&rank| !state.gone[rank]).unwrap_or(self.rank)
    }

    fn check_same(&self, call: Call, gathered: &[Deposit]) -> Result<(), CollectiveError> {
        let Some((other, _)) = gathered.iter().find(|(other, _)| *other != call) else {
            return Ok(());
        };
        self.abort();
        Err(CollectiveError::Mismatch {
            op: call.op,
            expected: format!("{call:?}"),
            got: format!("{other:?}"),
        })
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_peer(&self, op: &'static str, peer: usize) -> Result<(), CollectiveError> {
        if peer < self.size && peer != self.rank {
            return Ok(());
        }
        Err(CollectiveError::Mismatch {
            op,
            expected: format!("another rank below {}", self.size),
            got: format!("rank {peer}"),
        })
    }

    fn check_root(&self, op: &'static str, root: usize) -> Result<(), CollectiveError> {
        if root < self.size {
            return Ok(());
        }
        Err(CollectiveError::Mismatch {
            op,
            expected: format!("a rank below {}", self.size),
            got: format!("rank {root}"),
        })
    }
}

/// Returns the values of every deposit; all are values, since all calls are the same.
fn values(gathered: &[Deposit]) -> impl Iterator<Item = &[f32]> {
    gathered.iter().filter_map(|(_, payload)| match payload {
        Payload::Values(values) => Some(values.as_slice()),
        _ => None,
    })
}

/// Reduces everybody's values into `data`, in rank order.
fn reduce(op: ReduceOp, gathered: &[Deposit], data: &mut [f32]) {
    for (rank, part) in values(gathered).enumerate() {
        let both = data.iter_mut().zip(part);
        match (rank, op) {
            (0, _) => data.copy_from_slice(part),
            (_, ReduceOp::Sum) => both.for_each(|(sum, x)| *sum += x),
            (_, ReduceOp::Max) => both.for_each(|(max, x)| *max = crate::reduce::max(*max, *x)),
        }
    }
}

/// An all-reduce that was started: it brings its part when its turn comes.
#[derive(Debug)]
struct Started<'a> {
    owner: &'a LocalCollective,
    call: Call,
    op: ReduceOp,
    ticket: u64,
    /// The round that the part was brought for.
    round: Option<u64>,
    over: bool,
}

impl Started<'_> {
    /// Brings this rank's part, once.
    fn bring(&mut self, data: &[f32]) -> Result<u64, CollectiveError> {
        if let Some(round) = self.round {
            return Ok(round);
        }
        let round = self.owner.bring(self.call, Payload::Values(data.to_vec()))?;
        self.round = Some(round);
        Ok(round)
    }

    /// Takes the result; the call is over then, whatever it is.
    fn end(
        &mut self,
        gathered: Result<Arc<Vec<Deposit>>, CollectiveError>,
        data: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.over = true;
        self.owner.turns().finish();
        match gathered {
            Ok(gathered) => {
                reduce(self.op, &gathered, data);
                Ok(())
            }
            Err(error) => {
                self.owner.abort();
                Err(error)
            }
        }
    }
}

impl Pending for Started<'_> {
    fn poll(&mut self, data: &mut [f32]) -> Result<bool, CollectiveError> {
        crate::check_length(self.call.op, self.call.elements, data.len())?;
        if self.over || !self.owner.turns().is_turn(self.ticket) {
            return Ok(self.over);
        }
        let round = match self.bring(data) {
            Ok(round) => round,
            Err(error) => return self.end(Err(error), data).map(|()| false),
        };
        let state = self.owner.shared.lock();
        let outcome = if state.round > round {
            Ok(Arc::clone(&state.gathered))
        } else if state.aborted {
            Err(CollectiveError::Aborted)
        } else {
            let peer = self.owner.missing(&state);
            if !state.gone[peer] {
                return Ok(false);
            }
            Err(CollectiveError::PeerGone { peer, op: self.call.op })
        };
        drop(state);
        let call = self.call;
        let outcome =
            outcome.and_then(|gathered| self.owner.check_same(call, &gathered).map(|()| gathered));
        self.end(outcome, data).map(|()| true)
    }

    fn wait(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        crate::check_length(self.call.op, self.call.elements, data.len())?;
        if self.over {
            return Ok(());
        }
        self.owner.turns().check_turn(self.call.op, self.ticket)?;
        let call = self.call;
        let owner = self.owner;
        let gathered = self.bring(data).and_then(|round| owner.gather(call, round));
        self.end(gathered, data)
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.owner.abort();
        }
    }
}

impl Collective for LocalCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, data: &mut [f32], op: ReduceOp) -> Result<(), CollectiveError> {
        let call = Call { op: "all_reduce", reduce: Some(op), root: 0, elements: data.len() };
        let gathered = self.exchange(call, Payload::Values(data.to_vec()))?;
        reduce(op, &gathered, data);
        Ok(())
    }

    fn start_all_reduce(
        &self,
        elements: usize,
        op: ReduceOp,
    ) -> Result<Box<dyn Pending + '_>, CollectiveError> {
        let ticket = self.turns().start("all_reduce")?;
        let call = Call { op: "all_reduce", reduce: Some(op), root: 0, elements };
        Ok(Box::new(Started { owner: self, call, op, ticket, round: None, over: false }))
    }

    fn all_gather(&self, send: &[f32], recv: &mut [f32]) -> Result<(), CollectiveError> {
        crate::check_length("all_gather", self.size * send.len(), recv.len())?;
        let call = Call { op: "all_gather", reduce: None, root: 0, elements: send.len() };
        let gathered = self.exchange(call, Payload::Values(send.to_vec()))?;
        for (rank, part) in values(&gathered).enumerate() {
            recv[rank * part.len()..(rank + 1) * part.len()].copy_from_slice(part);
        }
        Ok(())
    }

    fn reduce_scatter(&self, send: &[f32], recv: &mut [f32]) -> Result<(), CollectiveError> {
        crate::check_length("reduce_scatter", self.size * recv.len(), send.len())?;
        let call = Call {
            op: "reduce_scatter",
            reduce: Some(ReduceOp::Sum),
            root: 0,
            elements: send.len(),
        };
        let gathered = self.exchange(call, Payload::Values(send.to_vec()))?;
        let own = self.rank * recv.len()..(self.rank + 1) * recv.len();
        for (rank, part) in values(&gathered).enumerate() {
            if rank == 0 {
                recv.copy_from_slice(&part[own.clone()]);
            } else {
                let part = &part[own.clone()];
                recv.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok(())
    }

    fn broadcast(&self, data: &mut [f32], root: usize) -> Result<(), CollectiveError> {
        self.check_root("broadcast", root)?;
        let call = Call { op: "broadcast", reduce: None, root, elements: data.len() };
        let payload =
            if self.rank == root { Payload::Values(data.to_vec()) } else { Payload::Nothing };
        let gathered = self.exchange(call, payload)?;
        if let Some(part) = values(&gathered).next() {
            data.copy_from_slice(part);
        }
        Ok(())
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CollectiveError> {
        self.check_root("broadcast_bytes", root)?;
        let payload = if self.rank == root {
            crate::check_message(data.len())?;
            Payload::Bytes(data.clone())
        } else {
            Payload::Nothing
        };
        let call = Call { op: "broadcast_bytes", reduce: None, root, elements: 0 };
        let gathered = self.exchange(call, payload)?;
        if let (_, Payload::Bytes(bytes)) = &gathered[root] {
            data.clone_from(bytes);
        }
        Ok(())
    }

    fn send(&self, data: &[f32], to: usize) -> Result<(), CollectiveError> {
        self.check_peer("send", to)?;
        let mut message = Some(data.to_vec());
        let link = self.rank * self.size + to;
        self.wait(
            "send",
            self.shared.lock(),
            |_| to,
            |state| {
                if state.gone[to] || state.messages[link].len() >= IN_FLIGHT_MAX {
                    return None;
                }
                state.messages[link].push_back(message.take()?);
                Some(())
            },
        )?;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn recv(&self, data: &mut [f32], from: usize) -> Result<(), CollectiveError> {
        self.check_peer("recv", from)?;
        let link = from * self.size + self.rank;
        let message = self.wait(
            "recv",
            self.shared.lock(),
            |_| from,
            |state| state.messages[link].pop_front(),
        )?;
        self.shared.changed.notify_all();
        if message.len() != data.len() {
            self.abort();
        }
        crate::check_length("recv", data.len(), message.len())?;
        data.copy_from_slice(&message);
        Ok(())
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let call = Call { op: "barrier", reduce: None, root: 0, elements: 0 };
        self.exchange(call, Payload::Nothing).map(drop)
    }

    fn abort(&self) {
        self.shared.lock().aborted = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for LocalCollective {
    fn drop(&mut self) {
        self.shared.lock().gone[self.rank] = true;
        self.shared.changed.notify_all();
    }
}

const _: () = assert!(MESSAGE_MAX <= u32::MAX as usize, "a frame's length is 32 bits");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_threads_sum_in_rank_order() {
        let ranks = group(3);
        std::thread::scope(|scope| {
            for rank in ranks {
                scope.spawn(move || {
                    let mut data = vec![[1e8f32, -1e8, 1.0][rank.rank()]; 5];
                    rank.all_reduce(&mut data, ReduceOp::Sum).unwrap();
                    assert_eq!(data, [1.0; 5]);
                });
            }
        });
    }

    #[test]
    fn a_silent_rank_is_named() {
        let mut ranks = group_with_deadline(2, Duration::from_millis(50));
        let _silent = ranks.pop();
        let error = ranks[0].barrier().unwrap_err();
        assert!(
            matches!(error, CollectiveError::TimedOut { op: "barrier", peer: 1, waited_ms } if waited_ms >= 50),
            "{error:?}"
        );
    }
}
