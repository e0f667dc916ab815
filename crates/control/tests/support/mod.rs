//! A control plane on a temporary store, and agents that speak the real protocol over loopback but
//! start no process: each test says what their ranks do.

#![allow(dead_code)]

pub(crate) mod agent;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use drumline_control::{Options, Running};
use drumline_ports::store::Store;
use drumline_store::{EmbeddedOptions, EmbeddedStore};
use drumline_wire::auth::{AddToken, Token};
use drumline_wire::v1;
use drumline_wire::v1::control_client::ControlClient;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

pub(crate) type Client = ControlClient<InterceptedService<Channel, AddToken>>;

/// How long a test waits for anything. A busy machine may take its time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// How long a node may be silent. Agents beat forty times within it, and a machine that does much else
/// may keep one waiting for most of that.
pub(crate) const NODE_GRACE: Duration = Duration::from_secs(4);

pub(crate) fn token() -> Token {
    Token::new("test-token-0123456789").unwrap()
}

/// Opens the store of a folder. One that a control plane of this process has just left may still be
/// open for a moment.
pub(crate) fn store(folder: &Path) -> Arc<dyn Store> {
    let path = folder.join("state.redb");
    let started = std::time::Instant::now();
    loop {
        match EmbeddedStore::open(&path, &EmbeddedOptions::default()) {
            Ok(store) => return Arc::new(store),
            Err(error) if started.elapsed() > PATIENCE => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A control plane in this process.
pub(crate) struct Control {
    pub(crate) running: Running,
    pub(crate) stop: CancellationToken,
}

impl Control {
    /// Starts one on the store of `folder` with short deadlines, at `listen`.
    pub(crate) async fn start(folder: &Path, listen: SocketAddr) -> Self {
        let options = Options {
            listen,
            sole_user: true,
            state_dir: Some(folder.to_owned()),
            heartbeat: Duration::from_millis(500),
            node_grace: NODE_GRACE,
            ..Options::loopback(store(folder), token())
        };
        Self::start_with(options).await
    }

    pub(crate) async fn start_with(options: Options) -> Self {
        let stop = CancellationToken::new();
        let running = drumline_control::start(options, stop.clone()).await.unwrap();
        running.handle.wait_until_leader(PATIENCE).await.unwrap();
        Self { running, stop }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.running.address)
    }

    pub(crate) async fn client(&self) -> Client {
        client(&self.url(), &token()).await
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.running.wait().await.unwrap();
    }
}

pub(crate) fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

pub(crate) async fn channel(url: &str) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(url.to_owned()).unwrap().tcp_nodelay(true);
    endpoint.connect_timeout(Duration::from_secs(5)).connect().await
}

pub(crate) async fn client(url: &str, token: &Token) -> Client {
    ControlClient::with_interceptor(channel(url).await.unwrap(), AddToken::new(token))
}

/// Returns the manifest of a command.
pub(crate) fn command(name: &str, ranks: u32, restarts: u32) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: CommandJob\nmetadata: {{name: {name}}}\n\
         spec: {{argv: [\"true\"], ranks: {ranks}, restarts: {{limit: {restarts}, backoff: 10ms}}}}\n"
    )
}

/// Returns the manifest of a training run on four ranks.
pub(crate) fn training(name: &str, restarts: u32) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: {name}}}\n\
         spec: {{model: {{family: llama, layers: 2, hidden: 32, ffn: 64, heads: 4, vocab: 256, \
         context: 64}}, data: {{path: data}}, parallelism: {{tensor: 2, pipeline: 2}}, \
         batch: {{global: 4, micro: 1}}, steps: 10, \
         restarts: {{limit: {restarts}, backoff: 10ms}}}}\n"
    )
}

/// Returns the manifest of a service on two ranks.
pub(crate) fn service(name: &str) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: ModelService\nmetadata: {{name: {name}}}\n\
         spec: {{model: m, servedName: {name}, parallelism: {{tensor: 2}}}}\n"
    )
}

pub(crate) async fn submit(client: &mut Client, manifests: &str) -> Vec<String> {
    let request = v1::SubmitRequest {
        manifests: manifests.to_owned(),
        user: "ada".to_owned(),
        ..v1::SubmitRequest::default()
    };
    let answer = client.submit(request).await.unwrap().into_inner();
    answer.jobs.into_iter().map(|job| job.id).collect()
}

pub(crate) async fn get(client: &mut Client, id: &str) -> v1::JobView {
    client.get_job(v1::GetJobRequest { id: id.to_owned() }).await.unwrap().into_inner()
}

/// Watches a job until `wanted` holds.
pub(crate) async fn until(
    client: &mut Client,
    id: &str,
    wanted: impl Fn(&v1::JobView) -> bool,
) -> v1::JobView {
    let watch = client.watch_job(v1::GetJobRequest { id: id.to_owned() }).await;
    let mut views = watch.unwrap().into_inner();
    let mut last = v1::JobView::default();
    let found = tokio::time::timeout(PATIENCE, async {
        while let Some(view) = views.message().await.unwrap() {
            if wanted(&view) {
                return Some(view);
            }
            last = view;
        }
        None
    });
    match found.await {
        Ok(Some(view)) => view,
        _ => panic!(
            "{id} stayed {}: {} {}; {:#?}",
            last.phase, last.reason, last.message, last.events
        ),
    }
}

pub(crate) async fn until_phase(client: &mut Client, id: &str, phase: &str) -> v1::JobView {
    until(client, id, |view| view.phase == phase).await
}
