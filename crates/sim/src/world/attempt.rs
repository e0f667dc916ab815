//! One job while it is there: where it stands, and what becomes of an attempt's time.

use drumline_cluster::Request;
use drumline_types::{Attempt, Reason, Timestamp};

use crate::job::Job;
use crate::measure::{Cause, Ledger};
use crate::world::machines::Place;

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stands {
    /// It waits.
    Waiting,
    /// Its ranks start.
    Starting,
    /// Its ranks work.
    Working,
    /// It was asked to leave, and works on: it ends within its grace.
    Ending,
    /// It was asked to leave, and does.
    Leaving,
    /// It has failed.
    Stalled,
}

/// How an attempt ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// All work is done.
    Finished,
    /// A failure ended it.
    Failed,
    /// The scheduler ended it, and its work was saved or not.
    Evicted { saved: bool },
    /// The simulation ends.
    Open,
}

/// A job that is there.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) job: Job,
    /// Its place in the order of arrival.
    pub(super) number: u64,
    pub(super) stands: Stands,
    pub(super) attempt: Attempt,
    /// Names the present start among all starts of the simulation.
    pub(super) start: u64,
    /// Work that is left, in milliseconds of one rank.
    pub(super) left: u64,
    /// What it holds.
    pub(super) places: Vec<Place>,
    /// Ranks of the present attempt.
    pub(super) ranks: u32,
    /// Thousandths that it holds of counted devices.
    pub(super) milli: u64,
    pub(super) placed_at: u64,
    pub(super) ready_at: u64,
    /// When the work of a start stops that does not end by itself.
    pub(super) halted_at: Option<u64>,
    pub(super) ends: End,
    pub(super) first_start: Option<u64>,
    /// Time in which it made progress that was kept, in milliseconds.
    pub(super) kept_ms: u64,
    pub(super) queue: Option<usize>,
    /// What it was told last, and when.
    pub(super) told: Option<(Reason, u64)>,
}

impl Live {
    pub(super) fn new(job: Job, number: u64, queue: Option<usize>) -> Self {
        Self {
            left: job.work_ms.max(1).saturating_mul(u64::from(job.gang.ranks)),
            stands: Stands::Waiting,
            attempt: Attempt(1),
            start: 0,
            places: Vec::new(),
            ranks: 0,
            milli: 0,
            placed_at: 0,
            ready_at: 0,
            halted_at: None,
            ends: End::Open,
            first_start: None,
            kept_ms: 0,
            queue,
            told: None,
            number,
            job,
        }
    }

    pub(super) fn request(&self) -> Request {
        Request {
            job: self.job.id.clone(),
            gang: self.job.gang.clone(),
            split: self.job.split,
            settings: self.job.settings.clone(),
            submitted: Timestamp(self.job.arrives),
        }
    }

    /// Returns when the present start ends its work if nothing comes between.
    pub(super) fn finish_at(&self) -> u64 {
        let work = self.left.div_ceil(u64::from(self.ranks.max(1)));
        let pauses = self.job.pauses_within(work);
        let paused = self.job.saves.map_or(0, |saves| pauses.saturating_mul(saves.cost_ms));
        self.ready_at.saturating_add(work).saturating_add(paused)
    }

    /// Returns when the work that was done until `now` is saved next; `None` if never.
    pub(super) fn saved_at(&self, now: u64) -> Option<u64> {
        let saves = self.job.saves?;
        let round = saves.every_ms.saturating_add(saves.cost_ms).max(1);
        let rounds = now.saturating_sub(self.ready_at) / round + 1;
        let at = self.ready_at.saturating_add(rounds.saturating_mul(round));
        (at < self.finish_at()).then_some(at)
    }

    /// Puts the time of an attempt that ends at `now` into the ledger, and takes what was kept
    /// off the work that is left.
    pub(super) fn settle(&mut self, now: u64, ledger: &mut Ledger) {
        let mut book = |cause, ms| ledger.add(cause, self.milli, ms);
        let halted = self.halted_at.unwrap_or(now).min(now);
        let first = self.attempt == Attempt(1);
        let starting = halted.min(self.ready_at).saturating_sub(self.placed_at);
        book(if first { Cause::Startup } else { Cause::Restart }, starting);
        let after = now - halted;
        book(if self.ends == End::Failed { Cause::Stalled } else { Cause::Leaving }, after);
        let wall = self.job.split_wall(halted.saturating_sub(self.ready_at.max(self.placed_at)));
        book(Cause::Checkpoint, wall.paused);
        let kept = match self.ends {
            End::Finished | End::Open | End::Evicted { saved: true } => wall.work,
            End::Failed | End::Evicted { saved: false } => wall.safe,
        };
        book(Cause::Useful, kept);
        let lost = wall.work - kept;
        let failed = self.ends == End::Failed;
        book(if failed { Cause::LostToFailure } else { Cause::LostToEviction }, lost);
        self.kept_ms += kept;
        let done = kept.saturating_mul(u64::from(self.ranks));
        self.left = self.left.saturating_sub(done);
        if self.ends != End::Finished {
            // A gang that had saved all but nothing still has to end.
            self.left = self.left.max(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Saves;
    use drumline_spec::{Gang, GangSettings, Parallelism};

    fn started(saves: Option<Saves>) -> Live {
        let job = Job {
            id: "a".parse().unwrap(),
            arrives: 0,
            gang: Gang { ranks: 2, ..Gang::default() },
            split: Parallelism { tensor: 1, pipeline: 1, data: 2 },
            settings: GangSettings::default(),
            work_ms: 1000,
            start_ms: 50,
            restart_ms: 50,
            saves,
        };
        let mut live = Live::new(job, 0, None);
        (live.ranks, live.milli, live.placed_at, live.ready_at) = (2, 2000, 100, 150);
        live
    }

    fn books(ledger: &Ledger) -> Vec<(Cause, u128)> {
        let all = Cause::ALL.into_iter().map(|cause| (cause, ledger.spent(cause) / 2000));
        all.filter(|(_, ms)| *ms > 0).collect()
    }

    #[test]
    fn a_failure_costs_the_work_since_the_last_checkpoint() {
        let mut live = started(Some(Saves { every_ms: 100, cost_ms: 10 }));
        let mut ledger = Ledger::default();
        (live.ends, live.halted_at) = (End::Failed, Some(150 + 110 + 40));
        live.settle(320, &mut ledger);
        assert_eq!(
            books(&ledger),
            [
                (Cause::Useful, 100),
                (Cause::Startup, 50),
                (Cause::Checkpoint, 10),
                (Cause::LostToFailure, 40),
                (Cause::Stalled, 20),
            ]
        );
        assert_eq!((live.left, live.kept_ms), (2 * 900, 100));
    }

    #[test]
    fn a_gang_that_saves_before_it_leaves_loses_nothing() {
        let mut live = started(Some(Saves { every_ms: 100, cost_ms: 10 }));
        let mut ledger = Ledger::default();
        (live.ends, live.halted_at) = (End::Evicted { saved: true }, Some(150 + 40));
        live.attempt = Attempt(2);
        live.settle(200, &mut ledger);
        let expected = [(Cause::Useful, 40), (Cause::Restart, 50), (Cause::Leaving, 10)];
        assert_eq!(books(&ledger), expected);
        assert_eq!(live.left, 2 * 960);
    }

    #[test]
    fn the_end_counts_the_pauses_on_the_way() {
        let live = started(Some(Saves { every_ms: 400, cost_ms: 10 }));
        assert_eq!(live.finish_at(), 150 + 1000 + 2 * 10);
        assert_eq!(live.saved_at(150), Some(150 + 410));
        assert_eq!(live.saved_at(560), Some(150 + 820));
        assert_eq!(live.saved_at(970), None);
        assert_eq!(started(None).saved_at(150), None);
    }
}
