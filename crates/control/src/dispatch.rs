//! The dispatcher: takes inputs in batches, makes their outcome durable, then answers and acts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drumline_ports::store::Leadership;
use drumline_spec::{JobSpec, QueueSpec};
use drumline_types::{Clock, Timestamp};
use drumline_wire::v1::SubmittedJob;
use drumline_wire::v1::agent_up::Kind as Up;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::ApiError;
use crate::board::Board;
use crate::core::Core;
use crate::ledger::Ledger;
use crate::message::{Input, Reply};
use crate::options::ReignEnded;

/// Inputs that are taken together and share one transaction.
const BATCH_MAX: usize = 256;
/// What is not durable anyway is published at most so often.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// How often figures of the fleet are noted and old things forgotten.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// Previews that are made at the same time, at most: each has a copy of all that is known.
pub(crate) const PREVIEWS_MAX: usize = 2;

/// One leader at work.
pub(crate) struct Dispatcher {
    pub(crate) core: Core,
    pub(crate) ledger: Ledger,
    pub(crate) board: Arc<Board>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) inbox: mpsc::Receiver<Input>,
    pub(crate) heartbeat_ms: u64,
    /// Where states are kept from which a bad plan was made; `None`: nowhere.
    pub(crate) incidents: Option<PathBuf>,
    /// Previews that may still be made at the same time.
    pub(crate) previews: Arc<Semaphore>,
}

/// An answer that waits for what it says to be durable.
enum Answer {
    Submitted(Reply<Vec<drumline_types::JobId>>, Vec<drumline_types::JobId>),
    Done(Reply<()>),
}

impl Dispatcher {
    /// Works until `stop`, or until the reign is over. Calls `ready` once readers can be served.
    pub(crate) async fn run(
        mut self,
        leadership: &Leadership,
        stop: CancellationToken,
        ready: impl FnOnce(),
    ) -> Result<(), ReignEnded> {
        let mut publish_at: Option<Instant> = None;
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        housekeeping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.flush(Vec::new()).await?;
        self.publish_all();
        ready();
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let mut wake = Wake::new();
        loop {
            let due = wake.look(&self.core, self.clock.as_ref());
            if due {
                self.core.tick(self.clock.now());
                self.flush(Vec::new()).await?;
                wake.outdate();
            }
            let unpublished = !self.core.stale.is_empty() || self.core.fleet.changed;
            if unpublished && publish_at.is_none() {
                publish_at = Some(Instant::now() + PUBLISH_EVERY);
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                cause = leadership.lost() => return Err(ReignEnded::Lost(cause)),
                () = sleep_until(publish_at) => {
                    publish_at = None;
                    self.publish_all();
                }
                _ = housekeeping.tick() => {
                    self.keep_house().await?;
                    wake.outdate();
                }
                count = self.inbox.recv_many(&mut batch, BATCH_MAX) => {
                    if count == 0 {
                        return Ok(());
                    }
                    let answers = self.take(&mut batch);
                    self.flush(answers).await?;
                    wake.outdate();
                }
                () = sleep_until(wake.next()) => {}
            }
        }
    }

    fn take(&mut self, batch: &mut Vec<Input>) -> Vec<Answer> {
        self.core.metrics.inbox(self.inbox.len());
        let now = self.clock.now();
        let mut answers = Vec::new();
        for input in batch.drain(..) {
            match input {
                Input::Submit { specs, queues, user, idempotency_key, hash, reply } => {
                    match self.core.submit(specs, queues, &user, &idempotency_key, hash, now) {
                        Ok(ids) => answers.push(Answer::Submitted(reply, ids)),
                        Err(error) => drop(reply.send(Err(error))),
                    }
                }
                Input::Preview { specs, queues, reply } => {
                    self.preview(&specs, queues, reply, now);
                }
                Input::DeleteQueue { queue, reply } => match self.core.delete_queue(&queue, now) {
                    Ok(()) => answers.push(Answer::Done(reply)),
                    Err(error) => drop(reply.send(Err(error))),
                },
                Input::Hold { job, held, reply } => match self.core.hold(&job, held, now) {
                    Ok(()) => answers.push(Answer::Done(reply)),
                    Err(error) => drop(reply.send(Err(error))),
                },
                Input::Scale { job, replicas, user, reply } => {
                    match self.core.scale(&job, replicas, &user, now) {
                        Ok(()) => answers.push(Answer::Done(reply)),
                        Err(error) => drop(reply.send(Err(error))),
                    }
                }
                Input::ClearDevice { node, index, reply } => {
                    match self.core.clear_device(&node, index, now) {
                        Ok(()) => answers.push(Answer::Done(reply)),
                        Err(error) => drop(reply.send(Err(error))),
                    }
                }
                Input::Snapshot { reply } => {
                    let _ = reply.send(Ok(Box::new(self.core.desk.save())));
                }
                Input::Explain { job, reply } => {
                    let _ = reply.send(Ok(self.core.desk.explain(&job, now)));
                }
                Input::Queues { reply } => {
                    let _ = reply.send(Ok(self.core.queue_views()));
                }
                Input::Cancel { job, user, reply } => {
                    if self.core.jobs.contains_key(&job) {
                        let event = drumline_lifecycle::Event::Cancel { user };
                        self.core.apply(&job, event, now);
                        self.core.cancel_replicas(&job, now);
                        answers.push(Answer::Done(reply));
                    } else {
                        let _ = reply.send(Err(ApiError::no_such_job(job.as_str())));
                    }
                }
                Input::Connected { node, hello, session } => {
                    self.core.connected(&node, *hello, session, self.heartbeat_ms, now);
                }
                Input::Up { node, session, message } => {
                    // What an older stream still had to say was told again in the hello.
                    if !self.core.fleet.is_current(&node, session) {
                        continue;
                    }
                    let report = match &*message {
                        Up::Report(report) if report.train.is_some() || report.serve.is_some() => {
                            Some(report.clone())
                        }
                        _ => None,
                    };
                    self.core.told(&node, *message, now);
                    if let Some(report) = report {
                        self.core.chart(&self.board, &report, now);
                    }
                }
                Input::Disconnected { node, session } => {
                    if self.core.fleet.is_current(&node, session) {
                        let (fleet, desk) = (&mut self.core.fleet, &mut self.core.desk);
                        fleet.disconnected(&node, "its stream ended", desk, now);
                    }
                }
            }
        }
        answers
    }

    /// Looks at what would be decided, on a copy and beside everything else.
    fn preview(
        &self,
        specs: &[JobSpec],
        queues: Vec<QueueSpec>,
        reply: Reply<Vec<SubmittedJob>>,
        now: Timestamp,
    ) {
        let Ok(place) = Arc::clone(&self.previews).try_acquire_owned() else {
            let message = format!("{PREVIEWS_MAX} previews are being made; ask again in a moment");
            drop(reply.send(Err(ApiError::Exhausted(message))));
            return;
        };
        match self.core.preview(specs, queues, now) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(preview) => drop(tokio::task::spawn_blocking(move || {
                let _place = place;
                drop(reply.send(preview.look()));
            })),
        }
    }

    /// Decides, writes, publishes, acts and answers, in this order.
    async fn flush(&mut self, answers: Vec<Answer>) -> Result<(), ReignEnded> {
        let now = self.clock.now();
        self.core.schedule(now);
        self.keep_incident(now);
        let groups = self.core.take_writes()?;
        if !groups.is_empty() {
            let written: Vec<_> = self.ledger.write(groups).await?;
            let changed: Vec<_> = written.iter().map(|(id, _)| id.clone()).collect();
            self.core.written(written);
            let jobs = changed.into_iter().map(|id| {
                self.core.stale.remove(&id);
                let job = self.core.jobs.get(&id).cloned().map(Arc::new);
                (id, job)
            });
            self.board.publish_jobs(jobs.collect());
        }
        self.board.publish_events(std::mem::take(&mut self.core.events));
        for send in std::mem::take(&mut self.core.sends) {
            let (fleet, desk) = (&mut self.core.fleet, &mut self.core.desk);
            fleet.send(&send.node, send.kind, desk, now);
        }
        for answer in answers {
            match answer {
                Answer::Submitted(reply, ids) => drop(reply.send(Ok(ids))),
                Answer::Done(reply) => drop(reply.send(Ok(()))),
            }
        }
        Ok(())
    }

    /// Keeps the state from which a plan was made that failed its audit.
    fn keep_incident(&mut self, now: Timestamp) {
        let Some(saved) = self.core.incident.take() else { return };
        let kept = match &self.incidents {
            None => "no state folder to keep it in".to_owned(),
            // Rare, and worth waiting for: nothing is decided before it is on disk.
            Some(folder) => match crate::incident::save(folder, &saved, now) {
                Ok(path) => format!("its state is in {}", path.display()),
                Err(error) => format!("its state cannot be kept in {}: {error}", folder.display()),
            },
        };
        tracing::error!(%kept, "a plan failed its audit and was not carried out");
        self.core.events.push(drumline_wire::v1::EventView {
            at_ms: now.0,
            severity: "error".to_owned(),
            reason: "AuditFailed".to_owned(),
            message: format!("a plan failed its audit and was not carried out; {kept}"),
            ..drumline_wire::v1::EventView::default()
        });
    }

    fn publish_all(&mut self) {
        let now = self.clock.now();
        let stale = std::mem::take(&mut self.core.stale);
        let jobs = stale.into_iter().map(|id| {
            let job = self.core.jobs.get(&id).cloned().map(Arc::new);
            (id, job)
        });
        let jobs = jobs.collect();
        self.board.publish_jobs(jobs);
        if std::mem::take(&mut self.core.fleet.changed) {
            self.board.publish_nodes(self.core.node_views(now));
        }
    }

    async fn keep_house(&mut self) -> Result<(), ReignEnded> {
        let now = self.clock.now();
        self.core.age(now);
        if self.core.keep_replicas(now) {
            self.flush(Vec::new()).await?;
        }
        // Idleness comes with time alone.
        self.core.fleet.changed = true;
        let nodes = self.core.node_views(now);
        let devices = || nodes.iter().flat_map(|node| &node.devices);
        let x = now.0 as f64;
        self.board.point("fleet/utilization", x, crate::view::mean_utilization(&nodes));
        let count = |wanted: &dyn Fn(&drumline_wire::v1::DeviceView) -> bool| {
            devices().filter(|device| wanted(device)).count() as f64
        };
        self.board.point("fleet/devices", x, count(&|_| true));
        self.board.point("fleet/allocated", x, count(&|device| !device.job.is_empty()));
        self.board.point("fleet/idle", x, count(&|device| device.idle));
        let (groups, gone) = self.core.prune();
        if !gone.is_empty() {
            self.ledger.write(groups).await?;
            let mut series =
                self.board.series.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            for id in &gone {
                series.forget(&format!("job/{id}/"));
            }
            drop(series);
            self.board.publish_jobs(gone.into_iter().map(|id| (id, None)).collect());
        }
        self.ledger.forget_submissions(&mut self.core.submissions, now).await
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// When deadlines are looked at. Finding the next one takes a walk over all that is under way, so
/// that is done at most every [`Wake::PAUSE`].
struct Wake {
    looked: Instant,
    next: Option<Instant>,
    outdated: bool,
}

impl Wake {
    const PAUSE: Duration = Duration::from_millis(10);

    fn new() -> Self {
        Self { looked: Instant::now(), next: None, outdated: true }
    }

    /// Something has changed since the last look.
    fn outdate(&mut self) {
        self.outdated = true;
    }

    /// Looks, if it is time to; returns whether a deadline is over.
    fn look(&mut self, core: &Core, clock: &dyn Clock) -> bool {
        let now = Instant::now();
        let over = self.next.is_some_and(|next| next <= now);
        if !(over || self.outdated) || now < self.looked + Self::PAUSE {
            return false;
        }
        self.looked = now;
        self.outdated = false;
        let deadline = core.deadline();
        let wait = |at: Timestamp| Duration::from_millis(at.since_ms(clock.now()));
        self.next = deadline.map(|at| now + wait(at));
        deadline.is_some_and(|at| at <= clock.now())
    }

    /// Returns when to look again at the latest.
    fn next(&self) -> Option<Instant> {
        let soon = self.looked + Self::PAUSE;
        if self.outdated { Some(soon) } else { self.next.map(|next| next.max(soon)) }
    }
}
