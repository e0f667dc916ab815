//! Reservations of those who would borrow give way to who stays within its quota, once it has waited
//! for as long as a claim waits for its price: it goes before them in turn, and would else wait for
//! devices that nobody uses. Not at once, for a big gang that loses its reservation again and again
//! has devices kept idle for nothing.

use drumline_placement::Placed;
use drumline_queue::{Charge, QueueId};
use drumline_spec::Gang;
use drumline_types::{JobId, Timestamp};

use crate::holds::Keep;
use crate::job::milli;
use crate::scheduler::{Scheduler, Slot};
use crate::site;

impl Scheduler {
    /// Returns the waiting jobs whose reservations a job need not respect, those who reserved last
    /// first: where their ways to the root part, it stays within its quota and they would not.
    pub(crate) fn giving_way(&self, slot: Slot, leaf: QueueId, gang: &Gang) -> Vec<JobId> {
        let id = &self.job(slot).id;
        let Some(choice) = self.choices(leaf, gang).into_iter().next() else { return Vec::new() };
        let claim: Charge = vec![(choice.charged, milli(gang, gang.ranks))];
        let mut found: Vec<(Timestamp, &JobId)> = Vec::new();
        for (owner, hold) in self.holds.iter() {
            if !matches!(hold.keep, Keep::Reserved { .. }) || **id == *owner {
                continue;
            }
            let Some(of) = self.known(owner).filter(|of| of.placed().is_none()) else { continue };
            let Some(theirs) = self.tree.find(&of.request.settings.queue) else { continue };
            let Some((mine, theirs_above)) = self.tree.fork(leaf, theirs) else { continue };
            if !self.tree.within(mine, &claim) {
                continue;
            }
            let ranks = hold.devices.len() as u32;
            let Some(choice) = self.choices(theirs, of.gang()).into_iter().next() else { continue };
            let charge: Charge = vec![(choice.charged, milli(of.gang(), ranks))];
            let counted = self.supposed.as_ref().is_some_and(|all| all.contains_key(owner));
            let borrows = match counted {
                true => self.tree.borrows(theirs_above, &charge),
                false => !self.tree.within(theirs_above, &charge),
            };
            if borrows {
                found.push((hold.since, owner));
            }
        }
        found.sort_by(|a, b| b.cmp(a));
        found.into_iter().map(|(_, owner)| owner.clone()).collect()
    }

    /// Returns when others begin to give way to a job, if any have to.
    pub(crate) fn give_way_at(
        &self,
        slot: Slot,
        leaf: QueueId,
        gang: &Gang,
        now: Timestamp,
    ) -> Option<Timestamp> {
        let at = self.priced(slot, gang).enforced;
        let waits = at > now && self.holds.reserved() > 0;
        (waits && !self.giving_way(slot, leaf, gang).is_empty()).then_some(at)
    }

    /// Looks for quota and devices for a job where others give way, and lets go of what was kept for
    /// those who have to.
    pub(crate) fn seek_where_others_give_way(
        &mut self,
        slot: Slot,
        leaf: QueueId,
        gang: &Gang,
        now: Timestamp,
    ) -> Option<Placed> {
        if self.holds.reserved() == 0 || self.priced(slot, gang).enforced > now {
            return None;
        }
        let owners = self.giving_way(slot, leaf, gang);
        if owners.is_empty() {
            return None;
        }
        let lifted: Vec<JobId> =
            owners.iter().filter(|owner| self.suppose_without(owner)).cloned().collect();
        let found = self.fit_without(slot, leaf, gang, &owners, now);
        if let Some(placed) = &found {
            let taken = |owner: &JobId| {
                let hold = self.holds.of(owner);
                hold.is_some_and(|hold| hold.devices.iter().any(|d| placed.devices.contains(d)))
            };
            let losing: Vec<JobId> = owners.iter().filter(|owner| taken(owner)).cloned().collect();
            for owner in &losing {
                self.drop_hold(owner);
            }
            self.count_again(&lifted);
            let charge = self.charge_of(gang, &placed.devices, now);
            for owner in owners.iter().filter(|owner| !losing.contains(owner)) {
                if self.check_found(slot, leaf, &charge, &placed.devices, now).is_ok() {
                    break;
                }
                self.drop_hold(owner);
            }
        } else {
            self.count_again(&lifted);
        }
        found
    }

    /// Looks for quota and devices as if nothing were kept for these others.
    fn fit_without(
        &mut self,
        slot: Slot,
        leaf: QueueId,
        gang: &Gang,
        owners: &[JobId],
        now: Timestamp,
    ) -> Option<Placed> {
        for choice in self.choices(leaf, gang) {
            let Ok(most) = self.most_allowed(slot, leaf, gang, choice.charged, now) else {
                continue;
            };
            let chosen = choice.models.map(|models| Gang { models, ..gang.clone() });
            let chosen = chosen.as_ref().unwrap_or(gang);
            let job = self.jobs[slot.0].as_ref()?;
            let (id, split) = (job.id.clone(), job.split(chosen.ranks));
            let bounds = self.bounds(Some(most));
            let own = self.holds.of(&id).map(|_| JobId::clone(&id));
            let all: Vec<JobId> = owners.iter().cloned().chain(own).collect();
            if !self.may_hold(chosen, &all) {
                continue;
            }
            let found = {
                let mut trial = self.fleet.trial();
                for owner in &all {
                    trial.unreserve(owner);
                }
                site::fit(trial.snapshot(), chosen, split, &bounds)
            };
            let Some(placed) = found else { continue };
            // Quota may suffice only for who runs on what is kept ready for others.
            let charge: Charge = vec![(choice.charged, milli(gang, placed.devices.len() as u32))];
            if self.check_found(slot, leaf, &charge, &placed.devices, now).is_ok() {
                return Some(placed);
            }
        }
        None
    }
}
