//! What the tests of the simulator share: small workloads, and someone who looks on and audits.

#![allow(dead_code, unreachable_pub)]

use std::sync::atomic::AtomicBool;

use drumline_audit::Auditor;
use drumline_cluster::Change;
use drumline_placement::Cycle;
use drumline_scheduler::Scheduler;
use drumline_sim::world::Nobody;
use drumline_sim::{Limits, Observer, Policy, PolicyReport, Scenario, SimError, Workload, run};
use drumline_types::{DeviceId, Timestamp};

/// Reads a workload that must be legal.
pub fn workload(text: &str) -> Workload {
    Workload::read("test.toml", text).unwrap_or_else(|fault| panic!("{fault}\n{text}"))
}

/// Runs a scenario to its end.
pub fn play(scenario: &Scenario, policy: &str, observer: &mut dyn Observer) -> PolicyReport {
    try_play(scenario, policy, observer).unwrap_or_else(|error| panic!("{policy}: {error}"))
}

/// Runs a scenario to its end.
pub fn try_play(
    scenario: &Scenario,
    policy: &str,
    observer: &mut dyn Observer,
) -> Result<PolicyReport, SimError> {
    let stop = AtomicBool::new(false);
    let mut progress = |_: &drumline_sim::Status| {};
    let mut limits = Limits { stop: &stop, progress: &mut progress };
    let policy = Policy::named(policy, scenario.seed).unwrap();
    let mut report = run(scenario, &policy, observer, &mut limits)?;
    report.seconds = 0.0;
    Ok(report)
}

/// Runs a workload without anyone looking on.
pub fn simulate(text: &str, policy: &str, seed: u64) -> PolicyReport {
    play(&Scenario::of(&workload(text), seed), policy, &mut Nobody)
}

/// Audits what every cycle starts, with books of its own.
#[derive(Default)]
pub struct Audit {
    auditor: Auditor,
    /// Cycles that were checked.
    pub checked: u64,
    /// Gangs that started.
    pub starts: u64,
}

impl Observer for Audit {
    fn changed(&mut self, change: &Change, _: Timestamp) -> Result<(), String> {
        self.auditor.apply(change);
        Ok(())
    }

    fn decided(&mut self, scheduler: &Scheduler, cycle: &Cycle) -> Result<(), String> {
        let fleet = scheduler.fleet();
        let kept = |device: &DeviceId| fleet.node(&device.node)?.reserved(device.index).cloned();
        self.auditor.check(cycle, kept).map_err(|violations| {
            let all: Vec<String> = violations.iter().map(ToString::to_string).collect();
            format!("the audit refuses the cycle: {}", all.join("; "))
        })?;
        self.checked += 1;
        self.starts += cycle.plan.jobs.len() as u64;
        Ok(())
    }
}
