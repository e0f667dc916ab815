//! Jobs in the store: read at the start of a reign, written by fenced transactions.
//!
//! | Key | Value |
//! |---|---|
//! | `/drumline/leader` | who leads |
//! | `/drumline/jobs/ID/spec` | the spec, written once |
//! | `/drumline/jobs/ID/state` | the gang's state, its history and its last figures |
//! | `/drumline/queues/NAME` | a queue |
//! | `/drumline/submissions/KEY` | the jobs of an idempotency key |
//! | `/drumline/writers/...` | slots that settle writes whose answer was lost |

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_ports::store::{Compare, Leadership, Op, Revision, Store, Txn, Writer, json};
use drumline_spec::QueueSpec;
use drumline_types::{JobId, QueueName, Timestamp};
use serde::{Deserialize, Serialize};

use crate::job::{Job, StoredSpec, StoredState};
use crate::metrics::Metrics;
use crate::options::ReignEnded;

/// The office that leaders are elected to.
pub(crate) const LEADER: &str = "/drumline/leader";
const JOBS: &str = "/drumline/jobs/";
const QUEUES: &str = "/drumline/queues/";
const SUBMISSIONS: &str = "/drumline/submissions/";
const WRITERS: &str = "/drumline/writers";
/// Operations in one transaction; the store's limit is 128, some of which the writer needs.
const OPS_MAX: usize = 100;
/// Bytes of values in one transaction; the store's limit is about 1.3 MB.
pub(crate) const BYTES_MAX: usize = 1_000_000;
/// How long an idempotency key is remembered, in milliseconds.
const SUBMISSION_MAX_MS: u64 = 24 * 3_600_000;

/// The jobs of an idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Submission {
    pub(crate) jobs: Vec<JobId>,
    /// Tells whether the key came with the same manifests.
    pub(crate) hash: u64,
    pub(crate) at: Timestamp,
}

/// Everything that the store holds.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) jobs: BTreeMap<JobId, Job>,
    pub(crate) submissions: BTreeMap<String, Submission>,
    pub(crate) queues: BTreeMap<QueueName, QueueSpec>,
}

/// Writes that belong together: all of them, or none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Group {
    pub(crate) compares: Vec<Compare>,
    pub(crate) ops: Vec<Op>,
    /// Jobs whose state key is among the writes.
    pub(crate) states: Vec<JobId>,
}

impl Group {
    fn bytes(&self) -> usize {
        self.ops
            .iter()
            .map(|op| match op {
                Op::Put { key, value, .. } => key.len() + value.len(),
                other => other.key().len(),
            })
            .sum()
    }

    /// Adds the first or next state of a job, and its spec if it is new.
    pub(crate) fn put_job(&mut self, id: &JobId, job: &Job) -> Result<(), ReignEnded> {
        let key = state_key(id);
        self.compares.push(Compare::mod_revision(&key, job.revision.unwrap_or_default()));
        if job.revision.is_none() {
            let spec_key = spec_key(id);
            let spec = StoredSpec { spec: (*job.spec).clone(), user: job.user.to_string() };
            self.ops.push(Op::put(&spec_key, json::encode(&spec_key, &spec)?));
        }
        self.ops.push(Op::put(&key, json::encode(&key, &job.stored)?));
        self.states.push(id.clone());
        Ok(())
    }

    /// Adds the record of an idempotency key.
    pub(crate) fn put_submission(
        &mut self,
        key: &str,
        submission: &Submission,
    ) -> Result<(), ReignEnded> {
        let key = format!("{SUBMISSIONS}{key}");
        self.ops.push(Op::put(&key, json::encode(&key, submission)?));
        Ok(())
    }

    /// Adds a queue, or its removal.
    pub(crate) fn put_queue(
        &mut self,
        name: &QueueName,
        queue: Option<&QueueSpec>,
    ) -> Result<(), ReignEnded> {
        let key = format!("{QUEUES}{name}");
        self.ops.push(match queue {
            Some(queue) => Op::put(&key, json::encode(&key, queue)?),
            None => Op::delete(key),
        });
        Ok(())
    }

    /// Removes a job that has ended.
    pub(crate) fn delete_job(&mut self, id: &JobId) {
        self.ops.push(Op::delete(state_key(id)));
        self.ops.push(Op::delete(spec_key(id)));
    }
}

fn state_key(id: &JobId) -> String {
    format!("{JOBS}{id}/state")
}

fn spec_key(id: &JobId) -> String {
    format!("{JOBS}{id}/spec")
}

/// The store as one leader writes it.
pub(crate) struct Ledger {
    store: Arc<dyn Store>,
    writer: Writer,
    fence: Compare,
    metrics: Metrics,
}

impl Ledger {
    /// Opens the ledger for a reign.
    pub(crate) async fn open(
        store: Arc<dyn Store>,
        leadership: &Leadership,
        patience: Duration,
        metrics: Metrics,
    ) -> Result<Self, ReignEnded> {
        let writer = Writer::open(Arc::clone(&store), WRITERS, "control", 1, patience).await?;
        Ok(Self { store, writer, fence: leadership.fence(), metrics })
    }

    /// Reads everything.
    ///
    /// A value that cannot be read is told and left alone: one bad record must not keep all other
    /// jobs from running.
    pub(crate) async fn load(&self) -> Result<Loaded, ReignEnded> {
        let mut loaded = Loaded::default();
        let listing = self.store.range(JOBS).await?;
        let mut specs: BTreeMap<JobId, StoredSpec> = BTreeMap::new();
        let mut states: BTreeMap<JobId, (StoredState, Revision)> = BTreeMap::new();
        for kv in &listing.items {
            let rest = kv.key.strip_prefix(JOBS).unwrap_or_default();
            let Some((id, part)) = rest.split_once('/') else { continue };
            let Ok(id) = id.parse::<JobId>() else { continue };
            let read = match part {
                "spec" => json::decode(kv).map(|spec| drop(specs.insert(id, spec))),
                "state" => {
                    json::decode(kv).map(|state| drop(states.insert(id, (state, kv.mod_revision))))
                }
                _ => Ok(()),
            };
            if let Err(error) = read {
                tracing::error!(key = %kv.key, %error, "a stored job cannot be read; it is left out");
            }
        }
        for (id, (state, revision)) in states {
            let Some(spec) = specs.remove(&id) else { continue };
            let spec_json = serde_json::to_string(&spec.spec).unwrap_or_default();
            loaded.jobs.insert(id, Job::from_stored(spec, spec_json, state, Some(revision)));
        }
        for kv in self.store.range(QUEUES).await?.items {
            match json::decode::<QueueSpec>(&kv) {
                Ok(queue) => drop(loaded.queues.insert(queue.name.clone(), queue)),
                Err(error) => tracing::error!(key = %kv.key, %error, "a queue cannot be read"),
            }
        }
        for kv in self.store.range(SUBMISSIONS).await?.items {
            let key = kv.key.strip_prefix(SUBMISSIONS).unwrap_or_default().to_owned();
            match json::decode(&kv) {
                Ok(submission) => drop(loaded.submissions.insert(key, submission)),
                Err(error) => tracing::error!(key = %kv.key, %error, "a submission cannot be read"),
            }
        }
        Ok(loaded)
    }

    /// Writes groups, packed into as few transactions as they fit, each group whole. Returns the
    /// new revision of every state that was written.
    ///
    /// # Errors
    /// The reign is over: nothing that was not written may be kept.
    pub(crate) async fn write(
        &self,
        groups: Vec<Group>,
    ) -> Result<Vec<(JobId, Revision)>, ReignEnded> {
        let mut written = Vec::new();
        let mut packed = Group::default();
        for group in groups {
            let full = packed.ops.len() + group.ops.len() > OPS_MAX
                || packed.compares.len() + group.compares.len() > OPS_MAX
                || packed.bytes() + group.bytes() > BYTES_MAX;
            if full && !packed.ops.is_empty() {
                self.commit(std::mem::take(&mut packed), &mut written).await?;
            }
            packed.compares.extend(group.compares);
            packed.ops.extend(group.ops);
            packed.states.extend(group.states);
        }
        if !packed.ops.is_empty() {
            self.commit(packed, &mut written).await?;
        }
        Ok(written)
    }

    async fn commit(
        &self,
        group: Group,
        written: &mut Vec<(JobId, Revision)>,
    ) -> Result<(), ReignEnded> {
        let mut txn = Txn::new().when(self.fence.clone());
        for compare in group.compares {
            txn = txn.when(compare);
        }
        let first = group.states.first().cloned();
        for op in group.ops {
            txn = txn.then(op);
        }
        // What is read when a condition fails tells which one it was.
        txn = txn.otherwise(Op::get(LEADER));
        if let Some(id) = &first {
            txn = txn.otherwise(Op::get(state_key(id)));
        }
        let started = Instant::now();
        let outcome = self.writer.txn(txn).await;
        let word = match &outcome {
            Ok(outcome) if outcome.succeeded => "applied",
            Ok(_) => "refused",
            Err(_) => "failed",
        };
        self.metrics.store_txn(word, started.elapsed());
        let outcome = outcome?;
        if outcome.succeeded {
            written.extend(group.states.into_iter().map(|id| (id, outcome.revision)));
            return Ok(());
        }
        let leads = outcome.got(0).map(|kv| kv.create_revision);
        let Compare::CreateRevision { is, .. } = &self.fence else {
            return Err(ReignEnded::Lost("the fence is not a term".to_owned()));
        };
        if leads != Some(*is) {
            return Err(ReignEnded::Lost("another control plane leads".to_owned()));
        }
        let found = outcome.got(1).map_or(0, |kv| kv.mod_revision.0);
        let key = first.map_or_else(|| "a job".to_owned(), |id| state_key(&id));
        Err(ReignEnded::Conflict { key, left: 0, found })
    }

    /// Forgets idempotency keys that are older than a day.
    pub(crate) async fn forget_submissions(
        &self,
        submissions: &mut BTreeMap<String, Submission>,
        now: Timestamp,
    ) -> Result<(), ReignEnded> {
        let old: Vec<String> = submissions
            .iter()
            .filter(|(_, submission)| now.since_ms(submission.at) > SUBMISSION_MAX_MS)
            .map(|(key, _)| key.clone())
            .collect();
        let groups = old.iter().map(|key| Group {
            ops: vec![Op::delete(format!("{SUBMISSIONS}{key}"))],
            ..Group::default()
        });
        self.write(groups.collect()).await?;
        submissions.retain(|key, _| !old.contains(key));
        Ok(())
    }
}
