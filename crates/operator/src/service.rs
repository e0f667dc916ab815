//! The operator as a process: watches, leadership, and the loop that joins them to the core.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use drumline_spec::JobKind;
use drumline_types::Timestamp;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};
use kube::api::{Api, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, DefaultBackoff};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::core::{Core, Stores};
use crate::fleet::FleetRules;
use crate::job::{resource, resource_named};
use crate::launch::Writer;
use crate::lease::{self, Leadership, LeaseRules};
use crate::pods::PodRules;

/// Changes that come together are looked at together.
const SETTLE: Duration = Duration::from_millis(10);
/// How long a follower waits before it looks again whether it leads.
const FOLLOW: Duration = Duration::from_millis(200);

/// What the operator needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// The way to the API server.
    pub client: kube::Config,
    /// The namespace of the lease.
    pub namespace: String,
    /// How leadership is held.
    pub lease: LeaseRules,
    /// How nodes are read.
    pub fleet: FleetRules,
    /// How pods are made.
    pub pods: PodRules,
}

/// Why the operator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The API server cannot be called.
    #[error("the API server cannot be called: {0}")]
    Client(#[from] kube::Error),
}

/// Runs until `stop`.
///
/// # Errors
/// [`ServiceError`] when it cannot start. What fails later is tried again.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), ServiceError> {
    let client = Client::try_from(options.client)?;
    let changed = Arc::new(Notify::new());
    let mut jobs = Vec::new();
    for kind in JobKind::ALL {
        let resource = resource(kind);
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        jobs.push((kind, watch(api, resource, &changed, &stop)));
    }
    let queue = resource_named("Queue");
    let stores = Stores {
        jobs,
        queues: watch(Api::all_with(client.clone(), &queue), queue, &changed, &stop),
        nodes: watch(Api::<KubeNode>::all(client.clone()), (), &changed, &stop),
        pods: watch(Api::<Pod>::all(client.clone()), (), &changed, &stop),
    };
    let leadership = Leadership::default();
    let reporter =
        Reporter { controller: "drumline".into(), instance: Some(options.lease.identity.clone()) };
    let writer = Writer {
        client: client.clone(),
        leadership: leadership.clone(),
        rules: options.pods,
        recorder: Recorder::new(client.clone(), reporter),
    };
    let leases = Api::namespaced(client, &options.namespace);
    let lease = tokio::spawn(lease::run(leases, options.lease, leadership.clone(), stop.clone()));
    follow(stores, options.fleet, writer, &leadership, &changed, &stop).await;
    // Handing the lease back lets the next leader start at once.
    let _ = tokio::time::timeout(Duration::from_secs(3), lease).await;
    Ok(())
}

/// Waits for leadership, leads, and starts from nothing whenever leadership was lost.
async fn follow(
    stores: Stores,
    rules: FleetRules,
    writer: Writer,
    leadership: &Leadership,
    changed: &Notify,
    stop: &CancellationToken,
) {
    if stop.run_until_cancelled(all_listed(&stores)).await.is_none() {
        return;
    }
    loop {
        while !leadership.holds() {
            if stop.run_until_cancelled(tokio::time::sleep(FOLLOW)).await.is_none() {
                return;
            }
        }
        tracing::info!("leading");
        // What the last leader wrote may not be shown yet: let the watches settle.
        tokio::time::sleep(FOLLOW).await;
        let (sender, mut done) = mpsc::unbounded_channel();
        let writer = Writer { leadership: leadership.begin(), ..writer.clone() };
        let mut core = Core::new(stores.clone(), rules.clone(), writer, sender);
        while leadership.holds() {
            let left = core.pass(now());
            let first = tokio::select! {
                () = tokio::time::sleep(left) => None,
                () = changed.notified() => None,
                done = done.recv() => done,
                () = stop.cancelled() => return,
            };
            tokio::time::sleep(SETTLE).await;
            for one in first.into_iter().chain(std::iter::from_fn(|| done.try_recv().ok())) {
                core.done(one, now());
            }
        }
        tracing::warn!("not leading any more");
    }
}

async fn all_listed(stores: &Stores) {
    // A writer is dropped only when its watch has ended with the whole process.
    for (_, store) in &stores.jobs {
        let _ = store.wait_until_ready().await;
    }
    let _ = stores.queues.wait_until_ready().await;
    let _ = stores.nodes.wait_until_ready().await;
    let _ = stores.pods.wait_until_ready().await;
}

fn watch<K>(
    api: Api<K>,
    kind: K::DynamicType,
    changed: &Arc<Notify>,
    stop: &CancellationToken,
) -> Store<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone + Send + Sync,
{
    let writer = reflector::store::Writer::new(kind);
    let store = writer.as_reader();
    let (changed, stop) = (changed.clone(), stop.clone());
    tokio::spawn(async move {
        let stream = watcher::watcher(api, watcher::Config::default())
            .modify(|object| {
                // Half of an object's size, and of no use here.
                object.meta_mut().managed_fields = None;
            })
            .backoff(DefaultBackoff::default())
            .reflect(writer);
        let mut stream = std::pin::pin!(stream);
        while let Some(Some(event)) = stop.run_until_cancelled(stream.next()).await {
            match event {
                Ok(_) => changed.notify_one(),
                Err(error) => tracing::warn!(%error, "a watch was cut off; it starts again"),
            }
        }
    });
    store
}

fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Timestamp(u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX))
}

impl Options {
    /// Returns what an operator needs where it runs: in a pod its service account, elsewhere the
    /// user's kubeconfig.
    ///
    /// # Errors
    /// When neither is there.
    pub async fn here(namespace: String, identity: String) -> Result<Self, ServiceError> {
        let client = kube::Config::infer().await.map_err(kube::Error::InferConfig)?;
        Ok(Self {
            client,
            namespace,
            lease: LeaseRules { identity, duration: Duration::from_secs(15) },
            fleet: FleetRules::default(),
            pods: PodRules::default(),
        })
    }

    /// Sets the extended resource that is one GPU, for nodes and pods alike.
    #[must_use]
    pub fn gpu_resource(mut self, name: &str) -> Self {
        name.clone_into(&mut self.fleet.gpu_resource);
        name.clone_into(&mut self.pods.gpu_resource);
        self
    }

    /// Sets the processor time of one CPU device, in thousandths of a core.
    #[must_use]
    pub fn cpu_device_milli(mut self, milli: u64) -> Self {
        self.fleet.cpu_device_milli = milli.max(1);
        self.pods.cpu_device_milli = milli.max(1);
        self
    }
}
