//! `drumline` commands against a cluster, with the rights of a user who is no administrator: the
//! control API that they call, over a real API server.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use drumline_operator::{admission, front};
use drumline_spec::JobKind;
use drumline_wire::v1;
use drumline_wire::v1::control_client::ControlClient;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, RoleBinding};
use kube::Config;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::config::KubeConfigOptions;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use tonic::transport::Channel;

use crate::cluster::{ADMIN, Admin, Cluster, OPERATOR, cluster};
use crate::kubelet::{Kubelets, finish};
use crate::operator::Operator;

const SPACE: &str = "front";
const C: JobKind = JobKind::CommandJob;
/// What the kubelet of the test has kept of a rank.
const LOG: &str = "first line\nsecond line\n";

/// Two jobs and a queue as a user's file has them: with what only a cluster reads.
const MANIFESTS: &str = "\
apiVersion: drumline.dev/v1alpha1
kind: CommandJob
metadata:
  name: hello
  annotations: {drumline.dev/image: 'python:3.12-slim'}
spec:
  argv: [python, '-c', 'print(1)']
  ranks: 2
  resources: {device: gpu}
---
apiVersion: drumline.dev/v1alpha1
kind: CommandJob
metadata: {name: large}
spec: {argv: ['true'], ranks: 64, resources: {device: gpu}}
";

async fn control(cluster: &Cluster, user: &str) -> ControlClient<Channel> {
    let mut kubeconfig = cluster.kubeconfig(ADMIN);
    kubeconfig.auth_infos[0].auth_info.as_mut().unwrap().impersonate = Some(user.to_owned());
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
    ControlClient::new(front::over(config, SPACE.to_owned()).await.unwrap())
}

/// Binds a user to what `edit` means to Drumline in the test's namespace; there is no controller
/// manager here that would aggregate it.
async fn grant(admin: &Admin, user: &str) {
    let [edit, view, fleet] = &admission::roles()[..] else { panic!("three roles") };
    let rules: Vec<Value> = [edit, view]
        .into_iter()
        .flat_map(|role| role["rules"].as_array().unwrap().clone())
        .chain([
            json!({ "apiGroups": [""], "resources": ["pods", "pods/log"], "verbs": ["get", "list"] }),
            json!({ "apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["get", "list"] }),
        ])
        .collect();
    let subject =
        json!([{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user }]);
    let bound = |role: &str| {
        json!({
            "metadata": { "name": role },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
            "subjects": subject,
        })
    };
    let roles: Api<ClusterRole> = Api::all(admin.client.clone());
    for (name, rules) in [("front-edit", json!(rules)), ("front-fleet", fleet["rules"].clone())] {
        let role = json!({ "metadata": { "name": name }, "rules": rules });
        let role = serde_json::from_value(role).unwrap();
        roles.create(&PostParams::default(), &role).await.unwrap();
    }
    let here: Api<RoleBinding> = Api::namespaced(admin.client.clone(), SPACE);
    let binding = serde_json::from_value(bound("front-edit")).unwrap();
    here.create(&PostParams::default(), &binding).await.unwrap();
    let everywhere: Api<ClusterRoleBinding> = Api::all(admin.client.clone());
    let binding = serde_json::from_value(bound("front-fleet")).unwrap();
    everywhere.create(&PostParams::default(), &binding).await.unwrap();
}

/// Answers for the logs of every pod, as a kubelet does; returns its port.
async fn kubelet_with_logs() -> u16 {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key =
        tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let ring = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = tokio_rustls::rustls::ServerConfig::builder_with_provider(ring)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener =
        tokio::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut asked = vec![0u8; 8192];
                let read = stream.read(&mut asked).await.unwrap_or(0);
                let is_log = asked[..read].starts_with(b"GET /containerLogs/front/");
                let (code, body) = if is_log { ("200 OK", LOG) } else { ("404 Not Found", "") };
                let answer = format!(
                    "HTTP/1.1 {code}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\
                     Connection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    port
}

fn submission(manifests: &str, key: &str, dry_run: bool) -> v1::SubmitRequest {
    v1::SubmitRequest {
        manifests: manifests.to_owned(),
        source_name: "jobs.yaml".to_owned(),
        dry_run,
        user: String::new(),
        idempotency_key: key.to_owned(),
    }
}

fn named(id: &str) -> v1::GetJobRequest {
    v1::GetJobRequest { id: id.to_owned() }
}

async fn until(
    control: &mut ControlClient<Channel>,
    id: &str,
    is_good: impl Fn(&v1::JobView) -> bool,
) -> v1::JobView {
    let mut job = v1::JobView::default();
    for _ in 0..2400 {
        job = control.get_job(named(id)).await.unwrap().into_inner();
        if is_good(&job) {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{id} is not as wanted: {job:#?}");
}

async fn log_of(
    control: &mut ControlClient<Channel>,
    request: v1::LogsRequest,
) -> Result<Vec<v1::LogChunk>, tonic::Status> {
    let mut stream = control.logs(request).await?.into_inner();
    let mut chunks = Vec::new();
    while let Some(chunk) = stream.message().await? {
        chunks.push(chunk);
    }
    Ok(chunks)
}

fn text(chunks: &[v1::LogChunk]) -> String {
    chunks.iter().map(|chunk| String::from_utf8_lossy(&chunk.data)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_submits_sees_reads_and_cancels_with_their_own_rights() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, SPACE).await;
    admin.add_node("a", 2, "8").await;
    let port = kubelet_with_logs().await;
    let reachable = json!({ "status": {
        "addresses": [{ "type": "InternalIP", "address": "127.0.0.1" }],
        "daemonEndpoints": { "kubeletEndpoint": { "Port": port } },
    }});
    let nodes: Api<Node> = admin.nodes();
    nodes.patch_status("a", &PatchParams::default(), &Patch::Merge(&reachable)).await.unwrap();
    grant(&admin, "alice").await;
    let mut alice = control(cluster, "alice").await;

    // A trial stores nothing; a mistake anywhere in the file stores nothing of it.
    let trial = alice.submit(submission(MANIFESTS, "t", true)).await.unwrap().into_inner();
    assert_eq!(trial.jobs.iter().map(|job| job.ranks).collect::<Vec<_>>(), [2, 64]);
    let wrong = MANIFESTS.replace("ranks: 64", "ranks: 0");
    let refused = alice.submit(submission(&wrong, "w", false)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains("spec.ranks"), "{refused}");
    assert!(
        alice.list_jobs(v1::ListJobsRequest::default()).await.unwrap().get_ref().jobs.is_empty()
    );

    let made = alice.submit(submission(MANIFESTS, "one", false)).await.unwrap().into_inner();
    assert_eq!(made.jobs[0].id, "commandjob/hello");
    // The same submission again is the same jobs; another of the same name is refused.
    let again = alice.submit(submission(MANIFESTS, "one", false)).await.unwrap().into_inner();
    assert_eq!(again.jobs, made.jobs);
    let other = alice.submit(submission(MANIFESTS, "two", false)).await.unwrap_err();
    assert_eq!(other.code(), Code::AlreadyExists, "{other}");
    let stored = admin.jobs(C).get("hello").await.unwrap();
    assert_eq!(stored.metadata.annotations.unwrap()["drumline.dev/image"], "python:3.12-slim");

    // Before any operator has looked at it a job says so.
    let job = alice.get_job(named("hello")).await.unwrap().into_inner();
    assert_eq!((job.phase.as_str(), job.reason.as_str()), ("pending", "NotYetConsidered"));
    let refused = log_of(&mut alice, v1::LogsRequest { id: "hello".into(), ..Default::default() });
    assert_eq!(refused.await.unwrap_err().code(), Code::FailedPrecondition);

    let _kubelets = Kubelets::start(admin.client.clone());
    let operator = Operator::start(cluster.config(OPERATOR).await, "front");
    let job = until(&mut alice, "commandjob/hello", |job| job.phase == "running").await;
    assert_eq!(job.ranks.iter().map(|rank| rank.node.as_str()).collect::<Vec<_>>(), ["a", "a"]);
    assert!(job.spec_json.contains("print(1)"), "{}", job.spec_json);
    let waits = until(&mut alice, "large", |job| job.reason != "NotYetConsidered").await;
    assert!(!waits.message.is_empty() && !waits.remedy.is_empty(), "{waits:?}");
    let told = until(&mut alice, "large", |job| !job.events.is_empty()).await;
    assert_eq!(told.events[0].reason, waits.reason);
    let listed = alice.list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.jobs.len(), 2);

    // Logs come from the kubelet, through the API server, whole or from where a reader stopped.
    let request = v1::LogsRequest { id: "hello".into(), rank: Some(1), ..Default::default() };
    let chunks = log_of(&mut alice, request.clone()).await.unwrap();
    assert_eq!((text(&chunks).as_str(), chunks[0].offset), (LOG, 0));
    let rest = v1::LogsRequest { offset: 11, ..request.clone() };
    let chunks = log_of(&mut alice, rest).await.unwrap();
    assert_eq!((text(&chunks).as_str(), chunks[0].offset), ("second line\n", 11));
    let tail = v1::LogsRequest { tail_bytes: 5, ..request };
    assert_eq!(text(&log_of(&mut alice, tail).await.unwrap()), "line\n");

    let nodes = alice.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    let held: Vec<(&str, u32)> = nodes[0]
        .devices
        .iter()
        .filter(|device| device.kind == "gpu")
        .map(|device| (device.job.as_str(), device.rank))
        .collect();
    assert_eq!(held, [("hello", 0), ("hello", 1)]);

    // What is not there names what to use instead.
    let refused = alice.snapshot(v1::SnapshotRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    assert!(refused.message().contains("kubectl get"), "{refused}");
    let scale = |id: &str| v1::ScaleJobRequest { id: id.into(), replicas: 2, user: String::new() };
    let refused = alice.scale_job(scale("hello")).await.unwrap_err();
    assert!(refused.message().contains("CommandJob"), "{refused}");
    let service = "apiVersion: drumline.dev/v1alpha1\nkind: ModelService\nmetadata: {name: chat}\n\
                   spec: {model: m, resources: {device: gpu}}\n";
    alice.submit(submission(service, "chat", false)).await.unwrap();
    alice.scale_job(scale("chat")).await.unwrap();
    until(&mut alice, "chat", |job| job.service.as_ref().unwrap().replicas == 2).await;
    let refused = alice.scale_job(scale("modelservice/chat-1")).await.unwrap_err();
    assert!(refused.message().contains("a replica of chat"), "{refused}");
    let request = v1::CancelJobRequest { id: "chat".into(), user: String::new() };
    alice.cancel_job(request).await.unwrap();
    assert_eq!(alice.get_job(named("nobody")).await.unwrap_err().code(), Code::NotFound);

    // Who may nothing is told by the API server.
    let mut mallory = control(cluster, "mallory").await;
    for refused in [
        mallory.submit(submission(MANIFESTS, "m", false)).await.unwrap_err(),
        mallory.get_job(named("hello")).await.unwrap_err(),
        mallory.list_nodes(v1::ListNodesRequest {}).await.unwrap_err(),
    ] {
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert!(refused.message().contains("mallory"), "{refused}");
    }

    // A watch ends with the job: one that is cancelled, and one whose ranks finish.
    let mut watch = alice.watch_job(named("large")).await.unwrap().into_inner();
    let request = v1::CancelJobRequest { id: "large".into(), user: String::new() };
    let leaves = alice.cancel_job(request).await.unwrap().into_inner();
    assert_eq!(leaves.phase, "cancelling");
    let mut last = v1::JobView::default();
    while let Some(job) = watch.message().await.unwrap() {
        last = job;
    }
    assert_eq!(last.phase, "cancelled");
    for rank in 0..2 {
        finish(&admin.pods(), &format!("hello-c1-{rank}"), 0).await;
    }
    let done = until(&mut alice, "hello", |job| job.phase == "succeeded").await;
    assert!(done.finished_ms > 0 && done.reason == "Completed", "{done:?}");
    operator.stop().await;
}
