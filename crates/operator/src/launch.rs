//! Carries out what was decided for one gang: all its pods created, then all bound; or taken back
//! whole.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumline_spec::JobSpec;
use drumline_types::Explanation;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Binding, Pod, Service};
use k8s_openapi::api::resource::v1::ResourceClaim;
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions,
};
use kube::core::{Request, Status};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Client, Resource};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Semaphore;

use crate::crd::status::JobStatus;
use crate::dra::{self, RankClaim};
use crate::gang::{ATTEMPT, UID};
use crate::job::{FINALIZER, Job, resource, resource_named};
use crate::lease::{Leadership, NotLeading};
use crate::pods::{self, PodRules, Seat};
use crate::step::Doomed;

/// Calls about pods that all gangs together have under way at a time: more would only wait for each
/// other at the API server, each on a connection of its own.
const CALLS_MAX: usize = 64;
/// Longest time that the pods of a gang that is taken back may take to go.
const GONE_DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks at whether they are gone.
const GONE_POLL: Duration = Duration::from_millis(100);

/// Why something was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The API server refused, or was not reached.
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// This process does not lead any more.
    #[error(transparent)]
    NotLeading(#[from] NotLeading),
    /// The parts do not make an object.
    #[error("not an object of the API: {0}")]
    Object(#[from] serde_json::Error),
    /// A device that was to be a rank's has been given to somebody else in the same moment.
    #[error("{device} is allocated to the claim {claim} too")]
    Claimed {
        /// The device.
        device: String,
        /// The other claim.
        claim: String,
    },
    /// Pods are still there.
    #[error("{0} pods are still there after {GONE_DEADLINE:?}")]
    StillThere(usize),
}

impl LaunchError {
    /// Returns whether somebody else changed the object first.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Api(kube::Error::Api(status)) if status.code == 409)
    }
}

pub(crate) fn is_missing(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Returns whether an object has this owner.
pub(crate) fn is_owned_by(object: &impl kube::ResourceExt, uid: &str) -> bool {
    object.owner_references().iter().any(|owner| owner.uid == uid)
}

/// Writes to the API server, as long as this process leads.
#[derive(Clone)]
pub struct Writer {
    /// The way to the API server.
    pub client: Client,
    /// Whether this process may write.
    pub leadership: Leadership,
    /// How pods are made.
    pub rules: PodRules,
    /// Tells people what happens.
    pub recorder: Recorder,
    /// Places for calls about pods.
    pub calls: Calls,
    /// Whether ranks may have claims.
    pub has_claims: bool,
}

/// What is read of a pod that was made.
#[derive(Deserialize)]
struct Made {
    metadata: MadeMetadata,
}

#[derive(Deserialize)]
struct MadeMetadata {
    uid: String,
}

/// Places for calls to the API server that come in great numbers. Cloning shares them.
#[derive(Clone)]
pub struct Calls(Arc<Semaphore>);

impl Default for Calls {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(CALLS_MAX)))
    }
}

impl Writer {
    fn jobs(&self, job: &Job) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &job.namespace, &resource(job.kind))
    }

    fn pods(&self, job: &Job) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &job.namespace)
    }

    /// Writes a job's status, fenced by the revision that it was decided on, and tells people when
    /// phase or reason changed.
    ///
    /// # Errors
    /// [`LaunchError`]; a conflict when the job has changed since.
    pub async fn status(
        &self,
        job: &Job,
        status: &JobStatus,
    ) -> Result<DynamicObject, LaunchError> {
        self.leadership.check()?;
        // What is not known any more is sent as null, which takes it away.
        let patch = json!({
            "metadata": { "resourceVersion": job.resource_version },
            "status": status,
        });
        let written = self
            .jobs(job)
            .patch_status(&job.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await?;
        if (&job.status.phase, &job.status.reason) != (&status.phase, &status.reason) {
            self.tell(job, status).await;
        }
        Ok(written)
    }

    async fn tell(&self, job: &Job, status: &JobStatus) {
        let is_bad = matches!(status.phase.as_str(), "failed" | "restarting");
        let event = Event {
            type_: if is_bad { EventType::Warning } else { EventType::Normal },
            reason: if status.reason.is_empty() { "Running".into() } else { status.reason.clone() },
            note: Some(status.message.chars().take(1000).collect()),
            action: format!("Phase{}", status.phase),
            secondary: None,
        };
        let reference = k8s_openapi::api::core::v1::ObjectReference {
            api_version: Some(resource(job.kind).api_version),
            kind: Some(job.kind.as_str().to_owned()),
            name: Some(job.name.clone()),
            namespace: Some(job.namespace.clone()),
            uid: Some(job.uid.clone()),
            ..Default::default()
        };
        if let Err(error) = self.recorder.publish(&event, &reference).await {
            tracing::warn!(%error, job = %job.id, "an event could not be told");
        }
    }

    /// Puts the finalizer on a job.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn adopt(&self, job: &Job) -> Result<DynamicObject, LaunchError> {
        let all = job.finalizers.iter().map(String::as_str).chain([FINALIZER]);
        self.finalizers(job, all.collect()).await
    }

    /// Deletes a job's service and, once no pod of it is there, takes the finalizer off.
    ///
    /// # Errors
    /// [`LaunchError`]; [`LaunchError::StillThere`] when pods turn up that the caller did not see.
    pub async fn release(&self, job: &Job) -> Result<(), LaunchError> {
        let left = self.list(job, None).await?.len();
        if left > 0 {
            return Err(LaunchError::StillThere(left));
        }
        self.leadership.check()?;
        if self.has_claims {
            let params = ListParams::default().labels(&format!("{UID}={}", job.uid));
            for claim in self.claims(&job.namespace).list_metadata(&params).await? {
                let (name, uid) = (claim.metadata.name, claim.metadata.uid);
                self.drop_claim(
                    &job.namespace,
                    &name.unwrap_or_default(),
                    &uid.unwrap_or_default(),
                )
                .await?;
            }
        }
        let services: Api<Service> = Api::namespaced(self.client.clone(), &job.namespace);
        match services.delete(&job.service(), &DeleteParams::default()).await {
            Ok(_) => {}
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(error.into()),
        }
        let others = job.finalizers.iter().map(String::as_str).filter(|one| *one != FINALIZER);
        match self.finalizers(job, others.collect()).await {
            Err(LaunchError::Api(error)) if is_missing(&error) => Ok(()),
            done => done.map(drop),
        }
    }

    async fn finalizers(&self, job: &Job, all: Vec<&str>) -> Result<DynamicObject, LaunchError> {
        self.leadership.check()?;
        let patch = json!({ "metadata": {
            "resourceVersion": job.resource_version, "finalizers": all,
        }});
        Ok(self.jobs(job).patch(&job.name, &PatchParams::default(), &Patch::Merge(&patch)).await?)
    }

    /// Writes what stands in a queue.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn queue_status(
        &self,
        queue: &str,
        pending: u64,
        running: u64,
    ) -> Result<(), LaunchError> {
        self.leadership.check()?;
        let queues: Api<DynamicObject> =
            Api::all_with(self.client.clone(), &resource_named("Queue"));
        let patch = json!({ "status": { "pending": pending, "running": running } });
        match queues.patch_status(queue, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Starts an attempt: writes it down, creates every pod, then binds every one. `spec` is
    /// the job's at the size of the attempt, `written`
    /// the job's object once the attempt is written down.
    ///
    /// # Errors
    /// [`LaunchError`]. The caller takes the gang back.
    pub async fn launch(
        &self,
        job: &Job,
        spec: &JobSpec,
        attempt: u32,
        status: &JobStatus,
        seats: &[Seat],
        written: &mut Option<DynamicObject>,
    ) -> Result<(), LaunchError> {
        // Fenced: of two operators that both believe they lead, one gets a conflict here.
        *written = Some(self.status(job, status).await?);
        self.ensure_service(job).await?;
        let made: Vec<Pod> = seats
            .iter()
            .map(|seat| pods::pod(&self.rules, job, spec, attempt, seat))
            .collect::<Result<_, _>>()?;
        let calls: Vec<_> = made.iter().map(|pod| self.create(job, pod)).collect();
        let uids: Vec<String> = stream::iter(calls).buffered(CALLS_MAX).try_collect().await?;
        self.allocate(job, attempt, seats, &uids).await?;
        // Every pod is there, so every quota and admission rule is passed: now they may run.
        stream::iter(seats.iter().map(Ok::<_, LaunchError>))
            .try_for_each_concurrent(CALLS_MAX, |seat| self.bind(job, attempt, seat))
            .await
    }

    /// Makes the claims of a gang's pods, gives each the device of its plan, and makes sure that nobody
    /// else was given it in the same moment: claims are not written in one transaction.
    async fn allocate(
        &self,
        job: &Job,
        attempt: u32,
        seats: &[Seat],
        uids: &[String],
    ) -> Result<(), LaunchError> {
        let mut devices = BTreeMap::new();
        for (seat, uid) in seats.iter().zip(uids) {
            if let (Some(class), Some(device)) = (&seat.class, &seat.resource) {
                let name = job.pod(attempt, seat.rank);
                devices.insert(device.as_str(), (name, uid.as_str(), class.as_str(), seat));
            }
        }
        if devices.is_empty() {
            return Ok(());
        }
        let claims = self.claims(&job.namespace);
        stream::iter(devices.iter().map(Ok::<_, LaunchError>))
            .try_for_each_concurrent(CALLS_MAX, |(device, (name, uid, class, seat))| {
                let claims = &claims;
                async move {
                    let pod = (name.as_str(), *uid);
                    let claim = dra::claim(pod, &job.namespace, &job.uid, class)?;
                    let status = dra::allocation(pod, &seat.node, device);
                    let _place = self.calls.0.acquire().await;
                    self.leadership.check()?;
                    claims.create(&PostParams::default(), &claim).await?;
                    self.leadership.check()?;
                    let params = PatchParams::default();
                    claims.patch_status(name, &params, &Patch::Merge(&status)).await?;
                    Ok(())
                }
            })
            .await?;
        let all: Api<ResourceClaim> = Api::all(self.client.clone());
        for claim in all.list(&ListParams::default()).await? {
            let of = |text: &Option<String>| text.clone().unwrap_or_default();
            let (namespace, name) = (of(&claim.metadata.namespace), of(&claim.metadata.name));
            for device in dra::allocated(&claim) {
                let ours = devices.get(device.as_str());
                if ours.is_some_and(|(ours, ..)| namespace != job.namespace || name != *ours) {
                    return Err(LaunchError::Claimed {
                        device,
                        claim: format!("{namespace}/{name}"),
                    });
                }
            }
        }
        Ok(())
    }

    fn claims(&self, namespace: &str) -> Api<ResourceClaim> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Deletes a claim whose pod is gone or has ended. Returns false when the pod is there after all.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn sweep_claim(&self, claim: &RankClaim) -> Result<bool, LaunchError> {
        let (namespace, name) = &claim.key;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let pod = pods.get_opt(name).await?;
        let lives = pod.is_some_and(|pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            pod.metadata.uid.as_ref() == Some(&claim.pod)
                && !matches!(phase, Some("Succeeded" | "Failed"))
        });
        if !lives {
            self.drop_claim(namespace, name, &claim.uid).await?;
        }
        Ok(!lives)
    }

    /// Deletes a claim, and lets it go. One that is gone already is no error.
    async fn drop_claim(&self, namespace: &str, name: &str, uid: &str) -> Result<(), LaunchError> {
        self.leadership.check()?;
        let claims = self.claims(namespace);
        let is_gone = |error: &kube::Error| {
            // Another claim of that name: ours is gone.
            is_missing(error) || matches!(error, kube::Error::Api(status) if status.code == 409)
        };
        let preconditions = Preconditions { uid: Some(uid.to_owned()), ..Preconditions::default() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match claims.delete(name, &params).await {
            Ok(_) => {}
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let free = json!({ "metadata": { "uid": uid, "finalizers": null } });
        match claims.patch(name, &PatchParams::default(), &Patch::Merge(&free)).await {
            Err(error) if !is_gone(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Returns the uid of the pod that was made.
    async fn create(&self, job: &Job, pod: &Pod) -> Result<String, LaunchError> {
        let pods = Request::new(Pod::url_path(&(), Some(&job.namespace)));
        let body = serde_json::to_vec(pod)?;
        let request =
            pods.create(&PostParams::default(), body).map_err(kube::Error::BuildRequest)?;
        // The semaphore is never closed.
        let _place = self.calls.0.acquire().await;
        self.leadership.check()?;
        // The answer is the whole pod again: it is hardly read, since the watch brings it too.
        let made: Made = self.client.request(request).await?;
        Ok(made.metadata.uid)
    }

    async fn ensure_service(&self, job: &Job) -> Result<(), LaunchError> {
        self.leadership.check()?;
        let services: Api<Service> = Api::namespaced(self.client.clone(), &job.namespace);
        match services.create(&PostParams::default(), &pods::service(job)?).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let there = services.get(&job.service()).await?;
                if is_owned_by(&there, &job.uid) {
                    Ok(())
                } else {
                    Err(kube::Error::Api(status).into())
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn bind(&self, job: &Job, attempt: u32, seat: &Seat) -> Result<(), LaunchError> {
        let name = job.pod(attempt, seat.rank);
        let pods = self.pods(job);
        // The semaphore is never closed.
        let _place = self.calls.0.acquire().await;
        self.leadership.check()?;
        let mut binding = Binding::default();
        binding.metadata.name = Some(name.clone());
        binding.target.kind = Some("Node".to_owned());
        binding.target.name = Some(seat.node.clone());
        let _: Status =
            pods.create_subresource("binding", &name, &PostParams::default(), &binding).await?;
        Ok(())
    }

    /// Deletes pods. One that is gone already is no error.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn remove(&self, job: &Job, doomed: &[Doomed]) -> Result<(), LaunchError> {
        let namespace = job.namespace.clone();
        self.remove_in(&namespace, doomed).await
    }

    /// Deletes pods of a namespace.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn remove_in(&self, namespace: &str, doomed: &[Doomed]) -> Result<(), LaunchError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        stream::iter(doomed.iter().map(Ok::<_, LaunchError>))
            .try_for_each_concurrent(CALLS_MAX, |one| async {
                let _place = self.calls.0.acquire().await;
                self.leadership.check()?;
                let params = DeleteParams {
                    grace_period_seconds: one.is_lost.then_some(0),
                    preconditions: Some(Preconditions {
                        uid: Some(one.uid.clone()),
                        ..Preconditions::default()
                    }),
                    ..DeleteParams::default()
                };
                match pods.delete(&one.name, &params).await {
                    Ok(_) => Ok(()),
                    Err(error) if is_missing(&error) => Ok(()),
                    // Another pod of that name: ours is gone.
                    Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
                    Err(error) => Err(error.into()),
                }
            })
            .await
    }

    /// Returns the pods of a job as the API server has them at this moment, of one attempt or all.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn list(&self, job: &Job, attempt: Option<u32>) -> Result<Vec<Pod>, LaunchError> {
        let selector = match attempt {
            Some(attempt) => format!("{UID}={},{ATTEMPT}={attempt}", job.uid),
            None => format!("{UID}={}", job.uid),
        };
        Ok(self.pods(job).list(&ListParams::default().labels(&selector)).await?.items)
    }

    /// Takes an attempt back: deletes every pod of it, and waits until the API server has none.
    ///
    /// # Errors
    /// [`LaunchError`]. The devices stay promised until it succeeds.
    pub async fn take_back(&self, job: &Job, attempt: u32) -> Result<(), LaunchError> {
        let deadline = tokio::time::Instant::now() + GONE_DEADLINE;
        loop {
            let left = self.list(job, Some(attempt)).await?;
            if left.is_empty() {
                return Ok(());
            }
            let doomed: Vec<Doomed> = left
                .iter()
                .filter(|pod| pod.metadata.deletion_timestamp.is_none())
                .filter_map(|pod| {
                    Some(Doomed {
                        name: pod.metadata.name.clone()?,
                        uid: pod.metadata.uid.clone()?,
                        is_lost: false,
                    })
                })
                .collect();
            self.remove(job, &doomed).await?;
            if tokio::time::Instant::now() >= deadline {
                return Err(LaunchError::StillThere(left.len()));
            }
            tokio::time::sleep(GONE_POLL).await;
        }
    }
}

/// Says why a gang was taken back.
#[must_use]
pub fn taken_back(attempt: u32, error: &LaunchError) -> Explanation {
    Explanation::new(
        drumline_types::Reason::NotYetConsidered,
        format!("attempt {attempt} was taken back whole: {error}"),
    )
}
