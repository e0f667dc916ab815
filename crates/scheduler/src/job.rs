//! One job in the scheduler's memory, and the values that follow from what it asks for.

use std::sync::Arc;

use drumline_cluster::Request;
use drumline_queue::{Charge, Place};
use drumline_spec::{Gang, Parallelism, WHOLE_DEVICE};
use drumline_types::{Attempt, Explanation, JobId, Timestamp};

use crate::lines::{Alike, ClassId};
use crate::options::{Options, Order};
use crate::saved::{Leaving, Past};

/// A job that is not told how long it runs is thought to run this long at first, in milliseconds.
const UNKNOWN_MS: u64 = 3_600_000;

/// A correction of an estimated end is at least so much, in milliseconds: a bound on how often one
/// job is looked at.
const CORRECTION_MIN_MS: u64 = 60_000;

/// Where a job stands, with what the scheduler keeps beside it.
#[derive(Debug, Clone)]
pub(crate) enum Stand {
    /// Held back by a user, or it rests before a restart.
    Aside { not_before: Timestamp, told: Option<Arc<Explanation>> },
    /// In its queue's line.
    InLine { class: ClassId, place: Place, told: Option<Arc<Explanation>> },
    /// It holds devices.
    Placed(Placed),
}

/// A job that holds devices.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) started: Timestamp,
    pub(crate) running: bool,
    pub(crate) safe: Timestamp,
    pub(crate) ends: Timestamp,
    pub(crate) leaving: Option<Leaving>,
    pub(crate) charge: Arc<Charge>,
    /// Its present size in ranks.
    pub(crate) ranks: u32,
    /// The cycle that started it.
    pub(crate) cycle: u64,
}

/// A job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) id: Arc<JobId>,
    /// Shared with the copies that previews are made on.
    pub(crate) request: Arc<Request>,
    pub(crate) attempt: Attempt,
    pub(crate) held: bool,
    pub(crate) stand: Stand,
    pub(crate) past: Past,
}

impl Job {
    pub(crate) fn gang(&self) -> &Gang {
        &self.request.gang
    }

    pub(crate) fn priority(&self) -> i32 {
        self.request.settings.priority
    }

    /// Returns its place in its queue's line.
    pub(crate) fn place(&self, options: &Options) -> Place {
        let (id, settings) = (self.id.clone(), &self.request.settings);
        let submitted = self.request.submitted;
        match options.order {
            Order::Priority => {
                Place::by_priority(id, settings.priority, submitted, options.ageing_ms)
            }
            Order::Fifo => Place::by_arrival(id, submitted),
            Order::ShortestFirst => Place::by_length(id, settings.expected_ms, submitted),
        }
    }

    /// Returns what it has in common with others.
    pub(crate) fn alike(&self) -> Alike {
        let mut gang = self.request.gang.clone();
        if let (Some(elastic), Some(size)) = (&mut gang.elastic, self.past.size) {
            let least = elastic.least.max(1);
            gang.ranks = size.clamp(least, elastic.most.max(least));
        }
        Alike {
            queue: self.request.settings.queue.clone(),
            gang,
            length: self.remaining_ms().map(length),
            priority: self.priority(),
            brief: self.ends_at_once(),
        }
    }

    /// Returns whether it can be ended for another at any moment, so that devices can be lent to it.
    pub(crate) fn ends_at_once(&self) -> bool {
        let settings = &self.request.settings;
        settings.preemptible && settings.min_runtime_ms == 0 && settings.disruptions.is_none()
    }

    /// Returns how long it is still expected to run once started, if that is known.
    pub(crate) fn remaining_ms(&self) -> Option<u64> {
        Some(self.request.settings.expected_ms?.saturating_sub(self.past.done_ms))
    }

    /// Returns when it would surely end if it started now, as far as estimates hold.
    pub(crate) fn bound(&self, now: Timestamp) -> Option<Timestamp> {
        Some(now.plus_ms(self.remaining_ms()?))
    }

    /// Returns the first guess of its end.
    pub(crate) fn first_end(&self, started: Timestamp) -> Timestamp {
        started.plus_ms(self.remaining_ms().unwrap_or(UNKNOWN_MS))
    }

    /// Returns a later guess for a job that has run over the last one.
    pub(crate) fn later_end(&self, placed: &Placed, now: Timestamp) -> Timestamp {
        let ran = now.since_ms(placed.started);
        // Who said nothing runs on as long as it has run; who said something is a quarter wrong.
        let more = if self.request.settings.expected_ms.is_some() { ran / 4 } else { ran };
        now.plus_ms(more.max(CORRECTION_MIN_MS))
    }

    /// Returns the split of this job at another size, which is a multiple of one copy of the model.
    pub(crate) fn split(&self, ranks: u32) -> Parallelism {
        let split = self.request.split;
        if ranks == self.request.gang.ranks {
            return split;
        }
        let copy = split.tensor.saturating_mul(split.pipeline).max(1);
        Parallelism { data: (ranks / copy).max(1), ..split }
    }

    pub(crate) fn placed(&self) -> Option<&Placed> {
        match &self.stand {
            Stand::Placed(placed) => Some(placed),
            _ => None,
        }
    }

    pub(crate) fn placed_mut(&mut self) -> Option<&mut Placed> {
        match &mut self.stand {
            Stand::Placed(placed) => Some(placed),
            _ => None,
        }
    }

    pub(crate) fn told_mut(&mut self) -> Option<&mut Option<Arc<Explanation>>> {
        match &mut self.stand {
            Stand::Aside { told, .. } | Stand::InLine { told, .. } => Some(told),
            Stand::Placed(_) => None,
        }
    }
}

/// Returns the eighth of an octave that a time is in: times in one differ by a ninth at most.
fn length(ms: u64) -> u32 {
    let ms = ms.max(8);
    let octave = ms.ilog2();
    octave * 8 + (ms >> (octave - 3) & 7) as u32
}

/// Returns the sizes that a gang may start at, ascending.
pub(crate) fn sizes(gang: &Gang) -> Vec<u32> {
    let Some(elastic) = gang.elastic else { return vec![gang.ranks] };
    let step = elastic.step.max(1);
    let least = elastic.least.max(1).min(gang.ranks).next_multiple_of(step);
    let mut sizes: Vec<u32> = (least..gang.ranks).step_by(step as usize).take(4096).collect();
    sizes.push(gang.ranks);
    sizes
}

/// Returns the thousandths of devices that a gang holds at a size.
pub(crate) fn milli(gang: &Gang, ranks: u32) -> u64 {
    u64::from(ranks) * u64::from(gang.share_milli.min(WHOLE_DEVICE))
}
