//! Says which pod leads, so that the service of the operator leads to it: a label that the
//! service's selector asks for.
//!
//! Not readiness: a follower is as sound as the leader, and an installation that waits for all pods
//! to be ready would wait for ever.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::deploy;
use crate::lease::Leadership;

/// Label of the pod that leads.
pub const LEADS: &str = "drumline.dev/leads";
/// Between two looks at whether this process leads.
const LOOK: Duration = Duration::from_millis(250);
/// After a label could not be written.
const REST: Duration = Duration::from_secs(2);

/// Keeps the label of the pod `name` as `leadership` is, and takes it from others when it leads.
pub async fn keep(
    client: Client,
    namespace: String,
    name: String,
    leadership: Leadership,
    stop: CancellationToken,
) {
    let pods: Api<Pod> = Api::namespaced(client, &namespace);
    let mut told: Option<bool> = None;
    loop {
        let leads = leadership.holds();
        let mut pause = LOOK;
        if told != Some(leads) {
            match tell(&pods, &name, leads).await {
                Ok(()) => told = Some(leads),
                Err(error) => {
                    tracing::warn!(%error, "the pods cannot be told which of them leads");
                    pause = REST;
                }
            }
        }
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
    }
}

async fn tell(pods: &Api<Pod>, name: &str, leads: bool) -> kube::Result<()> {
    if leads {
        let theirs = format!("app.kubernetes.io/name={},{LEADS}", deploy::NAME);
        for pod in pods.list_metadata(&ListParams::default().labels(&theirs)).await? {
            match pod.metadata.name {
                Some(other) if other != name => label(pods, &other, false).await?,
                _ => {}
            }
        }
    }
    label(pods, name, leads).await
}

async fn label(pods: &Api<Pod>, name: &str, leads: bool) -> kube::Result<()> {
    let value = if leads { json!("true") } else { json!(null) };
    let patch = json!({ "metadata": { "labels": { LEADS: value } } });
    match pods.patch_metadata(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
        Ok(_) => Ok(()),
        // A pod that is gone leads to nobody.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error),
    }
}
