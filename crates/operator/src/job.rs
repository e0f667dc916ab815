//! A job as the operator holds it: a custom resource, its spec parsed by the one parser.

use drumline_spec::manifest::parse;
use drumline_spec::{JobKind, JobSpec};
use drumline_types::{JobId, QueueName};
use kube::api::{ApiResource, DynamicObject};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

use crate::crd::status::JobStatus;
use crate::crd::{GROUP, VERSION, define};
use crate::template::{TEMPLATE, Template};

/// Keeps a job's object until its pods are gone.
pub const FINALIZER: &str = "drumline.dev/gang";
/// Annotation: the container image of the job's ranks.
pub const IMAGE: &str = "drumline.dev/image";
/// Annotation: names of image pull secrets, separated by commas.
pub const PULL_SECRETS: &str = "drumline.dev/image-pull-secrets";
/// Annotation: the persistent volume claim that is the folder which all ranks share.
pub const SHARED_CLAIM: &str = "drumline.dev/shared-claim";
/// Annotation: a folder of the nodes that is the folder which all ranks share.
pub const HOST_PATH: &str = "drumline.dev/host-path";
/// Annotation: the size of each rank's `/dev/shm`.
pub const SHM_SIZE: &str = "drumline.dev/shm-size";

/// Label: the service whose replica this is.
pub const REPLICA_OF: &str = "drumline.dev/replica-of";
/// Label: the replica's number; the service itself is number 0.
pub const REPLICA: &str = "drumline.dev/replica";

/// Where a replica belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaOf {
    /// The service's name.
    pub service: String,
    /// The service's uid.
    pub uid: String,
    /// The replica's number, from 1.
    pub number: u32,
}

/// Returns how a kind is called in the API.
#[must_use]
pub fn resource(kind: JobKind) -> ApiResource {
    resource_named(kind.as_str())
}

/// Returns how a kind of manifest is called in the API.
#[must_use]
pub fn resource_named(kind: &str) -> ApiResource {
    let gvk = GroupVersionKind::gvk(GROUP, VERSION, kind);
    ApiResource::from_gvk_with_plural(&gvk, &define::plural(kind))
}

/// One job of the cluster.
#[derive(Debug, Clone)]
pub struct Job {
    /// Which kind of work.
    pub kind: JobKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name, unique in its namespace and kind.
    pub name: String,
    /// Unique for all time.
    pub uid: String,
    /// What the decision core calls it: the name and the start of the uid.
    pub id: JobId,
    /// Counts changes of the spec.
    pub generation: i64,
    /// The revision that a write is fenced by.
    pub resource_version: String,
    /// When it was accepted, milliseconds since 1970.
    pub created_ms: u64,
    /// Whether its deletion was asked for.
    pub is_deleting: bool,
    /// Whether the operator's finalizer is on it.
    pub has_finalizer: bool,
    /// Every finalizer, ours included.
    pub finalizers: Vec<String>,
    /// The container image, when the job names one.
    pub image: Option<String>,
    /// Image pull secrets.
    pub pull_secrets: Vec<String>,
    /// The claim of its shared folder, when it names one.
    pub shared_claim: Option<String>,
    /// The node folder that is its shared folder, when it names one.
    pub host_path: Option<String>,
    /// The size of each rank's `/dev/shm`, when it says one.
    pub shm_size: Option<String>,
    /// What it lays over the pods of its ranks, as it says it.
    pub template_text: Option<String>,
    /// The same, once it was held against the administrator's rules.
    pub template: Template,
    /// The service whose replica it is.
    pub replica_of: Option<ReplicaOf>,
    /// The queue that its namespace names.
    pub space_queue: Option<QueueName>,
    /// What it asks for, or every mistake in it, in one line.
    pub spec: Result<JobSpec, String>,
    /// What is known of it.
    pub status: JobStatus,
    /// Whether it has a status at all.
    pub has_status: bool,
}

impl Job {
    /// Reads an object of the API server. `None`: it lacks what every stored object has.
    #[must_use]
    pub fn read(kind: JobKind, object: &DynamicObject) -> Option<Self> {
        let metadata = &object.metadata;
        let name = metadata.name.clone()?;
        let uid = metadata.uid.clone()?;
        let finalizers = metadata.finalizers.clone().unwrap_or_default();
        let annotation =
            |key: &str| metadata.annotations.as_ref().and_then(|all| all.get(key)).cloned();
        let status = object.data.get("status");
        Some(Self {
            kind,
            namespace: metadata.namespace.clone()?,
            id: job_id(&name, &uid)?,
            generation: metadata.generation.unwrap_or_default(),
            resource_version: metadata.resource_version.clone()?,
            created_ms: metadata
                .creation_timestamp
                .as_ref()
                .and_then(|time| u64::try_from(time.0.as_millisecond()).ok())
                .unwrap_or_default(),
            is_deleting: metadata.deletion_timestamp.is_some(),
            has_finalizer: finalizers.iter().any(|one| one == FINALIZER),
            finalizers,
            image: annotation(IMAGE),
            pull_secrets: annotation(PULL_SECRETS)
                .unwrap_or_default()
                .split(',')
                .map(|name| name.trim().to_owned())
                .filter(|name| !name.is_empty())
                .collect(),
            replica_of: replica_of(kind, object),
            space_queue: None,
            shared_claim: annotation(SHARED_CLAIM),
            host_path: annotation(HOST_PATH),
            shm_size: annotation(SHM_SIZE),
            template_text: annotation(TEMPLATE),
            template: Template::default(),
            spec: spec(kind, &name, object),
            status: status
                .and_then(|status| serde_json::from_value(status.clone()).ok())
                .unwrap_or_default(),
            has_status: status.is_some(),
            name,
            uid,
        })
    }

    /// Takes the queue that its namespace names, unless the job names one itself.
    pub fn belongs_to(&mut self, queue: Option<QueueName>) {
        if let (Ok(spec), Some(queue)) = (&mut self.spec, &queue)
            && spec.settings.queue == QueueName::default_queue()
        {
            spec.settings.queue = queue.clone();
        }
        self.space_queue = queue;
    }

    /// Refuses what its annotations ask for and an administrator has not allowed.
    ///
    /// `is_device` knows the resources that are ranks' devices.
    pub fn hold_against(&mut self, host_paths: &[String], is_device: &dyn Fn(&str) -> bool) {
        let is_allowed = |path: &str| {
            let below = |allowed: &String| {
                path.strip_prefix(allowed.trim_end_matches('/'))
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            };
            !path.split('/').any(|part| part == "..") && host_paths.iter().any(below)
        };
        if let Some(text) = &self.template_text {
            match Template::read(text, &is_allowed, is_device) {
                Ok(template) => self.template = template,
                Err(why) => self.spec = Err(format!("annotation {TEMPLATE}: {why}")),
            }
        }
        if let Some(path) = &self.host_path
            && !is_allowed(path)
        {
            self.spec = Err(format!(
                "annotation {HOST_PATH}: {path} is not below a folder that the operator allows \
                     (--allow-host-path); use {SHARED_CLAIM}"
            ));
        }
        if let Some(size) = &self.shm_size
            && crate::quantity::milli(size).is_none_or(|milli| milli == 0)
        {
            self.spec = Err(format!("annotation {SHM_SIZE}: {size:?} is no size, such as 1Gi"));
        }
    }

    /// Returns the name of the `ModelService` that the job is, or is a replica of.
    #[must_use]
    pub fn served_by(&self) -> &str {
        self.replica_of.as_ref().map_or(&self.name, |of| &of.service)
    }

    /// Returns the name of the service that gives the job's ranks their addresses.
    #[must_use]
    pub fn service(&self) -> String {
        format!("{}-{}", self.name, letter(self.kind))
    }

    /// Returns the name of a rank's pod. No two kinds, attempts or ranks share one.
    #[must_use]
    pub fn pod(&self, attempt: u32, rank: u32) -> String {
        format!("{}-{}{attempt}-{rank}", self.name, letter(self.kind))
    }
}

fn replica_of(kind: JobKind, object: &DynamicObject) -> Option<ReplicaOf> {
    let labels = object.metadata.labels.as_ref()?;
    let service = labels.get(REPLICA_OF)?;
    let number = labels.get(REPLICA)?.parse().ok().filter(|number| *number > 0)?;
    let owners = object.metadata.owner_references.iter().flatten();
    let owner =
        owners.into_iter().find(|owner| owner.name == *service && owner.kind == kind.as_str())?;
    (kind == JobKind::ModelService).then(|| ReplicaOf {
        service: service.clone(),
        uid: owner.uid.clone(),
        number,
    })
}

fn letter(kind: JobKind) -> char {
    match kind {
        JobKind::TrainingJob => 't',
        JobKind::ModelService => 's',
        JobKind::CommandJob => 'c',
    }
}

fn job_id(name: &str, uid: &str) -> Option<JobId> {
    let start: String = uid.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
    let name: String = name.chars().take(50).collect();
    format!("{name}-{start}").to_ascii_lowercase().parse().ok()
}

/// Parses the object as the manifest that it was applied from.
fn spec(kind: JobKind, name: &str, object: &DynamicObject) -> Result<JobSpec, String> {
    let manifest = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": kind.as_str(),
        "metadata": { "name": name },
        "spec": object.data.get("spec").unwrap_or(&Value::Null),
    });
    let parsed = parse(&manifest.to_string(), name).map_err(|mistakes| {
        let told = mistakes.iter().map(|mistake| format!("{}: {}", mistake.path, mistake.message));
        told.collect::<Vec<_>>().join("; ")
    })?;
    parsed.into_iter().next().ok_or_else(|| "the object holds no manifest".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_parsed_by_the_parser_of_manifests() {
        let mut object = DynamicObject::new("demo", &resource(JobKind::CommandJob));
        object.metadata.namespace = Some("team".to_owned());
        object.metadata.uid = Some("0f3a1b2c-1111-2222-3333-444455556666".to_owned());
        object.metadata.resource_version = Some("7".to_owned());
        object.data = json!({ "spec": { "argv": ["true"], "ranks": 3 } });
        let job = Job::read(JobKind::CommandJob, &object).unwrap();
        assert_eq!(job.id.as_str(), "demo-0f3a1b2c1111");
        assert_eq!(job.spec.as_ref().unwrap().gang().ranks, 3);
        assert_eq!(job.pod(2, 1), "demo-c2-1");
        object.data = json!({ "spec": { "argv": [], "ranks": 0 } });
        let job = Job::read(JobKind::CommandJob, &object).unwrap();
        let told = job.spec.unwrap_err();
        assert!(told.contains("spec.argv") && told.contains("spec.ranks"), "{told}");
    }
}
