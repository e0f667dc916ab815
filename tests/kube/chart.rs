//! The chart, installed by helm on the real API server.

use std::process::Command;

use drumline_operator::deploy;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::Api;

use crate::cluster::{ADMIN, Admin, cluster, program, programs_folder, skipped};

/// Runs helm, and returns what it said and whether it went well.
pub(crate) fn helm(kubeconfig: &std::path::Path, args: &[&str]) -> (bool, String) {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../../helm/drumline");
    let args: Vec<&str> =
        args.iter().map(|arg| if *arg == "CHART" { chart } else { arg }).collect();
    let out = Command::new(programs_folder().join("helm"))
        .args(args)
        .env("KUBECONFIG", kubeconfig)
        .env("HOME", kubeconfig.parent().unwrap())
        .output()
        .expect("helm runs");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (out.status.success(), text + &String::from_utf8_lossy(&out.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_chart_installs_upgrades_and_leaves_only_the_custom_resources() {
    let Some(cluster) = cluster() else { return };
    if let Err(why) = program("helm") {
        return skipped(&why);
    }
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "chart").await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    let text = serde_json::to_string(&cluster.kubeconfig(ADMIN)).unwrap();
    std::fs::write(&kubeconfig, text).unwrap();
    let run = |args: &[&str]| helm(&kubeconfig, args);
    let well = |args: &[&str]| {
        let (is_good, told) = run(args);
        assert!(is_good, "{args:?}: {told}");
        told
    };
    well(&["lint", "--strict", "CHART"]);
    let told = well(&["install", "drumline", "CHART", "--namespace", "chart"]);
    assert!(told.contains("leaves the custom resource"), "{told}");
    let deployments: Api<Deployment> = Api::namespaced(admin.client.clone(), "chart");
    let roles: Api<ClusterRole> = Api::all(admin.client.clone());
    let installed = roles.get(deploy::NAME).await.unwrap();
    let wanted: ClusterRole = serde_json::from_value(deploy::cluster_role()).unwrap();
    assert_eq!(installed.rules, wanted.rules);
    assert_eq!(deployments.get(deploy::NAME).await.unwrap().spec.unwrap().replicas, Some(2));
    well(&["upgrade", "drumline", "CHART", "--namespace", "chart", "--set", "operator.replicas=3"]);
    assert_eq!(deployments.get(deploy::NAME).await.unwrap().spec.unwrap().replicas, Some(3));
    let (is_good, told) = run(&[
        "upgrade",
        "drumline",
        "CHART",
        "--namespace",
        "chart",
        "--set",
        "operator.replica=3",
    ]);
    assert!(!is_good && told.contains("replica"), "{told}");
    well(&["uninstall", "drumline", "--namespace", "chart"]);
    assert!(deployments.get_opt(deploy::NAME).await.unwrap().is_none());
    assert!(roles.get_opt(deploy::NAME).await.unwrap().is_none());
    let crds: Api<CustomResourceDefinition> = Api::all(admin.client.clone());
    assert!(crds.get_opt("commandjobs.drumline.dev").await.unwrap().is_some());
}

/// The rendered chart is what an API server takes, whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_applies_the_plain_manifests() {
    let Some(cluster) = cluster() else { return };
    let kubectl = match program("kubectl") {
        Ok(kubectl) => kubectl,
        Err(why) => return skipped(&why),
    };
    let _turn = cluster.turn.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    let text = serde_json::to_string(&cluster.kubeconfig(ADMIN)).unwrap();
    std::fs::write(&kubeconfig, text).unwrap();
    let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/../../k8s");
    let out = Command::new(kubectl)
        .args(["apply", "--server-side", "--force-conflicts", "--dry-run=server", "-k", manifests])
        .env("KUBECONFIG", &kubeconfig)
        .env("HOME", folder.path())
        .output()
        .expect("kubectl runs");
    let told = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{told}{}", String::from_utf8_lossy(&out.stderr));
    for object in ["deployment.apps/drumline-operator", "daemonset.apps/drumline-agent"] {
        assert!(told.contains(object), "{told}");
    }
}
