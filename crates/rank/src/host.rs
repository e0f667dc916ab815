//! The rank's line to its agent: joining the world, and reports that never hold up a step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use drumline_wire::auth::AddToken;
use drumline_wire::v1::rank_host_client::RankHostClient;
use drumline_wire::{now_ms, v1};
use tokio::sync::mpsc;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::context::Context;

/// Reports under way; more than that and step reports are left out.
const REPORTS_MAX: usize = 256;
/// How long one report may take.
const REPORT_DEADLINE: Duration = Duration::from_secs(5);
/// How long the world may take to come together; the control plane's deadline is shorter.
const JOIN_DEADLINE: Duration = Duration::from_secs(26 * 3600);

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

/// A line to the agent. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Host {
    client: RankHostClient<InterceptedService<Channel, AddToken>>,
    reports: mpsc::Sender<v1::RankReport>,
    stop: Arc<AtomicBool>,
    blank: v1::RankReport,
}

impl Host {
    /// Opens the line and starts the task that sends reports in their order.
    ///
    /// # Errors
    /// [`HostError::Address`].
    pub fn open(context: &Context) -> Result<Self, HostError> {
        let channel = Endpoint::from_shared(context.agent.clone())
            .map_err(|source| HostError::Address { address: context.agent.clone(), source })?
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .connect_lazy();
        let client = RankHostClient::with_interceptor(channel, AddToken::new(&context.secret));
        let (reports, mut queue) = mpsc::channel::<v1::RankReport>(REPORTS_MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let mut sender = client.clone();
        let stopped = stop.clone();
        tokio::spawn(async move {
            while let Some(report) = queue.recv().await {
                let sent = tokio::time::timeout(REPORT_DEADLINE, sender.report(report)).await;
                if let Ok(Ok(command)) = sent
                    && command.into_inner().stop
                {
                    stopped.store(true, Ordering::Relaxed);
                }
            }
        });
        let blank = v1::RankReport {
            job: context.job.clone(),
            attempt: context.attempt,
            rank: context.rank,
            ..v1::RankReport::default()
        };
        Ok(Self { client, reports, stop, blank })
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
        let mut client = self.client.clone();
        let world = tokio::time::timeout(JOIN_DEADLINE, client.join(join))
            .await
            .map_err(|_| HostError::Join("no answer from the agent".to_owned()))?
            .map_err(|status| HostError::Join(status.message().to_owned()))?
            .into_inner();
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
        let mut client = self.client.clone();
        let _ = tokio::time::timeout(REPORT_DEADLINE, client.report(self.filled(fill))).await;
    }

    fn filled(&self, fill: impl FnOnce(&mut v1::RankReport)) -> v1::RankReport {
        let mut report = self.blank.clone();
        report.at_ms = now_ms();
        fill(&mut report);
        report
    }
}
