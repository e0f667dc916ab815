//! The typical pods: the most frequent shapes of a workload, with their shares.

use crate::openb::input::{Shape, Trace};

/// A shape and the share of pods that have it, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Typical {
    /// What the pod asks for.
    pub shape: Shape,
    /// Its share.
    pub share: f64,
}

/// Returns the most frequent shapes that make up `coverage` (0 to 1) of the pods, the most
/// frequent first, with their shares scaled to sum to 1.
#[must_use]
pub fn typical(trace: &Trace, coverage: f64) -> Vec<Typical> {
    let mut counts = vec![0u32; trace.shapes.len()];
    for pod in &trace.pods {
        counts[pod.shape] += 1;
    }
    let mut order: Vec<usize> = (0..counts.len()).collect();
    let key = |&s: &usize| {
        let shape = trace.shapes[s];
        (counts[s], shape.cpu_milli, shape.gpu_milli, shape.gpus, shape.models)
    };
    order.sort_by_key(|s| std::cmp::Reverse(key(s)));
    let wanted = coverage * trace.pods.len() as f64;
    let mut kept = 0u32;
    let mut list = Vec::new();
    for s in order {
        if f64::from(kept) >= wanted {
            break;
        }
        kept += counts[s];
        list.push(Typical { shape: trace.shapes[s], share: f64::from(counts[s]) });
    }
    for entry in &mut list {
        entry.share /= f64::from(kept);
    }
    list
}
