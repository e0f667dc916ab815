//! One node's agent on Kubernetes: it measures the machine and its devices, and says on the node
//! object whether they are sound. Logs of ranks are the kubelet's, and `kubectl logs` reads them.
//!
//! It starts nothing and holds no device. Which device a pod gets is the kubelet's choice, so one bad
//! device taints the whole node: a gang that is placed there could be given it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use drumline_telemetry::http::{IsReady, serve_probed};
use drumline_telemetry::table;
use drumline_telemetry::{proc, proc::Rates};
use k8s_openapi::api::core::v1::{Node as KubeNode, Taint};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use prometheus::{GaugeVec, IntGaugeVec, Registry};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::observe::Observe;

/// The condition of the node that this agent writes.
pub const CONDITION: &str = "DrumlineDevicesHealthy";
/// The taint that it puts on while a device is bad.
pub const TAINT: &str = "drumline.dev/unhealthy";
/// Between two looks.
const LOOK: Duration = Duration::from_secs(10);
/// The condition is written again after so long, though nothing changed: readers see it is alive.
const HEARTBEAT: Duration = Duration::from_secs(300);

/// One device as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceLook {
    /// Its number on the node.
    pub index: u32,
    /// `gpu`.
    pub kind: &'static str,
    /// What it is.
    pub model: String,
    /// Share in use, 0 to 1; `None`: the driver does not say.
    pub utilization: Option<f64>,
    /// Memory in use, bytes.
    pub memory_used: Option<u64>,
    /// What is wrong with it; `None`: nothing.
    pub problem: Option<String>,
}

/// Looks at the devices. An error says why they could not be read.
pub type LookAtDevices = Box<dyn FnMut() -> Result<Vec<DeviceLook>, String> + Send>;

/// What an agent needs to know.
pub struct NodeOptions {
    /// The way to the API server.
    pub client: kube::Config,
    /// The node that it runs on.
    pub node: String,
    /// Where probes and metrics are served.
    pub observe: Observe,
    /// Whether it taints the node while a device is bad.
    pub taints: bool,
    /// Looks at the devices.
    pub look: LookAtDevices,
}

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The API server cannot be called.
    #[error("the API server cannot be called: {0}")]
    Client(#[from] kube::Error),
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// Probes cannot be served.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
}

/// Runs until `stop`.
///
/// # Errors
/// [`NodeError`] when it cannot start. What fails later is tried again at the next look.
pub async fn run(mut options: NodeOptions, stop: CancellationToken) -> Result<(), NodeError> {
    let nodes: Api<KubeNode> = Api::all(Client::try_from(options.client)?);
    let registry = Registry::new();
    let gauges = Gauges::new(&registry, &options.node)?;
    let has_looked = Arc::new(AtomicBool::new(false));
    let ready: IsReady = {
        let has_looked = has_looked.clone();
        Arc::new(move || has_looked.load(Ordering::Acquire))
    };
    let address = options.observe.listen;
    let listener =
        TcpListener::bind(address).await.map_err(|source| NodeError::Listen { address, source })?;
    let served = serve_probed(listener, registry, options.observe.keys, None, ready, stop.clone());
    tokio::spawn(async move {
        if let Err(error) = served.await {
            tracing::error!(%error, "probes and metrics are not served any more");
        }
    });
    let mut rates = Rates::new();
    let mut told: Option<(Verdict, Instant)> = None;
    loop {
        // A driver that hangs holds up this loop, and nobody else: probes are served beside it.
        let looked = tokio::task::block_in_place(|| (options.look)());
        gauges.show(&looked, &mut rates);
        has_looked.store(true, Ordering::Release);
        let verdict = Verdict::of(&looked);
        let is_news =
            told.as_ref().is_none_or(|(last, at)| *last != verdict || at.elapsed() >= HEARTBEAT);
        if is_news {
            match tell(&nodes, &options.node, &verdict, options.taints).await {
                Ok(()) => told = Some((verdict, Instant::now())),
                Err(error) => tracing::warn!(%error, "the node could not be told of; again soon"),
            }
        }
        if stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_none() {
            return Ok(());
        }
    }
}

/// What the node object shall say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn of(looked: &Result<Vec<DeviceLook>, String>) -> Self {
        let devices = match looked {
            Ok(devices) => devices,
            Err(why) => {
                return Self { status: "Unknown", reason: "CannotRead", message: why.clone() };
            }
        };
        let bad: Vec<String> = devices
            .iter()
            .filter_map(|one| Some(format!("device {}: {}", one.index, one.problem.as_ref()?)))
            .collect();
        if bad.is_empty() {
            let message = match devices.len() {
                0 => "there are no devices to watch".to_owned(),
                count => format!("{count} devices are sound"),
            };
            return Self { status: "True", reason: "DevicesSound", message };
        }
        Self { status: "False", reason: "DeviceBad", message: bad.join("; ") }
    }

    fn is_bad(&self) -> bool {
        self.status == "False"
    }
}

/// Writes condition and taint, each only where it is not there already.
async fn tell(
    nodes: &Api<KubeNode>,
    name: &str,
    verdict: &Verdict,
    taints: bool,
) -> Result<(), kube::Error> {
    let node = nodes.get(name).await?;
    let params = PatchParams::default();
    let status = json!({ "status": { "conditions": [condition(&node, verdict)] } });
    nodes.patch_status(name, &params, &Patch::Strategic(&status)).await?;
    if taints && let Some(all) = tainted(&node, verdict.is_bad()) {
        // The list has no keys to merge by: the revision keeps what others write meanwhile.
        let patch = json!({
            "metadata": { "resourceVersion": nodes.get(name).await?.metadata.resource_version },
            "spec": { "taints": all },
        });
        nodes.patch(name, &params, &Patch::Merge(&patch)).await?;
    }
    Ok(())
}

fn condition(node: &KubeNode, verdict: &Verdict) -> Value {
    let now = Timestamp::now().to_string();
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let before = conditions.into_iter().find(|one| one.type_ == CONDITION);
    let since = before
        .filter(|one| one.status == verdict.status)
        .and_then(|one| one.last_transition_time.as_ref())
        .map_or(now.clone(), |time| time.0.to_string());
    json!({
        "type": CONDITION,
        "status": verdict.status,
        "reason": verdict.reason,
        "message": verdict.message,
        "lastHeartbeatTime": now,
        "lastTransitionTime": since,
    })
}

/// Returns the taints as they shall be; `None`: they are.
fn tainted(node: &KubeNode, is_bad: bool) -> Option<Vec<Taint>> {
    let there = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
    let has = there.iter().any(|taint| taint.key == TAINT);
    if has == is_bad {
        return None;
    }
    let mut all: Vec<Taint> = there.into_iter().filter(|taint| taint.key != TAINT).collect();
    if is_bad {
        all.push(Taint {
            key: TAINT.to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        });
    }
    Some(all)
}

struct Gauges {
    node: String,
    cores: GaugeVec,
    memory: GaugeVec,
    info: IntGaugeVec,
    utilization: GaugeVec,
    device_memory: GaugeVec,
    healthy: IntGaugeVec,
    success: IntGaugeVec,
}

impl Gauges {
    fn new(registry: &Registry, node: &str) -> Result<Self, prometheus::Error> {
        let labels = [node, env!("CARGO_PKG_VERSION")];
        table::NODE_INFO.int_gauge(registry)?.with_label_values(&labels).set(1);
        let total = proc::node_memory_total().unwrap_or(0);
        table::NODE_MEMORY_TOTAL.gauge(registry)?.with_label_values(&[node]).set(total as f64);
        Ok(Self {
            node: node.to_owned(),
            cores: table::NODE_CPU_USED.gauge(registry)?,
            memory: table::NODE_MEMORY_USED.gauge(registry)?,
            info: table::DEVICE_INFO.int_gauge(registry)?,
            utilization: table::DEVICE_UTILIZATION.gauge(registry)?,
            device_memory: table::DEVICE_MEMORY_USED.gauge(registry)?,
            healthy: table::DEVICE_HEALTHY.int_gauge(registry)?,
            success: table::COLLECT_SUCCESS.int_gauge(registry)?,
        })
    }

    fn show(&self, looked: &Result<Vec<DeviceLook>, String>, rates: &mut Rates<()>) {
        let node = self.node.as_str();
        let read = |source: &str, is_good: bool| {
            self.success.with_label_values(&[node, source]).set(i64::from(is_good));
        };
        let used = proc::node_memory_used();
        if let Some(bytes) = used {
            self.memory.with_label_values(&[node]).set(bytes as f64);
        }
        let cpu = proc::node_cpu_seconds();
        if let Some(seconds) = cpu {
            let cores = rates.cores((), seconds, Instant::now());
            self.cores.with_label_values(&[node]).set(cores);
        }
        read("proc", used.is_some() && cpu.is_some());
        read("devices", looked.is_ok());
        for device in looked.iter().flatten() {
            let index = device.index.to_string();
            let labels = [node, &index];
            self.info.with_label_values(&[node, &index, device.kind, &device.model]).set(1);
            self.healthy.with_label_values(&labels).set(i64::from(device.problem.is_none()));
            if let Some(share) = device.utilization {
                self.utilization.with_label_values(&labels).set(share);
            }
            if let Some(bytes) = device.memory_used {
                self.device_memory.with_label_values(&labels).set(bytes as f64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, problem: Option<&str>) -> DeviceLook {
        DeviceLook {
            index,
            kind: "gpu",
            model: "test".to_owned(),
            utilization: None,
            memory_used: None,
            problem: problem.map(str::to_owned),
        }
    }

    #[test]
    fn one_bad_device_is_told_with_what_is_wrong() {
        for (looked, status, message) in [
            (Ok(vec![]), "True", "there are no devices to watch"),
            (Ok(vec![device(0, None), device(1, None)]), "True", "2 devices are sound"),
            (
                Ok(vec![device(0, None), device(1, Some("Xid 79: fell off the bus"))]),
                "False",
                "device 1: Xid 79: fell off the bus",
            ),
            (Err("NVML is not there".to_owned()), "Unknown", "NVML is not there"),
        ] {
            let verdict = Verdict::of(&looked);
            assert_eq!((verdict.status, verdict.message.as_str()), (status, message));
        }
    }

    #[test]
    fn only_our_own_taint_comes_and_goes() {
        let node = |keys: &[&str]| -> KubeNode {
            let taints: Vec<_> =
                keys.iter().map(|key| json!({ "key": key, "effect": "NoSchedule" })).collect();
            serde_json::from_value(json!({ "spec": { "taints": taints } })).unwrap()
        };
        let keys = |taints: Option<Vec<Taint>>| -> Option<Vec<String>> {
            Some(taints?.into_iter().map(|taint| taint.key).collect())
        };
        assert_eq!(keys(tainted(&node(&["a"]), false)), None);
        assert_eq!(keys(tainted(&node(&["a", TAINT]), true)), None);
        assert_eq!(
            keys(tainted(&node(&["a"]), true)),
            Some(vec!["a".to_owned(), TAINT.to_owned()])
        );
        assert_eq!(keys(tainted(&node(&["a", TAINT]), false)), Some(vec!["a".to_owned()]));
    }

    #[test]
    fn a_condition_keeps_the_moment_of_its_last_change() {
        let node: KubeNode = serde_json::from_value(json!({ "status": { "conditions": [{
            "type": CONDITION, "status": "True",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }]}}))
        .unwrap();
        let of = |looked| condition(&node, &Verdict::of(&looked))["lastTransitionTime"].clone();
        assert_eq!(of(Ok(vec![])), json!("2026-01-01T00:00:00Z"));
        assert_ne!(of(Ok(vec![device(0, Some("lost"))])), json!("2026-01-01T00:00:00Z"));
    }
}
