//! What this node offers: CPU devices today, each a share of the node's cores.

use drumline_wire::v1;

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
}

impl Devices {
    /// Looks at the machine.
    #[must_use]
    pub fn discover(options: &Options) -> Self {
        let machine = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let cores = if options.cores == 0 { machine } else { options.cores };
        let memory = drumline_telemetry::proc::node_memory_total().unwrap_or(0);
        let count = options.cpu_devices.max(1);
        let list = (0..options.cpu_devices)
            .map(|index| v1::AgentDevice {
                index,
                kind: "cpu".to_owned(),
                model: "cpu".to_owned(),
                memory_bytes: memory / u64::from(count),
                healthy: true,
                message: String::new(),
                matmul_flops: options.core_flops * f64::from(cores) / f64::from(count),
            })
            .collect();
        Self { list, cores, memory_bytes: memory }
    }
}
