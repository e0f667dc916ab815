//! What the chart says, without a cluster: the rendered manifests are current, values are checked,
//! alerts and dashboards name metrics that exist, and Prometheus takes the alerts.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use drumline_telemetry::table::TABLE;
use serde_json::Value;

use crate::cluster::program;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Renders the chart; `None` where there is no helm.
fn render(values: &[&str]) -> Option<Result<String, String>> {
    let helm = match program("helm") {
        Ok(helm) => helm,
        Err(why) => {
            crate::cluster::skipped(&why);
            return None;
        }
    };
    let home = tempfile::tempdir().unwrap();
    let out = Command::new(helm)
        .args(["template", "drumline"])
        .arg(root().join("helm/drumline"))
        .args(["--namespace", "drumline-system", "--kube-version", "1.34.4"])
        .args(values)
        .env("HOME", home.path())
        .output()
        .expect("helm runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) })
}

/// Returns the names of our metrics in a text, without what Prometheus adds to histograms.
fn metrics(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    text.match_indices("drumline_")
        // `grafana_dashboard_drumline_x` would be no metric of ours.
        .filter(|(at, _)| !text[..*at].ends_with(is_part))
        .map(|(at, _)| text[at..].chars().take_while(|c| is_part(*c)).collect::<String>())
        .map(|name| {
            let base = ["_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end));
            base.filter(|base| TABLE.iter().any(|row| row.name == *base))
                .map_or(name.clone(), str::to_owned)
        })
        .collect()
}

fn check_metrics(place: &str, text: &str) -> usize {
    let found = metrics(text);
    for name in &found {
        assert!(
            TABLE.iter().any(|row| row.name == name),
            "{place} names {name}, which nobody tells"
        );
    }
    found.len()
}

#[test]
fn alerts_and_dashboards_name_metrics_that_exist() {
    let rules = std::fs::read_to_string(root().join("helm/drumline/templates/_rules.tpl")).unwrap();
    assert!(check_metrics("the alerts", &rules) >= 10);
    let mut uids = BTreeSet::new();
    let folder = root().join("helm/drumline/dashboards");
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let board: Value = serde_json::from_str(&text).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(uids.insert(board["uid"].as_str().unwrap().to_owned()), "{name}: its uid is taken");
        assert!(check_metrics(&name, &text) >= 5, "{name} shows hardly anything");
        let mut ids = BTreeSet::new();
        for panel in board["panels"].as_array().unwrap() {
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{name}: a panel's id is taken");
            assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{panel}");
            for target in panel["targets"].as_array().unwrap() {
                let expr = target["expr"].as_str().unwrap();
                assert!(!metrics(expr).is_empty(), "{name}: {expr}");
            }
        }
    }
    assert!(uids.len() >= 3);
}

#[test]
fn a_name_that_nobody_tells_is_found() {
    let found =
        metrics("rate(drumline_gateway_request_seconds_bucket[5m]) / drumline_no_such_total");
    let found: Vec<&str> = found.iter().map(String::as_str).collect();
    assert_eq!(found, ["drumline_gateway_request_seconds", "drumline_no_such_total"]);
}

/// Fails when `k8s/drumline.yaml` is not the chart's; `UPDATE=1` writes it anew.
#[test]
fn the_plain_manifests_are_the_rendered_chart() {
    // The tokens would be other ones each time: whoever applies makes them first.
    let Some(rendered) = render(&["--set", "auth.existingSecret=drumline-tokens"]) else { return };
    let text = format!(
        "# Rendered from helm/drumline; make it again with\n\
         #   UPDATE=1 cargo test -p drumline-operator plain_manifests\n{}",
        rendered.unwrap()
    );
    let path = root().join("k8s/drumline.yaml");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(stored == text, "k8s/drumline.yaml is stale; see its first lines");
}

#[test]
fn values_that_mean_nothing_are_refused() {
    for (value, told) in [
        ("operator.replica=3", "replica"),
        ("operator.replicas=0", "replicas"),
        ("gateway.service.type=Cluster", "type"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("ranks.shmSize=1 GB", "shmSize"),
        ("metrics.rules.gatewayErrors=5", "gatewayErrors"),
        ("operator.resources.limits.memory=lots", "memory"),
        ("gateway.httpRoute.enabled=true", "parentRefs"),
        ("fleet.topology={rack}", "topology"),
        ("fleet.gpuResource={gpu}", "gpuResource"),
        ("fleet.dra={nvidia.com/gpu}", "dra"),
    ] {
        let Some(rendered) = render(&["--set", value]) else { return };
        let error = rendered.expect_err(value);
        assert!(error.contains(told), "{value}: {error}");
    }
}

/// Everything that values can turn on renders to objects, and alerts that Prometheus takes.
#[test]
fn every_option_renders_and_prometheus_takes_the_alerts() {
    let all = [
        "--set=metrics.serviceMonitor.enabled=true,metrics.rules.enabled=true",
        "--set=metrics.rules.labels.release=prometheus,metrics.serviceMonitor.labels.release=prometheus",
        "--set=gateway.ingress.enabled=true,gateway.ingress.host=models.example.org",
        "--set=gateway.ingress.tls[0].secretName=models-tls",
        "--set=gateway.httpRoute.enabled=true,gateway.httpRoute.parentRefs[0].name=edge",
        "--set=networkPolicies.metricsFrom[0].podSelector.matchLabels.app=prometheus",
        "--set=networkPolicies.gatewayFrom[0].namespaceSelector.matchLabels.team=a",
        "--set=imagePullSecrets={pull},operator.affinity.nodeAffinity.x=y",
        "--set=agents.runtimeClassName=nvidia,agents.nodeSelector.gpu=yes",
        "--set=fleet.gpuResource={nvidia.com/gpu,amd.com/gpu=MI300X:192Gi},fleet.dra={gpu.nvidia.com}",
    ];
    let Some(rendered) = render(&all) else { return };
    let rendered = rendered.unwrap();
    let kinds: BTreeSet<&str> =
        rendered.lines().filter_map(|line| line.strip_prefix("kind: ")).collect();
    for kind in [
        "Deployment",
        "DaemonSet",
        "Service",
        "Secret",
        "Ingress",
        "HTTPRoute",
        "NetworkPolicy",
        "ServiceMonitor",
        "PrometheusRule",
        "ConfigMap",
        "PodDisruptionBudget",
        "ValidatingAdmissionPolicy",
        "ClusterRole",
    ] {
        assert!(kinds.contains(kind), "no {kind}");
    }
    let rule = rendered.split("\n---\n").find(|one| one.contains("kind: PrometheusRule")).unwrap();
    let (_, spec) = rule.split_once("\nspec:").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.yaml");
    let spec: Vec<&str> =
        spec.lines().map(|line| line.strip_prefix("  ").unwrap_or(line)).collect();
    std::fs::write(&file, spec.join("\n")).unwrap();
    let checked = Command::new("promtool").args(["check", "rules"]).arg(&file).output();
    let Ok(checked) = checked else {
        return crate::cluster::skipped("no promtool in PATH; apt-get install prometheus");
    };
    let told = String::from_utf8_lossy(&checked.stdout).into_owned();
    let error = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(checked.status.success(), "{told}{error}");
    assert!(told.contains("10 rules found"), "{told}");
    let cases = folder.path().join("alerts.yaml");
    std::fs::copy(root().join("tests/kube/alerts.yaml"), &cases).unwrap();
    let tested = Command::new("promtool").args(["test", "rules"]).arg(&cases).output().unwrap();
    let told = String::from_utf8_lossy(&tested.stdout).into_owned();
    assert!(tested.status.success(), "{told}{}", String::from_utf8_lossy(&tested.stderr));
}
