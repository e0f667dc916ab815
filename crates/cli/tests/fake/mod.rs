//! A control plane that says what a test tells it to, on a real socket, and can be "restarted".

use std::path::Path;
use std::pin::Pin;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drumline_wire::auth::{RequireToken, Token};
use drumline_wire::v1;
use drumline_wire::v1::control_server::{Control, ControlServer};
use futures::Stream;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// The token that every fake asks for.
pub(crate) const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// What the fake answers, changed by the test while it runs.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// The one job; `None` is an unknown id.
    pub(crate) job: Option<v1::JobView>,
    /// The log of each rank.
    pub(crate) logs: Vec<Vec<u8>>,
    /// Break log streams off after so many bytes of each rank; then never again.
    pub(crate) break_logs_after: Option<usize>,
    /// Break the next watch off after its first message.
    pub(crate) break_watch: bool,
    /// What was submitted, with its idempotency key.
    pub(crate) submitted: Vec<(String, String)>,
    /// Fail so many submissions after they were stored: the answer is lost.
    pub(crate) lose_answers: usize,
    /// Calls of `Logs`: the offsets that were asked for.
    pub(crate) offsets: Vec<u64>,
}

/// A running fake.
pub(crate) struct Fake {
    /// What it answers.
    pub(crate) script: Arc<Mutex<Script>>,
    server: JoinHandle<()>,
}

#[derive(Clone)]
struct Service(Arc<Mutex<Script>>);

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Fake {
    /// Starts a fake and tells the state folder where it is.
    pub(crate) async fn start(state: &Path, script: Script) -> Self {
        let script = Arc::new(Mutex::new(script));
        std::fs::write(state.join("token"), TOKEN).unwrap();
        let server = serve(state, script.clone()).await;
        Self { script, server }
    }

    /// Ends the server, and starts it again on another port after `pause`.
    pub(crate) async fn restart(&mut self, state: &Path, pause: Duration) {
        self.server.abort();
        tokio::time::sleep(pause).await;
        self.server = serve(state, self.script.clone()).await;
    }

    /// Changes what it answers.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }
}

async fn serve(state: &Path, script: Arc<Mutex<Script>>) -> JoinHandle<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let endpoint = format!("{{\"control\": \"http://{address}\"}}");
    std::fs::write(state.join("endpoint.json"), endpoint).unwrap();
    let guard = RequireToken::new(Token::new(TOKEN).unwrap());
    let service = ControlServer::with_interceptor(Service(script), guard);
    tokio::spawn(async move {
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    })
}

/// Runs the binary in a state folder, off the runtime's threads.
pub(crate) async fn drumline(state: &Path, arguments: &[&str]) -> Output {
    let mut command = plain(state);
    command.args(arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// The binary with a state folder and no other influence.
pub(crate) fn plain(state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drumline"));
    command.env_clear().env("DRUMLINE_STATE_DIR", state).env("HOME", state);
    command
}

/// A job in a phase.
pub(crate) fn job(phase: &str) -> v1::JobView {
    v1::JobView {
        id: "t-1".to_owned(),
        name: "t".to_owned(),
        kind: "TrainingJob".to_owned(),
        phase: phase.to_owned(),
        attempt: 1,
        world_size: 2,
        ..v1::JobView::default()
    }
}

impl Service {
    fn job(&self, id: &str) -> Result<v1::JobView, Status> {
        let job = self.0.lock().unwrap().job.clone();
        job.filter(|job| job.id == id)
            .ok_or_else(|| Status::not_found(format!("no job {id}; `drumline jobs` lists them")))
    }
}

#[tonic::async_trait]
impl Control for Service {
    type WatchJobStream = Streamed<v1::JobView>;
    type LogsStream = Streamed<v1::LogChunk>;

    async fn submit(
        &self,
        request: Request<v1::SubmitRequest>,
    ) -> Result<Response<v1::SubmitResponse>, Status> {
        let request = request.into_inner();
        let mut script = self.0.lock().unwrap();
        let key = request.idempotency_key;
        if !script.submitted.iter().any(|(_, seen)| *seen == key) {
            script.submitted.push((request.manifests, key));
        }
        if script.lose_answers > 0 {
            script.lose_answers -= 1;
            return Err(Status::unavailable("going down"));
        }
        let job = v1::SubmittedJob { id: "t-1".to_owned(), ..v1::SubmittedJob::default() };
        Ok(Response::new(v1::SubmitResponse { jobs: vec![job], ..Default::default() }))
    }

    async fn hold_job(
        &self,
        request: Request<v1::HoldJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        self.job(&request.into_inner().id).map(Response::new)
    }

    async fn scale_job(
        &self,
        request: Request<v1::ScaleJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        self.job(&request.into_inner().id).map(Response::new)
    }

    async fn clear_device(
        &self,
        request: Request<v1::ClearDeviceRequest>,
    ) -> Result<Response<v1::ClearDeviceResponse>, Status> {
        match request.into_inner().node.as_str() {
            "node-0" => Ok(Response::new(v1::ClearDeviceResponse::default())),
            node => Err(Status::not_found(format!("there is no node {node:?}"))),
        }
    }

    async fn list_queues(
        &self,
        _: Request<v1::ListQueuesRequest>,
    ) -> Result<Response<v1::ListQueuesResponse>, Status> {
        Ok(Response::new(v1::ListQueuesResponse::default()))
    }

    async fn delete_queue(
        &self,
        _: Request<v1::DeleteQueueRequest>,
    ) -> Result<Response<v1::DeleteQueueResponse>, Status> {
        Ok(Response::new(v1::DeleteQueueResponse {}))
    }

    async fn snapshot(
        &self,
        _: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        Ok(Response::new(v1::SnapshotResponse { json: "{}".to_owned() }))
    }

    async fn list_jobs(
        &self,
        _: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        let jobs = self.0.lock().unwrap().job.clone().into_iter().collect();
        Ok(Response::new(v1::ListJobsResponse { jobs, truncated: false }))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        self.job(&request.into_inner().id).map(Response::new)
    }

    async fn watch_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let id = request.into_inner().id;
        self.job(&id)?;
        let service = self.clone();
        let stream = futures::stream::unfold(0u32, move |sent| {
            let (service, id) = (service.clone(), id.clone());
            async move {
                if sent > 0 {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    if std::mem::take(&mut service.0.lock().unwrap().break_watch) {
                        return Some((Err(Status::unavailable("going down")), sent + 1));
                    }
                }
                Some((service.job(&id), sent + 1))
            }
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::JobView>, Status> {
        self.job(&request.into_inner().id).map(Response::new)
    }

    async fn logs(
        &self,
        request: Request<v1::LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        self.job(&request.id)?;
        let mut script = self.0.lock().unwrap();
        script.offsets.push(request.offset);
        let until = script.break_logs_after.take();
        let mut items = Vec::new();
        for (rank, log) in script.logs.iter().enumerate() {
            let rank = u32::try_from(rank).unwrap();
            if request.rank.is_some_and(|wanted| wanted != rank) {
                continue;
            }
            let from = usize::try_from(request.offset).unwrap().min(log.len());
            let to = until.map_or(log.len(), |until| until.max(from).min(log.len()));
            for (index, piece) in log[from..to].chunks(7).enumerate() {
                items.push(Ok(v1::LogChunk {
                    rank,
                    attempt: 1,
                    offset: (from + index * 7) as u64,
                    data: piece.to_vec(),
                    end: false,
                }));
            }
        }
        if until.is_some() {
            items.push(Err(Status::unavailable("going down")));
        }
        Ok(Response::new(Box::pin(futures::stream::iter(items))))
    }

    async fn list_nodes(
        &self,
        _: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        Ok(Response::new(v1::ListNodesResponse::default()))
    }

    async fn fleet(&self, _: Request<v1::FleetRequest>) -> Result<Response<v1::FleetView>, Status> {
        let jobs = self.0.lock().unwrap().job.clone().into_iter().collect();
        Ok(Response::new(v1::FleetView { jobs, devices_total: 4, ..v1::FleetView::default() }))
    }

    async fn series(
        &self,
        _: Request<v1::SeriesRequest>,
    ) -> Result<Response<v1::SeriesResponse>, Status> {
        Ok(Response::new(v1::SeriesResponse::default()))
    }

    async fn events(
        &self,
        _: Request<v1::EventsRequest>,
    ) -> Result<Response<v1::EventsResponse>, Status> {
        Err(Status::internal("not asked for"))
    }

    async fn version(
        &self,
        _: Request<v1::VersionRequest>,
    ) -> Result<Response<v1::VersionResponse>, Status> {
        Ok(Response::new(v1::VersionResponse { version: "9.9".to_owned(), ..Default::default() }))
    }
}
