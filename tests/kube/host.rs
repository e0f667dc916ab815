//! One real node on this machine: containerd, runc and a kubelet in network, mount and process
//! namespaces of their own, which leave nothing behind when they go.
//!
//! The API server runs outside of them, a virtual cable away.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::cluster::{ADMIN, Cluster, Setup, own, program};

/// The node's name, and its user's token.
pub(crate) const NODE: &str = "real-1";
const NODE_TOKEN: &str = "node-token";
const MANAGER_TOKEN: &str = "manager-token";
const PROXY_TOKEN: &str = "proxy-token";
const DNS_TOKEN: &str = "dns-token";
/// Where Debian and others put the network plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// The cluster with one real node.
pub(crate) struct Real {
    /// Its API server.
    pub(crate) cluster: Cluster,
    inside: String,
    namespaces: Namespaces,
}

/// Addresses that no other run on this machine uses at the same time.
struct Addresses {
    /// The network of pods, without its last number.
    pods: String,
    /// The API server's end of the cable.
    outside: String,
    /// The node's end.
    inside: String,
    /// The cable's outer name.
    cable: String,
    cgroup: String,
}

impl Addresses {
    fn new() -> Self {
        let own = std::process::id();
        let block = 128 + own % 64;
        Self {
            pods: format!("10.{block}.0"),
            outside: format!("10.{block}.1.1"),
            inside: format!("10.{block}.1.2"),
            cable: format!("drl{own}"),
            cgroup: format!("drumline-test-{own}"),
        }
    }
}

/// Namespaces that live as long as their first process.
struct Namespaces {
    holder: Child,
    first: u32,
    cgroup: String,
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        // With the first process of a process namespace all others go.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        // They are still in their cgroups for a moment.
        for _ in 0..40 {
            std::thread::sleep(Duration::from_millis(250));
            if remove_cgroups(&self.cgroup) {
                break;
            }
        }
    }
}

/// Returns whether nothing is left of them.
fn remove_cgroups(name: &str) -> bool {
    let root = Path::new("/sys/fs/cgroup");
    let controllers = std::fs::read_dir(root).into_iter().flatten().flatten();
    let all: Vec<PathBuf> =
        controllers.map(|one| one.path().join(name)).chain([root.join(name)]).collect();
    all.iter().for_each(|folder| remove_tree(folder));
    !all.iter().any(|folder| folder.exists())
}

/// Removes a folder of cgroups: its children first, its files go with it.
fn remove_tree(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(folder);
}

/// Runs a program to its end.
pub(crate) fn run(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Result<String, String> {
    let named = program.as_ref().to_string_lossy().into_owned();
    let out = Command::new(&program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{named}: {error}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(text);
    }
    Err(format!("{named} {}: {text}{}", args.join(" "), String::from_utf8_lossy(&out.stderr)))
}

fn in_path(name: &str, package: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin".into(), "/sbin".into()];
    std::env::split_paths(&path)
        .chain(more)
        .map(|folder| folder.join(name))
        .find(|program| program.exists())
        .ok_or_else(|| format!("no {name}; apt-get install {package}"))
}

/// Returns the folder of the network plugins.
fn plugins() -> Result<&'static str, String> {
    PLUGINS
        .into_iter()
        .find(|folder| Path::new(folder).join("ptp").exists())
        .ok_or_else(|| "no CNI plugins; apt-get install containernetworking-plugins".to_owned())
}

impl Namespaces {
    fn start(addresses: &Addresses) -> Result<Self, String> {
        // The shell waits, and so takes in processes whose parents have gone.
        let script = "mount --make-rshared / && ip link set lo up && \
                      sysctl -qw net.ipv4.ip_forward=1 && echo up && \
                      while :; do sleep 3600; done";
        let mut holder = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--mount", "--pid", "--fork"])
            .args(["--kill-child=KILL", "--mount-proc", "--propagation", "private"])
            .args(["sh", "-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        let mut line = String::new();
        let out = holder.stdout.take().ok_or("no output of unshare")?;
        let read = std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line);
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let first = std::fs::read_to_string(&children).unwrap_or_default();
        let first = first.split_whitespace().next().and_then(|text| text.parse().ok());
        match (read, line.trim(), first) {
            (Ok(_), "up", Some(first)) => {
                Ok(Self { holder, first, cgroup: addresses.cgroup.clone() })
            }
            _ => {
                let _ = holder.kill();
                let _ = holder.wait();
                Err("namespaces cannot be made here (`unshare --net --mount --pid`)".to_owned())
            }
        }
    }

    /// Lays the cable between the namespaces and the machine.
    fn connect(&self, addresses: &Addresses) -> Result<(), String> {
        let (cable, first) = (addresses.cable.as_str(), self.first.to_string());
        let ip = |args: &str| run("ip", &args.split(' ').collect::<Vec<_>>()).map(drop);
        ip(&format!("link add {cable} type veth peer name eth0 netns {first}"))?;
        ip(&format!("addr add {}/30 dev {cable}", addresses.outside))?;
        ip(&format!("link set {cable} up"))?;
        self.inside("ip", &format!("addr add {}/30 dev eth0", addresses.inside))?;
        self.inside("ip", "link set eth0 up")?;
        self.inside("ip", &format!("route add default via {}", addresses.outside))?;
        ip(&format!("route add {}.0/24 via {}", addresses.pods, addresses.inside))
    }

    fn inside(&self, program: &str, args: &str) -> Result<String, String> {
        let first = self.first.to_string();
        let mut all = vec!["-t", &first, "-n", "-m", "-p", "--", program];
        all.extend(args.split(' '));
        run("nsenter", &all)
    }

    /// Starts a program inside that dies with the namespaces.
    fn start_inside(&self, cluster: &mut Cluster, name: &str, program: &Path, args: &[String]) {
        let first = self.first.to_string();
        let mut all: Vec<String> =
            ["-t", &first, "-n", "-m", "-p", "--"].map(str::to_owned).to_vec();
        all.push(program.display().to_string());
        all.extend(args.iter().cloned());
        cluster.run(name, Path::new("nsenter"), &all);
    }
}

/// A certificate authority for the kubelet's callers, and the API server's certificate by it.
fn kubelet_client(folder: &Path) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "drumline-test");
    let key = KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::from_params(&params, &key);
    let mut client = CertificateParams::new(Vec::new()).unwrap();
    client.distinguished_name.push(rcgen::DnType::CommonName, "kube-apiserver");
    client.distinguished_name.push(rcgen::DnType::OrganizationName, "system:masters");
    client.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let client_key = KeyPair::generate().unwrap();
    let client = client.signed_by(&client_key, &issuer).unwrap();
    std::fs::write(folder.join("client-ca.crt"), authority.pem()).unwrap();
    std::fs::write(folder.join("client.crt"), client.pem()).unwrap();
    std::fs::write(folder.join("client.key"), client_key.serialize_pem()).unwrap();
}

/// Ranks that run slowly until this is dropped.
pub(crate) struct Slowly {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Slowly {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It lets the ranks go on before it ends.
            let _ = thread.join();
        }
    }
}

/// Returns the ranks that run in a cgroup, as this machine knows them.
fn ranks_in(cgroup: &str) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let is_rank = |folder: &Path| {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        read("cmdline").starts_with("drumline\0rank\0") && read("cgroup").contains(cgroup)
    };
    let ours = entries.flatten().filter(|entry| is_rank(&entry.path()));
    ours.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

impl Real {
    /// Lets the ranks in containers run a small part of the time, so that a run is not over before a
    /// test has done to it what it is about.
    pub(crate) fn slowly(&self) -> Slowly {
        let (cgroup, over) = (self.namespaces.cgroup.clone(), Arc::new(AtomicBool::new(false)));
        let ended = over.clone();
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let ranks = ranks_in(&cgroup);
                for (signal, ms) in [(Signal::STOP, 150), (Signal::CONT, 15)] {
                    for rank in &ranks {
                        // One that has just ended is none the wiser.
                        let _ = kill_process(*rank, signal);
                    }
                    std::thread::sleep(Duration::from_millis(ms));
                }
            }
        });
        Slowly { over, thread: Some(thread) }
    }

    /// Starts it, or says what is missing on this machine. `images` are archives to import.
    pub(crate) fn start(images: &[PathBuf]) -> Result<Self, String> {
        if run("id", &["-u"])?.trim() != "0" {
            return Err("a kubelet needs root".to_owned());
        }
        let plugins = plugins()?;
        for (name, package) in [
            ("containerd", "containerd"),
            ("ctr", "containerd"),
            ("runc", "runc"),
            ("iptables", "iptables"),
            ("conntrack", "conntrack"),
        ] {
            in_path(name, package)?;
        }
        let programs =
            ["kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "coredns"]
                .map(program);
        let [manager, scheduler, kubelet, proxy, dns] = programs;
        let (manager, scheduler, kubelet) = (manager?, scheduler?, kubelet?);
        let (proxy, dns) = (proxy?, dns?);

        let addresses = Addresses::new();
        let namespaces = Namespaces::start(&addresses)?;
        namespaces.connect(&addresses)?;
        let keys = tempfile::tempdir().unwrap().keep();
        kubelet_client(&keys);
        let key = |name: &str| keys.join(name).display().to_string();
        let user = |token, name: &str, group| (token, name.to_owned(), group);
        let mut cluster = own(Setup {
            names: vec![
                addresses.outside.clone(),
                "10.96.0.1".to_owned(),
                "kubernetes.default.svc".to_owned(),
            ],
            users: vec![
                user(NODE_TOKEN, &format!("system:node:{NODE}"), "system:nodes"),
                user(MANAGER_TOKEN, "system:kube-controller-manager", ""),
                user(PROXY_TOKEN, "system:kube-proxy", ""),
                user(DNS_TOKEN, "dns", "system:masters"),
            ],
            flags: vec![
                "--bind-address=0.0.0.0".to_owned(),
                format!("--advertise-address={}", addresses.outside),
                "--endpoint-reconciler-type=lease".to_owned(),
                // Beside RBAC, which all have.
                "--authorization-mode=Node".to_owned(),
                "--enable-admission-plugins=NodeRestriction".to_owned(),
                "--kubelet-preferred-address-types=InternalIP".to_owned(),
                format!("--kubelet-client-certificate={}", key("client.crt")),
                format!("--kubelet-client-key={}", key("client.key")),
            ],
        })?;
        let folder = cluster.folder().to_owned();
        let at = |name: &str| folder.join(name).display().to_string();
        let outside = addresses.outside.clone();
        let config = |cluster: &Cluster, token: &str| {
            cluster.kubeconfig_from(token, &outside).display().to_string()
        };

        let kubeconfig = cluster.kubeconfig_file(MANAGER_TOKEN).display().to_string();
        cluster.run(
            "controller-manager",
            &manager,
            &[
                format!("--kubeconfig={kubeconfig}"),
                "--use-service-account-credentials=true".to_owned(),
                "--leader-elect=false".to_owned(),
                "--secure-port=0".to_owned(),
                format!("--root-ca-file={}", at("tls.crt")),
                format!("--service-account-private-key-file={}", at("sa.key")),
            ],
        );
        let kubeconfig = cluster.kubeconfig_file(ADMIN).display().to_string();
        cluster.run(
            "scheduler",
            &scheduler,
            &[
                format!("--kubeconfig={kubeconfig}"),
                "--leader-elect=false".to_owned(),
                "--secure-port=0".to_owned(),
            ],
        );
        start_containerd(&namespaces, &mut cluster, &addresses, plugins, images)?;

        for controller in std::fs::read_dir("/sys/fs/cgroup").map_err(|e| e.to_string())?.flatten()
        {
            // Controllers that this kernel lacks have no folder; the rest of a v2 mount are files.
            if controller.path().is_dir() {
                let _ = std::fs::create_dir(controller.path().join(&addresses.cgroup));
            }
        }
        let settings = kubelet_settings(&addresses, &folder, &key("client-ca.crt"));
        std::fs::write(folder.join("kubelet.json"), settings.to_string()).unwrap();
        let args = [
            format!("--config={}", at("kubelet.json")),
            format!("--kubeconfig={}", config(&cluster, NODE_TOKEN)),
            format!("--hostname-override={NODE}"),
            format!("--node-ip={}", addresses.inside),
            format!("--root-dir={}", at("kubelet")),
            format!("--cert-dir={}", at("kubelet-certs")),
        ];
        namespaces.start_inside(&mut cluster, "kubelet", &kubelet, &args);
        let settings = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": { "kubeconfig": config(&cluster, PROXY_TOKEN) },
            "mode": "iptables",
            "hostnameOverride": NODE,
            "clusterCIDR": format!("{}.0/24", addresses.pods),
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            // Zero: leave what the kernel has, which a container may not change.
            "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s",
                           "tcpCloseWaitTimeout": "0s" },
        });
        std::fs::write(folder.join("proxy.json"), settings.to_string()).unwrap();
        let args = [format!("--config={}", at("proxy.json"))];
        namespaces.start_inside(&mut cluster, "proxy", &proxy, &args);
        let corefile = format!(
            ".:53 {{\n bind {}\n errors\n kubernetes cluster.local {{\n  kubeconfig {}\n  pods insecure\n }}\n}}\n",
            addresses.inside,
            config(&cluster, DNS_TOKEN),
        );
        std::fs::write(folder.join("Corefile"), corefile).unwrap();
        let args = ["-conf".to_owned(), at("Corefile")];
        namespaces.start_inside(&mut cluster, "dns", &dns, &args);
        Ok(Self { cluster, inside: addresses.inside, namespaces })
    }

    /// Lets this process reach the address of a service, as pods do.
    pub(crate) fn lead_to(&self, address: &str) {
        run("ip", &["route", "replace", address, "via", &self.inside]).expect("a route");
    }

    /// Returns the last lines of a program's log.
    pub(crate) fn log(&self, name: &str) -> String {
        let path = self.cluster.folder().join(format!("{name}.log"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

fn start_containerd(
    namespaces: &Namespaces,
    cluster: &mut Cluster,
    addresses: &Addresses,
    plugins: &str,
    images: &[PathBuf],
) -> Result<(), String> {
    let folder = cluster.folder().to_owned();
    let at = |name: &str| folder.join(name).display().to_string();
    let network = json!({
        "cniVersion": "0.4.0",
        "name": "test",
        "plugins": [{
            "type": "ptp",
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "dataDir": at("ipam"),
                "subnet": format!("{}.0/24", addresses.pods),
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }],
    });
    std::fs::create_dir_all(folder.join("cni")).unwrap();
    std::fs::write(folder.join("cni/10-test.conflist"), network.to_string()).unwrap();
    let settings = format!(
        r#"version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "drumline.test/pause:1"
# A container may not be allowed to protect itself from the out-of-memory killer.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{network}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
"#,
        root = at("containerd"),
        state = at("containerd-state"),
        socket = at("containerd.sock"),
        network = at("cni"),
        // Slower, and works on every file system.
        snapshotter = std::env::var("DRUMLINE_SNAPSHOTTER").unwrap_or("overlayfs".to_owned()),
    );
    std::fs::write(folder.join("containerd.toml"), settings).unwrap();
    let containerd = in_path("containerd", "containerd")?;
    let args = ["--config".to_owned(), at("containerd.toml")];
    namespaces.start_inside(cluster, "containerd", &containerd, &args);
    let socket = folder.join("containerd.sock");
    let deadline = Instant::now() + Duration::from_secs(300);
    while namespaces.inside("ctr", &format!("-a {} version", socket.display())).is_err() {
        if Instant::now() > deadline {
            return Err("containerd does not start; see containerd.log".to_owned());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    for image in images {
        let (socket, image) = (socket.display(), image.display());
        namespaces.inside("ctr", &format!("-a {socket} -n k8s.io images import {image}"))?;
    }
    Ok(())
}

fn kubelet_settings(addresses: &Addresses, folder: &Path, authority: &str) -> Value {
    let at = |name: &str| folder.join(name).display().to_string();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        // This kernel may have cgroup v1, or both.
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", addresses.cgroup),
        "enforceNodeAllocatable": ["none"],
        "failSwapOn": false,
        "containerRuntimeEndpoint": format!("unix://{}", at("containerd.sock")),
        "address": addresses.inside,
        "port": 10_250,
        "readOnlyPort": 0,
        "healthzPort": 0,
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": authority },
        },
        "authorization": { "mode": "Webhook" },
        "clusterDNS": [addresses.inside],
        "clusterDomain": "cluster.local",
        "podLogsDir": at("pod-logs"),
        "volumePluginDir": at("volume-plugins"),
        // A test machine's disk may be nearly full: that is not what is tested.
        "evictionHard": { "memory.available": "50Mi", "nodefs.available": "1%",
                          "imagefs.available": "1%" },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "5s",
        "syncFrequency": "5s",
    })
}
