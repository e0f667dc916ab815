//! Nodes and pods of the API server, as the decision core sees them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drumline_cluster::{Device, Domain, External, Health, Node, Taint, split_link};
use drumline_spec::{DeviceKind, WHOLE_DEVICE};
use drumline_types::{Attempt, Bytes, DeviceId, JobId, NodeName};
use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};

use crate::ask::Ask;
use crate::devices::{CPU, DeviceRules, Offer, Sort, kind};
use crate::dra::Published;
use crate::gang::Member;
use crate::quantity::milli;

/// How nodes are read.
#[derive(Debug, Clone)]
pub struct FleetRules {
    /// Which resources are devices.
    pub devices: DeviceRules,
    /// Levels of the topology and the node labels that name their domains, outermost first. A node
    /// that lacks one of the labels has no known place.
    pub topology: Vec<LevelRule>,
    /// Keys of taints that every gang tolerates.
    pub tolerated: Vec<String>,
}

/// How one level of the topology is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelRule {
    /// The level, such as `rack`.
    pub level: String,
    /// The node label that names its domains.
    pub label: String,
    /// What a device can send to another in one domain of it, in megabytes per second; 0: not known.
    pub link_mb_per_s: u32,
}

impl LevelRule {
    /// Reads `LEVEL=LABEL` or `LEVEL=LABEL@GB/S`, such as `rack=example.org/rack@50`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (pair, link_mb_per_s) = split_link(text)?;
        match pair.split_once('=') {
            Some((level, label)) if !level.is_empty() && !label.is_empty() => {
                Ok(Self { level: level.to_owned(), label: label.to_owned(), link_mb_per_s })
            }
            _ => Err("LEVEL=LABEL or LEVEL=LABEL@GB/S is wanted, such as rack=example.org/rack@50"
                .to_owned()),
        }
    }
}

impl Default for FleetRules {
    fn default() -> Self {
        Self {
            devices: DeviceRules::default(),
            topology: vec![LevelRule {
                level: "zone".to_owned(),
                label: "topology.kubernetes.io/zone".to_owned(),
                link_mb_per_s: 0,
            }],
            tolerated: vec!["nvidia.com/gpu".to_owned()],
        }
    }
}

/// What the decision core is told of the fleet, kept node by node: only what has changed is read again.
#[derive(Debug, Default)]
pub struct Fleet {
    layout: Layout,
    /// From the core's name of a node to Kubernetes', which may have dots.
    names: BTreeMap<NodeName, String>,
    /// What the gangs hold of each node, as it was last given out.
    on_node: BTreeMap<String, Vec<(JobId, DeviceId)>>,
    /// Who holds each device of each job: rank and attempt.
    ranks: BTreeMap<JobId, BTreeMap<DeviceId, (u32, Attempt)>>,
    /// What each gang holds, in rank order.
    held: BTreeMap<JobId, (Attempt, Arc<[DeviceId]>)>,
}

/// What has become of one node.
#[derive(Debug, Clone)]
pub struct NodeNow {
    /// Kubernetes' name of it.
    pub name: String,
    /// The node; `None`: it is gone.
    pub node: Option<Arc<KubeNode>>,
    /// What ranks of gangs hold of it.
    pub held: Vec<Held>,
    /// What all other pods ask of it.
    pub others: Ask,
    /// What drivers publish for it.
    pub published: Vec<Published>,
}

/// What the ranks of each gang hold of one node.
type Ranks = Vec<(JobId, Attempt, u32, DeviceId)>;

/// A rank's hold on a device of one node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Ours {
    resource: String,
    /// Those that name a slot come first; the others take what is left.
    slot: u32,
    job: JobId,
    attempt: Attempt,
    rank: u32,
}

/// Every node's devices by index. The core is told once what a gang holds, so a device keeps its index
/// for as long as the layout is kept, also while the node does not offer it: what comes later comes
/// after it.
#[derive(Debug, Clone, Default)]
struct Layout(BTreeMap<String, NodeLayout>);

/// The devices of one node.
#[derive(Debug, Clone, Default)]
struct NodeLayout {
    resources: Vec<Known>,
    /// For each index the place of its resource above, and which of its devices it is.
    order: Vec<(usize, u32)>,
}

/// The devices of one resource of a node.
#[derive(Debug, Clone)]
struct Known {
    resource: String,
    /// How many the node offers now.
    count: u32,
    /// What they are, or were when the node last offered them.
    sort: Sort,
    /// Why none of them takes new work.
    problem: Option<String>,
    /// The index of each that there is or was.
    at: Vec<u32>,
}

/// No node has more devices of one resource.
const SLOTS_MAX: u32 = 1 << 14;

/// A rank that holds a device of a node: seen on the API server, or assumed until it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The job.
    pub job: JobId,
    /// Its attempt.
    pub attempt: Attempt,
    /// The rank.
    pub rank: u32,
    /// What it holds.
    pub device: DeviceKind,
    /// The resource that it asks for, where it is no CPU device; `None`: the first that is a GPU.
    pub resource: Option<String>,
    /// Kubernetes' name of the node.
    pub node: String,
    /// Which of the node's devices of that resource the plan gave it; which one it is in truth is the
    /// kubelet's choice.
    pub slot: Option<u32>,
}

impl Fleet {
    /// Reads one node anew. Returns it as the core sees it; an error is the name of one that is gone.
    ///
    /// # Errors
    /// The core's name of the node, when it is gone. What is held of it is held all the same.
    pub fn update(&mut self, rules: &FleetRules, now: &NodeNow) -> Result<Node, NodeName> {
        let name = now.name.as_str();
        let alias = alias(name);
        let ours: Vec<Ours> = now.held.iter().map(|held| Ours::of(&rules.devices, held)).collect();
        let mut ranks = Ranks::new();
        let node = match &now.node {
            Some(node) => {
                self.names.insert(alias.clone(), name.to_owned());
                Ok(read(rules, &mut self.layout, node, alias, &ours, now, &mut ranks))
            }
            None => {
                let slots = Slots::of(&ours);
                slots.give_out(&alias, self.layout.see(name, &[], &slots), &mut ranks);
                self.names.remove(&alias);
                Err(alias)
            }
        };
        self.give_out(name, ranks);
        node
    }

    /// Takes in what gangs hold of one node.
    fn give_out(&mut self, node: &str, ranks: Ranks) {
        let mut jobs = BTreeSet::new();
        for (job, device) in self.on_node.remove(node).unwrap_or_default() {
            if let Some(theirs) = self.ranks.get_mut(&job) {
                theirs.remove(&device);
            }
            jobs.insert(job);
        }
        let mut there = Vec::new();
        for (job, attempt, rank, device) in ranks {
            let theirs = self.ranks.entry(job.clone()).or_default();
            theirs.insert(device.clone(), (rank, attempt));
            there.push((job.clone(), device));
            jobs.insert(job);
        }
        if !there.is_empty() {
            self.on_node.insert(node.to_owned(), there);
        }
        for job in jobs {
            let theirs = self.ranks.get(&job).filter(|theirs| !theirs.is_empty());
            let Some(theirs) = theirs else {
                self.ranks.remove(&job);
                self.held.remove(&job);
                continue;
            };
            let mut devices: Vec<(u32, &DeviceId)> =
                theirs.iter().map(|(device, (rank, _))| (*rank, device)).collect();
            devices.sort();
            let newest = theirs.values().map(|(_, attempt)| *attempt).max();
            let devices = devices.into_iter().map(|(_, device)| device.clone()).collect();
            self.held.insert(job, (newest.unwrap_or(Attempt(0)), devices));
        }
    }

    /// Returns what each gang holds, in rank order.
    #[must_use]
    pub fn held(&self) -> &BTreeMap<JobId, (Attempt, Arc<[DeviceId]>)> {
        &self.held
    }

    /// Returns which job and rank hold a device.
    #[must_use]
    pub fn holder(&self, device: &DeviceId) -> Option<(&JobId, u32)> {
        self.ranks.iter().find_map(|(job, devices)| Some((job, devices.get(device)?.0)))
    }

    /// Returns Kubernetes' name of a node.
    #[must_use]
    pub fn node_name(&self, alias: &NodeName) -> Option<&str> {
        self.names.get(alias).map(String::as_str)
    }

    /// Returns the resource that a device of a node is asked for by, and which of that resource's it is;
    /// `None`: there is no such device.
    #[must_use]
    pub fn place(&self, node: &str, index: u32) -> Option<(&str, u32)> {
        self.layout.place(node, index)
    }
}

impl Ours {
    fn of(rules: &DeviceRules, held: &Held) -> Self {
        let resource = match (held.device, &held.resource) {
            (DeviceKind::Cpu, _) => CPU,
            (DeviceKind::Gpu, Some(resource)) => resource,
            (DeviceKind::Gpu, None) => rules.first(),
        };
        Self {
            resource: resource.to_owned(),
            slot: held.slot.filter(|slot| *slot < SLOTS_MAX).unwrap_or(u32::MAX),
            job: held.job.clone(),
            attempt: held.attempt,
            rank: held.rank,
        }
    }
}

impl Layout {
    /// Takes in what a node offers and what gangs hold of it.
    fn see(&mut self, node: &str, offers: &[Offer], held: &Slots<'_>) -> &NodeLayout {
        let of_node = self.0.entry(node.to_owned()).or_default();
        of_node.resources.iter_mut().for_each(|known| known.count = 0);
        for offer in offers {
            let count = u32::try_from(offer.count).unwrap_or(u32::MAX).min(SLOTS_MAX);
            let known = of_node.reach(&offer.resource, count);
            known.count = count;
            known.sort = offer.sort.clone();
            known.problem.clone_from(&offer.problem);
        }
        for (resource, end) in &held.ends {
            of_node.reach(resource, *end);
        }
        of_node.trim(held);
        of_node
    }

    fn place(&self, node: &str, index: u32) -> Option<(&str, u32)> {
        let of_node = self.0.get(node)?;
        let (resource, slot) = of_node.order.get(index as usize)?;
        Some((of_node.resources.get(*resource)?.resource.as_str(), *slot))
    }
}

impl NodeLayout {
    /// Returns a resource with at least so many slots.
    fn reach(&mut self, resource: &str, slots: u32) -> &mut Known {
        let found = self.resources.iter().position(|known| known.resource == resource);
        let at = found.unwrap_or_else(|| {
            self.resources.push(Known {
                resource: resource.to_owned(),
                count: 0,
                sort: Sort { model: resource.to_owned(), memory: Bytes(0) },
                problem: None,
                at: Vec::new(),
            });
            self.resources.len() - 1
        });
        let known = &mut self.resources[at];
        for slot in known.at.len() as u32..slots {
            known.at.push(self.order.len() as u32);
            self.order.push((at, slot));
        }
        known
    }

    /// Forgets what is neither offered nor held, where nothing comes after it.
    fn trim(&mut self, held: &Slots<'_>) {
        while let Some(&(at, slot)) = self.order.last() {
            let known = &mut self.resources[at];
            if slot < known.count || held.taken.contains(&(known.resource.as_str(), slot)) {
                break;
            }
            known.at.pop();
            self.order.pop();
        }
    }

    fn index(&self, resource: &str, slot: u32) -> Option<u32> {
        let known = self.resources.iter().find(|known| known.resource == resource)?;
        known.at.get(slot as usize).copied()
    }

    /// Returns the devices by index.
    fn devices(&self) -> Vec<Device> {
        let device = |(at, slot): &(usize, u32)| {
            let known = &self.resources[*at];
            let health = match &known.problem {
                _ if *slot >= known.count => {
                    Health::Failed("the node does not offer it any more".to_owned())
                }
                Some(problem) => Health::Failed(problem.clone()),
                None => Health::Healthy,
            };
            Device {
                health,
                ..Device::new(kind(&known.resource), known.sort.model.as_str(), known.sort.memory)
            }
        };
        self.order.iter().map(device).collect()
    }
}

/// The slots that gangs hold of one node, each named once.
struct Slots<'a> {
    held: Vec<(&'a Ours, u32)>,
    taken: BTreeSet<(&'a str, u32)>,
    /// One more than the greatest slot of each resource that is held.
    ends: BTreeMap<&'a str, u32>,
}

impl<'a> Slots<'a> {
    fn of(ours: &'a [Ours]) -> Self {
        let mut sorted: Vec<&Ours> = ours.iter().collect();
        sorted.sort();
        let mut slots = Self { held: Vec::new(), taken: BTreeSet::new(), ends: BTreeMap::new() };
        for one in sorted {
            let name = one.resource.as_str();
            // Pods that name no slot, or one that another has, get the first that is free.
            let free = |slot: &u32| !slots.taken.contains(&(name, *slot));
            let named = Some(one.slot).filter(|slot| *slot < SLOTS_MAX).filter(free);
            let Some(slot) = named.or_else(|| (0..SLOTS_MAX).find(free)) else { continue };
            slots.taken.insert((name, slot));
            let end = slots.ends.entry(name).or_default();
            *end = (*end).max(slot + 1);
            slots.held.push((one, slot));
        }
        slots
    }

    fn count(&self, resource: &str) -> u64 {
        self.held.iter().filter(|(one, _)| one.resource == resource).count() as u64
    }

    /// Gives the node's devices to the gangs that hold them.
    fn give_out(&self, node: &NodeName, layout: &NodeLayout, ranks: &mut Ranks) {
        for (one, slot) in &self.held {
            let Some(index) = layout.index(&one.resource, *slot) else { continue };
            let device = DeviceId { node: node.clone(), index };
            ranks.push((one.job.clone(), one.attempt, one.rank, device));
        }
    }
}

/// Reads one node: its GPUs by resource, then CPU devices; of what no gang holds, the last of each
/// resource are what others use.
fn read(
    rules: &FleetRules,
    layout: &mut Layout,
    node: &KubeNode,
    alias: NodeName,
    ours: &[Ours],
    now: &NodeNow,
    ranks: &mut Ranks,
) -> Node {
    let taken = &now.others;
    let labels = node.metadata.labels.clone().unwrap_or_default();
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let slots = Slots::of(ours);
    let layout = layout.see(name, &rules.devices.offers(node, &now.published), &slots);
    slots.give_out(&alias, layout, ranks);
    let mut used = BTreeMap::new();
    for known in &layout.resources {
        let resource = known.resource.as_str();
        let others = rules.devices.taken(resource, taken.get(resource));
        let room = u64::from(known.count).saturating_sub(slots.count(resource));
        let there = (0..known.count).zip(&known.at).rev();
        let free = there.filter(|(slot, _)| !slots.taken.contains(&(resource, *slot)));
        let theirs = free.take(others.min(room) as usize);
        used.extend(theirs.map(|(_, index)| (*index, WHOLE_DEVICE)));
    }
    let mut out = Node::new(alias, layout.devices());
    out.external = External {
        cpu_milli: taken.get("cpu"),
        memory: Bytes(taken.get("memory").div_ceil(1000)),
        devices: used,
    };
    let place = |rule: &LevelRule| {
        let name = labels.get(&rule.label)?;
        Some(Domain::new(rule.level.clone(), name.clone()).linked(rule.link_mb_per_s))
    };
    let topology: Option<Vec<Domain>> = rules.topology.iter().map(place).collect();
    out.topology = topology.unwrap_or_default();
    out.ready = is_ready(node);
    out.cordoned = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    out.taints = taints(rules, node);
    out.cpu_milli = allocatable(node, "cpu").unwrap_or(0);
    out.memory = Bytes(allocatable(node, "memory").unwrap_or(0) / 1000);
    out.labels = labels;
    out
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

/// Returns what the members of gangs hold.
#[must_use]
pub fn held(member: &Member) -> Option<Held> {
    Some(Held {
        job: member.job_id.clone()?,
        attempt: Attempt(member.attempt),
        rank: member.rank,
        device: member.device,
        resource: member.resource.clone(),
        node: member.holds.clone()?,
        slot: member.slot,
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

    /// Reads a node with what gangs and other pods have of it.
    fn update(fleet: &mut Fleet, node: &KubeNode, held: &[Held], others: &[Pod]) -> Node {
        let name = node.metadata.name.clone().unwrap();
        let mut asks = Ask::default();
        for pod in others.iter().filter(|pod| occupied(pod) == Some(&name)) {
            asks.add(&Ask::of(pod));
        }
        let held = held.iter().filter(|held| held.node == name).cloned().collect();
        let now = NodeNow {
            name,
            node: Some(Arc::new(node.clone())),
            held,
            others: asks,
            published: Vec::new(),
        };
        fleet.update(&FleetRules::default(), &now).unwrap()
    }

    /// Counts the devices of a kind that neither gangs nor other pods have.
    fn free(fleet: &Fleet, node: &Node, kind: DeviceKind) -> usize {
        let held: Vec<u32> = fleet
            .held
            .values()
            .flat_map(|(_, devices)| devices.iter())
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
        let mut fleet = Fleet::default();
        let others = [
            pod("a", "Running", json!({ "nvidia.com/gpu": "3", "cpu": "1200m" })),
            pod("a", "Succeeded", json!({ "nvidia.com/gpu": "5" })),
            pod("b.example.org", "Pending", json!({ "cpu": "100m" })),
        ];
        let a = update(&mut fleet, &node("a", 8, "4"), &[], &others);
        let b = update(&mut fleet, &node("b.example.org", 8, "3900m"), &[], &others);
        assert_eq!(free(&fleet, &a, DeviceKind::Gpu), 5);
        assert_eq!(free(&fleet, &a, DeviceKind::Cpu), 2);
        assert_eq!(free(&fleet, &b, DeviceKind::Cpu), 2);
        assert_eq!(fleet.node_name(&alias("b.example.org")), Some("b.example.org"));
    }

    #[test]
    fn a_gang_holds_its_devices_over_several_nodes() {
        let mut fleet = Fleet::default();
        let held: Vec<Held> = [("a", 0), ("a", 1), ("b", 2)]
            .map(|(node, rank)| Held {
                job: "j".parse().unwrap(),
                attempt: Attempt(3),
                rank,
                device: DeviceKind::Gpu,
                resource: None,
                node: node.to_owned(),
                slot: None,
            })
            .to_vec();
        let job: JobId = "j".parse().unwrap();
        let a = update(&mut fleet, &node("a", 2, "0"), &held, &[]);
        let b = update(&mut fleet, &node("b", 2, "0"), &held, &[]);
        let places = |fleet: &Fleet| -> Vec<String> {
            let devices = fleet.held.get(&job).map(|(_, devices)| devices.to_vec());
            devices.unwrap_or_default().iter().map(ToString::to_string).collect()
        };
        assert_eq!(places(&fleet), ["a/0", "a/1", "b/0"]);
        assert_eq!(free(&fleet, &a, DeviceKind::Gpu), 0);
        assert_eq!(free(&fleet, &b, DeviceKind::Gpu), 1);
        // A node that is gone is held all the same, until the pods are gone too.
        let gone = NodeNow {
            name: "b".to_owned(),
            node: None,
            held: held[2..].to_vec(),
            others: Ask::default(),
            published: Vec::new(),
        };
        assert!(fleet.update(&FleetRules::default(), &gone).is_err());
        assert_eq!(places(&fleet), ["a/0", "a/1", "b/0"]);
        update(&mut fleet, &node("a", 2, "0"), &[], &[]);
        assert_eq!(places(&fleet), ["b/0"]);
        assert!(fleet.update(&FleetRules::default(), &NodeNow { held: vec![], ..gone }).is_err());
        assert!(fleet.held.is_empty() && fleet.ranks.is_empty() && fleet.on_node.is_empty());
    }

    #[test]
    fn a_held_device_keeps_its_place_whatever_the_node_offers() {
        let mut fleet = Fleet::default();
        let mut held = Held {
            job: "j".parse().unwrap(),
            attempt: Attempt(1),
            rank: 0,
            device: DeviceKind::Cpu,
            resource: None,
            node: "a".to_owned(),
            slot: Some(2),
        };
        let job = held.job.clone();
        let mut index = |held: &Held, gpus, others: &[Pod]| {
            let held = std::slice::from_ref(held);
            let node = update(&mut fleet, &node("a", gpus, "4"), held, others);
            let device = fleet.held[&job].1[0].index;
            assert_eq!(node.devices[device as usize].kind, held[0].device);
            assert!(!node.external.devices.contains_key(&device), "given away twice");
            device
        };
        assert_eq!(index(&held, 2, &[]), 4);
        // The device plugin restarts, and others fill the rest of the node.
        assert_eq!(index(&held, 0, &[]), 4);
        let others = [pod("a", "Running", json!({ "cpu": "3" }))];
        assert_eq!(index(&held, 2, &others), 4);
        (held.device, held.slot) = (DeviceKind::Gpu, Some(1));
        assert_eq!(index(&held, 0, &others), 1);
        assert_eq!(fleet.place("a", 4), Some((CPU, 2)));
        assert_eq!(fleet.place("a", 99), None);
    }

    #[test]
    fn every_resource_of_a_node_is_counted_for_itself() {
        const MIG: &str = "nvidia.com/mig-1g.10gb";
        let mut fleet = Fleet::default();
        let mut mixed = node("a", 2, "4");
        let offered = mixed.status.as_mut().unwrap().allocatable.as_mut().unwrap();
        offered.insert(MIG.to_owned(), serde_json::from_value(json!("3")).unwrap());
        let mut held = Held {
            job: "j".parse().unwrap(),
            attempt: Attempt(1),
            rank: 0,
            device: DeviceKind::Gpu,
            resource: Some(MIG.to_owned()),
            node: "a".to_owned(),
            slot: Some(1),
        };
        let others = [pod("a", "Running", json!({ MIG: "1", "nvidia.com/gpu": "1" }))];
        let read = update(&mut fleet, &mixed, std::slice::from_ref(&held), &others);
        let models: Vec<&str> = read.devices.iter().map(|device| device.model.as_str()).collect();
        let (whole, part) = ("nvidia.com/gpu", "MIG-1g.10gb");
        assert_eq!(models, [whole, whole, part, part, part, "cpu", "cpu", "cpu", "cpu"]);
        // The second instance is the gang's; others have the last of each.
        assert_eq!(fleet.held[&held.job].1[0].index, 3);
        assert_eq!(read.external.devices.keys().copied().collect::<Vec<u32>>(), [1, 4]);
        assert_eq!(fleet.place("a", 3), Some((MIG, 1)));
        assert_eq!(fleet.place("a", 5), Some((CPU, 0)));
        // A pod that was made when there was but one resource holds a whole GPU.
        (held.resource, held.slot) = (None, Some(0));
        let read = update(&mut fleet, &mixed, std::slice::from_ref(&held), &others);
        assert_eq!(fleet.held[&held.job].1[0].index, 0);
        assert_eq!(free(&fleet, &read, DeviceKind::Gpu), 2);
        // The card is not divided any more, and what was held of it is.
        held.resource = Some(MIG.to_owned());
        let read = update(&mut fleet, &node("a", 2, "4"), std::slice::from_ref(&held), &[]);
        assert_eq!(fleet.held[&held.job].1[0].index, 2);
        assert!(read.devices[2..5].iter().all(|device| device.health != Health::Healthy));
        assert_eq!(read.devices[2].model, part);
    }

    #[test]
    fn what_a_node_offers_later_comes_after_what_is_held() {
        let mut fleet = Fleet::default();
        let held = Held {
            job: "j".parse().unwrap(),
            attempt: Attempt(1),
            rank: 0,
            device: DeviceKind::Cpu,
            resource: None,
            node: "a".to_owned(),
            slot: Some(0),
        };
        let kinds = |node: &Node| -> String {
            let letter = |device: &Device| match (device.kind, &device.health) {
                (DeviceKind::Gpu, Health::Healthy) => 'G',
                (DeviceKind::Gpu, _) => 'g',
                (DeviceKind::Cpu, Health::Healthy) => 'C',
                (DeviceKind::Cpu, _) => 'c',
            };
            node.devices.iter().map(letter).collect()
        };
        let held = std::slice::from_ref(&held);
        // The device plugin starts after the gang, and its devices become more.
        for (gpus, cpu, all) in [
            (0, "2", "CC"),
            (2, "2", "CCGG"),
            (3, "3", "CCGGGC"),
            (1, "3", "CCGggC"),
            (1, "1", "CcG"),
        ] {
            let read = update(&mut fleet, &node("a", gpus, cpu), held, &[]);
            assert_eq!(kinds(&read), all);
            assert_eq!(fleet.held[&held[0].job].1[0].index, 0);
        }
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
        let node = update(&mut Fleet::default(), &tainted, &[], &[]);
        assert!(node.cordoned);
        assert_eq!(node.taints.len(), 1);
    }
}
