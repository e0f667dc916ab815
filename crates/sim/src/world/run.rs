//! Runs a scenario under one policy.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use drumline_cluster::{Change, ChangeError, Health};
use drumline_placement::{Eviction, JobPlan};
use drumline_scheduler::Scheduler;
use drumline_spec::Gang;
use drumline_types::{JobId, Timestamp};

use crate::draw::Draw;
use crate::job::Job;
use crate::measure::{Cause, Fairness, Level};
use crate::policy::Policy;
use crate::report::{Ending, PolicyReport};
use crate::scenario::Scenario;
use crate::workload::After;
use crate::world::attempt::{End, Live, Stands};
use crate::world::clock::{Clock, Event};
use crate::world::machines::{Machines, Place};
use crate::world::observe::Observer;
use crate::world::tally::Tally;

const NODE_FAILURES: u64 = 5;
const DEVICE_FAILURES: u64 = 6;
const CRASHES: u64 = 0x6372_6173_6800_0000;
const DAY_MS: f64 = 86_400_000.0;
/// A simulation that drains ends at so many times the time in which jobs arrive: what has not
/// ended by then makes no progress.
const LONGEST: u64 = 50;
/// Events between two reports of progress.
const REPORT_EVERY: u64 = 256;

/// How far a simulation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Virtual time, in milliseconds.
    pub now_ms: u64,
    /// How long jobs arrive, in milliseconds.
    pub lasts_ms: u64,
    /// Jobs that have arrived.
    pub arrived: u64,
    /// Jobs that have ended.
    pub finished: u64,
    /// Jobs that wait.
    pub waiting: u64,
}

/// What ends a simulation early, and who wants to know how far it is.
pub struct Limits<'a> {
    /// Ends it with what is known, once true.
    pub stop: &'a AtomicBool,
    /// Is told from time to time.
    pub progress: &'a mut dyn FnMut(&Status),
}

/// Why a simulation broke off. None of these is the user's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimError {
    /// The scheduler refused what happened.
    #[error("at {at} ms the scheduler refused a change: {why}")]
    Refused {
        /// Virtual time, in milliseconds.
        at: u64,
        /// Why.
        why: ChangeError,
    },
    /// The scheduler decided what cannot be done.
    #[error("at {at} ms the scheduler decided what cannot be: {what}")]
    Impossible {
        /// Virtual time, in milliseconds.
        at: u64,
        /// What.
        what: String,
    },
    /// Whoever looked on objected.
    #[error("at {at} ms: {what}")]
    Objected {
        /// Virtual time, in milliseconds.
        at: u64,
        /// What it said.
        what: String,
    },
    /// Device time has gone missing.
    #[error("device-hours do not add up: {found} of {expected} thousandths times milliseconds")]
    Unbalanced {
        /// What was booked.
        found: u128,
        /// What there was.
        expected: u128,
    },
}

/// Runs a scenario under a policy.
///
/// # Errors
/// [`SimError`], each of which is a defect of the scheduler or of the simulation.
pub fn run(
    scenario: &Scenario,
    policy: &Policy,
    observer: &mut dyn Observer,
    limits: &mut Limits<'_>,
) -> Result<PolicyReport, SimError> {
    let started = Instant::now();
    let mut world = World::new(scenario, policy, observer);
    world.begin()?;
    let ending = world.play(limits)?;
    let mut report = world.close(&policy.name, ending)?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

struct World<'a> {
    scenario: &'a Scenario,
    observer: &'a mut dyn Observer,
    scheduler: Scheduler,
    clock: Clock,
    now: u64,
    arrivals: Box<dyn Iterator<Item = Job> + 'a>,
    next_job: Option<Job>,
    machines: Machines,
    /// Jobs that are there, by slot; slots are used again.
    live: Vec<Option<Box<Live>>>,
    free: Vec<u32>,
    /// Only ever asked for a name, never walked over.
    slots: HashMap<JobId, u32>,
    starts: u64,
    level: Level,
    last_look: Option<u64>,
    next_look: Option<u64>,
    node_failures: Draw,
    device_failures: Draw,
    proneness: f64,
    possible: BTreeMap<Gang, Option<String>>,
    tally: Tally,
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, policy: &Policy, observer: &'a mut dyn Observer) -> Self {
        let mut classes: Vec<String> = scenario
            .nodes
            .iter()
            .flat_map(|node| &node.devices)
            .filter(|device| device.kind == scenario.counted)
            .map(|device| device.model.clone())
            .collect();
        classes.push(scenario.counted.as_str().to_owned());
        classes.sort();
        classes.dedup();
        let fairness = Fairness::new(&scenario.queues, &classes, (scenario.lasts_ms / 2000).max(1));
        Self {
            scenario,
            observer,
            scheduler: Scheduler::new(policy.options.clone()),
            clock: Clock::default(),
            now: 0,
            arrivals: scenario.jobs.iter(scenario.seed),
            next_job: None,
            machines: Machines::new(&scenario.nodes, scenario.counted),
            live: Vec::new(),
            free: Vec::new(),
            slots: HashMap::new(),
            starts: 0,
            level: Level::default(),
            last_look: None,
            next_look: None,
            node_failures: Draw::new(scenario.seed, NODE_FAILURES),
            device_failures: Draw::new(scenario.seed, DEVICE_FAILURES),
            proneness: scenario.proneness.iter().fold(1.0, |most, one| one.max(most)),
            possible: BTreeMap::new(),
            tally: Tally::new(fairness),
        }
    }

    /// Tells the scheduler of machines and queues, and puts the first events in.
    fn begin(&mut self) -> Result<(), SimError> {
        for queue in &self.scenario.queues {
            self.tell(Change::Queue { queue: Box::new(queue.clone()) })?;
        }
        for node in &self.scenario.nodes {
            self.tell(Change::Node { node: Box::new(node.clone()) })?;
        }
        self.next_arrival();
        self.next_node_failure();
        self.next_device_failure();
        Ok(())
    }

    fn tell(&mut self, change: Change) -> Result<(), SimError> {
        let now = Timestamp(self.now);
        let object = |what| SimError::Objected { at: now.0, what };
        self.observer.changed(&change, now).map_err(object)?;
        self.scheduler.apply(change, now).map_err(|why| SimError::Refused { at: now.0, why })
    }

    fn play(&mut self, limits: &mut Limits<'_>) -> Result<Ending, SimError> {
        let mut events = 0u64;
        while let Some((at, event)) = self.clock.pop() {
            if self.is_over(at) {
                if self.scenario.after == After::Stop {
                    self.advance(self.scenario.lasts_ms);
                    return Ok(Ending::Lasted);
                }
                return Ok(if self.slots.is_empty() { Ending::Done } else { Ending::TimedOut });
            }
            self.advance(at);
            if self.happen(event)? {
                return Ok(Ending::Stuck);
            }
            events += 1;
            if events.is_multiple_of(REPORT_EVERY) {
                (limits.progress)(&self.status());
                if limits.stop.load(Ordering::Relaxed) {
                    return Ok(Ending::Stopped);
                }
            }
        }
        Ok(if self.slots.is_empty() { Ending::Done } else { Ending::Stuck })
    }

    fn status(&self) -> Status {
        Status {
            now_ms: self.now,
            lasts_ms: self.scenario.lasts_ms,
            arrived: self.tally.counts.arrived,
            finished: self.tally.counts.finished,
            waiting: self.level.waiting,
        }
    }

    /// Returns whether nothing that can still happen at `at` matters.
    fn is_over(&self, at: u64) -> bool {
        let lasts = self.scenario.lasts_ms;
        match self.scenario.after {
            After::Stop => at >= lasts,
            After::Drain => {
                self.next_job.is_none()
                    && (self.slots.is_empty() || at > lasts.saturating_mul(LONGEST))
            }
        }
    }

    /// Moves time on: everything was as it is now since the last event.
    fn advance(&mut self, to: u64) {
        let ms = to.saturating_sub(self.now);
        if ms == 0 {
            return;
        }
        self.level.idle = self.machines.idle();
        self.level.broken = self.machines.broken();
        self.level.untouched = self.machines.untouched();
        let wanted = self.level.idle.min(self.level.wanted);
        self.tally.ledger.add(Cause::Broken, self.level.broken, ms);
        self.tally.ledger.add(Cause::IdleFragmented, wanted, ms);
        self.tally.ledger.add(Cause::IdleUnwanted, self.level.idle - wanted, ms);
        self.tally.timeline.until(to, &self.level);
        self.tally.fairness.until(to, self.machines.capacity());
        self.now = to;
    }

    /// Lets an event happen. Returns true when nothing can happen any more that helps those who
    /// wait.
    fn happen(&mut self, event: Event) -> Result<bool, SimError> {
        match event {
            Event::Arrival => self.arrive()?,
            Event::Ready { slot, start } => self.ready(slot, start)?,
            Event::Saved { slot, start } => self.saved(slot, start)?,
            Event::Finished { slot, start } => self.finish(slot, start)?,
            Event::Crashed { slot, start } => {
                if self.present(slot, start).is_some() {
                    self.tally.counts.software_failures += 1;
                    self.fail(slot);
                }
            }
            Event::Left { slot, start } => self.leave(slot, start)?,
            Event::NodeFails => self.node_fails()?,
            Event::DeviceFails => self.device_fails()?,
            Event::NodeBack { node } => {
                if let Some(node) = self.machines.set_down(node, false) {
                    self.tell(Change::Node { node: Box::new(node) })?;
                    self.want_look(self.now);
                }
            }
            Event::DeviceBack { node, device } => {
                let place = Place { node, device };
                if let Some(node) = self.machines.set_health(place, Health::Healthy) {
                    self.tell(Change::Node { node: Box::new(node) })?;
                    self.want_look(self.now);
                }
            }
            Event::Look => {
                if self.next_look == Some(self.now) {
                    return self.look();
                }
            }
        }
        Ok(false)
    }

    /// Asks for a look of the scheduler, no sooner than `at` and its least gap allow.
    fn want_look(&mut self, at: u64) {
        let gap = |last: u64| last.saturating_add(self.scenario.cycle_ms);
        let at = at.max(self.now).max(self.last_look.map_or(0, gap));
        if self.next_look.is_none_or(|next| at < next) {
            self.next_look = Some(at);
            self.clock.put(at, Event::Look);
        }
    }

    fn next_arrival(&mut self) {
        self.next_job = self.arrivals.next();
        if let Some(job) = &self.next_job {
            self.clock.put(job.arrives.max(self.now), Event::Arrival);
        }
    }

    fn arrive(&mut self) -> Result<(), SimError> {
        let Some(job) = self.next_job.take() else { return Ok(()) };
        self.next_arrival();
        self.tally.counts.arrived += 1;
        if self.slots.contains_key(&job.id) {
            let what = format!("{} arrives twice", job.id);
            return Err(SimError::Impossible { at: self.now, what });
        }
        let why = match self.possible.get(&job.gang) {
            Some(known) => known.clone(),
            None => {
                let found = self.scenario.impossible(&job.gang);
                self.possible.insert(job.gang.clone(), found.clone());
                found
            }
        };
        if let Some(why) = why {
            self.tally.impossible(job.id.as_str(), &why);
        }
        let queue = self.tally.fairness.place(&job.settings.queue);
        let live = Box::new(Live::new(job, self.tally.counts.arrived, queue));
        self.level.waiting += 1;
        self.level.wanted += self.wants(&live);
        let wants = self.wants(&live) as i64;
        self.tally.fairness.change(queue, 0, wants);
        let request = Box::new(live.request());
        let attempt = live.attempt;
        let slot = self.free.pop().unwrap_or(self.live.len() as u32);
        self.slots.insert(live.job.id.clone(), slot);
        match self.live.get_mut(slot as usize) {
            Some(place) => *place = Some(live),
            None => self.live.push(Some(live)),
        }
        self.tell(Change::Submitted { request, attempt, not_before: Timestamp(0) })?;
        self.want_look(self.now);
        Ok(())
    }

    /// Returns what a job wants of the counted devices, in thousandths.
    fn wants(&self, live: &Live) -> u64 {
        if live.job.gang.device == self.scenario.counted { live.job.wants_milli() } else { 0 }
    }

    /// Returns the job of a start, if it is still the present one.
    fn present(&mut self, slot: u32, start: u64) -> Option<&mut Live> {
        let live = self.live.get_mut(slot as usize)?.as_deref_mut()?;
        (live.start == start && live.stands != Stands::Waiting).then_some(live)
    }

    fn ready(&mut self, slot: u32, start: u64) -> Result<(), SimError> {
        let (now, rate) = (self.now, self.scenario.failures.software_per_node_day.0);
        let seed = self.scenario.seed ^ CRASHES;
        let Some(live) = self.present(slot, start) else { return Ok(()) };
        if live.stands != Stands::Starting {
            return Ok(());
        }
        live.stands = Stands::Working;
        let (finish, saved, milli) = (live.finish_at(), live.saved_at(now), live.milli);
        let job = live.job.id.clone();
        let mut crash = None;
        if rate > 0.0 {
            let nodes = live.places.chunk_by(|a, b| a.node == b.node).count() as f64;
            // A stream of its own, so that every policy meets the same crashes.
            let number = live.number.wrapping_mul(1 << 16) ^ u64::from(live.attempt.0);
            let after = Draw::new(seed, number).exponential(DAY_MS / (rate * nodes)) as u64;
            crash = Some(now.saturating_add(after)).filter(|&at| at < finish);
        }
        self.level.working += milli;
        self.clock.put(finish, Event::Finished { slot, start });
        if let Some(at) = saved {
            self.clock.put(at, Event::Saved { slot, start });
        }
        if let Some(at) = crash {
            self.clock.put(at, Event::Crashed { slot, start });
        }
        self.tell(Change::Running { job })
    }

    fn saved(&mut self, slot: u32, start: u64) -> Result<(), SimError> {
        let now = self.now;
        let Some(live) = self.present(slot, start) else { return Ok(()) };
        if !matches!(live.stands, Stands::Working | Stands::Ending) {
            return Ok(());
        }
        let (next, job) = (live.saved_at(now), live.job.id.clone());
        if let Some(at) = next {
            self.clock.put(at, Event::Saved { slot, start });
        }
        self.tally.counts.checkpoints += 1;
        self.tell(Change::Checkpointed { job })
    }

    fn finish(&mut self, slot: u32, start: u64) -> Result<(), SimError> {
        let Some(live) = self.present(slot, start) else { return Ok(()) };
        if !matches!(live.stands, Stands::Working | Stands::Ending) {
            return Ok(());
        }
        live.ends = End::Finished;
        self.level.working -= live.milli;
        self.give_back(slot);
        let Some(live) = self.live.get_mut(slot as usize).and_then(Option::take) else {
            return Ok(());
        };
        self.free.push(slot);
        self.slots.remove(&live.job.id);
        self.tally.finished(&live, self.now);
        self.tell(Change::Ended { job: live.job.id.clone() })?;
        self.want_look(self.now);
        Ok(())
    }

    /// Settles the present start of a job, and takes its devices back.
    fn give_back(&mut self, slot: u32) {
        let Some(live) = self.live.get_mut(slot as usize).and_then(Option::as_deref_mut) else {
            return;
        };
        live.settle(self.now, &mut self.tally.ledger);
        let share = u64::from(live.job.gang.share_milli);
        self.machines.hold(slot, &live.places, share, false);
        live.places = Vec::new();
        self.level.held -= live.milli;
        self.level.placed -= 1;
        self.tally.fairness.change(live.queue, -(live.milli as i64), 0);
        live.milli = 0;
    }

    fn leave(&mut self, slot: u32, start: u64) -> Result<(), SimError> {
        let Some(live) = self.present(slot, start) else { return Ok(()) };
        let (failed, saved) = (live.ends == End::Failed, live.ends == End::Evicted { saved: true });
        let job = live.job.id.clone();
        if saved {
            self.tell(Change::Checkpointed { job })?;
        }
        self.give_back(slot);
        let wants = match self.live.get(slot as usize) {
            Some(Some(live)) => self.wants(live),
            _ => return Ok(()),
        };
        let backoff = if failed { self.scenario.failures.backoff.0 } else { 0 };
        let not_before = Timestamp(self.now.saturating_add(backoff));
        let Some(live) = self.live.get_mut(slot as usize).and_then(Option::as_deref_mut) else {
            return Ok(());
        };
        live.stands = Stands::Waiting;
        live.attempt = live.attempt.next();
        (live.halted_at, live.ends) = (None, End::Open);
        let (job, attempt, queue) = (live.job.id.clone(), live.attempt, live.queue);
        self.level.waiting += 1;
        self.level.wanted += wants;
        self.tally.counts.restarts += 1;
        self.tally.fairness.change(queue, 0, wants as i64);
        self.tell(Change::Requeued { job, attempt, not_before })?;
        self.want_look(self.now);
        Ok(())
    }

    /// Ends the present start of a job: something that it needs has broken.
    fn fail(&mut self, slot: u32) {
        let (now, detect) = (self.now, self.scenario.failures.detect.0);
        let Some(live) = self.live.get_mut(slot as usize).and_then(Option::as_deref_mut) else {
            return;
        };
        match live.stands {
            Stands::Starting | Stands::Working | Stands::Ending => {
                if live.stands != Stands::Starting {
                    self.level.working -= live.milli;
                }
                (live.stands, live.ends, live.halted_at) =
                    (Stands::Stalled, End::Failed, Some(now));
                let start = live.start;
                self.clock.put(now.saturating_add(detect), Event::Left { slot, start });
            }
            // It leaves already, but what it wanted to save is lost.
            Stands::Leaving => live.ends = End::Failed,
            Stands::Waiting | Stands::Stalled => {}
        }
    }

    /// Returns the time of the next failure when each of `count` things fails so often, the worst
    /// `proneness` times as often.
    fn failure_at(&self, draw: &mut Draw, per_day: f64, count: f64) -> Option<u64> {
        let rate = per_day * count * self.proneness;
        (rate > 0.0).then(|| self.now.saturating_add(draw.exponential(DAY_MS / rate) as u64 + 1))
    }

    /// Returns whether a machine that was drawn fails: those that fail seldom are let off.
    fn is_hit(&self, draw: &mut Draw, node: u32) -> bool {
        let drawn = draw.unit();
        let one = self.scenario.proneness.get(node as usize).copied().unwrap_or(1.0);
        drawn * self.proneness < one
    }

    fn next_node_failure(&mut self) {
        let mut draw = self.node_failures.clone();
        let rate = self.scenario.failures.node_per_day.0;
        if let Some(at) = self.failure_at(&mut draw, rate, self.machines.len() as f64) {
            self.clock.put(at, Event::NodeFails);
        }
        self.node_failures = draw;
    }

    fn next_device_failure(&mut self) {
        let mut draw = self.device_failures.clone();
        let rate = self.scenario.failures.device_per_day.0;
        let devices = self.machines.capacity() as f64 / 1000.0;
        if let Some(at) = self.failure_at(&mut draw, rate, devices) {
            self.clock.put(at, Event::DeviceFails);
        }
        self.device_failures = draw;
    }

    fn node_fails(&mut self) -> Result<(), SimError> {
        let mut draw = self.node_failures.clone();
        let node = draw.below(self.machines.len() as u64) as u32;
        let hit = self.is_hit(&mut draw, node);
        let mends = draw.exponential(self.scenario.failures.node_repair.0 as f64) as u64 + 1;
        self.node_failures = draw;
        self.next_node_failure();
        if !hit || self.machines.is_down(node) {
            return Ok(());
        }
        self.tally.counts.node_failures += 1;
        for slot in self.machines.holders(node, None) {
            self.fail(slot);
        }
        self.clock.put(self.now.saturating_add(mends), Event::NodeBack { node });
        if let Some(node) = self.machines.set_down(node, true) {
            self.tell(Change::Node { node: Box::new(node) })?;
            self.want_look(self.now);
        }
        Ok(())
    }

    fn device_fails(&mut self) -> Result<(), SimError> {
        let mut draw = self.device_failures.clone();
        let node = draw.below(self.machines.len() as u64) as u32;
        let device = draw.below(u64::from(self.machines.devices(node))) as u32;
        let hit = self.is_hit(&mut draw, node);
        let mends = draw.exponential(self.scenario.failures.device_repair.0 as f64) as u64 + 1;
        self.device_failures = draw;
        self.next_device_failure();
        let place = Place { node, device };
        if !hit || self.machines.is_down(node) || !self.machines.is_counted(place) {
            return Ok(());
        }
        let failed = Health::Failed("Xid 79".to_owned());
        let Some(told) = self.machines.set_health(place, failed) else { return Ok(()) };
        self.tally.counts.device_failures += 1;
        for slot in self.machines.holders(node, Some(device)) {
            self.fail(slot);
        }
        self.clock.put(self.now.saturating_add(mends), Event::DeviceBack { node, device });
        self.tell(Change::Node { node: Box::new(told) })?;
        self.want_look(self.now);
        Ok(())
    }

    /// Lets the scheduler look, and does what it decides.
    fn look(&mut self) -> Result<bool, SimError> {
        let now = Timestamp(self.now);
        let object = |what| SimError::Objected { at: now.0, what };
        (self.next_look, self.last_look) = (None, Some(self.now));
        self.observer.deciding(&self.scheduler, now).map_err(object)?;
        let cycle = self.scheduler.cycle(now);
        self.observer.decided(&self.scheduler, &cycle).map_err(object)?;
        self.tally.cycles += 1;
        self.tally.considered += cycle.considered;
        // Starts first: whoever is asked to leave keeps its devices for now, and may be a gang that
        // this very cycle has started.
        for plan in &cycle.plan.jobs {
            self.start(plan)?;
        }
        for eviction in &cycle.evictions {
            self.evict(eviction)?;
        }
        for (job, why) in &cycle.told {
            let live = self.slots.get(job).and_then(|slot| self.live.get_mut(*slot as usize));
            if let Some(live) = live.and_then(Option::as_deref_mut)
                && live.stands == Stands::Waiting
            {
                self.tally.told(live, Some(why.reason), self.now);
            }
        }
        if let Some(wake) = cycle.wake {
            self.want_look(wake.0.max(self.now + 1));
        }
        let quiet = cycle.plan.jobs.is_empty() && cycle.evictions.is_empty();
        Ok(quiet
            && cycle.wake.is_none()
            && self.next_job.is_none()
            && self.level.placed == 0
            && self.level.waiting > 0
            && self.machines.is_whole())
    }

    fn evict(&mut self, eviction: &Eviction) -> Result<(), SimError> {
        let (now, rules) = (self.now, self.scenario.eviction);
        let slot = self.slots.get(&eviction.job).copied();
        let live = slot.and_then(|slot| self.live.get_mut(slot as usize)?.as_deref_mut());
        let (Some(slot), Some(live)) = (slot, live) else {
            let what = format!("{} is evicted, and is not there", eviction.job);
            return Err(SimError::Impossible { at: now, what });
        };
        if live.attempt != eviction.attempt || live.stands == Stands::Waiting {
            let what = format!("{} is evicted, and holds nothing", eviction.job);
            return Err(SimError::Impossible { at: now, what });
        }
        if !matches!(live.stands, Stands::Starting | Stands::Working) {
            // It leaves already.
            return Ok(());
        }
        self.tally.evicted(eviction.cause);
        if live.stands == Stands::Working {
            if live.finish_at() <= now.saturating_add(rules.grace.0) {
                live.stands = Stands::Ending;
                return Ok(());
            }
            self.level.working -= live.milli;
        }
        let cost = live.job.saves.map(|saves| saves.cost_ms);
        let saving = cost
            .filter(|cost| rules.saves && live.stands == Stands::Working && *cost <= rules.grace.0);
        (live.stands, live.halted_at) = (Stands::Leaving, Some(now));
        live.ends = End::Evicted { saved: saving.is_some() };
        let start = live.start;
        let takes = saving.unwrap_or(rules.exit.0);
        self.clock.put(now.saturating_add(takes), Event::Left { slot, start });
        Ok(())
    }

    fn start(&mut self, plan: &JobPlan) -> Result<(), SimError> {
        let now = self.now;
        let wrong = |what: String| SimError::Impossible { at: now, what };
        let slot = self.slots.get(&plan.job).copied();
        let live = slot.and_then(|slot| self.live.get_mut(slot as usize)?.as_deref_mut());
        let (Some(slot), Some(live)) = (slot, live) else {
            return Err(wrong(format!("{} starts, and is not there", plan.job)));
        };
        if live.stands != Stands::Waiting || live.attempt != plan.attempt {
            return Err(wrong(format!("{} starts attempt {} twice", plan.job, plan.attempt)));
        }
        let mut places = Vec::with_capacity(plan.assignments.len());
        for assignment in &plan.assignments {
            let place = self.machines.find(&assignment.device);
            let unknown = || wrong(format!("{} gets {}", plan.job, assignment.device));
            places.push(place.ok_or_else(unknown)?);
        }
        let share = u64::from(live.job.gang.share_milli);
        let counted = places.iter().filter(|place| self.machines.is_counted(**place)).count();
        self.machines.hold(slot, &places, share, true);
        self.starts += 1;
        let first = live.first_start.is_none();
        let starting = if first { live.job.start_ms } else { live.job.restart_ms };
        live.first_start.get_or_insert(now);
        live.stands = Stands::Starting;
        live.start = self.starts;
        live.ranks = places.len() as u32;
        live.milli = counted as u64 * share;
        live.places = places;
        live.placed_at = now;
        live.ready_at = now.saturating_add(starting);
        let (start, ready, milli) = (live.start, live.ready_at, live.milli);
        self.tally.told(live, None, now);
        if first {
            self.tally.started(live, now);
        }
        self.level.placed += 1;
        self.level.waiting -= 1;
        self.level.held += milli;
        let queue = live.queue;
        let wants = match self.live.get(slot as usize) {
            Some(Some(live)) => self.wants(live),
            _ => 0,
        };
        self.level.wanted -= wants;
        self.tally.fairness.change(queue, milli as i64, -(wants as i64));
        self.clock.put(ready, Event::Ready { slot, start });
        Ok(())
    }

    /// Ends the simulation now: what runs is settled as if it had saved its work.
    fn close(mut self, policy: &str, ending: Ending) -> Result<PolicyReport, SimError> {
        let now = self.now;
        self.tally.counts.waiting = self.level.waiting;
        self.tally.counts.running = self.level.placed;
        for slot in 0..self.live.len() as u32 {
            let holds =
                matches!(&self.live[slot as usize], Some(live) if live.stands != Stands::Waiting);
            if holds {
                self.give_back(slot);
            }
            if let Some(Some(live)) = self.live.get_mut(slot as usize) {
                self.tally.told(live, None, now);
                self.tally.progressed(live, now);
            }
        }
        if !self.tally.is_balanced(self.machines.capacity(), now) {
            let found = self.tally.ledger.total();
            let expected = u128::from(self.machines.capacity()) * u128::from(now);
            return Err(SimError::Unbalanced { found, expected });
        }
        let mut waiting: Vec<&Live> = self
            .live
            .iter()
            .flatten()
            .map(Box::as_ref)
            .filter(|live| live.first_start.is_none())
            .collect();
        waiting.sort_by_key(|live| live.number);
        Ok(self.tally.report(policy, ending, self.machines.capacity(), waiting.into_iter()))
    }
}
