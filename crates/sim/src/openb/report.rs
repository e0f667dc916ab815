//! What an experiment found, in the shape that `--output json` prints.

use serde::Serialize;

use crate::openb::policy::PolicyName;

/// The result of every policy on one workload.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The workload's name.
    pub workload: String,
    /// Pods in the trace that no node could ever hold, by name. They arrive like the others.
    pub impossible: Vec<String>,
    /// One entry per policy, in the order asked for.
    pub policies: Vec<PolicyReport>,
}

/// The result of one policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicyReport {
    /// The policy.
    pub name: PolicyName,
    /// Allocated GPU over total, in percent: the mean over the seeds.
    pub mean: f64,
    /// The least over the seeds.
    pub min: f64,
    /// The greatest over the seeds.
    pub max: f64,
    /// Time to place the pods of one seed on one core, in seconds: the mean over the seeds.
    pub seconds_per_run: f64,
    /// Time spent beforehand on what is kept for the workload, in seconds.
    pub seconds_learning: f64,
    /// Pods without GPUs that were placed, in percent of those that arrived.
    pub cpu_only_pods_placed: f64,
    /// Cores of pods without GPUs that were placed, in percent of those that arrived.
    pub cpu_only_cores_placed: f64,
    /// Pods that found no place, by size.
    pub failures: Vec<ClassFailures>,
}

/// The pods of one size class over all seeds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassFailures {
    /// `cpu-only`, `share` (part of one GPU) or `N-gpu`.
    pub class: String,
    /// Mean number that arrived in a run.
    pub arrived: f64,
    /// Mean number that found no place in a run.
    pub failed: f64,
}
