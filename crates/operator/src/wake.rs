//! The earliest moment at which something needs another look by itself.

use std::time::{Duration, Instant};

use drumline_types::Timestamp;

/// Nothing is left alone for longer.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Never a hot loop, whatever the clocks say.
const PAUSE: Duration = Duration::from_millis(10);

/// Collects moments and keeps the earliest.
pub(crate) struct Wake {
    now: Timestamp,
    left: Duration,
}

impl Wake {
    pub(crate) fn new(now: Timestamp) -> Self {
        Self { now, left: LOOK_AGAIN }
    }

    pub(crate) fn at(&mut self, moment: Instant) {
        self.left = self.left.min(moment.saturating_duration_since(Instant::now()));
    }

    pub(crate) fn at_ms(&mut self, ms: Option<u64>) {
        if let Some(ms) = ms {
            self.left = self.left.min(Duration::from_millis(ms.saturating_sub(self.now.0)));
        }
    }

    /// Returns how long nothing needs another look.
    pub(crate) fn left(&self) -> Duration {
        self.left.max(PAUSE)
    }
}
