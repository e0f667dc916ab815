//! What moves a step: each rate of the machines changed by a fifth.

use serde::Serialize;

use super::Candidate;
use crate::error::PlanError;
use crate::model::Model;
use crate::split::{Batch, Machines};

/// How the step answers to one input.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sensitivity {
    /// The input.
    pub input: &'static str,
    /// Change of the step in percent when the input is 20% less.
    pub less_percent: f64,
    /// Change of the step in percent when the input is 20% more.
    pub more_percent: f64,
}

/// Changes each rate of the machines by 20% either way and plans the same split again.
///
/// # Errors
/// As [`crate::step::step_time`].
pub fn sensitivity(
    model: &Model,
    candidate: &Candidate,
    batch: &Batch,
    machines: &Machines,
) -> Result<Vec<Sensitivity>, PlanError> {
    type Change = fn(&mut Machines, f64);
    let inputs: [(&'static str, Change); 6] = [
        ("matrix rate", |m, x| m.gpu.peak_flops.values_mut().for_each(|p| *p *= x)),
        ("memory bandwidth", |m, x| m.gpu.memory_bandwidth *= x),
        ("GPU-to-GPU bandwidth", |m, x| m.gpu.link_bandwidth *= x),
        ("network bandwidth", |m, x| m.network.nic_gbps *= x),
        ("latencies", |m, x| {
            m.network.latency_us *= x;
            m.gpu.calibration.link_latency_us *= x;
            m.gpu.calibration.kernel_overhead_us *= x;
        }),
        ("spread between nodes", |m, x| m.network.straggler *= x),
    ];
    let batch = Batch { global: candidate.global_batch, ..*batch };
    let base = crate::step::step_time(model, &candidate.split, &batch, machines)?.step;
    let mut list = Vec::with_capacity(inputs.len());
    for (input, change) in inputs {
        let at = |factor: f64| -> Result<f64, PlanError> {
            let mut changed = machines.clone();
            change(&mut changed, factor);
            let step = crate::step::step_time(model, &candidate.split, &batch, &changed)?.step;
            Ok(100.0 * (step / base - 1.0))
        };
        list.push(Sensitivity { input, less_percent: at(0.8)?, more_percent: at(1.2)? });
    }
    list.sort_by(|a, b| {
        let reach = |s: &Sensitivity| s.less_percent.abs().max(s.more_percent.abs());
        reach(b).total_cmp(&reach(a))
    });
    Ok(list)
}
