//! What waiting jobs are told: one reason each, and news of it only when it has changed.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use drumline_types::{Explanation, JobId, Reason, Timestamp, format_duration_ms};

use crate::cycle::Work;
use crate::holds::Keep;
use crate::job::{Job, Stand};
use crate::lines::{By, ClassId, Standing};
use crate::scheduler::Scheduler;
use crate::site;

/// Jobs that are told something in one cycle, at most; the next cycle goes on from there.
const TOLD_MAX: usize = 1_024;

impl Scheduler {
    /// Sets what the jobs of a class are told.
    pub(crate) fn set_why(&mut self, class: ClassId, why: &Explanation) {
        let id = class;
        let Some(class) = self.lines.class_mut(class) else { return };
        if class.why.as_deref() == Some(why) {
            return;
        }
        if class.why.as_ref().is_none_or(|old| old.reason != why.reason) {
            class.telling = Some(None);
        }
        class.why = Some(Arc::new(why.clone()));
        self.lines.news.insert(id);
    }

    /// Tells those whose reason has changed, and the first of each class also when only the
    /// evidence has.
    pub(crate) fn tell(&mut self, work: &mut Work) {
        let mut told: BTreeMap<Arc<JobId>, Arc<Explanation>> = BTreeMap::new();
        let fresh: Vec<Arc<JobId>> = self.lines.untold.iter().take(TOLD_MAX).cloned().collect();
        for id in fresh {
            let Some(job) = self.known(&id) else {
                self.lines.untold.remove(&id);
                continue;
            };
            let why = match &job.stand {
                Stand::Aside { .. } => Some(Arc::new(aside_text(job, work.now))),
                Stand::InLine { class, .. } => {
                    self.lines.class(*class).and_then(|class| class.why.clone())
                }
                Stand::Placed(_) => None,
            };
            if let Some(why) = why {
                self.lines.untold.remove(&id);
                told.insert(id, why);
            }
        }
        for id in std::mem::take(&mut self.lines.news) {
            let Some(class) = self.lines.class_mut(id) else { continue };
            let Some(why) = class.why.clone() else { continue };
            if let Some(from) = class.telling.take() {
                let range = match &from {
                    None => (Bound::Unbounded, Bound::Unbounded),
                    Some(place) => (Bound::Excluded(place), Bound::Unbounded),
                };
                let room = TOLD_MAX.saturating_sub(told.len());
                let mut last = from.clone();
                let mut more = false;
                for place in class.places.range(range) {
                    if told.len() >= TOLD_MAX || room == 0 {
                        more = true;
                        break;
                    }
                    told.insert(place.job().clone(), why.clone());
                    last = Some(place.clone());
                }
                if more {
                    class.telling = Some(last);
                    work.unfinished = true;
                }
            }
            let unfinished = class.telling.is_some();
            if let Some(first) = class.places.first() {
                told.entry(first.job().clone()).or_insert(why);
            }
            if unfinished {
                self.lines.news.insert(id);
            }
        }
        for (id, why) in told {
            let Some(&slot) = self.ids.get(&id) else { continue };
            let Some(last) = self.job_mut(slot).told_mut() else { continue };
            if last.as_ref() != Some(&why) {
                *last = Some(why.clone());
                self.lines.untold.remove(&id);
                work.told.push((JobId::clone(&id), Explanation::clone(&why)));
            }
        }
        if !self.lines.untold.is_empty() {
            let waiting = self.lines.untold.iter().take(TOLD_MAX).any(|id| {
                self.known(id).is_some_and(|job| match &job.stand {
                    Stand::InLine { class, .. } => {
                        self.lines.class(*class).is_some_and(|class| class.why.is_some())
                    }
                    _ => true,
                })
            });
            work.unfinished |= waiting;
        }
    }

    /// Explains in full why a job waits, with evidence and, where it can be had, the estimated
    /// start. `None`: it does not wait.
    #[must_use]
    pub fn explain(&self, job: &JobId, now: Timestamp) -> Option<Explanation> {
        let job = self.known(job)?;
        match &job.stand {
            Stand::Placed(_) => None,
            Stand::Aside { .. } => Some(aside_text(job, now)),
            Stand::InLine { class, place, told } => {
                let class = self.lines.class(*class)?;
                let Some(why) = class.why.as_ref().or(told.as_ref()) else {
                    return Some(Explanation::new(
                        Reason::NotYetConsidered,
                        "the next cycle looks at it",
                    ));
                };
                let mut reason = why.reason;
                let mut message = match class.standing {
                    // The evidence of today rather than of when it was tried.
                    Standing::Blocked { by: By::Devices | By::Kept | By::Outright, .. }
                        if self.holds.of(&job.id).is_none() && is_about_devices(why.reason) =>
                    {
                        let (gang, bounds) = (&class.alike.gang, self.bounds(None));
                        match site::find(&self.fleet, gang, job.split(gang.ranks), &bounds) {
                            Err(now) => {
                                reason = now.reason;
                                now.message
                            }
                            // It fits since a moment ago: the next cycle starts it.
                            Ok(_) => why.message.clone(),
                        }
                    }
                    _ => why.message.clone(),
                };
                let before = class.places.range(..place).count();
                if before > 0 {
                    message += &format!("; {before} like it are before it in its queue");
                }
                if let Some(hold) = self.holds.of(&job.id) {
                    match hold.keep {
                        Keep::Nominated { .. } => {
                            reason = Reason::WaitingForPreempted;
                            message = self.nominated_text(hold);
                        }
                        // Its attempt has just ended; the next cycle looks for its place.
                        Keep::Reserved { .. } | Keep::Spare => {}
                    }
                }
                if let Some((start, after)) = self.estimated_start(&job.id, now) {
                    let when = format_duration_ms(start.since_ms(now));
                    message += &format!("; estimated start in {when}");
                    if let Some(after) = after {
                        message += &format!(", when {after} ends");
                    }
                }
                if matches!(class.standing, Standing::Blocked { by: By::Kept, .. }) {
                    message += "; what is free is kept for jobs that were there before";
                }
                Some(Explanation::new(reason, message))
            }
        }
    }

    pub(crate) fn nominated_text(&self, hold: &crate::holds::Hold) -> String {
        let mut holders: Vec<&JobId> =
            hold.devices.iter().filter_map(|device| self.fleet.holder(device)).collect();
        holders.sort();
        holders.dedup();
        let names: Vec<&str> = holders.iter().take(3).map(|holder| holder.as_str()).collect();
        let more = holders.len().saturating_sub(names.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!(
            "{} devices are kept for it; {}{more} leave them",
            hold.devices.len(),
            names.join(", ")
        )
    }
}

/// Returns whether a reason follows from what the fleet has, rather than from quota or order.
fn is_about_devices(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::WaitingForDevices
            | Reason::TopologyDoesNotFit
            | Reason::ExceedsCluster
            | Reason::NodesNotReady
            | Reason::NoMatchingDevice
    )
}

/// Says why a job stands aside.
pub(crate) fn aside_text(job: &Job, now: Timestamp) -> Explanation {
    let Stand::Aside { not_before, told } = &job.stand else {
        return Explanation::new(Reason::NotYetConsidered, "the next cycle looks at it");
    };
    if job.held {
        return Explanation::new(Reason::Held, "held by a user");
    }
    if let Some(told) = told
        && told.reason != Reason::BackingOff
    {
        return Explanation::clone(told);
    }
    let left = format_duration_ms(not_before.since_ms(now));
    Explanation::new(Reason::BackingOff, format!("attempt {} starts in {left}", job.attempt))
}
