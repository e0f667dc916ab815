//! What the operator tells of itself and its cluster: probes for the kubelet, metrics for Prometheus.
//!
//! Everything is read from the watches when somebody asks; nothing is counted while work is done.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use drumline_spec::DeviceKind;
use drumline_telemetry::http::{IsReady, Refresh, serve_probed};
use drumline_telemetry::table;
use drumline_types::{JobPhase, Timestamp};
use drumline_web::Keys;
use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};
use prometheus::{GaugeVec, IntGaugeVec, Registry};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::core::Stores;
use crate::crd::status::JobStatus;
use crate::devices::kind;
use crate::dra::Published;
use crate::figures::{self, Figures};
use crate::fleet::{FleetRules, is_ready};
use crate::gang::Member;
use crate::lease::Leadership;

/// Where it is told, and to whom.
#[derive(Debug, Clone)]
pub struct Observe {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Who may read the metrics; `None`: nobody.
    pub keys: Option<Keys>,
}

/// The gauges, all filled from one look at the watches.
#[derive(Clone)]
struct Gauges {
    leading: IntGaugeVec,
    nodes: IntGaugeVec,
    devices: IntGaugeVec,
    allocated: IntGaugeVec,
    node_devices: IntGaugeVec,
    node_allocated: IntGaugeVec,
    jobs: IntGaugeVec,
    pending: IntGaugeVec,
    longest: GaugeVec,
    restarts: IntGaugeVec,
    steps: IntGaugeVec,
    of_ranks: figures::Gauges,
}

impl Gauges {
    fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        table::BUILD_INFO
            .int_gauge(registry)?
            .with_label_values(&[env!("CARGO_PKG_VERSION"), ""])
            .set(1);
        Ok(Self {
            leading: table::OPERATOR_LEADING.int_gauge(registry)?,
            nodes: table::NODES.int_gauge(registry)?,
            devices: table::DEVICES.int_gauge(registry)?,
            allocated: table::DEVICES_ALLOCATED.int_gauge(registry)?,
            node_devices: table::NODE_DEVICES.int_gauge(registry)?,
            node_allocated: table::NODE_DEVICES_ALLOCATED.int_gauge(registry)?,
            jobs: table::JOBS.int_gauge(registry)?,
            pending: table::JOBS_PENDING.int_gauge(registry)?,
            longest: table::PENDING_LONGEST.gauge(registry)?,
            restarts: table::JOB_RESTARTS.int_gauge(registry)?,
            steps: table::JOB_STEP.int_gauge(registry)?,
            of_ranks: figures::Gauges::new(registry)?,
        })
    }

    /// Fills all of them; what is not there any more has no series.
    fn show(
        &self,
        stores: &Stores,
        rules: &FleetRules,
        figures: &[Figures],
        leads: bool,
        now: Timestamp,
    ) {
        // Only who leads hears of ranks.
        self.of_ranks.show(figures);
        self.leading.with_label_values::<&str>(&[]).set(i64::from(leads));
        for gauge in [
            &self.nodes,
            &self.devices,
            &self.allocated,
            &self.node_devices,
            &self.node_allocated,
            &self.jobs,
            &self.pending,
            &self.restarts,
            &self.steps,
        ] {
            gauge.reset();
        }
        self.longest.reset();
        // Of two replicas one tells, so that sums are right.
        if leads {
            let nodes = stores.nodes.state();
            let pods = stores.pods.state();
            let pods = pods.iter().map(AsRef::as_ref);
            let published = |node: &str| stores.ledger.open().claims.on(node);
            self.show_fleet(nodes.iter().map(AsRef::as_ref), pods, rules, &published);
            self.show_jobs(stores, now);
        }
    }

    fn show_fleet<'a>(
        &self,
        nodes: impl Iterator<Item = &'a KubeNode>,
        pods: impl Iterator<Item = &'a Pod>,
        rules: &FleetRules,
        published: &dyn Fn(&str) -> Vec<Published>,
    ) {
        let mut known = BTreeMap::new();
        for node in nodes {
            let Some(name) = node.metadata.name.as_deref() else { continue };
            let phase = if is_ready(node) { "ready" } else { "silent" };
            self.nodes.with_label_values(&[phase]).inc();
            for (kind, count) in offered(node, rules, &published(name)) {
                known.insert((name, kind), ());
                self.devices.with_label_values(&[kind]).add(count);
                self.node_devices.with_label_values(&[name, kind]).set(count);
                self.node_allocated.with_label_values(&[name, kind]).set(0);
                // A kind that nobody holds is told as 0.
                self.allocated.with_label_values(&[kind]).add(0);
            }
        }
        for member in pods.filter_map(Member::read) {
            let Some(node) = member.holds.as_deref() else { continue };
            let kind = member.device.as_str();
            self.allocated.with_label_values(&[kind]).inc();
            if known.contains_key(&(node, kind)) {
                self.node_allocated.with_label_values(&[node, kind]).inc();
            }
        }
    }

    fn show_jobs(&self, stores: &Stores, now: Timestamp) {
        for (kind, store) in &stores.jobs {
            for object in store.state() {
                let status: JobStatus = object
                    .data
                    .get("status")
                    .and_then(|status| serde_json::from_value(status.clone()).ok())
                    .unwrap_or_default();
                let none = JobPhase::Pending.as_str();
                let phase = if status.phase.is_empty() { none } else { status.phase.as_str() };
                self.jobs.with_label_values(&[kind.as_str(), phase]).inc();
                let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
                let name = object.metadata.name.as_deref().unwrap_or_default();
                let job = format!("{namespace}/{name}");
                self.restarts.with_label_values(&[&job]).set(i64::from(status.restarts));
                // An ended run finishes no more steps, and nobody should be alarmed by that.
                if let Some(step) = status.step.filter(|_| phase == JobPhase::Running.as_str()) {
                    self.steps
                        .with_label_values(&[&job])
                        .set(i64::try_from(step).unwrap_or(i64::MAX));
                }
                if phase != none {
                    continue;
                }
                self.pending.with_label_values(&[&status.reason]).inc();
                let created = object.metadata.creation_timestamp.as_ref();
                let created = created.and_then(|time| u64::try_from(time.0.as_millisecond()).ok());
                let since = status.launched_ms.max(created.unwrap_or(now.0));
                let seconds = now.0.saturating_sub(since) as f64 / 1000.0;
                let longest = self.longest.with_label_values(&[namespace, &status.reason]);
                longest.set(longest.get().max(seconds));
            }
        }
    }
}

/// Returns the devices that a node offers, by kind.
fn offered(
    node: &KubeNode,
    rules: &FleetRules,
    published: &[Published],
) -> [(&'static str, i64); 2] {
    let offers = rules.devices.offers(node, published);
    [DeviceKind::Gpu, DeviceKind::Cpu].map(|of| {
        let of_kind = offers.iter().filter(|offer| kind(&offer.resource) == of);
        let count = of_kind.fold(0, |count: u64, offer| count.saturating_add(offer.count));
        (of.as_str(), i64::try_from(count).unwrap_or(i64::MAX))
    })
}

/// Serves probes and metrics until `stop`. Failing to is told and stops nothing else.
pub(crate) async fn serve(
    observe: Observe,
    stores: Stores,
    rules: FleetRules,
    figures: watch::Receiver<Vec<Figures>>,
    leadership: Leadership,
    has_listed: Arc<AtomicBool>,
    stop: CancellationToken,
) {
    let registry = Registry::new();
    let gauges = match Gauges::new(&registry) {
        Ok(gauges) => gauges,
        Err(error) => return tracing::error!(%error, "a metric cannot be registered"),
    };
    let refresh: Refresh = Arc::new(move || {
        let figures = figures.borrow().clone();
        gauges.show(&stores, &rules, &figures, leadership.holds(), crate::service::now());
    });
    // A follower is ready too: it has seen everything and waits for the lease.
    let ready: IsReady = Arc::new(move || has_listed.load(Ordering::Acquire));
    let listener = match TcpListener::bind(observe.listen).await {
        Ok(listener) => listener,
        Err(error) => {
            return tracing::error!(%error, address = %observe.listen, "cannot listen for probes");
        }
    };
    let served = serve_probed(listener, registry, observe.keys, Some(refresh), ready, stop).await;
    if let Err(error) = served {
        tracing::error!(%error, "probes and metrics are not served any more");
    }
}
