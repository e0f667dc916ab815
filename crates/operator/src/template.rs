//! What a job lays over the pods of its ranks: a partial pod in an annotation.
//!
//! It adds; it takes nothing away that a gang depends on. What it may name is listed here, and
//! everything else is refused with its place, before anything is launched.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::ask::Ask;
use crate::crd::GROUP;
use crate::quantity::milli;

/// Annotation: a partial pod, in JSON, that is laid over the pod of each rank.
pub const TEMPLATE: &str = "drumline.dev/pod-template";

/// What may be set of `spec` as a whole: it takes the place of ours.
const OF_SPEC: [&str; 8] = [
    "automountServiceAccountToken",
    "dnsConfig",
    "dnsPolicy",
    "priorityClassName",
    "runtimeClassName",
    "securityContext",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
];
/// What is added to the lists of `spec`.
const ADDED_TO_SPEC: [&str; 4] = ["hostAliases", "initContainers", "tolerations", "volumes"];
/// What may be set of the rank's container.
const OF_CONTAINER: [&str; 6] = [
    "imagePullPolicy",
    "lifecycle",
    "livenessProbe",
    "readinessProbe",
    "securityContext",
    "startupProbe",
];
/// What is added to the lists of the rank's container.
const ADDED_TO_CONTAINER: [&str; 4] = ["env", "envFrom", "ports", "volumeMounts"];

/// A partial pod that was found good.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Template {
    metadata: Map<String, Value>,
    spec: Map<String, Value>,
    container: Map<String, Value>,
    /// Extended resources that each rank gets, by name: whole numbers or sizes.
    extra: BTreeMap<String, String>,
}

impl Template {
    /// Reads an annotation. `may_mount` says whether a folder of the nodes may be mounted, `is_device`
    /// whether a resource is a rank's device, of which it gets the one that its plan gives it.
    ///
    /// # Errors
    /// The first thing that may not be named, with its place.
    pub fn read(
        text: &str,
        may_mount: &dyn Fn(&str) -> bool,
        is_device: &dyn Fn(&str) -> bool,
    ) -> Result<Self, String> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| format!("no JSON: {error}"))?;
        let mut template = Self::default();
        for (key, value) in object("", &value)? {
            match key.as_str() {
                "metadata" => template.metadata = metadata(value)?,
                "spec" => template.read_spec(object("spec", value)?, may_mount)?,
                other => return Err(unknown(other)),
            }
        }
        if let Some(name) = template.extra.keys().find(|name| is_device(name)) {
            return Err(format!(
                "spec.containers[0].resources.limits.{name}: a rank gets the one device of its plan; \
                 spec.resources of the job says which"
            ));
        }
        Ok(template)
    }

    fn read_spec(
        &mut self,
        spec: &Map<String, Value>,
        may_mount: &dyn Fn(&str) -> bool,
    ) -> Result<(), String> {
        for (key, value) in spec {
            let place = format!("spec.{key}");
            if key == "containers" {
                match list(&place, value)? {
                    [one] => self.read_container(object(&format!("{place}[0]"), one)?)?,
                    _ => return Err(format!("{place}: one is wanted, the rank's")),
                }
                continue;
            }
            if ADDED_TO_SPEC.contains(&key.as_str()) {
                list(&place, value)?;
            } else if !OF_SPEC.contains(&key.as_str()) {
                return Err(unknown(&place));
            }
            self.spec.insert(key.clone(), value.clone());
        }
        for volume in self.spec.get("volumes").and_then(Value::as_array).into_iter().flatten() {
            let path = &volume["hostPath"]["path"];
            if !path.is_null() && !path.as_str().is_some_and(may_mount) {
                return Err(format!(
                    "spec.volumes: {path} is not below a folder that the operator allows \
                     (--allow-host-path)"
                ));
            }
        }
        Ok(())
    }

    fn read_container(&mut self, container: &Map<String, Value>) -> Result<(), String> {
        for (key, value) in container {
            let place = format!("spec.containers[0].{key}");
            if key == "resources" {
                self.read_resources(&place, value)?;
                continue;
            }
            // Its name may be said, as in a pod.
            if key == "name" && value == "rank" {
                continue;
            }
            if ADDED_TO_CONTAINER.contains(&key.as_str()) {
                list(&place, value)?;
            } else if !OF_CONTAINER.contains(&key.as_str()) {
                return Err(unknown(&place));
            }
            self.container.insert(key.clone(), value.clone());
        }
        Ok(())
    }

    /// Extended resources alone: processors, memory and devices are the manifest's.
    fn read_resources(&mut self, place: &str, resources: &Value) -> Result<(), String> {
        for (kind, amounts) in object(place, resources)? {
            let place = format!("{place}.{kind}");
            if kind != "limits" {
                return Err(format!("{place}: limits are wanted; they are requests too"));
            }
            for (name, amount) in object(&place, amounts)? {
                if !name.contains('/') && !name.starts_with("hugepages-") {
                    return Err(format!("{place}.{name}: spec.resources of the job says that"));
                }
                let amount = match amount {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                if milli(&amount).is_none() {
                    return Err(format!("{place}.{name}: {amount} is no quantity"));
                }
                self.extra.insert(name.clone(), amount);
            }
        }
        Ok(())
    }

    /// Returns the extended resources that each rank gets beside its device.
    #[must_use]
    pub fn extra(&self) -> Ask {
        let mut ask = Ask::default();
        for (name, amount) in &self.extra {
            ask.put(name, milli(amount).unwrap_or(0));
        }
        ask
    }

    /// Lays it over the pod of a rank.
    pub fn lay_over(&self, pod: &mut Value) {
        for (key, added) in &self.metadata {
            for (name, value) in added.as_object().into_iter().flatten() {
                pod["metadata"][key][name] = value.clone();
            }
        }
        lay(&self.spec, &ADDED_TO_SPEC, &mut pod["spec"]);
        let container = &mut pod["spec"]["containers"][0];
        lay(&self.container, &ADDED_TO_CONTAINER, container);
        for (name, amount) in &self.extra {
            container["resources"]["limits"][name] = json!(amount);
        }
    }
}

/// Added entries go before ours: of two of one name the last holds.
fn lay(over: &Map<String, Value>, added: &[&str], under: &mut Value) {
    for (key, value) in over {
        if !added.contains(&key.as_str()) {
            merge(&mut under[key], value);
            continue;
        }
        let mut all = value.as_array().cloned().unwrap_or_default();
        all.extend(under[key].as_array().cloned().unwrap_or_default());
        under[key] = json!(all);
    }
}

/// RFC 7386 without its deletions: what ours says is changed, never taken away.
fn merge(under: &mut Value, over: &Value) {
    match over {
        Value::Object(entries) if under.is_object() => {
            for (key, value) in entries {
                merge(&mut under[key], value);
            }
        }
        Value::Null => {}
        other => *under = other.clone(),
    }
}

fn metadata(value: &Value) -> Result<Map<String, Value>, String> {
    let metadata = object("metadata", value)?;
    for (key, entries) in metadata {
        let place = format!("metadata.{key}");
        if !["labels", "annotations"].contains(&key.as_str()) {
            return Err(unknown(&place));
        }
        for (name, value) in object(&place, entries)? {
            if name.starts_with(GROUP) || !value.is_string() {
                return Err(format!("{place}.{name}: texts are wanted, and none of {GROUP}"));
            }
        }
    }
    Ok(metadata.clone())
}

fn object<'a>(place: &str, value: &'a Value) -> Result<&'a Map<String, Value>, String> {
    value.as_object().ok_or_else(|| format!("{place}: an object is wanted"))
}

fn list<'a>(place: &str, value: &'a Value) -> Result<&'a [Value], String> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| format!("{place}: a list is wanted"))
}

fn unknown(place: &str) -> String {
    format!("{place}: may not be set here")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &Value) -> Result<Template, String> {
        let is_device = |name: &str| name == "nvidia.com/gpu";
        Template::read(&value.to_string(), &|path| path == "/data", &is_device)
    }

    #[test]
    fn a_template_adds_and_takes_nothing_away() {
        let template = read(&json!({
            "metadata": { "labels": { "team": "x" } },
            "spec": {
                "serviceAccountName": "s3",
                "securityContext": { "fsGroup": 7 },
                "volumes": [{ "name": "d", "hostPath": { "path": "/data" } }],
                "containers": [{ "name": "rank", "env": [{ "name": "RANK", "value": "9" }],
                    "resources": { "limits": { "rdma/hca": 1 } } }],
            },
        }))
        .unwrap();
        let mut pod = json!({
            "metadata": { "labels": { "a": "b" } },
            "spec": {
                "securityContext": { "runAsNonRoot": true },
                "volumes": [{ "name": "shm" }],
                "containers": [{ "env": [{ "name": "RANK", "value": "0" }],
                                 "resources": { "limits": {} } }],
            },
        });
        template.lay_over(&mut pod);
        assert_eq!(pod["metadata"]["labels"], json!({ "a": "b", "team": "x" }));
        assert_eq!(pod["spec"]["securityContext"], json!({ "runAsNonRoot": true, "fsGroup": 7 }));
        assert_eq!(pod["spec"]["volumes"][1]["name"], "shm");
        let container = &pod["spec"]["containers"][0];
        assert_eq!(container["env"][1]["value"], "0", "ours holds");
        assert_eq!(container["resources"]["limits"]["rdma/hca"], "1");
        assert_eq!(template.extra().get("rdma/hca"), 1000);
    }

    #[test]
    fn what_a_gang_depends_on_cannot_be_set() {
        for (value, told) in [
            (json!([]), "an object"),
            (json!({ "kind": "Pod" }), "kind: may not"),
            (json!({ "spec": { "nodeName": "a" } }), "spec.nodeName: may not"),
            (json!({ "spec": { "schedulerName": "x" } }), "spec.schedulerName: may not"),
            (json!({ "spec": { "hostNetwork": true } }), "spec.hostNetwork: may not"),
            (json!({ "spec": { "containers": [{}, {}] } }), "one is wanted"),
            (json!({ "spec": { "containers": [{ "image": "x" }] } }), "[0].image: may not"),
            (
                json!({ "spec": { "containers": [{ "resources": { "limits": { "cpu": "1" } } }] } }),
                "limits.cpu",
            ),
            (
                json!({ "spec": { "containers": [{ "resources": {
                    "limits": { "nvidia.com/gpu": 8 } } }] } }),
                "limits.nvidia.com/gpu: a rank gets the one device of its plan",
            ),
            (
                json!({ "spec": { "containers": [{ "resources": { "requests": {} } }] } }),
                "limits are wanted",
            ),
            (
                json!({ "spec": { "volumes": [{ "hostPath": { "path": "/etc" } }] } }),
                "not below a folder",
            ),
            (
                json!({ "metadata": { "labels": { "drumline.dev/job": "x" } } }),
                "none of drumline.dev",
            ),
            (json!({ "metadata": { "finalizers": [] } }), "metadata.finalizers: may not"),
        ] {
            let why = read(&value).unwrap_err();
            assert!(why.contains(told), "{value}: {why}");
        }
        assert!(Template::read("{", &|_| true, &|_| false).unwrap_err().contains("JSON"));
    }
}
