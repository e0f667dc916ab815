//! The published policies, except fragmentation gradient descent.
//!
//! Each follows the scoring of the paper's public simulator, truncation to whole numbers included:
//! ties decide much, and the first node in the run's order wins them.

use crate::openb::fleet::{Node, affinity};
use crate::openb::input::{Shape, WHOLE};
use crate::openb::policy::{Score, Scorer};

/// The greatest processor time of a node, in thousandths of a core, that scores are scaled by.
const CPU_SCALE: f64 = 128_000.0;
/// The greatest GPU capacity of a node, in thousandths, that scores are scaled by.
const GPU_SCALE: f64 = 8_000.0;

/// Returns the fullest device that still has room for a share; the first of equals.
#[must_use]
pub fn fullest(node: &Node, shape: &Shape) -> u8 {
    if affinity(shape) != Some(0) {
        return 0;
    }
    (0u8..)
        .zip(node.devices())
        .filter(|(_, left)| **left >= shape.gpu_milli)
        .min_by_key(|(_, left)| **left)
        .map_or(0, |(at, _)| at)
}

fn scored(score: i64, node: &Node, shape: &Shape) -> Score {
    Score { value: score as f32, device: fullest(node, shape) }
}

/// The least product of demand and remainder.
#[derive(Debug)]
pub struct DotProd;

impl Scorer for DotProd {
    fn score(&mut self, node: &Node, shape: &Shape) -> Score {
        let cpu = f64::from(node.cpu) / CPU_SCALE * (f64::from(shape.cpu_milli) / CPU_SCALE);
        let gpu = node.gpu_left() as f64 / GPU_SCALE * (shape.gpu_total() as f64 / GPU_SCALE);
        scored((100.0 * (1.0 - (cpu + gpu) / 2.0)) as i64, node, shape)
    }
}

/// Nodes that run pods of the same class, then empty nodes, then the rest.
#[derive(Debug)]
pub struct GpuClustering;

impl Scorer for GpuClustering {
    fn score(&mut self, node: &Node, shape: &Shape) -> Score {
        let Some(class) = affinity(shape) else { return scored(0, node, shape) };
        let classes = node.pods.iter().filter(|&&pods| pods > 0).count();
        let base = match (node.pods[class] > 0, classes) {
            (true, 1) => 75,
            (true, _) => 50,
            (false, 0) => 25,
            (false, _) => 0,
        };
        scored(base + 25 * (GPU_SCALE as i64 - node.gpu_left()) / GPU_SCALE as i64, node, shape)
    }
}

/// GPUs in use first, then free GPUs of a node in use, then empty nodes.
#[derive(Debug)]
pub struct GpuPacking;

impl Scorer for GpuPacking {
    fn score(&mut self, node: &Node, shape: &Shape) -> Score {
        if shape.gpus == 0 {
            return scored(0, node, shape);
        }
        let idle = node.idle() as i64;
        if idle == i64::from(node.gpus) {
            return scored((33 - idle).max(idle), node, shape);
        }
        let mut left: Vec<u16> = node.devices().to_vec();
        left.sort_unstable();
        let used: Vec<i64> = left
            .iter()
            .filter(|&&left| left >= shape.gpu_milli)
            .take(usize::from(shape.gpus))
            .map(|&left| i64::from(left))
            .collect();
        let fresh = used.iter().filter(|&&left| left == i64::from(WHOLE)).count() as i64;
        if fresh > 0 {
            return scored((50 - fresh).max(33), node, shape);
        }
        let percent: i64 = used.iter().map(|left| left * 100 / i64::from(WHOLE)).sum();
        scored((100 - percent / 10).max(50), node, shape)
    }
}

/// The least left over, processor time and GPUs weighed alike.
#[derive(Debug)]
pub struct BestFit;

impl Scorer for BestFit {
    fn score(&mut self, node: &Node, shape: &Shape) -> Score {
        let cpu = f64::from(node.cpu - shape.cpu_milli) / CPU_SCALE * 0.5;
        let gpu = (node.gpu_left() - shape.gpu_total()) as f64 / GPU_SCALE * 0.5;
        scored(((1.0 - (cpu + gpu)) * 100.0) as i64, node, shape)
    }
}
