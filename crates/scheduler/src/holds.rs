//! Devices that are kept for a job that waits: those freed for it by a preemption, and those of
//! the place where it will start when the jobs that run there have ended.

use std::collections::{BTreeMap, BTreeSet};

use drumline_cluster::{Revision, Snapshot};
use drumline_types::{DeviceId, JobId, Timestamp};
use serde::{Deserialize, Serialize};

/// Why devices are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kept", rename_all = "camelCase")]
pub enum Keep {
    /// Running jobs were asked to leave for it: nobody else gets them.
    Nominated {
        /// Given up when the jobs have not left by then.
        until: Timestamp,
    },
    /// It starts there when running jobs have ended as estimated: who is gone by then may use them.
    Reserved {
        /// The estimated start.
        start: Timestamp,
    },
    /// It runs, and these are for when one of its own fails. Jobs that can be ended at once may use
    /// them meanwhile.
    Spare,
}

/// The devices kept for one job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Why.
    pub keep: Keep,
    /// The devices, in rank order; some are free, others still in use.
    pub devices: Vec<DeviceId>,
    /// When the place was chosen.
    pub since: Timestamp,
}

/// Every hold. A device is kept for one job at most.
#[derive(Debug, Clone, Default)]
pub(crate) struct Holds {
    by_job: BTreeMap<JobId, Hold>,
    by_device: BTreeMap<DeviceId, JobId>,
    /// Those whose devices may not be fit any more, or free later than was thought.
    doubted: BTreeSet<JobId>,
    /// How many devices of a hold nobody uses, as counted at a revision of the fleet.
    unused: BTreeMap<JobId, (Revision, u64)>,
}

impl Holds {
    pub(crate) fn of(&self, job: &JobId) -> Option<&Hold> {
        self.by_job.get(job)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_job.len()
    }

    /// Returns how many are reservations for later.
    pub(crate) fn reserved(&self) -> usize {
        self.by_job.values().filter(|hold| matches!(hold.keep, Keep::Reserved { .. })).count()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&JobId, &Hold)> {
        self.by_job.iter()
    }

    pub(crate) fn saved(&self) -> BTreeMap<JobId, Hold> {
        self.by_job.clone()
    }

    /// Keeps devices for a job, instead of those that were kept for it so far. A device that is kept
    /// for another job is taken from that one's hold, which is given up whole.
    pub(crate) fn keep(&mut self, job: &JobId, hold: Hold) {
        self.drop(job);
        for device in &hold.devices {
            if let Some(other) = self.by_device.get(device).cloned() {
                self.drop(&other);
            }
            self.by_device.insert(device.clone(), job.clone());
        }
        self.by_job.insert(job.clone(), hold);
        self.doubted.insert(job.clone());
    }

    pub(crate) fn restart(&mut self, job: &JobId, keep: Keep) {
        if let Some(hold) = self.by_job.get_mut(job) {
            hold.keep = keep;
        }
    }

    pub(crate) fn drop(&mut self, job: &JobId) -> Option<Hold> {
        let hold = self.by_job.remove(job)?;
        for device in &hold.devices {
            self.by_device.remove(device);
        }
        self.doubted.remove(job);
        self.unused.remove(job);
        Some(hold)
    }

    /// Returns for whom a device is kept.
    pub(crate) fn holder(&self, device: &DeviceId) -> Option<&JobId> {
        self.by_device.get(device)
    }

    /// Takes note that these devices, of which some may be kept, are free later than was thought.
    pub(crate) fn doubt(&mut self, devices: &[DeviceId]) {
        if self.by_job.is_empty() {
            return;
        }
        for device in devices {
            if let Some(job) = self.by_device.get(device) {
                self.doubted.insert(job.clone());
            }
        }
    }

    /// Takes note that any device may not be what it was.
    pub(crate) fn doubt_all(&mut self) {
        self.doubted.extend(self.by_job.keys().cloned());
    }

    /// Returns whose devices will be looked at anew.
    pub(crate) fn doubted(&self) -> &BTreeSet<JobId> {
        &self.doubted
    }

    /// Says whose devices are to be looked at anew, and nobody else's.
    pub(crate) fn doubt_only(&mut self, doubted: BTreeSet<JobId>) {
        self.doubted = doubted;
    }

    /// Returns whose devices have to be looked at anew.
    pub(crate) fn take_doubted(&mut self) -> BTreeSet<JobId> {
        std::mem::take(&mut self.doubted)
    }

    /// Returns how many of the devices that are kept for a job nobody uses. Not to be asked during
    /// a trial, whose revisions mean nothing later.
    pub(crate) fn unused(&mut self, job: &JobId, fleet: &Snapshot) -> u64 {
        let now = fleet.revision();
        if let Some((at, count)) = self.unused.get(job)
            && *at == now
        {
            return *count;
        }
        let Some(hold) = self.by_job.get(job) else { return 0 };
        let mut count = 0u64;
        for on_node in hold.devices.chunk_by(|a, b| a.node == b.node) {
            let state = on_node.first().and_then(|device| fleet.node(&device.node));
            let Some(state) = state else { continue };
            let unused = |device: &&DeviceId| state.used_milli(device.index) == 0;
            count += on_node.iter().filter(unused).count() as u64;
        }
        self.unused.insert(job.clone(), (now, count));
        count
    }
}
