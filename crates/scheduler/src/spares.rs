//! Devices that are kept ready beside a gang that runs, for when one of its own fails. Meanwhile
//! they are lent to jobs that can be ended at once.

use std::collections::BTreeSet;
use std::sync::Arc;

use drumline_cluster::{DomainAt, Health, Snapshot, Trial};
use drumline_placement::{EvictionCause, Placed as Found, Spares, try_place};
use drumline_queue::{Charge, QueueId};
use drumline_spec::{Elastic, Gang, Parallelism, TopologyRule, WHOLE_DEVICE};
use drumline_types::{DeviceId, JobId};

use crate::cycle::Work;
use crate::holds::{Hold, Keep};
use crate::job::{Job, Stand, milli};
use crate::preempt::{NOMINATED_MS, holders};
use crate::scheduler::{Scheduler, Slot};
use crate::site;

/// Gangs for which spares are sought in one cycle, at most.
const SOUGHT_MAX: usize = 32;

impl Scheduler {
    /// Returns the devices that are kept ready for a job, each with the first job that it is lent
    /// to.
    #[must_use]
    pub fn spares(&self, job: &JobId) -> Vec<(DeviceId, Option<JobId>)> {
        let Some(hold) = self.spare_hold(job) else { return Vec::new() };
        let lent = |device: &DeviceId| (device.clone(), self.fleet.holder(device).cloned());
        hold.devices.iter().map(lent).collect()
    }

    pub(crate) fn spare_hold(&self, job: &JobId) -> Option<&Hold> {
        self.holds.of(job).filter(|hold| hold.keep == Keep::Spare)
    }

    /// Returns whether a gang has lost a device that it holds.
    pub(crate) fn has_lost(&self, job: &JobId) -> bool {
        let lost = |device: &DeviceId| match self.fleet.node(&device.node) {
            None => true,
            Some(state) => state
                .node()
                .devices
                .get(device.index as usize)
                .is_none_or(|device| device.health != Health::Healthy),
        };
        self.fleet.commitment(job).is_some_and(|held| held.devices.iter().any(lost))
    }

    /// Sees to every gang with spares: one that has lost a device, or whose attempt is over, gets a
    /// place for the next one; spares that have gone bad themselves are given up.
    pub(crate) fn review_spares(&mut self, work: &mut Work) {
        let kept: Vec<(JobId, Vec<DeviceId>)> = self
            .holds
            .iter()
            .filter(|(_, hold)| hold.keep == Keep::Spare)
            .map(|(job, hold)| (job.clone(), hold.devices.clone()))
            .collect();
        for (id, devices) in kept {
            let Some(&slot) = self.ids.get(&id) else { continue };
            let job = self.job(slot);
            let needed = match &job.stand {
                Stand::Placed(placed) => {
                    placed.leaving.is_none() && !self.awaits_own(&id) && self.has_lost(&id)
                }
                Stand::InLine { .. } | Stand::Aside { .. } => true,
            };
            if needed {
                self.call_spares(slot, &devices, work);
                continue;
            }
            let gang = job.request.gang.clone();
            let sound: Vec<DeviceId> =
                devices.iter().filter(|device| self.may_use(device, &gang)).cloned().collect();
            let allowed = self.may_keep(slot);
            if sound.is_empty() || !allowed {
                self.drop_hold(&id);
            } else if sound.len() < devices.len() {
                self.keep(&id, sound, Keep::Spare);
            }
        }
    }

    /// Finds the place of a gang's next attempt, and takes back what of it is lent.
    fn call_spares(&mut self, slot: Slot, spares: &[DeviceId], work: &mut Work) {
        let job = self.job(slot);
        let (id, gang) = (job.id.clone(), job.alike().gang);
        let split = job.split(gang.ranks);
        let bounds = self.bounds(Some(gang.ranks));
        let mut borrowers = holders(&self.fleet, spares);
        borrowers.remove(&id);
        // Who waits for its end has no claim to its devices before that.
        let own = self.fleet.commitment(&id).map_or(&[][..], |held| held.devices.as_slice());
        let hopes: BTreeSet<JobId> = own
            .iter()
            .filter_map(|device| self.holds.holder(device))
            .filter(|job| {
                let hold = self.holds.of(job);
                hold.is_some_and(|hold| matches!(hold.keep, Keep::Reserved { .. }))
            })
            .cloned()
            .collect();
        let found = {
            let mut trial = self.fleet.trial();
            trial.unreserve(&id);
            for waiting in &hopes {
                trial.unreserve(waiting);
            }
            trial.evict(&id);
            let whole = |found: &Found| found.devices.len() >= gang.ranks as usize;
            let first = site::fit(trial.snapshot(), &gang, split, &bounds);
            first.filter(whole).or_else(|| {
                for borrower in &borrowers {
                    trial.evict(borrower);
                }
                site::fit(trial.snapshot(), &gang, split, &bounds)
            })
        };
        // It waits like any other, and holds nothing while it does.
        let Some(found) = found else {
            self.drop_hold(&id);
            return;
        };
        let in_the_way = holders(&self.fleet, &found.devices);
        for borrower in borrowers.intersection(&in_the_way) {
            // Who has been asked for somebody else's sake leaves as well.
            let placed = self.known(borrower).and_then(Job::placed);
            if placed.is_some_and(|placed| placed.leaving.is_none()) {
                let message =
                    format!("gives lent devices back to {id}, which lost some of its own");
                let beneficiary = Some(JobId::clone(&id));
                self.evict(borrower, EvictionCause::Recalled, beneficiary, None, message, work);
            }
        }
        let until = work.now.plus_ms(NOMINATED_MS);
        work.wake(until);
        self.keep(&id, found.devices, Keep::Nominated { until });
    }

    /// Returns whether a job's queue has room for what is kept ready for it and not lent.
    fn may_keep(&mut self, slot: Slot) -> bool {
        let job = self.job(slot);
        let (id, gang) = (job.id.clone(), job.request.gang.clone());
        let Ok(leaf) = self.tree.leaf(&job.request.settings.queue) else { return false };
        let counted = self.suppose_without(&id);
        let unlent = self.unlent(&id);
        let charge = self.spares_charge(gang, &unlent);
        let allowed = charge.is_empty() || self.tree.check(leaf, &charge).is_ok();
        if counted {
            self.suppose_with(&id);
        }
        allowed
    }

    /// Returns the devices that are kept ready for a job and used by nobody.
    pub(crate) fn unlent(&self, job: &JobId) -> Vec<DeviceId> {
        let Some(hold) = self.spare_hold(job) else { return Vec::new() };
        let unused = |device: &&DeviceId| {
            self.fleet.node(&device.node).is_some_and(|state| state.used_milli(device.index) == 0)
        };
        hold.devices.iter().filter(unused).cloned().collect()
    }

    /// Seeks spares for gangs that lack some, where nobody waits who would go before them.
    pub(crate) fn stock_spares(&mut self, work: &mut Work) {
        let mut sought = 0;
        let spared: Vec<Arc<JobId>> = self.spared.iter().cloned().collect();
        for id in spared {
            if sought >= SOUGHT_MAX {
                work.unfinished = true;
                break;
            }
            let Some(&slot) = self.ids.get(&id) else { continue };
            let job = self.job(slot);
            let (priority, gang) = (job.priority(), &job.request.gang);
            let stamp = self.spares_stamp(slot);
            let lacks =
                self.spare_hold(&id).map_or(0, |hold| hold.devices.len()) < gang.spares as usize;
            let settled = self.sought.get(&id) == Some(&stamp) || self.awaited.contains_key(&id);
            if !lacks || settled {
                continue;
            }
            let device = gang.device;
            let before = self.lines.ids().any(|class| {
                self.lines.class(class).is_some_and(|class| {
                    class.alike.gang.device == device && class.alike.priority >= priority
                })
            });
            if !before {
                sought += 1;
                self.seek_spares(slot);
                self.sought.insert(id, self.spares_stamp(slot));
            }
        }
    }

    /// Returns a count that grows with whatever may let a gang find a spare.
    pub(crate) fn spares_stamp(&self, slot: Slot) -> u64 {
        self.freed_for(&self.job(slot).request.gang) + self.loosened
    }

    /// Looks for the spares that a running gang lacks: near it, on nodes of their own if there are
    /// any, as many as can be had.
    pub(crate) fn seek_spares(&mut self, slot: Slot) {
        // What is found apart from the gang may leave some to be found beside it.
        while self.seek_more_spares(slot) {}
    }

    fn seek_more_spares(&mut self, slot: Slot) -> bool {
        let job = self.job(slot);
        let id = job.id.clone();
        let wanted = job.request.gang.spares;
        let leaving = job.placed().is_none_or(|placed| placed.leaving.is_some());
        let nominated = self.holds.of(&id).is_some_and(|hold| hold.keep != Keep::Spare);
        let shared = job.request.gang.share_milli < WHOLE_DEVICE;
        if wanted == 0 || leaving || nominated || shared {
            return false;
        }
        let gang = job.request.gang.clone();
        let Ok(leaf) = self.tree.leaf(&job.request.settings.queue) else { return false };
        let kept = self.spare_hold(&id).map_or_else(Vec::new, |hold| hold.devices.clone());
        let Some(lack) = wanted.checked_sub(kept.len() as u32).filter(|lack| *lack > 0) else {
            return false;
        };
        let Some(held) = self.fleet.commitment(&id) else { return false };
        let workers: Vec<DeviceId> =
            held.devices.iter().skip(usize::from(gang.leader.is_some())).cloned().collect();
        let found = beside(&mut self.fleet.trial(), &id, &gang, &workers, &kept, lack);
        if found.is_empty() {
            return false;
        }
        let charge = self.spares_charge(gang, &found);
        if self.tree.check(leaf, &charge).is_err() {
            return false;
        }
        let had = kept.len();
        self.keep(&id, kept.into_iter().chain(found).collect(), Keep::Spare);
        self.spare_hold(&id).is_some_and(|hold| hold.devices.len() > had)
    }

    /// Moves a gang that is about to start to a domain that has room for its spares too, where its
    /// own may not and such a one is to be had.
    pub(crate) fn beside_spares(&mut self, slot: Slot, gang: &Gang, placed: Found) -> Found {
        let whole = gang.topology.iter().any(|rule| rule.required && rule.ranks == 0);
        if gang.spares == 0 || !whole {
            return placed;
        }
        let job = self.job(slot);
        let (id, attempt) = (job.id.clone(), job.attempt);
        let ranks = placed.devices.len() as u32;
        let lack = gang.spares;
        let bounds = self.bounds(None);
        let mut trial = self.fleet.trial();
        trial.unreserve(&id);
        let mark = trial.checkpoint();
        let room = trial.hold(placed.commitment(&id, attempt)).is_ok()
            && beside(&mut trial, &id, gang, &placed.devices, &[], lack).len() >= lack as usize;
        if room {
            return placed;
        }
        trial.rollback(mark);
        let both = Gang { ranks: ranks + lack, elastic: None, ..gang.clone() };
        let split = Parallelism { data: both.ranks, ..Parallelism::SINGLE };
        match site::fit(trial.snapshot(), &both, split, &bounds) {
            // The first ranks of a bigger gang keep every rule of the smaller one.
            Some(found) => {
                let devices = found.devices.into_iter().take(ranks as usize).collect();
                Found { devices, ..placed }
            }
            None => placed,
        }
    }

    /// Returns whether a job may run on what is kept ready for another: it can be ended at once, and
    /// does not go before it.
    pub(crate) fn may_borrow(borrower: &Job, owner: &Job) -> bool {
        borrower.ends_at_once() && borrower.priority() <= owner.priority()
    }

    /// Returns the gangs whose spares a job may use: as a loan, or because it has a better claim to
    /// them than their owner.
    pub(crate) fn lenders(&mut self, slot: Slot, leaf: QueueId, gang: &Gang) -> Vec<JobId> {
        let spared: Vec<Arc<JobId>> = self.spared.iter().cloned().collect();
        let mut lenders = Vec::new();
        for id in spared {
            let unlent = self.unlent(&id);
            let Some(&owner) = self.ids.get(&id) else { continue };
            if unlent.is_empty()
                || owner == slot
                || self.job(owner).request.gang.device != gang.device
            {
                continue;
            }
            let charge = self.spares_charge(self.job(owner).request.gang.clone(), &unlent);
            let (job, owner) = (self.job(slot), self.job(owner));
            let better = || {
                let choice = self.choices(leaf, gang).into_iter().next()?;
                let claim = vec![(choice.charged, milli(gang, gang.ranks))];
                let queue = self.tree.find(&owner.request.settings.queue)?;
                self.cause(job, leaf, &claim, owner, queue, &charge)
            };
            if Self::may_borrow(job, owner) || better().is_some() {
                lenders.push(JobId::clone(&id));
            }
        }
        lenders
    }

    /// Looks for devices for a job on what is free and what is kept ready for others.
    pub(crate) fn find_on_spares(
        &mut self,
        slot: Slot,
        leaf: QueueId,
        gang: &Gang,
        most: u32,
    ) -> Option<Found> {
        if self.spared.is_empty() {
            return None;
        }
        let lenders = self.lenders(slot, leaf, gang);
        let job = self.jobs[slot.0].as_ref()?;
        let (id, split, bounds) = (job.id.clone(), job.split(gang.ranks), self.bounds(Some(most)));
        let own = self.holds.of(&id).is_some().then(|| JobId::clone(&id));
        let owners: Vec<JobId> = lenders.iter().cloned().chain(own).collect();
        if lenders.is_empty() || !self.may_hold(gang, &owners) {
            return None;
        }
        let mut trial = self.fleet.trial();
        trial.unreserve(&id);
        for lender in &lenders {
            trial.unreserve(lender);
        }
        site::fit(trial.snapshot(), gang, split, &bounds)
    }

    /// Counts what is kept ready as it will be when a job has some of it. Returns whose that is.
    pub(crate) fn suppose_lent(&mut self, slot: Slot, devices: &[DeviceId]) -> Vec<JobId> {
        let id = self.job(slot).id.clone();
        let mut owners: Vec<JobId> = self.owners(&id, devices).into_iter().collect();
        owners.retain(|owner| self.suppose_without(owner));
        for owner in &owners {
            let mut left = self.unlent(owner);
            left.retain(|device| !devices.contains(device));
            self.suppose_spares(owner, &left);
        }
        owners
    }

    /// Counts again what is kept ready as it is.
    pub(crate) fn suppose_back(&mut self, owners: &[JobId]) {
        for owner in owners {
            self.suppose_without(owner);
            self.suppose_with(owner);
        }
    }

    /// Returns what a gang's queue is charged for spares of it: they replace workers.
    pub(crate) fn spares_charge(&mut self, gang: Gang, spares: &[DeviceId]) -> Charge {
        self.charge_of(&Gang { leader: None, ..gang }, spares, self.now)
    }

    /// Returns the other gangs that some devices are kept ready for. The fleet knows by number what
    /// is kept, so it costs a look per node and none for each device by name.
    fn owners(&self, id: &JobId, devices: &[DeviceId]) -> BTreeSet<JobId> {
        let mut owners = BTreeSet::new();
        for on_node in devices.chunk_by(|a, b| a.node == b.node) {
            let Some(state) = self.fleet.node(&on_node[0].node) else { continue };
            for owner in on_node.iter().filter_map(|device| state.reserved(device.index)) {
                if owner != id && !owners.contains(owner) && self.spare_hold(owner).is_some() {
                    owners.insert(owner.clone());
                }
            }
        }
        owners
    }

    /// Counts anew what is kept ready of what a job has just got: lent, or taken for good.
    pub(crate) fn settle_spares(&mut self, slot: Slot, devices: &[DeviceId]) {
        if self.spared.is_empty() {
            return;
        }
        let id = self.job(slot).id.clone();
        for owner in self.owners(&id, devices) {
            let counted = self.suppose_without(&owner);
            let Some(of) = self.known(&owner) else { continue };
            if !Self::may_borrow(self.job(slot), of) {
                let kept = self.spare_hold(&owner).map_or_else(Vec::new, |h| h.devices.clone());
                let left: Vec<DeviceId> =
                    kept.into_iter().filter(|device| !devices.contains(device)).collect();
                if left.is_empty() {
                    self.drop_hold(&owner);
                } else {
                    self.keep(&owner, left, Keep::Spare);
                }
            } else if counted {
                self.suppose_with(&owner);
            }
        }
    }

    /// Returns everything that is kept ready.
    pub(crate) fn all_spares(&self) -> Vec<Spares> {
        self.holds
            .iter()
            .filter(|(_, hold)| hold.keep == Keep::Spare)
            .map(|(job, hold)| Spares { job: job.clone(), devices: hold.devices.clone() })
            .collect()
    }
}

/// Finds up to `lack` free devices for a gang on `held`, `kept` being spares that it has already:
/// in the smallest domain around it that has them all, on nodes that it is not on if that can be,
/// else as many as its domain has.
fn beside(
    trial: &mut Trial<'_>,
    id: &JobId,
    gang: &Gang,
    held: &[DeviceId],
    kept: &[DeviceId],
    lack: u32,
) -> Vec<DeviceId> {
    let fleet = trial.snapshot();
    let Some(first) = held.first().and_then(|device| {
        let state = fleet.node(&device.node)?;
        Some((state.place(), state.node().devices.get(device.index as usize)?.model.clone()))
    }) else {
        return Vec::new();
    };
    let (place, model) = first;
    let within = domains(fleet, gang, held, place);
    let Some(&widest) = within.last() else { return Vec::new() };
    let group = gang.node_group.clamp(1, lack);
    let rules: Vec<TopologyRule> =
        gang.topology.iter().filter(|rule| rule.ranks > 0).cloned().collect();
    let all = Gang {
        ranks: lack,
        node_group: group,
        leader: None,
        models: vec![model],
        topology: rules,
        elastic: None,
        spares: 0,
        ..gang.clone()
    };
    let some =
        Gang { elastic: Some(Elastic { least: group, most: lack, step: group }), ..all.clone() };
    // While nodes of their own are sought, nothing on the gang's counts as free.
    let mut apart: Vec<DeviceId> = kept.to_vec();
    let nodes: BTreeSet<_> = held.iter().map(|device| &device.node).collect();
    for node in nodes {
        let Some(state) = fleet.node(node) else { continue };
        let free =
            (0..state.node().devices.len() as u32).filter(|&index| state.reserved(index).is_none());
        apart.extend(free.map(|index| DeviceId { node: node.clone(), index }));
    }
    let mark = trial.checkpoint();
    for (closed, gang) in [(&apart, &all), (&apart, &some), (&kept.to_vec(), &some)] {
        trial.rollback(mark);
        if trial.reserve(id, closed.clone()).is_err() {
            continue;
        }
        let split = Parallelism { data: lack, ..Parallelism::SINGLE };
        let whole = gang.elastic.is_none();
        let within = if whole { within.as_slice() } else { std::slice::from_ref(&widest) };
        let found = within.iter().find_map(|&domain| {
            let bounds =
                drumline_placement::Constraints { within: Some(domain), ..Default::default() };
            try_place(trial.snapshot(), gang, split, &bounds)
        });
        if let Some(found) = found {
            trial.rollback(mark);
            return found.devices;
        }
    }
    trial.rollback(mark);
    Vec::new()
}

/// Returns the domains around a gang, the smallest first, as far out as its rules let it be.
pub(crate) fn domains(
    fleet: &Snapshot,
    gang: &Gang,
    held: &[DeviceId],
    place: DomainAt,
) -> Vec<DomainAt> {
    let topology = fleet.topology();
    let holds_all = |domain: &DomainAt| {
        held.iter().all(|device| {
            let at = fleet.node(&device.node).map(|state| state.place());
            at.is_none_or(|at| topology.path(at).any(|above| above == *domain))
        })
    };
    let limits: Vec<DomainAt> = gang
        .topology
        .iter()
        .filter(|rule| rule.required && rule.ranks == 0)
        .filter_map(|rule| topology.above(place, topology.level(&rule.level)?))
        .collect();
    let mut domains = Vec::new();
    for domain in topology.path(place).filter(holds_all) {
        domains.push(domain);
        if limits.contains(&domain) {
            break;
        }
    }
    domains
}
