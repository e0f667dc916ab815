//! The calls. What a cluster's API server cannot answer is refused with what to use instead.

use std::pin::Pin;
use std::time::Duration;

use drumline_spec::JobKind;
use drumline_wire::v1;
use drumline_wire::v1::control_server::Control;
use futures::Stream;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::front::logs::{RANKS_MAX, RankLog};
use crate::front::view::{in_full, told, view};
use crate::front::{Front, is_over, phase_of, refused};
use crate::job::{Job, ReplicaOf};

/// Messages that wait for a reader of a stream.
const STREAM_MAX: usize = 8;
/// A job that is watched is looked at so often.
const LOOK: Duration = Duration::from_millis(500);
/// Jobs that are listed when no number is named.
const JOBS_MAX: u32 = 200;
/// Events that are told of one job.
const EVENTS_MAX: usize = 50;

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn not_here(what: &str, instead: &str) -> Status {
    Status::unimplemented(format!("{what} is not there on a Kubernetes cluster: {instead}"))
}

impl Front {
    /// Returns the newest events, the oldest first; none where the user may not see them.
    async fn events_of(&self, job: Option<&Job>) -> Result<Vec<Event>, Status> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let selected = match job {
            Some(job) => ListParams::default().fields(&format!("regarding.uid={}", job.uid)),
            None => ListParams::default().fields("reportingController=drumline"),
        };
        let mut all = match events.list(&selected).await {
            Ok(all) => all.items,
            Err(kube::Error::Api(answer)) if answer.code == 403 && job.is_some() => Vec::new(),
            Err(error) => return Err(refused(&error)),
        };
        all.sort_by_key(|event| told(event, 0).at_ms);
        Ok(all)
    }

    async fn full(&self, id: &str) -> Result<v1::JobView, Status> {
        let (job, object) = self.find(id).await?;
        let members = self.members(&job).await?;
        let events = self.events_of(Some(&job)).await?;
        let newest = &events[events.len().saturating_sub(EVENTS_MAX)..];
        let mut view = view(&job, &members, newest);
        in_full(&mut view, &object);
        Ok(view)
    }
}

#[tonic::async_trait]
impl Control for Front {
    type WatchJobStream = Out<v1::JobView>;
    type LogsStream = Out<v1::LogChunk>;

    async fn submit(
        &self,
        request: Request<v1::SubmitRequest>,
    ) -> Result<Response<v1::SubmitResponse>, Status> {
        Ok(Response::new(self.hand_in(request.get_ref()).await?))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        let request = request.into_inner();
        let only = JobKind::ALL.into_iter().find(|kind| kind.as_str() == request.kind);
        let mut jobs = self.jobs(only).await?;
        jobs.retain(|(job, _)| !(request.active_only && is_over(job)));
        jobs.sort_by_key(|(job, _)| std::cmp::Reverse(job.created_ms));
        let limit = if request.limit == 0 { JOBS_MAX } else { request.limit } as usize;
        let truncated = jobs.len() > limit;
        jobs.truncate(limit);
        let jobs = jobs.iter().map(|(job, _)| view(job, &[], &[])).collect();
        Ok(Response::new(v1::ListJobsResponse { jobs, truncated }))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        Ok(Response::new(self.full(&request.get_ref().id).await?))
    }

    async fn watch_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let mut last = self.full(&request.into_inner().id).await?;
        // With its kind, so that each look asks for one object.
        let id = last.id.clone();
        let (out, receiver) = mpsc::channel(STREAM_MAX);
        let front = self.clone();
        tokio::spawn(async move {
            let mut next = Ok(last.clone());
            loop {
                let is_over = next.as_ref().map_or(true, v1::JobView::has_ended);
                if out.send(next).await.is_err() || is_over {
                    return;
                }
                next = loop {
                    tokio::time::sleep(LOOK).await;
                    if out.is_closed() {
                        return;
                    }
                    match front.full(&id).await {
                        Ok(job) if job == last => {}
                        Ok(job) => {
                            last = job.clone();
                            break Ok(job);
                        }
                        // A deleted object says nothing more: the job was cancelled.
                        Err(status) if status.code() == tonic::Code::NotFound => {
                            break Ok(v1::JobView {
                                phase: "cancelled".to_owned(),
                                ..last.clone()
                            });
                        }
                        Err(status) => break Err(status),
                    }
                };
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        let (job, _) = self.find(&request.get_ref().id).await?;
        if is_over(&job) && !job.is_deleting {
            return Err(Status::failed_precondition(format!(
                "{} has ended: {}; `kubectl delete {0}` removes it and its logs",
                crate::front::view::id(&job),
                phase_of(&job)
            )));
        }
        let params = DeleteParams {
            // Not another job that has taken the name meanwhile.
            preconditions: Some(Preconditions {
                uid: Some(job.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let jobs = self.objects(job.kind, &job.namespace);
        jobs.delete(&job.name, &params).await.map_err(|error| refused(&error))?;
        let job = Job { is_deleting: true, ..job };
        Ok(Response::new(view(&job, &[], &[])))
    }

    async fn scale_job(
        &self,
        request: Request<v1::ScaleJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        let v1::ScaleJobRequest { id, replicas, .. } = request.into_inner();
        let (job, _) = self.find(&id).await?;
        let name = crate::front::view::id(&job);
        if job.kind != JobKind::ModelService {
            let kind = job.kind;
            return Err(Status::invalid_argument(format!(
                "{name} is a {kind}; only a ModelService has replicas"
            )));
        }
        if let Some(ReplicaOf { service, .. }) = &job.replica_of {
            return Err(Status::invalid_argument(format!(
                "{name} is a replica of {service}; scale that one"
            )));
        }
        // As `kubectl scale` does: the API server checks the number against the resource's rules.
        let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        let jobs = self.objects(job.kind, &job.namespace);
        jobs.patch_scale(&job.name, &PatchParams::default(), &patch)
            .await
            .map_err(|error| refused(&error))?;
        Ok(Response::new(self.full(&id).await?))
    }

    async fn hold_job(
        &self,
        _: Request<v1::HoldJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        Err(not_here("holding one job", "set `held: true` of its queue, or delete the job"))
    }

    async fn list_queues(
        &self,
        _: Request<v1::ListQueuesRequest>,
    ) -> Result<Response<v1::ListQueuesResponse>, Status> {
        Ok(Response::new(v1::ListQueuesResponse { queues: self.queues().await? }))
    }

    async fn delete_queue(
        &self,
        request: Request<v1::DeleteQueueRequest>,
    ) -> Result<Response<v1::DeleteQueueResponse>, Status> {
        // The standalone control plane looks first whether the queue is used; here nobody would.
        let instead = format!("use `kubectl delete queue {}`", request.get_ref().name);
        Err(not_here("deleting a queue only while it is unused", &instead))
    }

    async fn snapshot(
        &self,
        _: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        Err(not_here(
            "a snapshot",
            "the operator keeps none; see `kubectl get drumline,nodes,pods -A -o yaml`",
        ))
    }

    async fn logs(
        &self,
        request: Request<v1::LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        let (job, _) = self.find(&request.id).await?;
        let attempt = if request.attempt == 0 { job.status.attempt } else { request.attempt };
        if attempt == 0 {
            return Err(Status::failed_precondition(format!(
                "{} has not started yet; `drumline describe job {}` says why",
                request.id, request.id
            )));
        }
        let world = if job.status.ranks > 0 {
            job.status.ranks
        } else {
            job.spec.as_ref().map(|spec| spec.gang().ranks).unwrap_or_default()
        };
        let ranks: Vec<u32> = match request.rank {
            Some(rank) if rank < world => vec![rank],
            Some(rank) => {
                return Err(Status::invalid_argument(format!(
                    "{} has ranks 0 to {}, not {rank}",
                    request.id,
                    world.saturating_sub(1)
                )));
            }
            None if world > RANKS_MAX => {
                return Err(Status::invalid_argument(format!(
                    "{} has {world} ranks; name one of them with --rank: at most {RANKS_MAX} logs \
                     are read at once",
                    request.id
                )));
            }
            None => (0..world).collect(),
        };
        let (out, receiver) = mpsc::channel(STREAM_MAX);
        for rank in ranks {
            let (front, out) = (self.clone(), out.clone());
            let log = RankLog {
                pod: job.pod(attempt, rank),
                attempt,
                rank,
                seen: request.offset,
                follow: request.follow,
                tail_bytes: request.tail_bytes,
            };
            tokio::spawn(async move {
                if let Err(status) = front.read_log(&log, &out).await {
                    let _ = out.send(Err(status)).await;
                }
            });
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn clear_device(
        &self,
        _: Request<v1::ClearDeviceRequest>,
    ) -> Result<Response<v1::ClearDeviceResponse>, Status> {
        Err(not_here(
            "clearing a device",
            "the node's agent takes its taint drumline.dev/unhealthy off once the driver is content; \
             `kubectl drain` and `kubectl uncordon` are for people",
        ))
    }

    async fn list_nodes(
        &self,
        _: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        Ok(Response::new(v1::ListNodesResponse { nodes: self.nodes().await? }))
    }

    async fn fleet(&self, _: Request<v1::FleetRequest>) -> Result<Response<v1::FleetView>, Status> {
        Err(not_here(
            "the live view",
            "use `drumline jobs` and `drumline nodes`, or the chart's dashboards",
        ))
    }

    async fn series(
        &self,
        _: Request<v1::SeriesRequest>,
    ) -> Result<Response<v1::SeriesResponse>, Status> {
        Err(not_here("a history of series", "ask the Prometheus that scrapes the operator"))
    }

    async fn events(
        &self,
        request: Request<v1::EventsRequest>,
    ) -> Result<Response<v1::EventsResponse>, Status> {
        let request = request.into_inner();
        let events = if request.job.is_empty() {
            self.events_of(None).await?
        } else {
            let (job, _) = self.find(&request.job).await?;
            self.events_of(Some(&job)).await?
        };
        let limit = if request.limit == 0 { usize::MAX } else { request.limit as usize };
        let events = events.iter().rev().take(limit).map(|event| told(event, 0)).collect();
        Ok(Response::new(v1::EventsResponse { events }))
    }

    async fn version(
        &self,
        _: Request<v1::VersionRequest>,
    ) -> Result<Response<v1::VersionResponse>, Status> {
        let info = self.client.apiserver_version().await.map_err(|error| refused(&error))?;
        Ok(Response::new(v1::VersionResponse {
            version: format!("Kubernetes {} at {}", info.git_version, self.server),
            ..v1::VersionResponse::default()
        }))
    }
}
