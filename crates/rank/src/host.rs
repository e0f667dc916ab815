//! The rank's line to whoever started it, its agent or a Kubernetes cluster's operator: joining the
//! world, and reports that never hold up a step.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use drumline_wire::line::{Credential, endpoint};
use drumline_wire::v1::rank_host_client::RankHostClient;
use drumline_wire::{now_ms, v1};
use tokio::sync::mpsc;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::context::Context;

/// Reports under way; more than that and step reports are left out.
const REPORTS_MAX: usize = 256;
/// How long one report may take.
const REPORT_DEADLINE: Duration = Duration::from_secs(5);
/// How long the world may take to come together; the control plane's deadline is shorter.
const JOIN_DEADLINE: Duration = Duration::from_secs(26 * 3600);

/// Wait before a join that broke off is tried again; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long a join that only repeats where this rank listens may take.
const ANNOUNCE_DEADLINE: Duration = Duration::from_secs(5);
/// Between two of them.
const ANNOUNCE_PAUSE: Duration = Duration::from_secs(2);

/// Why the agent cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The agent's address is no address.
    #[error("agent address {address:?}: {source}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// The world did not come together.
    #[error("cannot join the world: {0}")]
    Join(String),
}

type Client = RankHostClient<InterceptedService<Channel, Credential>>;

/// How the agent is reached. A new client has a connection of its own: whoever answers may have
/// changed places.
#[derive(Debug, Clone)]
struct Line {
    endpoint: Endpoint,
    credential: Credential,
}

impl Line {
    fn client(&self) -> Client {
        let channel = self.endpoint.connect_lazy();
        RankHostClient::with_interceptor(channel, self.credential.clone())
            .max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES)
    }
}

/// A line to the agent. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Host {
    line: Line,
    reports: mpsc::Sender<v1::RankReport>,
    stop: Arc<AtomicBool>,
    blank: v1::RankReport,
    /// What was said when the world was joined.
    joined: Arc<Mutex<Option<v1::JoinWorld>>>,
}

impl Host {
    /// Opens the line and starts the task that sends reports in their order.
    ///
    /// # Errors
    /// [`HostError::Address`].
    pub fn open(context: &Context) -> Result<Self, HostError> {
        let endpoint = endpoint(&context.agent, context.agent_ca.as_deref())
            .map_err(|source| HostError::Address { address: context.agent.clone(), source })?;
        let line = Line { endpoint, credential: context.credential.clone() };
        let (reports, queue) = mpsc::channel::<v1::RankReport>(REPORTS_MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let joined = Arc::new(Mutex::new(None));
        let sending =
            Sending { line: line.clone(), stop: stop.clone(), joined: joined.clone(), told: None };
        tokio::spawn(sending.run(queue));
        let blank = v1::RankReport {
            job: context.job.clone(),
            attempt: context.attempt,
            rank: context.rank,
            ..v1::RankReport::default()
        };
        Ok(Self { line, reports, stop, blank, joined })
    }

    /// Returns whether the agent asked the rank to stop.
    #[must_use]
    pub fn stop_asked(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Joins the world: returns once every rank has.
    ///
    /// # Errors
    /// [`HostError::Join`] with the reason.
    pub async fn join(
        &self,
        context: &Context,
        collective_address: String,
        inference_url: String,
    ) -> Result<v1::World, HostError> {
        let join = v1::JoinWorld {
            job: context.job.clone(),
            attempt: context.attempt,
            rank: context.rank,
            collective_address,
            inference_url,
            host: context.host.clone(),
        };
        *self.joined.lock().unwrap_or_else(PoisonError::into_inner) = Some(join.clone());
        let world = tokio::time::timeout(JOIN_DEADLINE, self.join_surely(join))
            .await
            .map_err(|_| HostError::Join("no answer from the agent".to_owned()))?
            .map_err(|status| HostError::Join(status.message().to_owned()))?;
        if !world.error.is_empty() {
            return Err(HostError::Join(world.error));
        }
        if world.ranks.len() != context.world_size as usize {
            let got = world.ranks.len();
            let text = format!("the world has {got} ranks instead of {}", context.world_size);
            return Err(HostError::Join(text));
        }
        Ok(world)
    }

    /// Asks until somebody answers: who answers may be replaced while the others are waited for.
    async fn join_surely(&self, join: v1::JoinWorld) -> Result<v1::World, Status> {
        let mut wait = RETRY_MIN;
        loop {
            match self.line.client().join(join.clone()).await {
                Ok(world) => return Ok(world.into_inner()),
                Err(status) if is_away(&status) => {
                    println!("nobody answers for the world yet: {}", status.message());
                }
                Err(status) => return Err(status),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    /// Reports without waiting. A step report that finds the queue full is left out: the next one
    /// makes up for it.
    pub fn report(&self, fill: impl FnOnce(&mut v1::RankReport)) {
        let _ = self.reports.try_send(self.filled(fill));
    }

    /// Reports what must arrive: a checkpoint, the end, an error. Waits for a place in the queue,
    /// from outside the runtime's tasks.
    pub fn report_surely(&self, fill: impl FnOnce(&mut v1::RankReport)) {
        let _ = self.reports.blocking_send(self.filled(fill));
    }

    /// Sends one last report itself, past the queue, and waits until it has arrived.
    pub async fn report_last(&self, fill: impl FnOnce(&mut v1::RankReport)) {
        // What is queued goes first, so that the last report is the last.
        let drained = async {
            while self.reports.capacity() < REPORTS_MAX {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(REPORT_DEADLINE, drained).await;
        let report = self.filled(fill);
        let told = async {
            loop {
                match self.line.client().report(report.clone()).await {
                    // Whoever answers may be changing places just now.
                    Err(status) if is_away(&status) => tokio::time::sleep(RETRY_MIN).await,
                    _ => return,
                }
            }
        };
        let _ = tokio::time::timeout(REPORT_DEADLINE, told).await;
    }

    fn filled(&self, fill: impl FnOnce(&mut v1::RankReport)) -> v1::RankReport {
        let mut report = self.blank.clone();
        report.at_ms = now_ms();
        fill(&mut report);
        report
    }
}

/// Whether a call broke off, or met somebody who does not lead: another try may succeed.
fn is_away(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
}

/// The task that sends reports in their order.
struct Sending {
    line: Line,
    stop: Arc<AtomicBool>,
    joined: Arc<Mutex<Option<v1::JoinWorld>>>,
    /// When this rank last said again where it listens.
    told: Option<Instant>,
}

impl Sending {
    async fn run(mut self, mut queue: mpsc::Receiver<v1::RankReport>) {
        let mut client = self.line.client();
        while let Some(report) = queue.recv().await {
            match tokio::time::timeout(REPORT_DEADLINE, client.report(report)).await {
                Ok(Ok(command)) => self.obey(command.into_inner(), &client),
                Ok(Err(status)) if !is_away(&status) => {}
                // One report is no loss, and the next one finds whoever leads by then.
                Ok(Err(_)) | Err(_) => client = self.line.client(),
            }
        }
    }

    fn obey(&mut self, command: v1::RankCommand, client: &Client) {
        if command.stop {
            self.stop.store(true, Ordering::Relaxed);
        }
        if !command.announce || self.told.is_some_and(|at| at.elapsed() < ANNOUNCE_PAUSE) {
            return;
        }
        let joined = self.joined.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(join) = joined else { return };
        self.told = Some(Instant::now());
        let mut client = client.clone();
        tokio::spawn(async move {
            // The answer is known already.
            let _ = tokio::time::timeout(ANNOUNCE_DEADLINE, client.join(join)).await;
        });
    }
}
