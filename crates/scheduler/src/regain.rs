//! Spares that were kept before the scheduler started: kept again as their nodes are heard.

use std::sync::Arc;

use drumline_types::{DeviceId, JobId};

use crate::cycle::Work;
use crate::holds::Keep;
use crate::saved::Awaited;
use crate::scheduler::{Scheduler, Slot};
use crate::spares::domains;

impl Scheduler {
    /// Returns the devices that are kept ready for a job, or will be when their nodes are heard.
    #[must_use]
    pub fn kept_ready(&self, job: &JobId) -> Vec<DeviceId> {
        let kept = self.spare_hold(job).map_or(&[][..], |hold| &hold.devices);
        let awaited = self.awaited.get(job).map_or(&[][..], |awaited| &awaited.devices);
        kept.iter().chain(awaited).cloned().collect()
    }

    /// Returns whether a gang's own devices have not been heard of since the scheduler started, so
    /// that nothing is known to be lost.
    pub(crate) fn awaits_own(&self, job: &JobId) -> bool {
        let heard = |device: &DeviceId| self.fleet.node(&device.node).is_some();
        self.awaited.contains_key(job)
            && self.fleet.commitment(job).is_some_and(|held| !held.devices.iter().all(heard))
    }

    /// Keeps again what was kept before the scheduler started, where nobody else has a claim to it.
    pub(crate) fn regain_spares(&mut self, work: &mut Work) {
        let awaited: Vec<(Arc<JobId>, Awaited)> =
            self.awaited.iter().map(|(id, awaited)| (id.clone(), awaited.clone())).collect();
        for (id, Awaited { devices, until }) in awaited {
            let slot = self.ids.get(&id).copied();
            let slot = slot.filter(|&slot| {
                let placed = self.job(slot).placed();
                placed.is_some_and(|placed| placed.leaving.is_none())
            });
            let other = self.holds.of(&id).is_some_and(|hold| hold.keep != Keep::Spare);
            let Some(slot) = slot.filter(|_| !other && until > work.now) else {
                self.awaited.remove(&id);
                continue;
            };
            let (heard, absent): (Vec<DeviceId>, Vec<DeviceId>) =
                devices.into_iter().partition(|device| self.fleet.node(&device.node).is_some());
            let mut kept = self.spare_hold(&id).map_or_else(Vec::new, |hold| hold.devices.clone());
            let before = kept.len();
            let wanted = self.job(slot).request.gang.spares as usize;
            for device in heard {
                if kept.len() < wanted && !kept.contains(&device) && self.may_regain(slot, &device)
                {
                    kept.push(device);
                }
            }
            if kept.len() > before {
                self.keep(&id, kept, Keep::Spare);
            }
            if absent.is_empty() && !self.awaits_own(&id) {
                self.awaited.remove(&id);
            } else {
                work.wake(until);
                self.awaited.insert(id, Awaited { devices: absent, until });
            }
        }
    }

    /// Returns whether a device that was kept ready for a gang still may be: it could replace one of
    /// the gang's own, and is free or lent.
    fn may_regain(&self, slot: Slot, device: &DeviceId) -> bool {
        let owner = self.job(slot);
        let gang = &owner.request.gang;
        let Some(state) = self.fleet.node(&device.node) else { return false };
        let Some(held) = self.fleet.commitment(&owner.id) else { return false };
        let lent = state.holders(device.index).all(|holder| {
            let holder = self.known(holder);
            holder.is_some_and(|holder| Self::may_borrow(holder, owner))
        });
        if !self.may_use(device, gang) || state.reserved(device.index).is_some() || !lent {
            return false;
        }
        let workers = &held.devices[usize::from(gang.leader.is_some()).min(held.devices.len())..];
        let Some(first) = workers.first() else { return false };
        // Before the gang's own node is heard there is nothing to compare with.
        let Some(home) = self.fleet.node(&first.node) else { return true };
        let model = |of: &drumline_cluster::NodeState, index: u32| {
            let device = of.node().devices.get(index as usize)?;
            Some((device.kind, device.model.clone()))
        };
        let widest = domains(&self.fleet, gang, workers, home.place()).pop();
        let inside = widest.is_some_and(|widest| {
            self.fleet.topology().path(state.place()).any(|above| above == widest)
        });
        model(home, first.index) == model(state, device.index) && inside
    }
}
