//! Devices that drivers publish in ResourceSlices, and the claims by which pods hold them: Kubernetes'
//! dynamic resource allocation, `resource.k8s.io/v1`.
//!
//! Kept by the ledger, slice by slice and claim by claim. Each device is a resource of its own here,
//! named `DRIVER:POOL/DEVICE`, of which its node has one.

use std::collections::{BTreeMap, BTreeSet};

use drumline_types::Bytes;
use k8s_openapi::api::resource::v1::{Device, ResourceClaim, ResourceSlice};
use kube::runtime::watcher::Event;
use serde_json::{Value, json};

use crate::devices::Sort;
use crate::gang::UID;
use crate::ledger::PodKey;
use crate::quantity::milli;

/// Keeps a claim whose deletion was asked for until no pod uses it; Kubernetes' own name for it.
const PROTECTION: &str = "resource.kubernetes.io/delete-protection";
/// The only request of a claim.
const REQUEST: &str = "device";

/// A driver whose devices are given to gangs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// Its name, such as `gpu.nvidia.com`.
    pub name: String,
    /// The device class that claims name; `None`: that of the driver's name, and for MIG instances
    /// that with `mig` in place of `gpu`, as NVIDIA's driver has them.
    pub class: Option<String>,
}

impl Driver {
    /// Reads `DRIVER` or `DRIVER=CLASS`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_name = |name: &str| {
            let is_label = |label: &str| {
                let is_edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
                let bytes = label.as_bytes();
                is_edge(bytes.first())
                    && is_edge(bytes.last())
                    && bytes
                        .iter()
                        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
            };
            name.len() <= 253 && name.split('.').all(is_label)
        };
        let (name, class) = match text.split_once('=') {
            Some((name, class)) => (name, Some(class)),
            None => (text, None),
        };
        match class.into_iter().chain([name]).find(|one| !is_name(one)) {
            None => Ok(Self { name: name.to_owned(), class: class.map(str::to_owned) }),
            Some(bad) => Err(format!(
                "{bad:?} is no DNS name; DRIVER or DRIVER=CLASS is wanted, such as gpu.nvidia.com"
            )),
        }
    }
}

/// A device of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// `DRIVER:POOL/DEVICE`.
    pub id: String,
    /// What it is.
    pub sort: Sort,
    /// The device class that a claim of it names.
    pub class: String,
    /// The taints that keep new gangs away, in words.
    pub taint: Option<String>,
    /// Whether one of them ends what holds it.
    pub evicts: bool,
    /// Whether a claim has it.
    pub is_claimed: bool,
}

/// Returns whether a resource is a device that is had by a claim.
#[must_use]
pub fn is_claimable(resource: &str) -> bool {
    resource.contains(':')
}

/// Returns driver, pool and device of a name.
fn parts(id: &str) -> Option<(&str, &str, &str)> {
    let (driver, rest) = id.split_once(':')?;
    let (pool, device) = rest.rsplit_once('/')?;
    Some((driver, pool, device))
}

/// A claim as it counts here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Claim {
    uid: String,
    /// What is allocated to it.
    devices: Vec<String>,
    /// The uids of the pods that it is reserved for.
    pods: Vec<String>,
    /// The uid of the job, and of the pod, when it is a gang's.
    ours: Option<(String, String)>,
}

/// A claim that was made for a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankClaim {
    /// Namespace and name, which its pod has too.
    pub key: (String, String),
    /// Its uid.
    pub uid: String,
    /// The uid of the job.
    pub job: String,
    /// The uid of the pod that it was made for.
    pub pod: String,
}

type PoolKey = (String, String);

/// What slices and claims tell.
#[derive(Default)]
pub(crate) struct Claims {
    drivers: Vec<Driver>,
    pools: BTreeMap<PoolKey, BTreeMap<String, ResourceSlice>>,
    pool_of: BTreeMap<String, PoolKey>,
    /// Devices by node and name.
    devices: BTreeMap<String, BTreeMap<String, Published>>,
    /// The node of each device.
    node_of: BTreeMap<String, String>,
    of_pool: BTreeMap<PoolKey, Vec<String>>,
    claims: BTreeMap<PodKey, Claim>,
    claimed: BTreeMap<String, BTreeSet<PodKey>>,
    listing: Option<BTreeSet<PodKey>>,
    listing_slices: Option<BTreeSet<String>>,
}

impl Claims {
    pub(crate) fn new(drivers: Vec<Driver>) -> Self {
        Self { drivers, ..Self::default() }
    }

    /// Takes in what the watch of slices has brought. Returns the nodes whose devices may have changed.
    pub(crate) fn slice_event(&mut self, event: &Event<ResourceSlice>) -> BTreeSet<String> {
        match event {
            Event::Apply(slice) | Event::InitApply(slice) => {
                let Some(name) = slice.metadata.name.clone() else { return BTreeSet::new() };
                if let Some(listing) = &mut self.listing_slices {
                    listing.insert(name.clone());
                }
                let pool = (slice.spec.driver.clone(), slice.spec.pool.name.clone());
                let before = self.pool_of.get(&name).filter(|before| **before != pool).is_some();
                let mut changed = if before { self.forget(&name) } else { BTreeSet::new() };
                self.pool_of.insert(name.clone(), pool.clone());
                self.pools.entry(pool.clone()).or_default().insert(name, slice.clone());
                changed.extend(self.read_pool(&pool));
                changed
            }
            Event::Delete(slice) => match &slice.metadata.name {
                Some(name) => self.forget(name),
                None => BTreeSet::new(),
            },
            Event::Init => {
                self.listing_slices = Some(BTreeSet::new());
                BTreeSet::new()
            }
            Event::InitDone => {
                let listed = self.listing_slices.take().unwrap_or_default();
                let gone = self.pool_of.keys().filter(|name| !listed.contains(*name));
                let gone: Vec<String> = gone.cloned().collect();
                gone.iter().flat_map(|name| self.forget(name)).collect()
            }
        }
    }

    fn forget(&mut self, slice: &str) -> BTreeSet<String> {
        let Some(pool) = self.pool_of.remove(slice) else { return BTreeSet::new() };
        if let Some(slices) = self.pools.get_mut(&pool) {
            slices.remove(slice);
            if slices.is_empty() {
                self.pools.remove(&pool);
            }
        }
        self.read_pool(&pool)
    }

    /// Reads a pool anew: the slices of its newest generation, once all of them are there.
    fn read_pool(&mut self, key: &PoolKey) -> BTreeSet<String> {
        let mut changed = BTreeSet::new();
        for id in self.of_pool.remove(key).unwrap_or_default() {
            if let Some(node) = self.node_of.remove(&id) {
                if let Some(there) = self.devices.get_mut(&node) {
                    there.remove(&id);
                    if there.is_empty() {
                        self.devices.remove(&node);
                    }
                }
                changed.insert(node);
            }
        }
        let Some(driver) = self.drivers.iter().find(|driver| driver.name == key.0) else {
            return changed;
        };
        let slices = self.pools.get(key);
        let all = || slices.into_iter().flat_map(BTreeMap::values).map(|slice| &slice.spec);
        let newest = all().map(|spec| spec.pool.generation).max().unwrap_or(0);
        let whole: Vec<_> = all().filter(|spec| spec.pool.generation == newest).collect();
        let is_complete = whole.first().is_some_and(|spec| {
            usize::try_from(spec.pool.resource_slice_count).is_ok_and(|count| count <= whole.len())
        });
        if !is_complete {
            return changed;
        }
        let mut ids = Vec::new();
        for spec in whole {
            for device in spec.devices.iter().flatten() {
                let node = device.node_name.as_ref().or(spec.node_name.as_ref());
                let (Some(node), Some(mut one)) = (node, published(driver, &key.1, device)) else {
                    continue;
                };
                one.is_claimed = self.claimed.contains_key(&one.id);
                ids.push(one.id.clone());
                self.node_of.insert(one.id.clone(), node.clone());
                self.devices.entry(node.clone()).or_default().insert(one.id.clone(), one);
                changed.insert(node.clone());
            }
        }
        self.of_pool.insert(key.clone(), ids);
        changed
    }

    /// Takes in what the watch of claims has brought. Returns the nodes whose devices it is about.
    pub(crate) fn claim_event(&mut self, event: &Event<ResourceClaim>) -> BTreeSet<String> {
        let key = |claim: &ResourceClaim| -> Option<PodKey> {
            Some((claim.metadata.namespace.clone()?, claim.metadata.name.clone()?))
        };
        match event {
            Event::Apply(claim) | Event::InitApply(claim) => {
                let Some(key) = key(claim) else { return BTreeSet::new() };
                if let Some(listing) = &mut self.listing {
                    listing.insert(key.clone());
                }
                self.put(key, Some(read(claim)))
            }
            Event::Delete(claim) => key(claim).map(|key| self.put(key, None)).unwrap_or_default(),
            Event::Init => {
                self.listing = Some(BTreeSet::new());
                BTreeSet::new()
            }
            Event::InitDone => {
                let listed = self.listing.take().unwrap_or_default();
                let gone = self.claims.keys().filter(|key| !listed.contains(*key));
                let gone: Vec<PodKey> = gone.cloned().collect();
                gone.into_iter().flat_map(|key| self.put(key, None)).collect()
            }
        }
    }

    fn put(&mut self, key: PodKey, claim: Option<Claim>) -> BTreeSet<String> {
        let mut touched: Vec<String> = Vec::new();
        if let Some(before) = self.claims.remove(&key) {
            for id in &before.devices {
                if let Some(theirs) = self.claimed.get_mut(id) {
                    theirs.remove(&key);
                    if theirs.is_empty() {
                        self.claimed.remove(id);
                    }
                }
            }
            touched.extend(before.devices);
        }
        if let Some(claim) = claim {
            for id in &claim.devices {
                self.claimed.entry(id.clone()).or_default().insert(key.clone());
            }
            touched.extend(claim.devices.iter().cloned());
            self.claims.insert(key, claim);
        }
        let mut changed = BTreeSet::new();
        for id in touched {
            let Some(node) = self.node_of.get(&id) else { continue };
            let is_claimed = self.claimed.contains_key(&id);
            let device = self.devices.get_mut(node).and_then(|there| there.get_mut(&id));
            if let Some(device) = device.filter(|device| device.is_claimed != is_claimed) {
                device.is_claimed = is_claimed;
                changed.insert(node.clone());
            }
        }
        changed
    }

    /// Returns the devices of a node.
    pub(crate) fn on(&self, node: &str) -> Vec<Published> {
        self.devices.get(node).into_iter().flat_map(BTreeMap::values).cloned().collect()
    }

    /// Returns a claim that has a device, in words.
    pub(crate) fn claim_of(&self, device: &str) -> Option<String> {
        let (namespace, name) = self.claimed.get(device)?.first()?;
        Some(format!("{namespace}/{name}"))
    }

    /// Returns the device class by which a device is had.
    pub(crate) fn class_of(&self, device: &str) -> Option<&str> {
        let node = self.node_of.get(device)?;
        Some(&self.devices.get(node)?.get(device)?.class)
    }

    /// Returns what is allocated to claims that are reserved for a pod.
    pub(crate) fn of_pod<'a>(&'a self, pod: &'a str) -> impl Iterator<Item = &'a str> {
        let theirs = self.claims.values().filter(move |claim| claim.pods.iter().any(|p| p == pod));
        theirs.flat_map(|claim| claim.devices.iter().map(String::as_str))
    }

    /// Returns the claims that were made for ranks.
    pub(crate) fn of_ranks(&self) -> impl Iterator<Item = RankClaim> + '_ {
        self.claims.iter().filter_map(|(key, claim)| {
            let (job, pod) = claim.ours.clone()?;
            Some(RankClaim { key: key.clone(), uid: claim.uid.clone(), job, pod })
        })
    }
}

/// Reads a device; `None` when it is none that a rank could have for itself: one that shares
/// counters with others, has to be waited for, or is no GPU.
fn published(driver: &Driver, pool: &str, device: &Device) -> Option<Published> {
    let has = |all: &Option<Vec<_>>| all.as_ref().is_some_and(|all| !all.is_empty());
    if device.consumes_counters.as_ref().is_some_and(|all| !all.is_empty())
        || has(&device.binding_conditions)
    {
        return None;
    }
    let attribute = |name: &str| {
        let all = device.attributes.as_ref()?;
        let found = all.get(name).or_else(|| all.get(&format!("{}/{name}", driver.name)))?;
        found.string.clone()
    };
    let is_instance = match attribute("type").as_deref() {
        Some("mig") => true,
        Some("gpu") | None => false,
        Some(_) => return None,
    };
    let memory = device.capacity.as_ref().and_then(|all| {
        let found = all.get("memory").or_else(|| all.get(&format!("{}/memory", driver.name)))?;
        milli(&found.value.0).map(|milli| Bytes(milli / 1000))
    });
    let product = attribute("productName").filter(|name| !name.trim().is_empty());
    let product = product.unwrap_or_else(|| driver.name.clone());
    let model = match attribute("profile").filter(|_| is_instance) {
        Some(profile) => format!("{product}-MIG-{profile}"),
        None if is_instance => format!("{product}-MIG"),
        None => product,
    };
    let class = match &driver.class {
        Some(class) => class.clone(),
        None if is_instance => match driver.name.strip_prefix("gpu.") {
            Some(rest) => format!("mig.{rest}"),
            None => driver.name.clone(),
        },
        None => driver.name.clone(),
    };
    let taints = device.taints.iter().flatten();
    let hard: Vec<_> =
        taints.filter(|t| matches!(t.effect.as_str(), "NoSchedule" | "NoExecute")).collect();
    let told: Vec<String> = hard
        .iter()
        .map(|taint| match taint.value.as_deref().filter(|value| !value.is_empty()) {
            Some(value) => format!("{}={value}:{}", taint.key, taint.effect),
            None => format!("{}:{}", taint.key, taint.effect),
        })
        .collect();
    Some(Published {
        id: format!("{}:{pool}/{}", driver.name, device.name),
        sort: Sort { model, memory: memory.unwrap_or(Bytes(0)) },
        class,
        taint: (!told.is_empty()).then(|| format!("tainted: {}", told.join(", "))),
        evicts: hard.iter().any(|taint| taint.effect == "NoExecute"),
        is_claimed: false,
    })
}

/// Returns the devices that are allocated to a claim.
pub(crate) fn allocated(claim: &ResourceClaim) -> Vec<String> {
    let results = claim
        .status
        .as_ref()
        .and_then(|status| status.allocation.as_ref())
        .and_then(|allocation| allocation.devices.as_ref())
        .and_then(|devices| devices.results.as_ref());
    results
        .into_iter()
        .flatten()
        // Who administers a device does not have it.
        .filter(|result| result.admin_access != Some(true))
        .map(|result| format!("{}:{}/{}", result.driver, result.pool, result.device))
        .collect()
}

/// Reads what is allocated to a claim, and whose it is.
fn read(claim: &ResourceClaim) -> Claim {
    let status = claim.status.as_ref();
    let reserved = status.and_then(|status| status.reserved_for.as_ref());
    let job = claim.metadata.labels.as_ref().and_then(|labels| labels.get(UID)).cloned();
    let owners = claim.metadata.owner_references.iter().flatten();
    let pod = owners.into_iter().find(|owner| owner.kind == "Pod").map(|pod| pod.uid.clone());
    Claim {
        uid: claim.metadata.uid.clone().unwrap_or_default(),
        devices: allocated(claim),
        pods: reserved.into_iter().flatten().map(|one| one.uid.clone()).collect(),
        ours: job.zip(pod),
    }
}

/// Returns the claim of a rank's pod, which has its name and ends with it.
///
/// # Errors
/// When the parts do not make a claim, which is a bug.
pub(crate) fn claim(
    pod: (&str, &str),
    namespace: &str,
    job: &str,
    class: &str,
) -> Result<ResourceClaim, serde_json::Error> {
    let (name, uid) = pod;
    serde_json::from_value(json!({
        "metadata": {
            "name": name, "namespace": namespace,
            "labels": { "app.kubernetes.io/managed-by": "drumline", UID: job },
            // While its pod runs nobody frees the device by deleting the claim.
            "finalizers": [PROTECTION],
            "ownerReferences": [{ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid,
                                  "controller": true, "blockOwnerDeletion": false }],
        },
        "spec": { "devices": { "requests": [{
            "name": REQUEST, "exactly": { "deviceClassName": class, "allocationMode": "ExactCount",
                                          "count": 1 },
        }]}},
    }))
}

/// Returns the status that gives a device of a node to a rank's pod.
pub(crate) fn allocation(pod: (&str, &str), node: &str, device: &str) -> Option<Value> {
    let (driver, pool, device) = parts(device)?;
    let (name, uid) = pod;
    Some(json!({ "status": {
        "allocation": {
            "devices": { "results": [{
                "request": REQUEST, "driver": driver, "pool": pool, "device": device,
            }]},
            "nodeSelector": { "nodeSelectorTerms": [{ "matchFields": [{
                "key": "metadata.name", "operator": "In", "values": [node],
            }]}]},
        },
        "reservedFor": [{ "resource": "pods", "name": name, "uid": uid }],
    }}))
}

/// Lets the pod of a rank name its claim.
pub(crate) fn name_claim(pod: &mut Value) {
    let claim = pod["metadata"]["name"].clone();
    pod["spec"]["resourceClaims"] = json!([{ "name": REQUEST, "resourceClaimName": claim }]);
    pod["spec"]["containers"][0]["resources"]["claims"] = json!([{ "name": REQUEST }]);
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRIVER: &str = "gpu.nvidia.com";

    fn claims() -> Claims {
        Claims::new(vec![Driver::parse(DRIVER).unwrap()])
    }

    fn device(name: &str, kind: &str) -> Value {
        json!({
            "name": name,
            "attributes": { "type": { "string": kind }, "productName": { "string": "H100" },
                            "profile": { "string": "1g.10gb" } },
            "capacity": { "memory": { "value": "80Gi" } },
        })
    }

    fn slice(name: &str, generation: i64, count: i64, devices: &[Value]) -> ResourceSlice {
        serde_json::from_value(json!({
            "metadata": { "name": name },
            "spec": {
                "driver": DRIVER, "nodeName": "a", "devices": devices,
                "pool": { "name": "a", "generation": generation, "resourceSliceCount": count },
            },
        }))
        .unwrap()
    }

    fn given(name: &str, devices: &[&str]) -> ResourceClaim {
        let results: Vec<Value> = devices
            .iter()
            .map(
                |device| json!({ "request": "r", "driver": DRIVER, "pool": "a", "device": device }),
            )
            .collect();
        serde_json::from_value(json!({
            "metadata": { "name": name, "namespace": "n", "uid": format!("uid-{name}") },
            "spec": {},
            "status": { "allocation": { "devices": { "results": results } },
                        "reservedFor": [{ "resource": "pods", "name": "p", "uid": "pod" }] },
        }))
        .unwrap()
    }

    /// The devices of node `a`, each as `NAME MODEL GIB CLASS`, with a mark if it is claimed.
    fn shown(claims: &Claims) -> Vec<String> {
        let text = |one: Published| {
            let name = one.id.rsplit_once('/').unwrap().1.to_owned();
            let mark = if one.is_claimed { " claimed" } else { "" };
            format!("{name} {} {} {}{mark}", one.sort.model, one.sort.memory.0 >> 30, one.class)
        };
        claims.on("a").into_iter().map(text).collect()
    }

    #[test]
    fn a_pool_is_its_newest_generation_once_all_of_it_is_there() {
        let mut claims = claims();
        let seen = |claims: &mut Claims, slice: &ResourceSlice| {
            claims.slice_event(&Event::Apply(slice.clone())).into_iter().collect::<Vec<_>>()
        };
        let first = slice("s1", 1, 2, &[device("gpu-0", "gpu")]);
        assert!(seen(&mut claims, &first).is_empty() && shown(&claims).is_empty());
        let second = slice("s2", 1, 2, &[device("mig-0", "mig"), device("vfio-0", "vfio")]);
        assert_eq!(seen(&mut claims, &second), ["a"]);
        let both = ["gpu-0 H100 80 gpu.nvidia.com", "mig-0 H100-MIG-1g.10gb 80 mig.nvidia.com"];
        assert_eq!(shown(&claims), both);
        // The driver writes the pool anew, slice by slice.
        let newer = slice("s1", 2, 1, &[device("gpu-1", "gpu")]);
        seen(&mut claims, &newer);
        assert_eq!(shown(&claims), ["gpu-1 H100 80 gpu.nvidia.com"]);
        assert_eq!(claims.class_of("gpu.nvidia.com:a/gpu-0"), None);
        // What is not listed any more is gone.
        claims.slice_event(&Event::Init);
        claims.slice_event(&Event::InitApply(second));
        claims.slice_event(&Event::InitDone);
        assert!(shown(&claims).is_empty() && claims.node_of.is_empty());
        // Other drivers, and devices that exclude each other, are left alone.
        let mut other = slice("s3", 1, 1, &[device("gpu-0", "gpu")]);
        other.spec.driver = "net.example.org".to_owned();
        seen(&mut claims, &other);
        let mut shared = device("gpu-0", "gpu");
        shared["consumesCounters"] = json!([{ "counterSet": "c", "counters": {} }]);
        seen(&mut claims, &slice("s2", 3, 1, &[shared]));
        assert!(shown(&claims).is_empty());
    }

    #[test]
    fn a_device_is_taken_for_as_long_as_a_claim_has_it() {
        let mut claims = claims();
        let devices = [device("gpu-0", "gpu"), device("gpu-1", "gpu")];
        // Claims may be shown before the slices are.
        claims.claim_event(&Event::Apply(given("one", &["gpu-0"])));
        claims.slice_event(&Event::Apply(slice("s1", 1, 1, &devices)));
        assert!(shown(&claims)[0].ends_with("claimed") && !shown(&claims)[1].ends_with("claimed"));
        assert_eq!(claims.claim_of("gpu.nvidia.com:a/gpu-0").as_deref(), Some("n/one"));
        assert_eq!(claims.of_pod("pod").collect::<Vec<_>>(), ["gpu.nvidia.com:a/gpu-0"]);
        let changed = claims.claim_event(&Event::Apply(given("two", &["gpu-1"])));
        assert_eq!(changed.into_iter().collect::<Vec<_>>(), ["a"]);
        // It is freed, and the other is deleted while nobody watched.
        claims.claim_event(&Event::Apply(given("two", &[])));
        assert!(!shown(&claims)[1].ends_with("claimed"));
        claims.claim_event(&Event::Init);
        claims.claim_event(&Event::InitDone);
        assert!(!shown(&claims)[0].ends_with("claimed"));
        assert!(claims.claims.is_empty() && claims.claimed.is_empty());
    }

    #[test]
    fn taints_of_devices_are_told_and_soft_ones_are_not() {
        let mut claims = claims();
        for (effect, taint, evicts) in [
            ("NoSchedule", Some("tainted: hot=yes:NoSchedule"), false),
            ("NoExecute", Some("tainted: hot=yes:NoExecute"), true),
            ("None", None, false),
        ] {
            let mut hot = device("gpu-0", "gpu");
            hot["taints"] = json!([{ "key": "hot", "value": "yes", "effect": effect }]);
            claims.slice_event(&Event::Apply(slice("s1", 1, 1, &[hot])));
            let one = claims.on("a").remove(0);
            assert_eq!((one.taint.as_deref(), one.evicts), (taint, evicts), "{effect}");
        }
    }

    #[test]
    fn a_claim_names_the_device_of_the_plan_and_is_known_again() {
        let pod = ("demo-c1-0", "pod-uid");
        let mut made = claim(pod, "n", "job-uid", "gpu.nvidia.com").unwrap();
        made.metadata.uid = Some("uid".to_owned());
        let status = allocation(pod, "a", "gpu.nvidia.com:pool/of/a/gpu-0").unwrap();
        made.status = serde_json::from_value(status["status"].clone()).unwrap();
        let read = read(&made);
        assert_eq!(read.devices, ["gpu.nvidia.com:pool/of/a/gpu-0"]);
        assert_eq!(read.ours, Some(("job-uid".to_owned(), "pod-uid".to_owned())));
        assert_eq!(allocation(pod, "a", "nvidia.com/gpu"), None);
        let mut pod =
            json!({ "metadata": { "name": "demo-c1-0" }, "spec": { "containers": [{}] } });
        name_claim(&mut pod);
        assert_eq!(pod["spec"]["resourceClaims"][0]["resourceClaimName"], "demo-c1-0");
        assert_eq!(
            pod["spec"]["containers"][0]["resources"]["claims"],
            json!([{ "name": "device" }])
        );
    }

    #[test]
    fn a_driver_is_a_dns_name_and_its_class_too() {
        let read = Driver::parse("gpu.example.org=fast").unwrap();
        assert_eq!((read.name.as_str(), read.class.as_deref()), ("gpu.example.org", Some("fast")));
        for bad in ["", "=x", "GPU", "a..b", "a=", "a=b/c", "nvidia.com/gpu"] {
            assert!(Driver::parse(bad).unwrap_err().contains("gpu.nvidia.com"), "{bad}");
        }
    }
}
