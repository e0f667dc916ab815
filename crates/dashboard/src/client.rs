//! What the pages ask of the control plane.

use std::sync::Arc;
use std::time::Duration;

use drumline_wire::auth::{AddToken, Token};
use drumline_wire::v1;
use drumline_wire::v1::control_client::ControlClient;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Finds the control plane, again at every connection.
pub type FindControl = Arc<dyn Fn() -> Result<String, String> + Send + Sync>;

/// How long a page waits for the control plane.
const DEADLINE: Duration = Duration::from_secs(5);
/// Bytes of a rank's log that a page shows.
const LOG_TAIL: u64 = 16 << 10;

type Grpc = ControlClient<InterceptedService<Channel, AddToken>>;

/// Asks the control plane; cheap to clone.
#[derive(Clone)]
pub struct Client {
    find: FindControl,
    token: Token,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client(..)")
    }
}

impl Client {
    /// Creates a client; it connects when asked.
    #[must_use]
    pub fn new(find: FindControl, token: Token) -> Self {
        Self { find, token }
    }

    fn grpc(&self) -> Result<Grpc, Status> {
        let url = (self.find)().map_err(Status::unavailable)?;
        let endpoint = Endpoint::from_shared(url)
            .map_err(|error| Status::unavailable(format!("control address: {error}")))?
            .connect_timeout(Duration::from_secs(2))
            .timeout(DEADLINE);
        let client =
            ControlClient::with_interceptor(endpoint.connect_lazy(), AddToken::new(&self.token));
        Ok(client.max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES))
    }

    /// Returns the fleet.
    ///
    /// # Errors
    /// The control plane's, or `UNAVAILABLE` when it cannot be reached.
    pub async fn fleet(&self) -> Result<v1::FleetView, Status> {
        Ok(self.grpc()?.fleet(v1::FleetRequest {}).await?.into_inner())
    }

    /// Returns up to 200 jobs, newest first.
    ///
    /// # Errors
    /// As [`Client::fleet`].
    pub async fn jobs(&self) -> Result<v1::ListJobsResponse, Status> {
        Ok(self.grpc()?.list_jobs(v1::ListJobsRequest::default()).await?.into_inner())
    }

    /// Returns one job.
    ///
    /// # Errors
    /// `NOT_FOUND`, or as [`Client::fleet`].
    pub async fn job(&self, id: &str) -> Result<v1::JobView, Status> {
        Ok(self.grpc()?.get_job(v1::GetJobRequest { id: id.to_owned() }).await?.into_inner())
    }

    /// Returns every queue, parents before their children.
    ///
    /// # Errors
    /// As [`Client::fleet`].
    pub async fn queues(&self) -> Result<Vec<v1::QueueView>, Status> {
        Ok(self.grpc()?.list_queues(v1::ListQueuesRequest {}).await?.into_inner().queues)
    }

    /// Returns the newest events.
    ///
    /// # Errors
    /// As [`Client::fleet`].
    pub async fn events(&self, limit: u32) -> Result<Vec<v1::EventView>, Status> {
        let request = v1::EventsRequest { job: String::new(), limit };
        Ok(self.grpc()?.events(request).await?.into_inner().events)
    }

    /// Returns series in the order of their names; one that does not exist is empty.
    ///
    /// # Errors
    /// As [`Client::fleet`].
    pub async fn series(&self, names: &[String]) -> Result<Vec<Vec<(f64, f64)>>, Status> {
        let request = v1::SeriesRequest { names: names.to_vec(), max_points: 300 };
        let answer = self.grpc()?.series(request).await?.into_inner().series;
        let points = |name: &String| {
            let found = answer.iter().find(|series| &series.name == name);
            found.map_or_else(Vec::new, |s| s.x.iter().copied().zip(s.y.iter().copied()).collect())
        };
        Ok(names.iter().map(points).collect())
    }

    /// Returns the end of one rank's log, and whether it could be read.
    pub async fn log_tail(&self, id: &str, rank: u32) -> Result<String, Status> {
        let request = v1::LogsRequest {
            id: id.to_owned(),
            rank: Some(rank),
            tail_bytes: LOG_TAIL,
            ..v1::LogsRequest::default()
        };
        let mut grpc = self.grpc()?;
        let read = async {
            let mut chunks = grpc.logs(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(chunk) = chunks.message().await? {
                bytes.extend(chunk.data);
                if chunk.end || bytes.len() as u64 > 2 * LOG_TAIL {
                    break;
                }
            }
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        tokio::time::timeout(DEADLINE, read)
            .await
            .unwrap_or_else(|_| Err(Status::new(Code::DeadlineExceeded, "the log came too late")))
    }
}
