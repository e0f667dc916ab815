//! Everything that a simulation needs to know before it starts: machines, queues, jobs, rules.

use std::sync::Arc;

use drumline_cluster::{Health, Node};
use drumline_spec::{DeviceKind, Gang, QueueSpec, Reclaim};
use drumline_types::QueueName;

use crate::draw::Draw;
use crate::job::Job;
use crate::workload::{After, EvictionRules, Failures, Generator, Workload, nodes};

const LEMONS: u64 = 4;

/// A fleet, its queues, who arrives, and what fails.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Its name in reports.
    pub name: String,
    /// Decides what is drawn.
    pub seed: u64,
    /// The machines.
    pub nodes: Vec<Node>,
    /// How often each machine fails, against the others; empty: all alike.
    pub proneness: Vec<f64>,
    /// The queues, parents before their children.
    pub queues: Vec<QueueSpec>,
    /// Who arrives.
    pub jobs: Jobs,
    /// What fails.
    pub failures: Failures,
    /// How jobs leave.
    pub eviction: EvictionRules,
    /// How long jobs arrive, in milliseconds.
    pub lasts_ms: u64,
    /// What happens then.
    pub after: After,
    /// The least time between two looks of the scheduler, in milliseconds.
    pub cycle_ms: u64,
    /// The kind of device that hours are counted of.
    pub counted: DeviceKind,
}

/// Who arrives, in the order of arrival.
#[derive(Debug, Clone)]
pub enum Jobs {
    /// As the workload says.
    Drawn(Box<Workload>),
    /// As a trace has it.
    Listed(Arc<[Job]>),
}

impl Jobs {
    /// Starts the list.
    #[must_use]
    pub fn iter(&self, seed: u64) -> Box<dyn Iterator<Item = Job> + '_> {
        match self {
            Self::Drawn(workload) => Box::new(Generator::new(workload, seed)),
            Self::Listed(jobs) => Box::new(jobs.iter().cloned()),
        }
    }
}

impl Scenario {
    /// Returns the scenario of a workload.
    #[must_use]
    pub fn of(workload: &Workload, seed: u64) -> Self {
        let nodes = nodes(&workload.fleet);
        let mut draw = Draw::new(seed, LEMONS);
        let failures = &workload.failures;
        let proneness = if failures.lemons.0 > 0.0 {
            let lemon = |draw: &mut Draw| draw.unit() < failures.lemons.0;
            let factor = failures.lemon_factor.0;
            nodes.iter().map(|_| if lemon(&mut draw) { factor } else { 1.0 }).collect()
        } else {
            Vec::new()
        };
        Self {
            name: workload.name.clone(),
            seed,
            nodes,
            proneness,
            queues: queues(workload),
            jobs: Jobs::Drawn(Box::new(workload.clone())),
            failures: failures.clone(),
            eviction: workload.eviction,
            lasts_ms: workload.lasts.0,
            after: workload.after,
            cycle_ms: workload.cycle.0.max(1),
            counted: DeviceKind::Gpu,
        }
    }

    /// Returns why the whole fleet, idle and in order, could not hold a gang; `None` if it could.
    ///
    /// It looks at devices, groups and machines, not at topology or quota: the scheduler says
    /// those.
    #[must_use]
    pub fn impossible(&self, gang: &Gang) -> Option<String> {
        let fits = |model: Option<&str>| -> u64 {
            self.nodes.iter().map(|node| ranks_on(node, gang, model)).sum()
        };
        // An elastic gang may start at its least size.
        let least = u64::from(gang.elastic.map_or(gang.ranks, |elastic| elastic.least));
        let most = if gang.models.is_empty() {
            fits(None)
        } else {
            gang.models.iter().map(|model| fits(Some(model))).max().unwrap_or(0)
        };
        (most < least).then(|| {
            let models = if gang.models.is_empty() {
                gang.device.as_str().to_owned()
            } else {
                gang.models.join(" or ")
            };
            format!(
                "wants {least} ranks in groups of {} on {models}; the fleet could hold {most}",
                gang.node_group
            )
        })
    }
}

/// Returns how many ranks of a gang an idle machine could hold.
fn ranks_on(node: &Node, gang: &Gang, model: Option<&str>) -> u64 {
    let devices = node.devices.iter().filter(|device| {
        device.kind == gang.device
            && device.health == Health::Healthy
            && model.is_none_or(|model| device.model == model)
    });
    let per_device = 1000 / u64::from(gang.share_milli.clamp(1, 1000));
    let devices = devices.count() as u64 * per_device;
    let by_cpu = node.cpu_milli.checked_div(gang.cpu_milli).unwrap_or(u64::MAX);
    let by_memory = node.memory.0.checked_div(gang.memory.0).unwrap_or(u64::MAX);
    let ranks = devices.min(by_cpu).min(by_memory);
    let group = u64::from(gang.node_group.max(1));
    ranks / group * group
}

fn queues(workload: &Workload) -> Vec<QueueSpec> {
    let mut specs: Vec<QueueSpec> = Vec::new();
    let name = |text: &str| text.parse::<QueueName>().ok();
    for queue in &workload.queues {
        // Names and parents were checked when the file was read.
        let Some(own) = name(queue.name.get_ref()) else { continue };
        specs.push(QueueSpec {
            parent: queue.parent.as_ref().and_then(|parent| name(parent.get_ref())),
            quota: queue.quota.clone(),
            weight: queue.weight.0,
            borrowing_limit: queue.borrowing_limit.clone(),
            lending_limit: queue.lending_limit.clone(),
            reclaim: Reclaim::Any,
            ..QueueSpec::open(own)
        });
    }
    if specs.is_empty() {
        specs.push(QueueSpec::open(QueueName::default_queue()));
    }
    parents_first(specs)
}

fn parents_first(specs: Vec<QueueSpec>) -> Vec<QueueSpec> {
    let depth = |spec: &QueueSpec| {
        let mut depth = 0;
        let mut at = spec;
        while let Some(parent) = &at.parent {
            match specs.iter().find(|spec| spec.name == *parent) {
                Some(parent) if depth <= specs.len() => at = parent,
                _ => break,
            }
            depth += 1;
        }
        depth
    };
    let mut order: Vec<usize> = (0..specs.len()).collect();
    order.sort_by_key(|&at| (depth(&specs[at]), at));
    order.into_iter().map(|at| specs[at].clone()).collect()
}
