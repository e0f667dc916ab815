//! A cluster of many nodes whose kubelets kwok plays, and what is measured of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use drumline_operator::deploy;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::cluster::{ADMIN, Cluster, OPERATOR, Setup, child, free_port, own, program};

/// Label: which kwok plays a node's kubelet.
const PLAYER: &str = "drumline.test/player";
/// The node whose kubelet a kwok of its own plays, so that it can die.
pub(crate) const DOOMED: &str = "n0000";
/// The token of kube-scheduler's user.
const SCHEDULER: &str = "scheduler-token";
/// Calls that a test has under way at a time.
const CALLS_MAX: usize = 32;

/// How large a test is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Nodes.
    pub(crate) nodes: u32,
    /// Devices of each.
    pub(crate) per_node: u32,
    /// The largest gang.
    pub(crate) gang_max: u32,
}

impl Size {
    /// Returns how many devices there are.
    pub(crate) fn devices(self) -> u32 {
        self.nodes * self.per_node
    }
}

/// The cluster.
pub(crate) struct Kwok {
    /// Its API server.
    pub(crate) cluster: Cluster,
    /// The administrator.
    pub(crate) client: Client,
    folder: PathBuf,
    doomed: Mutex<Option<Process>>,
}

impl Kwok {
    /// Starts it with its nodes, or says what is missing.
    pub(crate) async fn start(size: Size) -> Result<Self, String> {
        let kwok = program("kwok")?;
        let user = (SCHEDULER, "system:kube-scheduler".to_owned(), "drumline-test");
        // kwok watches from revision 0, which such a server would take for a streamed list. Those need
        // progress notices of etcd, which Debian's has not: kwok would start each watch anew, after
        // waits that double up to 30 s, and its nodes would seem to be as slow as that.
        let flags = vec!["--feature-gates=WatchList=false".to_owned()];
        let mut cluster = own(Setup { users: vec![user], flags, ..Setup::default() })?;
        let client = cluster.client(ADMIN).await;
        let folder = cluster.folder().to_owned();
        let kubeconfig = cluster.kubeconfig_file(ADMIN);
        let flags = |player: &str| {
            [
                format!("--kubeconfig={}", kubeconfig.display()),
                format!("--manage-nodes-with-label-selector={PLAYER}={player}"),
                // Renewed at a quarter of it. 40 s would be as in production, and a fifth of what
                // two cores can write.
                "--node-lease-duration-seconds=200".to_owned(),
                format!("--config={}", config(&folder).display()),
            ]
        };
        cluster.run("kwok", &kwok, &flags("many"));
        let doomed = Process(child(&kwok, &folder.join("doomed.log"), &flags("doomed")));
        let this = Self { cluster, client, folder, doomed: Mutex::new(Some(doomed)) };
        this.cluster.namespace(&this.client, "scale").await;
        this.add_nodes(size).await;
        Ok(this)
    }

    async fn add_nodes(&self, size: Size) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        stream::iter(0..size.nodes)
            .map(Ok)
            .try_for_each_concurrent(CALLS_MAX, |number| {
                let nodes = nodes.clone();
                async move { add_node(&nodes, number, size).await }
            })
            .await
            .expect("nodes are added");
        let deadline = tokio::time::Instant::now() + Duration::from_secs(300);
        loop {
            let all = nodes.list(&ListParams::default()).await.unwrap();
            let ready = all.iter().filter(|node| is_ready(node)).count();
            if ready == size.nodes as usize {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{ready} nodes are ready");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Lets the doomed node die: its kubelet says nothing any more, and it is marked as the node
    /// controller marks it.
    pub(crate) async fn kill_node(&self) {
        drop(self.doomed.lock().unwrap().take());
        let (name, params) = (DOOMED, PatchParams::default());
        let nodes: Api<Node> = Api::all(self.client.clone());
        let gone = json!({ "spec": { "taints": [
            { "key": "node.kubernetes.io/unreachable", "effect": "NoExecute",
              "timeAdded": "2026-01-01T00:00:00Z" },
            { "key": "node.kubernetes.io/unreachable", "effect": "NoSchedule" },
        ]}});
        nodes.patch(name, &params, &Patch::Merge(&gone)).await.unwrap();
        let node = nodes.get(name).await.unwrap();
        let mut conditions = node.status.unwrap().conditions.unwrap_or_default();
        for condition in &mut conditions {
            "Unknown".clone_into(&mut condition.status);
            condition.reason = Some("NodeStatusUnknown".to_owned());
        }
        let status = json!({ "status": { "conditions": conditions } });
        nodes.patch_status(name, &params, &Patch::Merge(&status)).await.unwrap();
    }

    /// Starts an operator as a process of its own.
    pub(crate) fn operator(&self) -> Process {
        let kubeconfig = self.cluster.kubeconfig_file(OPERATOR);
        Process::operator(&kubeconfig, None, &self.folder.join("operator.log"))
    }

    /// Starts an operator with a guard that fails closed: on a busy machine an answer may come too late.
    pub(crate) async fn guarded_operator(&self) -> Process {
        let all: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let empty = serde_json::from_value(deploy::guard()).unwrap();
        all.create(&PostParams::default(), &empty).await.expect("the configuration is created");
        let kubeconfig = self.cluster.kubeconfig_file(OPERATOR);
        Process::operator(&kubeconfig, Some(free_port()), &self.folder.join("operator.log"))
    }

    /// Counts the lines of the operator's log that say something.
    pub(crate) fn logged(&self, text: &str) -> usize {
        let log = std::fs::read_to_string(self.folder.join("operator.log")).unwrap_or_default();
        log.lines().filter(|line| line.contains(text)).count()
    }

    /// Starts kube-scheduler, held back by nothing but its own speed.
    pub(crate) fn kube_scheduler(&self) -> Result<Process, String> {
        let scheduler = program("kube-scheduler")?;
        let kubeconfig = self.cluster.kubeconfig_file(SCHEDULER);
        let config = self.folder.join("scheduler.json");
        let text = json!({
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "leaderElection": { "leaderElect": false },
            // Its default is 50 calls a second, which would make the comparison easy.
            "clientConnection": { "kubeconfig": kubeconfig, "qps": 5000, "burst": 5000 },
        });
        std::fs::write(&config, text.to_string()).unwrap();
        let log = self.folder.join("scheduler.log");
        let flags = [format!("--config={}", config.display()), "--secure-port=0".to_owned()];
        Ok(Process(child(&scheduler, &log, &flags)))
    }

    /// Creates pods of one device each for kube-scheduler.
    pub(crate) async fn create_plain(&self, prefix: &str, count: u32) {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), "scale");
        stream::iter(0..count)
            .map(Ok::<_, kube::Error>)
            .try_for_each_concurrent(CALLS_MAX, |number| {
                let (pods, prefix) = (pods.clone(), prefix.to_owned());
                async move {
                    let pod: Pod = serde_json::from_value(json!({
                        "metadata": { "name": format!("{prefix}-{number}"),
                                      "labels": { "plain": prefix } },
                        "spec": {
                            "terminationGracePeriodSeconds": 0,
                            "containers": [{ "name": "x", "image": "x", "resources": {
                                "limits": { "nvidia.com/gpu": "1" } } }],
                        },
                    }))
                    .unwrap();
                    pods.create(&PostParams::default(), &pod).await.map(drop)
                }
            })
            .await
            .expect("pods are created");
    }

    /// Deletes the pods that [`Self::create_plain`] made; one by one, since the API server ends a call
    /// that deletes thousands after a minute.
    pub(crate) async fn delete_plain(&self, prefix: &str, count: u32) {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), "scale");
        stream::iter(0..count)
            .map(Ok::<_, kube::Error>)
            .try_for_each_concurrent(CALLS_MAX, |number| {
                let (pods, name) = (pods.clone(), format!("{prefix}-{number}"));
                async move { pods.delete(&name, &DeleteParams::default()).await.map(drop) }
            })
            .await
            .expect("pods are deleted");
    }

    /// Returns how many requests the API server has served, by resource, subresource and verb.
    pub(crate) async fn requests(&self) -> BTreeMap<String, u64> {
        let request = http::Request::get("/metrics").body(Vec::new()).unwrap();
        let page = self.client.request_text(request).await.expect("the API server's metrics");
        let mut counts = BTreeMap::new();
        for line in page.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
            let label = |name: &str| {
                let start = line.find(&format!("{name}=\""))? + name.len() + 2;
                Some(&line[start..start + line[start..].find('"')?])
            };
            let (Some(verb), Some(resource)) = (label("verb"), label("resource")) else { continue };
            let Some(count) = line.rsplit(' ').next().and_then(|n| n.parse::<f64>().ok()) else {
                continue;
            };
            let sub = label("subresource").filter(|sub| !sub.is_empty());
            let name = match sub {
                Some(sub) => format!("{verb} {resource}/{sub}"),
                None => format!("{verb} {resource}"),
            };
            *counts.entry(name).or_default() += count as u64;
        }
        counts
    }
}

async fn add_node(nodes: &Api<Node>, number: u32, size: Size) -> kube::Result<()> {
    let name = format!("n{number:04}");
    let capacity = json!({ "cpu": "64", "memory": "512Gi", "pods": "110",
                           "nvidia.com/gpu": size.per_node.to_string() });
    let node: Node = serde_json::from_value(json!({
        "metadata": {
            "name": name,
            "labels": { PLAYER: if name == DOOMED { "doomed" } else { "many" }, "type": "kwok",
                        "kubernetes.io/hostname": name,
                        "topology.kubernetes.io/zone": format!("z{}", number / 64) },
        },
        "status": { "capacity": capacity, "allocatable": capacity },
    }))
    .unwrap();
    nodes.create(&PostParams::default(), &node).await?;
    // The API server taints new nodes until their kubelet is heard.
    let spec = json!({ "spec": { "taints": null } });
    nodes.patch(&name, &PatchParams::default(), &Patch::Merge(&spec)).await?;
    Ok(())
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|one| one.type_ == "Ready" && one.status == "True")
}

/// Returns kwok's configuration, which also keeps it from reading one in the user's home.
///
/// It plays that many pods at a time: each kubelet would play its own, and the default of four makes
/// thousands of pods wait half a minute until they run, or until they are gone.
fn config(folder: &Path) -> PathBuf {
    let path = folder.join("kwok.yaml");
    let text = json!({
        "apiVersion": "config.kwok.x-k8s.io/v1alpha1",
        "kind": "KwokConfiguration",
        "options": { "podPlayStageParallelism": 32 },
    });
    std::fs::write(&path, text.to_string()).unwrap();
    path
}

/// A process under test that is killed when this is dropped.
pub(crate) struct Process(Child);

impl Process {
    /// Starts `drumline operator` where `DRUMLINE_BIN` names the program, else this test program in
    /// the part of one.
    fn operator(kubeconfig: &Path, guard: Option<u16>, log: &Path) -> Self {
        if let Some(program) = std::env::var_os("DRUMLINE_BIN") {
            let out = std::fs::File::create(log).expect("a log");
            let mut command = Command::new(program);
            command.args(["operator", "--namespace", "drumline-system", "--image", "x"]);
            if let Some(port) = guard {
                command.arg(format!("--guard-listen=127.0.0.1:{port}"));
                command.arg(format!("--guard-url=https://127.0.0.1:{port}"));
                command.arg("--guard-when-away=fail");
            }
            command.env("KUBECONFIG", kubeconfig).stdin(Stdio::null());
            command.stdout(out.try_clone().expect("a log")).stderr(out);
            return Self(command.spawn().expect("the operator starts"));
        }
        let text = std::fs::read_to_string(kubeconfig).expect("a kubeconfig");
        let lease = Duration::from_secs(15);
        Self(crate::killed::spawn_operator(&text, "scale", lease, guard, log))
    }

    /// Returns the most memory that it ever had resident, in MiB.
    pub(crate) fn memory_peak_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()));
        let status = status.expect("the process is there");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kib.and_then(|text| text.parse::<u64>().ok()).expect("a size") / 1024
    }

    /// Returns the processor time that it has used, in seconds.
    pub(crate) fn processor_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()));
        let stat = stat.expect("the process is there");
        // After the name, which may have blanks: fields 14 and 15 are user and system time.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split(' ').collect();
        let ticks = |field: usize| fields[field].parse::<f64>().unwrap_or(0.0);
        // A tick is 10 ms on every Linux that matters here.
        (ticks(12) + ticks(13)) / 100.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
