//! When a job that waits for quota will have it: jobs behind it that are gone by then may run
//! meanwhile.

use std::sync::Arc;

use drumline_queue::{Charge, Place, QueueId, Tree};
use drumline_spec::Gang;
use drumline_types::{JobId, QueueName, Timestamp};

use crate::choice::Choice;
use crate::holds::Keep;
use crate::job::{Stand, milli, sizes};
use crate::lines::{By, Standing};
use crate::scheduler::{Scheduler, Slot};
use crate::vain::{LOOKS_A_STEP, STEPS_MAX};

/// Running jobs that are looked at for one promise, at most; beyond them nothing is promised.
const ENDS_MAX: usize = 4_096;

/// The moment at which a job that waits for quota will have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Promise {
    pub(crate) start: Timestamp,
    /// The running job that ends then.
    pub(crate) after: Arc<JobId>,
}

impl Scheduler {
    /// Returns when quota suffices for a job at its least size, if running jobs end as estimated and
    /// no other queue takes what they share.
    pub(crate) fn quota_promise(
        &mut self,
        leaf: QueueId,
        gang: &Gang,
        now: Timestamp,
    ) -> Option<Promise> {
        if self.searches.steps >= STEPS_MAX {
            return None;
        }
        let claims = self.claims(leaf, gang);
        let Self { tree, ends, jobs, searches, .. } = self;
        let ends = ends.iter().filter_map(|(at, id, slot)| {
            let job = jobs[slot.0].as_ref()?;
            Some((*at, id, &job.request.settings.queue, &job.placed()?.charge))
        });
        let (found, looked) = promise(tree, leaf, &claims, ends, now);
        searches.steps += looked / LOOKS_A_STEP;
        found
    }

    /// Returns what would have to pass for a job to start, one charge for each way to place it.
    fn claims(&self, leaf: QueueId, gang: &Gang) -> Vec<Charge> {
        let least = sizes(gang).first().copied().unwrap_or(gang.ranks);
        let claim = |choice: Choice| vec![(choice.charged, milli(gang, least))];
        self.choices(leaf, gang).into_iter().map(claim).collect()
    }

    /// Returns when the job at `place` will have quota, if that is what it waits for.
    pub(crate) fn promise_at(
        &mut self,
        place: &Place,
        leaf: QueueId,
        now: Timestamp,
    ) -> Option<Promise> {
        let Stand::InLine { class, .. } = self.known(place.job())?.stand else {
            return None;
        };
        let class = self.lines.class(class)?;
        if !matches!(class.standing, Standing::Blocked { by: By::Quota, .. }) {
            return None;
        }
        let gang = class.alike.gang.clone();
        self.quota_promise(leaf, &gang, now)
    }

    /// Returns whether a job is surely gone when the one before it, which waits for quota, has it.
    pub(crate) fn is_gone_by(&self, slot: Slot, promise: Option<&Promise>, now: Timestamp) -> bool {
        let bound = self.job(slot).bound(now);
        promise.is_some_and(|promise| bound.is_some_and(|bound| bound <= promise.start))
    }

    /// Returns when a waiting job is estimated to start, and after which running job, as far as that
    /// is known: for those with a reservation, and for the first in line for a quota.
    #[must_use]
    pub fn estimated_start(
        &self,
        job: &JobId,
        now: Timestamp,
    ) -> Option<(Timestamp, Option<JobId>)> {
        let known = self.known(job)?;
        let Stand::InLine { class, place, .. } = &known.stand else { return None };
        if let Some(hold) = self.holds.of(job) {
            let Keep::Reserved { start } = hold.keep else { return None };
            let last = hold
                .devices
                .iter()
                .filter_map(|device| self.fleet.holder(device))
                .filter_map(|holder| Some((self.known(holder)?.placed()?.ends, holder)))
                .max();
            return Some((start, last.map(|(_, holder)| holder.clone())));
        }
        let class = self.lines.class(*class)?;
        let leaf = self.tree.leaf(&class.alike.queue).ok()?;
        let first = self.head(&class.alike.queue).is_some_and(|(head, _)| head == *place);
        if !first || !matches!(class.standing, Standing::Blocked { by: By::Quota, .. }) {
            return None;
        }
        let claims = self.claims(leaf, &class.alike.gang);
        let ends = self.ends.iter().filter_map(|(at, id, slot)| {
            let job = self.job(*slot);
            Some((*at, id, &job.request.settings.queue, &job.placed()?.charge))
        });
        let (found, _) = promise(&mut self.tree.clone(), leaf, &claims, ends, now);
        found.map(|promise| (promise.start, Some(JobId::clone(&promise.after))))
    }
}

/// Takes running jobs away in the order of their ends until one of the claims passes, and gives them
/// back. Returns also how many it looked at.
fn promise<'a>(
    tree: &mut Tree,
    leaf: QueueId,
    claims: &[Charge],
    ends: impl Iterator<Item = (Timestamp, &'a Arc<JobId>, &'a QueueName, &'a Arc<Charge>)>,
    now: Timestamp,
) -> (Option<Promise>, u64) {
    let mut gone: Vec<(QueueId, &Charge)> = Vec::new();
    let mut found = None;
    for (at, id, queue, charge) in ends.take(ENDS_MAX) {
        let Some(queue) = tree.find(queue) else { continue };
        tree.suppose(queue, charge, false);
        gone.push((queue, charge));
        if claims.iter().any(|claim| tree.check(leaf, claim).is_ok()) {
            found = Some(Promise { start: now.max(at), after: id.clone() });
            break;
        }
    }
    for (queue, charge) in &gone {
        tree.suppose(*queue, charge, true);
    }
    (found, gone.len() as u64)
}
