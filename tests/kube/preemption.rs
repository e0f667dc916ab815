//! Gangs that leave for others: whole, told apart from failures, their devices theirs until the last
//! pod is gone.

use std::collections::BTreeMap;
use std::time::Duration;

use drumline_spec::JobKind;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, DynamicObject, EvictParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::cluster::{Admin, OPERATOR, cluster};
use crate::kubelet::Kubelets;
use crate::operator::Operator;

const C: JobKind = JobKind::CommandJob;

fn gang(ranks: u32, priority: i32) -> Value {
    json!({ "argv": ["x"], "ranks": ranks, "priority": priority,
            "resources": { "device": "gpu" }, "restarts": { "limit": 1, "backoff": "100ms" } })
}

fn phase(status: &Value) -> &str {
    status["phase"].as_str().unwrap_or_default()
}

/// Watches from outside that no node has more GPUs promised than it has, until it is dropped.
struct Watcher(tokio::task::JoinHandle<()>);

impl Watcher {
    fn start(admin: &Admin, per_node: u32) -> Self {
        let pods: Api<Pod> = admin.pods();
        Self(tokio::spawn(async move {
            loop {
                let mut taken: BTreeMap<String, u32> = BTreeMap::new();
                for pod in pods.list(&ListParams::default()).await.unwrap() {
                    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
                    let is_over = matches!(phase, Some("Succeeded" | "Failed"));
                    if let Some(node) =
                        pod.spec.and_then(|spec| spec.node_name).filter(|_| !is_over)
                    {
                        *taken.entry(node).or_default() += 1;
                    }
                }
                assert!(taken.values().all(|count| *count <= per_node), "{taken:?}");
                tokio::time::sleep(Duration::from_millis(15)).await;
            }
        }))
    }

    /// Ends the watch.
    fn end(self) {
        assert!(!self.0.is_finished(), "a device was promised twice");
        self.0.abort();
    }
}

/// Waits until an event with this reason is told of a job: that is after its status is written.
async fn until_told(admin: &Admin, job: &str, reason: &str) {
    let events: Api<k8s_openapi::api::events::v1::Event> =
        Api::namespaced(admin.client.clone(), &admin.namespace);
    for _ in 0..600 {
        let all = events.list(&ListParams::default()).await.unwrap();
        let is_told = all.iter().any(|event| {
            let about = event.regarding.as_ref().and_then(|about| about.name.as_deref());
            about == Some(job) && event.reason.as_deref() == Some(reason)
        });
        if is_told {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{reason} is not told of {job}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gang_of_higher_priority_takes_the_devices_of_whole_gangs() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "preempts").await;
    for node in ["a", "b"] {
        admin.add_node(node, 4, "16").await;
    }
    // A budget under which not all of a gang may go keeps it where it is. It is there first: when an
    // operator that runs would have seen it, nobody knows.
    let budget: PodDisruptionBudget = serde_json::from_value(json!({
        "metadata": { "name": "safe" },
        "spec": { "minAvailable": 2, "selector": { "matchLabels": { "drumline.dev/job": "safe" } } },
    }))
    .unwrap();
    let budgets: Api<PodDisruptionBudget> = Api::namespaced(admin.client.clone(), "preempts");
    budgets.create(&PostParams::default(), &budget).await.unwrap();
    // What the controller manager counts, where it runs.
    let counted = json!({ "status": { "disruptionsAllowed": 2, "currentHealthy": 4,
                                      "desiredHealthy": 2, "expectedPods": 4 } });
    let params = PatchParams::default();
    budgets.patch_status("safe", &params, &Patch::Merge(&counted)).await.unwrap();
    let _kubelets = Kubelets::start(admin.client.clone());
    let watcher = Watcher::start(&admin, 4);
    let operator = Operator::start(cluster.config(OPERATOR).await, "preempts");
    for job in ["low", "safe"] {
        admin.apply(C, job, gang(4, 0)).await.unwrap();
        admin.wait(C, job, "running", |s| phase(s) == "running").await;
    }
    admin.apply(C, "high", gang(4, 5000)).await.unwrap();
    admin.wait(C, "high", "running", |s| phase(s) == "running").await;
    let low = admin.wait(C, "low", "waiting", |s| phase(s) == "pending").await;
    assert_eq!((&low["restarts"], &low["fruitless"]), (&json!(0), &json!(0)), "{low}");
    until_told(&admin, "low", "Preempted").await;
    assert_eq!(phase(&admin.status(C, "safe").await), "running");
    assert_eq!(admin.status(C, "safe").await["attempt"], 1);
    // What was preempted goes on when there is room again, under the same limit of restarts.
    admin.jobs(C).delete("high", &Default::default()).await.unwrap();
    let again =
        admin.wait(C, "low", "running again", |s| phase(s) == "running" && s["attempt"] == 2).await;
    assert_eq!(again["fruitless"], 0);
    watcher.end();
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_moves_its_gang_and_holds_nothing_against_it() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "drained").await;
    for node in ["a", "b"] {
        admin.add_node(node, 2, "8").await;
    }
    let _kubelets = Kubelets::start(admin.client.clone());
    let watcher = Watcher::start(&admin, 2);
    let operator = Operator::start(cluster.config(OPERATOR).await, "drained");
    admin.apply(C, "demo", gang(2, 0)).await.unwrap();
    admin.wait(C, "demo", "running", |s| phase(s) == "running").await;
    let pod = admin.pods().get("demo-c1-0").await.unwrap();
    let node = pod.spec.unwrap().node_name.unwrap();
    // What `kubectl drain` does: the node is cordoned, and its pods are evicted.
    admin.nodes().cordon(&node).await.unwrap();
    admin.pods().evict("demo-c1-0", &EvictParams::default()).await.unwrap();
    let moved = admin
        .wait(C, "demo", "running elsewhere", |s| phase(s) == "running" && s["attempt"] == 2)
        .await;
    assert_eq!(moved["fruitless"], 0, "{moved}");
    until_told(&admin, "demo", "Moved").await;
    for pod in admin.pods().list(&ListParams::default()).await.unwrap() {
        assert_ne!(pod.spec.unwrap().node_name.as_deref(), Some(node.as_str()));
    }
    watcher.end();
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_lent_its_devices_takes_them_back_and_tells_what_stands_in_it() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "reclaims").await;
    admin.add_node("a", 4, "16").await;
    let queues: Api<DynamicObject> =
        Api::all_with(admin.client.clone(), &drumline_operator::job::resource_named("Queue"));
    for (name, spec) in [
        ("all", json!({ "quota": { "gpu": 4 } })),
        ("owner", json!({ "parent": "all", "quota": { "gpu": 4 } })),
        ("guest", json!({ "parent": "all", "quota": { "gpu": 0 } })),
    ] {
        let mut queue = DynamicObject::new(name, &drumline_operator::job::resource_named("Queue"));
        queue.data = json!({ "spec": spec });
        queues.create(&PostParams::default(), &queue).await.unwrap();
    }
    let _kubelets = Kubelets::start(admin.client.clone());
    let watcher = Watcher::start(&admin, 4);
    let operator = Operator::start(cluster.config(OPERATOR).await, "reclaims");
    let of = |queue: &str| {
        let mut spec = gang(4, 0);
        spec["queue"] = json!(queue);
        spec
    };
    admin.apply(C, "guest", of("guest")).await.unwrap();
    admin.wait(C, "guest", "running", |s| phase(s) == "running").await;
    admin.apply(C, "owner", of("owner")).await.unwrap();
    admin.wait(C, "owner", "running", |s| phase(s) == "running").await;
    until_told(&admin, "guest", "Reclaimed").await;
    let wanted = [("guest", json!([1, 0])), ("owner", json!([0, 1]))];
    let mut told = Vec::new();
    for _ in 0..1200 {
        told.clear();
        for (name, _) in &wanted {
            let status = queues.get(name).await.unwrap().data["status"].clone();
            told.push((*name, json!([status["pending"], status["running"]])));
        }
        if told == wanted {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(told, wanted);
    watcher.end();
    operator.stop().await;
    for name in ["owner", "guest", "all"] {
        queues.delete(name, &Default::default()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spares_are_lent_and_taken_back_when_their_node_is_needed() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "spares").await;
    for node in ["a", "b"] {
        admin.add_node(node, 2, "16").await;
    }
    let _kubelets = Kubelets::start(admin.client.clone());
    let watcher = Watcher::start(&admin, 2);
    let operator = Operator::start(cluster.config(OPERATOR).await, "spares");
    let mut kept = gang(2, 0);
    kept["resources"]["spares"] = json!(2);
    admin.apply(C, "kept", kept).await.unwrap();
    admin.wait(C, "kept", "running", |s| phase(s) == "running").await;
    let node_of = async |job: &str, attempt: u32| {
        let pod = admin.pods().get(&format!("{job}-c{attempt}-0")).await.unwrap();
        pod.spec.unwrap().node_name.unwrap()
    };
    let home = node_of("kept", 1).await;

    // Who can be ended at once may use the spares meanwhile; who cannot waits.
    let mut stays = gang(1, 0);
    stays["scheduling"] = json!({ "preemptible": false });
    admin.apply(C, "stays", stays).await.unwrap();
    let told = admin.wait(C, "stays", "waits", |s| s["reason"] == "WaitingForDevices").await;
    assert_eq!(phase(&told), "pending");
    admin.apply(C, "guest", gang(2, 0)).await.unwrap();
    admin.wait(C, "guest", "running", |s| phase(s) == "running").await;
    assert_ne!(node_of("guest", 1).await, home);

    // The node of the gang dies: it goes on where its spares are, and the guest leaves for it.
    admin.mark_node(&home, false).await;
    admin.wait(C, "kept", "running again", |s| phase(s) == "running" && s["attempt"] == 2).await;
    assert_ne!(node_of("kept", 2).await, home);
    until_told(&admin, "guest", "Reclaimed").await;
    watcher.end();
    operator.stop().await;
}
