//! The pod of one rank, and the service that gives a gang its addresses.
//!
//! One pod for each rank, and not one for each node: a rank is what fails, what is placed and what
//! a device belongs to, and a pod whose one container is a rank needs no supervisor of its own.

use drumline_spec::{DeviceKind, Gang, JobSpec, Work};
use drumline_types::JobId;
use k8s_openapi::api::core::v1::{Pod, Service};
use serde_json::{Value, json};

use crate::crd::{GROUP, VERSION};
use crate::decide::gang;
use crate::gang::{ATTEMPT, DEVICE, GATE, JOB, JOB_ID, RANK, SCHEDULER, UID};
use crate::job::Job;

/// For `MASTER_PORT`: every pod has a network of its own, so all gangs may use the same.
pub const MASTER_PORT: u16 = 29_500;

/// What the operator's flags say about pods.
#[derive(Debug, Clone)]
pub struct PodRules {
    /// The image of ranks that name none.
    pub image: String,
    /// The extended resource that is one GPU.
    pub gpu_resource: String,
    /// Processor time of one CPU device, in thousandths of a core.
    pub cpu_device_milli: u64,
    /// Keys of taints that every gang tolerates.
    pub tolerated: Vec<String>,
    /// Persistent volume claim, in the job's namespace, that is mounted as the folder that all nodes
    /// share; empty: none.
    pub shared_claim: String,
    /// Size of `/dev/shm`, as a quantity.
    pub shm_size: String,
    /// The user that ranks run as; 0: as the image says.
    pub run_as_user: i64,
}

impl Default for PodRules {
    fn default() -> Self {
        Self {
            image: "drumline:latest".to_owned(),
            gpu_resource: "nvidia.com/gpu".to_owned(),
            cpu_device_milli: 1000,
            tolerated: vec!["nvidia.com/gpu".to_owned()],
            shared_claim: String::new(),
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
}

/// Returns the pod of a rank, gated: nothing binds it before its whole gang is there.
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
    let labels = labels(job, &job.id, attempt, seat.rank, gang.device);
    let mut container = json!({
        "name": "rank",
        "image": job.image.as_deref().unwrap_or(&rules.image),
        "env": environment(job, spec, attempt, seat.rank),
        "resources": resources(rules, &gang),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
        },
        "volumeMounts": [{ "name": "shm", "mountPath": "/dev/shm" }],
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
    let mut volumes = vec![json!({
        "name": "shm", "emptyDir": { "medium": "Memory", "sizeLimit": rules.shm_size },
    })];
    if !rules.shared_claim.is_empty() {
        volumes.push(json!({
            "name": "shared", "persistentVolumeClaim": { "claimName": rules.shared_claim },
        }));
        if let Some(mounts) = container["volumeMounts"].as_array_mut() {
            mounts.push(json!({ "name": "shared", "mountPath": "/drumline/shared" }));
        }
    }
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
    serde_json::from_value(json!({
        "metadata": {
            "name": job.pod(attempt, seat.rank),
            "namespace": job.namespace,
            "labels": labels,
            "annotations": { "drumline.dev/planned-node": seat.node },
            "ownerReferences": [owner(job)],
        },
        "spec": {
            "schedulerName": SCHEDULER,
            "schedulingGates": [{ "name": GATE }],
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
    }))
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

fn labels(job: &Job, id: &JobId, attempt: u32, rank: u32, device: DeviceKind) -> Value {
    json!({
        "app.kubernetes.io/managed-by": "drumline",
        JOB: job.name,
        JOB_ID: id.as_str(),
        UID: job.uid,
        ATTEMPT: attempt.to_string(),
        RANK: rank.to_string(),
        DEVICE: device.as_str(),
    })
}

fn owner(job: &Job) -> Value {
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

fn resources(rules: &PodRules, gang: &Gang) -> Value {
    let mut requests = json!({});
    if gang.cpu_milli > 0 {
        requests["cpu"] = json!(format!("{}m", gang.cpu_milli));
    }
    if gang.memory.0 > 0 {
        requests["memory"] = json!(gang.memory.0.to_string());
    }
    let mut limits = json!({});
    if gang.device == DeviceKind::Gpu {
        limits[&rules.gpu_resource] = json!("1");
    }
    json!({ "requests": requests, "limits": limits })
}

/// Returns the variables of a rank: the user's first, so that ours cannot be overridden.
fn environment(job: &Job, spec: &JobSpec, attempt: u32, rank: u32) -> Vec<Value> {
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
        ("DRUMLINE_JOB", job.id.to_string()),
        ("DRUMLINE_ATTEMPT", attempt.to_string()),
        ("DRUMLINE_DEVICE", "0".to_owned()),
        ("DRUMLINE_SHARED_DIR", "/drumline/shared".to_owned()),
        ("DRUMLINE_JOB_DIR", format!("/drumline/shared/jobs/{}", job.id)),
    ] {
        env.push(json!({ "name": name, "value": value }));
    }
    for (name, path) in [("DRUMLINE_HOST", "spec.nodeName"), ("DRUMLINE_LISTEN_IP", "status.podIP")]
    {
        env.push(json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } }));
    }
    env
}
