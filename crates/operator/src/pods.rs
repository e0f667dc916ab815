//! The pod of one rank, and the service that gives a gang its addresses.
//!
//! One pod for each rank, and not one for each node: a rank is what fails, what is placed and what
//! a device belongs to, and a pod whose one container is a rank needs no supervisor of its own.

use drumline_spec::{DeviceKind, Gang, JobKind, JobSpec, Work};
use drumline_types::JobId;
use drumline_wire::contract;
use k8s_openapi::api::core::v1::{Pod, Service};
use serde_json::{Value, json};

use crate::ask::Ask;
use crate::crd::{GROUP, VERSION};
use crate::desk::gang;
use crate::dra;
use crate::gang::{
    ATTEMPT, DEVICE, JOB, JOB_ID, NODE, RANK, RANKS, RESOURCE, SCHEDULER, SERVICE, SLOT, UID,
};
use crate::job::Job;
use crate::ranks::AUDIENCE;

/// Where the folder that all ranks share is in their pods.
pub const SHARED_DIR: &str = "/drumline/shared";
/// Where the token is that says who a rank's pod is.
const TOKEN_DIR: &str = "/var/run/secrets/drumline.dev";
/// How long such a token is good for; the kubelet renews it long before. Unit: seconds.
const TOKEN_SECONDS: u32 = 3600;

/// For `MASTER_PORT`: every pod has a network of its own, so all gangs may use the same.
pub const MASTER_PORT: u16 = 29_500;

/// What the operator's flags say about pods.
#[derive(Debug, Clone)]
pub struct PodRules {
    /// The image of ranks that name none.
    pub image: String,
    /// Processor time of one CPU device, in thousandths of a core.
    pub cpu_device_milli: u64,
    /// Keys of taints that every gang tolerates.
    pub tolerated: Vec<String>,
    /// Persistent volume claim, in the job's namespace, that is mounted as the folder that all ranks
    /// share, for jobs that name none; empty: none.
    pub shared_claim: String,
    /// Folders of nodes below which jobs may name one as the folder that all ranks share.
    pub host_paths: Vec<String>,
    /// `https://HOST:PORT` at which ranks reach the operator.
    pub ranks_url: String,
    /// The certificate to trust there, in PEM.
    pub ranks_ca: String,
    /// Size of `/dev/shm`, as a quantity.
    pub shm_size: String,
    /// The user that ranks run as; 0: as the image says.
    pub run_as_user: i64,
}

impl Default for PodRules {
    fn default() -> Self {
        Self {
            image: "drumline:latest".to_owned(),
            cpu_device_milli: 1000,
            tolerated: vec!["nvidia.com/gpu".to_owned()],
            shared_claim: String::new(),
            host_paths: Vec::new(),
            ranks_url: String::new(),
            ranks_ca: String::new(),
            shm_size: "1Gi".to_owned(),
            run_as_user: 65_532,
        }
    }
}

/// One pod that is to be created.
#[derive(Debug, Clone)]
pub struct Seat {
    /// The rank.
    pub rank: u32,
    /// Kubernetes' name of the node that the checked plan gives it.
    pub node: String,
    /// The extended resource that is its device, or the device that it claims; `None`: it is a CPU
    /// device.
    pub resource: Option<String>,
    /// The device class that its claim names; `None`: it claims none.
    pub class: Option<String>,
    /// Which of the node's devices of that resource.
    pub slot: u32,
}

/// Returns the pod of a rank. Its scheduler is the operator alone, which made it of a checked plan and
/// binds it once its whole gang is there: it needs no gate.
///
/// # Errors
/// When the parts do not make a pod, which is a bug.
pub fn pod(
    rules: &PodRules,
    job: &Job,
    spec: &JobSpec,
    attempt: u32,
    seat: &Seat,
) -> Result<Pod, serde_json::Error> {
    let gang = gang(spec, rules.cpu_device_milli);
    let labels = labels(job, &job.id, attempt, seat.rank, gang.ranks, gang.device);
    let mut container = json!({
        "name": "rank",
        "image": job.image.as_deref().unwrap_or(&rules.image),
        "env": environment(rules, job, spec, attempt, seat.rank)?,
        "resources": resources(&gang, seat),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
        },
        // The last lines of the log are what is told of a rank that failed.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    });
    match &spec.work {
        Work::CommandJob(command) => {
            container["command"] = json!(command.argv);
            if !command.workdir.is_empty() {
                container["workingDir"] = json!(command.workdir);
            }
        }
        Work::TrainingJob(_) | Work::ModelService(_) => {
            container["command"] = json!(["drumline", "rank"]);
        }
    }
    let volumes = volumes(rules, job, spec);
    container["volumeMounts"] = volumes.iter().map(|(_, mount)| mount.clone()).collect();
    let volumes: Vec<Value> = volumes.into_iter().map(|(volume, _)| volume).collect();
    let mut security =
        json!({ "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } });
    if rules.run_as_user > 0 {
        security["runAsUser"] = json!(rules.run_as_user);
        security["fsGroup"] = json!(rules.run_as_user);
    }
    let mut tolerations: Vec<Value> =
        rules.tolerated.iter().map(|key| json!({ "key": key, "operator": "Exists" })).collect();
    tolerations.extend(gang.tolerations.iter().map(|one| match &one.value {
        Some(value) => json!({ "key": one.key, "value": value }),
        None => json!({ "key": one.key, "operator": "Exists" }),
    }));
    let secrets: Vec<Value> = job.pull_secrets.iter().map(|name| json!({ "name": name })).collect();
    let mut annotations = json!({ NODE: seat.node, SLOT: seat.slot.to_string() });
    if let Some(resource) = &seat.resource {
        annotations[RESOURCE] = json!(resource);
    }
    let mut pod = json!({
        "metadata": {
            "name": job.pod(attempt, seat.rank),
            "namespace": job.namespace,
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [owner(job)],
        },
        "spec": {
            "schedulerName": SCHEDULER,
            "hostname": host(seat.rank),
            "subdomain": job.service(),
            // Restarts are the gang's, not one rank's.
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 10,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "securityContext": security,
            "tolerations": tolerations,
            "imagePullSecrets": secrets,
            "containers": [container],
            "volumes": volumes,
        },
    });
    if seat.class.is_some() {
        dra::name_claim(&mut pod);
    }
    job.template.lay_over(&mut pod);
    serde_json::from_value(pod)
}

/// Returns the headless service under which a job's ranks find each other.
///
/// # Errors
/// When the parts do not make a service, which is a bug.
pub fn service(job: &Job) -> Result<Service, serde_json::Error> {
    serde_json::from_value(json!({
        "metadata": {
            "name": job.service(),
            "namespace": job.namespace,
            "labels": { UID: job.uid, JOB: job.name },
            "ownerReferences": [owner(job)],
        },
        "spec": {
            "clusterIP": "None",
            "selector": { UID: job.uid },
            // Ranks look for each other before they are ready.
            "publishNotReadyAddresses": true,
            "ports": [{ "name": "master", "port": MASTER_PORT }],
        },
    }))
}

fn labels(job: &Job, id: &JobId, attempt: u32, rank: u32, ranks: u32, device: DeviceKind) -> Value {
    let mut labels = json!({
        "app.kubernetes.io/managed-by": "drumline",
        JOB: job.name,
        JOB_ID: id.as_str(),
        UID: job.uid,
        ATTEMPT: attempt.to_string(),
        RANK: rank.to_string(),
        RANKS: ranks.to_string(),
        DEVICE: device.as_str(),
    });
    if job.kind == JobKind::ModelService {
        labels[SERVICE] = json!(job.served_by());
    }
    labels
}

/// Returns what makes a job the owner of an object.
pub(crate) fn owner(job: &Job) -> Value {
    json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": job.kind.as_str(),
        "name": job.name,
        "uid": job.uid,
        "controller": true,
        "blockOwnerDeletion": true,
    })
}

fn host(rank: u32) -> String {
    format!("r{rank}")
}

/// Returns what the pod of a rank asks of its node: `resource` is its device where that is no CPU
/// device, `extra` is beside it.
#[must_use]
pub fn ask(rules: &PodRules, spec: &JobSpec, resource: Option<&str>, extra: &Ask) -> Ask {
    let gang = gang(spec, rules.cpu_device_milli);
    let mut ask = Ask::place();
    ask.put("cpu", gang.cpu_milli);
    ask.put("memory", gang.memory.0.saturating_mul(1000));
    if let Some(resource) = resource {
        ask.put(resource, 1000);
    }
    ask.add(extra);
    ask
}

fn resources(gang: &Gang, seat: &Seat) -> Value {
    let mut requests = json!({});
    if gang.cpu_milli > 0 {
        requests["cpu"] = json!(format!("{}m", gang.cpu_milli));
    }
    if gang.memory.0 > 0 {
        requests["memory"] = json!(gang.memory.0.to_string());
    }
    let mut limits = json!({});
    if let Some(resource) = seat.resource.as_ref().filter(|_| seat.class.is_none()) {
        limits[resource] = json!("1");
    }
    json!({ "requests": requests, "limits": limits })
}

/// Returns the volumes of a rank, each with its mount.
fn volumes(rules: &PodRules, job: &Job, spec: &JobSpec) -> Vec<(Value, Value)> {
    let size = job.shm_size.as_ref().unwrap_or(&rules.shm_size);
    let mut all = vec![(
        json!({ "name": "shm", "emptyDir": { "medium": "Memory", "sizeLimit": size } }),
        json!({ "name": "shm", "mountPath": "/dev/shm" }),
    )];
    let claim = job.shared_claim.as_ref().unwrap_or(&rules.shared_claim);
    let shared = match &job.host_path {
        Some(path) => {
            Some(json!({ "name": "shared", "hostPath": { "path": path, "type": "Directory" } }))
        }
        None if !claim.is_empty() => Some(json!({
            "name": "shared", "persistentVolumeClaim": { "claimName": claim },
        })),
        None => None,
    };
    all.extend(shared.map(|volume| (volume, json!({ "name": "shared", "mountPath": SHARED_DIR }))));
    if is_native(spec) {
        // Says who the pod is, to the operator and to nobody else; the kubelet renews it.
        let token = json!({ "serviceAccountToken": {
            "audience": AUDIENCE, "path": "token", "expirationSeconds": TOKEN_SECONDS,
        }});
        all.push((
            json!({ "name": "operator-token", "projected": { "sources": [token] } }),
            json!({ "name": "operator-token", "mountPath": TOKEN_DIR, "readOnly": true }),
        ));
    }
    all
}

/// Whether a job's ranks are Drumline's own.
#[must_use]
pub fn is_native(spec: &JobSpec) -> bool {
    !matches!(spec.work, Work::CommandJob(_))
}

/// Returns the variables of a rank: the user's first, so that ours cannot be overridden.
fn environment(
    rules: &PodRules,
    job: &Job,
    spec: &JobSpec,
    attempt: u32,
    rank: u32,
) -> Result<Vec<Value>, serde_json::Error> {
    let world = spec.gang().ranks;
    let mut env: Vec<Value> = match &spec.work {
        Work::CommandJob(command) => command
            .env
            .iter()
            .map(|(name, value)| json!({ "name": name, "value": value }))
            .collect(),
        Work::TrainingJob(_) | Work::ModelService(_) => Vec::new(),
    };
    let master = format!("{}.{}.{}.svc", host(0), job.service(), job.namespace);
    for (name, value) in [
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", world.to_string()),
        // A pod is one rank with one device: each is a group of its own.
        ("LOCAL_RANK", "0".to_owned()),
        ("LOCAL_WORLD_SIZE", "1".to_owned()),
        ("GROUP_RANK", rank.to_string()),
        ("GROUP_WORLD_SIZE", world.to_string()),
        ("MASTER_ADDR", master),
        ("MASTER_PORT", MASTER_PORT.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", attempt.saturating_sub(1).to_string()),
        ("TORCHELASTIC_RUN_ID", job.id.to_string()),
        (contract::JOB, job.id.to_string()),
        (contract::ATTEMPT, attempt.to_string()),
        (contract::DEVICE, "0".to_owned()),
        (contract::SHARED_DIR, SHARED_DIR.to_owned()),
        (contract::JOB_DIR, format!("{SHARED_DIR}/jobs/{}", job.id)),
    ] {
        env.push(json!({ "name": name, "value": value }));
    }
    if is_native(spec) {
        let cores = gang(spec, rules.cpu_device_milli).cpu_milli / 1000;
        for (name, value) in [
            (contract::AGENT, rules.ranks_url.clone()),
            (contract::AGENT_CA, rules.ranks_ca.clone()),
            (contract::TOKEN_FILE, format!("{TOKEN_DIR}/token")),
            (contract::SPEC_JSON, serde_json::to_string(spec)?),
            (contract::THREADS, cores.max(1).to_string()),
        ] {
            env.push(json!({ "name": name, "value": value }));
        }
    }
    // A pod is a host of its own to its ranks: memory is shared with nobody.
    for (name, path) in [(contract::HOST, "metadata.uid"), (contract::LISTEN_IP, "status.podIP")] {
        env.push(json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } }));
    }
    Ok(env)
}
