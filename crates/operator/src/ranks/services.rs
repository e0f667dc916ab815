//! What gateways call: where models are served, with the secret that their leaders want to be shown.

use std::pin::Pin;
use std::time::Duration;

use drumline_spec::Work;
use drumline_types::JobPhase;
use drumline_wire::auth::bearer;
use drumline_wire::v1;
use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::job::Job;
use crate::ranks::callers::Callers;
use crate::ranks::keys::Keys;
use crate::ranks::worlds::Told;
use crate::step::phase;

/// What a gateway's account must be allowed to get.
pub const RESOURCE: &str = "modelservices/endpoint";
/// Messages that wait for a gateway.
const STREAM_MAX: usize = 4;
/// An unchanged list is sent again after this time, so that both ends know that the other is there.
const AGAIN: Duration = Duration::from_secs(20);

/// The list of services while this process leads; `None` while it does not.
pub type Board = Option<Vec<v1::ServiceView>>;

/// The service.
#[derive(Clone)]
pub struct Services {
    /// Who may ask.
    pub callers: Callers,
    /// The list.
    pub board: watch::Receiver<Board>,
}

impl Services {
    async fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let token = bearer(request).ok_or_else(|| Status::unauthenticated("no token is shown"))?;
        self.callers.may(token, "get", RESOURCE).await
    }
}

/// Returns how gateways see a job, which `drains` when it is to get no new requests; `None` when it serves no model.
#[must_use]
pub fn view(
    job: &Job,
    told: Option<&Told>,
    keys: &Keys,
    drains: bool,
    now_ms: u64,
) -> Option<v1::ServiceView> {
    let Work::ModelService(spec) = &job.spec.as_ref().ok()?.work else { return None };
    let phase = phase(&job.status);
    if job.is_deleting || phase.is_terminal() {
        return None;
    }
    let is_running = phase == JobPhase::Running;
    let report = told.and_then(|told| told.fresh(now_ms)).unwrap_or_default();
    let url = told.map(|told| told.inference_url.clone()).filter(|_| is_running);
    let endpoint = url.unwrap_or_default();
    Some(v1::ServiceView {
        job: job.id.to_string(),
        served_name: spec.served_name.clone(),
        ready: is_running && report.ready && !endpoint.is_empty() && !drains,
        endpoint,
        last_step_ms: told.map_or(0, |told| told.progressed_ms),
        running: report.running,
        waiting: report.waiting,
        kv_usage: report.kv_usage,
        tokens_per_second: told.map_or(0.0, |told| told.tokens_per_second),
        max_context: report.max_context.max(spec.max_context),
        max_batch: report.max_batch.max(spec.max_batch),
        max_queue: spec.max_queue,
        secret: keys.secret(&job.uid, job.status.attempt).expose().to_owned(),
        gateway_url: String::new(),
        replica_of: job.replica_of.as_ref().map(|of| of.service.clone()).unwrap_or_default(),
        replica: job.replica_of.as_ref().map_or(0, |of| of.number),
        drains,
        ..v1::ServiceView::default()
    })
}

fn follower() -> Status {
    Status::unavailable("this operator does not lead")
}

#[tonic::async_trait]
impl v1::services_server::Services for Services {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::ServicesView, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<v1::WatchServicesRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.admit(&request).await?;
        let mut board = self.board.clone();
        if board.borrow().is_none() {
            return Err(follower());
        }
        let (out, receiver) = mpsc::channel(STREAM_MAX);
        tokio::spawn(async move {
            loop {
                let services = board.borrow_and_update().clone();
                let is_over = services.is_none();
                let view = services.map(|services| v1::ServicesView { services });
                if out.send(view.ok_or_else(follower)).await.is_err() || is_over {
                    return;
                }
                tokio::select! {
                    changed = tokio::time::timeout(AGAIN, board.changed()) => {
                        if let Ok(Err(_)) = changed { return }
                    }
                    () = out.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn report_gateway(
        &self,
        request: Request<v1::GatewayReport>,
    ) -> Result<Response<v1::GatewayAck>, Status> {
        // Nothing is drawn from it here: a gateway's own metrics are scraped.
        self.admit(&request).await?;
        Ok(Response::new(v1::GatewayAck {}))
    }
}
