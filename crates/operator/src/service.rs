//! The operator as a process: watches, leadership, and the loop that joins them to the core.

use std::fmt::Debug;
use std::hash::Hash;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use drumline_spec::JobKind;
use drumline_types::Timestamp;
use futures::StreamExt;
use kube::api::{Api, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{self, Store};
use kube::runtime::utils::ResetTimerBackoff;
use kube::runtime::watcher;
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::core::{Core, Stores};
use crate::deploy::{RANKS_PORT, url};
use crate::devices::GpuResource;
use crate::dra::Claims;
use crate::figures::Figures;
use crate::fleet::FleetRules;
use crate::guard::{self, GuardError, GuardRules, InEffect};
use crate::job::{resource, resource_named};
use crate::launch::{Calls, Writer};
use crate::lease::{self, Leadership, LeaseRules};
use crate::ledger::Ledger;
use crate::observe::{self, Observe};
use crate::pods::PodRules;
use crate::ranks::admit::{self, Admitted};
use crate::ranks::callers::Callers;
use crate::ranks::keys::{Keys, KeysError};
use crate::ranks::serve::{CALLS_MAX, ServeError, serve};
use crate::ranks::services::{Board, Services};
use crate::ranks::{RankRules, place};
use crate::waits::{RETRY_MAX, RETRY_MIN, Waits};

/// Changes that come together are looked at together.
const SETTLE: Duration = Duration::from_millis(10);
/// Where devices that drivers publish, and claims of them, are found.
const CLAIMS_VERSION: &str = "resource.k8s.io/v1";
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
    /// Where ranks and gateways are served.
    pub ranks: RankRules,
    /// Where probes and metrics are served; `None`: nowhere.
    pub observe: Option<Observe>,
    /// Whether other schedulers are kept from what is promised to gangs, and how; `None`: they are not.
    pub guard: Option<GuardRules>,
}

/// Why the operator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The API server cannot be called.
    #[error("the API server cannot be called: {0}")]
    Client(#[from] kube::Error),
    /// There are no keys to serve ranks with.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// Ranks cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Other schedulers cannot be answered.
    #[error(transparent)]
    Guard(#[from] GuardError),
}

/// Runs until `stop`.
///
/// # Errors
/// [`ServiceError`] when it cannot start. What fails later is tried again.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), ServiceError> {
    let client = Client::try_from(options.client)?;
    let secrets = Api::namespaced(client.clone(), &options.namespace);
    let keys = Arc::new(Keys::ensure(&secrets).await?);
    let (board, shown) = watch::channel(None);
    let (figures, figures_shown) = watch::channel(Vec::new());
    let callers = Callers::new(client.clone());
    let (calls, called) = mpsc::channel(CALLS_MAX);
    let (admitted_in, admitted) = mpsc::channel(CALLS_MAX);
    let services = Services { callers: callers.clone(), board: shown };
    let ended = stop.child_token();
    let listens = serve(options.ranks.listen, &keys, calls, services, ended).await?;
    tracing::info!(%listens, "ranks and gateways are served");
    tokio::spawn(admit::run(called, admitted_in, callers));
    let changed = Arc::new(Notify::new());
    let mut jobs = Vec::new();
    for kind in JobKind::ALL {
        let resource = resource(kind);
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        jobs.push((kind, watch(api, resource, &changed, &stop, |_| {})));
    }
    let ledger = Ledger::default();
    let (of_nodes, of_pods) = (ledger.clone(), ledger.clone());
    let mut published = None;
    if !options.fleet.devices.drivers.is_empty() {
        if has_claims(&client).await? {
            let (of_slices, of_claims) = (ledger.clone(), ledger.clone());
            ledger.open().claims = Claims::new(options.fleet.devices.drivers.clone());
            let slices = watch(Api::all(client.clone()), (), &changed, &stop, move |event| {
                of_slices.open().slice_event(event);
            });
            let claims = watch(Api::all(client.clone()), (), &changed, &stop, move |event| {
                of_claims.open().claim_event(event);
            });
            published = Some((slices, claims));
        } else {
            tracing::warn!(
                "the API server has no {CLAIMS_VERSION}: no devices of drivers are given to gangs"
            );
        }
    }
    let queue = resource_named("Queue");
    let stores = Stores {
        jobs,
        queues: watch(Api::all_with(client.clone(), &queue), queue, &changed, &stop, |_| {}),
        namespaces: watch(Api::all(client.clone()), (), &changed, &stop, |_| {}),
        budgets: watch(Api::all(client.clone()), (), &changed, &stop, |_| {}),
        nodes: watch(Api::all(client.clone()), (), &changed, &stop, move |event| {
            of_nodes.open().node_event(event);
        }),
        pods: watch(Api::all(client.clone()), (), &changed, &stop, move |event| {
            of_pods.open().pod_event(event);
        }),
        published,
        ledger,
    };
    let leadership = Leadership::default();
    let has_listed = Arc::new(AtomicBool::new(false));
    if let Some(observe) = options.observe {
        tokio::spawn(observe::serve(
            observe,
            stores.clone(),
            options.fleet.clone(),
            figures_shown,
            leadership.clone(),
            has_listed.clone(),
            stop.clone(),
        ));
    }
    let reporter =
        Reporter { controller: "drumline".into(), instance: Some(options.lease.identity.clone()) };
    let writer = Writer {
        client: client.clone(),
        leadership: leadership.clone(),
        rules: PodRules {
            ranks_url: options.ranks.url,
            ranks_ca: keys.certificate.clone(),
            ..options.pods
        },
        recorder: Recorder::new(client.clone(), reporter),
        calls: Calls::default(),
        has_claims: stores.published.is_some(),
    };
    let mut guard = None;
    if let Some(rules) = options.guard {
        let (client, namespace) = (client.clone(), options.namespace.clone());
        let (ledger, leadership) = (stores.ledger.clone(), leadership.clone());
        let (listed, changed, stop) = (has_listed.clone(), changed.clone(), stop.child_token());
        let started =
            guard::start(rules, client, namespace, ledger, leadership, listed, changed, stop);
        guard = Some(started.await?);
    }
    let leases = Api::namespaced(client.clone(), &options.namespace);
    let lease = tokio::spawn(lease::run(leases, options.lease, leadership.clone(), stop.clone()));
    if !options.ranks.pod.is_empty() {
        let (pod, leadership) = (options.ranks.pod, leadership.clone());
        tokio::spawn(place::keep(client, options.namespace, pod, leadership, stop.clone()));
    }
    let mut following = Following {
        stores,
        rules: options.fleet,
        writer,
        keys,
        board,
        figures,
        guard,
        admitted,
        has_listed,
    };
    following.run(&leadership, &changed, &stop).await;
    // Handing the lease back lets the next leader start at once.
    let _ = tokio::time::timeout(Duration::from_secs(3), lease).await;
    Ok(())
}

/// What lasts from one term of leadership to the next.
struct Following {
    stores: Stores,
    rules: FleetRules,
    writer: Writer,
    keys: Arc<Keys>,
    board: watch::Sender<Board>,
    figures: watch::Sender<Vec<Figures>>,
    guard: Option<InEffect>,
    admitted: mpsc::Receiver<Admitted>,
    /// Set once every watch has shown all there is.
    has_listed: Arc<AtomicBool>,
}

impl Following {
    /// Waits for leadership, leads, and starts from nothing whenever leadership was lost.
    async fn run(&mut self, leadership: &Leadership, changed: &Notify, stop: &CancellationToken) {
        let mut listed = std::pin::pin!(all_listed(self.stores.clone()));
        let mut is_listed = false;
        loop {
            while !(is_listed && leadership.holds()) {
                tokio::select! {
                    () = &mut listed, if !is_listed => {
                        is_listed = true;
                        self.has_listed.store(true, Ordering::Release);
                    }
                    () = tokio::time::sleep(FOLLOW) => {}
                    Some(one) = self.admitted.recv() => {
                        one.call.refuse(Status::unavailable("this operator does not lead"));
                    }
                    () = stop.cancelled() => return,
                }
            }
            tracing::info!("leading");
            // What the last leader wrote may not be shown yet: let the watches settle.
            tokio::time::sleep(FOLLOW).await;
            self.lead(leadership, changed, stop).await;
            self.board.send_replace(None);
            self.figures.send_replace(Vec::new());
            if stop.is_cancelled() {
                return;
            }
            tracing::warn!("not leading any more");
        }
    }

    async fn lead(&mut self, leadership: &Leadership, changed: &Notify, stop: &CancellationToken) {
        let (sender, mut done) = mpsc::unbounded_channel();
        let writer = Writer { leadership: leadership.begin(), ..self.writer.clone() };
        let (stores, rules) = (self.stores.clone(), self.rules.clone());
        let (keys, board, guard) = (self.keys.clone(), self.board.clone(), self.guard.clone());
        let figures = self.figures.clone();
        let mut core = Core::new(stores, rules, writer, keys, board, figures, guard, sender, now());
        let mut look = true;
        let mut look_at = Instant::now();
        // In a large cluster a look takes its time: no more than every other moment is spent on it.
        let mut settle = SETTLE;
        while leadership.holds() {
            if look {
                let began = Instant::now();
                let left = core.pass(now());
                look_at = Instant::now() + left;
                settle = SETTLE.max(began.elapsed());
            }
            look = tokio::select! {
                () = tokio::time::sleep_until(look_at) => true,
                () = changed.notified() => true,
                Some(one) = done.recv() => {
                    core.done(one, now());
                    true
                }
                Some(one) = self.admitted.recv() => core.rank_call(one, now()),
                () = stop.cancelled() => return,
            };
            if look {
                tokio::time::sleep(settle).await;
            }
            while let Ok(one) = done.try_recv() {
                core.done(one, now());
                look = true;
            }
            while let Ok(one) = self.admitted.try_recv() {
                look |= core.rank_call(one, now());
            }
        }
    }
}

async fn all_listed(stores: Stores) {
    // A writer is dropped only when its watch has ended with the whole process.
    for (_, store) in &stores.jobs {
        let _ = store.wait_until_ready().await;
    }
    let _ = stores.queues.wait_until_ready().await;
    let _ = stores.namespaces.wait_until_ready().await;
    let _ = stores.budgets.wait_until_ready().await;
    let _ = stores.nodes.wait_until_ready().await;
    let _ = stores.pods.wait_until_ready().await;
    if let Some((slices, claims)) = &stores.published {
        let _ = slices.wait_until_ready().await;
        let _ = claims.wait_until_ready().await;
    }
}

/// Asks whether the API server has claims and slices of the version that is known here.
async fn has_claims(client: &Client) -> Result<bool, kube::Error> {
    match client.list_api_group_resources(CLAIMS_VERSION).await {
        Ok(all) => Ok(all.resources.iter().any(|resource| resource.name == "resourceslices")),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error),
    }
}

fn watch<K>(
    api: Api<K>,
    kind: K::DynamicType,
    changed: &Arc<Notify>,
    stop: &CancellationToken,
    mut take_in: impl FnMut(&watcher::Event<K>) + Send + 'static,
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
            .backoff(ResetTimerBackoff::new(Waits(RETRY_MIN), RETRY_MAX * 4))
            .reflect(writer);
        let mut stream = std::pin::pin!(stream);
        while let Some(Some(event)) = stop.run_until_cancelled(stream.next()).await {
            match event {
                Ok(event) => {
                    take_in(&event);
                    changed.notify_one();
                }
                Err(error) => tracing::warn!(%error, "a watch was cut off; it starts again"),
            }
        }
    });
    store
}

pub(crate) fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Timestamp(u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX))
}

/// Returns the way to the API server: in a pod its service account, elsewhere the user's kubeconfig.
///
/// # Errors
/// When neither is there.
pub async fn config_here() -> Result<kube::Config, ServiceError> {
    Ok(kube::Config::infer().await.map_err(kube::Error::InferConfig)?)
}

impl Options {
    /// Returns what an operator needs where it runs: in a pod its service account, elsewhere the
    /// user's kubeconfig.
    ///
    /// # Errors
    /// When neither is there.
    pub async fn here(namespace: String, identity: String) -> Result<Self, ServiceError> {
        let client = config_here().await?;
        Ok(Self {
            client,
            lease: LeaseRules { identity, duration: Duration::from_secs(15) },
            fleet: FleetRules::default(),
            pods: PodRules::default(),
            ranks: RankRules {
                listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, RANKS_PORT)),
                url: url(&namespace),
                pod: String::new(),
            },
            namespace,
            observe: None,
            guard: None,
        })
    }

    /// Sets the extended resources that are GPUs.
    #[must_use]
    pub fn gpu_resources(mut self, gpus: Vec<GpuResource>) -> Self {
        self.fleet.devices.gpus = gpus;
        self
    }

    /// Sets the processor time of one CPU device, in thousandths of a core.
    #[must_use]
    pub fn cpu_device_milli(mut self, milli: u64) -> Self {
        self.fleet.devices.cpu_milli = milli.max(1);
        self.pods.cpu_device_milli = milli.max(1);
        self
    }
}
