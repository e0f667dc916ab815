//! A scripted control plane, a scripted leader rank, and an HTTP client.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use drumline_gateway::Options;
use drumline_wire::auth::{RequireToken, Token};
use drumline_wire::line::Credential;
use drumline_wire::v1;
use drumline_wire::v1::inference_server::{Inference, InferenceServer};
use drumline_wire::v1::services_server::{Services, ServicesServer};
use futures::stream::BoxStream;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

const CLUSTER_TOKEN: &str = "cluster-token-0123456789";
const SECRET: &str = "attempt-secret-0123456789";
pub(crate) const GATEWAY_KEY: &str = "Bearer gateway-key-0123456789";
/// A busy machine may take its time; a wait that ends here has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What the scripted leader does and sees.
#[derive(Default)]
struct Script {
    running: AtomicUsize,
    unhealthy: AtomicBool,
    go: Notify,
    released: AtomicBool,
}

struct Running(Arc<Script>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Leader(Arc<Script>);

#[tonic::async_trait]
impl Inference for Leader {
    type GenerateStream = ReceiverStream<Result<v1::GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let Some(v1::generate_request::Prompt::Text(prompt)) = request.prompt else {
            return Err(Status::invalid_argument("a text, please"));
        };
        if prompt == "too long" {
            return Err(Status::invalid_argument("9 tokens can never fit into 4"));
        }
        let (events, stream) = mpsc::channel(4);
        let script = self.0.clone();
        script.running.fetch_add(1, Ordering::SeqCst);
        let running = Running(script.clone());
        tokio::spawn(async move {
            let _running = running;
            // Listened for before it is looked at, so that no release falls in between.
            let go = script.go.notified();
            if prompt == "slow" && !script.released.load(Ordering::SeqCst) {
                tokio::select! {
                    () = go => {}
                    () = events.closed() => return,
                }
            }
            let letters: Vec<char> =
                prompt.chars().rev().take(request.max_tokens as usize).collect();
            for (index, letter) in letters.iter().enumerate() {
                let last = index + 1 == letters.len();
                let event = v1::GenerateEvent {
                    text: letter.to_string(),
                    tokens: vec![v1::GeneratedToken {
                        id: u32::from(*letter),
                        text: letter.to_string(),
                        logprob: -0.5,
                        top: Vec::new(),
                    }],
                    finish_reason: if last { "length".to_owned() } else { String::new() },
                    prompt_tokens: prompt.chars().count() as u32,
                    completion_tokens: index as u32 + 1,
                    queue_ms: 1.0,
                    cached_tokens: prompt.chars().count() as u32 / 2,
                    prefill_ms: 15.0,
                };
                if events.send(Ok(event)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn tokenize(
        &self,
        _: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn health(
        &self,
        _: Request<v1::HealthRequest>,
    ) -> Result<Response<v1::HealthResponse>, Status> {
        Ok(Response::new(v1::HealthResponse {
            ready: !self.0.unhealthy.load(Ordering::SeqCst),
            chat_template: "{% for m in messages %}<{{ m.content }}>{% endfor %}".to_owned(),
            ..v1::HealthResponse::default()
        }))
    }
}

struct Plane(watch::Receiver<v1::ServicesView>);

#[tonic::async_trait]
impl Services for Plane {
    type WatchStream = BoxStream<'static, Result<v1::ServicesView, Status>>;

    async fn watch(
        &self,
        _: Request<v1::WatchServicesRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let views = futures::StreamExt::map(WatchStream::new(self.0.clone()), Ok);
        Ok(Response::new(futures::StreamExt::boxed(views)))
    }

    async fn report_gateway(
        &self,
        _: Request<v1::GatewayReport>,
    ) -> Result<Response<v1::GatewayAck>, Status> {
        Ok(Response::new(v1::GatewayAck {}))
    }
}

/// A leader rank, as the control plane tells of it.
struct Replica {
    script: Arc<Script>,
    service: v1::ServiceView,
    stop: CancellationToken,
}

impl Replica {
    async fn start(number: usize, places: u32, stop: CancellationToken) -> Self {
        let script = Arc::new(Script::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let leader = listener.local_addr().unwrap();
        let secret = RequireToken::new(Token::new(SECRET).unwrap());
        let server = tonic::transport::Server::builder()
            .add_service(InferenceServer::with_interceptor(Leader(script.clone()), secret));
        let ended = stop.clone().cancelled_owned();
        tokio::spawn(server.serve_with_incoming_shutdown(TcpIncoming::from(listener), ended));
        let service = v1::ServiceView {
            job: format!("demo-{number}"),
            served_name: "demo".to_owned(),
            endpoint: format!("http://{leader}"),
            ready: true,
            max_batch: 1,
            max_queue: places - 1,
            secret: SECRET.to_owned(),
            ..v1::ServiceView::default()
        };
        Self { script, service, stop }
    }
}

/// A gateway with everything around it. Cloning shares it.
#[derive(Clone)]
pub(crate) struct Fixture {
    address: SocketAddr,
    script: Arc<Script>,
    replicas: Arc<Vec<Replica>>,
    services: Arc<watch::Sender<v1::ServicesView>>,
    http: Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>,
    _stop: Arc<tokio_util::sync::DropGuard>,
}

/// An answer, read to its end.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) text: String,
    pub(crate) json: Value,
    headers: hyper::HeaderMap,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl Fixture {
    /// Starts a gateway whose model lets in `places` requests.
    pub(crate) async fn start(places: u32) -> Self {
        Self::start_replicas(1, places).await
    }

    /// Starts a gateway before a model of so many replicas, each of which lets in `places` requests.
    pub(crate) async fn start_replicas(count: usize, places: u32) -> Self {
        let stop = CancellationToken::new();
        let mut replicas = Vec::new();
        for number in 1..=count {
            replicas.push(Replica::start(number, places, stop.child_token()).await);
        }
        let all: Vec<_> = replicas.iter().map(|replica| replica.service.clone()).collect();
        let (services, view) = watch::channel(v1::ServicesView { services: all });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let plane = listener.local_addr().unwrap();
        let token = Token::new(CLUSTER_TOKEN).unwrap();
        let server = tonic::transport::Server::builder().add_service(
            ServicesServer::with_interceptor(Plane(view), RequireToken::new(token.clone())),
        );
        let ended = stop.clone().cancelled_owned();
        tokio::spawn(server.serve_with_incoming_shutdown(TcpIncoming::from(listener), ended));

        let (ready, listening) = tokio::sync::oneshot::channel();
        let options = Options {
            listen: "127.0.0.1:0".parse().unwrap(),
            in_pod: None,
            allow_hosts: Vec::new(),
            control: Arc::new(move || Ok(format!("http://{plane}"))),
            control_ca: None,
            credential: Credential::Fixed(token),
            keys: vec![Token::new(GATEWAY_KEY.strip_prefix("Bearer ").unwrap()).unwrap()],
        };
        tokio::spawn(drumline_gateway::run(options, ready, stop.clone()));
        let fixture = Self {
            address: listening.await.unwrap(),
            script: replicas[0].script.clone(),
            replicas: Arc::new(replicas),
            services: Arc::new(services),
            http: Client::builder(TokioExecutor::new()).build_http(),
            _stop: Arc::new(stop.drop_guard()),
        };
        fixture.wait_for_status(200).await;
        fixture
    }

    pub(crate) fn release(&self) {
        for replica in self.replicas.iter() {
            replica.script.released.store(true, Ordering::SeqCst);
            replica.script.go.notify_waiters();
        }
    }

    pub(crate) fn set_healthy(&self, healthy: bool) {
        self.script.unhealthy.store(!healthy, Ordering::SeqCst);
    }

    pub(crate) fn set_served(&self, served: bool) {
        let all = self.replicas.iter().map(|replica| replica.service.clone());
        let services = if served { all.collect() } else { Vec::new() };
        self.services.send_replace(v1::ServicesView { services });
    }

    /// Tells the gateway whether a replica takes requests.
    pub(crate) fn set_ready(&self, number: usize, ready: bool) {
        self.services.send_modify(|view| view.services[number].ready = ready);
    }

    /// Ends a replica's process without a word to the gateway.
    pub(crate) fn end(&self, number: usize) {
        self.replicas[number].stop.cancel();
    }

    /// Returns how many generations run on each replica.
    pub(crate) fn running(&self) -> Vec<usize> {
        self.replicas.iter().map(|one| one.script.running.load(Ordering::SeqCst)).collect()
    }

    /// Waits until the model answers with this status.
    pub(crate) async fn wait_for_status(&self, status: u16) {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            let headers = [("authorization", GATEWAY_KEY)];
            let answer = self.send("GET", "/v1/models/demo", &headers, String::new()).await;
            let ready = status != 200 || answer.json["ready"] == Value::Bool(true);
            if answer.status == status && ready {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the model did not answer {status} within {PATIENCE:?}");
    }

    /// Waits until so many generations run on the leader.
    pub(crate) async fn wait_for_running(&self, count: usize) {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if self.running().iter().sum::<usize>() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not {count} generations within {PATIENCE:?}");
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        let headers = [("authorization", GATEWAY_KEY)];
        self.send("POST", path, &headers, body.to_string()).await
    }

    /// Returns the data of every server-sent event.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let data = answer.text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(str::to_owned).collect()
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&'static str, &str)],
        body: String,
    ) -> Answer {
        let uri = format!("http://{}{path}", self.address);
        let mut request = hyper::Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let answer = self.http.request(request).await.unwrap();
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let json = serde_json::from_str(&text).unwrap_or(Value::Null);
        Answer { status, text, json, headers }
    }
}
