//! What this node offers: its GPUs, and CPU devices, each a share of the node's cores.

use drumline_wire::v1;

use crate::gpus::Gpus;
use crate::service::Options;

/// The node's devices and what they share.
#[derive(Debug, Clone)]
pub struct Devices {
    /// The devices.
    pub list: Vec<v1::AgentDevice>,
    /// Cores that the devices share.
    pub cores: u32,
    /// Memory of the machine, bytes.
    pub memory_bytes: u64,
    /// The machine's cores that this agent may use, from the first that is its own; empty where
    /// they cannot be told apart.
    own: Vec<usize>,
}

impl Devices {
    /// Looks at the machine. CPU devices come first, so that their numbers do not depend on GPUs.
    #[must_use]
    pub fn discover(options: &Options, gpus: &Gpus) -> Self {
        let machine = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let cores = if options.cores == 0 { machine } else { options.cores };
        let memory = drumline_telemetry::proc::node_memory_total().unwrap_or(0);
        let count = options.cpu_devices.max(1);
        let cpus = (0..options.cpu_devices).map(|index| v1::AgentDevice {
            index,
            kind: "cpu".to_owned(),
            model: "cpu".to_owned(),
            memory_bytes: memory / u64::from(count),
            healthy: true,
            message: String::new(),
            matmul_flops: options.core_flops * f64::from(cores) / f64::from(count),
            uuid: String::new(),
        });
        let list: Vec<_> = cpus.chain(gpus.devices()).collect();
        let own = allowed(machine as usize).get(options.first_core as usize..).map(<[_]>::to_vec);
        Self { list, cores, memory_bytes: memory, own: own.unwrap_or_default() }
    }

    /// Returns the cores that belong to one device alone, as a list such as `2-3`. None where
    /// devices outnumber cores: there the system shares them better than a fixed place would, since
    /// a rank that waits leaves its core to whoever computes.
    #[must_use]
    pub fn share(&self, device: u32) -> Option<String> {
        let each = self.cores as usize / self.list.len().max(1);
        let first = device as usize * each;
        let own = self.own.get(first..first + each).filter(|own| !own.is_empty())?;
        let names: Vec<String> = own.iter().map(ToString::to_string).collect();
        Some(names.join(","))
    }
}

/// Returns the cores that this process may run on; none where a quota gives it less than all of
/// them, since every container of the machine would then choose the first ones.
#[cfg(target_os = "linux")]
fn allowed(usable: usize) -> Vec<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let Ok(set) = sched_getaffinity(None) else { return Vec::new() };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect();
    if cores.len() == usable { cores } else { Vec::new() }
}

#[cfg(not(target_os = "linux"))]
fn allowed(_usable: usize) -> Vec<usize> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_cores_of_their_own_only_where_there_are_enough() {
        let devices = |count: u32, cores: u32, own: &[usize]| Devices {
            list: (0..count)
                .map(|index| v1::AgentDevice { index, ..v1::AgentDevice::default() })
                .collect(),
            cores,
            memory_bytes: 0,
            own: own.to_vec(),
        };
        let four = devices(2, 4, &[4, 5, 6, 7]);
        assert_eq!(
            (four.share(0).as_deref(), four.share(1).as_deref()),
            (Some("4,5"), Some("6,7"))
        );
        assert_eq!(four.share(2), None);
        let uneven = devices(2, 3, &[0, 1, 2]);
        assert_eq!(uneven.share(1).as_deref(), Some("1"));
        assert_eq!(devices(4, 2, &[0, 1]).share(0), None, "four ranks on two cores");
        assert_eq!(devices(2, 2, &[]).share(0), None, "cores that cannot be told apart");
    }
}
