//! Whether what a job takes from running gangs is worth what they lose by it.
//!
//! A claim is a right, and not always a reason: who will start soon by itself, or would cost others
//! more than it wins, waits. It does not wait for ever: after [`Options::patience_ms`] a claim is
//! enforced at any price.
//!
//! [`Options::patience_ms`]: crate::Options::patience_ms

use drumline_queue::{QueueId, Short};
use drumline_spec::Gang;
use drumline_types::Timestamp;

use crate::cycle::Refusal;
use crate::holds::Keep;
use crate::job::milli;
use crate::lines::By;
use crate::scheduler::{Scheduler, Slot};
use crate::vain::{LOOKS_A_STEP, Priced};

/// What a gang is let run at most, in milliseconds, to make up for what disruptions cost it: so
/// much longer at most may a reclaim take.
const MADE_UP_MAX_MS: u64 = 3_600_000;

impl Scheduler {
    /// Returns a job's claim, to be priced.
    pub(crate) fn priced(&self, slot: Slot, gang: &Gang) -> Priced {
        let job = self.job(slot);
        let since = job.request.submitted.max(job.past.since);
        Priced {
            queue: job.request.settings.queue.clone(),
            priority: job.priority(),
            gang: gang.clone(),
            enforced: since.plus_ms(self.options.patience_ms),
            until: self.now,
        }
    }

    /// Returns whether a job takes from others what costs them so much device time: it wins more,
    /// or has waited for long enough.
    pub(crate) fn is_worth(
        &mut self,
        slot: Slot,
        gang: &Gang,
        loss: u128,
        refusal: &Refusal,
        now: Timestamp,
    ) -> bool {
        if self.priced(slot, gang).enforced <= now || loss == 0 {
            return true;
        }
        let start = self.starts_itself(slot, gang, refusal, now);
        let waits_ms = start.map_or(u64::MAX, |start| start.since_ms(now));
        u128::from(gang.ranks) * u128::from(waits_ms) > loss
    }

    /// Returns when a job would start if nobody left for it, as far as estimates hold; `None`: it
    /// would not.
    fn starts_itself(
        &mut self,
        slot: Slot,
        gang: &Gang,
        refusal: &Refusal,
        now: Timestamp,
    ) -> Option<Timestamp> {
        if let Some(short) = refusal.short.as_ref().filter(|_| refusal.by == By::Quota) {
            return self.quota_at(gang, short, now);
        }
        let id = &self.job(slot).id;
        if let Some(Keep::Reserved { start }) = self.holds.of(id).map(|hold| hold.keep) {
            return Some(start);
        }
        self.earliest(slot, gang, now).map(|(_, start)| start)
    }

    /// Returns when so much of a quota is given back that a gang fits into it.
    fn quota_at(&mut self, gang: &Gang, short: &Short, now: Timestamp) -> Option<Timestamp> {
        let need = milli(gang, gang.ranks);
        let mut lacks = (short.used + short.kept + need).saturating_sub(short.limit);
        let mut looked = 0u64;
        let mut at = None;
        for &(end, _, slot) in &self.ends {
            looked += 1;
            let job = self.job(slot);
            let Some(placed) = job.placed() else { continue };
            let Some(queue) = self.tree.find(&job.request.settings.queue) else { continue };
            let counts = job.gang().device == gang.device
                && (short.queue == QueueId::FLEET
                    || self.tree.path(queue).any(|above| above == short.queue));
            if !counts {
                continue;
            }
            let back = placed.charge.iter().map(|(_, amount)| amount).sum();
            lacks = lacks.saturating_sub(back);
            if lacks == 0 {
                at = Some(end.max(now));
                break;
            }
        }
        self.searches.steps += looked / LOOKS_A_STEP;
        at
    }

    /// Returns until when a gang that starts now is left alone: it makes up for what it lost.
    pub(crate) fn left_alone(&self, lost_ms: u64, now: Timestamp) -> Timestamp {
        now.plus_ms(lost_ms.min(MADE_UP_MAX_MS).max(self.options.cooldown_ms))
    }
}
