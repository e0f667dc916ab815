//! `drumline operator`: the control plane of a Kubernetes cluster.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::Args;
use drumline_operator::{Driver, GpuResource, GuardRules, LevelRule, Observe, Options, WhenAway};
use drumline_web::Keys;
use drumline_wire::auth::Token;
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// Arguments of `operator`.
#[derive(Debug, Args)]
pub struct OperatorArgs {
    /// Namespace of the leader's lease: where the operator itself runs.
    #[arg(long, default_value = "drumline-system", env = "DRUMLINE_NAMESPACE")]
    pub namespace: String,
    /// Image of ranks whose job names none.
    #[arg(long, default_value = "drumline:latest")]
    pub image: String,
    /// An extended resource of which each unit is one GPU; may be given more than once, or several
    /// separated by commas. What its devices are may follow, such as amd.com/gpu=MI300X:192Gi; else the
    /// labels of the nodes tell. Beside nvidia.com/gpu, MIG instances (nvidia.com/mig-1g.10gb) are
    /// found by themselves.
    #[arg(
        long,
        value_name = "NAME[=MODEL[:MEMORY]]",
        value_delimiter = ',',
        default_value = "nvidia.com/gpu"
    )]
    pub gpu_resource: Vec<String>,
    /// A driver of dynamic resource allocation whose published devices (ResourceSlices) are GPUs too,
    /// such as gpu.nvidia.com; may be given more than once, or several separated by commas. Ranks claim
    /// them by the device class of the driver's name (MIG instances by mig.nvidia.com), or by the one
    /// that follows. Without it, or where the API server has no resource.k8s.io/v1, there are none.
    #[arg(long, value_name = "DRIVER[=CLASS]", value_delimiter = ',')]
    pub dra: Vec<String>,
    /// Processor time of one CPU device, in thousandths of a core.
    #[arg(long, default_value_t = 1000)]
    pub cpu_device_milli: u64,
    /// A level of the topology and the node label that names its domains, outermost first; after an
    /// `@`, what a device can send to another in one such domain, in GB/s.
    #[arg(
        long,
        value_name = "LEVEL=LABEL[@GB/S]",
        default_value = "zone=topology.kubernetes.io/zone"
    )]
    pub topology: Vec<String>,
    /// Taint that every gang tolerates; may be given more than once.
    #[arg(long, value_name = "KEY", default_value = "nvidia.com/gpu")]
    pub tolerate: Vec<String>,
    /// Persistent volume claim, in each job's namespace, that all ranks see as their shared folder,
    /// for jobs without the annotation drumline.dev/shared-claim.
    #[arg(long, default_value = "")]
    pub shared_claim: String,
    /// Folder of the nodes below which the annotation drumline.dev/host-path may name one as a job's
    /// shared folder; may be given more than once. Without it no job gets a folder of a node.
    #[arg(long, value_name = "FOLDER")]
    pub allow_host_path: Vec<String>,
    /// Where ranks and gateways are served, by TLS.
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7443)))]
    pub ranks_listen: SocketAddr,
    /// Where pods reach the operator that leads [default: https://drumline-operator.NAMESPACE.svc:7443].
    #[arg(long, value_name = "URL")]
    pub ranks_url: Option<String>,
    /// The pod that this process is, which is labelled drumline.dev/leads=true while it leads: the
    /// service of the operator selects it. Empty: no pod.
    #[arg(long, value_name = "NAME", default_value = "", env = "DRUMLINE_POD")]
    pub pod: String,
    /// Size of each rank's /dev/shm.
    #[arg(long, default_value = "1Gi")]
    pub shm_size: String,
    /// User id that ranks run as; 0: as their image says.
    #[arg(long, default_value_t = 65_532)]
    pub run_as_user: i64,
    /// Where the API server asks about bindings of other schedulers, by TLS; without it nobody keeps
    /// them from what is promised to gangs. Needs the webhook configuration drumline-bindings.
    #[arg(long, value_name = "ADDRESS")]
    pub guard_listen: Option<SocketAddr>,
    /// Where the API server reaches it [default: the service drumline-operator, port 9443].
    #[arg(long, value_name = "URL", requires = "guard_listen")]
    pub guard_url: Option<String>,
    /// What the API server does with such bindings while no operator answers: ignore (store them) or
    /// fail.
    #[arg(long, value_name = "POLICY", default_value = "ignore", requires = "guard_listen")]
    pub guard_when_away: WhenAway,
    /// Where probes and, with a token, metrics are served; without it, nowhere.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// File with the token that a reader of the metrics must show.
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub metrics_token_file: Option<PathBuf>,
}

/// Runs until it is asked to stop.
///
/// # Errors
/// The user's, for a topology that says nothing; failed, when there is no cluster.
pub(super) async fn run(args: OperatorArgs, stop: CancellationToken) -> Result<(), Failure> {
    let level = |text: &String| {
        LevelRule::parse(text).map_err(|why| Failure::user(format!("--topology {text}: {why}")))
    };
    let topology = args.topology.iter().map(level).collect::<Result<Vec<_>, _>>()?;
    let gpus = GpuResource::parse_all(&args.gpu_resource)
        .map_err(|why| Failure::user(format!("--gpu-resource {why}")))?;
    let driver = |text: &String| {
        Driver::parse(text).map_err(|why| Failure::user(format!("--dra {text}: {why}")))
    };
    let drivers = args.dra.iter().map(driver).collect::<Result<Vec<_>, _>>()?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let identity = format!("{host}-{}", std::process::id());
    let mut options = Options::here(args.namespace, identity)
        .await
        .map_err(|error| Failure::failed(error.to_string()))?
        .gpu_resources(gpus)
        .cpu_device_milli(args.cpu_device_milli);
    options.fleet.devices.drivers = drivers;
    options.fleet.topology = topology;
    options.fleet.tolerated.clone_from(&args.tolerate);
    options.pods.tolerated = args.tolerate;
    options.pods.image = args.image;
    options.pods.shared_claim = args.shared_claim;
    options.pods.shm_size = args.shm_size;
    options.pods.run_as_user = args.run_as_user;
    options.pods.host_paths = args.allow_host_path;
    options.ranks.listen = args.ranks_listen;
    options.ranks.pod = args.pod;
    if let Some(url) = args.ranks_url {
        options.ranks.url = url;
    }
    options.guard = args.guard_listen.map(|listen| GuardRules {
        listen,
        url: args.guard_url,
        when_away: args.guard_when_away,
    });
    if let Some(listen) = args.listen {
        let keys = args.metrics_token_file.as_deref().map(read_key).transpose()?;
        options.observe = Some(Observe { listen, keys });
    }
    drumline_operator::run(options, stop).await.map_err(|error| Failure::failed(error.to_string()))
}

/// Reads the file of the token that readers of the metrics show.
pub(super) fn read_key(path: &Path) -> Result<Keys, Failure> {
    Ok(Keys::new(vec![read_token("--metrics-token-file", path)?]))
}

/// Reads the one token of the file that a flag names.
pub(super) fn read_token(flag: &str, path: &Path) -> Result<Token, Failure> {
    let told = |why: String| Failure::user(format!("{flag} {}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| told(error.to_string()))?;
    Token::new(text.trim()).map_err(|error| told(error.to_string()))
}
