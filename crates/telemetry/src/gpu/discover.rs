//! Which GPUs there are, and how they are connected.

use nvml_wrapper::Device;
use nvml_wrapper::enum_wrappers::device::TopologyLevel;
use nvml_wrapper::error::NvmlError;

use super::blank::known_u32;
use super::library::{Nvml, Versions};

/// NVLinks that a GPU may have.
const LINKS_MAX: u32 = 18;
/// More than any machine has.
const NUMA_NODES_MAX: u32 = 4096;

/// How near two GPUs are, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Near {
    /// Joined by this many NVLinks; through a switch, all links of the GPU.
    NvLink(u32),
    /// Under one PCIe switch or host bridge.
    Pcie,
    /// In one NUMA node.
    NumaNode,
    /// Across the machine.
    Machine,
}

/// One GPU, or one instance of a GPU that MIG divides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// NVML's number of the physical GPU.
    pub index: u32,
    /// Names it in every metric; what `CUDA_VISIBLE_DEVICES` takes.
    pub uuid: String,
    /// The maker's name, such as `NVIDIA H100 80GB HBM3`.
    pub model: String,
    /// Its memory in bytes; 0: not told.
    pub memory_bytes: u64,
    /// Where it is on the PCIe bus.
    pub pci_bus_id: String,
    /// The NUMA node that it is next to.
    pub numa_node: Option<u32>,
    /// The compute capability, major and minor.
    pub capability: Option<(i32, i32)>,
    /// Its number among the instances of its GPU, when MIG divides it.
    pub mig: Option<u32>,
    /// Active NVLinks.
    pub nvlinks: u32,
}

/// What a machine has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inventory {
    /// Versions of driver and library.
    pub versions: Versions,
    /// Its GPUs, those of one card side by side.
    pub gpus: Vec<Gpu>,
    /// For each pair of physical GPUs, by their numbers, how near they are.
    pub near: Vec<(u32, u32, Near)>,
    /// GPUs that do not answer, by number, with the cause.
    pub silent: Vec<(u32, String)>,
}

impl Inventory {
    /// Looks at the machine.
    ///
    /// # Errors
    /// When the GPUs cannot even be counted.
    pub fn look(nvml: &Nvml) -> Result<Self, NvmlError> {
        let mut found = Self { versions: Versions::of(nvml), ..Self::default() };
        let mut cards: Vec<(u32, Device<'_>, Gpu, Vec<String>)> = Vec::new();
        for index in 0..nvml.device_count()? {
            let seen = nvml.device_by_index(index).and_then(|device| {
                let gpu = describe(&device, index)?;
                Ok((device, gpu))
            });
            match seen {
                Ok((device, mut gpu)) => {
                    let (active, peers) = links(&device);
                    gpu.nvlinks = active;
                    cards.push((index, device, gpu, peers));
                }
                Err(error) => found.silent.push((index, error.to_string())),
            }
        }
        let buses: Vec<String> = cards.iter().map(|(.., gpu, _)| gpu.pci_bus_id.clone()).collect();
        for (at, (one, device, gpu, peers)) in cards.iter().enumerate() {
            for (two, other, second, far) in &cards[at + 1..] {
                let near = linked(peers, far, &buses, &second.pci_bus_id)
                    .map(|links| Near::NvLink(links.min(gpu.nvlinks)))
                    .unwrap_or_else(|| without_links(nvml, device, other));
                found.near.push((*one, *two, near));
            }
        }
        for (index, device, gpu, _) in cards {
            let instances = instances(&device, index, &gpu);
            if instances.is_empty() {
                found.gpus.push(gpu);
            } else {
                found.gpus.extend(instances);
            }
        }
        Ok(found)
    }

    /// Whether every GPU reaches every other over NVLink: the machine is one NVLink domain.
    #[must_use]
    pub fn is_one_nvlink_domain(&self) -> bool {
        !self.near.is_empty()
            && self.silent.is_empty()
            && self.near.iter().all(|(.., near)| matches!(near, Near::NvLink(_)))
    }
}

/// Reads what identifies a GPU; only its name and UUID are needed.
fn describe(device: &Device<'_>, index: u32) -> Result<Gpu, NvmlError> {
    Ok(Gpu {
        index,
        uuid: device.uuid()?,
        model: device.name()?,
        memory_bytes: device.memory_info().map_or(0, |memory| memory.total),
        pci_bus_id: device.pci_info().map(|pci| pci.bus_id.to_uppercase()).unwrap_or_default(),
        numa_node: device.numa_node_id().ok().and_then(|node| known_u32(node, NUMA_NODES_MAX)),
        capability: device.cuda_compute_capability().ok().map(|c| (c.major, c.minor)),
        mig: None,
        nvlinks: 0,
    })
}

/// Returns the instances of a GPU that MIG divides.
fn instances(device: &Device<'_>, index: u32, whole: &Gpu) -> Vec<Gpu> {
    const ENABLED: u32 = 1;
    if !device.mig_mode().is_ok_and(|mode| mode.current == ENABLED) {
        return Vec::new();
    }
    let most = device.mig_device_count().unwrap_or(0);
    (0..most)
        .filter_map(|number| {
            let instance = device.mig_device_by_index(number).ok()?;
            let mut gpu = describe(&instance, index).ok()?;
            gpu.mig = Some(number);
            gpu.pci_bus_id.clone_from(&whole.pci_bus_id);
            gpu.numa_node = whole.numa_node;
            Some(gpu)
        })
        .collect()
}

/// Returns the number of active NVLinks, and where each leads.
fn links(device: &Device<'_>) -> (u32, Vec<String>) {
    let mut peers = Vec::new();
    let mut active = 0;
    for link in 0..LINKS_MAX {
        let link = device.link_wrapper_for(link);
        if link.is_active().unwrap_or(false) {
            active += 1;
            peers.extend(link.remote_pci_info().map(|pci| pci.bus_id.to_uppercase()));
        }
    }
    (active, peers)
}

/// Returns how many NVLinks join two GPUs, given where the links of each lead: straight to the
/// other, or to no GPU at all, which is a switch that joins everyone who is linked to it.
fn linked(own: &[String], far: &[String], gpus: &[String], other: &str) -> Option<u32> {
    let direct = own.iter().filter(|peer| *peer == other).count();
    if direct > 0 {
        return Some(direct as u32);
    }
    let switched = |peers: &[String]| peers.iter().filter(|peer| !gpus.contains(peer)).count();
    let through = switched(own).min(switched(far));
    (through > 0).then_some(through as u32)
}

fn without_links(nvml: &Nvml, device: &Device<'_>, other: &Device<'_>) -> Near {
    match nvml.topology_common_ancestor(device, other) {
        Ok(
            TopologyLevel::Internal
            | TopologyLevel::Single
            | TopologyLevel::Multiple
            | TopologyLevel::HostBridge,
        ) => Near::Pcie,
        Ok(TopologyLevel::Node) => Near::NumaNode,
        _ => Near::Machine,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_the_other_gpu_or_through_a_switch() {
        let gpus: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
        let to = |peers: &[&str]| peers.iter().map(|peer| (*peer).to_owned()).collect::<Vec<_>>();
        let table: [(&[&str], &[&str], Option<u32>); 5] = [
            (&["b", "b", "c"], &["a", "a", "c"], Some(2)),
            (&["c"], &["c"], None),
            (&["switch", "switch", "other switch"], &["switch", "switch"], Some(2)),
            (&["switch"], &[], None),
            (&[], &[], None),
        ];
        for (own, far, expected) in table {
            assert_eq!(linked(&to(own), &to(far), &gpus, "b"), expected, "{own:?} {far:?}");
        }
    }
}
