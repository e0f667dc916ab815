//! Leadership by lease, with a term that fences every write of a leader.
//!
//! The leader's key lives by the leader's lease. The revision that created the key is the term: it
//! only ever grows, and a leader's writes require that the key still has it. A leader that was
//! paused for an hour and wakes up can thus think what it likes: its writes fail.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::error::StoreError;
use super::model::{Compare, KeyValue, Lease, LeaseId, Op, Revision, Txn, TxnOutcome};
use super::watcher::{Watcher, WatcherOptions};
use super::{Store, json};

/// A leader's reign: the revision that made it leader. Grows from leader to leader, with gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub Revision);

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who stands for election, as stored in the leader's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Whom to show to people, and where to find the leader (an address, say).
    pub identity: String,
    /// The lease that the candidate lives by; tells two runs of the same identity apart.
    pub lease: LeaseId,
}

/// Who leads, and since which revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The leader.
    pub candidate: Candidate,
    /// Its term.
    pub term: Term,
}

/// Why a leader's write failed, or a campaign.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaderError {
    /// The term is over; nothing was changed, and nothing of this term ever will be.
    #[error("term {term} is over, {} leads", .now.as_ref().map_or("nobody".to_owned(), |h| format!("{} in term {}", h.candidate.identity, h.term)))]
    Fenced {
        /// The term of the refused write.
        term: Term,
        /// Who leads now, if anyone.
        now: Option<Holder>,
    },
    /// Someone else led until the deadline.
    #[error("not elected within {waited_ms} ms")]
    NotElected {
        /// How long the campaign lasted.
        waited_ms: u64,
    },
    /// The store's error. For a write with [`StoreError::Unknown`], see [`Leadership::fence`].
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Shortest time between two attempts of a campaign.
const PAUSE: Duration = Duration::from_millis(10);

/// Campaigns for one office: a key of the store.
#[derive(Clone)]
pub struct Elector {
    store: Arc<dyn Store>,
    key: String,
    identity: String,
    ttl: Duration,
}

impl Elector {
    /// Creates an elector for the office `key`. A leader that vanishes is replaced after `ttl`.
    pub fn new(
        store: Arc<dyn Store>,
        key: impl Into<String>,
        identity: impl Into<String>,
        ttl: Duration,
    ) -> Self {
        Self { store, key: key.into(), identity: identity.into(), ttl }
    }

    /// Returns the present leader, if there is one.
    ///
    /// # Errors
    /// The store's, or [`StoreError::Corrupt`] when the key holds something else.
    pub async fn holder(&self) -> Result<Option<Holder>, StoreError> {
        self.store.get(&self.key).await?.map(|kv| holder(&kv)).transpose()
    }

    /// Waits to become leader, for `patience` at most.
    ///
    /// # Errors
    /// [`LeaderError::NotElected`] when someone else led all that time, or the store's error.
    pub async fn campaign(&self, patience: Duration) -> Result<Leadership, LeaderError> {
        let started = Instant::now();
        let deadline = started + patience;
        let (lease, granted_at) = self.grant(deadline).await?;
        let (reign, lost) = watch::channel(None);
        // Renews from the first moment: a long campaign must not outlive its own lease.
        let keeper = Keeper(tokio::spawn(keep(Arc::clone(&self.store), lease, granted_at, reign)));
        match self.stand(lease, deadline, lost.clone()).await {
            Ok(Some(term)) => Ok(Leadership {
                store: Arc::clone(&self.store),
                key: self.key.clone(),
                term,
                lease,
                lost,
                keeper,
            }),
            outcome => {
                drop(keeper);
                // Best effort: what is left of it expires.
                let _ = self.store.lease_revoke(lease.id).await;
                outcome?;
                let waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
                Err(LeaderError::NotElected { waited_ms })
            }
        }
    }

    /// Grants the candidate's lease, and tells from when on it counts. A lease whose grant went
    /// unheard expires by itself, so that asking again does no harm.
    async fn grant(&self, deadline: Instant) -> Result<(Lease, Instant), StoreError> {
        loop {
            let asked = Instant::now();
            match self.store.lease_grant(self.ttl).await {
                Ok(lease) => return Ok((lease, asked)),
                Err(error)
                    if (error.is_unknown() || error.is_transient())
                        && Instant::now() + PAUSE < deadline =>
                {
                    sleep(PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Tries until elected (`Some`) or past the deadline (`None`).
    async fn stand(
        &self,
        lease: Lease,
        deadline: Instant,
        mut lost: watch::Receiver<Option<String>>,
    ) -> Result<Option<Term>, StoreError> {
        let candidate = Candidate { identity: self.identity.clone(), lease: lease.id };
        let value = json::encode(&self.key, &candidate)?;
        let bid = Txn::new()
            .when(Compare::absent(&self.key))
            .then(Op::put_leased(&self.key, value, lease.id))
            .then(Op::get(&self.key))
            .otherwise(Op::get(&self.key));
        let mut watcher = self.office_watcher();
        loop {
            match self.store.txn(bid.clone()).await {
                Ok(outcome) => {
                    let read = outcome.got(usize::from(outcome.succeeded));
                    // Also true when an earlier bid with a lost acknowledgement had won.
                    if let Some(kv) = read
                        && holder(kv)?.candidate == candidate
                    {
                        return Ok(Some(Term(kv.create_revision)));
                    }
                }
                Err(error) if error.is_unknown() || error.is_transient() => {}
                Err(error) => return Err(error),
            }
            if let Some(cause) = lost.borrow_and_update().clone() {
                return Err(StoreError::unavailable("campaign", cause));
            }
            // Whatever happens to the office is a reason to try again; so is a quiet while.
            let look_again = deadline.min(Instant::now() + self.ttl);
            let _ = timeout_at(look_again, watcher.next()).await;
            if Instant::now() >= deadline {
                return Ok(None);
            }
            // Bounds the rate when the store fails fast.
            sleep(PAUSE).await;
        }
    }

    fn office_watcher(&self) -> Watcher {
        let options = WatcherOptions::default();
        Watcher::with_options(Arc::clone(&self.store), self.key.clone(), options)
    }
}

/// Being leader, until it is dropped, resigned or lost.
pub struct Leadership {
    store: Arc<dyn Store>,
    key: String,
    term: Term,
    lease: Lease,
    lost: watch::Receiver<Option<String>>,
    keeper: Keeper,
}

impl Leadership {
    /// Returns the term: the fencing token for anything outside the store.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// Returns the lease, for keys that shall vanish with the leader.
    #[must_use]
    pub fn lease(&self) -> LeaseId {
        self.lease.id
    }

    /// Returns the condition that makes a write fail once this term is over.
    ///
    /// For use with a [`Writer`](super::Writer), which also settles lost acknowledgements.
    #[must_use]
    pub fn fence(&self) -> Compare {
        Compare::create_revision(&self.key, self.term.0)
    }

    /// Whether the lease can still be relied on, as far as this process knows.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.lost.borrow().is_none()
    }

    /// Waits until leadership is lost, and says why.
    pub async fn lost(&self) -> String {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await {
            Ok(cause) => cause.clone().unwrap_or_default(),
            Err(_) => "the lease is no longer renewed".to_owned(),
        }
    }

    /// Applies a transaction only if this term still lasts.
    ///
    /// # Errors
    /// [`LeaderError::Fenced`] when it does not, or the store's error.
    pub async fn fenced_txn(&self, txn: Txn) -> Result<TxnOutcome, LeaderError> {
        if txn.else_ops.iter().any(Op::writes) {
            // The else branch also runs when the fence is what failed.
            return Err(LeaderError::Store(StoreError::Invalid {
                op: txn.describe(),
                what: "else_ops of a fenced write may only read".to_owned(),
            }));
        }
        let own_reads = txn.else_ops.len();
        let fenced = txn.when(self.fence()).otherwise(Op::get(&self.key));
        let mut outcome = self.store.txn(fenced).await?;
        if outcome.succeeded {
            return Ok(outcome);
        }
        let now = outcome.got(own_reads).map(holder).transpose()?;
        if now.as_ref().is_some_and(|h| h.term == self.term) {
            outcome.results.truncate(own_reads);
            return Ok(outcome);
        }
        Err(LeaderError::Fenced { term: self.term, now })
    }

    /// Steps down at once, so that a successor need not wait for the lease.
    ///
    /// # Errors
    /// The store's; the lease then expires by itself.
    pub async fn resign(self) -> Result<(), StoreError> {
        drop(self.keeper);
        match self.store.lease_revoke(self.lease.id).await {
            Ok(()) | Err(StoreError::LeaseNotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Ends the renewal with its owner.
struct Keeper(JoinHandle<()>);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Renews a lease until that fails for good, then tells why.
///
/// The lease counts from before the request that last renewed it, so that this process gives up
/// no later than the store does.
async fn keep(
    store: Arc<dyn Store>,
    lease: Lease,
    granted_at: Instant,
    tell: watch::Sender<Option<String>>,
) {
    let mut expires = granted_at + lease.ttl;
    let mut pause = lease.ttl / 3;
    loop {
        sleep(pause.min(expires.saturating_duration_since(Instant::now()))).await;
        let asked = Instant::now();
        if asked >= expires {
            let cause = format!("lease {} could not be renewed in time", lease.id);
            tell.send_replace(Some(cause));
            return;
        }
        match timeout_at(expires, store.lease_keep_alive(lease.id)).await {
            Ok(Ok(ttl)) => {
                expires = asked + ttl;
                pause = ttl / 3;
            }
            Ok(Err(error @ StoreError::LeaseNotFound { .. })) => {
                tell.send_replace(Some(error.to_string()));
                return;
            }
            // Sooner again: the store may be back before the lease is gone.
            Ok(Err(_)) | Err(_) => pause = lease.ttl / 10,
        }
    }
}

fn holder(kv: &KeyValue) -> Result<Holder, StoreError> {
    Ok(Holder { candidate: json::decode(kv)?, term: Term(kv.create_revision) })
}
