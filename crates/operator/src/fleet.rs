//! Nodes and pods of the API server, as the decision core sees them.

use std::collections::BTreeMap;

use drumline_cluster::{Device, Domain, External, Health, Node, Taint};
use drumline_spec::{DeviceKind, WHOLE_DEVICE};
use drumline_types::{Attempt, Bytes, DeviceId, JobId, NodeName};
use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};

use crate::gang::Member;
use crate::quantity::milli;

/// How nodes are read.
#[derive(Debug, Clone)]
pub struct FleetRules {
    /// The extended resource that is one GPU.
    pub gpu_resource: String,
    /// Processor time of one CPU device, in thousandths of a core.
    pub cpu_device_milli: u64,
    /// Levels of the topology and the node labels that name their domains, outermost first. A node
    /// that lacks one of the labels has no known place.
    pub topology: Vec<(String, String)>,
    /// Keys of taints that every gang tolerates.
    pub tolerated: Vec<String>,
}

impl Default for FleetRules {
    fn default() -> Self {
        Self {
            gpu_resource: "nvidia.com/gpu".to_owned(),
            cpu_device_milli: 1000,
            topology: vec![("zone".to_owned(), "topology.kubernetes.io/zone".to_owned())],
            tolerated: vec!["nvidia.com/gpu".to_owned()],
        }
    }
}

/// The fleet at one moment.
#[derive(Debug, Clone, Default)]
pub struct Fleet {
    /// The nodes, with what pods of others use of them.
    pub nodes: Vec<Node>,
    /// What each gang holds, in rank order.
    pub held: BTreeMap<JobId, (Attempt, Vec<DeviceId>)>,
    /// From the core's name of a node to Kubernetes', which may have dots.
    names: BTreeMap<NodeName, String>,
}

/// What the ranks of each gang hold.
type Ranks = BTreeMap<JobId, (Attempt, Vec<(u32, DeviceId)>)>;

/// What one node's pods take.
#[derive(Debug, Clone, Default)]
struct Taken {
    gpus: u64,
    cpu_milli: u64,
    memory: u64,
    ours: Vec<(JobId, Attempt, u32, DeviceKind)>,
}

/// Keeps apart what GPU and CPU ranks hold of a node that is gone.
const APART: u32 = 1 << 16;

/// A rank that holds a device of a node: seen on the API server, or assumed until it is.
#[derive(Debug, Clone)]
pub struct Held {
    /// The job.
    pub job: JobId,
    /// Its attempt.
    pub attempt: Attempt,
    /// The rank.
    pub rank: u32,
    /// What it holds.
    pub device: DeviceKind,
    /// Kubernetes' name of the node.
    pub node: String,
}

impl Fleet {
    /// Reads every node, what gangs hold, and what all other pods take.
    #[must_use]
    pub fn build<'a>(
        rules: &FleetRules,
        nodes: impl IntoIterator<Item = &'a KubeNode>,
        held: &[Held],
        others: impl IntoIterator<Item = &'a Pod>,
    ) -> Self {
        let mut taken: BTreeMap<&str, Taken> = BTreeMap::new();
        for rank in held {
            let entry = (rank.job.clone(), rank.attempt, rank.rank, rank.device);
            taken.entry(&rank.node).or_default().ours.push(entry);
        }
        for pod in others {
            let Some(node) = occupied(pod) else { continue };
            let taken = taken.entry(node).or_default();
            taken.gpus += requested(pod, &rules.gpu_resource).div_ceil(1000);
            taken.cpu_milli += requested(pod, "cpu");
            taken.memory += requested(pod, "memory").div_ceil(1000);
        }
        let mut fleet = Self::default();
        let mut ranks = Ranks::new();
        for node in nodes {
            let Some(name) = node.metadata.name.as_deref() else { continue };
            let alias = alias(name);
            let mut taken = taken.remove(name).unwrap_or_default();
            taken.ours.sort();
            fleet.names.insert(alias.clone(), name.to_owned());
            let read = read(rules, node, alias, &taken);
            give_out(&read, &taken, &mut ranks);
            fleet.nodes.push(read);
        }
        // What is held of nodes that are gone is held all the same.
        for (name, taken) in taken {
            let gone = Node::new(alias(name), Vec::new());
            give_out(&gone, &taken, &mut ranks);
        }
        for (job, (attempt, mut devices)) in ranks {
            devices.sort();
            let devices = devices.into_iter().map(|(_, device)| device).collect();
            fleet.held.insert(job, (attempt, devices));
        }
        fleet
    }

    /// Returns Kubernetes' name of a node.
    #[must_use]
    pub fn node_name(&self, alias: &NodeName) -> Option<&str> {
        self.names.get(alias).map(String::as_str)
    }
}

/// Reads one node: GPUs first, then CPU devices; the last of each kind are what others use.
fn read(rules: &FleetRules, node: &KubeNode, alias: NodeName, taken: &Taken) -> Node {
    let labels = node.metadata.labels.clone().unwrap_or_default();
    let gpu_model = labels.get("nvidia.com/gpu.product").cloned().unwrap_or_default();
    let ours = |kind| taken.ours.iter().filter(|held| held.3 == kind).count() as u64;
    let gpus = allocatable(node, &rules.gpu_resource).unwrap_or(0) / 1000;
    let cpu_milli = allocatable(node, "cpu").unwrap_or(0);
    let device_milli = rules.cpu_device_milli.max(1);
    let cpus = cpu_milli / device_milli;
    let (gpus_ours, cpus_ours) = (ours(DeviceKind::Gpu), ours(DeviceKind::Cpu));
    let mut out = Node::new(
        alias,
        devices(DeviceKind::Gpu, gpus, gpus_ours, &gpu_model)
            .chain(devices(DeviceKind::Cpu, cpus, cpus_ours, "cpu"))
            .collect(),
    );
    let last = |end: u64, count: u64| end.saturating_sub(count)..end;
    let gpus_end = gpus.max(gpus_ours);
    let cpus_end = gpus_end + cpus.max(cpus_ours);
    let cpus_others = taken.cpu_milli.div_ceil(device_milli).min(cpus);
    out.external = External {
        cpu_milli: taken.cpu_milli,
        memory: Bytes(taken.memory),
        devices: last(gpus_end, taken.gpus.min(gpus_end))
            .chain(last(cpus_end, cpus_others))
            .filter_map(|index| Some((u32::try_from(index).ok()?, WHOLE_DEVICE)))
            .collect(),
    };
    let place = |(level, label): &(String, String)| {
        Some(Domain { level: level.clone(), name: labels.get(label)?.clone() })
    };
    let topology: Option<Vec<Domain>> = rules.topology.iter().map(place).collect();
    out.topology = topology.unwrap_or_default();
    out.ready = is_ready(node);
    out.cordoned = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    out.taints = taints(rules, node);
    out.cpu_milli = cpu_milli;
    out.memory = Bytes(allocatable(node, "memory").unwrap_or(0) / 1000);
    out.labels = labels;
    out
}

/// Gives the node's devices to the gangs that hold some, in order of their names and ranks.
fn give_out(node: &Node, taken: &Taken, ranks: &mut Ranks) {
    let of = |kind| {
        let known = (0u32..).zip(&node.devices).filter(move |(_, device)| device.kind == kind);
        // A gang holds what it holds, whatever the node offers by now.
        let beyond = node.devices.len() as u32 + if kind == DeviceKind::Gpu { 0 } else { APART };
        known.map(|(index, _)| index).chain(beyond..)
    };
    let (mut gpus, mut cpus) = (of(DeviceKind::Gpu), of(DeviceKind::Cpu));
    for (job, attempt, rank, kind) in &taken.ours {
        let index = if *kind == DeviceKind::Gpu { gpus.next() } else { cpus.next() };
        let entry = ranks.entry(job.clone()).or_insert((*attempt, Vec::new()));
        let device = index.map(|index| DeviceId { node: node.name.clone(), index });
        entry.1.extend(device.map(|device| (*rank, device)));
    }
}

/// Returns `count` devices, and those beyond them that are in use all the same.
fn devices(
    kind: DeviceKind,
    count: u64,
    used: u64,
    model: &str,
) -> impl Iterator<Item = Device> + '_ {
    (0..count.max(used)).map(move |index| Device {
        health: if index < count {
            Health::Healthy
        } else {
            Health::Failed("the node does not offer it any more".to_owned())
        },
        ..Device::new(kind, model, Bytes(0))
    })
}

/// Returns what a node offers of a resource, in thousandths.
fn allocatable(node: &KubeNode, resource: &str) -> Option<u64> {
    let all = node.status.as_ref()?.allocatable.as_ref()?;
    milli(&all.get(resource)?.0)
}

/// Returns whether the node's kubelet is heard.
#[must_use]
pub fn is_ready(node: &KubeNode) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

fn taints(rules: &FleetRules, node: &KubeNode) -> Vec<Taint> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    taints
        .into_iter()
        .flatten()
        .filter(|taint| taint.effect != "PreferNoSchedule")
        // Told by the cordon and by the Ready condition already.
        .filter(|taint| {
            !["unschedulable", "not-ready", "unreachable"]
                .iter()
                .any(|word| taint.key == format!("node.kubernetes.io/{word}"))
        })
        .filter(|taint| !rules.tolerated.contains(&taint.key))
        .map(|taint| Taint {
            key: taint.key.clone(),
            value: taint.value.clone().unwrap_or_default(),
        })
        .collect()
}

/// Returns the node that a pod takes resources of, when it does.
#[must_use]
pub fn occupied(pod: &Pod) -> Option<&str> {
    let node = pod.spec.as_ref()?.node_name.as_deref()?;
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    (!matches!(phase, Some("Succeeded" | "Failed"))).then_some(node)
}

/// Returns what a pod asks of a resource, in thousandths: the greater of its containers together
/// and its largest init container, and its overhead.
fn requested(pod: &Pod, resource: &str) -> u64 {
    let Some(spec) = pod.spec.as_ref() else { return 0 };
    let of = |container: &k8s_openapi::api::core::v1::Container| {
        let resources = container.resources.as_ref();
        let named = |all: Option<&BTreeMap<String, _>>| {
            let quantity: &k8s_openapi::apimachinery::pkg::api::resource::Quantity =
                all?.get(resource)?;
            milli(&quantity.0)
        };
        named(resources.and_then(|r| r.requests.as_ref()))
            .or_else(|| named(resources.and_then(|r| r.limits.as_ref())))
            .unwrap_or(0)
    };
    let together: u64 = spec.containers.iter().map(of).sum();
    // An init container that always restarts is a sidecar: it stays beside the others.
    let (sidecars, before): (Vec<_>, Vec<_>) = spec
        .init_containers
        .iter()
        .flatten()
        .partition(|container| container.restart_policy.as_deref() == Some("Always"));
    let sidecars: u64 = sidecars.into_iter().map(of).sum();
    let before = before.into_iter().map(of).max().unwrap_or(0);
    let overhead = spec.overhead.as_ref().and_then(|all| all.get(resource));
    (together + sidecars).max(before + sidecars)
        + overhead.and_then(|quantity| milli(&quantity.0)).unwrap_or(0)
}

/// Returns what the members of gangs hold.
#[must_use]
pub fn held(member: &Member) -> Option<Held> {
    Some(Held {
        job: member.job_id.clone()?,
        attempt: Attempt(member.attempt),
        rank: member.rank,
        device: member.device,
        node: member.holds.clone()?,
    })
}

/// Returns the core's name of a node: Kubernetes' own where it is a DNS label, else its start and
/// a checksum of the whole.
#[must_use]
pub fn alias(name: &str) -> NodeName {
    if let Ok(same) = name.parse() {
        return same;
    }
    // FNV-1a, 64 bits: stable over restarts and releases.
    let sum = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let start: String =
        name.chars().filter(char::is_ascii_alphanumeric).take(40).collect::<String>();
    let text = format!("n{}-{sum:016x}", start.to_ascii_lowercase());
    text.parse().unwrap_or_else(|_| unreachable!("{text} is a DNS label by construction"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, gpus: u32, cpu: &str) -> KubeNode {
        serde_json::from_value(json!({
            "metadata": { "name": name },
            "status": {
                "allocatable": { "cpu": cpu, "nvidia.com/gpu": gpus.to_string() },
                "conditions": [{ "type": "Ready", "status": "True" }],
            },
        }))
        .unwrap()
    }

    fn pod(node: &str, phase: &str, requests: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "x" },
            "spec": { "nodeName": node, "containers": [
                { "name": "a", "resources": { "requests": requests } }] },
            "status": { "phase": phase },
        }))
        .unwrap()
    }

    /// Counts the devices of a kind that neither gangs nor other pods have.
    fn free(fleet: &Fleet, name: &str, kind: DeviceKind) -> usize {
        let node = fleet.nodes.iter().find(|node| node.name == alias(name)).unwrap();
        let held: Vec<u32> = fleet
            .held
            .values()
            .flat_map(|(_, devices)| devices)
            .filter(|device| device.node == node.name)
            .map(|device| device.index)
            .collect();
        (0u32..)
            .zip(&node.devices)
            .filter(|(index, device)| {
                device.kind == kind
                    && !held.contains(index)
                    && !node.external.devices.contains_key(index)
            })
            .count()
    }

    #[test]
    fn what_other_pods_take_is_not_free() {
        let rules = FleetRules::default();
        let nodes = [node("a", 8, "4"), node("b.example.org", 8, "3900m")];
        let others = [
            pod("a", "Running", json!({ "nvidia.com/gpu": "3", "cpu": "1200m" })),
            pod("a", "Succeeded", json!({ "nvidia.com/gpu": "5" })),
            pod("b.example.org", "Pending", json!({ "cpu": "100m" })),
        ];
        let fleet = Fleet::build(&rules, &nodes, &[], &others);
        assert_eq!(free(&fleet, "a", DeviceKind::Gpu), 5);
        assert_eq!(free(&fleet, "a", DeviceKind::Cpu), 2);
        assert_eq!(free(&fleet, "b.example.org", DeviceKind::Cpu), 2);
        assert_eq!(fleet.node_name(&alias("b.example.org")), Some("b.example.org"));
    }

    #[test]
    fn a_gang_holds_its_devices_over_several_nodes() {
        let nodes = [node("a", 2, "0"), node("b", 2, "0")];
        let held: Vec<Held> = [("a", 0), ("a", 1), ("b", 2)]
            .map(|(node, rank)| Held {
                job: "j".parse().unwrap(),
                attempt: Attempt(3),
                rank,
                device: DeviceKind::Gpu,
                node: node.to_owned(),
            })
            .to_vec();
        let fleet = Fleet::build(&FleetRules::default(), &nodes, &held, &[]);
        assert_eq!(fleet.held[&"j".parse().unwrap()].1.len(), 3);
        assert_eq!(free(&fleet, "a", DeviceKind::Gpu), 0);
        assert_eq!(free(&fleet, "b", DeviceKind::Gpu), 1);
    }

    #[test]
    fn taints_and_cordons_keep_gangs_away_and_tolerated_ones_do_not() {
        let mut tainted = node("a", 1, "1");
        tainted.spec = serde_json::from_value(json!({ "unschedulable": true, "taints": [
            { "key": "nvidia.com/gpu", "effect": "NoSchedule" },
            { "key": "team", "value": "x", "effect": "NoSchedule" },
            { "key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule" },
        ]}))
        .unwrap();
        let fleet = Fleet::build(&FleetRules::default(), [&tainted], &[], &[]);
        let node = &fleet.nodes[0];
        assert!(node.cordoned);
        assert_eq!(node.taints.len(), 1);
    }
}
