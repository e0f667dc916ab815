//! The rules for one gang's ranks and devices.

use std::collections::BTreeMap;

use drumline_cluster::{Health, Node};
use drumline_placement::{Assignment, JobPlan};
use drumline_spec::{DeviceKind, Gang, WHOLE_DEVICE};
use drumline_types::{DeviceId, JobId, NodeName, RankIndex};

use crate::books::Books;
use crate::violation::Violation;

/// What the plan has given out so far.
#[derive(Debug, Default)]
pub(crate) struct Given<'p> {
    devices: BTreeMap<&'p DeviceId, (&'p JobId, u32)>,
    nodes: BTreeMap<&'p NodeName, (u64, u64)>,
}

/// Checks where a job's ranks are against the gang that it asked for, and counts them as given.
pub(crate) fn check_gang<'p>(
    books: &dyn Books,
    plan: &'p JobPlan,
    gang: &Gang,
    given: &mut Given<'p>,
    found: &mut Vec<Violation>,
) {
    check_ranks(plan, found);
    check_split(plan, found);
    check_together(books, plan, gang, found);
    let mut model: Option<&str> = None;
    let mut there: BTreeMap<&NodeName, u64> = BTreeMap::new();
    for assignment in &plan.assignments {
        let leads = gang.leader.filter(|_| assignment.rank == RankIndex(0));
        *there.entry(&assignment.device.node).or_default() += 1;
        let Some((node, device)) = find(books, plan, &assignment.device, found) else { continue };
        let (id, job) = (&assignment.device, &plan.job);
        let kind = leads.unwrap_or(gang.device);
        if device.kind != kind {
            let (device, job, got) = (id.clone(), job.clone(), device.kind);
            found.push(Violation::WrongKind { device, job, needs: kind, got });
        } else if leads.is_none() {
            check_model(plan, gang, id, &device.model, &mut model, found);
        }
        if let Health::Failed(evidence) = &device.health {
            let (device, job, evidence) = (id.clone(), job.clone(), evidence.clone());
            found.push(Violation::DeviceFailed { device, job, evidence });
        }
        if let Some(cause) = node.ineligible_for(&gang.tolerations) {
            let (node, job) = (node.name.clone(), job.clone());
            found.push(Violation::NodeIneligible { node, job, cause });
        }
        take(books, plan, gang, id, given, found);
    }
    for (node, ranks) in there {
        take_beside(books, plan, gang, (node, ranks), given, found);
    }
}

fn check_ranks(plan: &JobPlan, found: &mut Vec<Violation>) {
    let got: Vec<RankIndex> = plan.assignments.iter().map(|a| a.rank).collect();
    let whole = got.len() == plan.gang.ranks as usize
        && got.iter().enumerate().all(|(place, rank)| rank.0 as usize == place);
    if !whole || got.is_empty() {
        found.push(Violation::GangNotWhole { job: plan.job.clone(), needs: plan.gang.ranks, got });
    }
}

fn check_split(plan: &JobPlan, found: &mut Vec<Violation>) {
    let split = plan.split;
    let world = u64::from(split.tensor) * u64::from(split.pipeline) * u64::from(split.data);
    if world != u64::from(plan.gang.ranks) {
        found.push(Violation::SplitDisagrees {
            job: plan.job.clone(),
            ranks: plan.gang.ranks,
            tensor: split.tensor,
            pipeline: split.pipeline,
            data: split.data,
        });
        return;
    }
    // Counts through the mesh, tensor innermost, instead of computing each rank's place.
    let (mut tensor, mut pipeline, mut data) = (0, 0, 0);
    for assignment in &plan.assignments {
        let coords = assignment.coords;
        if (coords.tensor, coords.pipeline, coords.data) != (tensor, pipeline, data) {
            let (job, rank) = (plan.job.clone(), assignment.rank);
            found.push(Violation::WrongCoordinates { job, rank });
        }
        tensor += 1;
        if tensor == split.tensor {
            tensor = 0;
            pipeline += 1;
        }
        if pipeline == split.pipeline {
            pipeline = 0;
            data += 1;
        }
    }
}

/// Checks that groups share nodes and that required runs share domains. Groups and runs are
/// counted from the first worker; a rule for the whole gang binds its leader too.
fn check_together(books: &dyn Books, plan: &JobPlan, gang: &Gang, found: &mut Vec<Violation>) {
    let workers =
        &plan.assignments[usize::from(gang.leader.is_some()).min(plan.assignments.len())..];
    let group = gang.node_group.max(1) as usize;
    for group in workers.chunks(group) {
        let Some((first, rest)) = group.split_first() else { continue };
        for other in rest.iter().filter(|other| other.device.node != first.device.node) {
            found.push(Violation::GroupSplit {
                job: plan.job.clone(),
                first: first.rank,
                rank: other.rank,
                there: first.device.node.clone(),
                here: other.device.node.clone(),
            });
        }
    }
    for rule in gang.topology.iter().filter(|rule| rule.required) {
        let runs: Vec<&[Assignment]> = match rule.ranks {
            0 => vec![&plan.assignments],
            run => workers.chunks(run as usize).collect(),
        };
        for run in runs {
            check_run(books, plan, &rule.level, run, found);
        }
    }
}

fn check_run(
    books: &dyn Books,
    plan: &JobPlan,
    level: &str,
    run: &[Assignment],
    found: &mut Vec<Violation>,
) {
    let Some((first, rest)) = run.split_first() else { return };
    let home = books.node(&first.device.node);
    let broken = |rank| {
        let (job, level) = (plan.job.clone(), level.to_owned());
        Violation::TopologyBroken { job, level, first: first.rank, rank }
    };
    if level != "node" && home.is_some_and(|home| domain(home, level).is_none()) {
        found.push(broken(first.rank));
        return;
    }
    let mut last = &first.device.node;
    for other in rest {
        if other.device.node == *last {
            continue;
        }
        last = &other.device.node;
        let same = match (home, books.node(last)) {
            (Some(a), Some(b)) if level == "node" => a.name == b.name,
            (Some(a), Some(b)) => domain(a, level) == domain(b, level),
            // A node that does not exist is told of elsewhere.
            _ => continue,
        };
        if !same {
            found.push(broken(other.rank));
        }
    }
}

/// Returns the names on the way to a node's domain of a level.
pub(crate) fn domain<'n>(node: &'n Node, level: &str) -> Option<Vec<&'n str>> {
    let depth = node.topology.iter().position(|domain| domain.level == level)?;
    Some(node.topology[..=depth].iter().map(|domain| domain.name.as_str()).collect())
}

fn find<'b>(
    books: &'b dyn Books,
    plan: &JobPlan,
    id: &DeviceId,
    found: &mut Vec<Violation>,
) -> Option<(&'b Node, &'b drumline_cluster::Device)> {
    let node = books.node(&id.node);
    let there = node.and_then(|node| Some((node, node.devices.get(id.index as usize)?)));
    if there.is_none() {
        let (device, job) = (id.clone(), plan.job.clone());
        found.push(Violation::NoSuchDevice { device, job });
    }
    there
}

fn check_model<'b>(
    plan: &JobPlan,
    gang: &Gang,
    id: &DeviceId,
    got: &'b str,
    model: &mut Option<&'b str>,
    found: &mut Vec<Violation>,
) {
    let first = *model.get_or_insert(got);
    if first != got {
        let (job, first, other) = (plan.job.clone(), first.to_owned(), got.to_owned());
        found.push(Violation::MixedModels { job, first, other });
    } else if !may_have(gang, got) {
        let wanted = match gang.models.as_slice() {
            [] => "a whole device".to_owned(),
            models => models.join(" or "),
        };
        let (device, job, got) = (id.clone(), plan.job.clone(), got.to_owned());
        found.push(Violation::WrongModel { device, job, got, wanted });
    }
}

/// Returns whether a gang may get a model: one of those that it names, else any that is whole.
pub(crate) fn may_have(gang: &Gang, model: &str) -> bool {
    if gang.models.is_empty() {
        return !is_instance(model);
    }
    gang.models.iter().any(|name| is_called(model, name))
}

/// Returns whether a model is a part of a GPU that MIG divides, such as `A100 MIG 1g.5gb`.
fn is_instance(model: &str) -> bool {
    let lower = model.to_lowercase();
    let mut before = "";
    lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).any(|word| {
        let is_profile = is_slices(before)
            && word.strip_suffix("gb").is_some_and(|size| size.parse::<u32>().is_ok());
        before = word;
        word == "mig" || is_profile
    })
}

/// Returns whether a word says how many slices of a GPU there are, as `1g`.
fn is_slices(word: &str) -> bool {
    matches!(word.as_bytes(), [digit, b'g'] if digit.is_ascii_digit())
}

/// Returns whether `name` may stand for a maker's model: the same, or every word of it is there; and
/// for a part of a GPU only if it says so.
pub(crate) fn is_called(model: &str, name: &str) -> bool {
    let lower = model.to_lowercase();
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_alphanumeric()).map(str::to_owned).collect()
    };
    let there = words(&lower);
    let mut asked = words(&name.to_lowercase());
    asked.retain(|word| !word.is_empty());
    if is_instance(model) && !asked.iter().any(|word| word == "mig" || is_slices(word)) {
        return false;
    }
    lower == name.to_lowercase()
        || (!asked.is_empty() && asked.iter().all(|word| there.contains(word)))
}

fn take<'p>(
    books: &dyn Books,
    plan: &'p JobPlan,
    gang: &Gang,
    id: &'p DeviceId,
    given: &mut Given<'p>,
    found: &mut Vec<Violation>,
) {
    let asks = gang.share_milli;
    let (device, job) = (id.clone(), plan.job.clone());
    let left = books.left_milli(id);
    let entry = given.devices.entry(id).or_insert((&plan.job, 0));
    let before = entry.1;
    entry.1 = before.saturating_add(asks);
    if entry.1 <= left && asks > 0 {
        return;
    }
    let holder = books.holder(id);
    found.push(match holder {
        _ if before > 0 && asks == WHOLE_DEVICE => {
            Violation::DeviceTwice { device, first: entry.0.clone(), second: job }
        }
        Some(holder) if asks == WHOLE_DEVICE => Violation::DeviceHeld { device, job, holder },
        _ => {
            let left = left.saturating_sub(before);
            Violation::DeviceOverfull { device, job, asks, left }
        }
    });
}

fn take_beside<'p>(
    books: &dyn Books,
    plan: &'p JobPlan,
    gang: &Gang,
    (node, ranks): (&'p NodeName, u64),
    given: &mut Given<'p>,
    found: &mut Vec<Violation>,
) {
    if gang.cpu_milli == 0 && gang.memory.0 == 0 || books.node(node).is_none() {
        return;
    }
    let (cpu, memory) = given.nodes.entry(node).or_default();
    let asks = ranks.saturating_mul(gang.cpu_milli);
    let left = books.cpu_left_milli(node).saturating_sub(*cpu);
    if asks > left {
        let (node, job) = (node.clone(), plan.job.clone());
        found.push(Violation::CpuOverfull { node, job, asks, left });
    }
    *cpu = cpu.saturating_add(asks);
    let asks = ranks.saturating_mul(gang.memory.0);
    let left = books.memory_left(node).saturating_sub(*memory);
    if asks > left {
        let (node, job) = (node.clone(), plan.job.clone());
        found.push(Violation::MemoryOverfull { node, job, asks, left });
    }
    *memory = memory.saturating_add(asks);
}

/// Returns the word of quota for a kind.
pub(crate) fn kind_word(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Gpu => "gpu",
    }
}
