//! The fields that say where a gang may run, at which sizes, and how it may be disturbed; and the
//! kind `Queue`.

use std::collections::BTreeMap;

use drumline_types::Bytes;
use serde::{Deserialize, Serialize};

use crate::field::{Field, Kind, MapRule, TextRule};
use crate::gang::{
    DeviceKind, DisruptionBudget, Elastic, Gang, GangSettings, Toleration, TopologyRule,
    WHOLE_DEVICE,
};
use crate::queue::{QueueSpec, Reclaim};
use crate::table::{HOUR_MS, default, int, optional};
use crate::walk::{Checked, Walk, obey};

/// The greatest number in a queue's quota.
pub(crate) const QUOTA_MAX: i64 = 10_000_000;

const LEVEL: Kind = Kind::Text(TextRule::Name { max: 63 });

pub(crate) const RESOURCES: Field = optional(
    "resources",
    Kind::Object(&[
        default(
            "device",
            Kind::Choice(&[("cpu", "A share of a node's cores."), ("gpu", "An NVIDIA GPU.")]),
            "cpu",
            "",
            "The kind of device that each rank gets, one each.",
        ),
        optional(
            "models",
            Kind::Texts { min: 1, max: 16 },
            "any whole one of the kind",
            "",
            "Device models that will do, as `drumline nodes` shows them, the preferred first. A \
             gang gets devices of one model, and MIG instances by a name that says so alone, such as \
             `1g.10gb`.",
        ),
        default(
            "share",
            int(1, WHOLE_DEVICE as i64),
            "1000",
            "thousandths",
            "The share of its device that each rank gets. Ranks with smaller shares may have to \
             live with others on the same device; nothing but this count keeps them apart.",
        ),
        default(
            "cpu",
            int(0, 1_024_000),
            "0",
            "thousandths of a core",
            "Processor time set aside for each rank on its node.",
        ),
        default(
            "memory",
            int(0, 1 << 30),
            "0",
            "MiB",
            "Main memory set aside for each rank on its node.",
        ),
        default(
            "spares",
            int(0, 65_536),
            "0",
            "devices",
            "Devices kept ready beside the gang for when one of its own fails, in whole tensor \
             groups. Jobs that can be ended at once use them meanwhile.",
        ),
        optional(
            "leader",
            Kind::Choice(&[("cpu", "A share of a node's cores."), ("gpu", "An NVIDIA GPU.")]),
            "as every rank",
            "",
            "For a command whose rank 0 only leads: the kind of device that it gets, near its workers.",
        ),
        optional(
            "tolerations",
            Kind::Texts { min: 1, max: 32 },
            "none",
            "",
            "Taints of nodes that the gang endures, each `key` or `key=value`.",
        ),
    ]),
    "its defaults",
    "",
    "What each rank runs on.",
);

pub(crate) const TOPOLOGY: Field = optional(
    "topology",
    Kind::Object(&[
        optional(
            "required",
            LEVEL,
            "no rule",
            "",
            "A level such as `rack`: the whole gang is inside one domain of it, or waits.",
        ),
        optional(
            "preferred",
            LEVEL,
            "no wish",
            "",
            "A level: the gang is inside as few domains of it as can be had.",
        ),
        optional(
            "copyRequired",
            LEVEL,
            "no rule",
            "",
            "A level: each copy of the model (tensor x pipeline ranks) is inside one domain of it.",
        ),
        optional(
            "copyPreferred",
            LEVEL,
            "no wish",
            "",
            "A level: each copy of the model is inside one domain of it where that can be had. With \
             the level above racks, the stages of a pipeline are in neighbouring racks.",
        ),
        optional(
            "tensorRequired",
            LEVEL,
            "node",
            "",
            "The level, such as an NVLink domain of several nodes, that each tensor group must be in \
             one domain of.",
        ),
        optional(
            "runsRequired",
            Kind::Texts { min: 1, max: 16 },
            "no rule",
            "",
            "Parts of the gang, each `RANKS/LEVEL`: with `16/rack`, ranks 0 to 15 are inside one rack, \
             16 to 31 inside one, and so on. A leader is not counted.",
        ),
        optional(
            "runsPreferred",
            Kind::Texts { min: 1, max: 16 },
            "no wish",
            "",
            "The same, where that can be had; the outermost level first.",
        ),
    ]),
    "the smallest domain that holds the gang",
    "",
    "Where ranks must, or had better, be together. The levels are those that nodes name.",
);

pub(crate) const ELASTIC: Field = optional(
    "elastic",
    Kind::Object(&[
        optional(
            "least",
            int(1, 65_536),
            "required",
            "copies",
            "The fewest that are worth starting.",
        ),
        optional("most", int(1, 65_536), "required", "copies", "The most that it can use."),
        default("step", int(1, 65_536), "1", "copies", "Sizes are multiples of this."),
    ]),
    "one size only",
    "",
    "Copies of the model (ranks of a command) at which the job may run; its split gives the \
     wanted number. It starts with what fits, shrinks before anyone is evicted, and grows when \
     devices are idle; a change of size is a restart from the last checkpoint.",
);

pub(crate) const SCHEDULING: Field = optional(
    "scheduling",
    Kind::Object(&[
        optional(
            "expected",
            Kind::Duration { min_ms: 1, max_ms: 366 * 24 * HOUR_MS },
            "not known",
            "",
            "How long the job will run in all. It may be wrong; it lets others be told when \
             devices become free, and lets this job fill gaps before a bigger one.",
        ),
        default(
            "minRuntime",
            Kind::Duration { min_ms: 0, max_ms: 30 * 24 * HOUR_MS },
            "0s",
            "",
            "Time from a start in which the job is not preempted, reclaimed or moved.",
        ),
        default(
            "preemptible",
            Kind::Bool,
            "true",
            "",
            "Whether it may be ended for another job at all.",
        ),
        optional(
            "disruptions",
            Kind::Object(&[
                optional("count", int(0, 1000), "no limit", "disruptions", "At most so many ..."),
                default(
                    "per",
                    Kind::Duration { min_ms: 1000, max_ms: 366 * 24 * HOUR_MS },
                    "24h",
                    "",
                    "... within this time.",
                ),
            ]),
            "no limit",
            "",
            "How often the scheduler may end an attempt of the job.",
        ),
    ]),
    "its defaults",
    "",
    "How long it runs, and how it may be disturbed.",
);

pub(crate) const QUEUE_SPEC: &[Field] = &[
    optional(
        "parent",
        Kind::Text(TextRule::Name { max: 63 }),
        "none: a root",
        "",
        "The queue above it. A queue that has children takes no jobs of its own.",
    ),
    optional(
        "quota",
        Kind::Map(MapRule::Counts),
        "no limit",
        "devices",
        "Devices that it may always use, by class: a model's name, or `gpu` or `cpu` for every \
         device whose model has no entry.",
    ),
    default(
        "weight",
        int(1, 1_000_000),
        "1",
        "",
        "Its part of what its parent has to spare, against its siblings' weights.",
    ),
    optional(
        "borrowingLimit",
        Kind::Map(MapRule::Counts),
        "whatever is idle",
        "devices",
        "Devices beyond its quota that it may borrow, by class.",
    ),
    optional(
        "lendingLimit",
        Kind::Map(MapRule::Counts),
        "all that are idle",
        "devices",
        "Devices of its quota that others may borrow, by class.",
    ),
    default(
        "preemptWithin",
        Kind::Bool,
        "true",
        "",
        "Whether a job may end jobs of lower priority in the same queue.",
    ),
    default(
        "reclaim",
        Kind::Choice(&[
            ("never", "It waits until borrowers are done."),
            ("lowerPriority", "It ends borrowers' jobs of lower priority than its own."),
            ("any", "It ends any borrower's jobs."),
        ]),
        "any",
        "",
        "Whose jobs it may end to get its quota back.",
    ),
    default("held", Kind::Bool, "false", "", "While true, nothing of it starts."),
];

/// What a manifest asks for beyond ranks and split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Wishes {
    /// Device models that will do, the preferred first. Empty: any whole one.
    pub models: Vec<String>,
    /// The share of a device for each rank, in thousandths; `None`: the whole.
    pub share_milli: Option<u32>,
    /// Processor time for each rank, in thousandths of a core.
    pub cpu_milli: u64,
    /// Main memory for each rank.
    pub memory: Bytes,
    /// Devices kept ready beside the gang.
    pub spares: u32,
    /// The kind of device that rank 0 gets, where it only leads.
    pub leader: Option<DeviceKind>,
    /// Taints that it endures.
    pub tolerations: Vec<Toleration>,
    /// The level that must hold the whole gang.
    pub required: Option<String>,
    /// The level that had better hold it.
    pub preferred: Option<String>,
    /// The level that must hold each copy of the model.
    pub copy_required: Option<String>,
    /// The level that had better hold each copy.
    pub copy_preferred: Option<String>,
    /// The level that must hold each tensor group, where that is not a node.
    pub tensor_required: Option<String>,
    /// Runs of consecutive ranks that must each be inside one domain of a level.
    pub runs_required: Vec<(u32, String)>,
    /// Runs that had better be.
    pub runs_preferred: Vec<(u32, String)>,
    /// Sizes in copies; a command's copies are its ranks.
    pub elastic: Option<Elastic>,
}

impl Wishes {
    /// Returns whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Lays the wishes on a gang whose copies of the model have `copy` ranks each.
    #[must_use]
    pub fn apply(&self, gang: Gang, copy: u32) -> Gang {
        let rule = |ranks: u32, level: &Option<String>, required: bool| {
            let level = level.clone()?;
            Some(TopologyRule { ranks, level, required })
        };
        let tensor = self.tensor_required.as_ref().filter(|level| *level != "node").cloned();
        let topology = [
            rule(0, &self.required, true),
            rule(0, &self.preferred, false),
            rule(copy, &self.copy_required, true),
            rule(copy, &self.copy_preferred, false),
            rule(gang.node_group, &tensor, true).filter(|rule| rule.ranks > 1),
        ];
        let run = |runs: &[(u32, String)], required: bool| -> Vec<TopologyRule> {
            let rule = |(ranks, level): &(u32, String)| TopologyRule {
                ranks: *ranks,
                level: level.clone(),
                required,
            };
            runs.iter().map(rule).collect()
        };
        let runs =
            run(&self.runs_required, true).into_iter().chain(run(&self.runs_preferred, false));
        let ranks = |copies: u32| copies.saturating_mul(copy);
        Gang {
            node_group: if tensor.is_some() { 1 } else { gang.node_group },
            leader: self.leader,
            models: self.models.clone(),
            share_milli: self.share_milli.unwrap_or(WHOLE_DEVICE),
            cpu_milli: self.cpu_milli,
            memory: self.memory,
            topology: topology.into_iter().flatten().chain(runs).collect(),
            elastic: self.elastic.map(|sizes| Elastic {
                least: ranks(sizes.least),
                most: ranks(sizes.most),
                step: ranks(sizes.step),
            }),
            spares: self.spares,
            tolerations: self.tolerations.clone(),
            ..gang
        }
    }
}

/// Reads the wishes, and checks the sizes: `copies` is the wanted number, and `divides` says
/// whether a number of copies can share the work.
pub(crate) fn wishes(
    walk: &mut Walk<'_>,
    copies: u32,
    divides: impl Fn(u32) -> Result<(), String>,
) -> Wishes {
    let elastic = elastic(walk, copies, divides);
    let spares = spares(walk);
    let runs_required = runs(walk, "spec.topology.runsRequired");
    let runs_preferred = runs(walk, "spec.topology.runsPreferred");
    let text = |walk: &Walk<'_>, path: &str| walk.text(path);
    let toleration = |text: &String| match text.split_once('=') {
        Some((key, value)) => Toleration { key: key.to_owned(), value: Some(value.to_owned()) },
        None => Toleration { key: text.clone(), value: None },
    };
    Wishes {
        models: walk.list("spec.resources.models"),
        share_milli: walk.u32("spec.resources.share").filter(|share| *share != WHOLE_DEVICE),
        cpu_milli: walk.u64("spec.resources.cpu").unwrap_or(0),
        memory: Bytes(walk.u64("spec.resources.memory").unwrap_or(0) << 20),
        spares,
        leader: leader(walk),
        tolerations: walk.list("spec.resources.tolerations").iter().map(toleration).collect(),
        required: text(walk, "spec.topology.required"),
        preferred: text(walk, "spec.topology.preferred"),
        copy_required: text(walk, "spec.topology.copyRequired"),
        copy_preferred: text(walk, "spec.topology.copyPreferred"),
        tensor_required: text(walk, "spec.topology.tensorRequired"),
        runs_required,
        runs_preferred,
        elastic,
    }
}

/// Reads rules for parts of a gang.
fn runs(walk: &mut Walk<'_>, path: &str) -> Vec<(u32, String)> {
    let mut runs = Vec::new();
    for text in walk.list(path) {
        let run = text.split_once('/').and_then(|(ranks, level)| {
            let ranks = ranks.parse().ok().filter(|ranks| (2..=65_536).contains(ranks))?;
            let legal = obey(TextRule::Name { max: 63 }, level).is_ok();
            legal.then(|| (ranks, level.to_owned()))
        });
        match run {
            Some(run) => runs.push(run),
            None => walk.wrong_field(
                path,
                format!("{text:?} is not RANKS/LEVEL with 2 to 65536 ranks, such as 16/rack"),
            ),
        }
    }
    runs
}

/// Reads on what a leader runs: only a command has one.
fn leader(walk: &mut Walk<'_>) -> Option<DeviceKind> {
    let kind = match walk.text("spec.resources.leader")?.as_str() {
        "gpu" => DeviceKind::Gpu,
        _ => DeviceKind::Cpu,
    };
    if walk.u32("spec.ranks").is_none() {
        let message = "only a CommandJob has a rank that leads; every rank of this kind works";
        walk.wrong_field("spec.resources.leader", message.to_owned());
    }
    Some(kind)
}

/// Reads how many devices are kept ready: whole tensor groups, for a group is lost as a whole.
fn spares(walk: &mut Walk<'_>) -> u32 {
    let spares = walk.u32("spec.resources.spares").unwrap_or(0);
    let group = walk.u32("spec.parallelism.tensor").unwrap_or(1).max(1);
    if !spares.is_multiple_of(group) {
        let message = format!(
            "{spares} spares are no whole tensor groups of {group}; {} are",
            spares.next_multiple_of(group)
        );
        walk.wrong_field("spec.resources.spares", message);
    }
    spares
}

fn elastic(
    walk: &mut Walk<'_>,
    copies: u32,
    divides: impl Fn(u32) -> Result<(), String>,
) -> Option<Elastic> {
    if !walk.is_given("spec.elastic") {
        return None;
    }
    for path in ["spec.elastic.least", "spec.elastic.most"] {
        if !walk.is_given(path) {
            walk.wrong_field(path, "is missing: both least and most say how far it may stretch");
        }
    }
    let least = walk.u32("spec.elastic.least")?;
    let most = walk.u32("spec.elastic.most")?;
    let step = walk.u32("spec.elastic.step")?;
    if least > most {
        walk.wrong_field("spec.elastic.least", format!("{least} is more than most, {most}"));
        return None;
    }
    let near = |copies: u32| (copies / step * step).clamp(step, most.max(step));
    for (path, value) in [("spec.elastic.least", least), ("spec.elastic.most", most)] {
        if value % step != 0 {
            let message = format!("{value} is not a multiple of step, {step}; {} is", near(value));
            walk.wrong_field(path, message);
            return None;
        }
    }
    // 0: the wanted size is wrong by itself, or still to be chosen.
    if copies != 0 && !(least..=most).contains(&copies) {
        let message = format!(
            "the wanted size, {copies} copies, is outside {least} to {most}; change the split or \
             these bounds"
        );
        walk.wrong_field("spec.elastic", message);
        return None;
    }
    let sizes = (least..=most).step_by(step as usize);
    if let Some(why) = sizes.into_iter().find_map(|size| divides(size).err()) {
        walk.wrong_field("spec.elastic", why);
        return None;
    }
    Some(Elastic { least, most, step })
}

/// Reads how the job may be disturbed.
pub(crate) fn settings(walk: &Walk<'_>, settings: GangSettings) -> GangSettings {
    GangSettings {
        expected_ms: walk.duration_ms("spec.scheduling.expected"),
        min_runtime_ms: walk.duration_ms("spec.scheduling.minRuntime").unwrap_or(0),
        preemptible: walk.truth("spec.scheduling.preemptible").unwrap_or(true),
        disruptions: walk.u32("spec.scheduling.disruptions.count").map(|count| DisruptionBudget {
            count,
            per_ms: walk.duration_ms("spec.scheduling.disruptions.per").unwrap_or(24 * HOUR_MS),
        }),
        ..settings
    }
}

/// Reads a queue.
pub(crate) fn queue(walk: &mut Walk<'_>) -> Option<QueueSpec> {
    let name: drumline_types::QueueName = walk.text("metadata.name")?.parse().ok()?;
    let parent = walk.text("spec.parent").and_then(|parent| parent.parse().ok());
    if parent.as_ref() == Some(&name) {
        walk.wrong_field("spec.parent", "a queue cannot be its own parent".to_owned());
        return None;
    }
    Some(QueueSpec {
        parent,
        quota: counts(walk, "spec.quota").unwrap_or_default(),
        weight: walk.u32("spec.weight")?,
        borrowing_limit: counts(walk, "spec.borrowingLimit"),
        lending_limit: counts(walk, "spec.lendingLimit"),
        preempt_within: walk.truth("spec.preemptWithin")?,
        reclaim: match walk.text("spec.reclaim")?.as_str() {
            "never" => Reclaim::Never,
            "lowerPriority" => Reclaim::LowerPriority,
            _ => Reclaim::Any,
        },
        held: walk.truth("spec.held")?,
        name,
    })
}

fn counts(walk: &Walk<'_>, path: &str) -> Option<BTreeMap<String, u32>> {
    let Checked::Map(map) = walk.get(path)? else { return None };
    // The walk has checked that each is such a number.
    Some(
        map.iter()
            .filter_map(|(class, count)| Some((class.clone(), count.parse().ok()?)))
            .collect(),
    )
}
