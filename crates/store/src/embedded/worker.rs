//! The one thread that writes: it batches what has queued up into one durable commit.
//!
//! While a commit waits for the disk, further requests queue up; they become the next batch. So
//! a lone writer pays one sync per transaction and many writers share one, without any timer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use drumline_ports::store::{Lease, LeaseId, Revision, StoreError, Txn, TxnOutcome};

use super::Shared;
use super::apply::{Batch, Counters, HistoryBound};

/// Where an answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the writer is asked to do.
pub(super) enum Work {
    Txn(Txn, Reply<TxnOutcome>),
    Grant(Duration, Reply<Lease>),
    Revoke(LeaseId, Reply<()>),
    /// With the moment it was asked: a busy writer must not let a lease expire that was renewed.
    KeepAlive(LeaseId, Instant, Reply<Duration>),
    Compact(Revision, Reply<()>),
    Close,
}

/// Work with its place in the bounded queue.
pub(super) struct Request {
    pub(super) work: Work,
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

/// Most requests in one commit, so that the first of them does not wait for ever.
const BATCH_MAX: usize = 256;

/// Longest sleep when no lease is about to expire.
const IDLE: Duration = Duration::from_secs(60);

struct LeaseClock {
    ttl: Duration,
    expires: Instant,
}

/// The state of the writer thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    counters: Counters,
    bound: HistoryBound,
    leases: BTreeMap<LeaseId, LeaseClock>,
    /// Why nothing can be written any more.
    broken: Option<String>,
}

/// Sends one answer once the fate of its batch is known: `None` for committed.
type Answer = Box<dyn FnOnce(Option<StoreError>) + Send>;

impl Worker {
    /// Creates the worker; every stored lease starts with its full time, as after a leader change
    /// in etcd, because nobody knows how long the store was away.
    pub(super) fn new(
        shared: Arc<Shared>,
        counters: Counters,
        bound: HistoryBound,
        leases: Vec<(LeaseId, Duration)>,
    ) -> Self {
        let now = Instant::now();
        let clock = |ttl| LeaseClock { ttl, expires: now + ttl };
        Self {
            shared,
            counters,
            bound,
            leases: leases.into_iter().map(|(id, ttl)| (id, clock(ttl))).collect(),
            broken: None,
        }
    }

    /// Works until told to close or until every sender is gone.
    pub(super) fn run(mut self, queue: &Receiver<Request>) {
        loop {
            let wait = self
                .next_expiry()
                .map_or(IDLE, |at| at.saturating_duration_since(Instant::now()).min(IDLE));
            let mut requests = Vec::new();
            match queue.recv_timeout(wait) {
                Ok(request) => requests.push(request),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while requests.len() < BATCH_MAX
                && let Ok(request) = queue.try_recv()
            {
                requests.push(request);
            }
            if self.serve(requests) {
                return;
            }
        }
    }

    fn next_expiry(&self) -> Option<Instant> {
        if self.broken.is_some() {
            return None;
        }
        self.leases.values().map(|clock| clock.expires).min()
    }

    /// Serves a batch; whether it asked to close.
    fn serve(&mut self, requests: Vec<Request>) -> bool {
        let mut close = false;
        let mut writes = Vec::with_capacity(requests.len());
        for Request { work, permit } in requests {
            match work {
                Work::Close => close = true,
                Work::KeepAlive(lease, asked, reply) => {
                    // The caller may be gone; that is its affair.
                    let _ = reply.send(self.keep_alive(lease, asked));
                }
                work => writes.push((work, permit)),
            }
        }
        let now = Instant::now();
        let expired: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, clock)| clock.expires <= now)
            .map(|(id, _)| *id)
            .collect();
        if !writes.is_empty() || !expired.is_empty() {
            self.commit(writes, &expired);
        }
        close
    }

    fn keep_alive(&mut self, lease: LeaseId, asked: Instant) -> Result<Duration, StoreError> {
        match self.leases.get_mut(&lease) {
            Some(clock) if asked < clock.expires => {
                clock.expires = asked + clock.ttl;
                Ok(clock.ttl)
            }
            _ => Err(StoreError::LeaseNotFound { lease }),
        }
    }

    fn commit(&mut self, writes: Vec<(Work, Option<OwnedSemaphorePermit>)>, expired: &[LeaseId]) {
        let mut answers: Vec<Answer> = Vec::with_capacity(writes.len());
        // Held to the end: the queue's bound counts what is not answered yet.
        let mut permits = Vec::with_capacity(writes.len());
        let mut works = Vec::with_capacity(writes.len());
        for (work, permit) in writes {
            permits.push(permit);
            works.push(work);
        }
        if let Some(why) = &self.broken {
            for work in works {
                refuse(work, why);
            }
            return;
        }
        let fate = match self.write(works, expired, &mut answers) {
            Ok(None) => None,
            Ok(Some(counters)) => {
                self.counters = counters;
                let newest = Revision(counters.revision);
                self.shared.committed.send_replace(newest);
                None
            }
            Err(error) => {
                self.broken = Some(match &error {
                    StoreError::Unknown { cause, .. } | StoreError::Unavailable { cause, .. } => {
                        format!(
                            "{} stopped accepting writes after a disk error ({cause}); free space \
                             or replace the disk, then restart",
                            self.shared.path.display()
                        )
                    }
                    other => other.to_string(),
                });
                Some(error)
            }
        };
        if fate.is_none() {
            for lease in expired {
                self.leases.remove(lease);
            }
        }
        for answer in answers {
            answer(fate.clone());
        }
        drop(permits);
    }

    /// Writes one batch durably. `Ok(None)`: there was nothing to commit. An error tells whether
    /// the batch is surely not applied or may be.
    fn write(
        &mut self,
        works: Vec<Work>,
        expired: &[LeaseId],
        answers: &mut Vec<Answer>,
    ) -> Result<Option<Counters>, StoreError> {
        let unavailable = |e: redb::Error| StoreError::unavailable("write", e);
        let txn = self.shared.db.begin_write().map_err(|e| unavailable(e.into()))?;
        let mut granted = Vec::new();
        let mut revoked = Vec::new();
        let counters = {
            let mut batch = Batch::open(&txn, self.counters).map_err(|e| unavailable(e.into()))?;
            let apply = || -> Result<(), redb::Error> {
                for lease in expired {
                    batch.revoke(*lease)?;
                }
                for work in works {
                    self.shared.apply(work, &mut batch, answers, &mut granted, &mut revoked)?;
                }
                batch.trim(self.bound)?;
                Ok(())
            };
            apply().map_err(unavailable)?;
            if !batch.changed {
                drop(batch);
                txn.abort().map_err(|e| unavailable(e.into()))?;
                return Ok(None);
            }
            batch.finish(&txn).map_err(unavailable)?
        };
        // From here on the batch may reach the disk even if an error is reported.
        txn.commit().map_err(|e| StoreError::unknown("write", e))?;
        let now = Instant::now();
        for (id, ttl) in granted {
            let expires = now + ttl;
            self.leases.insert(id, LeaseClock { ttl, expires });
        }
        for id in revoked {
            self.leases.remove(&id);
        }
        Ok(Some(counters))
    }
}

fn refuse(work: Work, why: &str) {
    let error = StoreError::unavailable("write", why);
    // A caller that is gone needs no refusal.
    let _ = match work {
        Work::Txn(_, reply) => reply.send(Err(error)).is_ok(),
        Work::Grant(_, reply) => reply.send(Err(error)).is_ok(),
        Work::Revoke(_, reply) | Work::Compact(_, reply) => reply.send(Err(error)).is_ok(),
        Work::KeepAlive(_, _, reply) => reply.send(Err(error)).is_ok(),
        Work::Close => true,
    };
}

/// Answers with `result`, or with the error that befell the whole batch.
fn answer<T: Send + 'static>(reply: Reply<T>, result: Result<T, StoreError>) -> Answer {
    Box::new(move |fate| {
        // A caller that stopped waiting has been told "unknown" already.
        let _ = reply.send(match fate {
            None => result,
            Some(error) => Err(error),
        });
    })
}

impl Shared {
    /// Applies one piece of work to the open batch and notes its answer.
    fn apply(
        &self,
        work: Work,
        batch: &mut Batch<'_>,
        answers: &mut Vec<Answer>,
        granted: &mut Vec<(LeaseId, Duration)>,
        revoked: &mut Vec<LeaseId>,
    ) -> Result<(), redb::StorageError> {
        match work {
            // Whoever asked has given up: it must cope with both outcomes, so spare the work.
            Work::Txn(_, reply) if reply.is_closed() => {}
            Work::Txn(txn, reply) => {
                let result = batch.txn(&txn)?;
                answers.push(answer(reply, result));
            }
            Work::Grant(ttl, reply) => {
                let id = batch.grant(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))?;
                granted.push((id, ttl));
                answers.push(answer(reply, Ok(Lease { id, ttl })));
            }
            Work::Revoke(lease, reply) => {
                let found = batch.revoke(lease)?;
                revoked.push(lease);
                let result = found.then_some(()).ok_or(StoreError::LeaseNotFound { lease });
                answers.push(answer(reply, result));
            }
            Work::Compact(through, reply) => {
                let result = batch.compact(through)?;
                answers.push(answer(reply, result));
            }
            Work::KeepAlive(..) | Work::Close => {}
        }
        Ok(())
    }
}
