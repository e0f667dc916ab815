//! Tier 3: one real node. The chart installed by helm; gangs as real pods, whose ranks find each
//! other by name; agents under their own rights; metrics scraped by a real Prometheus; an upgrade
//! under a running job.
//!
//! It takes minutes and most of a small machine, so it runs where `DRUMLINE_REAL=1` asks for it,
//! which is what `make test-kube` does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use drumline_operator::job::resource;
use drumline_operator::node;
use drumline_spec::JobKind;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, LogParams, Patch, PatchParams, PostParams,
};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use crate::chart::helm;
use crate::cluster::{ADMIN, program, skipped};
use crate::host::{NODE, Real, run};
use crate::trained::{a_run_is_trained_and_served, shared_folder};

pub(crate) const SPACE: &str = "drumline-system";
const JOBS: &str = "team";
/// A loaded machine may take its time; a wait that ends here has failed.
const LIMIT: Duration = Duration::from_secs(300);

/// What every step needs.
pub(crate) struct Stage {
    pub(crate) real: Real,
    pub(crate) client: Client,
    folder: tempfile::TempDir,
    kubeconfig: PathBuf,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Makes the images, of this machine's programs alone.
fn images(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let drumline = std::env::var_os("DRUMLINE_BIN").map_or_else(
        || {
            let built =
                ["release", "debug"].map(|kind| root().join("target").join(kind).join("drumline"));
            built.into_iter().find(|program| program.exists())
        },
        |program| Some(program.into()),
    );
    let drumline = drumline.ok_or("no drumline program; `cargo build -p drumline-cli` makes it")?;
    let text = |path: &Path| path.display().to_string();
    let pause = folder.join("pause");
    run("cc", &["-static", "-O1", "-o", &text(&pause), &text(&root().join("tests/kube/pause.c"))])?;
    let (one, two) = (folder.join("pause.tar"), folder.join("drumline.tar"));
    let image = root().join("tests/kube/image");
    run(&image, &["drumline.test/pause:1", &text(&one), &text(&pause)])?;
    let tools = ["/bin/sh", "/bin/sleep", "/usr/bin/getent"];
    let drumline = text(&drumline);
    let target = text(&two);
    let mut args = vec!["drumline.test/drumline:test", &target, &drumline];
    args.extend(tools);
    run(&image, &args)?;
    Ok(vec![one, two])
}

impl Stage {
    async fn start() -> Result<Self, String> {
        if std::env::var_os("DRUMLINE_REAL").is_none() {
            return Err("a real node takes minutes; DRUMLINE_REAL=1 or `make test-kube`".to_owned());
        }
        program("helm")?;
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path())?;
        let real = Real::start(&images)?;
        let client = real.cluster.client(ADMIN).await;
        let kubeconfig = real.cluster.kubeconfig_file(ADMIN);
        Ok(Self { real, client, folder, kubeconfig })
    }

    /// Waits until `is_good` says yes; it says what is missing otherwise.
    pub(crate) async fn until<F: Future<Output = Result<(), String>>>(
        &self,
        what: &str,
        is_good: impl Fn() -> F,
    ) -> Duration {
        let start = Instant::now();
        loop {
            let missing = match is_good().await {
                Ok(()) => return start.elapsed(),
                Err(missing) => missing,
            };
            if start.elapsed() > LIMIT {
                let pods: Api<Pod> = Api::all(self.client.clone());
                let pods = pods.list(&ListParams::default()).await.map(|list| list.items);
                let told: Vec<String> = pods
                    .unwrap_or_default()
                    .iter()
                    .map(|pod| {
                        format!(
                            "{}: {}",
                            pod.name_any(),
                            serde_json::to_string(&pod.status).unwrap()
                        )
                    })
                    .collect();
                let mut logs = String::new();
                for name in ["kubelet", "proxy", "dns"] {
                    logs += &format!("--- {name}\n{}\n", self.real.log(name));
                }
                panic!("not {what}: {missing}\n{told:#?}\n{}{logs}", self.last_words().await);
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Returns what the chart's containers said before they ended.
    async fn last_words(&self) -> String {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), SPACE);
        let all = pods.list(&ListParams::default()).await.map(|list| list.items);
        let mut text = String::new();
        for pod in all.unwrap_or_default() {
            for previous in [true, false] {
                let params = LogParams { previous, tail_lines: Some(20), ..LogParams::default() };
                if let Ok(log) = pods.logs(&pod.name_any(), &params).await {
                    text += &format!("--- {}\n{log}\n", pod.name_any());
                }
            }
        }
        text
    }

    pub(crate) fn jobs(&self, kind: JobKind) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), JOBS, &resource(kind))
    }

    async fn apply(&self, kind: JobKind, name: &str, spec: Value) {
        let mut object = DynamicObject::new(name, &resource(kind));
        object.data = json!({ "spec": spec });
        let params = PatchParams::apply("test");
        self.jobs(kind).patch(name, &params, &Patch::Apply(&object)).await.unwrap();
    }

    /// Waits until a job is in a phase, and returns its status.
    pub(crate) async fn phase(&self, kind: JobKind, name: &str, phase: &str) -> Value {
        let jobs = self.jobs(kind);
        let status = || async {
            let job = jobs.get(name).await.map_err(|error| error.to_string())?;
            let status = job.data.get("status").cloned().unwrap_or_default();
            if status["phase"] == phase { Ok(()) } else { Err(status.to_string()) }
        };
        let took = self.until(&format!("{name} {phase}"), status).await;
        println!("{name} is {phase} after {took:.1?}");
        jobs.get(name).await.unwrap().data["status"].clone()
    }

    /// Waits until a job is in an attempt.
    pub(crate) async fn attempt(&self, kind: JobKind, name: &str, attempt: u32) {
        let jobs = self.jobs(kind);
        let status = || async {
            let job = jobs.get(name).await.map_err(|error| error.to_string())?;
            let status = job.data.get("status").cloned().unwrap_or_default();
            if status["attempt"] == attempt { Ok(()) } else { Err(status.to_string()) }
        };
        self.until(&format!("{name} in attempt {attempt}"), status).await;
    }

    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), JOBS)
    }

    pub(crate) async fn log(&self, pod: &str) -> String {
        self.pods().logs(pod, &LogParams::default()).await.unwrap_or_else(|e| e.to_string())
    }

    fn helm(&self, args: &[&str]) -> String {
        let (is_good, told) = helm(&self.kubeconfig, args);
        assert!(is_good, "{args:?}: {told}");
        told
    }

    /// Waits until every pod of the chart is ready.
    async fn chart_is_ready(&self) {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), SPACE);
        let ready = || async {
            let all = pods.list(&ListParams::default()).await.map_err(|e| e.to_string())?.items;
            let unready: Vec<String> =
                all.iter().filter(|pod| !is_ready(pod)).map(ResourceExt::name_any).collect();
            let has = |start: &str| all.iter().any(|pod| pod.name_any().starts_with(start));
            let parts = ["drumline-operator-", "drumline-agent-", "drumline-gateway-"];
            if unready.is_empty() && parts.iter().all(|part| has(part)) {
                return Ok(());
            }
            Err(format!("not ready: {unready:?} of {}", all.len()))
        };
        let took = self.until("the chart's pods ready", ready).await;
        println!("the chart's pods are ready after {took:.1?}");
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|one| one.type_ == "Ready" && one.status == "True")
}

/// Values for a machine of two cores, and images that are there already.
const VALUES: &[&str] = &[
    "--set=image.repository=drumline.test/drumline",
    "--set=image.tag=test",
    "--set=image.pullPolicy=Never",
    "--set=fleet.cpuDeviceMilli=100",
    "--set=operator.resources.requests.cpu=20m",
    "--set=gateway.replicas=1",
    "--set=gateway.resources.requests.cpu=20m",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_chart_runs_gangs_on_a_real_node() {
    let stage = match Stage::start().await {
        Ok(stage) => stage,
        Err(why) => return skipped_real(&why),
    };
    node_is_ready(&stage).await;
    stage.real.cluster.plain_namespace(&stage.client, JOBS).await;
    let shared = stage.folder.path().join("shared");
    shared_folder(&shared);
    let allowed = format!("--set=ranks.allowHostPath={{{}}}", shared.display());
    let chart = ["install", "drumline", "CHART", "--namespace", SPACE, "--create-namespace"];
    stage.helm(&[&chart[..], VALUES, &[&allowed]].concat());
    stage.chart_is_ready().await;
    agents_say_that_devices_are_sound(&stage).await;
    an_agent_can_change_only_its_own_node(&stage).await;
    a_command_runs_as_a_gang(&stage).await;
    a_run_is_trained_and_served(&stage, &shared).await;
    an_upgrade_leaves_running_jobs_alone(&stage).await;
    prometheus_reads_the_metrics(&stage).await;
    uninstalling_leaves_the_custom_resources(&stage).await;
}

fn skipped_real(why: &str) {
    if std::env::var_os("DRUMLINE_REAL").is_some() {
        return skipped(why);
    }
    eprintln!("skipped: {why}");
}

async fn node_is_ready(stage: &Stage) {
    let nodes: Api<Node> = Api::all(stage.client.clone());
    let ready = || async {
        let node = nodes.get(NODE).await.map_err(|error| error.to_string())?;
        let status = node.status.unwrap_or_default();
        let ready = status.conditions.into_iter().flatten().find(|one| one.type_ == "Ready");
        match ready {
            Some(one) if one.status == "True" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    };
    let took = stage.until("the node ready", ready).await;
    println!("the node is ready after {took:.1?}");
}

async fn agents_say_that_devices_are_sound(stage: &Stage) {
    let nodes: Api<Node> = Api::all(stage.client.clone());
    let told = || async {
        let node = nodes.get(NODE).await.map_err(|error| error.to_string())?;
        let status = node.status.unwrap_or_default();
        let all = status.conditions.unwrap_or_default();
        let sound = all.iter().any(|one| one.type_ == node::CONDITION && one.status == "True");
        if sound { Ok(()) } else { Err(format!("{all:?}")) }
    };
    stage.until("the node's devices said to be sound", told).await;
}

/// With the token of the agent's own pod: what its rights and the policy leave.
async fn an_agent_can_change_only_its_own_node(stage: &Stage) {
    let pods: Api<Pod> = Api::namespaced(stage.client.clone(), SPACE);
    let list = ListParams::default().labels("app.kubernetes.io/name=drumline-agent");
    let pod = pods.list(&list).await.unwrap().items.remove(0);
    let ask = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {
        "audiences": [], "expirationSeconds": 3600,
        "boundObjectRef": { "apiVersion": "v1", "kind": "Pod", "name": pod.name_any(),
                            "uid": pod.uid() },
    }});
    let path = format!("/api/v1/namespaces/{SPACE}/serviceaccounts/drumline-agent/token");
    let request = http::Request::post(path)
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&ask).unwrap())
        .unwrap();
    let answer: Value = stage.client.request(request).await.unwrap();
    let token = answer["status"]["token"].as_str().unwrap();
    let other: Node = serde_json::from_value(json!({ "metadata": { "name": "other" } })).unwrap();
    let nodes: Api<Node> = Api::all(stage.client.clone());
    nodes.create(&PostParams::default(), &other).await.unwrap();
    let agent: Api<Node> = Api::all(stage.real.cluster.client(token).await);
    let params = PatchParams::default();
    let taint = json!({ "spec": { "taints": [{ "key": node::TAINT, "effect": "NoSchedule" }] } });
    let refused = agent.patch("other", &params, &Patch::Merge(&taint)).await.unwrap_err();
    assert!(refused.to_string().contains("only the node that it runs on"), "{refused}");
    let cordon = json!({ "spec": { "unschedulable": true } });
    let refused = agent.patch(NODE, &params, &Patch::Merge(&cordon)).await.unwrap_err();
    assert!(refused.to_string().contains("nothing of its node but"), "{refused}");
    let more = json!({ "status": { "capacity": { "nvidia.com/gpu": "8" } } });
    let refused = agent.patch_status(NODE, &params, &Patch::Merge(&more)).await.unwrap_err();
    assert!(refused.to_string().contains("no condition but"), "{refused}");
    let refused = agent.list(&ListParams::default()).await.unwrap_err();
    assert!(refused.to_string().contains("forbidden"), "{refused}");
    nodes.delete("other", &DeleteParams::default()).await.unwrap();
}

async fn a_command_runs_as_a_gang(stage: &Stage) {
    let program = "i=0; until getent hosts $MASTER_ADDR; do i=$((i+1)); [ $i -lt 60 ] || exit 9; \
                   sleep 1; done; echo rank $RANK of $WORLD_SIZE";
    let kind = JobKind::CommandJob;
    let spec = json!({ "argv": ["sh", "-c", program], "ranks": 2 });
    stage.apply(kind, "hello", spec).await;
    let status = stage.phase(kind, "hello", "succeeded").await;
    assert_eq!(status["attempt"], 1, "{status}");
    for rank in 0..2 {
        let log = stage.log(&format!("hello-c1-{rank}")).await;
        assert!(log.contains(&format!("rank {rank} of 2")), "{log}");
        assert!(log.contains("r0.hello-c.team.svc"), "rank 0 was not found by name: {log}");
    }
    stage.jobs(kind).delete("hello", &DeleteParams::default()).await.unwrap();
}

async fn an_upgrade_leaves_running_jobs_alone(stage: &Stage) {
    let kind = JobKind::CommandJob;
    let spec = json!({ "argv": ["sleep", "600"], "ranks": 2 });
    stage.apply(kind, "long", spec).await;
    stage.phase(kind, "long", "running").await;
    let uids = || async {
        let which = ListParams::default().labels("drumline.dev/job=long");
        let pods = stage.pods().list(&which).await.unwrap();
        let mut uids: Vec<_> = pods.iter().filter_map(ResourceExt::uid).collect();
        uids.sort();
        uids
    };
    let before = uids().await;
    assert_eq!(before.len(), 2);
    let secrets: Api<k8s_openapi::api::core::v1::Secret> =
        Api::namespaced(stage.client.clone(), SPACE);
    let tokens = secrets.get("drumline-tokens").await.unwrap().data;
    let more = ["--set=operator.replicas=1", "--set=fleet.topology={rack=example.org/rack}"];
    stage.helm(&[&["upgrade", "drumline", "CHART", "--namespace", SPACE], VALUES, &more].concat());
    // The new operator leads: a job that is submitted now runs.
    stage.apply(kind, "after", json!({ "argv": ["sh", "-c", "true"], "ranks": 1 })).await;
    stage.phase(kind, "after", "succeeded").await;
    stage.chart_is_ready().await;
    assert_eq!(uids().await, before, "the upgrade touched pods of a running job");
    assert_eq!(stage.phase(kind, "long", "running").await["attempt"], 1);
    assert_eq!(secrets.get("drumline-tokens").await.unwrap().data, tokens, "tokens changed");
}

/// A real Prometheus finds what to scrape by the API server, and shows its token.
async fn prometheus_reads_the_metrics(stage: &Stage) {
    if run("prometheus", &["--version"]).is_err() {
        return skipped("no prometheus in PATH; apt-get install prometheus");
    }
    let secrets: Api<k8s_openapi::api::core::v1::Secret> =
        Api::namespaced(stage.client.clone(), SPACE);
    let tokens = secrets.get("drumline-tokens").await.unwrap().data.unwrap();
    let folder = stage.folder.path();
    std::fs::write(folder.join("metrics-token"), &tokens["metrics"].0).unwrap();
    // What the chart's ServiceMonitor says, in Prometheus' own words. Debian's Prometheus cannot ask
    // the API server for targets: the endpoints of the same services are looked up for it.
    let config = json!({
        "global": { "scrape_interval": "2s" },
        "scrape_configs": [{
            "job_name": "drumline",
            "honor_labels": true,
            "authorization": { "credentials_file": folder.join("metrics-token") },
            "static_configs": [{ "targets": metric_targets(stage).await }],
        }],
    });
    std::fs::write(folder.join("prometheus.yml"), config.to_string()).unwrap();
    let port = crate::cluster::free_port();
    let args = [
        format!("--config.file={}", folder.join("prometheus.yml").display()),
        format!("--storage.tsdb.path={}", folder.join("tsdb").display()),
        format!("--web.listen-address=127.0.0.1:{port}"),
    ];
    let log = folder.join("prometheus.log");
    let mut prometheus = crate::cluster::child(Path::new("prometheus"), &log, &args);
    for (query, what) in [
        ("sum(drumline_operator_leading) == 1", "one operator leads"),
        ("drumline_jobs{kind=\"CommandJob\",phase=\"running\"} == 1", "a job runs"),
        ("sum(drumline_devices_allocated{kind=\"cpu\"}) == 2", "two devices are held"),
        ("drumline_node_info{node=\"real-1\"}", "the agent tells of its node"),
        ("drumline_node_memory_total_bytes > 1e8", "the node has memory"),
        (
            "drumline_gateway_requests_total{model=\"demo\",outcome=\"ok\"} >= 1",
            "a model was asked",
        ),
    ] {
        let asked = || async {
            let answer = query_prometheus(port, query)?;
            let found = answer["data"]["result"].as_array().is_some_and(|all| !all.is_empty());
            if found { Ok(()) } else { Err(answer.to_string()) }
        };
        stage.until(&format!("in Prometheus: {what}"), asked).await;
    }
    let _ = prometheus.kill();
    let _ = prometheus.wait();
    println!("Prometheus scraped operator, agent and gateway");
}

/// Returns where the pods behind the services of metrics are scraped.
async fn metric_targets(stage: &Stage) -> Vec<String> {
    let slices: Api<EndpointSlice> = Api::namespaced(stage.client.clone(), SPACE);
    let which = ListParams::default().labels("drumline.dev/metrics=true");
    let mut targets = Vec::new();
    for slice in slices.list(&which).await.unwrap() {
        let ports: Vec<i32> = slice.ports.iter().flatten().filter_map(|port| port.port).collect();
        for address in slice.endpoints.iter().flat_map(|end| &end.addresses) {
            targets.extend(ports.iter().map(|port| format!("{address}:{port}")));
        }
    }
    assert!(targets.len() >= 3, "operator, agent and gateway: {targets:?}");
    targets
}

fn query_prometheus(port: u16, query: &str) -> Result<Value, String> {
    use std::io::{Read, Write};
    let mut escaped = String::new();
    for byte in query.bytes() {
        escaped.push_str(&format!("%{byte:02x}"));
    }
    let mut stream =
        std::net::TcpStream::connect(("127.0.0.1", port)).map_err(|e| e.to_string())?;
    let request = format!("GET /api/v1/query?query={escaped} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    serde_json::from_str(body).map_err(|error| format!("{error}: {answer}"))
}

async fn uninstalling_leaves_the_custom_resources(stage: &Stage) {
    for name in ["long", "after"] {
        let jobs = stage.jobs(JobKind::CommandJob);
        jobs.delete(name, &DeleteParams::default()).await.unwrap();
    }
    let pods = stage.pods();
    let gone = || async {
        let left = pods.list(&ListParams::default()).await.map_err(|e| e.to_string())?.items.len();
        if left == 0 { Ok(()) } else { Err(format!("{left} pods are left")) }
    };
    stage.until("the jobs' pods gone", gone).await;
    stage.helm(&["uninstall", "drumline", "--namespace", SPACE, "--wait"]);
    let crds: Api<CustomResourceDefinition> = Api::all(stage.client.clone());
    assert!(crds.get_opt("trainingjobs.drumline.dev").await.unwrap().is_some());
}
