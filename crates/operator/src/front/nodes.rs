//! Nodes and queues, read from the API server: what the operator reads too, by the same code.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use drumline_cluster::Health;
use drumline_types::DeviceId;
use drumline_wire::v1;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceSlice};
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::ObjectList;
use kube::runtime::watcher::Event;
use tonic::Status;

use crate::ask::Ask;
use crate::devices::DeviceRules;
use crate::dra::{Claims, Driver};
use crate::fleet::{Fleet, FleetRules, Held, NodeNow, held, is_ready, occupied};
use crate::front::{Front, refused};
use crate::gang::{JOB, Member};
use crate::job::resource_named;
use crate::queues::read_queue;

impl Front {
    /// Returns every node with its devices, and who holds them as far as the user may see pods.
    pub(crate) async fn nodes(&self) -> Result<Vec<v1::NodeView>, Status> {
        let all: Api<Node> = Api::all(self.client.clone());
        let nodes = all.list(&ListParams::default()).await.map_err(|error| refused(&error))?;
        let everyone: Api<Pod> = Api::all(self.client.clone());
        let pods = match everyone.list(&ListParams::default()).await {
            Ok(pods) => pods,
            // Who may see one namespace only is told of that one.
            Err(kube::Error::Api(answer)) if answer.code == 403 => {
                self.pods().list(&ListParams::default()).await.map_err(|error| refused(&error))?
            }
            Err(error) => return Err(refused(&error)),
        };
        let mut by_node: BTreeMap<String, (Vec<Held>, Ask)> = BTreeMap::new();
        let mut names = HashMap::new();
        for pod in &pods {
            let Some(node) = occupied(pod) else { continue };
            let (ours, others) = by_node.entry(node.to_owned()).or_default();
            match Member::read(pod).as_ref().and_then(held) {
                Some(one) => {
                    let name = pod.metadata.labels.as_ref().and_then(|all| all.get(JOB));
                    names.insert(one.job.clone(), name.cloned().unwrap_or_default());
                    ours.push(one);
                }
                None => others.add(&Ask::of(pod)),
            }
        }
        let holders = by_node.values().flat_map(|(held, _)| held);
        let claims = self.published(holders.filter_map(|held| held.resource.as_deref())).await?;
        let mut fleet = Fleet::default();
        let mut views = Vec::new();
        for node in nodes {
            let name = node.metadata.name.clone().unwrap_or_default();
            let (held, mut others) = by_node.remove(&name).unwrap_or_default();
            let published = claims.on(&name);
            for device in published.iter().filter(|device| device.is_claimed) {
                others.put(&device.id, 1000);
            }
            // The operator's own rules are not to be read here.
            let hold = held.iter().filter_map(|held| held.resource.as_deref());
            let devices = DeviceRules::seen(&node, hold);
            let rules = FleetRules { devices, ..FleetRules::default() };
            let node = Arc::new(node);
            let now =
                NodeNow { name: name.clone(), node: Some(node.clone()), held, others, published };
            let Ok(read) = fleet.update(&rules, &now) else { continue };
            let mut view = base(&node);
            for (index, device) in read.devices.iter().enumerate() {
                let index = index as u32;
                let id = DeviceId { node: read.name.clone(), index };
                let holder = fleet.holder(&id);
                let other = read.external.devices.contains_key(&index);
                view.devices.push(v1::DeviceView {
                    index,
                    kind: device.kind.as_str().to_owned(),
                    model: device.model.clone(),
                    memory_bytes: device.memory.0,
                    healthy: device.health == Health::Healthy,
                    job: match holder {
                        Some((job, _)) => {
                            names.get(job).cloned().unwrap_or_else(|| job.to_string())
                        }
                        None if other => "(another scheduler's pod)".to_owned(),
                        None => String::new(),
                    },
                    rank: holder.map(|(_, rank)| rank).unwrap_or_default(),
                    ..v1::DeviceView::default()
                });
            }
            views.push(view);
        }
        Ok(views)
    }

    /// Returns what drivers publish that are of GPUs by their names, or whose devices ranks `hold`; nothing
    /// where the user may not see it, and nobody's claims where they may not see those.
    async fn published(&self, hold: impl Iterator<Item = &str>) -> Result<Claims, Status> {
        let held: BTreeSet<&str> = hold.filter_map(|name| Some(name.split_once(':')?.0)).collect();
        let slices: Api<ResourceSlice> = Api::all(self.client.clone());
        let slices = seen(slices.list(&ListParams::default()).await)?;
        let names: BTreeSet<&str> = slices.iter().map(|slice| slice.spec.driver.as_str()).collect();
        let gpus = names.iter().filter(|name| name.starts_with("gpu.") || held.contains(*name));
        let drivers: Vec<Driver> = gpus.filter_map(|name| Driver::parse(name).ok()).collect();
        let is_none = drivers.is_empty();
        let mut published = Claims::new(drivers);
        if is_none {
            return Ok(published);
        }
        for slice in slices {
            published.slice_event(&Event::Apply(slice));
        }
        let claims: Api<ResourceClaim> = Api::all(self.client.clone());
        for claim in seen(claims.list(&ListParams::default()).await)? {
            published.claim_event(&Event::Apply(claim));
        }
        Ok(published)
    }

    /// Returns every queue, with what the operator has written of it.
    pub(crate) async fn queues(&self) -> Result<Vec<v1::QueueView>, Status> {
        let queues: Api<DynamicObject> =
            Api::all_with(self.client.clone(), &resource_named("Queue"));
        let listed = queues.list(&ListParams::default()).await.map_err(|error| refused(&error))?;
        let mut views = Vec::new();
        for object in &listed {
            let count = |field: &str| {
                let status = object.data.get("status").and_then(|status| status.get(field));
                status.and_then(|count| count.as_u64()).and_then(|count| u32::try_from(count).ok())
            };
            let Ok(specs) = read_queue(object) else { continue };
            for spec in specs {
                views.push(v1::QueueView {
                    name: spec.name.to_string(),
                    parent: spec.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
                    quota: spec.quota.iter().map(|(class, n)| (class.to_string(), *n)).collect(),
                    weight: spec.weight,
                    held: spec.held,
                    pending: count("pending").unwrap_or_default(),
                    running: count("running").unwrap_or_default(),
                    spec_json: object.data.get("spec").map(ToString::to_string).unwrap_or_default(),
                    ..v1::QueueView::default()
                });
            }
        }
        Ok(parents_first(views))
    }
}

/// Returns a list, which is empty where there is no such resource or the user may not see it.
fn seen<K: Clone>(listed: kube::Result<ObjectList<K>>) -> Result<Vec<K>, Status> {
    match listed {
        Ok(all) => Ok(all.items),
        Err(kube::Error::Api(answer)) if matches!(answer.code, 403 | 404) => Ok(Vec::new()),
        Err(error) => Err(refused(&error)),
    }
}

/// Parents before their children; those whose parent is not there come last.
fn parents_first(mut left: Vec<v1::QueueView>) -> Vec<v1::QueueView> {
    let mut sorted: Vec<v1::QueueView> = Vec::new();
    while !left.is_empty() {
        let (ready, later): (Vec<_>, Vec<_>) = left.into_iter().partition(|queue| {
            queue.parent.is_empty() || sorted.iter().any(|above| above.name == queue.parent)
        });
        let is_stuck = ready.is_empty();
        sorted.extend(ready);
        left = later;
        if is_stuck {
            sorted.append(&mut left);
        }
    }
    sorted
}

/// What a node says of itself.
fn base(node: &Node) -> v1::NodeView {
    let status = node.status.as_ref();
    let address = status.and_then(|status| status.addresses.as_ref()).and_then(|all| all.first());
    let offered = Ask::offered(node);
    let cordoned = node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true));
    let problem = status
        .into_iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .find(|condition| condition.type_ == crate::node::CONDITION && condition.status == "False");
    v1::NodeView {
        name: node.metadata.name.clone().unwrap_or_default(),
        phase: if is_ready(node) { "ready" } else { "silent" }.to_owned(),
        address: address.map(|one| one.address.clone()).unwrap_or_default(),
        cores: (offered.get("cpu") / 1000).try_into().unwrap_or(u32::MAX),
        memory_bytes: offered.get("memory") / 1000,
        agent_version: status
            .and_then(|status| status.node_info.as_ref())
            .map(|info| info.kubelet_version.clone())
            .unwrap_or_default(),
        message: match problem {
            Some(condition) => condition.message.clone().unwrap_or_default(),
            None if cordoned => "cordoned".to_owned(),
            None => String::new(),
        },
        ..v1::NodeView::default()
    }
}
