//! Time of collectives by algorithm and link.

use crate::split::Machines;

/// A group of ranks as the network sees it.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// Ranks in the group, g.
    pub size: f64,
    /// Members in one node or fast domain.
    pub per_node: f64,
    /// Achieved bytes/s of each rank round the ring.
    pub bandwidth: f64,
    /// Seconds of latency of one step.
    pub latency: f64,
}

impl Group {
    /// Describes `size` ranks that lie `stride` global ranks apart.
    ///
    /// Inside the fast domain the ring runs at the link's rate. Across nodes a ring crosses each
    /// node's border once, over the adapters of all its members there: `min(link, members x NIC)`.
    #[must_use]
    pub fn new(machines: &Machines, size: u32, stride: u32) -> Self {
        let gpu = &machines.gpu;
        let link = gpu.link_bandwidth * gpu.calibration.link_efficiency;
        let domain = machines.domain();
        if u64::from(size) * u64::from(stride) <= u64::from(domain) || size <= 1 {
            return Self {
                size: f64::from(size),
                per_node: f64::from(size),
                bandwidth: link,
                latency: gpu.calibration.link_latency_us * 1e-6,
            };
        }
        let per_node = f64::from((domain / stride.max(1)).clamp(1, size));
        Self {
            size: f64::from(size),
            per_node,
            bandwidth: (per_node * machines.network.bandwidth()).min(link),
            latency: machines.network.latency_us * 1e-6,
        }
    }

    /// Returns the time to gather `bytes` in all on every rank: ring, `(g-1)/g bytes / bw`.
    ///
    /// `bytes` is the size of the gathered whole. A reduce-scatter costs the same.
    #[must_use]
    pub fn all_gather(&self, bytes: f64) -> f64 {
        if self.size <= 1.0 || bytes <= 0.0 {
            return 0.0;
        }
        let steps = self.size - 1.0;
        let ring = steps / self.size * bytes / self.bandwidth + self.ring_latency(steps);
        let tree = bytes / self.bandwidth + self.size.log2().ceil() * self.latency;
        ring.min(tree)
    }

    /// Returns the time to sum `bytes` over all ranks: the better of ring, `2 (g-1)/g bytes / bw`,
    /// and double tree, `2 bytes / bw` with logarithmic latency.
    #[must_use]
    pub fn all_reduce(&self, bytes: f64) -> f64 {
        if self.size <= 1.0 || bytes <= 0.0 {
            return 0.0;
        }
        let steps = 2.0 * (self.size - 1.0);
        let ring = steps / self.size * bytes / self.bandwidth + self.ring_latency(steps);
        let tree = 2.0 * bytes / self.bandwidth + 2.0 * self.size.log2().ceil() * self.latency;
        ring.min(tree)
    }

    // Steps between members of one node cost a fraction of a network step.
    fn ring_latency(&self, steps: f64) -> f64 {
        steps * self.latency / self.per_node.max(1.0)
    }

    /// Returns the time for each rank to send `bytes` in all, evenly to every rank: the share that
    /// leaves the node, `(g - k)/g`, goes through the rank's own adapter.
    #[must_use]
    pub fn all_to_all(&self, bytes: f64, machines: &Machines) -> f64 {
        if self.size <= 1.0 || bytes <= 0.0 {
            return 0.0;
        }
        let gpu = &machines.gpu;
        let link = gpu.link_bandwidth * gpu.calibration.link_efficiency;
        let inside = (self.per_node - 1.0).max(0.0) / self.size * bytes / link;
        let outside = if self.per_node < self.size {
            (self.size - self.per_node) / self.size * bytes / machines.network.bandwidth().max(1.0)
        } else {
            0.0
        };
        inside.max(outside) + self.latency * (self.size.log2().ceil() + 1.0)
    }

    /// Returns the time to send `bytes` from one rank to the next.
    #[must_use]
    pub fn send(&self, bytes: f64) -> f64 {
        if self.size <= 1.0 || bytes <= 0.0 { 0.0 } else { bytes / self.bandwidth + self.latency }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;

    fn machines() -> Machines {
        let catalogue = Catalogue::builtin();
        Machines {
            gpu: catalogue.gpu("a100-80g").unwrap(),
            network: catalogue.network("hdr-8x200").unwrap(),
        }
    }

    #[test]
    fn a_ring_inside_a_node_moves_twice_seven_eighths() {
        let machines = machines();
        let group = Group::new(&machines, 8, 1);
        let bandwidth = 300e9 * machines.gpu.calibration.link_efficiency;
        let by_hand = 2.0 * 7.0 / 8.0 * 1e9 / bandwidth + 14.0 * group.latency / 8.0;
        assert!((group.all_reduce(1e9) / by_hand - 1.0).abs() < 1e-12);
        assert!((group.all_gather(1e9) - group.all_reduce(1e9) / 2.0).abs() < 1e-12);
    }

    #[test]
    fn a_group_with_one_member_per_node_has_one_adapter() {
        let machines = machines();
        let group = Group::new(&machines, 16, 8);
        assert_eq!(group.bandwidth, machines.network.bandwidth());
        // All eight of each node: the node's eight adapters, up to the link.
        let all = Group::new(&machines, 128, 1);
        assert_eq!(all.bandwidth, 8.0 * machines.network.bandwidth());
    }

    #[test]
    fn small_messages_take_the_tree() {
        let machines = machines();
        let group = Group::new(&machines, 1024, 8);
        let ring_latency = 2.0 * 1023.0 * group.latency;
        assert!(group.all_reduce(1024.0) < ring_latency / 10.0);
    }
}
