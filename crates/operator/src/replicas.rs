//! Services of several replicas: one `ModelService` for each, owned by the service.
//!
//! The object that the user applied is number 0 and runs a gang like any other. The others have its
//! spec, labels that name it, and it as their owner, so that they go when it does. Nothing else is
//! stored: `spec.replicas` (or what `spec.autoscale` makes of the replicas' reports) says how many
//! there should be, the objects say how many there are.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use drumline_lifecycle::replicas::{Autoscaler, Draining, Load, Standing};
use drumline_spec::table::JOB_NAME_MAX;
use drumline_spec::{JobKind, ModelService, Work};
use drumline_types::{JobPhase, Timestamp};
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Value, json};

use crate::core::{Core, Done};
use crate::crd::status::JobStatus;
use crate::crd::{GROUP, VERSION};
use crate::gang::SERVICE;
use crate::job::{Job, REPLICA, REPLICA_OF, resource};
use crate::launch::{LaunchError, Writer, is_missing, is_owned_by};
use crate::pods::owner;
use crate::ranks::worlds::Worlds;
use crate::step::phase;
use crate::wake::Wake;

/// Between two looks at what a service that scales by itself has to do, in milliseconds.
const LOOK_MS: u64 = 1_000;

/// What is remembered of services between two passes.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    sets: BTreeMap<String, Set>,
    /// When a replica that has failed was first seen so, by uid.
    failed: BTreeMap<String, Timestamp>,
    /// Replicas that get no new requests, by uid.
    draining: BTreeSet<String>,
    /// How many replicas a service has and how many of them serve, by its uid.
    counts: BTreeMap<String, (u32, u32)>,
}

#[derive(Debug, Default)]
struct Set {
    scaler: Autoscaler,
    draining: Draining,
}

impl Sets {
    /// Whether a replica gets no new requests.
    pub(crate) fn drains(&self, uid: &str) -> bool {
        self.draining.contains(uid)
    }

    /// Puts the numbers of a service's replicas into its status.
    pub(crate) fn count(&self, job: &Job, status: &mut JobStatus) {
        if let Some((present, ready)) = self.counts.get(&job.uid) {
            (status.replicas, status.ready_replicas) = (*present, *ready);
        }
    }

    /// Whether the status that is stored tells other numbers.
    pub(crate) fn is_news(&self, job: &Job) -> bool {
        let told = (job.status.replicas, job.status.ready_replicas);
        job.has_status && self.counts.get(&job.uid).is_some_and(|counts| *counts != told)
    }
}

fn service(job: &Job) -> Option<&ModelService> {
    match &job.spec.as_ref().ok()?.work {
        Work::ModelService(service) => Some(service),
        _ => None,
    }
}

fn load(job: &Job, worlds: &Worlds, now: Timestamp) -> Option<Load> {
    let report = worlds.told(&job.uid, job.status.attempt)?.fresh(now.0)?;
    (phase(&job.status) == JobPhase::Running && report.ready).then_some(Load {
        running: report.running,
        waiting: report.waiting,
        max_batch: report.max_batch,
        kv_usage: report.kv_usage,
    })
}

/// Returns the name of a service's replica: a legal name of a job, another one for each number.
fn name(service: &Job, number: u32) -> String {
    let plain = format!("{}-{number}", service.name);
    if plain.len() <= JOB_NAME_MAX {
        return plain;
    }
    let start: String = service.name.chars().take(JOB_NAME_MAX - 14).collect();
    let unique: String = service.uid.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    format!("{}-{unique}-{number}", start.trim_end_matches('-'))
}

/// Returns the object of a service's replica.
fn object(service: &Job, applied: &DynamicObject, number: u32) -> Value {
    let mut spec = applied.data.get("spec").cloned().unwrap_or_else(|| json!({}));
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("autoscale");
        spec.insert("replicas".to_owned(), json!(1));
        spec.entry("servedName").or_insert_with(|| json!(service.name));
    }
    let mut labels: BTreeMap<String, String> = applied.metadata.labels.clone().unwrap_or_default();
    labels.insert(REPLICA_OF.to_owned(), service.name.clone());
    labels.insert(REPLICA.to_owned(), number.to_string());
    let annotations: BTreeMap<String, String> = applied
        .metadata
        .annotations
        .clone()
        .unwrap_or_default()
        .into_iter()
        .filter(|(key, _)| key.starts_with(&format!("{GROUP}/")))
        .collect();
    json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": JobKind::ModelService.as_str(),
        "metadata": {
            "name": name(service, number),
            "namespace": service.namespace,
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [owner(service)],
        },
        "spec": spec,
    })
}

/// Returns what of a service's spec its replica follows while both are there: the fields to change.
fn followed(service: &Job, replica: &Job) -> Option<Value> {
    let (of, is) = (service.spec.as_ref().ok()?, replica.spec.as_ref().ok()?);
    let (of, is) = (&of.settings, &is.settings);
    (of.queue != is.queue || of.priority != is.priority)
        .then(|| json!({ "spec": { "queue": of.queue.to_string(), "priority": of.priority } }))
}

/// After a call about replicas failed, they rest for so long: a name that somebody else has does not
/// become free in a moment.
const REST: Duration = Duration::from_secs(5);

/// What is done to one replica's object.
enum Step {
    Create(Value),
    Delete { name: String, uid: String },
    Patch { name: String, patch: Value },
}

impl Core {
    /// Looks after the replicas of every service.
    pub(crate) fn keep_replicas(
        &mut self,
        jobs: &BTreeMap<String, Job>,
        now: Timestamp,
        wake: &mut Wake,
    ) {
        let mut of: BTreeMap<&str, BTreeMap<u32, &Job>> = BTreeMap::new();
        for job in jobs.values() {
            if let Some(replica) = &job.replica_of {
                of.entry(&replica.uid).or_default().insert(replica.number, job);
            }
        }
        self.replicas.failed.retain(|uid, _| jobs.contains_key(uid));
        self.replicas.sets.retain(|uid, _| jobs.contains_key(uid) || of.contains_key(&**uid));
        self.replicas.counts.clear();
        self.replicas.draining.clear();
        for job in jobs.values() {
            if job.kind == JobKind::ModelService && job.replica_of.is_none() {
                let replicas = of.remove(job.uid.as_str()).unwrap_or_default();
                self.keep_set(job, &replicas, now, wake);
            }
        }
        // Whose service is gone: the garbage collector deletes them too, where there is one.
        for (uid, replicas) in of {
            let Some(replica) = replicas.values().next() else { continue };
            let (namespace, key) = (replica.namespace.clone(), format!("{uid}/replicas"));
            self.carry_out(key, namespace, deletions(&replicas), wake);
        }
    }

    fn keep_set(
        &mut self,
        job: &Job,
        replicas: &BTreeMap<u32, &Job>,
        now: Timestamp,
        wake: &mut Wake,
    ) {
        let key = format!("{}/replicas", job.uid);
        if job.is_deleting {
            return self.carry_out(key, job.namespace.clone(), deletions(replicas), wake);
        }
        let Some(spec) = service(job) else { return };
        let members = || std::iter::once(&job).chain(replicas.values());
        let loads: Vec<Load> = members().filter_map(|job| load(job, &self.worlds, now)).collect();
        let living = replicas.values().filter(|one| !one.is_deleting).count() as u32;
        self.replicas.counts.insert(job.uid.clone(), (1 + living, loads.len() as u32));
        if phase(&job.status).is_terminal() || !job.has_finalizer {
            // One that has failed leaves its replicas serving, until somebody deletes it.
            return;
        }
        let mut set = self.replicas.sets.remove(&job.uid).unwrap_or_default();
        let wanted = match &spec.autoscale {
            Some(rule) => {
                wake.at_ms(Some(now.0 + LOOK_MS));
                set.scaler.wanted(rule, 1 + living, &loads, now)
            }
            None => spec.replicas,
        };
        let there = replicas.iter().map(|(number, one)| (*number, self.standing(one, now)));
        let steps = set.draining.steps(wanted, &there.collect(), now);
        wake.at_ms(steps.again.map(|at| at.0));
        let drained = replicas.iter().filter(|(number, _)| set.draining.holds(**number));
        self.replicas.draining.extend(drained.map(|(_, one)| one.uid.clone()));
        self.replicas.sets.insert(job.uid.clone(), set);
        let mut todo = Vec::new();
        for number in steps.end {
            let Some(one) = replicas.get(&number) else { continue };
            todo.push(Step::Delete { name: one.name.clone(), uid: one.uid.clone() });
        }
        for replica in replicas.values().filter(|one| !one.is_deleting) {
            if let Some(patch) = followed(job, replica) {
                todo.push(Step::Patch { name: replica.name.clone(), patch });
            }
        }
        if !steps.start.is_empty()
            && let Some(applied) = self.applied(job)
        {
            todo.extend(
                steps.start.iter().map(|number| Step::Create(object(job, &applied, *number))),
            );
        }
        self.carry_out(key, job.namespace.clone(), todo, wake);
    }

    fn standing(&mut self, job: &Job, now: Timestamp) -> Standing {
        if job.is_deleting {
            return Standing::Ending;
        }
        match phase(&job.status) {
            JobPhase::Failed | JobPhase::Succeeded | JobPhase::Cancelled => {
                Standing::Failed(*self.replicas.failed.entry(job.uid.clone()).or_insert(now))
            }
            JobPhase::Running => {
                let told = self.worlds.told(&job.uid, job.status.attempt);
                let report = told.and_then(|told| told.serving.as_ref());
                let requests = report.map_or(u32::MAX, |(last, _)| last.running + last.waiting);
                Standing::Active { requests: Some(requests) }
            }
            _ => Standing::Active { requests: None },
        }
    }

    pub(crate) fn was_kept(&mut self, key: String, answer: Result<(), LaunchError>) {
        self.busy.remove(&key);
        if let Err(error) = answer {
            tracing::warn!(service = %key, %error, "replicas could not be made or deleted");
            self.resting.insert(key, Instant::now() + REST);
        }
    }

    fn applied(&self, job: &Job) -> Option<DynamicObject> {
        let (_, store) = self.stores.jobs.iter().find(|(kind, _)| *kind == job.kind)?;
        let is_it = |object: &DynamicObject| object.metadata.uid.as_ref() == Some(&job.uid);
        store.find(is_it).map(|object| (*object).clone())
    }

    fn carry_out(&mut self, key: String, namespace: String, todo: Vec<Step>, wake: &mut Wake) {
        if todo.is_empty() {
            self.resting.remove(&key);
            return;
        }
        if let Some(until) = self.resting.get(&key).filter(|until| **until > Instant::now()) {
            wake.at(*until);
            return;
        }
        if !self.busy.insert(key.clone()) {
            return;
        }
        self.spawn((), move |writer, ()| async move {
            let mut answer = Ok(());
            for step in todo {
                if let Err(error) = one(&writer, &namespace, step).await {
                    answer = Err(error);
                }
            }
            Done::Replicas { key, answer }
        });
    }
}

fn deletions(replicas: &BTreeMap<u32, &Job>) -> Vec<Step> {
    let living = replicas.values().filter(|one| !one.is_deleting);
    living.map(|one| Step::Delete { name: one.name.clone(), uid: one.uid.clone() }).collect()
}

async fn one(writer: &Writer, namespace: &str, step: Step) -> Result<(), LaunchError> {
    writer.leadership.check()?;
    let api: Api<DynamicObject> =
        Api::namespaced_with(writer.client.clone(), namespace, &resource(JobKind::ModelService));
    match step {
        Step::Create(object) => {
            let object: DynamicObject = serde_json::from_value(object)?;
            match api.create(&PostParams::default(), &object).await {
                Ok(_) => Ok(()),
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    // Ours, and not shown yet; or somebody else's of that name.
                    let name = object.metadata.name.as_deref().unwrap_or_default();
                    let there = api.get(name).await?;
                    let owner = object.metadata.owner_references.iter().flatten().next();
                    if owner.is_some_and(|owner| is_owned_by(&there, &owner.uid)) {
                        Ok(())
                    } else {
                        Err(kube::Error::Api(status).into())
                    }
                }
                Err(error) => Err(error.into()),
            }
        }
        Step::Delete { name, uid } => {
            let params = DeleteParams {
                preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
                ..DeleteParams::default()
            };
            match api.delete(&name, &params).await {
                Ok(_) => Ok(()),
                Err(error) if is_missing(&error) => Ok(()),
                // Another object of that name: ours is gone.
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
                Err(error) => Err(error.into()),
            }
        }
        Step::Patch { name, patch } => {
            match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => Ok(()),
                Err(error) if is_missing(&error) => Ok(()),
                Err(error) => Err(error.into()),
            }
        }
    }
}

/// Returns what selects the pods of a service and all its replicas.
pub(crate) fn selector(job: &Job) -> Option<String> {
    (job.kind == JobKind::ModelService).then(|| format!("{SERVICE}={}", job.served_by()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(name: &str, spec: Value) -> (Job, DynamicObject) {
        let mut object = DynamicObject::new(name, &resource(JobKind::ModelService));
        object.metadata.namespace = Some("team".to_owned());
        object.metadata.uid = Some("0f3a1b2c-1111-2222-3333-444455556666".to_owned());
        object.metadata.resource_version = Some("7".to_owned());
        object.metadata.annotations = Some(BTreeMap::from([
            ("drumline.dev/image".to_owned(), "an-image".to_owned()),
            ("kubectl.kubernetes.io/last-applied-configuration".to_owned(), "{}".to_owned()),
        ]));
        object.data = json!({ "spec": spec });
        (Job::read(JobKind::ModelService, &object).unwrap(), object)
    }

    #[test]
    fn a_replica_is_a_service_of_one_that_knows_where_it_belongs() {
        let spec = json!({ "model": "m", "autoscale": { "max": 3 }, "queue": "research" });
        let (job, object) = applied("chat", spec);
        assert!(job.spec.is_ok(), "{:?}", job.spec);
        let mut made: DynamicObject =
            serde_json::from_value(super::object(&job, &object, 2)).unwrap();
        let annotations = made.metadata.annotations.clone().unwrap();
        assert_eq!(annotations.keys().collect::<Vec<_>>(), ["drumline.dev/image"]);
        made.metadata.uid = Some("another".to_owned());
        made.metadata.resource_version = Some("8".to_owned());
        let replica = Job::read(JobKind::ModelService, &made).unwrap();
        let of = replica.replica_of.clone().unwrap();
        assert_eq!((of.service.as_str(), of.uid.as_str(), of.number), ("chat", &*job.uid, 2));
        let spec = service(&replica).unwrap();
        assert_eq!((spec.served_name.as_str(), spec.replicas, spec.autoscale), ("chat", 1, None));
        assert_eq!(selector(&replica), selector(&job));
        assert_eq!(followed(&job, &replica), None);
    }

    #[test]
    fn names_of_replicas_are_legal_and_differ() {
        for length in [1, 47, 48, 49, 50] {
            let (job, _) = applied(&"a".repeat(length), json!({ "model": "m" }));
            let names: BTreeSet<String> = [1, 9, 10, 255].map(|n| name(&job, n)).into();
            assert_eq!(names.len(), 4);
            for name in names {
                assert!(name.len() <= JOB_NAME_MAX, "{name}");
                assert!(name.parse::<drumline_types::JobId>().is_ok(), "{name}");
            }
        }
    }
}
