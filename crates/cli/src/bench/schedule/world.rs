//! Fleets and queues for the scheduler's benchmark, and what is timed on them.
//!
//! A fleet has racks of 1,000 nodes with 8 devices each, two racks to a spine and two spines to a
//! zone; jobs come from 20 queues.

use std::time::{Duration, Instant};

use drumline_audit::Auditor;
use drumline_cluster::{Change, Device, Node, Request};
use drumline_placement::Cycle;
use drumline_scheduler::{Options, Scheduler};
use drumline_spec::{DeviceKind, Gang, GangSettings, Parallelism, QueueSpec, TopologyRule};
use drumline_types::{Attempt, Bytes, DeviceId, JobId, NodeName, Timestamp};

const DEVICES: u32 = 8;
const RACK_NODES: u32 = 1000;
const QUEUES: u32 = 20;

/// A scheduler with its auditor, and the time that it is.
pub(super) struct World {
    scheduler: Scheduler,
    auditor: Auditor,
    now: Timestamp,
    /// Jobs that hold devices, in the order of their start.
    running: std::collections::VecDeque<JobId>,
    next: u32,
}

/// What was timed.
#[derive(Debug, Clone, Default)]
pub(super) struct Times {
    /// In `Scheduler::cycle`.
    pub(super) cycle: Duration,
    /// Of it, on the processor: the same on a machine that does other things; `None` where it
    /// cannot be told.
    pub(super) cycle_cpu: Option<Duration>,
    /// In `Scheduler::apply`.
    pub(super) apply: Duration,
    /// In `Auditor::check`.
    pub(super) audit: Duration,
    /// Jobs that started.
    pub(super) started: u64,
    /// Gangs that were asked to leave.
    pub(super) evicted: u64,
}

/// Why a benchmark shows nothing: what it set out to measure did not come about.
#[derive(Debug)]
pub(super) struct Wrong(pub(super) String);

impl World {
    /// Returns an idle fleet.
    pub(super) fn idle(nodes: u32) -> Self {
        let mut world = Self {
            scheduler: Scheduler::new(Options::default()),
            auditor: Auditor::new(),
            now: Timestamp(1000),
            running: std::collections::VecDeque::new(),
            next: 0,
        };
        for queue in 0..QUEUES {
            let name = queue_name(queue).parse().unwrap_or_else(|_| unreachable!("a legal name"));
            world.tell(Change::Queue { queue: Box::new(QueueSpec::open(name)) });
        }
        for at in 0..nodes {
            let device = Device::new(DeviceKind::Gpu, "NVIDIA H100 80GB HBM3", Bytes(80 << 30));
            let rack = at / RACK_NODES;
            let node = Node::new(node_name(at), vec![device; DEVICES as usize])
                .within("zone", format!("z{}", rack / 4))
                .within("spine", format!("s{}", rack / 2))
                .within("rack", format!("r{rack}"));
            world.tell(Change::Node { node: Box::new(node) });
        }
        world
    }

    /// Returns a fleet with `per_node` devices of every node held by jobs of `each` devices.
    pub(super) fn busy(nodes: u32, per_node: u32, each: u32) -> Self {
        let mut world = Self::idle(nodes);
        for at in 0..nodes {
            for first in (0..per_node).step_by(each as usize) {
                let node = node_name(at);
                let devices = (first..(first + each).min(per_node))
                    .map(|index| DeviceId { node: node.clone(), index })
                    .collect::<Vec<_>>();
                let request = Box::new(world.request(devices.len() as u32, 0));
                world.running.push_back(request.job.clone());
                let (attempt, started) = (Attempt(1), Timestamp(0));
                world.tell(Change::Adopted { request, attempt, devices, started });
            }
        }
        world
    }

    fn tell(&mut self, change: Change) {
        self.auditor.apply(&change);
        let taken = self.scheduler.apply(change, self.now);
        debug_assert!(taken.is_ok(), "{taken:?}");
    }

    fn request(&mut self, ranks: u32, priority: i32) -> Request {
        self.next += 1;
        let queue = queue_name(self.next % QUEUES);
        let gang = Gang { ranks, device: DeviceKind::Gpu, ..Gang::default() };
        Request {
            job: job_name(self.next),
            split: Parallelism { data: ranks, ..Parallelism::SINGLE },
            gang,
            settings: GangSettings {
                queue: queue.parse().unwrap_or_else(|_| unreachable!("a legal name")),
                priority,
                expected_ms: Some(3_600_000),
                ..GangSettings::default()
            },
            submitted: self.now,
        }
    }

    /// Submits jobs that are alike.
    pub(super) fn submit(&mut self, jobs: u32, priority: i32, gang: &Gang) {
        for _ in 0..jobs {
            let mut request = self.request(gang.ranks, priority);
            request.gang = gang.clone();
            let request = Box::new(request);
            let not_before = Timestamp(0);
            self.tell(Change::Submitted { request, attempt: Attempt(1), not_before });
        }
    }

    /// Ends the jobs that have run longest.
    pub(super) fn end(&mut self, jobs: u32) {
        for _ in 0..jobs {
            let Some(job) = self.running.pop_front() else { return };
            self.tell(Change::Ended { job });
        }
    }

    /// Runs cycles until one decides nothing, and times them.
    pub(super) fn settle(&mut self) -> Result<Times, Wrong> {
        let mut times = Times::default();
        loop {
            let cycle = self.cycle(&mut times)?;
            if cycle.plan.jobs.is_empty() && cycle.evictions.is_empty() && !self.scheduler.dirty() {
                return Ok(times);
            }
        }
    }

    /// Runs one cycle and has it audited.
    pub(super) fn cycle(&mut self, times: &mut Times) -> Result<Cycle, Wrong> {
        self.now = self.now.plus_ms(1);
        let (started, cpu) = (Instant::now(), cpu_time());
        let cycle = self.scheduler.cycle(self.now);
        times.cycle += started.elapsed();
        let spent = cpu_time().zip(cpu).map(|(after, before)| after.saturating_sub(before));
        times.cycle_cpu = spent.map(|spent| times.cycle_cpu.unwrap_or_default() + spent);
        let fleet = self.scheduler.fleet();
        let kept = |device: &DeviceId| {
            fleet.node(&device.node).and_then(|state| state.reserved(device.index)).cloned()
        };
        let started = Instant::now();
        let checked = self.auditor.check(&cycle, kept);
        times.audit += started.elapsed();
        if let Err(found) = checked {
            let first = found.first().map(ToString::to_string).unwrap_or_default();
            return Err(Wrong(format!("the audit refuses a cycle: {first}")));
        }
        times.started += cycle.plan.jobs.len() as u64;
        times.evicted += cycle.evictions.len() as u64;
        self.running.extend(cycle.plan.jobs.iter().map(|job| job.job.clone()));
        Ok(cycle)
    }

    /// Ends and submits as many jobs in each of `rounds`, with a cycle after each: the steady state
    /// of a full fleet with a long queue.
    pub(super) fn churn(&mut self, rounds: u32, jobs: u32) -> Result<Times, Wrong> {
        let one = Gang { device: DeviceKind::Gpu, ..Gang::default() };
        let mut times = Times::default();
        for _ in 0..rounds {
            let started = Instant::now();
            self.end(jobs);
            self.submit(jobs, 0, &one);
            times.apply += started.elapsed();
            self.cycle(&mut times)?;
        }
        Ok(times)
    }

    /// Places a gang that must be in one rack, while the queue waits.
    pub(super) fn rack_gang(&mut self, ranks: u32) -> Result<Times, Wrong> {
        let rule = TopologyRule { ranks: 0, level: "rack".to_owned(), required: true };
        let topology = vec![rule];
        let gang = Gang { ranks, device: DeviceKind::Gpu, topology, ..Gang::default() };
        self.submit(1, 1, &gang);
        let mut times = Times::default();
        self.cycle(&mut times)?;
        match times.started {
            1 => Ok(times),
            started => Err(Wrong(format!("{started} gangs of {ranks} started in one rack, not 1"))),
        }
    }

    /// Makes room for a gang of higher priority on a full fleet.
    pub(super) fn preempt(&mut self, ranks: u32) -> Result<Times, Wrong> {
        let gang = Gang { ranks, node_group: 8, device: DeviceKind::Gpu, ..Gang::default() };
        self.submit(1, 100_000, &gang);
        let mut times = Times::default();
        self.cycle(&mut times)?;
        if times.evicted == 0 {
            return Err(Wrong(format!("nobody left for a gang of {ranks}")));
        }
        Ok(times)
    }

    /// Times a cycle in which nothing can be placed and nothing has changed.
    pub(super) fn nothing(&mut self) -> Result<Times, Wrong> {
        let mut times = Times::default();
        let cycle = self.cycle(&mut times)?;
        match cycle.plan.jobs.len() {
            0 => Ok(times),
            started => Err(Wrong(format!("{started} jobs started where none should fit"))),
        }
    }

    /// Times a cycle after one job has ended. Its place mostly helps nobody; now and then it is the
    /// last of its node, and one gang starts.
    pub(super) fn almost_nothing(&mut self) -> Result<Times, Wrong> {
        self.end(1);
        let mut times = Times::default();
        self.cycle(&mut times)?;
        Ok(times)
    }
}

fn queue_name(at: u32) -> String {
    format!("team-{at}")
}

fn node_name(at: u32) -> NodeName {
    format!("node-{at:05}").parse().unwrap_or_else(|_| unreachable!("a legal name"))
}

fn job_name(at: u32) -> JobId {
    format!("job-{at:07}").parse().unwrap_or_else(|_| unreachable!("a legal name"))
}

/// A gang that needs a whole node.
pub(super) fn whole_node() -> Gang {
    Gang { ranks: 8, node_group: 8, device: DeviceKind::Gpu, ..Gang::default() }
}

/// A gang of one device.
pub(super) fn single() -> Gang {
    Gang { device: DeviceKind::Gpu, ..Gang::default() }
}

/// Returns the most memory that this process has had, in bytes; `None` where it cannot be told.
pub(super) fn peak_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Returns the time that this thread has had a processor.
fn cpu_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}
