//! Stands in for kubelets that run containers: the rank of every pod that is bound becomes a process
//! of this test program, with the pod's own environment and a real token of the pod.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::kubelet::try_finish;

/// Not a test: the body of a rank's process.
#[test]
#[ignore = "it is started by the tests beside it"]
fn a_rank() {
    if std::env::var_os("DRUMLINE_TOKEN_FILE").is_some() {
        tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
        assert_eq!(drumline_rank::run(), ExitCode::SUCCESS);
    }
}

/// The running containers; all are killed when it is dropped.
pub(crate) struct Containers {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    is_slow: Arc<AtomicBool>,
}

impl Drop for Containers {
    fn drop(&mut self) {
        self.stop.cancel();
        self.task.abort();
    }
}

impl Containers {
    /// Runs what is bound in `namespace`; `folder` stands for the volume that all ranks share.
    pub(crate) fn start(client: Client, namespace: &str, folder: &Path) -> Self {
        let stop = CancellationToken::new();
        let is_slow = Arc::new(AtomicBool::new(false));
        let node = Node {
            pods: Api::namespaced(client.clone(), namespace),
            accounts: Api::namespaced(client, namespace),
            folder: folder.to_owned(),
            running: BTreeMap::new(),
            is_slow: Arc::clone(&is_slow),
        };
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            stopped.run_until_cancelled_owned(node.run()).await;
        });
        Self { stop, task, is_slow }
    }

    /// Lets the ranks run a small part of the time, so that a run is not over before a test
    /// has done to it what it is about; or lets them run freely again.
    pub(crate) fn slow(&self, is_slow: bool) {
        self.is_slow.store(is_slow, Ordering::Relaxed);
    }
}

struct Node {
    pods: Api<Pod>,
    accounts: Api<ServiceAccount>,
    folder: PathBuf,
    /// By the pod's uid.
    running: BTreeMap<String, (String, Child)>,
    is_slow: Arc<AtomicBool>,
}

impl Drop for Node {
    fn drop(&mut self) {
        for (_, child) in self.running.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Node {
    async fn run(mut self) {
        loop {
            self.look().await;
            let is_slow = self.is_slow.load(Ordering::Relaxed);
            if is_slow {
                self.signal(Signal::STOP);
            }
            tokio::time::sleep(Duration::from_millis(if is_slow { 150 } else { 50 })).await;
            if is_slow {
                self.signal(Signal::CONT);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    /// Sends a signal to every rank; one that has just ended is none the wiser.
    fn signal(&self, signal: Signal) {
        for (_, child) in self.running.values() {
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    async fn look(&mut self) {
        let Ok(all) = self.pods.list(&ListParams::default()).await else { return };
        for pod in all {
            let (name, uid) =
                (pod.metadata.name.clone().unwrap(), pod.metadata.uid.clone().unwrap());
            if pod.spec.as_ref().unwrap().node_name.is_none() {
                continue;
            }
            let phase = pod.status.as_ref().and_then(|status| status.phase.clone());
            if pod.metadata.deletion_timestamp.is_some() {
                if let Some((_, mut child)) = self.running.remove(&uid) {
                    child.kill().unwrap();
                    child.wait().unwrap();
                }
                let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
                let _ = self.pods.delete(&name, &now).await;
            } else if phase.as_deref() == Some("Pending") && !self.running.contains_key(&uid) {
                let child = self.start(&pod).await;
                self.running.insert(uid, (name.clone(), child));
                let status = json!({ "status": { "phase": "Running", "podIP": "127.0.0.1" } });
                let _ = self
                    .pods
                    .patch_status(&name, &PatchParams::default(), &Patch::Merge(&status))
                    .await;
            }
        }
        let mut ended = Vec::new();
        for (uid, (name, child)) in &mut self.running {
            if let Some(status) = child.try_wait().unwrap() {
                ended.push((uid.clone(), name.clone(), status));
            }
        }
        for (uid, name, status) in ended {
            self.running.remove(&uid);
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            // Its pod may have been deleted at the same moment.
            let _ = try_finish(&self.pods, &name, code).await;
        }
    }

    async fn start(&self, pod: &Pod) -> Child {
        let (name, uid) = (pod.metadata.name.clone().unwrap(), pod.metadata.uid.clone().unwrap());
        let folder = self.folder.join("pods").join(&name);
        std::fs::create_dir_all(&folder).unwrap();
        let spec = pod.spec.as_ref().unwrap();
        let token = self.token(&name, &uid, spec.volumes.as_deref().unwrap_or_default()).await;
        std::fs::write(folder.join("token"), token).unwrap();
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "containers::a_rank", "--ignored", "--nocapture"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        for variable in spec.containers[0].env.iter().flatten() {
            let field = variable.value_from.as_ref().and_then(|from| from.field_ref.as_ref());
            let value = match field.map(|field| field.field_path.as_str()) {
                Some("status.podIP") => "127.0.0.1".to_owned(),
                Some("metadata.uid") => uid.clone(),
                Some(other) => panic!("{other} is not known here"),
                None => variable.value.clone().unwrap_or_default(),
            };
            // The volume and the token are where this machine has them.
            let value = value.replace("/drumline/shared", &self.folder.display().to_string());
            command.env(&variable.name, value);
        }
        command.env("DRUMLINE_TOKEN_FILE", folder.join("token"));
        command.spawn().unwrap()
    }

    /// Asks for the token that the pod's projected volume describes, as a kubelet does.
    async fn token(
        &self,
        name: &str,
        uid: &str,
        volumes: &[k8s_openapi::api::core::v1::Volume],
    ) -> String {
        let wanted = volumes
            .iter()
            .filter_map(|volume| volume.projected.as_ref()?.sources.as_ref())
            .flatten()
            .find_map(|source| source.service_account_token.clone())
            .expect("a native rank's pod has a token");
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: wanted.audience.into_iter().collect(),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(name.to_owned()),
                    uid: Some(uid.to_owned()),
                }),
                expiration_seconds: wanted.expiration_seconds,
            },
            ..TokenRequest::default()
        };
        let answer =
            self.accounts.create_token_request("default", &PostParams::default(), &request).await;
        answer.unwrap().status.unwrap().token
    }
}
