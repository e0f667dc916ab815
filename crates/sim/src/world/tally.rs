//! What a simulation counts on its way, and the report that it makes of that.

use std::collections::BTreeMap;

use drumline_placement::EvictionCause;
use drumline_types::Reason;

use crate::measure::fairness::jain;
use crate::measure::{Cause, Fairness, Histogram, Ledger, Timeline, ledger};
use crate::report::{
    Counts, Ending, Evictions, Impossible, LostHours, PolicyReport, ReasonShare, SizeReport,
};
use crate::world::attempt::Live;

/// Sizes that are told apart, each up to so many ranks.
const SIZES: [(u32, &str); 6] =
    [(1, "1"), (7, "2-7"), (8, "8"), (64, "9-64"), (512, "65-512"), (u32::MAX, "over 512")];
/// Names that a report lists at most.
const NAMED: usize = 20;

#[derive(Debug, Default, Clone)]
struct Size {
    wait: Histogram,
    completion: Histogram,
    /// Progress that was kept, and time since the first start; ranks times milliseconds.
    kept: u128,
    elapsed: u128,
}

/// Everything that is counted.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) ledger: Ledger,
    pub(super) timeline: Timeline,
    pub(super) fairness: Fairness,
    pub(super) counts: Counts,
    pub(super) evictions: Evictions,
    pub(super) cycles: u64,
    pub(super) considered: u64,
    pub(super) last_end: u64,
    wait: Histogram,
    completion: Histogram,
    sizes: Vec<Size>,
    reasons: BTreeMap<Reason, u128>,
    impossible: Impossible,
}

impl Tally {
    pub(super) fn new(fairness: Fairness) -> Self {
        Self {
            ledger: Ledger::default(),
            timeline: Timeline::default(),
            fairness,
            counts: Counts::default(),
            evictions: Evictions::default(),
            cycles: 0,
            considered: 0,
            last_end: 0,
            wait: Histogram::default(),
            completion: Histogram::default(),
            sizes: vec![Size::default(); SIZES.len()],
            reasons: BTreeMap::new(),
            impossible: Impossible::default(),
        }
    }

    fn size(&mut self, live: &Live) -> Option<&mut Size> {
        let at = SIZES.iter().position(|(most, _)| live.job.gang.ranks <= *most)?;
        self.sizes.get_mut(at)
    }

    pub(super) fn started(&mut self, live: &Live, now: u64) {
        if live.first_start == Some(now) {
            let waited = now.saturating_sub(live.job.arrives);
            self.wait.add(waited);
            if let Some(size) = self.size(live) {
                size.wait.add(waited);
            }
        }
    }

    pub(super) fn finished(&mut self, live: &Live, now: u64) {
        self.counts.finished += 1;
        self.last_end = self.last_end.max(now);
        let took = now.saturating_sub(live.job.arrives);
        self.completion.add(took);
        if let Some(size) = self.size(live) {
            size.completion.add(took);
        }
        self.progressed(live, now);
    }

    /// Takes note of how much of its time a job that started has worked.
    pub(super) fn progressed(&mut self, live: &Live, now: u64) {
        let Some(first) = live.first_start else { return };
        let ranks = u128::from(live.job.gang.ranks);
        let (kept, elapsed) = (live.kept_ms, now.saturating_sub(first));
        if let Some(size) = self.size(live) {
            size.kept += u128::from(kept) * ranks;
            size.elapsed += u128::from(elapsed) * ranks;
        }
    }

    /// Takes note of the time for which a job was told a reason.
    pub(super) fn told(&mut self, live: &mut Live, reason: Option<Reason>, now: u64) {
        if let Some((reason, since)) = live.told {
            *self.reasons.entry(reason).or_default() += u128::from(now - since);
        }
        live.told = reason.map(|reason| (reason, now));
    }

    pub(super) fn evicted(&mut self, cause: EvictionCause) {
        *match cause {
            EvictionCause::Preempted => &mut self.evictions.preempted,
            EvictionCause::Reclaimed => &mut self.evictions.reclaimed,
            EvictionCause::Recalled => &mut self.evictions.recalled,
            EvictionCause::Consolidated => &mut self.evictions.consolidated,
            EvictionCause::Resized => &mut self.evictions.resized,
            EvictionCause::Drained => &mut self.evictions.drained,
        } += 1;
    }

    pub(super) fn impossible(&mut self, name: &str, why: &str) {
        self.impossible.count += 1;
        if self.impossible.names.len() < NAMED {
            self.impossible.names.push(format!("{name}: {why}"));
        }
    }

    /// Makes the report. `waiting` are the jobs that never started, in the order of arrival.
    pub(super) fn report<'a>(
        self,
        policy: &str,
        ending: Ending,
        capacity: u64,
        waiting: impl Iterator<Item = &'a Live>,
    ) -> PolicyReport {
        let mean = self.timeline.mean(capacity);
        let sum = |part: fn(&Size) -> u128| self.sizes.iter().map(part).sum::<u128>();
        let ratio = |kept: u128, elapsed: u128| match elapsed {
            0 => None,
            _ => Some(kept as f64 / elapsed as f64),
        };
        let waited: u128 = self.reasons.values().sum();
        let queues = self.fairness.shares();
        PolicyReport {
            policy: policy.to_owned(),
            ending,
            simulated_hours: mean.hours,
            makespan_hours: self.last_end as f64 / 3_600_000.0,
            counts: self.counts,
            impossible: self.impossible,
            never_started: waiting.take(NAMED).map(|live| live.job.id.to_string()).collect(),
            wait: self.wait.stats(),
            completion: self.completion.stats(),
            sizes: SIZES
                .iter()
                .zip(&self.sizes)
                .filter(|(_, size)| size.wait.stats().count > 0)
                .map(|((_, name), size)| SizeReport {
                    ranks: (*name).to_owned(),
                    wait: size.wait.stats(),
                    completion: size.completion.stats(),
                    effective_time: ratio(size.kept, size.elapsed),
                })
                .collect(),
            allocation: mean.allocation,
            utilization: mean.utilization,
            fragmentation: mean.fragmentation,
            effective_time: ratio(sum(|size| size.kept), sum(|size| size.elapsed)),
            device_hours: Cause::ALL
                .into_iter()
                .map(|cause| LostHours {
                    cause,
                    hours: self.ledger.hours(cause),
                    share: if self.ledger.total() == 0 {
                        0.0
                    } else {
                        self.ledger.spent(cause) as f64 / self.ledger.total() as f64
                    },
                })
                .collect(),
            capacity_hours: ledger::hours(self.ledger.total()),
            evictions: self.evictions,
            fairness: jain(&queues),
            queues,
            reasons: self
                .reasons
                .iter()
                .filter(|(_, ms)| **ms > 0)
                .map(|(reason, ms)| ReasonShare {
                    reason: *reason,
                    share: *ms as f64 / waited.max(1) as f64,
                })
                .collect(),
            cycles: self.cycles,
            considered: self.considered,
            timeline: self.timeline.points(capacity),
            seconds: 0.0,
        }
    }

    /// Returns whether what was put into the ledger is what there was.
    pub(super) fn is_balanced(&self, capacity: u64, now: u64) -> bool {
        self.ledger.total() == u128::from(capacity) * u128::from(now)
    }
}
