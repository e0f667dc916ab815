//! What the API server itself refuses, asked as users who are not administrators.

use std::time::Duration;

use drumline_operator::admission;
use drumline_spec::JobKind;
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::config::KubeConfigOptions;
use kube::{Client, Config};
use serde_json::{Value, json};

use crate::cluster::{ADMIN, Admin, Cluster, OPERATOR, cluster};

const C: JobKind = JobKind::CommandJob;

/// Returns the administrator's rights to speak as another user.
async fn speaking_as(cluster: &Cluster, user: &str) -> Client {
    let mut kubeconfig = cluster.kubeconfig(ADMIN);
    kubeconfig.auth_infos[0].auth_info.as_mut().unwrap().impersonate = Some(user.to_owned());
    let options = KubeConfigOptions::default();
    Client::try_from(Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap()).unwrap()
}

fn in_queue(queue: &str) -> Value {
    json!({ "argv": ["true"], "ranks": 1, "queue": queue })
}

fn pod(name: &str, spec: Value, labels: Value) -> Pod {
    let mut whole = json!({ "containers": [{ "name": "x", "image": "x" }] });
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(json!({ "metadata": { "name": name, "labels": labels }, "spec": whole }))
        .unwrap()
}

/// Puts the policies in force for this test, and waits until they are.
async fn policies(admin: &Admin) {
    let policies: Api<ValidatingAdmissionPolicy> = Api::all(admin.client.clone());
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(admin.client.clone());
    for value in admission::all() {
        if value["kind"] == "ValidatingAdmissionPolicy" {
            let policy = serde_json::from_value(value).unwrap();
            policies.create(&PostParams::default(), &policy).await.unwrap();
        } else {
            let binding = serde_json::from_value(value).unwrap();
            bindings.create(&PostParams::default(), &binding).await.unwrap();
        }
    }
}

async fn no_policies(admin: &Admin) {
    let policies: Api<ValidatingAdmissionPolicy> = Api::all(admin.client.clone());
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(admin.client.clone());
    for name in [admission::QUEUES, admission::PODS] {
        bindings.delete(name, &DeleteParams::default()).await.unwrap();
        policies.delete(name, &DeleteParams::default()).await.unwrap();
    }
}

/// Lets a user do what `edit` lets in the test's namespace, and more.
async fn grant(admin: &Admin, user: &str, rules: Value) {
    let name = format!("test-{user}");
    let role: ClusterRole =
        serde_json::from_value(json!({ "metadata": { "name": name }, "rules": rules })).unwrap();
    Api::all(admin.client.clone()).create(&PostParams::default(), &role).await.unwrap();
    let binding: ClusterRoleBinding = serde_json::from_value(json!({
        "metadata": { "name": name },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name },
        "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user }],
    }))
    .unwrap();
    Api::all(admin.client.clone()).create(&PostParams::default(), &binding).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_are_for_those_who_may_use_them_and_pods_of_gangs_for_the_operator() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "tenants").await;
    let edit = |more: Value| {
        let mut rules = admission::roles()[0]["rules"].clone();
        let all = rules.as_array_mut().unwrap();
        all.push(json!({ "apiGroups": [""], "resources": ["pods"],
                         "verbs": ["create", "get", "patch", "update"] }));
        all.extend(more.as_array().unwrap().clone());
        rules
    };
    grant(&admin, "alice", edit(json!([]))).await;
    let may_use = json!([{ "apiGroups": ["drumline.dev"], "resources": ["queues"],
                           "resourceNames": ["research"], "verbs": ["use"] }]);
    grant(&admin, "bob", edit(may_use)).await;
    let namespaces: Api<Namespace> = Api::all(admin.client.clone());
    let note = json!({ "metadata": { "annotations": { "drumline.dev/queue": "team" } } });
    namespaces.patch("tenants", &PatchParams::default(), &Patch::Merge(&note)).await.unwrap();
    policies(&admin).await;
    let speaking = async |user: &str| {
        let client = speaking_as(cluster, user).await;
        Admin { client, namespace: "tenants".to_owned() }
    };
    let (alice, bob) = (speaking("alice").await, speaking("bob").await);

    // Policies take effect a moment after they are stored; so do the rights of users, which a refusal of
    // another kind is about.
    let mut refused = None;
    for attempt in 0..1200 {
        match alice.apply(C, &format!("probe-{attempt}"), in_queue("research")).await {
            Err(kube::Error::Api(status)) if status.message.contains("research") => {
                refused = Some(status);
                break;
            }
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    let refused = refused.expect("the policy of queues takes effect");
    assert_eq!(refused.code, 403, "{refused:?}");
    assert!(refused.message.contains("research") && refused.message.contains("alice"));
    alice.apply(C, "in-team", in_queue("team")).await.expect("the namespace's own queue");
    alice.apply(C, "unnamed", json!({ "argv": ["true"], "ranks": 1 })).await.expect("no queue");
    bob.apply(C, "in-research", in_queue("research")).await.expect("bob may use it");
    // Who may not use the queue may not move a job there either, but may change its priority.
    assert!(alice.apply(C, "in-team", in_queue("research")).await.is_err());
    let raised = json!({ "spec": { "priority": 7 } });
    alice
        .jobs(C)
        .patch("in-research", &PatchParams::default(), &Patch::Merge(&raised))
        .await
        .expect("the queue stays the same");

    let ours = json!({ "schedulerName": "drumline" });
    let label = json!({ "drumline.dev/rank": "0" });
    let mut refused = None;
    for attempt in 0..1200 {
        let made = pod(&format!("probe-{attempt}"), ours.clone(), json!({}));
        match alice.pods().create(&PostParams::default(), &made).await {
            Err(kube::Error::Api(status)) => {
                refused = Some(status);
                break;
            }
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    assert_eq!(refused.expect("the policy of pods takes effect").code, 403);
    let made = pod("labelled", json!({}), label.clone());
    assert!(alice.pods().create(&PostParams::default(), &made).await.is_err());
    let made = pod("plain", json!({}), json!({ "app": "x" }));
    alice.pods().create(&PostParams::default(), &made).await.expect("a pod like any other");
    let patch = json!({ "metadata": { "labels": label } });
    let params = PatchParams::default();
    assert!(alice.pods().patch("plain", &params, &Patch::Merge(&patch)).await.is_err());
    // The operator makes them, and others may still change what is not ours.
    let operator =
        Admin { client: cluster.client(OPERATOR).await, namespace: "tenants".to_owned() };
    let made = pod("ours", ours, label);
    operator.pods().create(&PostParams::default(), &made).await.expect("the operator may");
    let patch = json!({ "metadata": { "annotations": { "note": "x" } } });
    alice.pods().patch("ours", &params, &Patch::Merge(&patch)).await.expect("an annotation");
    let patch = json!({ "metadata": { "labels": { "drumline.dev/rank": "1" } } });
    assert!(alice.pods().patch("ours", &params, &Patch::Merge(&patch)).await.is_err());
    no_policies(&admin).await;
}
