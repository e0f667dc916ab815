//! The etcd store: the same contract over a cluster that others run.
//!
//! Every call has a deadline. Connections are made anew as needed; a request that surely was not
//! sent is sent again, one that may have been is [`StoreError::Unknown`]. Compaction is left to the
//! cluster's own settings (`--auto-compaction-retention`): its history belongs to everyone on it.

mod convert;
mod failure;
mod tls;
mod watching;

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{Client, ConnectOptions, GetOptions};
use tokio::time::{Instant, sleep, timeout_at};

use drumline_ports::store::{
    KeyValue, Lease, LeaseId, Listing, Revision, Store, StoreError, Txn, TxnOutcome, WatchStream,
};

use convert::Namespace;
use failure::{Kind, sort};

pub use tls::{TlsError, TlsFiles};

/// How an [`EtcdStore`] behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdOptions {
    /// Longest that one call may take, repetitions included. Default 5 s.
    pub deadline: Duration,
    /// Put before every key, so that a cluster can be shared. Default `drumline/`.
    pub root: String,
    /// Certificates; `None` speaks plain text.
    pub tls: Option<TlsFiles>,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(5), root: "drumline/".to_owned(), tls: None }
    }
}

/// Why a connection to etcd could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EtcdOpenError {
    /// A certificate or key could not be read.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No member answered.
    #[error(
        "no etcd answers at {members} ({cause}); check that it runs, that the address is its client \
         address, and whether it wants TLS (ca, cert and key)"
    )]
    Unreachable {
        /// The members tried.
        members: String,
        /// What the last attempt failed with.
        cause: String,
    },
}

/// Pause before a request that surely was not sent is sent again.
const PAUSE: Duration = Duration::from_millis(50);

/// A dead connection is noticed within [`PING_EVERY`] and [`PING_TIMEOUT`]; etcd refuses clients
/// that ping more often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Keys read by one request of a listing.
const PAGE: usize = 500;

/// How often a listing begins anew because history was compacted under it.
const LISTING_ATTEMPTS: u32 = 5;

/// The longest lease that etcd grants, in seconds.
const TTL_MAX_S: u64 = 9_000_000_000;

/// A [`Store`] in an etcd cluster.
pub struct EtcdStore {
    client: Client,
    names: Namespace,
    deadline: Duration,
}

/// Whether a call changes something, and so must not be repeated blindly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Read,
    Write,
}

impl EtcdStore {
    /// Connects to the cluster with these members (`HOST:PORT` each), and makes sure that it
    /// answers.
    ///
    /// # Errors
    /// [`EtcdOpenError`]; the message names the members and what to check.
    pub async fn connect(members: &[String], options: &EtcdOptions) -> Result<Self, EtcdOpenError> {
        let unreachable =
            |cause: String| EtcdOpenError::Unreachable { members: members.join(", "), cause };
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(options.deadline)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some(files) = &options.tls {
            connect = connect.with_tls(files.load().await?);
        }
        let client = Client::connect(members, Some(connect)).await;
        let store = Self {
            client: client.map_err(|e| unreachable(e.to_string()))?,
            names: Namespace::new(&options.root),
            deadline: options.deadline,
        };
        match store.revision().await {
            Ok(_) => Ok(store),
            Err(StoreError::Unavailable { cause, .. }) => Err(unreachable(cause)),
            Err(error) => Err(unreachable(error.to_string())),
        }
    }

    /// Calls etcd until it answers, the deadline passes, or repeating could do harm.
    async fn call<T, F>(
        &self,
        op: &str,
        effect: Effect,
        mut attempt: impl FnMut(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = Instant::now() + self.deadline;
        let mut last = None;
        loop {
            let answer = timeout_at(deadline, attempt(self.client.clone())).await;
            let Ok(answer) = answer else {
                let cause = match last {
                    Some(cause) => format!("no answer within {:?}, last: {cause}", self.deadline),
                    None => format!("no answer within {:?}", self.deadline),
                };
                return Err(match effect {
                    Effect::Read => StoreError::unavailable(op, cause),
                    Effect::Write => StoreError::unknown(op, cause),
                });
            };
            let error = match answer {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let (kind, cause) = sort(&error);
            let again = match kind {
                Kind::Definite(definite) => return Err(definite.of(op)),
                Kind::NotSent => true,
                Kind::Doubtful => effect == Effect::Read,
            };
            if !again {
                return Err(StoreError::unknown(op, cause));
            }
            if Instant::now() + PAUSE >= deadline {
                return Err(StoreError::unavailable(op, cause));
            }
            last = Some(cause);
            sleep(PAUSE).await;
        }
    }

    /// Reads the pages of a listing, all at the revision of the first.
    async fn list(&self, op: &str, prefix: &str) -> Result<Listing, StoreError> {
        let (start, end) = self.names.span(prefix);
        let mut from = start;
        let mut revision = None;
        let mut items = Vec::new();
        loop {
            let mut options = GetOptions::new().with_range(end.clone());
            options = options.with_limit(PAGE as i64);
            if let Some(Revision(at)) = revision {
                options = options.with_revision(convert::signed(at));
            }
            let mut page = self
                .call(op, Effect::Read, |client| {
                    let (from, options) = (from.clone(), options.clone());
                    async move { kv(&client).get(from, Some(options)).await }
                })
                .await?;
            let at = convert::header(op, page.header())?;
            let at = *revision.get_or_insert(at);
            let more = page.more();
            for kv in page.take_kvs() {
                from = kv.key().to_vec();
                items.push(self.names.key_value(op, &kv)?);
            }
            if !more {
                let revision = at;
                return Ok(Listing { revision, items });
            }
            // The least key after the last one.
            from.push(0);
        }
    }
}

/// Accepts answers of any size, as etcd's own client does: the server bounds what it stores.
fn kv(client: &Client) -> etcd_client::KvClient {
    client.kv_client().max_decoding_message_size(i32::MAX as usize)
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let op = format!("get {key:?}");
        let key = self.names.key(key);
        let mut found = self
            .call(&op, Effect::Read, |client| {
                let key = key.clone();
                async move { kv(&client).get(key, None).await }
            })
            .await?;
        let first = found.take_kvs().into_iter().next();
        first.map(|kv| self.names.key_value(&op, &kv)).transpose()
    }

    async fn range(&self, prefix: &str) -> Result<Listing, StoreError> {
        let op = format!("range {prefix:?}");
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.list(&op, prefix).await {
                // Only between two pages; the next attempt reads at a newer revision.
                Err(StoreError::Compacted { .. }) if attempts < LISTING_ATTEMPTS => {}
                Err(error @ StoreError::Compacted { .. }) => {
                    return Err(StoreError::unavailable(op, error));
                }
                other => return other,
            }
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let op = txn.describe();
        let effect = if txn.is_read_only() { Effect::Read } else { Effect::Write };
        let request = self.names.txn(&txn);
        let answer = self
            .call(&op, effect, |client| {
                let request = request.clone();
                async move { kv(&client).txn(request).await }
            })
            .await;
        let answer = answer.map_err(|error| failure::name_lease(error, &txn))?;
        self.names.outcome(&op, &answer)
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream, StoreError> {
        let opened = watching::open(&self.client, &self.names, prefix, from);
        match timeout_at(Instant::now() + self.deadline, opened).await {
            Ok(result) => result,
            Err(_) => {
                let op = format!("watch of {prefix:?}");
                let cause = format!("no answer within {:?}", self.deadline);
                Err(StoreError::unavailable(op, cause))
            }
        }
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        let op = "revision";
        // Any read tells it; this one returns no key.
        let key = self.names.key("");
        let read = |client: Client| {
            let key = key.clone();
            async move {
                let options = GetOptions::new().with_count_only();
                kv(&client).get(key, Some(options)).await
            }
        };
        let answer = self.call(op, Effect::Read, read).await?;
        convert::header(op, answer.header())
    }

    async fn compact(&self, through: Revision) -> Result<(), StoreError> {
        let op = format!("compact {through}");
        let answer = self
            .call(&op, Effect::Write, |mut client| async move {
                client.compact(convert::signed(through.0), None).await
            })
            .await;
        match answer {
            Ok(_) | Err(StoreError::Compacted { .. }) => Ok(()),
            Err(StoreError::FutureRevision { .. }) => Err(StoreError::FutureRevision {
                requested: through,
                current: self.revision().await?,
            }),
            Err(error) => Err(error),
        }
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        if seconds == 0 || seconds > TTL_MAX_S {
            return Err(StoreError::Invalid {
                op: "lease grant".to_owned(),
                what: format!(
                    "time to live {ttl:?}, more than 0 and at most {TTL_MAX_S} s is allowed"
                ),
            });
        }
        let grant = |mut client: Client| async move {
            client.lease_grant(convert::signed(seconds), None).await
        };
        let granted = self.call("lease grant", Effect::Write, grant).await?;
        Ok(Lease {
            id: LeaseId(convert::unsigned(granted.id())),
            ttl: Duration::from_secs(convert::unsigned(granted.ttl())),
        })
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        let op = format!("keep-alive of lease {lease}");
        let renew = |mut client: Client| async move {
            let (mut keeper, mut answers) =
                client.lease_keep_alive(convert::signed(lease.0)).await?;
            // The client swallows the first answer's time to live: ask once more for it.
            keeper.keep_alive().await?;
            Ok(answers.message().await?.map_or(0, |answer| answer.ttl()))
        };
        let missing = StoreError::LeaseNotFound { lease };
        match self.call(&op, Effect::Read, renew).await {
            Ok(ttl) if ttl > 0 => Ok(Duration::from_secs(convert::unsigned(ttl))),
            Ok(_) | Err(StoreError::LeaseNotFound { .. }) => Err(missing),
            Err(error) => Err(error),
        }
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let op = format!("revoke of lease {lease}");
        let revoke =
            |mut client: Client| async move { client.lease_revoke(convert::signed(lease.0)).await };
        match self.call(&op, Effect::Write, revoke).await {
            Ok(_) => Ok(()),
            Err(StoreError::LeaseNotFound { .. }) => Err(StoreError::LeaseNotFound { lease }),
            Err(error) => Err(error),
        }
    }
}
