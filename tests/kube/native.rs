//! Ranks of Drumline's own under the operator: they meet, train, survive the loss of a pod and of
//! the operator, and serve what they have trained.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use drumline_data::{BuildOptions, Corpus};
use drumline_operator::{Observe, deploy, ranks::AUDIENCE};
use drumline_spec::JobKind;
use drumline_web::Keys;
use drumline_wire::auth::Token;
use drumline_wire::line::Credential;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Admin, Cluster, OPERATOR, cluster, free_port};
use crate::containers::Containers;
use crate::operator::{Operator, options};

const T: JobKind = JobKind::TrainingJob;
const S: JobKind = JobKind::ModelService;
const STEPS: u64 = 400;

fn phase(status: &Value) -> &str {
    status["phase"].as_str().unwrap_or_default()
}

/// Builds a small dataset in `folder`.
pub(crate) fn dataset(folder: &Path) {
    let text: String =
        (0..4000).map(|n| format!("line {n} says {} and {}\n", n % 17, n * 7 % 31)).collect();
    let source = folder.join("corpus.txt");
    std::fs::write(&source, text).unwrap();
    let corpus = Corpus::from_path(&source, 1 << 20).unwrap();
    let options = BuildOptions { vocab: 300, ..BuildOptions::default() };
    drumline_data::build(&corpus, &folder.join("data"), &options, &mut |_| {}).unwrap();
}

/// Returns a small run of two ranks.
pub(crate) fn training(steps: u64) -> Value {
    json!({
        "model": { "family": "llama", "layers": 2, "hidden": 64, "ffn": 128, "heads": 4,
                   "vocab": 300, "context": 64 },
        "data": { "path": "data" },
        "parallelism": { "tensor": 2 },
        "batch": { "global": 8, "micro": 4 },
        "steps": steps, "seed": 1,
        "learningRate": { "peak": 0.001 },
        "checkpoint": { "intervalSteps": 10, "keep": 2, "path": "run" },
        "restarts": { "limit": 3, "backoff": "100ms" },
    })
}

async fn operator(cluster: &Cluster, port: u16, metrics: u16, identity: &str) -> Operator {
    let mut options = options(cluster.config(OPERATOR).await, identity);
    options.ranks.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    options.ranks.url = format!("https://127.0.0.1:{port}");
    options.observe = Some(Observe {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, metrics)),
        keys: Some(Keys::new(vec![Token::new(KEY).unwrap()])),
    });
    Operator::run(options)
}

/// Waits until the operator's metrics have a series whose value `holds`.
async fn until_metric(port: u16, series: &str, holds: impl Fn(f64) -> bool) {
    let mut page = String::new();
    for _ in 0..2400 {
        page = fetch(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), "GET /metrics", "").await;
        let value =
            page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse::<f64>().ok());
        if value.is_some_and(&holds) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{series} is not as it should be in\n{page}");
}

/// Waits until the run has a checkpoint on disk.
pub(crate) async fn until_checkpoint(run: &Path) -> PathBuf {
    for _ in 0..1200 {
        if let Ok(found) = drumline_checkpoint::latest(run)
            && let Some(checkpoint) = found.checkpoint
        {
            return checkpoint.path().to_owned();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no checkpoint in {}", run.display());
}

/// Waits until a rank's log says something: it does so a moment after it has joined.
async fn until_told(log: &Path, words: &str) {
    let mut text = String::new();
    for _ in 0..2400 {
        text = std::fs::read_to_string(log).unwrap_or_default();
        if text.contains(words) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{words:?} is not in {}: {text}", log.display());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_training_job_meets_trains_resumes_and_is_served() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "native").await;
    admin.add_node("a", 0, "2").await;
    let folder = tempfile::tempdir().unwrap();
    dataset(folder.path());
    let containers = Containers::start(admin.client.clone(), "native", folder.path());
    containers.slow(true);
    let (port, metrics) = (free_port(), free_port());
    let first = operator(cluster, port, metrics, "first").await;
    admin.apply(T, "demo", training(STEPS)).await.unwrap();
    admin.wait(T, "demo", "running", |s| phase(s) == "running").await;
    until_checkpoint(&folder.path().join("run")).await;
    until_metric(metrics, "drumline_job_loss{job=\"native/demo\"}", |loss| loss < 6.0).await;
    until_metric(metrics, "drumline_job_tokens_per_second{job=\"native/demo\"}", |rate| rate > 0.0)
        .await;

    // A pod is deleted in the middle of the run: the gang goes on from its last checkpoint.
    admin.pods().delete("demo-t1-1", &DeleteParams::default()).await.unwrap();
    let again = admin
        .wait(T, "demo", "running again", |s| phase(s) == "running" && s["attempt"] == 2)
        .await;
    assert_eq!(again["restarts"], 1);
    until_told(&folder.path().join("pods/demo-t2-0/log"), "continues from step").await;

    // The operator is replaced in the middle of the run: the gang does not notice, and tells the next
    // one how far it is. Before that it does not end: ranks that have ended tell nobody any more.
    first.stop().await;
    let second = operator(cluster, port, metrics, "second").await;
    until_metric(metrics, "drumline_job_loss{job=\"native/demo\"}", |loss| loss > 0.0).await;
    containers.slow(false);
    let done = admin.wait(T, "demo", "done", |s| phase(s) == "succeeded").await;
    assert_eq!((&done["attempt"], &done["reason"]), (&json!(2), &json!("Completed")), "{done}");
    assert_eq!(done["step"], STEPS, "{done}");
    let loss: f64 = done["loss"].as_str().unwrap().parse().unwrap();
    assert!(loss > 0.0 && loss < 5.0, "an untrained model's is ln 300 = 5.7: {loss}");

    served(&admin, port, metrics).await;
    second.stop().await;
}

/// Serves the trained model, through a gateway that may ask the operator and through one that may
/// not.
async fn served(admin: &Admin, port: u16, metrics: u16) {
    let service = json!({
        "model": "run", "servedName": "demo", "parallelism": { "tensor": 2 },
        "maxContext": 64, "maxBatch": 2,
    });
    admin.apply(S, "demo", service).await.unwrap();
    admin.wait(S, "demo", "running", |s| phase(s) == "running").await;
    let keys: Api<Secret> = Api::namespaced(admin.client.clone(), "drumline-system");
    let keys = keys.get(drumline_operator::ranks::keys::NAME).await.unwrap();
    let certificate = String::from_utf8(keys.data.unwrap()["tls.crt"].0.clone()).unwrap();
    let stranger = gateway(admin, port, &certificate, "stranger").await;
    let allowed = gateway(admin, port, &certificate, "gateway").await;
    let roles: Api<ClusterRole> = Api::all(admin.client.clone());
    let mut role: ClusterRole = serde_json::from_value(deploy::gateway_role()).unwrap();
    // Under another name than the chart's, which a test installs beside it.
    role.metadata.name = Some("test-gateway".to_owned());
    roles.create(&PostParams::default(), &role).await.unwrap();
    let binding: ClusterRoleBinding = serde_json::from_value(json!({
        "metadata": { "name": "test-gateway" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                     "name": "test-gateway" },
        "subjects": [{ "kind": "ServiceAccount", "name": "gateway", "namespace": "native" }],
    }))
    .unwrap();
    let bindings: Api<ClusterRoleBinding> = Api::all(admin.client.clone());
    bindings.create(&PostParams::default(), &binding).await.unwrap();
    let mut answer = Value::Null;
    for _ in 0..1200 {
        answer = complete(allowed).await;
        if answer["choices"].is_array() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(answer["usage"]["completion_tokens"], 8, "{answer}");
    let refused = complete(stranger).await;
    assert!(refused["choices"].is_null(), "{refused}");
    replicated(admin, allowed, metrics).await;
}

/// Scales the service: by hand, with a replica lost, and by what is asked of it.
async fn replicated(admin: &Admin, gateway: SocketAddr, metrics: u16) {
    admin.add_node("b", 0, "2").await;
    let scale = |replicas: u32| {
        let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        let services = admin.jobs(S);
        async move { services.patch_scale("demo", &PatchParams::default(), &patch).await }
    };
    assert_eq!(scale(2).await.unwrap().spec.unwrap().replicas, Some(2));
    admin.wait(S, "demo", "two serve", |s| s["readyReplicas"] == 2).await;
    let ready = "drumline_service_ready{service=\"native/demo\"}";
    until_metric(metrics, ready, |ready| (ready - 2.0).abs() < 0.1).await;
    let replica = admin.jobs(S).get("demo-1").await.unwrap();
    assert_eq!(replica.metadata.owner_references.unwrap()[0].name, "demo");
    let all = ListParams::default().labels("drumline.dev/service=demo");
    assert_eq!(admin.pods().list(&all).await.unwrap().items.len(), 4, "two gangs of two");

    // The first gang loses a pod: the other one answers meanwhile.
    admin.pods().delete("demo-s1-0", &DeleteParams::default()).await.unwrap();
    let mut answered = 0;
    for _ in 0..400 {
        let answer = complete(gateway).await;
        assert!(
            answer["choices"].is_array() || answer["error"]["code"] == "model_unavailable",
            "{answer}"
        );
        answered += u32::from(answer["choices"].is_array());
        let status = admin.status(S, "demo").await;
        if status["attempt"] == 2 && phase(&status) == "running" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(answered > 0);
    admin.wait(S, "demo", "two serve again", |s| s["readyReplicas"] == 2).await;
    scale(1).await.unwrap();
    admin.wait(S, "demo", "one is left", |s| s["replicas"] == 1).await;

    // More than a batch is asked for all the time: another one starts, and goes when it is quiet.
    let rule = json!({ "spec": { "autoscale": { "max": 2, "waiting": 0, "downAfter": "2s" } } });
    admin.jobs(S).patch("demo", &PatchParams::default(), &Patch::Merge(&rule)).await.unwrap();
    let told = scale(2).await.unwrap_err().to_string();
    assert!(told.contains("autoscale decides"), "{told}");
    let asking: Vec<_> = (0..6)
        .map(|_| {
            tokio::spawn(async move {
                loop {
                    complete(gateway).await;
                }
            })
        })
        .collect();
    admin.wait(S, "demo", "another one serves", |s| s["readyReplicas"] == 2).await;
    asking.iter().for_each(tokio::task::JoinHandle::abort);
    admin.wait(S, "demo", "it is gone", |s| s["replicas"] == 1).await;
}

const KEY: &str = "a-key-of-the-gateway-0123456789";

/// Starts a gateway as a service account.
async fn gateway(admin: &Admin, port: u16, certificate: &str, account: &str) -> SocketAddr {
    let accounts: Api<ServiceAccount> = Api::namespaced(admin.client.clone(), &admin.namespace);
    let mut made = ServiceAccount::default();
    made.metadata.name = Some(account.to_owned());
    accounts.create(&PostParams::default(), &made).await.unwrap();
    let request = TokenRequest {
        spec: TokenRequestSpec { audiences: vec![AUDIENCE.to_owned()], ..Default::default() },
        ..TokenRequest::default()
    };
    let token =
        accounts.create_token_request(account, &PostParams::default(), &request).await.unwrap();
    let token = Token::new(&token.status.unwrap().token).unwrap();
    let (ready, listening) = tokio::sync::oneshot::channel();
    let options = drumline_gateway::Options {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        allow_hosts: Vec::new(),
        control: Arc::new(move || Ok(format!("https://127.0.0.1:{port}"))),
        control_ca: Some(certificate.to_owned()),
        credential: Credential::Fixed(token),
        keys: vec![Token::new(KEY).unwrap()],
        in_pod: None,
    };
    // It ends with the test's runtime.
    tokio::spawn(drumline_gateway::run(options, ready, CancellationToken::new()));
    listening.await.unwrap()
}

/// Asks for eight tokens.
async fn complete(gateway: SocketAddr) -> Value {
    let body = json!({ "model": "demo", "prompt": "line 1", "max_tokens": 8, "temperature": 0,
                       "ignore_eos": true })
    .to_string();
    let text = fetch(gateway, "POST /v1/completions", &body).await;
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    serde_json::from_str(body).unwrap_or_else(|_| json!({ "raw": text }))
}

/// Returns an answer with its head.
async fn fetch(server: SocketAddr, what: &str, body: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let request = format!(
        "{what} HTTP/1.1\r\nHost: {server}\r\nAuthorization: Bearer {KEY}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut text = String::new();
    let Ok(mut stream) = tokio::net::TcpStream::connect(server).await else { return text };
    if stream.write_all(request.as_bytes()).await.is_ok() {
        let _ = stream.read_to_string(&mut text).await;
    }
    text
}
