//! How a watch that was cut off waits before it starts again.

use std::time::Duration;

use kube::runtime::utils::Backoff;

/// The first wait.
pub(crate) const RETRY_MIN: Duration = Duration::from_millis(400);
/// The longest: how late an API server that was away for long is noticed. Some watches that ask this
/// often are no burden.
pub(crate) const RETRY_MAX: Duration = Duration::from_secs(5);

/// Waits that double; this is the next one.
pub(crate) struct Waits(pub(crate) Duration);

impl Iterator for Waits {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let wait = self.0;
        self.0 = (wait * 2).min(RETRY_MAX);
        Some(wait)
    }
}

impl Backoff for Waits {
    fn reset(&mut self) {
        self.0 = RETRY_MIN;
    }
}
