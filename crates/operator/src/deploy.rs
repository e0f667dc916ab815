//! What is applied to run the operator: its account, what it may do, and its service. Its Deployment is
//! the chart's.

use serde_json::{Value, json};

use crate::admission;
use crate::crd::GROUP;

/// The operator's name: of its account, its roles and its Deployment.
pub const NAME: &str = "drumline-operator";

/// The cluster role of gateways.
pub const GATEWAY: &str = "drumline-gateway";
/// The port on which ranks and gateways are served.
pub const RANKS_PORT: u16 = 7443;

/// Returns where pods reach the operator that leads.
#[must_use]
pub fn url(namespace: &str) -> String {
    format!("https://{NAME}.{namespace}.svc:{RANKS_PORT}")
}

/// Returns the cluster role: what the operator does, and nothing more.
///
/// It reads nodes, pods and claims of all namespaces, because it accounts for what others use. It asks whose
/// tokens it is shown and what their owners may do. It writes no node, reads no secret but its own,
/// and changes of its own resources' specs only queue and priority of a service's replicas.
#[must_use]
pub fn cluster_role() -> Value {
    let rule = |group: &str, resources: &[&str], verbs: &[&str]| json!({ "apiGroups": [group], "resources": resources, "verbs": verbs });
    let jobs = ["trainingjobs", "modelservices", "commandjobs"];
    let of = |sub: &str| jobs.map(|job| format!("{job}/{sub}"));
    let (status, finalizers) = (of("status"), of("finalizers"));
    let texts = |names: &[String; 3]| -> Vec<String> { names.to_vec() };
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": { "name": NAME, "labels": labels() },
        "rules": [
            // `patch` puts the finalizer on; the CRDs' rules keep what decides a gang as it is.
            rule(GROUP, &jobs, &["get", "list", "watch", "patch"]),
            { "apiGroups": [GROUP], "resources": texts(&status), "verbs": ["patch"] },
            // Owner references that block deletion need it where that admission plugin is on.
            { "apiGroups": [GROUP], "resources": texts(&finalizers), "verbs": ["update"] },
            // Replicas of a service, in the queue that its maker may use.
            rule(GROUP, &["modelservices"], &["create", "delete"]),
            rule(GROUP, &["queues"], &["get", "list", "watch", "use"]),
            rule(GROUP, &["queues/status"], &["patch"]),
            rule("", &["nodes", "namespaces"], &["get", "list", "watch"]),
            // Only where drivers' devices are given to gangs.
            rule("resource.k8s.io", &["resourceslices"], &["get", "list", "watch"]),
            rule(
                "resource.k8s.io",
                &["resourceclaims"],
                &["get", "list", "watch", "create", "patch", "delete"],
            ),
            rule("resource.k8s.io", &["resourceclaims/status"], &["patch"]),
            rule("policy", &["poddisruptionbudgets"], &["get", "list", "watch"]),
            // No objects: who may bind it makes pods of gangs, which others may not.
            rule(GROUP, &[admission::GANGS], &["bind"]),
            // `patch` labels the operator's own pod that leads.
            rule("", &["pods"], &["get", "list", "watch", "create", "patch", "delete"]),
            rule("", &["pods/binding"], &["create"]),
            rule("", &["services"], &["get", "create", "delete"]),
            rule("events.k8s.io", &["events"], &["create", "patch"]),
            // Its certificate and where it listens are filled in; the rest is the chart's.
            { "apiGroups": ["admissionregistration.k8s.io"],
              "resources": ["validatingwebhookconfigurations"],
              "resourceNames": [crate::guard::NAME], "verbs": ["patch"] },
            rule("authentication.k8s.io", &["tokenreviews", "selfsubjectreviews"], &["create"]),
            rule("authorization.k8s.io", &["subjectaccessreviews"], &["create"]),
        ],
    })
}

/// Returns the role in the operator's own namespace: its lease and its keys.
#[must_use]
pub fn lease_role(namespace: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": { "name": NAME, "namespace": namespace, "labels": labels() },
        "rules": [
            { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"] },
            { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
              "resourceNames": [crate::lease::NAME], "verbs": ["get", "update"] },
            { "apiGroups": [""], "resources": ["secrets"], "verbs": ["create"] },
            { "apiGroups": [""], "resources": ["secrets"],
              "resourceNames": [crate::ranks::keys::NAME], "verbs": ["get"] },
        ],
    })
}

/// Returns what the operator is installed with beside the custom resources and its Deployment, which
/// is the chart's.
#[must_use]
pub fn all(namespace: &str) -> Vec<Value> {
    let account = json!({ "kind": "ServiceAccount", "name": NAME, "namespace": namespace });
    let binding = |kind: &str, role: &str, metadata: Value| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": kind,
            "metadata": metadata,
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": role, "name": NAME },
            "subjects": [account.clone()],
        })
    };
    let mut all = vec![
        json!({ "apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": { "name": NAME, "namespace": namespace, "labels": labels() } }),
        cluster_role(),
        binding("ClusterRoleBinding", "ClusterRole", json!({ "name": NAME, "labels": labels() })),
        lease_role(namespace),
        binding(
            "RoleBinding",
            "Role",
            json!({
                "name": NAME, "namespace": namespace, "labels": labels(),
            }),
        ),
        gateway_role(),
        service(namespace),
    ];
    all.extend(admission::roles());
    all.extend(admission::all());
    all
}

/// Returns the webhook configuration of the guard, empty: the operator that leads fills it in.
#[must_use]
pub fn guard() -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": { "name": crate::guard::NAME, "labels": labels() },
    })
}

/// Returns what a gateway's account is bound to: it may learn where models are served.
#[must_use]
pub fn gateway_role() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": { "name": GATEWAY, "labels": labels() },
        "rules": [{ "apiGroups": [GROUP], "resources": [crate::ranks::services::RESOURCE],
                    "verbs": ["get"] }],
    })
}

/// Returns the service that leads to whichever operator leads.
#[must_use]
pub fn service(namespace: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": NAME, "namespace": namespace, "labels": labels() },
        "spec": {
            "selector": { "app.kubernetes.io/name": NAME, crate::ranks::place::LEADS: "true" },
            "ports": [
                { "name": "ranks", "port": RANKS_PORT, "targetPort": "ranks" },
                { "name": "guard", "port": crate::guard::PORT, "targetPort": "guard" },
            ],
        },
    })
}

fn labels() -> Value {
    json!({ "app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": "drumline" })
}
