//! One API server for all tests of this binary, and what they ask of it.

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use drumline_operator::{crd, deploy, job::resource};
use drumline_spec::JobKind;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{AuthInfo, Cluster as ClusterEntry, Context, KubeConfigOptions, Kubeconfig};
use kube::config::{NamedAuthInfo, NamedCluster, NamedContext};
use kube::{Client, Config};
use serde_json::{Value, json};

/// The token of a user who may do everything.
pub(crate) const ADMIN: &str = "admin-token";
/// The token of the operator's user, who may do what its role says.
pub(crate) const OPERATOR: &str = "operator-token";
/// A busy machine may take its time; a wait that ends here has failed.
const WAIT_DEADLINE: Duration = Duration::from_secs(180);
const START_DEADLINE: Duration = Duration::from_secs(300);

/// A running API server.
pub(crate) struct Cluster {
    url: String,
    ca: String,
    /// One test at a time: they share nodes.
    pub(crate) turn: tokio::sync::Mutex<()>,
    folder: tempfile::TempDir,
    children: Vec<Child>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The last first: what calls the API server ends before it.
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Returns the API server, or says why there is none.
pub(crate) fn cluster() -> Option<&'static Cluster> {
    static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
    let cluster = CLUSTER.get_or_init(|| match programs() {
        Ok((etcd, server)) => Some(kept(move || Cluster::start(&etcd, &server, &Setup::default()))),
        Err(why) => {
            skipped(&why);
            None
        }
    });
    cluster.as_ref()
}

/// How an API server differs from that of most tests.
#[derive(Default)]
pub(crate) struct Setup {
    /// Addresses and names beside loopback under which it is called.
    pub(crate) names: Vec<String>,
    /// Further users: token, name, group.
    pub(crate) users: Vec<(&'static str, String, &'static str)>,
    /// Further flags.
    pub(crate) flags: Vec<String>,
}

/// Returns an API server of the caller's own, or says why there is none.
pub(crate) fn own(setup: Setup) -> Result<Cluster, String> {
    let (etcd, server) = programs()?;
    Ok(kept(move || Cluster::start(&etcd, &server, &setup)))
}

/// Says that a test is skipped, or fails where nothing may be.
pub(crate) fn skipped(why: &str) {
    assert!(std::env::var_os("DRUMLINE_REQUIRE_KUBE").is_none(), "{why}");
    eprintln!("skipped: {why}");
}

/// Runs `start` on a thread that never ends: the children die with the thread that made them.
fn kept<T: Send + 'static>(start: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(start());
        loop {
            std::thread::park();
        }
    });
    receiver.recv().expect("the cluster starts")
}

/// Returns the folder of the programs that `tests/kube/build` makes.
pub(crate) fn programs_folder() -> PathBuf {
    match std::env::var_os("DRUMLINE_KUBE_BIN") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kube/bin"),
    }
}

fn programs() -> Result<(PathBuf, PathBuf), String> {
    let server = programs_folder().join("kube-apiserver");
    if !server.exists() {
        return Err(format!("no {}; tests/kube/build makes it (needs Go)", server.display()));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let etcd = std::env::split_paths(&path).map(|folder| folder.join("etcd")).find(|p| p.exists());
    Ok((etcd.ok_or("no etcd in PATH; apt-get install etcd-server")?, server))
}

/// Returns a port on which nobody listens now.
///
/// It lies below those that the system gives to whoever names none, and is returned once: nobody else
/// has it before it is used.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Processes that run at the same time begin at other places.
        let at = std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (at % 10_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Returns a program that `tests/kube/build` makes, or says that it is missing.
pub(crate) fn program(name: &str) -> Result<PathBuf, String> {
    let program = programs_folder().join(name);
    if program.exists() {
        return Ok(program);
    }
    Err(format!("no {}; `tests/kube/build all` makes it (needs Go)", program.display()))
}

/// Starts a program that dies with this process.
pub(crate) fn child(program: &Path, log: &Path, args: &[String]) -> Child {
    let log = std::fs::File::create(log).expect("a log file");
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a log file"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{} starts: {error}", program.display()))
}

impl Cluster {
    fn start(etcd: &Path, server: &Path, setup: &Setup) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let text = |path: PathBuf| path.display().to_string();
        let (client, peer, secure) = (free_port(), free_port(), free_port());
        let mut children = vec![child(
            etcd,
            &at("etcd.log"),
            &[
                format!("--data-dir={}", text(at("etcd"))),
                format!("--listen-client-urls=http://127.0.0.1:{client}"),
                format!("--advertise-client-urls=http://127.0.0.1:{client}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
            ],
        )];
        let names = ["127.0.0.1".to_owned()].into_iter().chain(setup.names.iter().cloned());
        let names: Vec<String> = names.collect();
        let certificate = rcgen::generate_simple_self_signed(names).unwrap();
        let ca = certificate.cert.pem();
        std::fs::write(at("tls.crt"), &ca).unwrap();
        std::fs::write(at("tls.key"), certificate.signing_key.serialize_pem()).unwrap();
        let accounts = rcgen::KeyPair::generate().unwrap();
        std::fs::write(at("sa.key"), accounts.serialize_pem()).unwrap();
        std::fs::write(at("sa.pub"), accounts.public_key_pem()).unwrap();
        let mut users = format!(
            "{ADMIN},admin,1,\"system:masters\"\n{OPERATOR},drumline-operator,2,\"drumline\"\n"
        );
        for (token, name, group) in &setup.users {
            writeln!(users, "{token},{name},{name},\"{group}\"").unwrap();
        }
        std::fs::write(at("tokens.csv"), users).unwrap();
        let flags = [
            vec![
                format!("--etcd-servers=http://127.0.0.1:{client}"),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                format!("--secure-port={secure}"),
                format!("--tls-cert-file={}", text(at("tls.crt"))),
                format!("--tls-private-key-file={}", text(at("tls.key"))),
                format!("--cert-dir={}", text(at("certs"))),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                format!("--service-account-key-file={}", text(at("sa.pub"))),
                format!("--service-account-signing-key-file={}", text(at("sa.key"))),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
                format!("--token-auth-file={}", text(at("tokens.csv"))),
                "--authorization-mode=RBAC".to_owned(),
                "--endpoint-reconciler-type=none".to_owned(),
                "--max-requests-inflight=0".to_owned(),
                "--max-mutating-requests-inflight=0".to_owned(),
                "--enable-priority-and-fairness=false".to_owned(),
            ],
            // The last of two flags of one name holds.
            setup.flags.clone(),
        ]
        .concat();
        children.push(child(server, &at("apiserver.log"), &flags));
        let mut cluster = Self {
            url: format!("https://127.0.0.1:{secure}"),
            ca,
            turn: tokio::sync::Mutex::new(()),
            children,
            folder,
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(cluster.prepare());
        cluster
    }

    fn has_ended(&mut self) -> bool {
        self.children.iter_mut().any(|child| !matches!(child.try_wait(), Ok(None)))
    }

    async fn prepare(&mut self) {
        let admin = self.client(ADMIN).await;
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let ready = admin.request_text(http_get("/readyz"));
            match tokio::time::timeout(Duration::from_secs(5), ready).await {
                Ok(Ok(text)) if text == "ok" => break,
                _ if Instant::now() > deadline || self.has_ended() => {
                    let log = std::fs::read_to_string(self.folder.path().join("apiserver.log"));
                    panic!("the API server is not ready: {}", log.unwrap_or_default());
                }
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
        let crds: Api<CustomResourceDefinition> = Api::all(admin.clone());
        for value in crd::all() {
            let crd: CustomResourceDefinition = serde_json::from_value(value).unwrap();
            crds.create(&PostParams::default(), &crd).await.unwrap();
        }
        for crd in crd::all() {
            let name = crd["metadata"]["name"].as_str().unwrap();
            let established = kube::runtime::wait::conditions::is_crd_established();
            let wait = kube::runtime::wait::await_condition(crds.clone(), name, established);
            tokio::time::timeout(START_DEADLINE, wait).await.unwrap().unwrap();
        }
        self.namespace(&admin, "drumline-system").await;
        self.grant(&admin).await;
    }

    /// Gives the operator's user the operator's roles, and nothing else.
    async fn grant(&self, admin: &Client) {
        use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
        const SPACE: &str = "drumline-system";
        let params = PostParams::default();
        let user = json!([{
            "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "drumline-operator",
        }]);
        // Under another name than the chart's, which a test installs beside it.
        let named = |mut value: Value| {
            value["metadata"]["name"] = json!("test-operator");
            value
        };
        let role: ClusterRole = serde_json::from_value(named(deploy::cluster_role())).unwrap();
        Api::all(admin.clone()).create(&params, &role).await.unwrap();
        let role: Role = serde_json::from_value(named(deploy::lease_role(SPACE))).unwrap();
        Api::namespaced(admin.clone(), SPACE).create(&params, &role).await.unwrap();
        let all = deploy::all(SPACE);
        let of = |kind: &str| {
            let mut found = named(all.iter().find(|one| one["kind"] == kind).unwrap().clone());
            found["roleRef"]["name"] = json!("test-operator");
            found["subjects"] = user.clone();
            found
        };
        let binding: ClusterRoleBinding = serde_json::from_value(of("ClusterRoleBinding")).unwrap();
        Api::all(admin.clone()).create(&params, &binding).await.unwrap();
        let binding: RoleBinding = serde_json::from_value(of("RoleBinding")).unwrap();
        Api::namespaced(admin.clone(), SPACE).create(&params, &binding).await.unwrap();
    }

    /// Returns how to reach the API server as a user.
    pub(crate) async fn config(&self, token: &str) -> Config {
        let mut config =
            Config::from_custom_kubeconfig(self.kubeconfig(token), &KubeConfigOptions::default())
                .await
                .unwrap();
        config.read_timeout = Some(Duration::from_secs(295));
        config
    }

    /// Returns a kubeconfig for a user.
    pub(crate) fn kubeconfig(&self, token: &str) -> Kubeconfig {
        use base64_of as base64;
        Kubeconfig {
            clusters: vec![NamedCluster {
                name: "test".to_owned(),
                cluster: Some(ClusterEntry {
                    server: Some(self.url.clone()),
                    certificate_authority_data: Some(base64(self.ca.as_bytes())),
                    ..ClusterEntry::default()
                }),
                other: Default::default(),
            }],
            auth_infos: vec![NamedAuthInfo {
                name: "test".to_owned(),
                auth_info: Some(AuthInfo {
                    token: Some(token.to_owned().into()),
                    ..AuthInfo::default()
                }),
                other: Default::default(),
            }],
            contexts: vec![NamedContext {
                name: "test".to_owned(),
                context: Some(Context {
                    cluster: "test".to_owned(),
                    user: Some("test".to_owned()),
                    ..Context::default()
                }),
                other: Default::default(),
            }],
            current_context: Some("test".to_owned()),
            ..Kubeconfig::default()
        }
    }

    /// Returns the folder of its files and logs.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a user's kubeconfig to a file, and returns where.
    pub(crate) fn kubeconfig_file(&self, token: &str) -> PathBuf {
        let path = self.folder.path().join(format!("{token}.kubeconfig"));
        std::fs::write(&path, serde_json::to_string(&self.kubeconfig(token)).unwrap()).unwrap();
        path
    }

    /// Writes a user's kubeconfig for callers that reach the API server at another address.
    pub(crate) fn kubeconfig_from(&self, token: &str, address: &str) -> PathBuf {
        let path = self.folder.path().join(format!("{token}-{address}.kubeconfig"));
        let text = serde_json::to_string(&self.kubeconfig(token)).unwrap();
        let text = text.replace("https://127.0.0.1:", &format!("https://{address}:"));
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Starts a program that belongs to the cluster, and dies with it.
    pub(crate) fn run(&mut self, name: &str, program: &Path, args: &[String]) {
        let log = self.folder.path().join(format!("{name}.log"));
        let (program, args) = (program.to_owned(), args.to_vec());
        self.children.push(kept(move || child(&program, &log, &args)));
    }

    /// Returns a client of a user.
    pub(crate) async fn client(&self, token: &str) -> Client {
        Client::try_from(self.config(token).await).unwrap()
    }

    /// Creates a namespace where a controller manager does the rest.
    pub(crate) async fn plain_namespace(&self, client: &Client, name: &str) {
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let mut namespace = Namespace::default();
        namespace.metadata.name = Some(name.to_owned());
        namespaces.create(&PostParams::default(), &namespace).await.unwrap();
    }

    /// Creates a namespace and the service account that its pods run as, which is otherwise the
    /// controller manager's work.
    pub(crate) async fn namespace(&self, client: &Client, name: &str) {
        self.plain_namespace(client, name).await;
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), name);
        let mut account = ServiceAccount::default();
        account.metadata.name = Some("default".to_owned());
        accounts.create(&PostParams::default(), &account).await.unwrap();
    }
}

fn http_get(path: &str) -> http::Request<Vec<u8>> {
    http::Request::get(path).body(Vec::new()).unwrap()
}

/// Base64 with padding: RFC 4648, section 4.
fn base64_of(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let all =
            chunk.iter().chain([&0, &0]).take(3).fold(0u32, |all, b| all << 8 | u32::from(*b));
        for place in 0..4 {
            if place <= chunk.len() {
                let letter = LETTERS[(all >> (18 - 6 * place) & 63) as usize];
                out.push(char::from(letter));
            } else {
                out.push('=');
            }
        }
    }
    out
}

/// What tests do, as the administrator.
#[derive(Clone)]
pub(crate) struct Admin {
    /// The way to the API server.
    pub(crate) client: Client,
    /// The test's namespace.
    pub(crate) namespace: String,
}

impl Admin {
    /// Starts a test: an empty namespace, and no nodes, jobs and pods of tests before.
    pub(crate) async fn start(cluster: &Cluster, namespace: &str) -> Self {
        let client = cluster.client(ADMIN).await;
        cluster.namespace(&client, namespace).await;
        for kind in JobKind::ALL {
            let jobs: Api<DynamicObject> = Api::all_with(client.clone(), &resource(kind));
            for job in jobs.list(&ListParams::default()).await.unwrap() {
                let (name, space) = (job.metadata.name.unwrap(), job.metadata.namespace.unwrap());
                let jobs: Api<DynamicObject> =
                    Api::namespaced_with(client.clone(), &space, &resource(kind));
                let free = json!({ "metadata": { "finalizers": null } });
                let params = PatchParams::default();
                jobs.patch(&name, &params, &Patch::Merge(&free)).await.unwrap();
                let _ = jobs.delete(&name, &DeleteParams::default()).await;
            }
        }
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        for pod in Api::<Pod>::all(client.clone()).list(&ListParams::default()).await.unwrap() {
            let (name, space) = (pod.metadata.name.unwrap(), pod.metadata.namespace.unwrap());
            let _ = Api::<Pod>::namespaced(client.clone(), &space).delete(&name, &now).await;
        }
        let nodes: Api<Node> = Api::all(client.clone());
        nodes.delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
        Self { client, namespace: namespace.to_owned() }
    }

    /// Returns the jobs of a kind.
    pub(crate) fn jobs(&self, kind: JobKind) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.namespace, &resource(kind))
    }

    /// Returns the pods.
    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Returns the nodes.
    pub(crate) fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    /// Creates a job as `kubectl apply` does: unknown fields are refused.
    pub(crate) async fn apply(
        &self,
        kind: JobKind,
        name: &str,
        spec: Value,
    ) -> kube::Result<DynamicObject> {
        let mut object = DynamicObject::new(name, &resource(kind));
        object.data = json!({ "spec": spec });
        let params = PatchParams {
            field_manager: Some("test".to_owned()),
            field_validation: Some(kube::api::ValidationDirective::Strict),
            ..PatchParams::default()
        };
        self.jobs(kind).patch(name, &params, &Patch::Apply(&object)).await
    }

    /// Adds a ready node.
    pub(crate) async fn add_node(&self, name: &str, gpus: u32, cpu: &str) {
        let node: Node = serde_json::from_value(json!({
            "metadata": { "name": name, "labels": { "topology.kubernetes.io/zone": "z" } },
        }))
        .unwrap();
        self.nodes().create(&PostParams::default(), &node).await.unwrap();
        let capacity = json!({ "cpu": cpu, "memory": "64Gi", "pods": "110", "nvidia.com/gpu": gpus.to_string() });
        let status = json!({ "status": {
            "capacity": capacity, "allocatable": capacity,
            "conditions": [condition(true)],
        }});
        let params = PatchParams::default();
        self.nodes().patch_status(name, &params, &Patch::Merge(&status)).await.unwrap();
        // The API server taints new nodes until their kubelet is heard.
        let spec = json!({ "spec": { "taints": null } });
        self.nodes().patch(name, &params, &Patch::Merge(&spec)).await.unwrap();
    }

    /// Marks a node ready or not.
    pub(crate) async fn mark_node(&self, name: &str, is_ready: bool) {
        let status = json!({ "status": { "conditions": [condition(is_ready)] } });
        let params = PatchParams::default();
        self.nodes().patch_status(name, &params, &Patch::Merge(&status)).await.unwrap();
    }

    /// Returns a job's status.
    pub(crate) async fn status(&self, kind: JobKind, name: &str) -> Value {
        let job = self.jobs(kind).get(name).await.unwrap();
        job.data.get("status").cloned().unwrap_or_default()
    }

    /// Waits until a job's status is as wanted, and returns it.
    pub(crate) async fn wait(
        &self,
        kind: JobKind,
        name: &str,
        what: &str,
        is_good: impl Fn(&Value) -> bool,
    ) -> Value {
        let deadline = Instant::now() + WAIT_DEADLINE;
        loop {
            let status = self.status(kind, name).await;
            if is_good(&status) {
                return status;
            }
            if Instant::now() > deadline {
                let pods = self.pods().list(&ListParams::default()).await.unwrap();
                let pods: Vec<String> = pods
                    .iter()
                    .map(|pod| {
                        format!(
                            "{:?} {:?}",
                            pod.metadata.name,
                            pod.spec.as_ref().and_then(|s| s.node_name.as_ref())
                        )
                    })
                    .collect();
                panic!("{name} is not {what}: {status:#}\n{pods:#?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn condition(is_ready: bool) -> Value {
    json!({
        "type": "Ready",
        "status": if is_ready { "True" } else { "Unknown" },
        "reason": "Test",
        "lastHeartbeatTime": "2026-01-01T00:00:00Z",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    })
}
