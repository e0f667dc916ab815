//! Messages from one sender to one receiver, in memory that two processes may share.
//!
//! A message lies in fragments, each in one piece, so that it is copied once on either side. The
//! sender starts at the front of the area again whenever the receiver has taken everything: in
//! steady state the same few warm pages are used, however large the area is.
#![expect(unsafe_code, reason = "slices of memory that another thread or process writes")]

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::region::Mapping;

/// Bytes of control words, each on a cache line of its own.
pub(crate) const CONTROL_BYTES: usize = 192;
const POSTED: usize = 0;
const TAKEN: usize = 64;
const WANTS_SPACE: usize = 128;

/// Fragments that may wait at once.
pub(crate) const SLOTS: usize = 1024;
/// Bytes of the table of fragments.
pub(crate) const TABLE_BYTES: usize = SLOTS * SLOT_BYTES;
const SLOT_BYTES: usize = 32;

/// The largest fragment, in bytes: the receiver copies one while the sender writes the next.
pub(crate) const FRAGMENT_BYTES: usize = 512 << 10;

/// Every fragment starts on a cache line and takes at least one, so that none is empty.
const ALIGN: usize = 64;

/// Where a mailbox lies in its mapping.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) mapping: Arc<Mapping>,
    /// Of the control words, in bytes.
    pub(crate) control: usize,
    /// Of the table of fragments, in bytes.
    pub(crate) table: usize,
    /// Of the data, in bytes.
    pub(crate) data: usize,
    /// Of the data, in bytes.
    pub(crate) capacity: usize,
}

impl Place {
    /// The `field`-th word of the fragment numbered `count` since the start.
    fn slot(&self, count: u64, field: usize) -> &std::sync::atomic::AtomicU64 {
        let slot = (count as usize % SLOTS) * SLOT_BYTES;
        self.mapping.word64(self.table + slot + field * 8)
    }
}

/// One fragment as its receiver sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fragment<'a> {
    /// Its bytes.
    pub(crate) bytes: &'a [u8],
    /// Length of the whole message, in bytes.
    pub(crate) message: u64,
    /// Where in the message it belongs, in bytes.
    pub(crate) offset: u64,
}

/// The sending end. There is one per mailbox.
#[derive(Debug)]
pub(crate) struct Sender {
    place: Place,
    posted: u64,
    /// Where the next fragment may go.
    at: usize,
}

/// The receiving end. There is one per mailbox.
#[derive(Debug)]
pub(crate) struct Receiver {
    place: Place,
    taken: u64,
}

impl Sender {
    /// Takes the sending end of a fresh mailbox.
    pub(crate) fn new(place: Place) -> Self {
        Self { place, posted: 0, at: 0 }
    }

    /// Returns where `len` bytes can go now.
    fn allocate(&mut self, len: usize) -> Option<usize> {
        let need = len.max(1).next_multiple_of(ALIGN);
        let taken = self.place.mapping.word64(self.place.control + TAKEN);
        let taken = taken.load(Ordering::Acquire);
        let waiting = self.posted.wrapping_sub(taken);
        if waiting == 0 {
            self.at = 0;
            return (need <= self.place.capacity).then_some(0);
        }
        if waiting >= SLOTS as u64 {
            return None;
        }
        let oldest = self.place.slot(taken, 0).load(Ordering::Relaxed) as usize;
        if self.at >= oldest {
            if need <= self.place.capacity - self.at {
                return Some(self.at);
            }
            // Round to the front; never up to the oldest exactly, which would look empty.
            return (need < oldest).then_some(0);
        }
        (self.at + need < oldest).then_some(self.at)
    }

    /// Returns `len` bytes, at most [`FRAGMENT_BYTES`], to write a fragment into; none when the
    /// mailbox is full, and then the receiver will ring when it has taken something.
    pub(crate) fn space(&mut self, len: usize) -> Option<&mut [u8]> {
        let mut place = self.allocate(len);
        if place.is_none() {
            let wants = self.place.mapping.word32(self.place.control + WANTS_SPACE);
            wants.store(1, Ordering::Relaxed);
            // Either the receiver sees the wish, or we see the space that it made.
            fence(Ordering::SeqCst);
            place = self.allocate(len);
        }
        self.at = place?;
        Some(self.reserved(len))
    }

    /// Returns the `len` bytes of the last [`Sender::space`] again, before they are posted.
    pub(crate) fn reserved(&mut self, len: usize) -> &mut [u8] {
        let bytes = self.place.mapping.bytes(self.place.data + self.at, len);
        // SAFETY: in bounds (checked by `bytes`); `space` reserved them, so they belong to no
        // waiting fragment, and `&mut self` is the only sender. A caller that never called
        // `space` would spoil a message, but not leave the mailbox.
        unsafe { std::slice::from_raw_parts_mut(bytes, len) }
    }

    /// Posts the `len` bytes of the last [`Sender::space`].
    pub(crate) fn post(&mut self, len: usize, message: u64, offset: u64) {
        let fields = [self.at as u64, len as u64, message, offset];
        for (field, value) in fields.into_iter().enumerate() {
            let word = self.place.slot(self.posted, field);
            word.store(value, Ordering::Relaxed);
        }
        self.at += len.max(1).next_multiple_of(ALIGN);
        self.posted += 1;
        let posted = self.place.mapping.word64(self.place.control + POSTED);
        posted.store(self.posted, Ordering::Release);
    }
}

impl Receiver {
    /// Takes the receiving end of a fresh mailbox.
    pub(crate) fn new(place: Place) -> Self {
        Self { place, taken: 0 }
    }

    /// Returns the oldest fragment that waits; an error when its place makes no sense.
    pub(crate) fn next(&self) -> Result<Option<Fragment<'_>>, &'static str> {
        let posted = self.place.mapping.word64(self.place.control + POSTED);
        if posted.load(Ordering::Acquire) == self.taken {
            return Ok(None);
        }
        let [at, len, message, offset] =
            std::array::from_fn(|f| self.place.slot(self.taken, f).load(Ordering::Relaxed));
        let capacity = self.place.capacity as u64;
        if at > capacity || len > capacity - at {
            return Err("a fragment outside its mailbox");
        }
        let bytes = self.place.mapping.bytes(self.place.data + at as usize, len as usize);
        // SAFETY: in bounds (checked above and by `bytes`); the sender posted these bytes and
        // leaves them alone until `take`, which needs `&mut self`.
        let bytes = unsafe { std::slice::from_raw_parts(bytes, len as usize) };
        Ok(Some(Fragment { bytes, message, offset }))
    }

    /// Gives back the oldest fragment; returns whether the sender waits for that and must be
    /// rung.
    pub(crate) fn take(&mut self) -> bool {
        self.taken += 1;
        let taken = self.place.mapping.word64(self.place.control + TAKEN);
        taken.store(self.taken, Ordering::Release);
        fence(Ordering::SeqCst);
        let wants = self.place.mapping.word32(self.place.control + WANTS_SPACE);
        wants.load(Ordering::Relaxed) != 0 && wants.swap(0, Ordering::SeqCst) != 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn mailbox(capacity: usize) -> (Sender, Receiver) {
        let table = CONTROL_BYTES;
        let place = Place {
            mapping: Arc::new(Mapping::private(table + TABLE_BYTES + capacity).unwrap()),
            control: 0,
            table,
            data: table + TABLE_BYTES,
            capacity,
        };
        (Sender::new(place.clone()), Receiver::new(place))
    }

    proptest! {
        /// Whatever the order of posts and takes, every fragment comes out whole and in order.
        #[test]
        fn fragments_are_never_overwritten_before_they_are_taken(
            actions in prop::collection::vec((any::<bool>(), 0usize..700), 1..400),
        ) {
            let (mut sender, mut receiver) = mailbox(2048);
            let mut waiting = VecDeque::new();
            for (i, (post, len)) in actions.into_iter().enumerate() {
                if post {
                    if let Some(space) = sender.space(len) {
                        space.fill(i as u8);
                        sender.post(len, i as u64, 0);
                        waiting.push_back((i, len));
                    } else {
                        prop_assert!(!waiting.is_empty(), "an empty mailbox has space");
                    }
                } else if let Some((i, len)) = waiting.pop_front() {
                    let fragment = receiver.next().unwrap().unwrap();
                    prop_assert_eq!(fragment.message, i as u64);
                    prop_assert!(fragment.bytes == vec![i as u8; len]);
                    receiver.take();
                } else {
                    prop_assert!(receiver.next().unwrap().is_none());
                }
            }
        }
    }

    #[test]
    fn a_full_table_refuses_and_asks_for_a_ring() {
        let (mut sender, mut receiver) = mailbox(SLOTS * 128);
        for _ in 0..SLOTS {
            assert!(sender.space(1).is_some());
            sender.post(1, 1, 0);
        }
        assert!(sender.space(1).is_none());
        assert!(receiver.take());
        assert!(sender.space(1).is_some());
    }

    #[test]
    fn a_fragment_outside_the_mailbox_is_an_error() {
        let (mut sender, receiver) = mailbox(256);
        sender.space(8).unwrap();
        sender.post(8, 8, 0);
        sender.place.slot(0, 1).store(u64::MAX, Ordering::Relaxed);
        assert!(receiver.next().is_err());
    }
}
