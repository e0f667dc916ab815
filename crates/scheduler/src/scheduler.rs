//! The scheduler as a value: the fold over changes, and what is asked of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drumline_cluster::{Change, ChangeError, Commitment, Request, Slice, Snapshot};
use drumline_placement::Cycle;
use drumline_queue::{Charge, ModelId, QueueId, Tree};
use drumline_spec::{Gang, QueueSpec, WHOLE_DEVICE};
use drumline_types::{Attempt, DeviceId, Explanation, JobId, QueueName, Timestamp};

use crate::holds::Holds;
use crate::job::{Job, Placed, Stand};
use crate::lines::Lines;
use crate::options::Options;
use crate::saved::{Awaited, Leaving, Past};
use crate::vain::Searches;

/// A job's place in the scheduler's table. It decides nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(pub(crate) usize);

/// The scheduler: a fleet, its queues and jobs, and what it decides about them.
///
/// Changes come in through [`Scheduler::apply`], decisions go out through [`Scheduler::cycle`].
/// Same changes and options, same decisions.
#[derive(Debug, Clone)]
pub struct Scheduler {
    pub(crate) options: Options,
    pub(crate) now: Timestamp,
    pub(crate) fleet: Snapshot,
    pub(crate) tree: Tree,
    pub(crate) ids: BTreeMap<Arc<JobId>, Slot>,
    pub(crate) jobs: Vec<Option<Job>>,
    free: Vec<Slot>,
    pub(crate) lines: Lines,
    /// Jobs that are held back or rest, by the moment at which they may go on.
    pub(crate) aside: BTreeSet<(Timestamp, Arc<JobId>)>,
    /// Jobs that hold devices, by their estimated ends.
    pub(crate) ends: BTreeSet<(Timestamp, Arc<JobId>, Slot)>,
    /// Of those, the ones that were asked to leave.
    pub(crate) leaving: BTreeSet<(Arc<JobId>, Slot)>,
    /// Jobs that hold devices, by queue and priority.
    pub(crate) placed: BTreeMap<QueueName, BTreeSet<(i32, Arc<JobId>, Slot)>>,
    pub(crate) holds: Holds,
    /// Jobs that hold devices and have asked for spares.
    pub(crate) spared: BTreeSet<Arc<JobId>>,
    /// What had been freed when spares were last sought for a job.
    pub(crate) sought: BTreeMap<Arc<JobId>, u64>,
    /// Spares from before this scheduler started, whose nodes are still to be heard.
    pub(crate) awaited: BTreeMap<Arc<JobId>, Awaited>,
    /// What is counted as used because it is kept; nothing between two cycles.
    pub(crate) supposed: Option<BTreeMap<JobId, (QueueId, Charge)>>,
    /// Grows whenever quota may have become free, or an order may have changed.
    pub(crate) loosened: u64,
    pub(crate) dirty: bool,
    /// Queues in or below which this cycle has started jobs.
    pub(crate) grew: BTreeSet<QueueId>,
    /// Counts cycles, so that nobody starts and leaves in the same one.
    pub(crate) cycles: u64,
    pub(crate) searches: Searches,
}

impl Scheduler {
    /// Returns a scheduler that knows no node, and only the queue `default`, without limits.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let mut scheduler = Self::bare(options);
        let default = QueueSpec::open(QueueName::default_queue());
        // A root queue without limits is always accepted.
        let _ = scheduler.tree.set(default, Timestamp(0));
        scheduler
    }

    pub(crate) fn bare(options: Options) -> Self {
        Self {
            tree: Tree::new(options.half_life_ms),
            options,
            now: Timestamp(0),
            fleet: Snapshot::new(),
            ids: BTreeMap::new(),
            jobs: Vec::new(),
            free: Vec::new(),
            lines: Lines::default(),
            aside: BTreeSet::new(),
            ends: BTreeSet::new(),
            leaving: BTreeSet::new(),
            placed: BTreeMap::new(),
            holds: Holds::default(),
            spared: BTreeSet::new(),
            sought: BTreeMap::new(),
            awaited: BTreeMap::new(),
            supposed: None,
            loosened: 0,
            dirty: true,
            grew: BTreeSet::new(),
            cycles: 0,
            searches: Searches::default(),
        }
    }

    /// Returns the fleet as the scheduler sees it.
    #[must_use]
    pub fn fleet(&self) -> &Snapshot {
        &self.fleet
    }

    /// Returns the queues and what they use.
    #[must_use]
    pub fn queues(&self) -> &Tree {
        &self.tree
    }

    /// Returns how many jobs wait in line and how many hold devices.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.lines.len(), self.ends.len())
    }

    /// Returns whether anything has changed since the last cycle, or the last one left work over.
    #[must_use]
    pub fn dirty(&self) -> bool {
        self.dirty
    }

    /// Takes note of one thing that happened.
    ///
    /// # Errors
    /// [`ChangeError`]; nothing is changed then.
    pub fn apply(&mut self, change: Change, now: Timestamp) -> Result<(), ChangeError> {
        self.now = self.now.max(now);
        let now = self.now;
        match change {
            Change::Node { node } => {
                self.holds.doubt_all();
                self.count_node(&node.name.clone(), false, now);
                let name = node.name.clone();
                self.fleet.upsert_node(*node);
                self.count_node(&name, true, now);
            }
            Change::NodeGone { node } => {
                self.holds.doubt_all();
                self.count_node(&node, false, now);
                self.fleet.remove_node(&node);
            }
            Change::Queue { queue } => {
                let name = queue.name.clone();
                self.tree
                    .set(*queue, now)
                    .map_err(|why| ChangeError::Queue { queue: name, why })?;
                self.queues_changed();
            }
            Change::QueueGone { queue } => {
                self.tree.remove(&queue, now).map_err(|why| ChangeError::Queue { queue, why })?;
                self.queues_changed();
            }
            Change::Submitted { request, attempt, not_before } => {
                self.submit(*request, attempt, not_before);
            }
            Change::Held { job, held } => {
                let slot = self.slot(&job)?;
                self.hold_back(slot, held);
            }
            Change::Adopted { request, attempt, devices, started } => {
                self.adopt(*request, attempt, devices, started)?;
            }
            Change::Spared { job, devices } => {
                let slot = self.slot(&job)?;
                let id = self.job(slot).id.clone();
                self.awaited.insert(id, Awaited { devices, until: now.plus_ms(AWAITED_MS) });
            }
            Change::Running { job } => {
                let slot = self.slot(&job)?;
                if let Some(placed) = self.job_mut(slot).placed_mut() {
                    placed.running = true;
                }
                return Ok(());
            }
            Change::Checkpointed { job } => {
                let slot = self.slot(&job)?;
                if let Some(placed) = self.job_mut(slot).placed_mut() {
                    placed.safe = now;
                }
                return Ok(());
            }
            Change::Requeued { job, attempt, not_before } => {
                let slot = self.slot(&job)?;
                self.requeue(slot, attempt, not_before);
            }
            Change::Ended { job } => {
                let slot = self.slot(&job)?;
                self.leave(slot);
                self.forget(slot);
            }
        }
        self.dirty = true;
        Ok(())
    }

    /// Returns a job's place in the table.
    fn slot(&self, job: &JobId) -> Result<Slot, ChangeError> {
        self.ids.get(job).copied().ok_or_else(|| ChangeError::UnknownJob(job.clone()))
    }

    /// Returns the job in a slot that is in use.
    pub(crate) fn job(&self, slot: Slot) -> &Job {
        self.jobs[slot.0].as_ref().expect("a slot that the table of ids names is in use")
    }

    pub(crate) fn job_mut(&mut self, slot: Slot) -> &mut Job {
        self.jobs[slot.0].as_mut().expect("a slot that the table of ids names is in use")
    }

    /// Returns the job of this name, if it is known.
    pub(crate) fn known(&self, job: &JobId) -> Option<&Job> {
        self.ids.get(job).map(|&slot| self.job(slot))
    }

    fn submit(&mut self, request: Request, attempt: Attempt, not_before: Timestamp) {
        let held = match self.ids.get(&request.job).copied() {
            Some(slot) => {
                let held = self.job(slot).held;
                self.leave(slot);
                self.forget(slot);
                held
            }
            None => false,
        };
        let slot = self.insert(request, attempt, held, Past::default());
        self.wait(slot, not_before, None);
    }

    pub(crate) fn insert(
        &mut self,
        request: Request,
        attempt: Attempt,
        held: bool,
        past: Past,
    ) -> Slot {
        let id = Arc::new(request.job.clone());
        let stand = Stand::Aside { not_before: Timestamp(0), told: None };
        let request = Arc::new(request);
        let job = Job { id: id.clone(), request, attempt, held, stand, past };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            Slot(self.jobs.len() - 1)
        });
        self.jobs[slot.0] = Some(job);
        self.ids.insert(id, slot);
        slot
    }

    fn forget(&mut self, slot: Slot) {
        if let Some(job) = self.jobs[slot.0].take() {
            self.drop_hold(&job.id);
            self.ids.remove(&job.id);
            self.free.push(slot);
        }
    }

    /// Puts a job that holds nothing into its queue's line, or aside until it may go there.
    pub(crate) fn wait(
        &mut self,
        slot: Slot,
        not_before: Timestamp,
        told: Option<Arc<Explanation>>,
    ) {
        let job = self.job(slot);
        let (id, held) = (job.id.clone(), job.held);
        if held || not_before > self.now {
            // Who is held back waits for a change, not for a moment.
            let until = if held { Timestamp(u64::MAX) } else { not_before };
            if told.is_none() {
                self.lines.untold.insert(id.clone());
            }
            self.aside.insert((until, id));
            self.job_mut(slot).stand = Stand::Aside { not_before, told };
        } else {
            let (alike, place) = (job.alike(), job.place(&self.options));
            let class = self.lines.join(alike, place.clone(), told.is_none());
            self.job_mut(slot).stand = Stand::InLine { class, place, told };
        }
    }

    /// Takes a job from wherever it stands; it holds nothing and waits nowhere afterwards.
    pub(crate) fn leave(&mut self, slot: Slot) {
        let job = self.job_mut(slot);
        let id = job.id.clone();
        let aside = Stand::Aside { not_before: Timestamp(0), told: None };
        match std::mem::replace(&mut job.stand, aside) {
            Stand::Aside { not_before, .. } => {
                self.aside.remove(&(not_before, id.clone()));
                self.aside.remove(&(Timestamp(u64::MAX), id.clone()));
                self.lines.untold.remove(&id);
            }
            Stand::InLine { class, place, .. } => {
                self.lines.leave(class, &place);
                self.loosened += 1;
            }
            Stand::Placed(placed) => {
                let (queue, priority) = (job.request.settings.queue.clone(), job.priority());
                self.ends.remove(&(placed.ends, id.clone(), slot));
                self.leaving.remove(&(id.clone(), slot));
                self.spared.remove(&id);
                self.sought.remove(&id);
                self.awaited.remove(&id);
                if let Some(set) = self.placed.get_mut(&queue) {
                    set.remove(&(priority, id.clone(), slot));
                    if set.is_empty() {
                        self.placed.remove(&queue);
                    }
                }
                self.tree.release(&queue, &placed.charge, self.now);
                self.fleet.release(&id);
                self.loosened += 1;
            }
        }
    }

    fn hold_back(&mut self, slot: Slot, held: bool) {
        let job = self.job_mut(slot);
        if job.held == held {
            return;
        }
        job.held = held;
        let not_before = match &job.stand {
            Stand::Aside { not_before, .. } => *not_before,
            Stand::InLine { .. } => Timestamp(0),
            Stand::Placed(_) => return,
        };
        let id = job.id.clone();
        self.leave(slot);
        self.drop_hold(&id);
        self.wait(slot, not_before, None);
    }

    fn adopt(
        &mut self,
        request: Request,
        attempt: Attempt,
        devices: Vec<DeviceId>,
        started: Timestamp,
    ) -> Result<(), ChangeError> {
        let known = self.ids.get(&request.job).copied();
        let commitment =
            Commitment { job: request.job.clone(), attempt, devices, slice: slice(&request.gang) };
        let before = known.and_then(|_| self.fleet.release(&request.job));
        if let Err(error) = self.fleet.hold(commitment) {
            if let Some(before) = before {
                self.fleet.hold(before)?;
            }
            return Err(error.into());
        }
        let (held, past) = match known {
            Some(slot) => {
                // Its devices are the new attempt's already.
                let commitment = self.fleet.release(&request.job);
                self.leave(slot);
                let (held, past) = (self.job(slot).held, self.job(slot).past.clone());
                self.forget(slot);
                if let Some(commitment) = commitment {
                    self.fleet.hold(commitment)?;
                }
                (held, past)
            }
            None => (false, Past::default()),
        };
        let slot = self.insert(request, attempt, held, past);
        self.placed(slot, started, started, None, None);
        self.holds.doubt_all();
        Ok(())
    }

    /// Makes a job whose devices the fleet already shows as its own one that is placed.
    pub(crate) fn placed(
        &mut self,
        slot: Slot,
        started: Timestamp,
        safe: Timestamp,
        ends: Option<Timestamp>,
        leaving: Option<Leaving>,
    ) {
        let now = self.now;
        let job = self.job(slot);
        let (id, queue) = (job.id.clone(), job.request.settings.queue.clone());
        let ends = ends.unwrap_or_else(|| job.first_end(started));
        let gang = job.request.gang.clone();
        let devices = self.fleet.commitment(&id).map_or_else(Vec::new, |held| held.devices.clone());
        let ranks = devices.len() as u32;
        let charge = Arc::new(self.charge_of(&gang, &devices, now));
        self.tree.charge(&queue, &charge, now);
        self.ends.insert((ends, id.clone(), slot));
        if leaving.is_some() {
            self.leaving.insert((id.clone(), slot));
        }
        if gang.spares > 0 {
            self.spared.insert(id.clone());
        }
        let priority = self.job(slot).priority();
        self.placed.entry(queue).or_default().insert((priority, id, slot));
        let cycle = self.cycles;
        let placed = Placed { started, running: false, safe, ends, leaving, charge, ranks, cycle };
        self.job_mut(slot).stand = Stand::Placed(placed);
    }

    /// Ends a job's attempt: it holds nothing more, and waits for the next one.
    pub(crate) fn requeue(&mut self, slot: Slot, attempt: Attempt, not_before: Timestamp) {
        if let Some(placed) = self.job(slot).placed() {
            let (safe_ms, leaving) = (placed.safe.since_ms(placed.started), placed.leaving.clone());
            let lost_ms = match &leaving {
                Some(_) => self.now.since_ms(placed.safe) + self.options.restart_cost_ms,
                None => 0,
            };
            let now = self.now;
            let job = self.job_mut(slot);
            job.past.since = now;
            job.past.lost_ms = job.past.lost_ms.saturating_sub(safe_ms).saturating_add(lost_ms);
            job.past.done_ms = job.past.done_ms.saturating_add(safe_ms);
            job.past.size = leaving.and_then(|leaving| leaving.resize_to);
        }
        self.leave(slot);
        self.job_mut(slot).attempt = attempt;
        self.wait(slot, not_before, None);
    }

    fn queues_changed(&mut self) {
        self.loosened += 1;
        self.searches.clear();
        self.lines.wake_all();
    }

    /// Counts a node's devices into or out of what the queues share.
    fn count_node(&mut self, name: &drumline_types::NodeName, add: bool, now: Timestamp) {
        let Some(state) = self.fleet.node(name) else { return };
        let devices: Vec<_> =
            state.node().devices.iter().map(|d| (d.kind, d.model.clone())).collect();
        for (kind, model) in devices {
            let model = self.tree.model(kind, &model, now);
            let milli = u64::from(WHOLE_DEVICE);
            let (less, more) = if add { (0, milli) } else { (milli, 0) };
            self.tree.resize(model, less, more);
        }
    }

    /// Returns what a gang is charged for devices. Those of one gang are of one model, but for its
    /// leader's.
    pub(crate) fn charge_of(
        &mut self,
        gang: &Gang,
        devices: &[DeviceId],
        now: Timestamp,
    ) -> Charge {
        self.charge_for(gang, devices, devices.len(), now)
    }

    /// Does as [`Scheduler::charge_of`], told the first two devices and the number of all.
    pub(crate) fn charge_for(
        &mut self,
        gang: &Gang,
        first: &[DeviceId],
        count: usize,
        now: Timestamp,
    ) -> Charge {
        let share = u64::from(gang.share_milli.min(WHOLE_DEVICE));
        let mut charge: Charge = Vec::with_capacity(2);
        let mut add = |model: ModelId, amount: u64| match charge.iter_mut().find(|c| c.0 == model) {
            Some(entry) => entry.1 += amount,
            None => charge.push((model, amount)),
        };
        let (first, rest) = match (gang.leader, first.split_first()) {
            (Some(kind), Some((leader, rest))) => {
                add(self.model_of(leader, kind, now), share);
                (rest.first(), count - 1)
            }
            _ => (first.first(), count),
        };
        if let Some(first) = first {
            add(self.model_of(first, gang.device, now), share * rest as u64);
        }
        charge.sort();
        charge
    }

    fn model_of(
        &mut self,
        device: &DeviceId,
        kind: drumline_spec::DeviceKind,
        now: Timestamp,
    ) -> ModelId {
        let known = self.fleet.node(&device.node).and_then(|state| {
            let device = state.node().devices.get(device.index as usize)?;
            Some((device.kind, device.model.clone()))
        });
        match known {
            Some((kind, model)) => self.tree.model(kind, &model, now),
            None => Tree::unknown(kind),
        }
    }

    /// Takes back what the last cycle decided: its plan failed the audit, or could not be stored.
    pub fn reject(&mut self, cycle: &Cycle, why: &Explanation) {
        let told = Arc::new(why.clone());
        // The same plan would be made at once; a person should have the time to see it.
        let not_before = cycle.now.plus_ms(REJECTED_MS);
        for job in &cycle.plan.jobs {
            if let Some(&slot) = self.ids.get(&job.job)
                && self.job(slot).placed().is_some()
            {
                self.drop_hold(&job.job);
                self.leave(slot);
                self.wait(slot, not_before, Some(told.clone()));
            }
        }
        self.holds.doubt_all();
        for eviction in &cycle.evictions {
            if let Some(&slot) = self.ids.get(&eviction.job) {
                let job = self.job_mut(slot);
                let id = job.id.clone();
                if let Some(placed) = job.placed_mut() {
                    placed.leaving = None;
                    self.leaving.remove(&(id, slot));
                }
            }
            if let Some(beneficiary) = &eviction.beneficiary {
                self.drop_hold(beneficiary);
            }
        }
        self.dirty = true;
    }

    /// Says where jobs would go now, and to whose cost, if they were submitted. Nothing is kept.
    #[must_use]
    pub fn preview(&self, requests: &[Request], now: Timestamp) -> Cycle {
        self.clone().into_preview(requests, now)
    }

    /// As [`Self::preview`], on a copy that is made for it and used up.
    #[must_use]
    pub fn into_preview(mut self, requests: &[Request], now: Timestamp) -> Cycle {
        let trial = &mut self;
        for request in requests {
            let request = Box::new(request.clone());
            let change =
                Change::Submitted { request, attempt: Attempt(1), not_before: Timestamp(0) };
            // A new job is always accepted; what is wrong with it is said by the cycle.
            let _ = trial.apply(change, now);
        }
        let mut cycle = trial.cycle(now);
        let asked = |job: &JobId| requests.iter().any(|request| request.job == *job);
        cycle.plan.jobs.retain(|job| asked(&job.job));
        cycle.evictions.retain(|e| e.beneficiary.as_ref().is_some_and(asked));
        cycle.told = requests
            .iter()
            .filter_map(|request| Some((request.job.clone(), trial.explain(&request.job, now)?)))
            .collect();
        cycle
    }
}

/// Nodes of spares from before a restart are waited for so long, in milliseconds.
const AWAITED_MS: u64 = 300_000;

/// A rejected plan is not tried again for so long, in milliseconds.
const REJECTED_MS: u64 = 5_000;

/// Returns what each rank of a gang takes, within what can be had.
pub(crate) fn slice(gang: &Gang) -> Slice {
    let mut slice = Slice::of(gang);
    slice.share_milli = slice.share_milli.clamp(1, WHOLE_DEVICE);
    slice
}
