//! Gangs on a real API server: bound whole, told, restarted, gone without a trace.

use std::collections::BTreeMap;
use std::time::Duration;

use drumline_spec::JobKind;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};

use crate::cluster::{Admin, OPERATOR, cluster};
use crate::kubelet::{Kubelets, finish};
use crate::operator::Operator;

const C: JobKind = JobKind::CommandJob;

fn gpu_command(ranks: u32) -> Value {
    json!({ "argv": ["sleep", "1000"], "ranks": ranks, "resources": { "device": "gpu" },
            "restarts": { "limit": 3, "backoff": "100ms" } })
}

fn phase(status: &Value) -> &str {
    status["phase"].as_str().unwrap_or_default()
}

/// Counts the GPUs that pods of each node hold, and complains when one is promised twice.
fn check_gpus(pods: &[Pod], per_node: u32) -> BTreeMap<String, u32> {
    let mut taken: BTreeMap<String, u32> = BTreeMap::new();
    for pod in pods {
        let spec = pod.spec.as_ref().unwrap();
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            continue;
        }
        if let Some(node) = &spec.node_name {
            *taken.entry(node.clone()).or_default() += 1;
        }
    }
    for (node, count) in &taken {
        assert!(*count <= per_node, "{node} has {count} of {per_node} GPUs promised");
    }
    taken
}

async fn all_pods(admin: &Admin) -> Vec<Pod> {
    admin.pods().list(&ListParams::default()).await.unwrap().items
}

async fn gone(admin: &Admin, name: &str) {
    for _ in 0..2400 {
        if admin.jobs(C).get_opt(name).await.unwrap().is_none() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{name} is still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gang_is_bound_whole_runs_finishes_and_leaves_nothing() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "whole").await;
    for node in ["a", "b.example.org"] {
        admin.add_node(node, 2, "8").await;
    }
    let _kubelets = Kubelets::start(admin.client.clone());
    let operator = Operator::start(cluster.config(OPERATOR).await, "whole");
    admin.apply(C, "demo", gpu_command(4)).await.unwrap();
    let status = admin.wait(C, "demo", "running", |s| phase(s) == "running").await;
    assert_eq!(status["ready"], "4/4");
    assert_eq!(status["attempt"], 1);
    let pods = all_pods(&admin).await;
    assert_eq!(pods.len(), 4);
    assert_eq!(check_gpus(&pods, 2).len(), 2);
    let pod = admin.pods().get("demo-c1-3").await.unwrap();
    let spec = pod.spec.unwrap();
    assert_eq!(spec.scheduler_name.as_deref(), Some("drumline"));
    assert!(spec.scheduling_gates.unwrap_or_default().is_empty());
    let env: BTreeMap<String, String> = spec.containers[0]
        .env
        .iter()
        .flatten()
        .filter_map(|one| Some((one.name.clone(), one.value.clone()?)))
        .collect();
    for (name, value) in [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "r0.demo-c.whole.svc"),
        ("MASTER_PORT", "29500"),
    ] {
        assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
    }
    let services: Api<Service> = Api::namespaced(admin.client.clone(), "whole");
    assert_eq!(
        services.get("demo-c").await.unwrap().spec.unwrap().cluster_ip.as_deref(),
        Some("None")
    );
    // A second gang waits, with the reason and what is missing.
    admin.apply(C, "second", gpu_command(1)).await.unwrap();
    let waits = admin.wait(C, "second", "waiting", |s| s["reason"] == "WaitingForDevices").await;
    assert_eq!(phase(&waits), "pending");
    assert_eq!(all_pods(&admin).await.len(), 4);
    for rank in 0..4 {
        finish(&admin.pods(), &format!("demo-c1-{rank}"), 0).await;
    }
    let done = admin.wait(C, "demo", "done", |s| phase(s) == "succeeded").await;
    assert_eq!(done["reason"], "Completed");
    let complete = done["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Complete");
    assert_eq!(complete.unwrap()["status"], "True");
    admin.wait(C, "second", "running", |s| phase(s) == "running").await;
    for job in ["demo", "second"] {
        admin.jobs(C).delete(job, &DeleteParams::default()).await.unwrap();
        gone(&admin, job).await;
    }
    assert!(all_pods(&admin).await.is_empty());
    assert!(services.list(&ListParams::default()).await.unwrap().items.is_empty());
    // People see the same reasons in events.
    let events: Api<k8s_openapi::api::events::v1::Event> =
        Api::namespaced(admin.client.clone(), "whole");
    let events = events.list(&ListParams::default()).await.unwrap();
    for reason in ["WaitingForDevices", "StartingRanks", "Completed"] {
        assert!(events.iter().any(|event| event.reason.as_deref() == Some(reason)), "{reason}");
    }
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_under_a_gang_has_it_planned_again_elsewhere() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "node-lost").await;
    for node in ["a", "b", "c"] {
        admin.add_node(node, 2, "8").await;
    }
    let kubelets = Kubelets::start(admin.client.clone());
    let operator = Operator::start(cluster.config(OPERATOR).await, "node-lost");
    admin.apply(C, "demo", gpu_command(4)).await.unwrap();
    admin.wait(C, "demo", "running", |s| phase(s) == "running").await;
    let pod = admin.pods().get("demo-c1-0").await.unwrap();
    let dead = pod.spec.unwrap().node_name.unwrap();
    kubelets.silence(&dead);
    admin.mark_node(&dead, false).await;
    let again = admin
        .wait(C, "demo", "running again", |s| phase(s) == "running" && s["attempt"] == 2)
        .await;
    assert_eq!(again["restarts"], 1);
    // The fleet's fault is not counted against the job.
    assert_eq!(again["fruitless"], 0);
    let taken = check_gpus(&all_pods(&admin).await, 2);
    assert!(!taken.contains_key(&dead), "{taken:?}");
    assert_eq!(taken.values().sum::<u32>(), 4);
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_fails_restarts_its_gang_until_no_restart_is_left() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "rank-fails").await;
    admin.add_node("a", 4, "8").await;
    let _kubelets = Kubelets::start(admin.client.clone());
    let operator = Operator::start(cluster.config(OPERATOR).await, "rank-fails");
    let mut spec = gpu_command(2);
    spec["restarts"]["limit"] = json!(1);
    admin.apply(C, "demo", spec).await.unwrap();
    for attempt in 1..=2 {
        admin
            .wait(C, "demo", "running", |s| phase(s) == "running" && s["attempt"] == attempt)
            .await;
        finish(&admin.pods(), &format!("demo-c{attempt}-1"), 3).await;
    }
    let failed = admin.wait(C, "demo", "failed", |s| phase(s) == "failed").await;
    assert_eq!(failed["reason"], "RestartsExhausted");
    let message = failed["message"].as_str().unwrap();
    assert!(message.contains("rank 1") && message.contains("code 3"), "{message}");
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_other_pods_use_is_not_given_away() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "others").await;
    admin.add_node("a", 4, "8").await;
    let other: Pod = serde_json::from_value(json!({
        "metadata": { "name": "other" },
        "spec": { "nodeName": "a", "containers": [{ "name": "x", "image": "x",
            "resources": { "limits": { "nvidia.com/gpu": "3" } } }] },
    }))
    .unwrap();
    admin.pods().create(&PostParams::default(), &other).await.unwrap();
    let operator = Operator::start(cluster.config(OPERATOR).await, "others");
    admin.apply(C, "demo", gpu_command(2)).await.unwrap();
    let waits = admin.wait(C, "demo", "waiting", |s| s["reason"] == "WaitingForDevices").await;
    assert!(all_pods(&admin).await.len() == 1, "{waits}");
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    admin.pods().delete("other", &now).await.unwrap();
    admin.wait(C, "demo", "starting", |s| phase(s) == "starting" && s["attempt"] == 1).await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gang_whose_pods_cannot_all_be_made_is_taken_back_whole() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "taken-back").await;
    admin.add_node("a", 4, "8").await;
    // Somebody else's pod has the name of rank 2.
    let blocker: Pod = serde_json::from_value(json!({
        "metadata": { "name": "demo-c1-2" },
        "spec": { "containers": [{ "name": "x", "image": "x" }] },
    }))
    .unwrap();
    admin.pods().create(&PostParams::default(), &blocker).await.unwrap();
    let _kubelets = Kubelets::start(admin.client.clone());
    let operator = Operator::start(cluster.config(OPERATOR).await, "taken-back");
    admin.apply(C, "demo", gpu_command(4)).await.unwrap();
    // What it is told in between lasts but for a moment: its events keep it.
    // The next attempt has names of its own.
    let running = admin.wait(C, "demo", "running", |s| phase(s) == "running").await;
    assert_eq!(running["attempt"], 2);
    let events: Api<k8s_openapi::api::events::v1::Event> =
        Api::namespaced(admin.client.clone(), "taken-back");
    let told = |event: &k8s_openapi::api::events::v1::Event| {
        event.note.as_ref().is_some_and(|note| note.contains("taken back whole"))
    };
    assert!(events.list(&ListParams::default()).await.unwrap().iter().any(told));
    let left = all_pods(&admin).await;
    let of_first =
        |pod: &&Pod| pod.metadata.name.as_ref().is_some_and(|name| name.starts_with("demo-c1-"));
    assert_eq!(left.iter().filter(of_first).count(), 1, "only the other pod is left");
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_operators_one_leads_and_the_other_takes_over() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "leaders").await;
    admin.add_node("a", 4, "8").await;
    let _kubelets = Kubelets::start(admin.client.clone());
    let first = Operator::start(cluster.config(OPERATOR).await, "first");
    admin.apply(C, "one", gpu_command(2)).await.unwrap();
    admin.wait(C, "one", "running", |s| phase(s) == "running").await;
    let second = Operator::start(cluster.config(OPERATOR).await, "second");
    first.stop().await;
    admin.apply(C, "two", gpu_command(2)).await.unwrap();
    admin.wait(C, "two", "running", |s| phase(s) == "running").await;
    // Nothing of the first job was touched.
    assert_eq!(admin.status(C, "one").await["attempt"], 1);
    check_gpus(&all_pods(&admin).await, 4);
    second.stop().await;
}
