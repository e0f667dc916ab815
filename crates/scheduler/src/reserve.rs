//! The place and the moment at which a big gang will start, kept so that others start around it
//! without delaying it.

use std::sync::Arc;

use drumline_cluster::{DomainAt, Health, Mark};
use drumline_placement::EvictionCause;
use drumline_queue::{Place, QueueId};
use drumline_spec::{Gang, WHOLE_DEVICE};
use drumline_types::{DeviceId, JobId, QueueName, Timestamp};

use crate::cycle::{Refusal, Work};
use crate::holds::Keep;
use crate::job::{Job, Stand, milli};
use crate::lines::{Asked, By, ClassId};
use crate::scheduler::{Scheduler, Slot};
use crate::site;
use crate::vain::{FIND_STEPS, Search};

/// Reservations at one time, at most: each keeps devices from long jobs.
const RESERVED_MAX: usize = 16;

impl Scheduler {
    /// Gives up what is kept for jobs that no longer wait for it, and corrects estimated starts.
    /// The devices of a hold are looked at only where something may have become of them.
    pub(crate) fn review_holds(&mut self, work: &mut Work) {
        let doubted = self.holds.take_doubted();
        let holds: Vec<(JobId, Keep)> =
            self.holds.iter().map(|(job, hold)| (job.clone(), hold.keep)).collect();
        for (id, keep) in holds {
            let doubted = doubted.contains(&id);
            if !self.still_wanted(&id, keep, doubted) {
                self.drop_hold(&id);
                continue;
            }
            match keep {
                Keep::Nominated { until } if until <= work.now => self.drop_hold(&id),
                Keep::Nominated { until } => work.wake(until),
                Keep::Spare => {}
                Keep::Reserved { start } => {
                    if !doubted && start >= work.now {
                        continue;
                    }
                    let Some(hold) = self.holds.of(&id) else { continue };
                    let corrected = self.free_at(&hold.devices, work.now);
                    if corrected > start {
                        self.holds.restart(&id, Keep::Reserved { start: corrected });
                        self.loosened += 1;
                    }
                }
            }
        }
    }

    fn still_wanted(&self, id: &JobId, keep: Keep, doubted: bool) -> bool {
        let Some(job) = self.known(id) else { return false };
        let nominated = matches!(keep, Keep::Nominated { .. });
        let sound = || {
            let devices = self.holds.of(id).map_or(&[][..], |hold| &hold.devices);
            devices.iter().all(|device| self.may_use(device, &job.request.gang))
        };
        let (class, place) = match &job.stand {
            Stand::InLine { class, place, .. } => (class, place),
            // A gang that leaves to come back, smaller or elsewhere, keeps what it will need.
            Stand::Placed(placed) => {
                let wanted = match (&placed.leaving, keep) {
                    (Some(leaving), _) => {
                        leaving.resize_to.is_some() || leaving.cause == EvictionCause::Consolidated
                    }
                    (None, Keep::Spare) => return true,
                    // The place of its next attempt, once the present one has lost a device.
                    (None, _) => self.has_lost(id),
                };
                return wanted && (!doubted || sound());
            }
            Stand::Aside { .. } => return nominated && !job.held && (!doubted || sound()),
        };
        let Some(class) = self.lines.class(*class) else { return false };
        let queue = &class.alike.queue;
        if self.tree.leaf(queue).is_err() {
            return false;
        }
        let first = || self.head(queue).is_none_or(|(head, _)| head == *place);
        (!doubted || sound()) && (nominated || first())
    }

    pub(crate) fn may_use(&self, device: &DeviceId, gang: &Gang) -> bool {
        self.fleet.node(&device.node).is_some_and(|state| {
            let node = state.node();
            let health = node.devices.get(device.index as usize).map(|device| &device.health);
            node.ineligible_for(&gang.tolerations).is_none() && health == Some(&Health::Healthy)
        })
    }

    /// Returns the first job of a line that things as they are do not exclude.
    pub(crate) fn head(&self, queue: &QueueName) -> Option<(Place, ClassId)> {
        self.lines.lines.get(queue)?.head().cloned()
    }

    /// Returns whether a gang could fit if what is kept for these jobs were not: a count of devices,
    /// without a look at where they are.
    pub(crate) fn may_hold(&mut self, gang: &Gang, owners: &[JobId]) -> bool {
        if gang.share_milli < WHOLE_DEVICE || gang.leader.is_some() {
            return true;
        }
        let least = u64::from(gang.elastic.map_or(gang.ranks, |elastic| elastic.least.max(1)));
        let mut free = self.free_in(gang, DomainAt::ROOT);
        for owner in owners {
            if free >= least {
                return true;
            }
            free += self.holds.unused(owner, &self.fleet);
        }
        free >= least
    }

    /// Returns when devices are all free, as far as estimates hold.
    pub(crate) fn free_at(&self, devices: &[DeviceId], now: Timestamp) -> Timestamp {
        let mut last = now;
        let mut seen: Option<&JobId> = None;
        for on_node in devices.chunk_by(|a, b| a.node == b.node) {
            let Some(state) = self.fleet.node(&on_node[0].node) else { continue };
            for holder in on_node.iter().flat_map(|device| state.holders(device.index)) {
                if seen == Some(holder) {
                    continue;
                }
                seen = Some(holder);
                let placed = self.known(holder).and_then(|job| job.placed());
                if let Some(placed) = placed.filter(|placed| placed.leaving.is_none()) {
                    last = last.max(placed.ends);
                }
            }
        }
        last
    }

    /// Sees what can be done for a job that waits: devices taken from others, or a reservation if
    /// it is the first of its line. Returns whether devices are being freed for it.
    pub(crate) fn wait_at_the_head(
        &mut self,
        slot: Slot,
        class_id: ClassId,
        leaf: QueueId,
        refusal: &Refusal,
        work: &mut Work,
    ) -> bool {
        if refusal.by == By::Outright {
            return false;
        }
        let id = self.job(slot).id.clone();
        if let Some(hold) = self.holds.of(&id)
            && matches!(hold.keep, Keep::Nominated { .. })
        {
            return true;
        }
        let freed = self.stamps(class_id).any;
        let Some(class) = self.lines.class(class_id) else { return false };
        if let Some(asked) = &class.asked
            && asked.job == id
            && asked.freed == freed
            && asked.again > work.now
        {
            work.wake(asked.again);
            return false;
        }
        let alike = class.alike.clone();
        let (gang, queue) = (&alike.gang, &alike.queue);
        let mut again = Timestamp(u64::MAX);
        if self.options.preemption {
            match self.preempt(slot, gang, leaf, refusal, work) {
                Ok(()) => return true,
                Err(at) => again = at,
            }
        }
        again = again.min(self.give_way_at(slot, leaf, gang, work.now).unwrap_or(again));
        let first = self.head(queue).is_some_and(|(head, _)| head.job() == &id);
        let reservable = self.options.backfill
            && first
            && refusal.by != By::Quota
            && gang.ranks > 1
            && self.holds.of(&id).is_none()
            && self.holds.reserved() < RESERVED_MAX;
        if first && self.consolidate(slot, gang, leaf, refusal, work) {
            return true;
        }
        // What is lent until another's reserved start is not this job's to count on.
        let reservable = reservable && {
            let claim = self
                .choices(leaf, gang)
                .first()
                .map(|c| vec![(c.charged, milli(gang, gang.ranks))]);
            claim.is_some_and(|claim| self.tree.check(leaf, &claim).is_ok())
        };
        if reservable {
            let asked = self.asked(Search::Reservation, slot, gang, None, work.now);
            let before = self.searches.steps;
            match self.searches.barred(&asked) {
                Some(until) => again = again.min(until),
                None => match self.earliest(slot, gang, work.now) {
                    Some((devices, start)) => self.keep(&id, devices, Keep::Reserved { start }),
                    None => self.searches.failed(asked, before),
                },
            }
        }
        let freed = self.stamps(class_id).any;
        if let Some(class) = self.lines.class_mut(class_id) {
            class.asked = Some(Asked { job: id, freed, again });
        }
        work.wake(again);
        false
    }

    /// Returns where a gang can start first and when, if everyone ends as estimated and nobody new
    /// starts there.
    pub(crate) fn earliest(
        &mut self,
        slot: Slot,
        gang: &Gang,
        now: Timestamp,
    ) -> Option<(Vec<DeviceId>, Timestamp)> {
        let job = self.jobs[slot.0].as_ref()?;
        let (id, split, bounds) =
            (job.id.clone(), job.split(gang.ranks), self.bounds(Some(gang.ranks)));
        let mut free = self.free_in(gang, DomainAt::ROOT);
        let (jobs, steps) = (&self.jobs, &mut self.searches.steps);
        // Who was asked to leave goes first, then the others as they are thought to end.
        let stays = |slot: &Slot| {
            let placed = jobs[slot.0].as_ref().and_then(Job::placed);
            placed.is_some_and(|placed| placed.leaving.is_none())
        };
        let ends = self.ends.iter().filter(|(.., slot)| stays(slot));
        let ends = ends.map(|(_, holder, slot)| (holder, slot));
        let leaving = self.leaving.iter().map(|(holder, slot)| (holder, slot));
        let mut ends = leaving.chain(ends).filter_map(|(holder, slot)| {
            let of = jobs[slot.0].as_ref()?.gang();
            let helps = of.device == gang.device || Some(of.device) == gang.leader;
            helps.then_some(holder)
        });
        let devices = {
            let mut trial = self.fleet.trial();
            trial.unreserve(&id);
            let mut gone: Vec<(Mark, &Arc<JobId>)> = Vec::new();
            let mut step = 1usize;
            let mut failed = 0usize;
            let found = loop {
                let want = gone.len() + step;
                let mut all = false;
                while gone.len() < want || free < u64::from(gang.ranks) {
                    let Some(holder) = ends.next() else {
                        all = true;
                        break;
                    };
                    let held = trial.snapshot().commitment(holder);
                    free += held.map_or(0, |held| held.devices.len() as u64);
                    gone.push((trial.checkpoint(), holder));
                    trial.evict(holder);
                    *steps += 1;
                }
                *steps += FIND_STEPS;
                match site::fit(trial.snapshot(), gang, split, &bounds) {
                    Some(placed) => break Some(placed.devices),
                    None if all => break None,
                    None => {
                        failed = gone.len();
                        step *= 2;
                    }
                }
            };
            let mut best = found?;
            let (mut low, mut high) = (failed, gone.len());
            while high - low > 1 {
                let middle = low.midpoint(high);
                trial.rollback(gone[middle].0);
                *steps += FIND_STEPS;
                match site::fit(trial.snapshot(), gang, split, &bounds) {
                    Some(placed) => {
                        best = placed.devices;
                        high = middle;
                    }
                    None => {
                        low = middle;
                    }
                }
                // Forward again to where it fits, if that is not here.
                if low == middle {
                    for (mark, holder) in &mut gone[middle..high] {
                        *mark = trial.checkpoint();
                        trial.evict(holder);
                    }
                }
            }
            best
        };
        let start = self.free_at(&devices, now);
        Some((devices, start))
    }
}
