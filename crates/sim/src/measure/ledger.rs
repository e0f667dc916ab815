//! Where every device-hour went. What is put in adds up to what there was, to the last
//! millisecond.

use serde::Serialize;

/// What device time was spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Cause {
    /// Work that was kept.
    Useful,
    /// Ranks that start for the first time.
    Startup,
    /// Ranks that start again.
    Restart,
    /// Ranks that stand still for a checkpoint.
    Checkpoint,
    /// Work since the last checkpoint, lost to a failure.
    LostToFailure,
    /// Work since the last checkpoint, lost to the scheduler.
    LostToEviction,
    /// Held by a gang that has failed and is not yet taken down.
    Stalled,
    /// Held by a gang that saves its work and leaves.
    Leaving,
    /// Broken, and held by nobody.
    Broken,
    /// Idle although jobs that want as much wait: scattered, reserved, or beyond their quota.
    IdleFragmented,
    /// Idle, and nobody wants it.
    IdleUnwanted,
}

impl Cause {
    /// Every cause, in the order of reports.
    pub const ALL: [Self; 11] = [
        Self::Useful,
        Self::Startup,
        Self::Restart,
        Self::Checkpoint,
        Self::LostToFailure,
        Self::LostToEviction,
        Self::Stalled,
        Self::Leaving,
        Self::Broken,
        Self::IdleFragmented,
        Self::IdleUnwanted,
    ];

    /// Returns the words of a report.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Useful => "useful work",
            Self::Startup => "first start",
            Self::Restart => "restart",
            Self::Checkpoint => "checkpoint pauses",
            Self::LostToFailure => "work lost to failures",
            Self::LostToEviction => "work lost to evictions",
            Self::Stalled => "failed, not yet noticed",
            Self::Leaving => "leaving",
            Self::Broken => "broken",
            Self::IdleFragmented => "idle while jobs waited",
            Self::IdleUnwanted => "idle, not wanted",
        }
    }
}

/// Thousandths of a device times milliseconds, by cause.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    spent: [u128; Cause::ALL.len()],
}

impl Ledger {
    /// Adds `ms` milliseconds of `milli` thousandths of a device.
    pub fn add(&mut self, cause: Cause, milli: u64, ms: u64) {
        if let Some(spent) = self.spent.get_mut(cause as usize) {
            *spent += u128::from(milli) * u128::from(ms);
        }
    }

    /// Returns what was spent on a cause, in thousandths of a device times milliseconds.
    #[must_use]
    pub fn spent(&self, cause: Cause) -> u128 {
        self.spent.get(cause as usize).copied().unwrap_or(0)
    }

    /// Returns the sum over all causes.
    #[must_use]
    pub fn total(&self) -> u128 {
        self.spent.iter().sum()
    }

    /// Returns what was spent on a cause, in device-hours.
    #[must_use]
    pub fn hours(&self, cause: Cause) -> f64 {
        hours(self.spent(cause))
    }
}

/// Converts thousandths of a device times milliseconds to device-hours.
#[must_use]
pub fn hours(spent: u128) -> f64 {
    spent as f64 / (1000.0 * 3_600_000.0)
}
