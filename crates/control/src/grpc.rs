//! The `Control` service: the API over gRPC.

use std::pin::Pin;
use std::time::Duration;

use drumline_wire::v1;
use drumline_wire::v1::control_server::Control;
use drumline_wire::v1::services_server::Services;
use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::api::Handle;

/// Messages that wait for a reader of a stream.
const STREAM_MAX: usize = 8;
/// Views of one job are sent at most so often.
const WATCH_EVERY: Duration = Duration::from_millis(250);
/// An unchanged view is sent again after this time, so that both ends know that the other is there.
const WATCH_AGAIN: Duration = Duration::from_secs(20);
/// How long a followed log waits for its agent to come back.
const AGENT_PATIENCE: Duration = Duration::from_secs(30);
/// How long an agent may take for the next chunk of a log that is not followed.
const CHUNK_DEADLINE: Duration = Duration::from_secs(10);
/// Ranks whose logs are read at once when none is named.
const LOG_RANKS_MAX: u32 = 64;
/// Times that a log is asked for again without a new byte.
const LOG_RETRIES_MAX: u32 = 20;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    pub(crate) handle: Handle,
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Sender<T> = mpsc::Sender<Result<T, Status>>;

fn peer<T>(request: &Request<T>) -> String {
    request.remote_addr().map(|address| address.to_string()).unwrap_or_default()
}

impl Api {
    fn place(&self) -> Result<OwnedSemaphorePermit, Status> {
        let streams = std::sync::Arc::clone(self.handle.streams());
        streams.try_acquire_owned().map_err(|_| {
            Status::resource_exhausted("too many streams are open; close some, or try again later")
        })
    }
}

fn stream<T: Send + 'static>(receiver: mpsc::Receiver<Result<T, Status>>) -> Response<Out<T>> {
    Response::new(Box::pin(ReceiverStream::new(receiver)))
}

#[tonic::async_trait]
impl Control for Api {
    type WatchJobStream = Out<v1::JobView>;
    type LogsStream = Out<v1::LogChunk>;

    async fn submit(
        &self,
        request: Request<v1::SubmitRequest>,
    ) -> Result<Response<v1::SubmitResponse>, Status> {
        let peer = peer(&request);
        Ok(Response::new(self.handle.submit(request.into_inner(), &peer).await?))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        Ok(Response::new(self.handle.list_jobs(request.get_ref())?))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        Ok(Response::new(self.handle.describe(&request.get_ref().id).await?))
    }

    async fn watch_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let place = self.place()?;
        let id = request.into_inner().id;
        self.handle.find(&id)?;
        let (out, receiver) = mpsc::channel(STREAM_MAX);
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let _place = place;
            if let Err(status) = watch_job(&handle, &id, &out).await {
                let _ = out.send(Err(status)).await;
            }
        });
        Ok(stream(receiver))
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        let peer = peer(&request);
        Ok(Response::new(self.handle.cancel(request.into_inner(), &peer).await?))
    }

    async fn hold_job(
        &self,
        request: Request<v1::HoldJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        let peer = peer(&request);
        Ok(Response::new(self.handle.hold(request.into_inner(), &peer).await?))
    }

    async fn scale_job(
        &self,
        request: Request<v1::ScaleJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        let peer = peer(&request);
        Ok(Response::new(self.handle.scale(request.into_inner(), &peer).await?))
    }

    async fn clear_device(
        &self,
        request: Request<v1::ClearDeviceRequest>,
    ) -> Result<Response<v1::ClearDeviceResponse>, Status> {
        let peer = peer(&request);
        Ok(Response::new(self.handle.clear_device(request.into_inner(), &peer).await?))
    }

    async fn list_queues(
        &self,
        _: Request<v1::ListQueuesRequest>,
    ) -> Result<Response<v1::ListQueuesResponse>, Status> {
        Ok(Response::new(self.handle.list_queues().await?))
    }

    async fn delete_queue(
        &self,
        request: Request<v1::DeleteQueueRequest>,
    ) -> Result<Response<v1::DeleteQueueResponse>, Status> {
        let peer = peer(&request);
        Ok(Response::new(self.handle.delete_queue(request.into_inner(), &peer).await?))
    }

    async fn snapshot(
        &self,
        _: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        Ok(Response::new(self.handle.snapshot().await?))
    }

    async fn logs(
        &self,
        request: Request<v1::LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let place = self.place()?;
        let request = request.into_inner();
        let (attempt, _) =
            self.handle.log_place(&request.id, request.attempt, request.rank.unwrap_or(0))?;
        let ranks: Vec<u32> = match request.rank {
            Some(rank) => vec![rank],
            None => {
                let job = self.handle.find(&request.id)?;
                let world = job.spec.gang().ranks;
                if world > LOG_RANKS_MAX {
                    return Err(Status::invalid_argument(format!(
                        "{} has {world} ranks; name one of them with --rank: at most \
                         {LOG_RANKS_MAX} logs are read at once",
                        request.id
                    )));
                }
                (0..world).collect()
            }
        };
        let (out, receiver) = mpsc::channel(STREAM_MAX);
        let place = std::sync::Arc::new(place);
        for rank in ranks {
            let (handle, out) = (self.handle.clone(), out.clone());
            let place = std::sync::Arc::clone(&place);
            let request = v1::LogsRequest { attempt, rank: Some(rank), ..request.clone() };
            tokio::spawn(async move {
                let _place = place;
                if let Err(status) = read_log(&handle, &request, rank, &out).await {
                    let _ = out.send(Err(status)).await;
                }
            });
        }
        Ok(stream(receiver))
    }

    async fn list_nodes(
        &self,
        _: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        Ok(Response::new(v1::ListNodesResponse { nodes: self.handle.list_nodes()? }))
    }

    async fn fleet(&self, _: Request<v1::FleetRequest>) -> Result<Response<v1::FleetView>, Status> {
        Ok(Response::new(self.handle.fleet()?))
    }

    async fn series(
        &self,
        request: Request<v1::SeriesRequest>,
    ) -> Result<Response<v1::SeriesResponse>, Status> {
        Ok(Response::new(self.handle.series(request.get_ref())?))
    }

    async fn events(
        &self,
        request: Request<v1::EventsRequest>,
    ) -> Result<Response<v1::EventsResponse>, Status> {
        Ok(Response::new(self.handle.events(request.get_ref())?))
    }

    async fn version(
        &self,
        _: Request<v1::VersionRequest>,
    ) -> Result<Response<v1::VersionResponse>, Status> {
        Ok(Response::new(self.handle.version()))
    }
}

#[tonic::async_trait]
impl Services for Api {
    type WatchStream = Out<v1::ServicesView>;

    async fn watch(
        &self,
        _: Request<v1::WatchServicesRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let place = self.place()?;
        self.handle.board()?;
        let (out, receiver) = mpsc::channel(STREAM_MAX);
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let _place = place;
            if let Err(status) = watch_services(&handle, &out).await {
                let _ = out.send(Err(status)).await;
            }
        });
        Ok(stream(receiver))
    }

    async fn report_gateway(
        &self,
        request: Request<v1::GatewayReport>,
    ) -> Result<Response<v1::GatewayAck>, Status> {
        self.handle.report_gateway(request.into_inner())?;
        Ok(Response::new(v1::GatewayAck {}))
    }
}

/// Sends a job now and at every change, until a terminal phase was sent.
async fn watch_job(handle: &Handle, id: &str, out: &Sender<v1::JobView>) -> Result<(), Status> {
    let board = handle.board()?;
    let mut versions = board.subscribe();
    let mut sent = None;
    loop {
        versions.borrow_and_update();
        // Of the reign that the watch began with: when it is over, the reader comes again.
        let known = id.parse().ok().and_then(|id| board.job(&id));
        let Some(job) = known else {
            return Err(Status::not_found(format!("job {id} is no longer kept")));
        };
        let is_new = sent.as_ref().is_none_or(|(old, at): &(_, Instant)| {
            !std::sync::Arc::ptr_eq(old, &job) || at.elapsed() >= WATCH_AGAIN
        });
        if is_new {
            let view = crate::view::job(&job, &board.gateway_url(), true);
            if out.send(Ok(view)).await.is_err() || job.state().phase.is_terminal() {
                return Ok(());
            }
            sent = Some((job, Instant::now()));
            tokio::time::sleep(WATCH_EVERY).await;
        }
        tokio::select! {
            _ = tokio::time::timeout(WATCH_AGAIN, versions.changed()) => {}
            () = handle.dethroned(&board) => {
                return Err(Status::unavailable("this control plane leads no longer"));
            }
            () = out.closed() => return Ok(()),
        }
    }
}

/// Sends all services now and at every change.
async fn watch_services(handle: &Handle, out: &Sender<v1::ServicesView>) -> Result<(), Status> {
    let board = handle.board()?;
    let mut versions = board.subscribe();
    let mut sent: Option<(Vec<v1::ServiceView>, Instant)> = None;
    loop {
        versions.borrow_and_update();
        let services = board.services();
        let due = match &sent {
            None => true,
            Some((old, at)) => {
                let passed = at.elapsed();
                // Where to send requests must be known at once; figures may come once a second.
                routes(old) != routes(&services)
                    || (passed >= Duration::from_secs(1) && *old != services)
                    || passed >= WATCH_AGAIN
            }
        };
        if due {
            let view = v1::ServicesView { services: services.clone() };
            if out.send(Ok(view)).await.is_err() {
                return Ok(());
            }
            sent = Some((services, Instant::now()));
        }
        tokio::select! {
            _ = tokio::time::timeout(Duration::from_secs(1), versions.changed()) => {}
            () = handle.dethroned(&board) => {
                return Err(Status::unavailable("this control plane leads no longer"));
            }
            () = out.closed() => return Ok(()),
        }
    }
}

fn routes(services: &[v1::ServiceView]) -> Vec<(&str, &str, &str, bool)> {
    services
        .iter()
        .map(|s| (s.job.as_str(), s.endpoint.as_str(), s.secret.as_str(), s.ready))
        .collect()
}

/// Sends the log of one rank of one attempt from the offset on.
async fn read_log(
    handle: &Handle,
    request: &v1::LogsRequest,
    rank: u32,
    out: &Sender<v1::LogChunk>,
) -> Result<(), Status> {
    let (mut offset, mut tail, mut retries) = (request.offset, request.tail_bytes, 0);
    let mut away_since: Option<Instant> = None;
    loop {
        let (attempt, node) = handle.log_place(&request.id, request.attempt, rank)?;
        let ask = v1::ReadLog {
            request: 0,
            job: request.id.clone(),
            attempt,
            rank,
            offset,
            follow: request.follow,
            tail_bytes: tail,
        };
        let Some(mut read) = handle.logs().open(&node, ask) else {
            if request.follow && handle.has_left(&request.id, attempt)? {
                // Nobody will add to this log, and its node is away: the follower moves on.
                let end = v1::LogChunk { rank, attempt, offset, data: Vec::new(), end: true };
                let _ = out.send(Ok(end)).await;
                return Ok(());
            }
            let since = *away_since.get_or_insert_with(Instant::now);
            if !request.follow || since.elapsed() >= AGENT_PATIENCE {
                return Err(Status::not_found(format!(
                    "the log of rank {rank} is on node {node}, whose agent is not connected; \
                     `drumline nodes` shows it"
                )));
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(250)) => continue,
                () = out.closed() => return Ok(()),
            }
        };
        away_since = None;
        loop {
            let next = async {
                if request.follow {
                    Ok(read.next().await)
                } else {
                    tokio::time::timeout(CHUNK_DEADLINE, read.next()).await
                }
            };
            let data = tokio::select! {
                data = next => data.map_err(|_| {
                    Status::deadline_exceeded(format!("node {node} did not send its log in time"))
                })?,
                () = out.closed() => return Ok(()),
            };
            let Some(data) = data else { break };
            if !data.error.is_empty() {
                return Err(Status::not_found(data.error));
            }
            retries = 0;
            offset = data.offset + data.data.len() as u64;
            tail = 0;
            let end = data.end;
            let chunk = v1::LogChunk { rank, attempt, offset: data.offset, data: data.data, end };
            if out.send(Ok(chunk)).await.is_err() || end {
                return Ok(());
            }
        }
        // The reader fell behind, or the agent's stream broke: on from where it stopped.
        retries += 1;
        if retries > LOG_RETRIES_MAX {
            return Err(Status::unavailable(format!("the log of node {node} cannot be read now")));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
