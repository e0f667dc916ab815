//! A job as the simulation knows it: what it asks for, and what nobody else knows beforehand.

use drumline_spec::{Gang, GangSettings, Parallelism};
use drumline_types::JobId;

/// How a job saves its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saves {
    /// Work between two checkpoints, in milliseconds.
    pub every_ms: u64,
    /// Time that the ranks stand still for one, in milliseconds.
    pub cost_ms: u64,
}

/// A job that arrives.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// When it arrives, in milliseconds from the start.
    pub arrives: u64,
    /// What it needs.
    pub gang: Gang,
    /// How its ranks divide the work.
    pub split: Parallelism,
    /// Queue, priority, estimate.
    pub settings: GangSettings,
    /// How long it really works at its wanted size, in milliseconds.
    pub work_ms: u64,
    /// Time from launch until the ranks work, in milliseconds.
    pub start_ms: u64,
    /// The same for every later attempt.
    pub restart_ms: u64,
    /// Its checkpoints; `None`: whoever ends it ends all its work.
    pub saves: Option<Saves>,
}

impl Job {
    /// Returns the device thousandths that it wants.
    #[must_use]
    pub fn wants_milli(&self) -> u64 {
        u64::from(self.gang.ranks) * u64::from(self.gang.share_milli)
    }

    /// Returns how often the ranks stand still for a checkpoint within `work` milliseconds of
    /// work, of which the last does not count: the job is over then.
    #[must_use]
    pub fn pauses_within(&self, work: u64) -> u64 {
        match self.saves {
            Some(saves) if saves.every_ms > 0 => work.saturating_sub(1) / saves.every_ms,
            _ => 0,
        }
    }

    /// Divides `wall` milliseconds of an attempt into work, work that is safe, and pauses.
    #[must_use]
    pub fn split_wall(&self, wall: u64) -> Wall {
        match self.saves {
            Some(saves) if saves.every_ms > 0 => {
                let round = saves.every_ms.saturating_add(saves.cost_ms);
                let (rounds, rest) = (wall / round, wall % round);
                let safe = rounds * saves.every_ms;
                let work = safe + rest.min(saves.every_ms);
                Wall { work, safe, paused: wall - work }
            }
            _ => Wall { work: wall, safe: 0, paused: 0 },
        }
    }
}

/// Where the time of an attempt went, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wall {
    /// Working.
    pub work: u64,
    /// The part of it that the last checkpoint has.
    pub safe: u64,
    /// Standing still for checkpoints.
    pub paused: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_divide_the_time_of_an_attempt() {
        let job = |saves| Job {
            id: "a".parse().unwrap(),
            arrives: 0,
            gang: Gang::default(),
            split: Parallelism::SINGLE,
            settings: GangSettings::default(),
            work_ms: 0,
            start_ms: 0,
            restart_ms: 0,
            saves,
        };
        let saving = job(Some(Saves { every_ms: 100, cost_ms: 10 }));
        assert_eq!(saving.split_wall(99), Wall { work: 99, safe: 0, paused: 0 });
        assert_eq!(saving.split_wall(105), Wall { work: 100, safe: 0, paused: 5 });
        assert_eq!(saving.split_wall(110), Wall { work: 100, safe: 100, paused: 10 });
        assert_eq!(saving.split_wall(225), Wall { work: 205, safe: 200, paused: 20 });
        assert_eq!((saving.pauses_within(100), saving.pauses_within(101)), (0, 1));
        assert_eq!(job(None).split_wall(225), Wall { work: 225, safe: 0, paused: 0 });
    }
}
