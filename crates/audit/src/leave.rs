//! The rules for those who are asked to leave.

use std::collections::{BTreeMap, BTreeSet};

use drumline_cluster::{Health, Node};
use drumline_placement::{Cycle, Eviction, EvictionCause};
use drumline_spec::{Gang, WHOLE_DEVICE};
use drumline_types::{DeviceId, JobId, Timestamp};

use crate::books::Books;
use crate::gang::may_have;
use crate::ledger::{Entry, Ledger, Standing};
use crate::quota::{Charge, Quota};
use crate::spares::{lost, may_borrow};
use crate::violation::Violation;

/// Says for whom a device is kept.
pub(crate) type Kept<'k> = dyn Fn(&DeviceId) -> Option<JobId> + 'k;

/// Checks every eviction of a cycle.
pub(crate) fn check_evictions(
    ledger: &Ledger,
    cycle: &Cycle,
    kept: &Kept<'_>,
    found: &mut Vec<Violation>,
) {
    if cycle.evictions.is_empty() {
        return;
    }
    let mut seen: BTreeSet<&JobId> = BTreeSet::new();
    let starts: BTreeSet<&JobId> = cycle.plan.jobs.iter().map(|job| &job.job).collect();
    let quota = Quota::new(ledger);
    let mut idle: BTreeMap<&JobId, bool> = BTreeMap::new();
    for eviction in &cycle.evictions {
        let refuse =
            |why: &str| Violation::MayNotLeave { job: eviction.job.clone(), why: why.to_owned() };
        if !seen.insert(&eviction.job) {
            found.push(refuse("is named twice"));
            continue;
        }
        let entry = ledger.jobs.get(&eviction.job);
        let Some((entry, devices)) = entry.and_then(|entry| match &entry.standing {
            Standing::Placed { devices, .. } => Some((entry, devices)),
            Standing::Waiting { .. } => None,
        }) else {
            found.push(refuse("holds no devices"));
            continue;
        };
        if let Some(why) = may_not(entry, eviction, cycle.now) {
            found.push(refuse(&why));
        }
        if let Some(why) = needless(ledger, &quota, eviction, entry, devices, &starts, kept) {
            found.push(why);
            continue;
        }
        // That the beneficiary has room without anybody leaving is found once for all its victims.
        // Where a limit may be what it lacks, free devices show nothing.
        if let Some(id) = &eviction.beneficiary
            && let Some(beneficiary) = ledger.jobs.get(id)
            && !limited(ledger, &quota, &beneficiary.request.settings.queue)
            && *idle.entry(id).or_insert_with(|| fits_idle(ledger, cycle, beneficiary, kept))
        {
            found.push(Violation::NeedlessVictim {
                job: eviction.job.clone(),
                beneficiary: id.to_string(),
                why: "it fits on devices that are free".to_owned(),
            });
        }
    }
}

fn may_not(entry: &Entry, eviction: &Eviction, now: Timestamp) -> Option<String> {
    let Standing::Placed { started, leaving, .. } = &entry.standing else { return None };
    if entry.attempt != eviction.attempt {
        return Some(format!("runs attempt {}, not {}", entry.attempt, eviction.attempt));
    }
    if *leaving {
        return Some("was asked before".to_owned());
    }
    if let Some(size) = eviction.resize_to
        && !legal_size(&entry.request.gang, size)
    {
        return Some(format!("cannot have {size} ranks"));
    }
    let settings = &entry.request.settings;
    match eviction.cause {
        // An emptied node asks nobody, and who changes its size gains by it.
        EvictionCause::Drained | EvictionCause::Resized => return None,
        EvictionCause::Preempted
        | EvictionCause::Reclaimed
        | EvictionCause::Recalled
        | EvictionCause::Consolidated => {}
    }
    if !settings.preemptible {
        return Some("is not preemptible".to_owned());
    }
    if started.0.saturating_add(settings.min_runtime_ms) > now.0 {
        return Some(format!("has not run for {} ms yet", settings.min_runtime_ms));
    }
    let budget = settings.disruptions?;
    let recent = entry.disrupted.iter().filter(|at| now.since_ms(**at) < budget.per_ms).count();
    (recent >= budget.count as usize)
        .then(|| format!("was disrupted {recent} times in {} ms", budget.per_ms))
}

/// Returns whether a gang may run at a size.
pub(crate) fn legal_size(gang: &Gang, ranks: u32) -> bool {
    let Some(elastic) = gang.elastic else { return ranks == gang.ranks };
    let whole = ranks.is_multiple_of(elastic.step.max(1)) || ranks == elastic.least;
    ranks == gang.ranks || (whole && (elastic.least.max(1)..=elastic.most).contains(&ranks))
}

fn needless(
    ledger: &Ledger,
    quota: &Quota<'_>,
    eviction: &Eviction,
    entry: &Entry,
    devices: &[DeviceId],
    starts: &BTreeSet<&JobId>,
    kept: &Kept<'_>,
) -> Option<Violation> {
    let told = |why: String| {
        Some(Violation::NeedlessVictim {
            job: eviction.job.clone(),
            beneficiary: eviction.beneficiary.as_ref().map_or("nobody", JobId::as_str).to_owned(),
            why,
        })
    };
    match eviction.cause {
        EvictionCause::Drained | EvictionCause::Resized => return None,
        EvictionCause::Preempted
        | EvictionCause::Reclaimed
        | EvictionCause::Recalled
        | EvictionCause::Consolidated => {}
    }
    let Some(id) = &eviction.beneficiary else {
        return told("no job gets its devices".to_owned());
    };
    let Some(gains) = ledger.jobs.get(id) else {
        return told("that job is not known".to_owned());
    };
    if starts.contains(id) {
        return told("that job starts without its devices".to_owned());
    }
    if let Standing::Placed { devices, .. } = &gains.standing {
        let recalls = eviction.cause == EvictionCause::Recalled;
        if !recalls || !devices.iter().any(|device| lost(ledger, device)) {
            return told("that job holds devices already".to_owned());
        }
    }
    let (victim, gains) = (&entry.request, &gains.request);
    let (own, other) = (&victim.settings.queue, &gains.settings.queue);
    let outranked = victim.settings.priority < gains.settings.priority;
    match eviction.cause {
        EvictionCause::Preempted if !outranked => {
            return told("its priority is not lower".to_owned());
        }
        EvictionCause::Recalled if !may_borrow(entry, ledger.jobs.get(id)) => {
            return told("no device could have been lent to it".to_owned());
        }
        EvictionCause::Reclaimed if own == other => {
            return told("both are in the same queue".to_owned());
        }
        EvictionCause::Reclaimed => {
            let shared: Vec<_> = quota.path(other).iter().map(|queue| &queue.name).collect();
            let Standing::Placed { charge, .. } = &entry.standing else { return None };
            let theirs = quota.path(own);
            let within = theirs.iter().filter(|queue| !shared.contains(&&queue.name)).find(|q| {
                charge.iter().all(|(kind, model, _)| quota.within_quota(q, *kind, model))
            });
            if let Some(within) = within {
                return told(format!("queue {} has borrowed nothing", within.name));
            }
        }
        _ => {}
    }
    // Its devices are kept for the beneficiary, unless what was short is quota.
    let recalled = eviction.cause == EvictionCause::Recalled;
    let limited = !recalled && limited(ledger, quota, other);
    let used = devices.iter().any(|device| kept(device).as_ref() == Some(id));
    if !used && !limited {
        return told("none of its devices is kept for that job".to_owned());
    }
    None
}

/// Returns whether jobs of a queue may lack quota while devices are free.
fn limited(ledger: &Ledger, quota: &Quota<'_>, queue: &drumline_types::QueueName) -> bool {
    ledger.queues.values().any(|queue| queue.lending_limit.is_some())
        || quota.path(queue).iter().any(|queue| queue.borrowing_limit.is_some())
}

/// Returns whether a job surely fits on what nobody holds, once this cycle's starts have theirs.
/// Gangs with leaders or with runs of ranks are not looked at: for them counting shows nothing.
fn fits_idle(ledger: &Ledger, cycle: &Cycle, job: &Entry, kept: &Kept<'_>) -> bool {
    let (gang, id) = (&job.request.gang, &job.request.job);
    if gang.leader.is_some() || gang.topology.iter().any(|rule| rule.required && rule.ranks > 0) {
        return false;
    }
    let need = u64::from(gang.elastic.map_or(gang.ranks, |elastic| elastic.least.max(1)));
    let given: BTreeSet<&DeviceId> =
        cycle.plan.jobs.iter().flat_map(|job| &job.assignments).map(|a| &a.device).collect();
    let mut rooms: BTreeMap<(String, Vec<String>), (u64, u64)> = BTreeMap::new();
    for machine in ledger.machines.values() {
        let Some(node) = &machine.node else { continue };
        if machine.held.len() >= node.devices.len()
            || node.ineligible_for(&gang.tolerations).is_some()
        {
            continue;
        }
        let Some(domain) = home(node, gang) else { continue };
        let mut free: BTreeMap<&str, u64> = BTreeMap::new();
        for (index, device) in (0u32..).zip(&node.devices) {
            let id_here = DeviceId { node: node.name.clone(), index };
            let wanted = device.kind == gang.device
                && device.health == Health::Healthy
                && may_have(gang, &device.model);
            if wanted
                && ledger.left_milli(&id_here) == WHOLE_DEVICE
                && !given.contains(&id_here)
                && kept(&id_here).is_none_or(|keeper| keeper == *id)
            {
                *free.entry(&device.model).or_default() += 1;
            }
        }
        let cpu = ledger.cpu_left_milli(&node.name).checked_div(gang.cpu_milli);
        let memory = ledger.memory_left(&node.name).checked_div(gang.memory.0);
        let most = cpu.unwrap_or(u64::MAX).min(memory.unwrap_or(u64::MAX));
        let group = u64::from(gang.node_group.max(1));
        for (model, devices) in free {
            let ranks = devices.min(most);
            let room = rooms.entry((model.to_owned(), domain.clone())).or_default();
            room.0 += ranks / group;
            room.1 = room.1.max(ranks % group);
        }
    }
    let group = u64::from(gang.node_group.max(1));
    let holds = |(full, tail): &(u64, u64)| {
        full * group + tail >= need
            && (*full >= need.div_ceil(group) || (*full == need / group && *tail >= need % group))
    };
    // Devices that this cycle's other starts need beside theirs are not counted: only whole ones.
    let fits = gang.cpu_milli == 0 && gang.memory.0 == 0 || cycle.plan.jobs.is_empty();
    if !fits || !rooms.values().any(holds) {
        return false;
    }
    let mut quota = Quota::new(ledger);
    for start in &cycle.plan.jobs {
        if let Some(entry) = ledger.jobs.get(&start.job) {
            let devices: Vec<&DeviceId> = start.assignments.iter().map(|a| &a.device).collect();
            let charge = crate::auditor::charge(ledger, &entry.request.gang, &devices);
            quota.add(&entry.request.settings.queue, &charge);
        }
    }
    let model = rooms.iter().find(|(_, room)| holds(room)).map(|((model, _), _)| model.clone());
    let share = u64::from(gang.share_milli) * need;
    let charge: Charge = [((gang.device, model.unwrap_or_default()), share)].into();
    quota.add(&job.request.settings.queue, &charge);
    quota.broken().is_empty() && quota.closed(&job.request.settings.queue).is_none()
}

/// Returns the domain that all of a gang must be in, as names; `None`: the node is in none.
fn home(node: &Node, gang: &Gang) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for rule in gang.topology.iter().filter(|rule| rule.required) {
        if rule.level == "node" {
            names.push(node.name.to_string());
            continue;
        }
        let depth = node.topology.iter().position(|domain| domain.level == rule.level)?;
        names.extend(node.topology[..=depth].iter().map(|domain| domain.name.clone()));
        names.push(String::new());
    }
    Some(names)
}
