//! Services of several replicas as objects of the API: who owns whom, who goes with whom, and what
//! stands in the way. That they serve is shown in `native`.

use std::time::Duration;

use drumline_spec::JobKind;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::cluster::{Admin, OPERATOR, cluster};
use crate::kubelet::Kubelets;
use crate::operator::Operator;

const S: JobKind = JobKind::ModelService;

fn service(replicas: u32) -> Value {
    json!({ "model": "m", "replicas": replicas, "resources": { "device": "gpu" } })
}

async fn names(admin: &Admin) -> Vec<String> {
    let all = admin.jobs(S).list(&ListParams::default()).await.unwrap().items;
    all.into_iter().filter_map(|one| one.metadata.name).collect()
}

async fn until_names(admin: &Admin, expected: &[&str]) {
    let mut found = Vec::new();
    for _ in 0..2400 {
        found = names(admin).await;
        if found == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{found:?}, expected {expected:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_come_and_go_with_their_service() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "replicas").await;
    admin.add_node("a", 8, "16").await;
    let _kubelets = Kubelets::start(admin.client.clone());
    // Somebody else's object has the name of a replica.
    admin.apply(S, "chat-2", service(1)).await.unwrap();
    let operator = Operator::start(cluster.config(OPERATOR).await, "replicas");
    admin.apply(S, "chat", service(4)).await.unwrap();
    until_names(&admin, &["chat", "chat-1", "chat-2", "chat-3"]).await;
    let foreign = admin.jobs(S).get("chat-2").await.unwrap();
    assert!(foreign.metadata.owner_references.is_none(), "{foreign:?}");
    admin.wait(S, "chat", "what there is", |s| s["replicas"] == 3).await;
    // Once its name is free it is made.
    admin.jobs(S).delete("chat-2", &DeleteParams::default()).await.unwrap();
    admin.wait(S, "chat", "all there are", |s| s["replicas"] == 4).await;
    let scale = admin.jobs(S).get_scale("chat").await.unwrap();
    let status = scale.status.unwrap();
    assert_eq!((scale.spec.unwrap().replicas, status.replicas), (Some(4), 4));
    assert_eq!(status.selector.as_deref(), Some("drumline.dev/service=chat"));
    let replica = admin.jobs(S).get("chat-2").await.unwrap();
    assert_eq!(replica.data["spec"]["servedName"], "chat");
    assert_eq!(replica.data["spec"]["replicas"], 1);
    assert_eq!(replica.metadata.labels.unwrap()["drumline.dev/replica"], "2");

    // Queue and priority are followed.
    let patch = Patch::Merge(json!({ "spec": { "priority": 7, "replicas": 3 } }));
    admin.jobs(S).patch("chat", &PatchParams::default(), &patch).await.unwrap();
    admin.wait(S, "chat", "one fewer", |s| s["replicas"] == 3).await;
    for _ in 0..2400 {
        let replica = admin.jobs(S).get("chat-1").await.unwrap();
        if replica.data["spec"]["priority"] == 7 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(admin.jobs(S).get("chat-1").await.unwrap().data["spec"]["priority"], 7);

    // A replica that somebody deletes is made again.
    let before = admin.jobs(S).get("chat-1").await.unwrap().metadata.uid;
    admin.jobs(S).delete("chat-1", &DeleteParams::default()).await.unwrap();
    for _ in 0..2400 {
        let now = admin.jobs(S).get_opt("chat-1").await.unwrap();
        if now.is_some_and(|now| now.metadata.uid != before) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_ne!(admin.jobs(S).get("chat-1").await.unwrap().metadata.uid, before);

    admin.jobs(S).delete("chat", &DeleteParams::default()).await.unwrap();
    until_names(&admin, &[]).await;
    for _ in 0..2400 {
        if admin.pods().list(&ListParams::default()).await.unwrap().items.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(admin.pods().list(&ListParams::default()).await.unwrap().items.is_empty());
    operator.stop().await;
}
