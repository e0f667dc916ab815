//! The machines of a workload.

use drumline_cluster::{Device, Node};
use drumline_spec::DeviceKind;
use drumline_types::{Bytes, NodeName};

use crate::workload::NodeGroup;

const GIB: u64 = 1 << 30;

/// Returns the machines of every group, in order; each group has domains of its own.
#[must_use]
pub fn nodes(groups: &[NodeGroup]) -> Vec<Node> {
    let mut nodes = Vec::new();
    for (place, group) in groups.iter().enumerate() {
        // Letters keep the groups' domains apart: a fleet of one group has plain numbers.
        let letter = if groups.len() == 1 { String::new() } else { format!("g{place}-") };
        let memory = Bytes(u64::from(group.device_memory_gib.0) * GIB);
        for at in 0..group.nodes.0 {
            let Ok(name) = format!("n{letter}{at:05}").parse::<NodeName>() else { continue };
            let device = Device::new(DeviceKind::Gpu, group.model.clone(), memory);
            let mut node = Node::new(name, vec![device; group.devices.0 as usize]);
            node.cpu_milli = u64::from(group.cpus.0) * 1000;
            node.memory = Bytes(u64::from(group.memory_gib.0) * GIB);
            for level in group.levels.get_ref() {
                let domain = format!("{letter}{}-{:04}", level.name, at / level.nodes.0);
                node = node.within(level.name.clone(), domain).linked(level.link_mb_per_s);
            }
            nodes.push(node);
        }
    }
    nodes
}
