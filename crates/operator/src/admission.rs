//! What the API server itself refuses: jobs in queues that their makers may not use, and pods that
//! would pass by the queues. Validating admission policies: no webhook, nothing to be down.

use serde_json::{Value, json};

use crate::crd::GROUP;
use crate::gang::SCHEDULER;
use crate::queues::QUEUE;

/// The policy of queues, and its binding.
pub const QUEUES: &str = "drumline-queues";
/// The policy of pods, and its binding.
pub const PODS: &str = "drumline-pods";
/// Who makes pods of gangs may `bind` this resource, which has no objects.
pub const GANGS: &str = "gangs";

/// Returns every policy, each with its binding.
#[must_use]
pub fn all() -> Vec<Value> {
    [queues(), pods()]
        .into_iter()
        .flat_map(|policy| {
            let binding = binding(&policy);
            [policy, binding]
        })
        .collect()
}

fn policy(name: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["failurePolicy"] = json!("Fail");
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": { "name": name, "labels": { "app.kubernetes.io/part-of": "drumline" } },
        "spec": spec,
    })
}

fn binding(policy: &Value) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": policy["metadata"],
        "spec": { "policyName": policy["metadata"]["name"], "validationActions": ["Deny"] },
    })
}

fn rules(group: &str, version: &str, resources: &[&str]) -> Value {
    json!({ "resourceRules": [{
        "apiGroups": [group], "apiVersions": [version], "resources": resources,
        "operations": ["CREATE", "UPDATE"],
    }]})
}

/// A job may be in the queue that its namespace names (`default` where it names none), and in every
/// queue that its maker may `use`.
fn queues() -> Value {
    let space = format!(
        "has(namespaceObject.metadata.annotations) && '{QUEUE}' in \
         namespaceObject.metadata.annotations ? namespaceObject.metadata.annotations['{QUEUE}'] : \
         'default'"
    );
    let check = format!(
        "variables.isSame || variables.queue == variables.spaceQueue || \
         authorizer.group('{GROUP}').resource('queues').name(variables.queue).check('use').allowed()"
    );
    let told = format!(
        "'queue ' + variables.queue + ': ' + request.userInfo.username + ' may not use it; needs the \
         verb use on queues.{GROUP}, or the queue of the namespace, ' + variables.spaceQueue"
    );
    let queue_of =
        |object: &str| format!("has({object}.spec.queue) ? {object}.spec.queue : 'default'");
    policy(
        QUEUES,
        &json!({
            "matchConstraints": rules(GROUP, "*", &["trainingjobs", "modelservices", "commandjobs"]),
            "variables": [
                { "name": "spaceQueue", "expression": space },
                { "name": "named", "expression": queue_of("object") },
                { "name": "queue", "expression":
                  "variables.named == 'default' ? variables.spaceQueue : variables.named" },
                // Who changes something else of a job need not be allowed to use its queue.
                { "name": "isSame", "expression": format!(
                    "oldObject != null && variables.named == ({})", queue_of("oldObject")) },
            ],
            "validations": [{
                "expression": check, "messageExpression": told, "reason": "Forbidden",
            }],
        }),
    )
}

/// Pods of gangs are made by the operator alone: others could hold devices that no queue gave them,
/// or pass for a rank.
fn pods() -> Value {
    let keys = |object: &str| {
        format!(
            "has({object}.metadata.labels) ? \
             {object}.metadata.labels.filter(key, key.startsWith('{GROUP}/')) : []"
        )
    };
    policy(
        PODS,
        &json!({
            "matchConstraints": rules("", "v1", &["pods"]),
            "matchConditions": [{
                "name": "is-of-a-gang",
                "expression": format!(
                    "object.spec.?schedulerName.orValue('') == '{SCHEDULER}' || \
                     (has(object.metadata.labels) && \
                      object.metadata.labels.exists(key, key.startsWith('{GROUP}/'))) || \
                     (oldObject != null && has(oldObject.metadata.labels) && \
                      oldObject.metadata.labels.exists(key, key.startsWith('{GROUP}/')))"
                ),
            }],
            "variables": [
                { "name": "labels", "expression": keys("object") },
                { "name": "isUntouched", "expression": format!(
                    "oldObject != null && \
                     variables.labels.size() == ({}).size() && \
                     variables.labels.all(key, has(oldObject.metadata.labels) && key in \
                     oldObject.metadata.labels && oldObject.metadata.labels[key] == \
                     object.metadata.labels[key])",
                    keys("oldObject")) },
            ],
            "validations": [{
                "expression": format!(
                    "variables.isUntouched || \
                     authorizer.group('{GROUP}').resource('{GANGS}').check('bind').allowed()"),
                "message": format!(
                    "schedulerName {SCHEDULER} and labels of {GROUP} are for pods that the \
                     operator makes; apply a CommandJob instead"),
                "reason": "Forbidden",
            }],
        }),
    )
}

/// The cluster role of people who may see nodes and queues: `drumline nodes`, `drumline queues`.
pub const FLEET_VIEW: &str = "drumline-fleet-view";

/// Returns the cluster roles that add the jobs to `edit` and `view`, which namespaces are given out
/// with, and the one that shows nodes and queues.
#[must_use]
pub fn roles() -> Vec<Value> {
    const JOBS: [&str; 3] = ["trainingjobs", "modelservices", "commandjobs"];
    let role = |name: &str, to: &[&str], rules: Value| {
        let mut labels = json!({ "app.kubernetes.io/part-of": "drumline" });
        for role in to {
            labels[format!("rbac.authorization.k8s.io/aggregate-to-{role}")] = json!("true");
        }
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": { "name": name, "labels": labels },
            "rules": rules,
        })
    };
    vec![
        role(
            "drumline-edit",
            &["edit", "admin"],
            json!([
                { "apiGroups": [GROUP], "resources": JOBS,
                  "verbs": ["create", "update", "patch", "delete", "deletecollection"] },
                { "apiGroups": [GROUP], "resources": ["modelservices/scale"],
                  "verbs": ["get", "update", "patch"] },
            ]),
        ),
        role(
            "drumline-view",
            &["view", "edit", "admin"],
            json!([{ "apiGroups": [GROUP], "resources": JOBS, "verbs": ["get", "list", "watch"] }]),
        ),
        // What belongs to no namespace is given by a binding of its own.
        role(
            FLEET_VIEW,
            &[],
            json!([
                { "apiGroups": [GROUP], "resources": ["queues"], "verbs": ["get", "list", "watch"] },
                { "apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"] },
                { "apiGroups": ["resource.k8s.io"], "resources": ["resourceslices"],
                  "verbs": ["get", "list", "watch"] },
            ]),
        ),
    ]
}
