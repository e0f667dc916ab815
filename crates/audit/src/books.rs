//! What a plan is checked against: what there is, and what of it is left.

use drumline_cluster::{Node, Snapshot};
use drumline_spec::WHOLE_DEVICE;
use drumline_types::{DeviceId, JobId, NodeName};

/// The fleet as a checker sees it.
pub(crate) trait Books {
    /// Returns a node of the fleet.
    fn node(&self, name: &NodeName) -> Option<&Node>;
    /// Returns the thousandths of a device that nobody uses, healthy or not.
    fn left_milli(&self, device: &DeviceId) -> u32;
    /// Returns a job that holds some of a device.
    fn holder(&self, device: &DeviceId) -> Option<JobId>;
    /// Returns the thousandths of a core that nobody uses.
    fn cpu_left_milli(&self, node: &NodeName) -> u64;
    /// Returns the bytes of memory that nobody uses.
    fn memory_left(&self, node: &NodeName) -> u64;
}

impl Books for Snapshot {
    fn node(&self, name: &NodeName) -> Option<&Node> {
        Snapshot::node(self, name).map(drumline_cluster::NodeState::node)
    }

    fn left_milli(&self, device: &DeviceId) -> u32 {
        let state = Snapshot::node(self, &device.node);
        state.map_or(0, |state| WHOLE_DEVICE.saturating_sub(state.used_milli(device.index)))
    }

    fn holder(&self, device: &DeviceId) -> Option<JobId> {
        Snapshot::holder(self, device).cloned()
    }

    fn cpu_left_milli(&self, node: &NodeName) -> u64 {
        Snapshot::node(self, node).map_or(0, drumline_cluster::NodeState::cpu_left_milli)
    }

    fn memory_left(&self, node: &NodeName) -> u64 {
        Snapshot::node(self, node).map_or(0, |state| state.memory_left().0)
    }
}
