//! The control API over a Kubernetes cluster: what `drumline` commands call with the user's own
//! kubeconfig and rights.
//!
//! It runs within the command and decides nothing: jobs are created as objects, and what is told of
//! them is read from their status, their pods and their events. The operator does not serve it, so
//! the API server's RBAC says who may do what.

mod address;
mod api;
mod logs;
mod nodes;
mod pipe;
mod submit;
mod view;

use drumline_spec::JobKind;
use drumline_types::JobPhase;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DynamicObject, ListParams};
use kube::config::KubeConfigOptions;
use kube::{Client, Config};
use tonic::Status;
use tonic::transport::Channel;

pub use address::{Address, SCHEME};

use crate::gang::{Member, UID};
use crate::job::{Job, resource};
use crate::step::phase;

/// Why a cluster cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// The kubeconfig does not lead to it.
    #[error("the kubeconfig does not lead to a cluster: {0}")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// There is no kubeconfig, and this is no pod.
    #[error("no cluster is configured: {0}")]
    Infer(#[from] kube::config::InferConfigError),
    /// The API server cannot be called.
    #[error("the API server cannot be called: {0}")]
    Client(#[from] kube::Error),
    /// The channel within this process could not be made, which is a bug.
    #[error(transparent)]
    Pipe(#[from] tonic::transport::Error),
}

/// Connects to the cluster that an address names. Nothing is asked of it yet.
///
/// # Errors
/// [`FrontError`].
pub async fn connect(address: &Address) -> Result<Channel, FrontError> {
    let config = if address.context.is_some() {
        let options =
            KubeConfigOptions { context: address.context.clone(), ..KubeConfigOptions::default() };
        Config::from_kubeconfig(&options).await?
    } else {
        Config::infer().await?
    };
    let namespace = address.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
    over(config, namespace).await
}

/// Serves the control API over the API server of `config`, for the jobs of one namespace, until the
/// channel is dropped.
///
/// # Errors
/// [`FrontError`].
pub async fn over(config: Config, namespace: String) -> Result<Channel, FrontError> {
    let server = config.cluster_url.to_string();
    let front = Front { client: Client::try_from(config)?, server, namespace };
    Ok(pipe::serve(front).await?)
}

/// The control API as one user of a cluster sees it.
#[derive(Clone)]
pub(crate) struct Front {
    /// The way to the API server.
    client: Client,
    /// Its address, for messages.
    server: String,
    /// Where jobs are.
    namespace: String,
}

impl Front {
    fn objects(&self, kind: JobKind, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, &resource(kind))
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Returns every job of the namespace.
    async fn jobs(&self, only: Option<JobKind>) -> Result<Vec<(Job, DynamicObject)>, Status> {
        let mut all = Vec::new();
        for kind in JobKind::ALL.into_iter().filter(|kind| only.is_none_or(|one| one == *kind)) {
            let listed = self.objects(kind, &self.namespace).list(&ListParams::default()).await;
            let objects = listed.map_err(|error| refused(&error))?;
            let read = |object| Some((Job::read(kind, &object)?, object));
            all.extend(objects.into_iter().filter_map(read));
        }
        Ok(all)
    }

    /// Finds a job by `KIND/NAME`, as `jobs` shows it and `kubectl` takes it, or by its name alone
    /// where one kind only has it.
    async fn find(&self, id: &str) -> Result<(Job, DynamicObject), Status> {
        let (kind, name) = match id.split_once('/') {
            None => (None, id),
            Some((kind, name)) => {
                let known = |one: &JobKind| kind.eq_ignore_ascii_case(one.as_str());
                let Some(kind) = JobKind::ALL.into_iter().find(known) else {
                    let kinds = JobKind::ALL.map(|kind| kind.as_str().to_ascii_lowercase());
                    return Err(Status::invalid_argument(format!(
                        "{id}: {kind:?} is no kind of job; there are {}",
                        kinds.join(", ")
                    )));
                };
                (Some(kind), name)
            }
        };
        let mut found = Vec::new();
        for kind in JobKind::ALL.into_iter().filter(|one| kind.is_none_or(|kind| kind == *one)) {
            let object = self.objects(kind, &self.namespace).get_opt(name).await;
            let Some(object) = object.map_err(|error| refused(&error))? else { continue };
            found.extend(Job::read(kind, &object).map(|job| (job, object)));
        }
        match (found.len(), found.pop()) {
            (1, Some(one)) => Ok(one),
            (_, None) => Err(Status::not_found(format!(
                "no job {id} in namespace {}; `drumline jobs` lists them",
                self.namespace
            ))),
            (_, Some((job, _))) => Err(Status::invalid_argument(format!(
                "several kinds of job are called {name}; name one as {}",
                view::id(&job)
            ))),
        }
    }

    /// Returns the pods of a job's newest attempt.
    async fn members(&self, job: &Job) -> Result<Vec<Member>, Status> {
        let selected = ListParams::default().labels(&format!("{UID}={}", job.uid));
        let pods = self.pods().list(&selected).await.map_err(|error| refused(&error))?;
        let mut members: Vec<Member> = pods.iter().filter_map(Member::read).collect();
        members.retain(|member| member.attempt == job.status.attempt);
        members.sort_by_key(|member| member.rank);
        Ok(members)
    }
}

/// Returns whether a job has ended, or is asked to.
fn is_over(job: &Job) -> bool {
    phase(&job.status).is_terminal()
}

/// Returns where a job stands, its deletion included.
fn phase_of(job: &Job) -> JobPhase {
    match phase(&job.status) {
        phase if job.is_deleting && !phase.is_terminal() => JobPhase::Cancelling,
        phase => phase,
    }
}

/// Sorts what the API server refused.
pub(crate) fn refused(error: &kube::Error) -> Status {
    match error {
        kube::Error::Api(answer) => {
            let told = answer.message.clone();
            match answer.code {
                400 | 422 => Status::invalid_argument(told),
                401 => Status::unauthenticated(told),
                403 => Status::permission_denied(told),
                404 if answer.reason.is_empty()
                    || told.contains("could not find the requested resource") =>
                {
                    Status::failed_precondition(
                        "this cluster does not know Drumline's resources; install the chart helm/drumline",
                    )
                }
                404 => Status::not_found(told),
                409 => Status::already_exists(told),
                429 | 500..=599 => Status::unavailable(told),
                _ => Status::internal(told),
            }
        }
        error => Status::unavailable(drumline_wire::line::deepest(error)),
    }
}
