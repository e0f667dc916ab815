//! Elastic gangs that grow when devices are idle and nobody waits for them.

use std::sync::Arc;

use drumline_placement::EvictionCause;
use drumline_types::{JobId, Timestamp};

use crate::cycle::Work;
use crate::holds::Keep;
use crate::job::milli;
use crate::preempt::{NOMINATED_MS, disruptable};
use crate::scheduler::{Scheduler, Slot};
use crate::site;

/// Gangs that are looked at in one cycle, at most.
const LOOKED_AT_MAX: usize = 32;

/// What is thought to be left of a job that says nothing, in milliseconds.
const UNKNOWN_MS: u64 = 3_600_000;

/// Devices that nobody wants now are thought to be wanted again after so long, in milliseconds.
const IDLE_MS: u64 = 2 * 3_600_000;

impl Scheduler {
    /// Lets one elastic gang start again with more devices, if nobody waits for them and the work
    /// that it gains is more than what it loses.
    pub(crate) fn grow(&mut self, work: &mut Work) {
        if self.lines.len() > 0 || !work.jobs.is_empty() || !work.evictions.is_empty() {
            return;
        }
        let mut small: Vec<(u64, Arc<JobId>, Slot)> = Vec::new();
        for &(_, ref id, slot) in self.placed.values().flatten() {
            let job = self.job(slot);
            let (Some(elastic), Some(placed)) = (job.request.gang.elastic, job.placed()) else {
                continue;
            };
            if placed.ranks >= elastic.most {
                continue;
            }
            let lost_ms = work.now.since_ms(placed.safe) + self.options.restart_cost_ms;
            let from = placed.started.plus_ms(self.options.cooldown_ms);
            match disruptable(job, placed, work.now) {
                Ok(()) if from <= work.now => small.push((lost_ms, id.clone(), slot)),
                Ok(()) => work.wake(from),
                Err(at) => work.wake(at.max(from)),
            }
        }
        small.sort();
        for (lost_ms, id, slot) in small.into_iter().take(LOOKED_AT_MAX) {
            if self.grow_one(slot, &id, lost_ms, work) {
                return;
            }
        }
    }

    fn grow_one(&mut self, slot: Slot, id: &JobId, lost_ms: u64, work: &mut Work) -> bool {
        let job = self.job(slot);
        let (Some(elastic), Some(placed)) = (job.request.gang.elastic, job.placed()) else {
            return false;
        };
        let (ranks, charge) = (placed.ranks, placed.charge.clone());
        let left_ms = match job.request.settings.expected_ms {
            Some(_) => placed.ends.since_ms(work.now),
            None => UNKNOWN_MS,
        };
        let mut gang = job.request.gang.clone();
        gang.ranks = elastic.most;
        let split = job.split(gang.ranks);
        let Some(leaf) = self.tree.find(&job.request.settings.queue) else { return false };
        let bounds = self.bounds(Some(elastic.most));
        let found = {
            let mut trial = self.fleet.trial();
            trial.evict(id);
            site::find(trial.snapshot(), &gang, split, &bounds)
        };
        let Ok(found) = found else { return false };
        let size = found.devices.len() as u32;
        // Device-time won with the devices that are added, against that lost by all of the gang:
        // now, and once more when they are wanted back.
        let won = u128::from(size.saturating_sub(ranks)) * u128::from(left_ms.min(IDLE_MS));
        let lost = 2 * u128::from(ranks) * u128::from(lost_ms);
        if size <= ranks || won <= lost {
            return false;
        }
        let Some(choice) = self.choices(leaf, &gang).into_iter().next() else { return false };
        self.tree.suppose(leaf, &charge, false);
        let allowed = self.tree.check(leaf, &vec![(choice.charged, milli(&gang, size))]).is_ok();
        self.tree.suppose(leaf, &charge, true);
        if !allowed {
            return false;
        }
        let message = format!("grows from {ranks} to {size} ranks on idle devices");
        self.evict(id, EvictionCause::Resized, None, Some(size), message, work);
        let until: Timestamp = work.now.plus_ms(NOMINATED_MS);
        self.keep(id, found.devices, Keep::Nominated { until });
        work.wake(until);
        true
    }
}
