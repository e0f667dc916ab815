//! The one queue of events. Of those at the same moment the first that was put in comes first, and
//! the scheduler's look comes last.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What happens. A job's event names the start that it belongs to: it is void once that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// The next job arrives.
    Arrival,
    /// The ranks of a start work.
    Ready { slot: u32, start: u64 },
    /// A start has saved its work.
    Saved { slot: u32, start: u64 },
    /// A start has done all its work.
    Finished { slot: u32, start: u64 },
    /// A start crashes for reasons of its own.
    Crashed { slot: u32, start: u64 },
    /// A start that was ended gives its devices back.
    Left { slot: u32, start: u64 },
    /// The next failure of a machine.
    NodeFails,
    /// The next failure of a device.
    DeviceFails,
    /// A machine is back.
    NodeBack { node: u32 },
    /// A device is back.
    DeviceBack { node: u32, device: u32 },
    /// The scheduler looks.
    Look,
}

/// Events by time.
#[derive(Debug, Default)]
pub(super) struct Clock {
    heap: BinaryHeap<Reverse<(u64, bool, u64, Event)>>,
    put: u64,
}

impl Clock {
    pub(super) fn put(&mut self, at: u64, event: Event) {
        self.put += 1;
        self.heap.push(Reverse((at, event == Event::Look, self.put, event)));
    }

    pub(super) fn pop(&mut self) -> Option<(u64, Event)> {
        self.heap.pop().map(|Reverse((at, _, _, event))| (at, event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheduler_looks_when_all_else_of_the_moment_has_happened() {
        let mut clock = Clock::default();
        clock.put(5, Event::Look);
        clock.put(5, Event::NodeFails);
        clock.put(5, Event::Arrival);
        clock.put(4, Event::DeviceFails);
        let order: Vec<Event> = std::iter::from_fn(|| clock.pop()).map(|(_, e)| e).collect();
        assert_eq!(order, [Event::DeviceFails, Event::NodeFails, Event::Arrival, Event::Look]);
    }
}
