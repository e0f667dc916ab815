//! Devices that are kept for waiting jobs, in the fleet, in the quota, and in the list of holds.

use std::collections::{BTreeMap, BTreeSet};

use drumline_queue::{Charge, QueueId};
use drumline_types::{DeviceId, JobId};

use crate::holds::{Hold, Keep};
use crate::scheduler::{Scheduler, Slot};

impl Scheduler {
    /// Keeps devices for a job. What was kept for others of them is given up.
    pub(crate) fn keep(&mut self, job: &JobId, devices: Vec<DeviceId>, keep: Keep) {
        let others: BTreeSet<JobId> = devices
            .iter()
            .filter_map(|device| self.holds.holder(device))
            .filter(|other| *other != job)
            .cloned()
            .collect();
        for other in others {
            self.drop_hold(&other);
        }
        self.drop_hold(job);
        if self.fleet.reserve(job, devices.clone()).is_ok() {
            self.holds.keep(job, Hold { keep, devices, since: self.now });
            self.suppose_with(job);
        }
    }

    /// Lets go of what is kept for a job.
    pub(crate) fn drop_hold(&mut self, job: &JobId) {
        if self.holds.of(job).is_some() {
            self.suppose_without(job);
            self.holds.drop(job);
            self.fleet.unreserve(job);
            self.loosened += 1;
        }
    }

    /// Counts what is kept for waiting jobs as used by their queues, so that nobody takes the quota
    /// that they will need.
    pub(crate) fn suppose_kept(&mut self) {
        self.supposed = Some(BTreeMap::new());
        let kept: Vec<JobId> = self.holds.iter().map(|(job, _)| job.clone()).collect();
        for job in kept {
            self.suppose_with(&job);
        }
    }

    pub(crate) fn suppose_nothing(&mut self) {
        for (queue, charge) in self.supposed.take().unwrap_or_default().into_values() {
            self.tree.suppose(queue, &charge, false);
        }
    }

    /// Counts what is kept for one job, during a cycle.
    pub(crate) fn suppose_with(&mut self, job: &JobId) {
        if self.supposed.as_ref().is_none_or(|supposed| supposed.contains_key(job)) {
            return;
        }
        let Some(hold) = self.holds.of(job) else { return };
        if hold.keep == Keep::Spare {
            let unlent = self.unlent(job);
            self.suppose_spares(job, &unlent);
            return;
        }
        let count = hold.devices.len();
        let first: Vec<DeviceId> = hold.devices.iter().take(2).cloned().collect();
        let Some(owner) = self.known(job) else { return };
        if owner.placed().is_some() {
            // What a gang that shrinks will keep is charged already.
            return;
        }
        let gang = owner.request.gang.clone();
        let Some(queue) = self.tree.find(&owner.request.settings.queue) else { return };
        let charge = self.charge_for(&gang, &first, count, self.now);
        self.suppose_as(job, queue, charge);
    }

    /// Counts these devices as kept ready for a job that is not counted.
    pub(crate) fn suppose_spares(&mut self, job: &JobId, spares: &[DeviceId]) {
        let Some(owner) = self.known(job) else { return };
        let gang = owner.request.gang.clone();
        let Some(queue) = self.tree.find(&owner.request.settings.queue) else { return };
        let charge = self.spares_charge(gang, spares);
        self.suppose_as(job, queue, charge);
    }

    fn suppose_as(&mut self, job: &JobId, queue: QueueId, charge: Charge) {
        self.tree.suppose(queue, &charge, true);
        if let Some(supposed) = &mut self.supposed {
            supposed.insert(job.clone(), (queue, charge));
        }
    }

    /// Uncounts what is kept for one job. Returns whether it was counted.
    pub(crate) fn suppose_without(&mut self, job: &JobId) -> bool {
        let Some((queue, charge)) = self.supposed.as_mut().and_then(|s| s.remove(job)) else {
            return false;
        };
        self.tree.suppose(queue, &charge, false);
        true
    }

    /// Uncounts, while a job is tried, what is kept for itself and for those who came later: two
    /// holds never keep each other waiting. Returns what was uncounted.
    pub(crate) fn uncount_own(&mut self, slot: Slot) -> Vec<JobId> {
        let id = self.job(slot).id.clone();
        let Some(own) = self.holds.of(&id) else { return Vec::new() };
        let since = (own.since, JobId::clone(&id));
        let later: Vec<JobId> = self
            .holds
            .iter()
            .filter(|(job, hold)| (hold.since, *job) >= (since.0, &since.1))
            .map(|(job, _)| job.clone())
            .collect();
        later.into_iter().filter(|job| self.suppose_without(job)).collect()
    }

    /// Counts again what was uncounted.
    pub(crate) fn count_again(&mut self, jobs: &[JobId]) {
        for job in jobs {
            self.suppose_with(job);
        }
    }
}
