//! The rules for devices that are kept ready beside a gang, and lent meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use drumline_cluster::Health;
use drumline_placement::Cycle;
use drumline_spec::Gang;
use drumline_types::{DeviceId, JobId};

use crate::books::Books;
use crate::gang::domain;
use crate::ledger::{Entry, Ledger, Standing};
use crate::violation::Violation;

/// Returns whether a device that a job holds can be used no more.
pub(crate) fn lost(ledger: &Ledger, device: &DeviceId) -> bool {
    let known = ledger.node(&device.node).and_then(|node| node.devices.get(device.index as usize));
    known.is_none_or(|device| device.health != Health::Healthy)
}

/// Returns whether a job may run on the spares of another: the other has asked for some and does
/// not stand behind it, and the job can be ended at once.
pub(crate) fn may_borrow(borrower: &Entry, owner: Option<&Entry>) -> bool {
    let settings = &borrower.request.settings;
    let at_once =
        settings.preemptible && settings.min_runtime_ms == 0 && settings.disruptions.is_none();
    owner.is_some_and(|owner| {
        at_once
            && owner.request.gang.spares > 0
            && settings.priority <= owner.request.settings.priority
    })
}

/// Checks every device that is kept ready after a cycle.
pub(crate) fn check_spares(
    ledger: &Ledger,
    cycle: &Cycle,
    kept: &dyn Fn(&DeviceId) -> Option<JobId>,
    found: &mut Vec<Violation>,
) {
    if cycle.spares.is_empty() {
        return;
    }
    let mut starts: BTreeMap<&DeviceId, &JobId> = BTreeMap::new();
    let mut places: BTreeMap<&JobId, Vec<&DeviceId>> = BTreeMap::new();
    for job in &cycle.plan.jobs {
        let devices = job.assignments.iter().map(|assignment| &assignment.device);
        starts.extend(devices.clone().map(|device| (device, &job.job)));
        places.insert(&job.job, devices.collect());
    }
    let mut seen: BTreeSet<&DeviceId> = BTreeSet::new();
    for spares in &cycle.spares {
        let wrong =
            |why: &str| Violation::WrongSpares { job: spares.job.clone(), why: why.to_owned() };
        let Some(owner) = ledger.jobs.get(&spares.job) else {
            found.push(Violation::UnknownJob { job: spares.job.clone() });
            continue;
        };
        let held: Vec<&DeviceId> = match (&owner.standing, places.get(&spares.job)) {
            (_, Some(devices)) => devices.clone(),
            (Standing::Placed { devices, .. }, None) => devices.iter().collect(),
            (Standing::Waiting { .. }, None) => {
                found.push(wrong("it holds no devices that they could replace"));
                continue;
            }
        };
        if spares.devices.len() > owner.request.gang.spares as usize {
            found.push(wrong("they are more than it asked for"));
        }
        for device in &spares.devices {
            if !seen.insert(device) {
                found.push(wrong("a device is kept twice"));
            }
            if kept(device).as_ref() != Some(&spares.job) {
                found.push(wrong("a device is not kept for it"));
            }
            if held.contains(&device) {
                found.push(wrong("it holds one of them itself"));
            }
            let holder = starts.get(device).map(|job| JobId::clone(job));
            let holder = holder.or_else(|| ledger.holder(device));
            let lent = holder.as_ref().filter(|holder| **holder != spares.job);
            if lent
                .is_some_and(|to| ledger.jobs.get(to).is_none_or(|to| !may_borrow(to, Some(owner))))
            {
                found.push(wrong("one is lent to a job that cannot be ended at once for it"));
            }
            if let Some(why) = unfit(ledger, &owner.request.gang, &held, device) {
                found.push(wrong(why));
            }
        }
    }
}

/// Returns why a device could not replace one of those that a gang holds.
fn unfit(
    ledger: &Ledger,
    gang: &Gang,
    held: &[&DeviceId],
    device: &DeviceId,
) -> Option<&'static str> {
    let Some(node) = ledger.node(&device.node) else { return Some("a node of theirs is gone") };
    let Some(known) = node.devices.get(device.index as usize) else {
        return Some("one of them does not exist");
    };
    if known.health != Health::Healthy || node.ineligible_for(&gang.tolerations).is_some() {
        return Some("one of them cannot be used");
    }
    let worker = held.get(usize::from(gang.leader.is_some())).or(held.first())?;
    let home = ledger.node(&worker.node)?;
    if let Some(model) = home.devices.get(worker.index as usize)
        && (model.kind, &model.model) != (known.kind, &known.model)
    {
        return Some("one of them is of another model");
    }
    let apart = gang
        .topology
        .iter()
        .filter(|rule| rule.required && rule.ranks == 0 && rule.level != "node")
        .any(|rule| domain(home, &rule.level) != domain(node, &rule.level));
    apart.then_some("one of them is outside the domain that the gang must be in")
}
