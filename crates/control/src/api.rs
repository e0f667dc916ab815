//! The API in process: what the gRPC service, the dashboard and tests call.

use std::sync::Arc;
use std::time::Duration;

use drumline_spec::manifest;
use drumline_telemetry::http::Refresh;
use drumline_types::{JobId, NodeName};
use drumline_wire::v1;
use prometheus::Registry;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tonic::Status;

use crate::audit_log::AuditLog;
use crate::board::Board;
use crate::identity::stable_hash;
use crate::job::Job;
use crate::logs::LogHub;
use crate::message::Input;
use crate::metrics::Metrics;
use crate::options::Options;
use crate::schedule::chosen;
use crate::view;

/// How long the dispatcher may take for one answer: longer than it pursues a write.
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// Streams that are open at one time: watches and logs.
const STREAMS_MAX: usize = 512;
/// Jobs in a list when none is asked for, and at most.
const LIST_DEFAULT: usize = 200;
const LIST_MAX: usize = 5_000;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The caller's mistake.
    #[error("{0}")]
    Invalid(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// A bound is reached; later it may work.
    #[error("{0}")]
    Exhausted(String),
    /// This control plane cannot answer now; try again, perhaps another one.
    #[error("{0}")]
    Unavailable(String),
    /// A bug.
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    pub(crate) fn no_such_job(id: &str) -> Self {
        Self::NotFound(format!("there is no job {id:?}; `drumline jobs` lists them"))
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::Invalid(text) => Self::invalid_argument(text),
            ApiError::NotFound(text) => Self::not_found(text),
            ApiError::Exhausted(text) => Self::resource_exhausted(text),
            ApiError::Unavailable(text) => Self::unavailable(text),
            ApiError::Internal(text) => Self::internal(text),
        }
    }
}

/// One leader, as the API sees it.
#[derive(Debug, Clone)]
pub(crate) struct Reign {
    pub(crate) inbox: mpsc::Sender<Input>,
    pub(crate) board: Arc<Board>,
}

/// The API in process. Cloning is cheap.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

struct Shared {
    options: Options,
    reign: watch::Receiver<Option<Reign>>,
    logs: LogHub,
    audit: AuditLog,
    metrics: Metrics,
    streams: Arc<Semaphore>,
    metrics_url: String,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle")
    }
}

impl Handle {
    pub(crate) fn new(
        options: Options,
        reign: watch::Receiver<Option<Reign>>,
        audit: AuditLog,
        metrics: Metrics,
        metrics_url: String,
    ) -> Self {
        let streams = Arc::new(Semaphore::new(STREAMS_MAX));
        let logs = LogHub::default();
        Self(Arc::new(Shared { options, reign, logs, audit, metrics, streams, metrics_url }))
    }

    pub(crate) fn logs(&self) -> &LogHub {
        &self.0.logs
    }

    pub(crate) fn streams(&self) -> &Arc<Semaphore> {
        &self.0.streams
    }

    pub(crate) fn reign(&self) -> Result<Reign, ApiError> {
        let reign = self.0.reign.borrow().clone();
        reign.ok_or_else(|| {
            ApiError::Unavailable(
                "this control plane does not lead yet, or no longer; try again".to_owned(),
            )
        })
    }

    /// Waits until the reign of this board is over.
    pub(crate) async fn dethroned(&self, board: &Arc<Board>) {
        let mut reign = self.0.reign.clone();
        let is_over = |reign: &Option<Reign>| {
            reign.as_ref().is_none_or(|reign| !Arc::ptr_eq(&reign.board, board))
        };
        // An error means that the control plane has stopped.
        let _ = reign.wait_for(is_over).await;
    }

    pub(crate) fn board(&self) -> Result<Arc<Board>, ApiError> {
        Ok(self.reign()?.board)
    }

    /// Waits until this control plane leads.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`] when it does not within `patience`.
    pub async fn wait_until_leader(&self, patience: Duration) -> Result<(), ApiError> {
        let mut reign = self.0.reign.clone();
        let led = tokio::time::timeout(patience, reign.wait_for(Option::is_some)).await;
        match led {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ApiError::Unavailable("the control plane has stopped".to_owned())),
            Err(_) => Err(ApiError::Unavailable("not leader in time".to_owned())),
        }
    }

    /// Returns the registry that holds this process' metrics.
    #[must_use]
    pub fn registry(&self) -> Registry {
        self.0.options.registry.clone()
    }

    /// Returns what brings gauges up to date before they are read.
    #[must_use]
    pub fn refresh(&self) -> Refresh {
        let handle = self.clone();
        Arc::new(move || match handle.board() {
            Ok(board) => {
                handle.0.metrics.leader_term(board.term);
                handle.0.metrics.refresh(&board);
            }
            Err(_) => handle.0.metrics.leader_term(0),
        })
    }

    async fn ask<T>(
        &self,
        input: impl FnOnce(oneshot::Sender<Result<T, ApiError>>) -> Input,
    ) -> Result<T, ApiError> {
        let unsettled = || {
            ApiError::Unavailable(
                "the control plane stopped before it could answer; ask again with the same \
                 idempotency key"
                    .to_owned(),
            )
        };
        let reign = self.reign()?;
        let (reply, answer) = oneshot::channel();
        let asked = async {
            reign.inbox.send(input(reply)).await.map_err(|_| unsettled())?;
            answer.await.map_err(|_| unsettled())?
        };
        tokio::time::timeout(ANSWER_DEADLINE, asked).await.unwrap_or_else(|_| Err(unsettled()))
    }

    /// Checks manifests and stores their jobs: all of them, or none.
    ///
    /// # Errors
    /// [`ApiError::Invalid`] with every mistake, one a line.
    pub async fn submit(
        &self,
        request: v1::SubmitRequest,
        peer: &str,
    ) -> Result<v1::SubmitResponse, ApiError> {
        let outcome = self.try_submit(&request).await;
        if !request.dry_run {
            let (ids, word) = match &outcome {
                Ok(answer) => {
                    (answer.jobs.iter().map(|job| job.id.clone()).collect(), "ok".to_owned())
                }
                Err(error) => (Vec::new(), error.to_string()),
            };
            self.0.audit.record(&request.user, peer, "submit", &ids, &word).await;
        }
        outcome
    }

    async fn try_submit(
        &self,
        request: &v1::SubmitRequest,
    ) -> Result<v1::SubmitResponse, ApiError> {
        for (what, text, most) in [
            ("user", &request.user, 128),
            ("idempotency_key", &request.idempotency_key, 128),
            ("source_name", &request.source_name, 1024),
        ] {
            if text.len() > most || text.chars().any(char::is_control) {
                let message = format!("{what} must be at most {most} bytes of visible text");
                return Err(ApiError::Invalid(message));
            }
        }
        let source = match request.source_name.as_str() {
            "" => "manifest",
            name => name,
        };
        let parsed = manifest::parse_all(&request.manifests, source);
        let manifest::Manifests { queues, jobs: specs } = parsed.map_err(|mistakes| {
            let lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
            ApiError::Invalid(lines.join("\n"))
        })?;
        let queue_names: Vec<String> = queues.iter().map(|queue| queue.name.to_string()).collect();
        if request.dry_run {
            let jobs = self.ask(|reply| Input::Preview { specs, queues, reply }).await?;
            return Ok(v1::SubmitResponse { jobs, queues: queue_names });
        }
        let told: Vec<_> = specs
            .iter()
            .map(|spec| (spec.kind().as_str(), spec.name.clone(), spec.gang().ranks))
            .collect();
        let hash = stable_hash(request.manifests.as_bytes());
        let (user, key) = (request.user.clone(), request.idempotency_key.clone());
        let ids = self
            .ask(|reply| Input::Submit { specs, queues, user, idempotency_key: key, hash, reply })
            .await?;
        let jobs = ids
            .into_iter()
            .zip(told)
            .map(|(id, (kind, name, ranks))| {
                // The board has the spec with the split that was chosen for `parallelism: auto`.
                let stored = self.find(id.as_str()).ok();
                v1::SubmittedJob {
                    id: id.to_string(),
                    kind: kind.to_owned(),
                    name,
                    ranks: stored.as_ref().map_or(ranks, |job| job.spec.gang().ranks),
                    split: stored.as_ref().map(|job| chosen(&job.spec)).unwrap_or_default(),
                    ..v1::SubmittedJob::default()
                }
            })
            .collect();
        Ok(v1::SubmitResponse { jobs, queues: queue_names })
    }

    /// Ends a job; returns it as it is then.
    ///
    /// # Errors
    /// [`ApiError::NotFound`].
    pub async fn cancel(
        &self,
        request: v1::CancelJobRequest,
        peer: &str,
    ) -> Result<v1::JobView, ApiError> {
        check_user(&request.user)?;
        let job = self.find(&request.id)?.state().job.clone();
        let user = request.user.clone();
        let outcome = self.ask(|reply| Input::Cancel { job, user, reply }).await;
        let word = outcome.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned());
        let ids = std::slice::from_ref(&request.id);
        self.0.audit.record(&request.user, peer, "cancel", ids, &word).await;
        outcome?;
        self.get_job(&request.id)
    }

    /// Holds a waiting job back, or lets it go; returns it as it is then.
    ///
    /// # Errors
    /// [`ApiError::NotFound`]; [`ApiError::Invalid`] when it does not wait.
    pub async fn hold(
        &self,
        request: v1::HoldJobRequest,
        peer: &str,
    ) -> Result<v1::JobView, ApiError> {
        check_user(&request.user)?;
        let job = self.find(&request.id)?.state().job.clone();
        let held = request.held;
        let outcome = self.ask(|reply| Input::Hold { job, held, reply }).await;
        let (what, ids) =
            (if held { "hold" } else { "release" }, std::slice::from_ref(&request.id));
        let word = outcome.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned());
        self.0.audit.record(&request.user, peer, what, ids, &word).await;
        outcome?;
        self.get_job(&request.id)
    }

    /// Sets the number of a service's replicas; returns it as it is then.
    ///
    /// # Errors
    /// [`ApiError::NotFound`]; [`ApiError::Invalid`] when it is no service, or does not scale by hand.
    pub async fn scale(
        &self,
        request: v1::ScaleJobRequest,
        peer: &str,
    ) -> Result<v1::JobView, ApiError> {
        check_user(&request.user)?;
        let job = self.find(&request.id)?.state().job.clone();
        let (replicas, user) = (request.replicas, request.user.clone());
        let outcome = self.ask(|reply| Input::Scale { job, replicas, user, reply }).await;
        let word = outcome.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned());
        let ids = std::slice::from_ref(&request.id);
        self.0.audit.record(&request.user, peer, "scale", ids, &word).await;
        outcome?;
        self.get_job(&request.id)
    }

    /// Says that somebody has dealt with an unhealthy device.
    ///
    /// # Errors
    /// [`ApiError::NotFound`] for a device that no agent has told of, [`ApiError::Invalid`] for one
    /// that is no GPU, [`ApiError::Unavailable`] while its agent is away.
    pub async fn clear_device(
        &self,
        request: v1::ClearDeviceRequest,
        peer: &str,
    ) -> Result<v1::ClearDeviceResponse, ApiError> {
        check_user(&request.user)?;
        let node: NodeName =
            request.node.parse().map_err(|error| ApiError::Invalid(format!("{error}")))?;
        let index = request.index;
        let outcome = self.ask(|reply| Input::ClearDevice { node, index, reply }).await;
        let word = outcome.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned());
        let device = format!("{}/{index}", request.node);
        let devices = std::slice::from_ref(&device);
        self.0.audit.record(&request.user, peer, "clear", devices, &word).await;
        outcome?;
        Ok(v1::ClearDeviceResponse {})
    }

    /// Returns every queue with what it uses, parents before their children.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`].
    pub async fn list_queues(&self) -> Result<v1::ListQueuesResponse, ApiError> {
        let queues = self.ask(|reply| Input::Queues { reply }).await?;
        Ok(v1::ListQueuesResponse { queues })
    }

    /// Deletes a queue.
    ///
    /// # Errors
    /// [`ApiError::NotFound`]; [`ApiError::Invalid`] while it has children or jobs.
    pub async fn delete_queue(
        &self,
        request: v1::DeleteQueueRequest,
        peer: &str,
    ) -> Result<v1::DeleteQueueResponse, ApiError> {
        check_user(&request.user)?;
        let shown = crate::convert::cut(&request.name, 80);
        let Ok(queue) = request.name.parse() else {
            return Err(crate::queues::no_such_queue(&shown, std::iter::empty()));
        };
        let outcome = self.ask(|reply| Input::DeleteQueue { queue, reply }).await;
        let word = outcome.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned());
        self.0.audit.record(&request.user, peer, "delete queue", &[shown.to_string()], &word).await;
        outcome?;
        Ok(v1::DeleteQueueResponse {})
    }

    /// Returns everything that decisions depend on, as JSON.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`].
    pub async fn snapshot(&self) -> Result<v1::SnapshotResponse, ApiError> {
        let saved = self.ask(|reply| Input::Snapshot { reply }).await?;
        let json = serde_json::to_string(&*saved)
            .map_err(|error| ApiError::Internal(format!("the state is no JSON: {error}")))?;
        Ok(v1::SnapshotResponse { json })
    }

    pub(crate) fn find(&self, id: &str) -> Result<Arc<Job>, ApiError> {
        let board = self.board()?;
        let known = id.parse::<JobId>().ok().and_then(|id| board.job(&id));
        known.ok_or_else(|| ApiError::no_such_job(&crate::convert::cut(id, 80)))
    }

    /// Lists jobs, newest first.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`] while this control plane does not lead; the same for all reads.
    pub fn list_jobs(
        &self,
        request: &v1::ListJobsRequest,
    ) -> Result<v1::ListJobsResponse, ApiError> {
        let board = self.board()?;
        let gateway = board.gateway_url();
        let limit = match request.limit as usize {
            0 => LIST_DEFAULT,
            limit => limit.min(LIST_MAX),
        };
        let all = board.jobs();
        let mut wanted = all.iter().rev().filter(|job| {
            (request.kind.is_empty() || job.spec.kind().as_str() == request.kind)
                && !(request.active_only && job.state().phase.is_terminal())
        });
        let jobs = wanted.by_ref().take(limit).map(|job| view::job(job, &gateway, false)).collect();
        Ok(v1::ListJobsResponse { jobs, truncated: wanted.next().is_some() })
    }

    /// Returns one job, with its spec and history.
    ///
    /// # Errors
    /// [`ApiError::NotFound`].
    pub fn get_job(&self, id: &str) -> Result<v1::JobView, ApiError> {
        let job = self.find(id)?;
        Ok(view::job(&job, &self.board()?.gateway_url(), true))
    }

    /// Returns one job, as [`Self::get_job`]; one that waits with its full explanation of now.
    ///
    /// # Errors
    /// [`ApiError::NotFound`].
    pub async fn describe(&self, id: &str) -> Result<v1::JobView, ApiError> {
        let mut view = self.get_job(id)?;
        let job = self.find(id)?;
        if job.state().phase == drumline_types::JobPhase::Pending {
            let job = job.state().job.clone();
            if let Some(why) = self.ask(|reply| Input::Explain { job, reply }).await? {
                why.reason.token().clone_into(&mut view.reason);
                why.reason.remedy().clone_into(&mut view.remedy);
                view.message = why.message;
            }
        }
        Ok(view)
    }

    /// Returns every node.
    ///
    /// # Errors
    /// As [`Self::list_jobs`].
    pub fn list_nodes(&self) -> Result<Vec<v1::NodeView>, ApiError> {
        Ok(self.board()?.nodes().as_ref().clone())
    }

    /// Returns the fleet at a glance: all nodes, and every job that has not ended or did lately.
    ///
    /// # Errors
    /// As [`Self::list_jobs`].
    pub fn fleet(&self) -> Result<v1::FleetView, ApiError> {
        let board = self.board()?;
        let nodes = board.nodes().as_ref().clone();
        let listed = self.list_jobs(&v1::ListJobsRequest::default())?;
        let jobs = board.jobs();
        let phase = |wanted: &str| {
            jobs.iter().filter(|job| job.state().phase.as_str() == wanted).count() as u32
        };
        let devices = || nodes.iter().flat_map(|node| &node.devices);
        Ok(v1::FleetView {
            now_ms: self.0.options.clock.now().0,
            devices_total: devices().count() as u32,
            devices_allocated: devices().filter(|device| !device.job.is_empty()).count() as u32,
            devices_idle: devices().filter(|device| device.idle).count() as u32,
            devices_unhealthy: devices().filter(|device| !device.healthy).count() as u32,
            utilization: view::mean_utilization(&nodes),
            jobs_running: phase("running"),
            jobs_pending: phase("pending"),
            nodes,
            jobs: listed.jobs,
            gateway_url: board.gateway_url(),
            leader: board.leader.clone(),
            leader_term: board.term,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    /// Returns series by name; one that does not exist is empty.
    ///
    /// # Errors
    /// As [`Self::list_jobs`], or [`ApiError::Invalid`] for more than 100 names.
    pub fn series(&self, request: &v1::SeriesRequest) -> Result<v1::SeriesResponse, ApiError> {
        if request.names.len() > 100 {
            return Err(ApiError::Invalid("at most 100 series in one call".to_owned()));
        }
        let board = self.board()?;
        let most = match request.max_points {
            0 => 600,
            most => most.clamp(2, 4096) as usize,
        };
        let store = board.series.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let series = request.names.iter().map(|name| {
            let (x, y) = store.get(name, most).into_iter().unzip();
            v1::Series { name: name.clone(), x, y }
        });
        Ok(v1::SeriesResponse { series: series.collect() })
    }

    /// Returns events, newest first.
    ///
    /// # Errors
    /// As [`Self::list_jobs`].
    pub fn events(&self, request: &v1::EventsRequest) -> Result<v1::EventsResponse, ApiError> {
        let board = self.board()?;
        let limit = match request.limit as usize {
            0 => 100,
            limit => limit.min(1000),
        };
        // A job's own history reaches further back than its part in the fleet's.
        let events = if request.job.is_empty() {
            board.events("", limit)
        } else {
            let job = self.find(&request.job)?;
            let notes = job.stored.notes.iter().rev().take(limit);
            notes.map(|note| view::event(&request.job, note)).collect()
        };
        Ok(v1::EventsResponse { events })
    }

    /// Returns where served models are, with the secrets that their ranks ask for.
    ///
    /// # Errors
    /// As [`Self::list_jobs`].
    pub fn services(&self) -> Result<Vec<v1::ServiceView>, ApiError> {
        Ok(self.board()?.services())
    }

    /// Takes the gateway's account of its requests.
    ///
    /// # Errors
    /// As [`Self::list_jobs`], or [`ApiError::Invalid`] for a URL that is none.
    pub fn report_gateway(&self, report: v1::GatewayReport) -> Result<(), ApiError> {
        let url = report.url.as_str();
        let legal = url.len() <= 256 && !url.chars().any(|c| c.is_control() || c.is_whitespace());
        if !legal || !(url.starts_with("http://") || url.starts_with("https://")) {
            return Err(ApiError::Invalid("the gateway's url must be http:// or https://".into()));
        }
        self.board()?.report_gateway(report, self.0.options.clock.now());
        Ok(())
    }

    /// Returns what runs here and where its pages are.
    #[must_use]
    pub fn version(&self) -> v1::VersionResponse {
        let options = &self.0.options;
        v1::VersionResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            git_commit: options.git_commit.clone(),
            dashboard_url: options.dashboard_url.clone(),
            metrics_url: self.0.metrics_url.clone(),
            gateway_url: self.board().map(|board| board.gateway_url()).unwrap_or_default(),
        }
    }

    /// Returns whether a job is over, or runs as a later attempt than `attempt`.
    pub(crate) fn has_left(&self, id: &str, attempt: u32) -> Result<bool, ApiError> {
        let job = self.find(id)?;
        Ok(job.state().phase.is_terminal() || job.state().attempt.0 > attempt)
    }

    /// Returns where a rank's log lies: the attempt that is meant by 0, and the node.
    pub(crate) fn log_place(
        &self,
        id: &str,
        attempt: u32,
        rank: u32,
    ) -> Result<(u32, NodeName), ApiError> {
        let job = self.find(id)?;
        let newest = job.state().attempt.0;
        let attempt = if attempt == 0 { newest } else { attempt };
        if newest == 0 {
            let why = &job.state().why;
            return Err(ApiError::NotFound(format!("{id} has no log yet: {why}")));
        }
        if attempt > newest {
            let text = format!("{id} has no attempt {attempt}; the newest is {newest}");
            return Err(ApiError::NotFound(text));
        }
        let places = job.stored.places.iter().find(|(number, _)| *number == attempt);
        let Some((_, nodes)) = places else {
            let text = format!("where attempt {attempt} of {id} ran is no longer known");
            return Err(ApiError::NotFound(text));
        };
        let node = nodes.get(rank as usize).cloned().ok_or_else(|| {
            let text = format!("{id} has no rank {rank}; its ranks are 0 to {}", nodes.len() - 1);
            ApiError::NotFound(text)
        })?;
        Ok((attempt, node))
    }
}

fn check_user(user: &str) -> Result<(), ApiError> {
    if user.len() > 128 || user.chars().any(char::is_control) {
        return Err(ApiError::Invalid("user must be at most 128 bytes of visible text".to_owned()));
    }
    Ok(())
}
