//! A ring of bytes from one producer to one consumer, in memory that two processes may share.
//!
//! Positions count bytes since the start and never wrap; the consumer reads in place.
#![expect(unsafe_code, reason = "slices of memory that another thread or process writes")]

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::region::Mapping;

/// Bytes of control words, each on a cache line of its own.
pub(crate) const CONTROL_BYTES: usize = 192;
const HEAD: usize = 0;
const TAIL: usize = 64;
const WANTS_SPACE: usize = 128;

/// Where a ring lies in its mapping.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) mapping: Arc<Mapping>,
    /// Of the control words, in bytes.
    pub(crate) control: usize,
    /// Of the data, in bytes.
    pub(crate) data: usize,
    /// Of the data; a power of two.
    pub(crate) capacity: usize,
}

impl Place {
    fn slice(&self, position: u64, len: usize) -> *mut u8 {
        let at = position as usize & (self.capacity - 1);
        debug_assert!(at + len <= self.capacity);
        self.mapping.bytes(self.data + at, len)
    }

    /// Bytes from `position` to the end of the ring's memory.
    fn until_wrap(&self, position: u64) -> usize {
        self.capacity - (position as usize & (self.capacity - 1))
    }
}

/// The writing end. There is one per ring.
#[derive(Debug)]
pub(crate) struct Producer {
    place: Place,
    head: u64,
}

/// The reading end. There is one per ring.
#[derive(Debug)]
pub(crate) struct Consumer {
    place: Place,
    tail: u64,
}

impl Producer {
    /// Takes the writing end of a fresh ring.
    pub(crate) fn new(place: Place) -> Self {
        assert!(place.capacity.is_power_of_two());
        Self { place, head: 0 }
    }

    fn free(&self) -> usize {
        let tail = self.place.mapping.word64(self.place.control + TAIL);
        let used = self.head.wrapping_sub(tail.load(Ordering::Acquire));
        // A peer that writes nonsense gets a stuck ring, not our memory.
        self.place.capacity.saturating_sub(usize::try_from(used).unwrap_or(usize::MAX))
    }

    /// Returns the free space that lies in one piece; possibly none.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        let len = self.free().min(self.place.until_wrap(self.head));
        // SAFETY: in bounds; these bytes are behind the consumer's tail, so until `commit` they
        // are the producer's alone, and `&mut self` is the only producer.
        unsafe { std::slice::from_raw_parts_mut(self.place.slice(self.head, len), len) }
    }

    /// Publishes the first `len` bytes of [`Producer::space`].
    pub(crate) fn commit(&mut self, len: usize) {
        self.head += len as u64;
        let head = self.place.mapping.word64(self.place.control + HEAD);
        head.store(self.head, Ordering::Release);
    }

    /// Writes what fits of `bytes` without publishing it; returns how much beyond `offset` bytes
    /// that were staged before.
    fn stage(&mut self, offset: usize, bytes: &[u8], free: usize) -> usize {
        let len = bytes.len().min(free - offset);
        let at = self.head + offset as u64;
        let first = len.min(self.place.until_wrap(at));
        // SAFETY: in bounds and free, as in `space`; `bytes` is ordinary memory of this process,
        // never of the ring.
        unsafe {
            let source = bytes.as_ptr();
            std::ptr::copy_nonoverlapping(source, self.place.slice(at, first), first);
            std::ptr::copy_nonoverlapping(
                source.add(first),
                self.place.slice(at + first as u64, len - first),
                len - first,
            );
        }
        len
    }

    /// Writes what fits of `parts`, one after the other; returns how many bytes. After 0 the
    /// consumer will ring when there is space.
    pub(crate) fn write(&mut self, parts: [&[u8]; 2]) -> usize {
        let mut free = self.free();
        if free == 0 {
            let wants = self.place.mapping.word32(self.place.control + WANTS_SPACE);
            wants.store(1, Ordering::Relaxed);
            // Either the consumer sees the wish, or we see the space that it made.
            fence(Ordering::SeqCst);
            free = self.free();
        }
        let first = self.stage(0, parts[0], free);
        let second = if first == parts[0].len() { self.stage(first, parts[1], free) } else { 0 };
        if first + second > 0 {
            self.commit(first + second);
        }
        first + second
    }
}

impl Consumer {
    /// Takes the reading end of a fresh ring.
    pub(crate) fn new(place: Place) -> Self {
        assert!(place.capacity.is_power_of_two());
        Self { place, tail: 0 }
    }

    /// Returns the bytes to read that lie in one piece; possibly none.
    pub(crate) fn readable(&self) -> &[u8] {
        let head = self.place.mapping.word64(self.place.control + HEAD);
        let used = head.load(Ordering::Acquire).wrapping_sub(self.tail);
        let len = usize::try_from(used)
            .unwrap_or(usize::MAX)
            .min(self.place.capacity)
            .min(self.place.until_wrap(self.tail));
        // SAFETY: in bounds; the producer published these bytes and leaves them alone until
        // `consume`, which needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.place.slice(self.tail, len), len) }
    }

    /// Copies the next bytes without giving them back; returns whether there were enough.
    pub(crate) fn peek(&self, target: &mut [u8]) -> bool {
        let first = self.readable();
        if let Some(first) = first.get(..target.len()) {
            target.copy_from_slice(first);
            return true;
        }
        let len = first.len();
        if len < self.place.until_wrap(self.tail) {
            return false;
        }
        let rest = Self { place: self.place.clone(), tail: self.tail + len as u64 };
        let Some(second) = rest.readable().get(..target.len() - len) else {
            return false;
        };
        target[..len].copy_from_slice(first);
        target[len..].copy_from_slice(second);
        true
    }

    /// Gives back the first `len` bytes of [`Consumer::readable`]; returns whether the producer
    /// waits for that and must be rung.
    pub(crate) fn consume(&mut self, len: usize) -> bool {
        self.tail += len as u64;
        let tail = self.place.mapping.word64(self.place.control + TAIL);
        tail.store(self.tail, Ordering::Release);
        fence(Ordering::SeqCst);
        let wants = self.place.mapping.word32(self.place.control + WANTS_SPACE);
        wants.load(Ordering::Relaxed) != 0 && wants.swap(0, Ordering::SeqCst) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(capacity: usize) -> (Producer, Consumer) {
        let place = Place {
            mapping: Arc::new(Mapping::private(CONTROL_BYTES + capacity).unwrap()),
            control: 0,
            data: CONTROL_BYTES,
            capacity,
        };
        (Producer::new(place.clone()), Consumer::new(place))
    }

    #[test]
    fn bytes_come_out_in_order_across_the_wrap_and_between_threads() {
        let (mut producer, mut consumer) = ring(64);
        let total = 100_000usize;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let bytes: Vec<u8> = (0..total).map(|i| (i % 251) as u8).collect();
                let mut at = 0;
                while at < total {
                    let cut = (at + 1 + at % 7).min(total);
                    let end = (cut + at % 90).min(total);
                    let wrote = producer.write([&bytes[at..cut], &bytes[cut..end]]);
                    at += wrote;
                    if wrote == 0 {
                        std::thread::yield_now();
                    }
                }
            });
            let mut at = 0;
            while at < total {
                let got = consumer.readable();
                for byte in got {
                    assert_eq!(*byte, (at % 251) as u8, "at {at}");
                    at += 1;
                }
                let len = got.len();
                consumer.consume(len);
                if len == 0 {
                    std::thread::yield_now();
                }
            }
        });
    }

    #[test]
    fn a_header_across_the_wrap_is_read_whole_or_not_at_all() {
        let (mut producer, mut consumer) = ring(64);
        producer.write([&[0; 60], &[]]);
        consumer.consume(60);
        producer.write([&[1, 2, 3, 4], &[5, 6]]);
        assert!(!consumer.peek(&mut [0; 8]));
        producer.write([&[7, 8], &[]]);
        let mut header = [0; 8];
        assert!(consumer.peek(&mut header));
        assert_eq!(header, [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn a_producer_without_space_is_rung_once_there_is_some() {
        let (mut producer, mut consumer) = ring(64);
        assert_eq!(producer.write([&[1; 40], &[2; 40]]), 64);
        assert!(!consumer.consume(8), "nobody waits yet");
        assert_eq!(producer.write([&[3; 9], &[]]), 8);
        assert_eq!(producer.write([&[3; 9], &[]]), 0);
        assert!(consumer.consume(8));
        assert!(!consumer.consume(8), "the wish was taken");
    }

    #[test]
    fn nonsense_positions_do_not_leave_the_memory() {
        let (mut producer, consumer) = ring(64);
        let place = consumer.place.clone();
        place.mapping.word64(HEAD).store(u64::MAX, Ordering::Relaxed);
        assert!(consumer.readable().len() <= 64);
        place.mapping.word64(TAIL).store(1 << 60, Ordering::Relaxed);
        assert_eq!(producer.space().len(), 0);
    }
}
