//! The real clock: wall time at the start, then never backwards.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use drumline_types::{Clock, Timestamp};

/// Shows the wall time of its creation plus what has passed since, so that a clock that is set
/// while the control plane runs neither trips nor stretches a deadline.
#[derive(Debug)]
pub struct ProcessClock {
    wall_ms: u64,
    start: Instant,
}

impl Default for ProcessClock {
    fn default() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let wall_ms = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
        Self { wall_ms, start: Instant::now() }
    }
}

impl Clock for ProcessClock {
    fn now(&self) -> Timestamp {
        let passed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        Timestamp(self.wall_ms.saturating_add(passed))
    }
}
