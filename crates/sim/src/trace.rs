//! The openb node and pod lists as a workload: who arrived when, and for how long it ran.
//!
//! A pod arrives at its `creation_time` and works from `scheduled_time` (if it was never
//! scheduled, from its creation) to `deletion_time`. `LS` and `Guaranteed` pods go first and are
//! not preempted, `Burstable` ones come next. Each node also has one CPU device, of which a pod
//! without GPUs takes a thousandth, so that only cores and memory limit those.

use std::collections::BTreeSet;
use std::sync::Arc;

use drumline_cluster::{Device, Node};
use drumline_spec::{DeviceKind, Gang, GangSettings, Parallelism, QueueSpec, RestartPolicy};
use drumline_types::{Bytes, JobId, NodeName, QueueName};

use crate::fault::FileFault;
use crate::job::Job;
use crate::openb::Trace;
use crate::scenario::{Jobs, Scenario};
use crate::workload::{After, EvictionRules, Failures};

const MIB: u64 = 1 << 20;
/// The latest second that a trace may name: a hundred years.
const SECONDS_MAX: u64 = 3_155_760_000;

/// What is taken from a trace and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TraceOptions {
    /// Arrivals come so many times as fast.
    pub speed: f64,
    /// Time from launch until the ranks work, in milliseconds.
    pub start_ms: u64,
    /// The least time between two looks of the scheduler, in milliseconds.
    pub cycle_ms: u64,
    /// Decides what is drawn.
    pub seed: u64,
}

/// The times of a pod, in seconds, and its quality of service.
#[derive(Debug, Clone, Copy)]
struct Times {
    created: u64,
    works: u64,
    priority: i32,
    preemptible: bool,
}

/// Reads a node list and a pod list as a scenario.
///
/// # Errors
/// [`FileFault`] for the first row that is malformed.
pub fn openb(
    name: &str,
    nodes: (&str, &str),
    pods: (&str, &str),
    options: &TraceOptions,
) -> Result<Scenario, FileFault> {
    let trace = Trace::read(nodes, pods).map_err(|error| FileFault {
        what: format!("expected {}, found {:?}", error.expected, error.found),
        file: error.file,
        line: error.line,
        column: error.column,
    })?;
    let times = times(pods.0, pods.1)?;
    let mut taken = BTreeSet::new();
    let mut jobs = Vec::with_capacity(trace.pods.len());
    let first = times.values().map(|times| times.created).min().unwrap_or(0);
    for (at, pod) in trace.pods.iter().enumerate() {
        let Some(times) = times.get(pod.name.as_str()) else { continue };
        let own = pod.name.parse::<JobId>().ok().filter(|id| !taken.contains(id));
        let Some(id) = own.or_else(|| format!("row-{at}").parse().ok()) else { continue };
        taken.insert(id.clone());
        let shape = &trace.shapes[pod.shape];
        let ranks = u32::from(shape.gpus).max(1);
        let models = if shape.gpus == 0 || shape.models == u32::MAX {
            Vec::new()
        } else if shape.models == 0 {
            vec!["a model that the node list does not have".to_owned()]
        } else {
            let accepted = (0..).zip(&trace.models).filter(|(at, _)| shape.models & (1 << at) != 0);
            accepted.map(|(_, model)| model.clone()).collect()
        };
        let amount = |amount: i32| u64::try_from(amount).unwrap_or(0).div_ceil(u64::from(ranks));
        let work_ms = times.works.saturating_mul(1000).max(1000);
        jobs.push(Job {
            id,
            arrives: ((times.created - first) as f64 * 1000.0 / options.speed) as u64,
            gang: Gang {
                ranks,
                node_group: ranks,
                device: if shape.gpus == 0 { DeviceKind::Cpu } else { DeviceKind::Gpu },
                models,
                share_milli: if shape.gpus == 0 { 1 } else { u32::from(shape.gpu_milli) },
                cpu_milli: amount(shape.cpu_milli),
                memory: Bytes(amount(pod.memory_mib).saturating_mul(MIB)),
                ..Gang::default()
            },
            split: Parallelism { tensor: ranks, pipeline: 1, data: 1 },
            settings: GangSettings {
                priority: times.priority,
                preemptible: times.preemptible,
                restarts: RestartPolicy { limit: u32::MAX, backoff_ms: 0 },
                expected_ms: Some(work_ms),
                ..GangSettings::default()
            },
            work_ms,
            start_ms: options.start_ms,
            restart_ms: options.start_ms,
            saves: None,
        });
    }
    jobs.sort_by(|a, b| (a.arrives, &a.id).cmp(&(b.arrives, &b.id)));
    let lasts_ms = jobs.last().map_or(1, |job| job.arrives + 1);
    Ok(Scenario {
        name: name.to_owned(),
        seed: options.seed,
        nodes: fleet(&trace, nodes.0)?,
        proneness: Vec::new(),
        queues: vec![QueueSpec::open(QueueName::default_queue())],
        jobs: Jobs::Listed(Arc::from(jobs)),
        failures: Failures::default(),
        eviction: EvictionRules::default(),
        lasts_ms,
        after: After::Drain,
        cycle_ms: options.cycle_ms.max(1),
        counted: DeviceKind::Gpu,
    })
}

fn fleet(trace: &Trace, file: &str) -> Result<Vec<Node>, FileFault> {
    let mut names = BTreeSet::new();
    let mut nodes = Vec::with_capacity(trace.nodes.len());
    for row in &trace.nodes {
        let name = row.name.parse::<NodeName>().map_err(|error| {
            FileFault::at(file, 1, 1, format!("expected names of nodes: {error}"))
        })?;
        if !names.insert(name.clone()) {
            let what = format!("expected each node once, found {name} twice");
            return Err(FileFault::at(file, 1, 1, what));
        }
        let model = trace.models.get(usize::from(row.model)).cloned().unwrap_or_default();
        let gpu = Device::new(DeviceKind::Gpu, model, Bytes(0));
        let mut devices = vec![gpu; usize::from(row.gpus)];
        let memory = Bytes(u64::try_from(row.memory_mib).unwrap_or(0) * MIB);
        devices.push(Device::new(DeviceKind::Cpu, "cpu", memory));
        let mut node = Node::new(name, devices);
        node.cpu_milli = u64::try_from(row.cpu_milli).unwrap_or(0);
        node.memory = memory;
        nodes.push(node);
    }
    Ok(nodes)
}

/// Reads the columns that say when.
fn times<'a>(
    file: &str,
    text: &'a str,
) -> Result<std::collections::BTreeMap<&'a str, Times>, FileFault> {
    let mut lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let (header_line, header) = lines.next().unwrap_or((1, ""));
    let header: Vec<&str> =
        header.trim_start_matches('\u{feff}').split(',').map(str::trim).collect();
    let find = |name: &str| header.iter().position(|column| *column == name);
    let column = |name: &str| {
        find(name).ok_or_else(|| {
            FileFault::at(file, header_line, 1, format!("expected a column named {name}"))
        })
    };
    let (name, created) = (column("name")?, column("creation_time")?);
    let (deleted, scheduled) = (column("deletion_time")?, column("scheduled_time")?);
    let qos = find("qos");
    let mut times = std::collections::BTreeMap::new();
    for (line, row) in lines {
        let cells: Vec<&str> = row.split(',').collect();
        let wrong = |at: usize, what: &str| {
            let before: usize = cells.iter().take(at).map(|cell| cell.chars().count() + 1).sum();
            let found = cells.get(at).copied().unwrap_or_default();
            let what = format!("expected {what}, found {found:?}");
            FileFault::at(file, line, before + 1, what)
        };
        let seconds = |at: usize, empty: Option<u64>| match cells.get(at).map(|cell| cell.trim()) {
            Some("") if empty.is_some() => Ok(empty.unwrap_or(0)),
            Some(cell) => match cell.parse::<f64>() {
                Ok(number) if (0.0..=SECONDS_MAX as f64).contains(&number) => Ok(number as u64),
                _ => Err(wrong(at, "seconds since the start of the trace")),
            },
            None => Err(wrong(at, "as many columns as in the header")),
        };
        let created = seconds(created, None)?;
        let began = seconds(scheduled, Some(created))?.max(created);
        let ended = seconds(deleted, None)?;
        if ended < began {
            return Err(wrong(deleted, "a deletion that is no earlier than the start"));
        }
        let class = qos.and_then(|at| cells.get(at)).map_or("", |cell| cell.trim());
        let (priority, preemptible) = match class {
            "LS" | "Guaranteed" => (100, false),
            "Burstable" => (50, true),
            _ => (0, true),
        };
        let Some(name) = cells.get(name).map(|cell| cell.trim()) else { continue };
        let works = ended - began;
        let known = times.insert(name, Times { created, works, priority, preemptible });
        if known.is_some() {
            return Err(wrong(find("name").unwrap_or(0), "a name that no other row has"));
        }
    }
    Ok(times)
}
