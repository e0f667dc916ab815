//! What of a node is a device: units of its extended resources that are GPUs, and shares of its cores.
//!
//! Every resource is counted for itself: a whole GPU and a MIG instance of the same card are asked for
//! by different names, and no pod gets one for the other.

use std::collections::{BTreeMap, BTreeSet};

use drumline_spec::DeviceKind;
use drumline_types::Bytes;
use k8s_openapi::api::core::v1::Node as KubeNode;

use crate::dra::{Driver, Published, is_claimable};
use crate::quantity::milli;

/// The resource of CPU devices.
pub const CPU: &str = "cpu";
/// The resource that is a whole GPU of NVIDIA.
pub const NVIDIA_GPU: &str = "nvidia.com/gpu";
/// What is before the profile in the names of resources that are MIG instances.
const NVIDIA_MIG: &str = "nvidia.com/mig-";
/// What resources of NVIDIA begin with.
const NVIDIA: &str = "nvidia.com/";
/// Resources that are whole GPUs though their names do not end in it.
const GPUS: [&str; 2] = ["gpu.intel.com/i915", "gpu.intel.com/xe"];

/// An extended resource of which each unit is one GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuResource {
    /// The resource, such as `amd.com/gpu`.
    pub name: String,
    /// What its devices are; `None`: as the node's labels say.
    pub model: Option<String>,
    /// The memory of each; 0: as the node's labels say.
    pub memory: Bytes,
}

impl GpuResource {
    /// Returns a resource whose devices the labels of their nodes describe.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), model: None, memory: Bytes(0) }
    }

    /// Reads `NAME`, `NAME=MODEL` or `NAME=MODEL:MEMORY`, such as `amd.com/gpu=MI300X:192Gi`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, what) = match text.split_once('=') {
            Some((name, what)) => (name, Some(what)),
            None => (text, None),
        };
        let is_part = |part: &str| {
            let is_edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
            let bytes = part.as_bytes();
            is_edge(bytes.first())
                && is_edge(bytes.last())
                && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
        };
        let is_extended = name.split_once('/').is_some_and(|(domain, last)| {
            is_part(domain) && is_part(last) && !format!(".{domain}").ends_with(".kubernetes.io")
        });
        if !is_extended {
            return Err(format!(
                "{name:?} is no extended resource; one such as {NVIDIA_GPU} or amd.com/gpu is wanted"
            ));
        }
        let Some(what) = what else { return Ok(Self::named(name)) };
        let (model, memory) = match what.rsplit_once(':') {
            None => (what, Bytes(0)),
            Some((model, memory)) => {
                let bytes = milli(memory).map(|milli| milli / 1000).filter(|bytes| *bytes > 0);
                let bytes = bytes.ok_or_else(|| {
                    format!("{memory:?} is no size of memory; one such as 192Gi is wanted")
                })?;
                (model, Bytes(bytes))
            }
        };
        if model.trim().is_empty() {
            return Err("no model is between = and :; one such as MI300X is wanted".to_owned());
        }
        Ok(Self { name: name.to_owned(), model: Some(model.trim().to_owned()), memory })
    }

    /// Reads several. Each resource is named once.
    ///
    /// # Errors
    /// The first that is wrong, and what is wrong with it.
    pub fn parse_all(texts: &[String]) -> Result<Vec<Self>, String> {
        let mut all: Vec<Self> = Vec::new();
        for text in texts {
            let one = Self::parse(text).map_err(|why| format!("{text}: {why}"))?;
            if all.iter().any(|other| other.name == one.name) {
                return Err(format!("{text}: {} is named twice; once is wanted", one.name));
            }
            all.push(one);
        }
        if all.is_empty() {
            return Err(format!("none is named; {NVIDIA_GPU} is the usual one"));
        }
        Ok(all)
    }
}

/// Which resources are devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRules {
    /// Those that are GPUs. Where one is of NVIDIA, MIG instances are found by themselves.
    pub gpus: Vec<GpuResource>,
    /// Drivers whose published devices are GPUs too; empty: none.
    pub drivers: Vec<Driver>,
    /// Processor time of one CPU device, in thousandths of a core.
    pub cpu_milli: u64,
}

impl Default for DeviceRules {
    fn default() -> Self {
        let gpus = vec![GpuResource::named(NVIDIA_GPU)];
        Self { gpus, drivers: Vec::new(), cpu_milli: 1000 }
    }
}

/// A node's devices of one resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// What pods ask for.
    pub resource: String,
    /// How many there are.
    pub count: u64,
    /// What each of them is.
    pub sort: Sort,
    /// Why none of them takes new work; `None`: they do.
    pub problem: Option<String>,
}

/// What devices of one resource are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sort {
    /// The maker's name for them.
    pub model: String,
    /// The memory of each; 0: not known.
    pub memory: Bytes,
}

impl DeviceRules {
    /// Returns the rules of somebody who sees a node and does not know the operator's: resources whose
    /// names say that they are GPUs, and those that ranks `hold`.
    #[must_use]
    pub fn seen<'a>(node: &'a KubeNode, hold: impl Iterator<Item = &'a str>) -> Self {
        let offered = allocatable(node).into_iter().flatten();
        let named = offered.map(|(name, _)| name.as_str()).filter(|name| {
            let last = name.rsplit_once('/').map_or("", |(_, last)| last);
            last == "gpu" || last.starts_with("gpu.") || GPUS.contains(name)
        });
        let hold = hold.filter(|name| !is_claimable(name));
        let all: BTreeSet<&str> = named.chain(hold).chain([NVIDIA_GPU]).collect();
        Self { gpus: all.into_iter().map(GpuResource::named).collect(), ..Self::default() }
    }

    /// Returns the resource of devices whose pod says none: it was made when there was but one.
    #[must_use]
    pub fn first(&self) -> &str {
        self.gpus.first().map_or(NVIDIA_GPU, |gpu| gpu.name.as_str())
    }

    /// Returns whether a resource is a GPU or a part of one.
    #[must_use]
    pub fn is_gpu(&self, resource: &str) -> bool {
        self.gpus.iter().any(|gpu| gpu.name == resource)
            || self.finds_mig() && resource.starts_with(NVIDIA_MIG)
    }

    fn finds_mig(&self) -> bool {
        self.gpus.iter().any(|gpu| gpu.name.starts_with(NVIDIA))
    }

    /// Returns the devices that a node offers and that drivers publish for it, by resource; CPU devices
    /// last.
    #[must_use]
    pub fn offers(&self, node: &KubeNode, published: &[Published]) -> Vec<Offer> {
        let nothing = BTreeMap::new();
        let all = allocatable(node).unwrap_or(&nothing);
        let amount = |name: &str| all.get(name).and_then(|quantity| milli(&quantity.0));
        let mut offers = Vec::new();
        for name in all.keys().filter(|name| self.is_gpu(name)) {
            let told = self.gpus.iter().find(|gpu| gpu.name == *name);
            offers.push(Offer {
                resource: name.clone(),
                count: amount(name).unwrap_or(0) / 1000,
                sort: sort(node, name, told),
                problem: None,
            });
        }
        offers.extend(published.iter().map(|device| Offer {
            resource: device.id.clone(),
            count: 1,
            sort: device.sort.clone(),
            problem: device.taint.clone(),
        }));
        offers.push(Offer {
            resource: CPU.to_owned(),
            count: amount(CPU).unwrap_or(0) / self.cpu_milli.max(1),
            sort: Sort { model: "cpu".to_owned(), memory: Bytes(0) },
            problem: None,
        });
        offers
    }

    /// Returns how many devices an amount of a resource, in thousandths, takes.
    #[must_use]
    pub fn taken(&self, resource: &str, milli: u64) -> u64 {
        milli.div_ceil(if resource == CPU { self.cpu_milli.max(1) } else { 1000 })
    }
}

/// Returns the kind of a resource's devices.
#[must_use]
pub fn kind(resource: &str) -> DeviceKind {
    if resource == CPU { DeviceKind::Cpu } else { DeviceKind::Gpu }
}

/// Says what a resource's devices are: as the rules tell, else as the labels of the node do, which are
/// those that the makers' device plugins and GPU feature discovery write.
fn sort(node: &KubeNode, resource: &str, told: Option<&GpuResource>) -> Sort {
    let label = |key: &str| {
        let labels = node.metadata.labels.as_ref()?;
        labels.get(key).filter(|text| !text.trim().is_empty()).cloned()
    };
    let of = |what: &str| label(&format!("{resource}.{what}"));
    let profile = resource.strip_prefix(NVIDIA_MIG);
    let labelled = || of("product").or_else(|| of("product-name"));
    let instance = || {
        let profile = profile?;
        let card = label("nvidia.com/gpu.product");
        let before = card.map(|card| format!("{card}-")).unwrap_or_default();
        Some(format!("{before}MIG-{profile}"))
    };
    let model = told.and_then(|told| told.model.clone()).or_else(labelled).or_else(instance);
    // A whole number is MiB, as NVIDIA writes it; AMD writes a size.
    let mebibytes = || of("memory")?.parse::<u64>().ok()?.checked_mul(1 << 20);
    let size = || milli(&of("vram")?).map(|milli| milli / 1000);
    let by_profile = || gibibytes(profile?)?.checked_mul(1 << 30);
    let memory = told.map(|told| told.memory.0).filter(|memory| *memory > 0);
    let memory = memory.or_else(mebibytes).or_else(size).or_else(by_profile).unwrap_or(0);
    // Without a name, devices of two makers would be of one model.
    Sort { model: model.unwrap_or_else(|| resource.to_owned()), memory: Bytes(memory) }
}

/// Returns the memory that a profile names: 10 of `1g.10gb`.
fn gibibytes(profile: &str) -> Option<u64> {
    profile.split('.').find_map(|word| word.strip_suffix("gb")?.parse().ok())
}

fn allocatable(
    node: &KubeNode,
) -> Option<&BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>> {
    node.status.as_ref()?.allocatable.as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(labels: Value, allocatable: Value) -> KubeNode {
        serde_json::from_value(json!({
            "metadata": { "name": "a", "labels": labels },
            "status": { "allocatable": allocatable },
        }))
        .unwrap()
    }

    /// What a node offers, each as `COUNT RESOURCE MODEL MEMORY`.
    fn told(rules: &DeviceRules, node: &KubeNode) -> Vec<String> {
        let offers = rules.offers(node, &[]);
        let text = |one: &Offer| {
            let Sort { model, memory } = &one.sort;
            format!("{} {} {model} {}", one.count, one.resource, memory.0 >> 20)
        };
        offers.iter().map(text).collect()
    }

    #[test]
    fn whole_gpus_and_instances_are_devices_of_their_own() {
        let mixed = node(
            json!({
                "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
                "nvidia.com/gpu.memory": "81920",
                "nvidia.com/mig-3g.40gb.product": "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb",
                "nvidia.com/mig-3g.40gb.memory": "40192",
            }),
            json!({ "cpu": "3500m", "nvidia.com/gpu": "2", "nvidia.com/mig-1g.10gb": "7",
                    "nvidia.com/mig-3g.40gb": "2", "rdma/hca": "8", "amd.com/gpu": "1" }),
        );
        assert_eq!(
            told(&DeviceRules::default(), &mixed),
            [
                "2 nvidia.com/gpu NVIDIA-A100-SXM4-80GB 81920",
                "7 nvidia.com/mig-1g.10gb NVIDIA-A100-SXM4-80GB-MIG-1g.10gb 10240",
                "2 nvidia.com/mig-3g.40gb NVIDIA-A100-SXM4-80GB-MIG-3g.40gb 40192",
                "3 cpu cpu 0",
            ]
        );
        // Who sees the node alone knows GPUs by their names, and what ranks hold.
        let seen = DeviceRules::seen(&mixed, ["rdma/hca"].into_iter());
        assert_eq!(told(&seen, &mixed).len(), 6);
        assert!(told(&seen, &mixed).contains(&"1 amd.com/gpu amd.com/gpu 0".to_owned()));
        let unlabelled = node(json!({}), json!({ "nvidia.com/mig-1g.10gb": "1" }));
        assert_eq!(
            told(&DeviceRules::default(), &unlabelled),
            ["1 nvidia.com/mig-1g.10gb MIG-1g.10gb 10240", "0 cpu cpu 0"]
        );
    }

    #[test]
    fn other_makers_devices_are_named_by_the_administrator_or_by_labels() {
        let gpus = ["amd.com/gpu", "example.org/npu=N1:16Gi"].map(str::to_owned);
        let gpus = GpuResource::parse_all(&gpus).unwrap();
        let rules = DeviceRules { gpus, cpu_milli: 500, ..DeviceRules::default() };
        let node = node(
            json!({ "amd.com/gpu.product-name": "MI300X", "amd.com/gpu.vram": "192Gi" }),
            json!({ "cpu": "1", "amd.com/gpu": "8", "example.org/npu": "2",
                    "nvidia.com/gpu": "1", "nvidia.com/mig-1g.10gb": "1" }),
        );
        assert_eq!(
            told(&rules, &node),
            ["8 amd.com/gpu MI300X 196608", "2 example.org/npu N1 16384", "2 cpu cpu 0"]
        );
        assert!(!rules.is_gpu("nvidia.com/mig-1g.10gb") && rules.is_gpu("amd.com/gpu"));
        assert_eq!((rules.taken(CPU, 1200), rules.taken("amd.com/gpu", 1200)), (3, 2));
    }

    #[test]
    fn what_is_no_resource_is_refused_with_what_is_wanted() {
        let read = GpuResource::parse("amd.com/gpu=AMD Instinct: MI300X:192Gi").unwrap();
        assert_eq!(read.model.as_deref(), Some("AMD Instinct: MI300X"));
        assert_eq!(read.memory, Bytes(192 << 30));
        for (text, why) in [
            ("gpu", "no extended resource"),
            ("", "no extended resource"),
            ("cpu", "no extended resource"),
            ("/gpu", "no extended resource"),
            ("a/b/c", "no extended resource"),
            ("kubernetes.io/gpu", "no extended resource"),
            ("amd.com/gpu=", "no model"),
            ("amd.com/gpu=:1Gi", "no model"),
            ("amd.com/gpu=MI300X:", "no size of memory"),
            ("amd.com/gpu=MI300X:0", "no size of memory"),
            ("amd.com/gpu=MI300X:lots", "no size of memory"),
        ] {
            let told = GpuResource::parse(text).unwrap_err();
            assert!(told.contains(why), "{text}: {told}");
        }
        let twice = ["amd.com/gpu", "amd.com/gpu=X"].map(str::to_owned);
        assert!(GpuResource::parse_all(&twice).unwrap_err().contains("twice"));
        assert!(GpuResource::parse_all(&[]).unwrap_err().contains("none is named"));
    }
}
