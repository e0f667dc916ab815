//! The nodes while pods arrive: what is left on each.

use crate::openb::input::{GPUS_MAX, Shape, Trace, WHOLE};
use crate::openb::rng::Rng;

/// What is left on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Processor time left, in thousandths of a core.
    pub cpu: i32,
    /// Memory left, in MiB.
    pub memory: i32,
    /// Thousandths left of each GPU; 0 beyond the node's GPUs.
    pub gpu: [u16; GPUS_MAX],
    /// Number of GPUs.
    pub gpus: u8,
    /// Bit of its GPU model.
    pub model: u32,
    /// Pods on it by [`affinity`].
    pub pods: [u16; GPUS_MAX + 1],
    /// Kept whole, if there is a choice, for a pod that needs all its GPUs and this processor time,
    /// in thousandths of a core; [`NOT_KEPT`] when it is not.
    pub kept_for: i32,
}

/// The value of [`Node::kept_for`] of a node that is kept for nothing.
pub const NOT_KEPT: i32 = -1;

/// Returns the class of a pod for affinity: 0 for a share of one GPU, else its number of GPUs.
/// `None` for a pod without GPUs.
#[must_use]
pub fn affinity(shape: &Shape) -> Option<usize> {
    match (shape.gpus, shape.gpu_milli) {
        (0, _) => None,
        (1, milli) if milli < WHOLE => Some(0),
        (gpus, _) => Some(usize::from(gpus)),
    }
}

impl Node {
    /// Returns the devices of this node.
    #[must_use]
    pub fn devices(&self) -> &[u16] {
        &self.gpu[..usize::from(self.gpus)]
    }

    /// Returns the thousandths of a GPU that are left in all.
    #[must_use]
    pub fn gpu_left(&self) -> i64 {
        self.devices().iter().map(|&left| i64::from(left)).sum()
    }

    /// Returns the number of GPUs that nothing runs on.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.devices().iter().filter(|&&left| left == WHOLE).count()
    }

    /// Returns whether this node is kept for a whole-node pod, and would still hold it.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.kept_for >= 0 && self.cpu >= self.kept_for && self.idle() == usize::from(self.gpus)
    }

    /// Returns whether a pod of this shape fits, memory aside.
    #[must_use]
    pub fn fits(&self, shape: &Shape) -> bool {
        self.cpu >= shape.cpu_milli
            && (shape.gpus == 0
                || (shape.models & self.model != 0
                    && self.devices().iter().filter(|&&left| left >= shape.gpu_milli).count()
                        >= usize::from(shape.gpus)))
    }

    /// Takes what a pod asks for. A share of one GPU comes from `device`; otherwise the first
    /// devices with enough left are taken.
    pub fn take(&mut self, shape: &Shape, memory: i32, device: usize) {
        self.cpu -= shape.cpu_milli;
        self.memory -= memory;
        let Some(class) = affinity(shape) else { return };
        self.pods[class] += 1;
        if class == 0 {
            self.gpu[device] -= shape.gpu_milli;
            return;
        }
        let mut wanted = shape.gpus;
        for left in &mut self.gpu[..usize::from(self.gpus)] {
            if wanted > 0 && *left >= shape.gpu_milli {
                *left -= shape.gpu_milli;
                wanted -= 1;
            }
        }
        debug_assert_eq!(wanted, 0, "the caller checked that it fits");
    }
}

/// Returns the empty nodes of a trace in an order drawn from `rng`; among equals the first wins.
#[must_use]
pub fn empty_nodes(trace: &Trace, rng: &mut Rng) -> Vec<Node> {
    let mut nodes: Vec<Node> = trace
        .nodes
        .iter()
        .map(|row| {
            let mut gpu = [0; GPUS_MAX];
            gpu[..usize::from(row.gpus)].fill(WHOLE);
            Node {
                cpu: row.cpu_milli,
                memory: row.memory_mib,
                gpu,
                gpus: row.gpus,
                model: 1 << row.model,
                pods: [0; GPUS_MAX + 1],
                kept_for: NOT_KEPT,
            }
        })
        .collect();
    rng.shuffle(&mut nodes);
    nodes
}
