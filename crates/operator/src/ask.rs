//! What a pod asks of its node: every resource, counted as kube-scheduler and kubelets count it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node as KubeNode, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::quantity::milli;

/// The place that every pod takes of its node.
pub const PLACES: &str = "pods";

/// Amounts of resources by name, in thousandths.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ask(BTreeMap<String, u64>);

impl Ask {
    /// Returns what a pod asks: for each resource the greater of its containers together and its
    /// largest init container, and its overhead; and its place.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        let mut ask = Self::place();
        let Some(spec) = pod.spec.as_ref() else { return ask };
        let mut together = Self::default();
        for container in &spec.containers {
            together.add(&Self::of_container(container));
        }
        // An init container that always restarts is a sidecar: it stays beside the others.
        let (sidecars, before): (Vec<_>, Vec<_>) = spec
            .init_containers
            .iter()
            .flatten()
            .partition(|container| container.restart_policy.as_deref() == Some("Always"));
        let mut beside = Self::default();
        for container in sidecars {
            beside.add(&Self::of_container(container));
        }
        for container in before {
            together.raise_to(&Self::of_container(container));
        }
        together.add(&beside);
        // What a pod says as a whole counts in place of what its containers say.
        for (name, amount) in Self::of_resources(spec.resources.as_ref()).0 {
            together.0.insert(name, amount);
        }
        ask.add(&together);
        for (name, quantity) in spec.overhead.iter().flatten() {
            ask.put(name, milli(&quantity.0).unwrap_or(0));
        }
        ask
    }

    /// Returns what a node offers.
    #[must_use]
    pub fn offered(node: &KubeNode) -> Self {
        let all = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        Self(amounts(all))
    }

    /// Returns the place that a pod takes, and nothing more.
    #[must_use]
    pub fn place() -> Self {
        Self(BTreeMap::from([(PLACES.to_owned(), 1000)]))
    }

    /// Returns the amount of a resource; 0 where it is not named.
    #[must_use]
    pub fn get(&self, resource: &str) -> u64 {
        self.0.get(resource).copied().unwrap_or(0)
    }

    /// Returns whether a resource is named at all.
    #[must_use]
    pub fn names(&self, resource: &str) -> bool {
        self.0.contains_key(resource)
    }

    /// Returns every amount.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, amount)| (name.as_str(), *amount))
    }

    /// Adds to the amount of one resource.
    pub fn put(&mut self, resource: &str, milli: u64) {
        match self.0.get_mut(resource) {
            Some(amount) => *amount = amount.saturating_add(milli),
            None => drop(self.0.insert(resource.to_owned(), milli)),
        }
    }

    /// Adds another's amounts.
    pub fn add(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            self.put(name, *amount);
        }
    }

    fn raise_to(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let mine = self.0.entry(name.clone()).or_default();
            *mine = (*mine).max(*amount);
        }
    }

    fn of_container(container: &Container) -> Self {
        Self::of_resources(container.resources.as_ref())
    }

    /// Requests, and limits where no request is named.
    fn of_resources(resources: Option<&ResourceRequirements>) -> Self {
        let Some(resources) = resources else { return Self::default() };
        let mut all = amounts(resources.limits.as_ref());
        all.extend(amounts(resources.requests.as_ref()));
        Self(all)
    }
}

fn amounts(all: Option<&BTreeMap<String, Quantity>>) -> BTreeMap<String, u64> {
    let named = all.into_iter().flatten();
    named.filter_map(|(name, quantity)| Some((name.clone(), milli(&quantity.0)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn ask(spec: Value) -> Ask {
        Ask::of(&serde_json::from_value(json!({ "spec": spec })).unwrap())
    }

    fn container(requests: Value, limits: Value) -> Value {
        json!({ "name": "x", "resources": { "requests": requests, "limits": limits } })
    }

    #[test]
    fn a_pod_asks_what_kube_scheduler_counts() {
        let gpu = "nvidia.com/gpu";
        let two = ask(json!({ "containers": [
            container(json!({ "cpu": "500m" }), json!({ "cpu": "2", gpu: "1" })),
            container(json!({ "cpu": "1" }), json!({ gpu: "2" })),
        ]}));
        assert_eq!((two.get("cpu"), two.get(gpu), two.get(PLACES)), (1500, 3000, 1000));
        let init = ask(json!({
            "initContainers": [
                container(json!({ "cpu": "3" }), json!({})),
                { "name": "beside", "restartPolicy": "Always",
                  "resources": { "requests": { "cpu": "100m" } } },
            ],
            "containers": [container(json!({ "cpu": "1" }), json!({}))],
            "overhead": { "cpu": "10m", "memory": "1Ki" },
        }));
        assert_eq!((init.get("cpu"), init.get("memory")), (3110, 1_024_000));
        let whole = ask(json!({
            "containers": [container(json!({ "cpu": "1" }), json!({}))],
            "resources": { "requests": { "cpu": "4" } },
        }));
        assert_eq!(whole.get("cpu"), 4000);
    }
}
