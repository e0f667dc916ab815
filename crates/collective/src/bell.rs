//! A doorbell in shared memory: a rank sleeps on it, whoever brings it something rings.
//!
//! Two words: a count that the sleeper watches, and whether it sleeps at all, so that ringing
//! costs no system call while it is awake. The order that makes a lost ring impossible: the
//! sleeper says that it sleeps, then looks once more; the ringer publishes, then looks whether
//! anyone sleeps. With a full fence between the two steps on both sides, one of them sees the
//! other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Duration;

use crate::region::Mapping;

/// The doorbell of one rank in one group.
#[derive(Debug, Clone)]
pub(crate) struct Bell {
    mapping: Arc<Mapping>,
    offset: usize,
}

impl Bell {
    /// The doorbell at `offset` of `mapping`, of 8 bytes, zero at first.
    pub(crate) fn new(mapping: Arc<Mapping>, offset: usize) -> Self {
        Self { mapping, offset }
    }

    fn count(&self) -> &AtomicU32 {
        self.mapping.word32(self.offset)
    }

    fn sleeping(&self) -> &AtomicU32 {
        self.mapping.word32(self.offset + 4)
    }

    /// Says that this rank is about to sleep. It must look once more for something to do, then
    /// call [`Bell::sleep`] with what this returns, or [`Bell::stay_awake`].
    pub(crate) fn about_to_sleep(&self) -> u32 {
        let count = self.count().load(Ordering::Acquire);
        self.sleeping().store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        count
    }

    /// Takes back [`Bell::about_to_sleep`].
    pub(crate) fn stay_awake(&self) {
        self.sleeping().store(0, Ordering::Relaxed);
    }

    /// Sleeps until someone has rung since [`Bell::about_to_sleep`], at most `limit`.
    pub(crate) fn sleep(&self, count: u32, limit: Duration) {
        wait(self.count(), count, limit);
        self.stay_awake();
    }

    /// Wakes the rank if it sleeps. What it is to find must have been published before.
    pub(crate) fn ring(&self) {
        fence(Ordering::SeqCst);
        let sleeping = self.sleeping();
        if sleeping.load(Ordering::Relaxed) != 0 && sleeping.swap(0, Ordering::SeqCst) != 0 {
            self.count().fetch_add(1, Ordering::Release);
            wake(self.count());
        }
    }
}

#[cfg(target_os = "linux")]
fn wait(word: &AtomicU32, expected: u32, limit: Duration) {
    use rustix::thread::futex;
    let limit = futex::Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    // Rung meanwhile, timed out, or interrupted by a signal: the caller looks for itself.
    let _ = futex::wait(word, futex::Flags::empty(), expected, Some(&limit));
}

#[cfg(target_os = "linux")]
fn wake(word: &AtomicU32) {
    use rustix::thread::futex;
    // The only error is a bad address, and the word is mapped.
    let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
}

/// Without a futex: looks every so often, since only threads of this process ring.
#[cfg(not(target_os = "linux"))]
fn wait(word: &AtomicU32, expected: u32, limit: Duration) {
    let start = std::time::Instant::now();
    while word.load(Ordering::Acquire) == expected && start.elapsed() < limit {
        std::thread::sleep(Duration::from_micros(100).min(limit));
    }
}

#[cfg(not(target_os = "linux"))]
fn wake(_word: &AtomicU32) {}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_ring_between_the_last_look_and_the_sleep_is_not_lost() {
        let bell = Bell::new(Arc::new(Mapping::private(4096).unwrap()), 0);
        let count = bell.about_to_sleep();
        bell.ring();
        let start = Instant::now();
        bell.sleep(count, Duration::from_secs(20));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_sleep_ends_at_its_limit() {
        let bell = Bell::new(Arc::new(Mapping::private(4096).unwrap()), 0);
        let count = bell.about_to_sleep();
        let start = Instant::now();
        bell.sleep(count, Duration::from_millis(20));
        assert!(start.elapsed() >= Duration::from_millis(15));
    }
}
