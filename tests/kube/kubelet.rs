//! Stands in for kubelets where none runs: pods that are bound are said to run, and pods whose
//! deletion was asked for go. It decides nothing.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// The kubelets of all nodes but those that are silent.
#[derive(Clone)]
pub(crate) struct Kubelets {
    client: Client,
    silent: Arc<Mutex<BTreeSet<String>>>,
    /// Every binding that was ever seen: pod uid, node.
    stop: CancellationToken,
}

impl Drop for Kubelets {
    fn drop(&mut self) {
        // The loop holds one clone of the list.
        if Arc::strong_count(&self.silent) <= 2 {
            self.stop.cancel();
        }
    }
}

impl Kubelets {
    /// Starts them.
    pub(crate) fn start(client: Client) -> Self {
        let kubelets = Self { client, silent: Arc::default(), stop: CancellationToken::new() };
        let (client, silent, stop) =
            (kubelets.client.clone(), kubelets.silent.clone(), kubelets.stop.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            loop {
                Self::look(&client, &silent).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }));
        kubelets
    }

    /// The kubelet of a node is not heard from now on.
    pub(crate) fn silence(&self, node: &str) {
        self.silent.lock().unwrap().insert(node.to_owned());
    }

    async fn look(client: &Client, silent: &Mutex<BTreeSet<String>>) {
        let pods: Api<Pod> = Api::all(client.clone());
        let Ok(all) = pods.list(&ListParams::default()).await else { return };
        for pod in all {
            let Some(spec) = &pod.spec else { continue };
            let Some(node) = spec.node_name.clone() else { continue };
            if silent.lock().unwrap().contains(&node) {
                continue;
            }
            let (Some(name), Some(namespace)) = (&pod.metadata.name, &pod.metadata.namespace)
            else {
                continue;
            };
            let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            if pod.metadata.deletion_timestamp.is_some() {
                let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
                let _ = pods.delete(name, &now).await;
            } else if phase == Some("Pending") {
                let status = json!({ "status": { "phase": "Running" } });
                let _ =
                    pods.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await;
            }
        }
    }
}

/// Says how a pod's container ended.
pub(crate) async fn finish(pods: &Api<Pod>, name: &str, exit_code: i32) {
    try_finish(pods, name, exit_code).await.unwrap();
}

/// Says how a pod's container ended, if the pod is still there.
///
/// # Errors
/// The API server's, when it is not.
pub(crate) async fn try_finish(pods: &Api<Pod>, name: &str, exit_code: i32) -> kube::Result<Pod> {
    let phase = if exit_code == 0 { "Succeeded" } else { "Failed" };
    let status = json!({ "status": { "phase": phase, "containerStatuses": [{
        "name": "rank", "ready": false, "restartCount": 0, "image": "x", "imageID": "x",
        "state": { "terminated": { "exitCode": exit_code, "reason": "Error" } },
    }]}});
    pods.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await
}
