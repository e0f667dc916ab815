//! One CustomResourceDefinition per kind of manifest.

use drumline_spec::table::MANIFESTS;
use serde_json::{Map, Value, json};

use crate::crd::{columns, rules, status, structural};

/// The API group.
pub const GROUP: &str = "drumline.dev";
/// The version that is served and stored.
pub const VERSION: &str = "v1alpha1";

/// Returns every definition, in the order of the table.
#[must_use]
pub fn all() -> Vec<Value> {
    MANIFESTS.iter().filter_map(|manifest| one(manifest.name)).collect()
}

/// Returns the plural of a kind, as it stands in URLs.
#[must_use]
pub fn plural(kind: &str) -> String {
    format!("{}s", kind.to_ascii_lowercase())
}

fn short_names(kind: &str) -> &'static [&'static str] {
    match kind {
        "TrainingJob" => &["tj", "train"],
        "ModelService" => &["ms", "models"],
        "CommandJob" => &["cj"],
        "Queue" => &["dq"],
        _ => &[],
    }
}

fn one(kind: &str) -> Option<Value> {
    let schema = drumline_spec::schema(kind)?;
    let description = schema.get("description").cloned().unwrap_or_default();
    let is_queue = kind == "Queue";
    let mut spec = structural::from_json_schema(&schema["properties"]["spec"]);
    rules::add(kind, &mut spec);
    let name =
        structural::from_json_schema(&schema["properties"]["metadata"]["properties"]["name"]);
    let properties = json!({
        "apiVersion": { "type": "string" },
        "kind": { "type": "string" },
        "metadata": { "type": "object", "properties": { "name": {
            "type": "string", "maxLength": name["maxLength"], "pattern": name["pattern"],
        }}},
        "spec": spec,
        "status": if is_queue { status::queue_schema() } else { status::job_schema() },
    });
    let mut subresources = Map::from_iter([("status".to_owned(), json!({}))]);
    if kind == "ModelService" {
        let scale = json!({
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        });
        subresources.insert("scale".to_owned(), scale);
    }
    let mut names = json!({
        "kind": kind,
        "listKind": format!("{kind}List"),
        "plural": plural(kind),
        "singular": kind.to_ascii_lowercase(),
        "shortNames": short_names(kind),
    });
    // `kubectl get drumline` lists every kind of job.
    if !is_queue {
        names["categories"] = json!(["drumline"]);
    }
    Some(json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{GROUP}", plural(kind)),
            "labels": { "app.kubernetes.io/part-of": "drumline" },
        },
        "spec": {
            "group": GROUP,
            "names": names,
            // A queue is the fleet's, a job belongs to a namespace.
            "scope": if is_queue { "Cluster" } else { "Namespaced" },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "subresources": subresources,
                "additionalPrinterColumns": columns::of(kind),
                "schema": { "openAPIV3Schema": {
                    "type": "object",
                    "description": description,
                    "required": ["spec"],
                    "properties": properties,
                }},
            }],
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every schema that is not a map of texts says its type: what Kubernetes calls structural.
    fn check_structural(path: &str, schema: &Value) {
        let entries = schema.as_object().unwrap_or_else(|| panic!("{path} is no object"));
        assert!(entries.contains_key("type"), "{path} has no type");
        for forbidden in ["const", "anyOf", "oneOf", "$schema", "title"] {
            assert!(!entries.contains_key(forbidden), "{path} has {forbidden}");
        }
        if let Some(properties) = schema["properties"].as_object() {
            assert!(!entries.contains_key("additionalProperties"), "{path}");
            for (name, child) in properties {
                check_structural(&format!("{path}.{name}"), child);
            }
        }
        if let Some(items) = entries.get("items") {
            check_structural(&format!("{path}[]"), items);
        }
    }

    #[test]
    fn every_schema_is_structural() {
        let all = all();
        assert!(all.len() >= 3);
        for crd in &all {
            let version = &crd["spec"]["versions"][0];
            let name = crd["metadata"]["name"].as_str().unwrap();
            check_structural(name, &version["schema"]["openAPIV3Schema"]);
        }
    }

    #[test]
    fn every_field_of_the_table_is_in_the_resource() {
        for manifest in MANIFESTS {
            let crd = one(manifest.name).unwrap();
            let root = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            drumline_spec::table::each_field(manifest, &mut |path, _| {
                if !path.starts_with("spec.") {
                    return;
                }
                let found = path.split('.').fold(root, |at, name| &at["properties"][name]);
                assert!(found["type"].is_string(), "{} {path}", manifest.name);
            });
        }
    }
}
