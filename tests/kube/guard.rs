//! What is promised to gangs is kept from other schedulers by the API server itself, which asks the
//! operator.

use std::time::Duration;

use drumline_operator::guard::NAME;
use drumline_operator::{WhenAway, deploy};
use drumline_spec::JobKind;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{Binding, Pod};
use kube::api::{Api, DeleteParams, PostParams};
use kube::core::Status;
use serde_json::json;

use crate::cluster::{Admin, OPERATOR, cluster, free_port};
use crate::kubelet::Kubelets;
use crate::operator::{Operator, guard, options};

async fn bind(admin: &Admin, pod: &str, node: &str) -> kube::Result<Status> {
    let mut binding = Binding::default();
    binding.metadata.name = Some(pod.to_owned());
    binding.target.kind = Some("Node".to_owned());
    binding.target.name = Some(node.to_owned());
    admin.pods().create_subresource("binding", pod, &PostParams::default(), &binding).await
}

async fn plain(admin: &Admin, name: &str) {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": { "containers": [{ "name": "x", "image": "x", "resources": {
            "limits": { "nvidia.com/gpu": "1" } } }] },
    }))
    .unwrap();
    admin.pods().create(&PostParams::default(), &pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_promised_to_a_gang_is_bound_to_nobody_else() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "guarded").await;
    admin.add_node("a", 2, "8").await;
    let _kubelets = Kubelets::start(admin.client.clone());
    let mut options = options(cluster.config(OPERATOR).await, "guarded");
    options.guard = Some(guard(free_port(), WhenAway::Ignore));
    let operator = Operator::run(options);
    // Without its configuration the guard is not in effect, and gangs wait.
    let spec = json!({ "argv": ["sleep", "1000"], "ranks": 2, "resources": { "device": "gpu" } });
    admin.apply(JobKind::CommandJob, "demo", spec).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let status = admin.status(JobKind::CommandJob, "demo").await;
    assert!(status["attempt"].as_u64().unwrap_or(0) == 0, "bound without a guard: {status}");
    let all: Api<ValidatingWebhookConfiguration> = Api::all(admin.client.clone());
    let empty = serde_json::from_value(deploy::guard()).unwrap();
    all.create(&PostParams::default(), &empty).await.unwrap();
    let is_running = |status: &serde_json::Value| status["phase"] == "running";
    admin.wait(JobKind::CommandJob, "demo", "running", is_running).await;
    admin.add_node("b", 2, "8").await;
    for name in ["p0", "p1", "p2"] {
        plain(&admin, name).await;
    }
    let told = bind(&admin, "p0", "a").await.unwrap_err().to_string();
    assert!(told.contains("nvidia.com/gpu of a is promised: 0 are left of 2"), "{told}");
    bind(&admin, "p0", "b").await.unwrap();
    bind(&admin, "p1", "b").await.unwrap();
    // A node without gangs is left to whoever binds there: its kubelet judges.
    bind(&admin, "p2", "b").await.unwrap();
    // An operator that is away holds up nobody.
    operator.stop().await;
    plain(&admin, "p3").await;
    bind(&admin, "p3", "a").await.unwrap();
    all.delete(NAME, &DeleteParams::default()).await.unwrap();
}
