//! The layers: an edge between crates may only point to the same layer or a lower one, and the
//! pure crates depend on nothing that does IO.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::Value;

/// Each crate's layer, as `docs/architecture.md` draws them.
pub(crate) const LAYERS: &[(&str, u8)] = &[
    ("drumline-types", 0),
    ("drumline-spec", 0),
    ("drumline-cluster", 1),
    ("drumline-queue", 1),
    ("drumline-placement", 1),
    ("drumline-audit", 1),
    ("drumline-scheduler", 1),
    ("drumline-lifecycle", 1),
    ("drumline-mesh", 1),
    ("drumline-planner", 1),
    ("drumline-ports", 2),
    ("drumline-wire", 2),
    ("drumline-web", 3),
    ("drumline-store", 3),
    ("drumline-fakes", 3),
    ("drumline-telemetry", 3),
    ("drumline-checkpoint", 3),
    ("drumline-data", 3),
    ("drumline-tensor", 3),
    ("drumline-collective", 3),
    ("drumline-cuda", 3),
    ("drumline-engine", 3),
    ("drumline-sim", 3),
    ("drumline-control", 4),
    ("drumline-agent", 4),
    ("drumline-rank", 4),
    ("drumline-gateway", 4),
    ("drumline-dashboard", 4),
    ("drumline-operator", 4),
    ("drumline-cli", 5),
    ("xtask", 5),
];

/// Crates that decide or compute and never touch the world.
pub(crate) const PURE: &[&str] = &[
    "types",
    "spec",
    "cluster",
    "queue",
    "placement",
    "audit",
    "scheduler",
    "lifecycle",
    "mesh",
    "planner",
    "tensor",
    "engine",
];

/// Packages that a pure crate may not depend on.
const IMPURE: &[&str] =
    &["tokio", "tonic", "axum", "hyper", "redb", "etcd-client", "rustix", "tempfile", "memmap2"];

/// Checks every edge of `cargo metadata`'s answer.
pub(crate) fn check(metadata: &Value) -> Result<Vec<String>> {
    let layers: BTreeMap<&str, u8> = LAYERS.iter().copied().collect();
    let mut findings = Vec::new();
    for package in metadata["packages"].as_array().context("no packages")? {
        let name = package["name"].as_str().context("a package without a name")?;
        let Some(layer) = layers.get(name) else {
            findings.push(format!("{name}: has no layer; add it to crates/xtask/src/layers.rs"));
            continue;
        };
        let pure = name.strip_prefix("drumline-").is_some_and(|short| PURE.contains(&short));
        for dependency in package["dependencies"].as_array().context("no dependencies")? {
            if dependency["kind"].as_str() == Some("dev") {
                continue;
            }
            let target = dependency["name"].as_str().unwrap_or_default();
            if let Some(lower) = layers.get(target)
                && lower > layer
            {
                findings.push(format!(
                    "{name} (layer {layer}) depends on {target} (layer {lower}): edges point down"
                ));
            }
            // Two processes know each other by their messages, never by their code.
            if *layer == 4 && layers.get(target) == Some(&4) {
                findings.push(format!("{name} depends on {target}: processes share messages only"));
            }
            if pure && IMPURE.contains(&target) {
                findings.push(format!("{name} is pure and depends on {target}"));
            }
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn findings(name: &str, dependency: &str) -> usize {
        let metadata = json!({ "packages": [{
            "name": name, "dependencies": [{ "name": dependency, "kind": null }],
        }]});
        check(&metadata).unwrap().len()
    }

    #[test]
    fn edges_point_down() {
        assert_eq!(findings("drumline-engine", "drumline-spec"), 0);
        assert_eq!(findings("drumline-spec", "drumline-engine"), 1);
        assert_eq!(findings("drumline-control", "drumline-agent"), 1);
        assert_eq!(findings("drumline-placement", "tokio"), 1);
        assert_eq!(findings("drumline-new", "serde"), 1);
    }
}
