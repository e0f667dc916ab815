//! Nodes with devices of several resources: whole GPUs, MIG instances, another maker's. A rank asks for
//! the one that its plan gave it, and each resource is counted for itself.

use std::collections::BTreeMap;

use drumline_operator::guard::NAME;
use drumline_operator::{GpuResource, WhenAway, deploy, front};
use drumline_spec::JobKind;
use drumline_wire::v1;
use drumline_wire::v1::control_client::ControlClient;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{Binding, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::Status;
use serde_json::{Value, json};

use crate::cluster::{ADMIN, Admin, OPERATOR, cluster, free_port};
use crate::kubelet::Kubelets;
use crate::operator::{Operator, guard, options};

const C: JobKind = JobKind::CommandJob;
const GPU: &str = "nvidia.com/gpu";
const MIG: &str = "nvidia.com/mig-1g.10gb";
const AMD: &str = "amd.com/gpu";

pub(crate) fn command(ranks: u32, models: &[&str]) -> Value {
    let mut spec = json!({ "argv": ["sleep", "1000"], "ranks": ranks,
        "resources": { "device": "gpu" }, "restarts": { "limit": 3, "backoff": "100ms" } });
    if !models.is_empty() {
        spec["resources"]["models"] = json!(models);
    }
    spec
}

pub(crate) fn is_running(status: &Value) -> bool {
    status["phase"] == "running"
}

fn waits(status: &Value) -> bool {
    status["reason"] == "WaitingForDevices"
}

/// Adds a node that offers these resources.
async fn add_node(admin: &Admin, name: &str, labels: Value, offers: &[(&str, u32)]) {
    admin.add_node(name, 0, "8").await;
    let params = PatchParams::default();
    let labelled = json!({ "metadata": { "labels": labels } });
    admin.nodes().patch(name, &params, &Patch::Merge(&labelled)).await.unwrap();
    let amounts: BTreeMap<_, _> =
        offers.iter().map(|(name, count)| (*name, count.to_string())).collect();
    let status = json!({ "status": { "capacity": amounts, "allocatable": amounts } });
    admin.nodes().patch_status(name, &params, &Patch::Merge(&status)).await.unwrap();
}

/// What a pod's containers are limited to, but for processors and memory.
fn limits(pod: &Pod) -> BTreeMap<String, String> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let limits = containers.filter_map(|one| one.resources.as_ref()?.limits.clone()).flatten();
    limits.map(|(name, quantity)| (name, quantity.0)).collect()
}

/// Adds up what the pods of every node ask for, and complains when more is promised than it offers.
async fn check(admin: &Admin) -> BTreeMap<(String, String), u32> {
    let mut taken: BTreeMap<(String, String), u32> = BTreeMap::new();
    let everywhere: Api<Pod> = Api::all(admin.client.clone());
    for pod in everywhere.list(&ListParams::default()).await.unwrap() {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        if let (Some(node), false) = (node, matches!(phase, Some("Succeeded" | "Failed"))) {
            for (name, amount) in limits(&pod) {
                *taken.entry((node.clone(), name)).or_default() += amount.parse::<u32>().unwrap();
            }
        }
    }
    for ((node, resource), count) in &taken {
        let node = admin.nodes().get(node).await.unwrap();
        let offered = node.status.unwrap().allocatable.unwrap()[resource].0.parse::<u32>().unwrap();
        assert!(*count <= offered, "{count} of {offered} {resource} are promised");
    }
    taken
}

/// Every rank of an attempt asks for one unit of one resource.
async fn assert_asks(admin: &Admin, job: &str, attempt: u32, ranks: u32, resource: &str) {
    for rank in 0..ranks {
        let pod = admin.pods().get(&format!("{job}-c{attempt}-{rank}")).await.unwrap();
        let wanted = BTreeMap::from([(resource.to_owned(), "1".to_owned())]);
        assert_eq!(limits(&pod), wanted, "rank {rank} of {job}");
    }
}

async fn plain(admin: &Admin, name: &str, resource: &str) {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": { "containers": [{ "name": "x", "image": "x", "resources": {
            "limits": { resource: "1" } } }] },
    }))
    .unwrap();
    admin.pods().create(&PostParams::default(), &pod).await.unwrap();
}

async fn bind(admin: &Admin, pod: &str, node: &str) -> kube::Result<Status> {
    let mut binding = Binding::default();
    binding.metadata.name = Some(pod.to_owned());
    binding.target.kind = Some("Node".to_owned());
    binding.target.name = Some(node.to_owned());
    admin.pods().create_subresource("binding", pod, &PostParams::default(), &binding).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_gpus_and_instances_of_one_node_are_asked_for_by_their_own_names() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "mixed-node").await;
    let product = json!({ "nvidia.com/gpu.product": "A100-SXM4-80GB" });
    add_node(&admin, "a", product, &[(GPU, 2), (MIG, 4)]).await;
    // Another scheduler's pod has one of the instances.
    plain(&admin, "other", MIG).await;
    bind(&admin, "other", "a").await.unwrap();
    let _kubelets = Kubelets::start(admin.client.clone());
    let all: Api<ValidatingWebhookConfiguration> = Api::all(admin.client.clone());
    let empty = serde_json::from_value(deploy::guard()).unwrap();
    all.create(&PostParams::default(), &empty).await.unwrap();
    let mut options = options(cluster.config(OPERATOR).await, "mixed-node");
    options.guard = Some(guard(free_port(), WhenAway::Ignore));
    let operator = Operator::run(options);

    // Instances are free, and nobody who names none gets one, nor who names the card.
    admin.apply(C, "whole", command(2, &[])).await.unwrap();
    admin.wait(C, "whole", "running", is_running).await;
    assert_asks(&admin, "whole", 1, 2, GPU).await;
    admin.apply(C, "late", command(1, &["a100"])).await.unwrap();
    admin.wait(C, "late", "waiting", waits).await;
    admin.apply(C, "slices", command(3, &["1g.10gb"])).await.unwrap();
    admin.wait(C, "slices", "running", is_running).await;
    assert_asks(&admin, "slices", 1, 3, MIG).await;
    let key = |resource: &str| ("a".to_owned(), resource.to_owned());
    let taken = check(&admin).await;
    assert_eq!((taken[&key(GPU)], taken[&key(MIG)]), (2, 4), "{taken:?}");

    // Bindings of others are judged by the resource that they want.
    plain(&admin, "late-mig", MIG).await;
    let told = bind(&admin, "late-mig", "a").await.unwrap_err().to_string();
    assert!(told.contains(&format!("{MIG} of a is promised: 0 are left of 4")), "{told}");

    // A kubelet that has not what its node says takes the gang down, and it comes again.
    let refused = json!({ "status": { "phase": "Failed", "reason": format!("OutOf{MIG}") } });
    let params = PatchParams::default();
    admin.pods().patch_status("slices-c1-1", &params, &Patch::Merge(&refused)).await.unwrap();
    let again = |status: &Value| is_running(status) && status["attempt"] == 2;
    let status = admin.wait(C, "slices", "running again", again).await;
    assert_eq!((&status["restarts"], &status["fruitless"]), (&json!(1), &json!(0)));
    assert_asks(&admin, "slices", 2, 3, MIG).await;
    check(&admin).await;

    // What one job leaves goes to who waits for just that.
    admin.apply(C, "more", command(1, &["A100-SXM4-80GB-MIG-1g.10gb"])).await.unwrap();
    admin.wait(C, "more", "waiting", waits).await;
    admin.jobs(C).delete("whole", &DeleteParams::default()).await.unwrap();
    admin.wait(C, "late", "running", is_running).await;
    assert_asks(&admin, "late", 1, 1, GPU).await;
    assert!(waits(&admin.status(C, "more").await));
    admin.jobs(C).delete("slices", &DeleteParams::default()).await.unwrap();
    admin.wait(C, "more", "running", is_running).await;
    bind(&admin, "late-mig", "a").await.unwrap();
    let taken = check(&admin).await;
    assert_eq!((taken[&key(GPU)], taken[&key(MIG)]), (1, 3), "{taken:?}");
    operator.stop().await;
    all.delete(NAME, &DeleteParams::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_makers_devices_are_had_by_the_model_that_the_administrator_named() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "makers").await;
    let product = json!({ "nvidia.com/gpu.product": "H100" });
    add_node(&admin, "a", product, &[(GPU, 2), (MIG, 1)]).await;
    add_node(&admin, "b", json!({}), &[(AMD, 2)]).await;
    let _kubelets = Kubelets::start(admin.client.clone());
    let mut options = options(cluster.config(OPERATOR).await, "makers");
    let gpus = ["nvidia.com/gpu", "amd.com/gpu=MI300X:192Gi"].map(str::to_owned);
    options.fleet.devices.gpus = GpuResource::parse_all(&gpus).unwrap();
    let operator = Operator::run(options);
    // Never of two models, though there are four GPUs.
    admin.apply(C, "four", command(4, &[])).await.unwrap();
    let refused = |status: &Value| status["reason"] == "ExceedsCluster";
    admin.wait(C, "four", "too large", refused).await;
    admin.apply(C, "amd", command(2, &["MI300X"])).await.unwrap();
    admin.wait(C, "amd", "running", is_running).await;
    assert_asks(&admin, "amd", 1, 2, AMD).await;
    admin.apply(C, "nvidia", command(2, &["h100"])).await.unwrap();
    admin.wait(C, "nvidia", "running", is_running).await;
    assert_asks(&admin, "nvidia", 1, 2, GPU).await;
    check(&admin).await;
    // People see every one of them, and who holds it.
    let channel = front::over(cluster.config(ADMIN).await, "makers".to_owned()).await.unwrap();
    let answer = ControlClient::new(channel).list_nodes(v1::ListNodesRequest {}).await.unwrap();
    let mut shown: Vec<String> = Vec::new();
    for node in answer.into_inner().nodes {
        for device in node.devices.iter().filter(|device| device.kind == "gpu") {
            shown.push(format!("{} {} {}", node.name, device.model, device.job));
        }
    }
    assert_eq!(
        shown,
        [
            "a H100 nvidia",
            "a H100 nvidia",
            "a H100-MIG-1g.10gb ",
            "b amd.com/gpu amd",
            "b amd.com/gpu amd"
        ]
    );
    operator.stop().await;
}
