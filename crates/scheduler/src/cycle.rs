//! One look at the fleet: whose turn it is, who starts, and who is kept waiting by whom.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drumline_cluster::Snapshot;
use drumline_placement::{Constraints, Cycle, Eviction, JobPlan, Placed, Plan};
use drumline_queue::{Candidate, Charge, Closed, Place, QueueId, Short, Tree, Turn};
use drumline_spec::{DeviceKind, Gang};
use drumline_types::{DeviceId, Explanation, JobId, QueueName, Reason, Timestamp};

use crate::holds::Keep;
use crate::job::{Stand, milli, sizes};
use crate::lines::{By, ClassId, ShapeId, Standing};
use crate::promise::Promise;
use crate::scheduler::{Scheduler, Slot, slice};
use crate::site;

/// Classes that are tried in vain in one cycle, at most; the next cycle goes on from there.
const TRIES_MAX: u64 = 4_096;

/// What a cycle has decided so far.
pub(crate) struct Work {
    pub(crate) now: Timestamp,
    pub(crate) jobs: Vec<JobPlan>,
    pub(crate) evictions: Vec<Eviction>,
    pub(crate) told: Vec<(JobId, Explanation)>,
    pub(crate) wake: Option<Timestamp>,
    pub(crate) considered: u64,
    /// Of those, the ones that did not start.
    pub(crate) vain: u64,
    pub(crate) unfinished: bool,
}

impl Work {
    /// Takes note that the passing of time alone may change a decision at `at`.
    pub(crate) fn wake(&mut self, at: Timestamp) {
        if at > self.now && at < Timestamp(u64::MAX) {
            self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
        }
    }
}

/// A queue's line during one cycle.
#[derive(Debug)]
struct Leaf {
    id: QueueId,
    /// The first jobs of the classes that are to be tried.
    ready: BTreeSet<(Place, ClassId)>,
    /// Jobs that wait for quota: nobody behind them in line gets devices of that kind.
    barrier: BTreeMap<DeviceKind, Place>,
    /// When the first of those will have quota, once somebody behind it has asked.
    promised: BTreeMap<DeviceKind, Option<Promise>>,
    /// Without backfill, nobody behind the first job that waits gets anything.
    shut: Option<Place>,
}

/// Why a job that was tried does not start.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) by: By,
    pub(crate) why: Explanation,
    /// The quota that is short.
    pub(crate) short: Option<Short>,
}

impl Scheduler {
    /// Decides who starts and who leaves now. What it decides is taken as done: the caller
    /// launches and evicts, and reports what comes of it as changes.
    pub fn cycle(&mut self, now: Timestamp) -> Cycle {
        self.now = self.now.max(now);
        let now = self.now;
        self.cycles += 1;
        self.grew.clear();
        self.searches.begin(now);
        let parent = self.fleet.revision();
        let mut work = Work {
            now,
            jobs: Vec::new(),
            evictions: Vec::new(),
            told: Vec::new(),
            wake: None,
            considered: 0,
            vain: 0,
            unfinished: false,
        };
        self.correct_ends(now);
        self.rouse(&mut work);
        self.regain_spares(&mut work);
        self.review_spares(&mut work);
        self.review_holds(&mut work);
        self.start_nominated(&mut work);
        self.take_turns(&mut work);
        self.stock_spares(&mut work);
        self.grow(&mut work);
        self.tell(&mut work);
        self.dirty = work.unfinished;
        let plan = Plan { parent, jobs: work.jobs };
        let (evictions, wake, considered) = (work.evictions, work.wake, work.considered);
        let spares = self.all_spares();
        Cycle { now, plan, evictions, told: work.told, spares, wake, considered }
    }

    /// Moves the estimated ends of jobs that have run over.
    fn correct_ends(&mut self, now: Timestamp) {
        while let Some((at, id, slot)) = self.ends.first().cloned() {
            if at > now {
                break;
            }
            self.ends.pop_first();
            let job = self.job(slot);
            let Some(placed) = job.placed() else { continue };
            let later = job.later_end(placed, now);
            if let Some(held) = self.fleet.commitment(&id) {
                self.holds.doubt(&held.devices);
            }
            if let Some(placed) = self.job_mut(slot).placed_mut() {
                placed.ends = later;
            }
            self.ends.insert((later, id, slot));
        }
    }

    /// Puts jobs whose rest is over into line.
    fn rouse(&mut self, work: &mut Work) {
        while let Some((at, id)) = self.aside.first().cloned() {
            if at > work.now {
                work.wake(at);
                break;
            }
            self.aside.pop_first();
            let Some(&slot) = self.ids.get(&id) else { continue };
            let Stand::Aside { told, .. } = &self.job(slot).stand else { continue };
            let told = told.clone();
            self.lines.untold.remove(&id);
            self.wait(slot, Timestamp(0), told);
        }
    }

    /// Starts the jobs whose nominated devices are all free now.
    fn start_nominated(&mut self, work: &mut Work) {
        let nominated: Vec<JobId> = self
            .holds
            .iter()
            .filter(|(_, hold)| matches!(hold.keep, Keep::Nominated { .. }))
            .map(|(job, _)| job.clone())
            .collect();
        for id in nominated {
            let Some(&slot) = self.ids.get(&id) else { continue };
            let Stand::InLine { class, .. } = &self.job(slot).stand else { continue };
            let Some(class) = self.lines.class(*class) else { continue };
            let alike = class.alike.clone();
            let (queue, gang) = (&alike.queue, &alike.gang);
            let Ok(leaf) = self.tree.leaf(queue) else { continue };
            let Some(hold) = self.holds.of(&id) else { continue };
            if !hold.devices.iter().all(|device| usable(&self.fleet, device, gang)) {
                continue;
            }
            let devices = hold.devices.clone();
            let charge = self.charge_of(gang, &devices, work.now);
            if self.tree.check(leaf, &charge).is_ok() {
                let job = self.job(slot);
                let (split, slice) = (job.split(devices.len() as u32), slice(gang));
                self.start(slot, Placed { devices, split, slice }, work);
            }
        }
    }

    fn take_turns(&mut self, work: &mut Work) {
        self.suppose_kept();
        let mut turn = Turn::new(&self.tree, work.now);
        let mut leaves = self.open_lines(work);
        for leaf in leaves.values_mut() {
            self.look_after_the_head(leaf, work);
        }
        for (id, leaf) in &leaves {
            turn.set(&self.tree, *id, self.candidate(leaf));
        }
        while let Some(id) = turn.next(&self.tree) {
            let Some(leaf) = leaves.get_mut(&id) else { break };
            if work.vain >= TRIES_MAX {
                work.unfinished = true;
                break;
            }
            self.serve(leaf, work);
            turn.set(&self.tree, id, self.candidate(leaf));
        }
        self.suppose_nothing();
    }

    /// Sees which classes of each line are to be tried.
    fn open_lines(&mut self, work: &mut Work) -> BTreeMap<QueueId, Leaf> {
        let mut leaves = BTreeMap::new();
        let queues: Vec<QueueName> = self.lines.lines.keys().cloned().collect();
        for queue in queues {
            match self.tree.leaf(&queue) {
                Ok(id) => {
                    let leaf = self.open_line(&queue, id, work);
                    leaves.insert(id, leaf);
                }
                Err(closed) => {
                    let why = closed_text(&queue, &closed);
                    let classes: Vec<ClassId> = self
                        .lines
                        .lines
                        .get(&queue)
                        .map_or_else(Vec::new, |line| line.classes.iter().copied().collect());
                    for class in classes {
                        self.set_why(class, &why);
                    }
                }
            }
        }
        leaves
    }

    fn open_line(&mut self, queue: &QueueName, id: QueueId, work: &mut Work) -> Leaf {
        let mut leaf = Leaf {
            id,
            ready: BTreeSet::new(),
            barrier: BTreeMap::new(),
            promised: BTreeMap::new(),
            shut: None,
        };
        let Some(line) = self.lines.lines.get(queue) else { return leaf };
        let classes: Vec<ClassId> = line.classes.iter().copied().collect();
        for class_id in classes {
            let stamps = self.stamps(class_id);
            let Some(class) = self.lines.class(class_id) else { continue };
            let mut again = matches!(class.standing,
                Standing::Blocked { by, freed } if freed != stamps.of(by));
            if let Some(asked) = &class.asked {
                if asked.again <= work.now {
                    again = true;
                } else {
                    work.wake(asked.again);
                }
            }
            if again {
                self.lines.set_standing(class_id, Standing::Ready);
            }
            let Some(class) = self.lines.class(class_id) else { continue };
            let Some(first) = class.places.first().cloned() else { continue };
            match class.standing {
                Standing::Ready => {
                    leaf.ready.insert((first, class_id));
                }
                Standing::Blocked { by, .. } => {
                    let kind = class.alike.gang.device;
                    leaf.blocked(by, kind, first, self.options.backfill);
                }
            }
        }
        leaf
    }

    /// Sees to a job that has become the first of its line without having been tried itself: one
    /// like it was tried in vain.
    fn look_after_the_head(&mut self, leaf: &mut Leaf, work: &mut Work) {
        let queue = self.tree.spec(leaf.id).name.clone();
        let Some((place, class_id)) = self.head(&queue) else { return };
        let Some(class) = self.lines.class(class_id) else { return };
        let Standing::Blocked { by: by @ (By::Devices | By::Kept), .. } = class.standing else {
            return;
        };
        let Some(why) = class.why.as_deref().cloned() else { return };
        if let Some(&slot) = self.ids.get(place.job()) {
            let refusal = Refusal { by, why, short: None };
            self.wait_at_the_head(slot, class_id, leaf.id, &refusal, work);
        }
    }

    /// Returns what has been freed so far of what a class may lack.
    pub(crate) fn stamps(&self, class: ClassId) -> Stamps {
        let Some(class) = self.lines.class(class) else { return Stamps::default() };
        let devices = self.freed_for(&class.alike.gang);
        Stamps { devices, any: devices + self.loosened }
    }

    /// Returns what has been freed so far of the devices that a gang may use.
    pub(crate) fn freed_for(&self, gang: &Gang) -> u64 {
        site::grown(&self.fleet, gang)
    }

    fn candidate(&self, leaf: &Leaf) -> Option<Candidate> {
        let (_, class) = leaf.next()?;
        let class = self.lines.class(*class)?;
        let gang = &class.alike.gang;
        let charge = vec![(self.first_model(leaf.id, gang), milli(gang, gang.ranks))];
        let band = i64::from(class.alike.priority)
            .div_euclid(i64::from(self.options.priority_band.max(1)));
        Some(Candidate { charge: Arc::new(charge), band: band as i32 })
    }

    /// Returns the model that a gang is charged for before it is known which it gets.
    fn first_model(&self, queue: QueueId, gang: &Gang) -> drumline_queue::ModelId {
        self.choices(queue, gang)
            .first()
            .map_or_else(|| Tree::unknown(gang.device), |choice| choice.charged)
    }

    /// Tries the first job of a line.
    fn serve(&mut self, leaf: &mut Leaf, work: &mut Work) {
        let Some((place, class_id)) = leaf.ready.first().cloned() else { return };
        let kind = self.kind(class_id);
        if let Some(first) = leaf.behind(&place, kind).cloned()
            && !self.fills_gap(leaf, kind, &first, &place, work.now)
        {
            // Everyone from here on waits behind somebody.
            let by_quota = leaf.shut.as_ref() != Some(&first);
            let why = behind_text(self.lines.class(class_id), &first, by_quota);
            leaf.ready.remove(&(place, class_id));
            self.set_why(class_id, &why);
            return;
        }
        work.considered += 1;
        let Some(&slot) = self.ids.get(place.job()) else {
            leaf.ready.remove(&(place, class_id));
            return;
        };
        match self.attempt(slot, class_id, leaf.id, work) {
            Ok(placed) => {
                leaf.ready.remove(&(place, class_id));
                self.start(slot, placed, work);
                if let Some(next) = self.lines.class(class_id).and_then(|c| c.places.first()) {
                    leaf.ready.insert((next.clone(), class_id));
                }
            }
            Err(refusal) => {
                work.vain += 1;
                leaf.ready.remove(&(place.clone(), class_id));
                self.block(class_id, &refusal);
                let nominated = self.wait_at_the_head(slot, class_id, leaf.id, &refusal, work);
                if !nominated {
                    leaf.blocked(refusal.by, kind, place, self.options.backfill);
                }
            }
        }
    }

    /// Returns whether a job may go before the one that waits for quota: it is gone in time.
    fn fills_gap(
        &mut self,
        leaf: &mut Leaf,
        kind: DeviceKind,
        first: &Place,
        place: &Place,
        now: Timestamp,
    ) -> bool {
        let Some(&slot) = self.ids.get(place.job()) else { return false };
        if !self.options.backfill || leaf.shut.is_some() || self.job(slot).bound(now).is_none() {
            return false;
        }
        if !leaf.promised.contains_key(&kind) {
            let promise = self.promise_at(first, leaf.id, now);
            leaf.promised.insert(kind, promise);
        }
        let promise = leaf.promised.get(&kind).and_then(Option::as_ref);
        self.is_gone_by(slot, promise, now)
    }

    fn kind(&self, class: ClassId) -> DeviceKind {
        self.lines.class(class).map_or(DeviceKind::Cpu, |class| class.alike.gang.device)
    }

    fn block(&mut self, class_id: ClassId, refusal: &Refusal) {
        let freed = self.stamps(class_id).of(refusal.by);
        self.lines.set_standing(class_id, Standing::Blocked { by: refusal.by, freed });
        self.set_why(class_id, &refusal.why);
    }

    /// Looks for quota and devices for one job.
    fn attempt(
        &mut self,
        slot: Slot,
        class_id: ClassId,
        leaf: QueueId,
        work: &mut Work,
    ) -> Result<Placed, Refusal> {
        let Some(class) = self.lines.class(class_id) else { return Err(gone()) };
        let (alike, shape) = (class.alike.clone(), class.shape);
        let gang = &alike.gang;
        let own = self.uncount_own(slot);
        let mut refusal: Option<Refusal> = None;
        let mut found = None;
        for choice in self.choices(leaf, gang) {
            let most = match self.most_allowed(slot, leaf, gang, choice.charged, work.now) {
                Ok(most) => most,
                Err(short) => {
                    refusal.get_or_insert_with(|| self.short_refusal(leaf, gang, short));
                    continue;
                }
            };
            let known = (most == gang.ranks && choice.models.is_none()).then_some(shape);
            let chosen = choice.models.map(|models| Gang { models, ..gang.clone() });
            let chosen = chosen.as_ref().unwrap_or(gang);
            let placed = match self.find(slot, chosen, known, most, work.now) {
                Ok(placed) => Ok(placed),
                Err(unlike) => self.find_on_spares(slot, leaf, chosen, most).ok_or(unlike),
            };
            match placed {
                Ok(placed) => {
                    let placed = self.beside_spares(slot, gang, placed);
                    let charge = milli(gang, placed.devices.len() as u32);
                    let charge = vec![(choice.charged, charge)];
                    match self.check_found(slot, leaf, &charge, &placed.devices, work.now) {
                        Ok(()) => {
                            found = Some(placed);
                            break;
                        }
                        Err(short) => {
                            refusal.get_or_insert_with(|| self.short_refusal(leaf, gang, short));
                        }
                    }
                }
                Err((by, why)) => {
                    // What quota allows and devices do not is told before the reverse.
                    if refusal.as_ref().is_none_or(|r| r.short.is_some()) {
                        refusal = Some(Refusal { by, why, short: None });
                    }
                }
            }
        }
        if found.is_none() {
            found = self.seek_where_others_give_way(slot, leaf, gang, work.now);
            // They look for another place in the next cycle.
            work.unfinished |= found.is_some();
        }
        self.count_again(&own);
        found.ok_or_else(|| refusal.unwrap_or_else(gone))
    }

    /// Returns the greatest size that quota allows.
    pub(crate) fn most_allowed(
        &mut self,
        slot: Slot,
        leaf: QueueId,
        gang: &Gang,
        model: drumline_queue::ModelId,
        now: Timestamp,
    ) -> Result<u32, Short> {
        let sizes = sizes(gang);
        let (mut low, mut high) = (0, sizes.len());
        let mut short = None;
        // The wanted size first: it is the rule.
        let mut middle = high - 1;
        while low < high {
            match self.check(slot, leaf, &vec![(model, milli(gang, sizes[middle]))], now) {
                Ok(()) => low = middle + 1,
                Err(why) => {
                    high = middle;
                    short = Some(why);
                }
            }
            middle = low.midpoint(high);
        }
        match (low, short) {
            (0, Some(short)) => Err(short),
            _ => Ok(sizes[low.max(1) - 1]),
        }
    }

    /// Checks quota before devices are sought. What is kept for later does not count against who is
    /// gone by then, nor what is kept ready against who may borrow it.
    fn check(
        &mut self,
        slot: Slot,
        leaf: QueueId,
        charge: &Charge,
        now: Timestamp,
    ) -> Result<(), Short> {
        let Err(short) = self.tree.check(leaf, charge) else { return Ok(()) };
        let mut lifted = self.kept_for_later(slot, now);
        let gang = self.job(slot).request.gang.clone();
        lifted.extend(self.lenders(slot, leaf, &gang));
        self.check_without(leaf, charge, lifted, short)
    }

    /// Checks quota when devices are found, before a place is accepted: what is kept ready counts as
    /// far as it stays so.
    pub(crate) fn check_found(
        &mut self,
        slot: Slot,
        leaf: QueueId,
        charge: &Charge,
        devices: &[DeviceId],
        now: Timestamp,
    ) -> Result<(), Short> {
        if self.spared.is_empty() {
            return Ok(());
        }
        let lent = self.suppose_lent(slot, devices);
        let checked = match self.tree.check(leaf, charge) {
            Ok(()) => Ok(()),
            Err(short) => {
                let lifted = self.kept_for_later(slot, now);
                self.check_without(leaf, charge, lifted, short)
            }
        };
        self.suppose_back(&lent);
        checked
    }

    /// Returns the waiting jobs whose reservations begin when a job is gone.
    fn kept_for_later(&self, slot: Slot, now: Timestamp) -> Vec<JobId> {
        let job = self.job(slot);
        let Some(bound) = job.bound(now) else { return Vec::new() };
        let later = |keep: &Keep| matches!(keep, Keep::Reserved { start } if bound <= *start);
        self.holds
            .iter()
            .filter(|(owner, hold)| **owner != *job.id && later(&hold.keep))
            .map(|(owner, _)| owner.clone())
            .collect()
    }

    /// Checks quota while nothing counts that is kept for some jobs.
    fn check_without(
        &mut self,
        leaf: QueueId,
        charge: &Charge,
        lifted: Vec<JobId>,
        short: Short,
    ) -> Result<(), Short> {
        if lifted.is_empty() {
            return Err(short);
        }
        let lifted: Vec<JobId> =
            lifted.into_iter().filter(|owner| self.suppose_without(owner)).collect();
        let checked = self.tree.check(leaf, charge);
        for owner in lifted {
            self.suppose_with(&owner);
        }
        checked
    }

    /// Looks for devices: first those that are kept for nobody else, then, if it is known to be gone
    /// in time, those that are reserved for later.
    pub(crate) fn find(
        &mut self,
        slot: Slot,
        gang: &Gang,
        shape: Option<ShapeId>,
        most: u32,
        now: Timestamp,
    ) -> Result<Placed, (By, Explanation)> {
        let job = self.jobs[slot.0].as_ref().ok_or_else(|| (By::Outright, gone().why))?;
        let (id, split, bound) = (job.id.clone(), job.split(gang.ranks), job.bound(now));
        let bounds = self.bounds(Some(most));
        let own = self.holds.of(&id).is_some();
        let others = self.holds.len() > usize::from(own);
        // What was found out about the same gang without devices of its own holds for this one.
        let shape = shape.filter(|_| !own);
        let freed = site::grown(&self.fleet, gang);
        let any = freed + self.loosened;
        let known = shape
            .and_then(|shape| self.lines.misfits.get(&shape))
            .filter(|(at, _)| *at == freed)
            .map(|(_, why)| Explanation::clone(why));
        let first = match known {
            Some(why) => Err(why),
            None if own && self.may_hold(gang, std::slice::from_ref(&*id)) => {
                let mut trial = self.fleet.trial();
                trial.unreserve(&id);
                site::find(trial.snapshot(), gang, split, &bounds)
            }
            None => {
                let found = site::find(&self.fleet, gang, split, &bounds);
                if let (Some(shape), Err(why)) = (shape, &found) {
                    self.lines.misfits.insert(shape, (freed, Arc::new(why.clone())));
                }
                found
            }
        };
        let why = match first {
            Ok(placed) => return Ok(placed),
            Err(why) if !others => return Err((by_devices(&why), why)),
            Err(why) => why,
        };
        let by = if by_devices(&why) == By::Outright { By::Outright } else { By::Kept };
        // Who does not say how long it runs gets nothing that is kept for later.
        let Some(bound) = bound else { return Err((by, why)) };
        let out = shape
            .and_then(|shape| self.lines.kept_out.get(&shape))
            .is_some_and(|(at, least)| *at == any && bound >= *least);
        if out || (!own && self.searches.is_kept_out(gang, bound)) {
            return Err((by, why));
        }
        let later: Vec<JobId> = self
            .holds
            .iter()
            .filter(|(owner, hold)| {
                **owner != *id && matches!(hold.keep, Keep::Reserved { start } if bound <= start)
            })
            .map(|(owner, _)| owner.clone())
            .collect();
        let lifted: Vec<JobId> =
            later.iter().cloned().chain(own.then(|| JobId::clone(&id))).collect();
        if !later.is_empty() && self.may_hold(gang, &lifted) {
            let mut trial = self.fleet.trial();
            trial.unreserve(&id);
            for owner in &later {
                trial.unreserve(owner);
            }
            if let Some(placed) = site::fit(trial.snapshot(), gang, split, &bounds) {
                return Ok(placed);
            }
            if !own {
                self.searches.kept_out(gang, bound);
            }
            if let Some(shape) = shape {
                self.lines.kept_out.insert(shape, (any, bound));
            }
        }
        Err((by, why))
    }

    /// Returns how places are chosen.
    pub(crate) fn bounds(&self, most: Option<u32>) -> Constraints {
        let (scoring, seed) = (self.options.scoring, self.options.seed);
        Constraints { scoring, seed, most, ..Constraints::default() }
    }

    /// Starts a job on devices that were found for it.
    pub(crate) fn start(&mut self, slot: Slot, placed: Placed, work: &mut Work) {
        let job = self.job(slot);
        let (id, attempt) = (job.id.clone(), job.attempt);
        let gang_queue = job.request.settings.queue.clone();
        let mut gang = job.request.gang.clone();
        gang.ranks = placed.devices.len() as u32;
        self.drop_hold(&id);
        self.leave(slot);
        if let Err(error) = self.fleet.hold(placed.commitment(&id, attempt)) {
            // Found free a moment ago, so this cannot be. The job waits on, and says so.
            let why = Explanation::new(Reason::WaitingForDevices, error.to_string());
            self.wait(slot, work.now, Some(Arc::new(why)));
            return;
        }
        self.placed(slot, work.now, work.now, None, None);
        self.settle_spares(slot, &placed.devices);
        // Who was disrupted once is left alone for a while when it runs again.
        let immune = self.left_alone(self.job(slot).past.lost_ms, work.now);
        let past = &mut self.job_mut(slot).past;
        if !past.disrupted.is_empty() {
            past.immune = immune;
        }
        if let Some(queue) = self.tree.find(&gang_queue) {
            self.grew.extend(self.tree.path(queue));
        }
        work.jobs.push(JobPlan::new(&id, attempt, &gang, placed));
        self.seek_spares(slot);
    }

    fn short_refusal(&self, leaf: QueueId, gang: &Gang, short: Short) -> Refusal {
        let name = &self.tree.spec(leaf).name;
        let why = short_text(&self.tree, name, gang, &short);
        let by = if short.outright() { By::Outright } else { By::Quota };
        Refusal { by, why, short: Some(short) }
    }
}

/// Counts of what was freed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stamps {
    pub(crate) devices: u64,
    pub(crate) any: u64,
}

impl Stamps {
    pub(crate) fn of(self, by: By) -> u64 {
        match by {
            By::Devices => self.devices,
            By::Kept | By::Quota | By::Outright => self.any,
        }
    }
}

impl Leaf {
    /// Takes note of a job that waits, as far as those behind it are concerned.
    fn blocked(&mut self, by: By, kind: DeviceKind, place: Place, backfill: bool) {
        if by == By::Outright {
            return;
        }
        if by == By::Quota {
            let first = self.barrier.entry(kind).or_insert_with(|| place.clone());
            if place < *first {
                *first = place.clone();
                self.promised.remove(&kind);
            }
        }
        if !backfill && self.shut.as_ref().is_none_or(|first| place < *first) {
            self.shut = Some(place);
        }
    }

    /// Returns the job behind which a job of this place has to wait.
    fn behind(&self, place: &Place, kind: DeviceKind) -> Option<&Place> {
        self.shut
            .as_ref()
            .filter(|first| *first < place)
            .or_else(|| self.barrier.get(&kind).filter(|first| *first < place))
    }

    fn next(&self) -> Option<&(Place, ClassId)> {
        self.ready.first()
    }
}

/// Returns whether a device is free for a gang that it is kept for.
fn usable(fleet: &Snapshot, device: &DeviceId, gang: &Gang) -> bool {
    fleet.node(&device.node).is_some_and(|state| {
        state.node().ineligible_for(&gang.tolerations).is_none()
            && state
                .node()
                .devices
                .get(device.index as usize)
                .is_some_and(|d| d.health == drumline_cluster::Health::Healthy)
            && state.left_milli(device.index) >= gang.share_milli
    })
}

fn gone() -> Refusal {
    let why = Explanation::new(Reason::NoMatchingDevice, "the fleet has no device that would do");
    Refusal { by: By::Outright, why, short: None }
}

/// A reason that no start or end of a job changes keeps nobody waiting.
fn by_devices(why: &Explanation) -> By {
    match why.reason {
        Reason::NoMatchingDevice | Reason::ExceedsCluster => By::Outright,
        _ => By::Devices,
    }
}

fn closed_text(queue: &QueueName, closed: &Closed) -> Explanation {
    match closed {
        Closed::Missing => {
            Explanation::new(Reason::QueueMissing, format!("there is no queue {queue}"))
        }
        Closed::Inner(child) => Explanation::new(
            Reason::QueueMissing,
            format!("queue {queue} has queues below it, such as {child}; jobs name one of those"),
        ),
        Closed::Held(held) => Explanation::new(Reason::Held, format!("queue {held} is held")),
    }
}

fn behind_text(class: Option<&crate::lines::Class>, first: &Place, by_quota: bool) -> Explanation {
    let queue = class.map_or_else(String::new, |class| class.alike.queue.to_string());
    if by_quota {
        let message = format!("queue {queue} has {} first in line for its quota", first.job());
        Explanation::new(Reason::WaitingForQuota, message)
    } else {
        let message = format!("{} is before it in queue {queue} and waits too", first.job());
        Explanation::new(Reason::WaitingForDevices, message)
    }
}

/// Shows thousandths of devices as devices.
pub(crate) fn devices_text(milli: u64) -> String {
    if milli.is_multiple_of(1000) {
        (milli / 1000).to_string()
    } else {
        format!("{:.1}", milli as f64 / 1000.0)
    }
}

fn short_text(tree: &Tree, name: &QueueName, gang: &Gang, short: &Short) -> Explanation {
    let need = devices_text(milli(gang, gang.ranks));
    let class = &short.class;
    if short.queue == QueueId::FLEET {
        let message = format!(
            "needs {need} {class} devices; the fleet has {}, {} used and {} kept by queues that do not lend them",
            devices_text(short.limit),
            devices_text(short.used),
            devices_text(short.kept),
        );
        return Explanation::new(Reason::WaitingForQuota, message);
    }
    let at = &tree.spec(short.queue).name;
    let (limit, used) = (devices_text(short.limit), devices_text(short.used));
    if short.outright() {
        let message = format!("needs {need} {class} devices; queue {at} may use {limit} at most");
        return Explanation::new(Reason::ExceedsQuota, message);
    }
    let above = if at == name { String::new() } else { format!(", above {name},") };
    let left = devices_text(short.limit.saturating_sub(short.used + short.kept));
    let message = format!(
        "needs {need} {class} devices; queue {at}{above} uses {used} of {limit}, so {left} are left"
    );
    Explanation::new(Reason::WaitingForQuota, message)
}
