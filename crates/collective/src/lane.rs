//! One rank's way to one other rank of its group: a stream for collectives and a mailbox for
//! messages, through shared memory or over TCP behind the same few calls.
//!
//! What comes in always lies in this rank's own inbox: a peer on the same host writes there
//! itself, for a peer elsewhere the reader thread does. What goes out goes into the peer's inbox
//! or into frames, of which no more are under way than the peer's inbox has space for; so the
//! reader thread never waits, and nothing that it reads can hold up another group.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::bell::Bell;
use crate::frame::{Header, Kind, message_cost};
use crate::group::{Group, Inbound};
use crate::peer::{Peer, SendError, stripe};
use crate::region::Mapping;
use crate::{CollectiveError, mailbox, ring};

/// Of a stream through shared memory: large enough to keep both sides busy, small enough for the cache.
pub(crate) const RING_BYTES: usize = 1 << 20;

/// Of a stream over TCP, and so the window of bytes under way: what a fast link holds over a long
/// way. It is address space where memory is shared.
pub(crate) const TCP_RING_BYTES: usize = 2 << 20;

/// Of a mailbox: address space; only what is under way at once takes memory.
pub(crate) const MAIL_BYTES: usize = 256 << 20;

/// Of messages under way over TCP: half the mailbox, since fragments leave gaps.
pub(crate) const MESSAGE_WINDOW: u64 = (MAIL_BYTES / 2) as u64;

/// Of one frame of a stream: the receiver works on one while the next is under way.
const STREAM_FRAME_BYTES: usize = 256 << 10;

/// Of one write into a shared ring, for the same reason.
const STREAM_WRITE_BYTES: usize = 64 << 10;

/// The head of an inbox: nonce and doorbell. A page, so that it can be mapped by itself.
pub(crate) const INBOX_HEAD_BYTES: usize = 64 << 10;
const BELL_OFFSET: usize = 64;

/// One lane of an inbox: control words, the table of fragments, the ring, the mailbox. Pages of
/// up to 64 KiB divide all of these, so that a lane can be mapped by itself.
pub(crate) const LANE_BYTES: usize = LANE_HEAD_BYTES + TCP_RING_BYTES + MAIL_BYTES;
const LANE_HEAD_BYTES: usize = 64 << 10;
const MAIL_CONTROL: usize = 1024;
const MAIL_TABLE: usize = 4096;

const _: () = assert!(ring::CONTROL_BYTES <= MAIL_CONTROL);
const _: () = assert!(MAIL_CONTROL + mailbox::CONTROL_BYTES <= MAIL_TABLE);
const _: () = assert!(MAIL_TABLE + mailbox::TABLE_BYTES <= LANE_HEAD_BYTES);
const _: () = assert!(mailbox::FRAGMENT_BYTES <= crate::frame::PAYLOAD_MAX);
const _: () = assert!(STREAM_FRAME_BYTES <= crate::frame::PAYLOAD_MAX);

/// Returns the length of the inbox of a rank in a group of `size`.
pub(crate) fn inbox_bytes(size: usize) -> usize {
    INBOX_HEAD_BYTES + size * LANE_BYTES
}

/// Returns where in an inbox the lane of the peer with rank `from` in the group begins.
pub(crate) fn lane_offset(from: usize) -> usize {
    INBOX_HEAD_BYTES + from * LANE_BYTES
}

/// Returns the doorbell in the head of an inbox.
pub(crate) fn bell(head: &Arc<Mapping>) -> Bell {
    Bell::new(Arc::clone(head), BELL_OFFSET)
}

/// Returns where ring and mailbox of the lane at `offset` of `mapping` lie. A shared ring is kept
/// small, for the cache.
pub(crate) fn places(
    mapping: &Arc<Mapping>,
    offset: usize,
    shared: bool,
) -> (ring::Place, mailbox::Place) {
    let ring = ring::Place {
        mapping: Arc::clone(mapping),
        control: offset,
        data: offset + LANE_HEAD_BYTES,
        capacity: if shared { RING_BYTES } else { TCP_RING_BYTES },
    };
    let mail = mailbox::Place {
        mapping: Arc::clone(mapping),
        control: offset + MAIL_CONTROL,
        table: offset + MAIL_TABLE,
        data: offset + LANE_HEAD_BYTES + TCP_RING_BYTES,
        capacity: MAIL_BYTES,
    };
    (ring, mail)
}

/// The way out.
#[derive(Debug)]
enum Outbound {
    Shared {
        ring: ring::Producer,
        mail: mailbox::Sender,
        bell: Bell,
    },
    Tcp {
        stream_sent: u64,
        stream_credited: u64,
        stream_consumed: u64,
        message_sent: u64,
        message_credited: u64,
        message_taken: u64,
    },
}

/// Both ways between this rank and one peer of the group.
#[derive(Debug)]
pub(crate) struct Lane {
    /// The peer's rank in the group.
    index: usize,
    group: Arc<Group>,
    peer: Arc<Peer>,
    deadline: Duration,
    stream: ring::Consumer,
    mail: mailbox::Receiver,
    out: Outbound,
}

impl Lane {
    /// Joins the lane of `index` in the own inbox with the way out: the peer's `(head, lane)`
    /// mappings, or frames without them.
    pub(crate) fn new(
        group: Arc<Group>,
        index: usize,
        peer: Arc<Peer>,
        mapped: Option<(Arc<Mapping>, Arc<Mapping>)>,
        deadline: Duration,
    ) -> Self {
        let (ring, mail) = places(group.inbox(), lane_offset(index), mapped.is_some());
        let out = match mapped {
            Some((head, lane)) => {
                let (ring, mail) = places(&lane, 0, true);
                Outbound::Shared {
                    ring: ring::Producer::new(ring),
                    mail: mailbox::Sender::new(mail),
                    bell: bell(&head),
                }
            }
            None => Outbound::Tcp {
                stream_sent: 0,
                stream_credited: 0,
                stream_consumed: 0,
                message_sent: 0,
                message_credited: 0,
                message_taken: 0,
            },
        };
        Self {
            index,
            stream: ring::Consumer::new(ring),
            mail: mailbox::Receiver::new(mail),
            group,
            peer,
            deadline,
            out,
        }
    }

    fn inbound(&self) -> &Inbound {
        self.group.inbound(self.index)
    }

    /// Whether data goes through shared memory.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.out, Outbound::Shared { .. })
    }

    /// Whether the peer has left the group or is gone altogether.
    pub(crate) fn is_gone(&self) -> bool {
        self.inbound().gone.load(Ordering::Acquire) || self.peer.is_gone()
    }

    /// Sends a frame by the group's own connection, or a part of its stream that begins at `at` by
    /// that whose turn it is.
    fn frame(&self, kind: Kind, at: u64, aux: u64, parts: [&[u8]; 2]) -> Result<(), SendError> {
        let number = stripe(self.group.id(), at, self.peer.streams());
        let header = Header {
            kind,
            group: self.group.id(),
            len: (parts[0].len() + parts[1].len()) as u32,
            aux,
        };
        self.peer.send(number, header, parts, self.deadline)
    }

    /// Writes what the peer has space for of `parts`, one after the other, to its stream; returns
    /// how many bytes, possibly none.
    pub(crate) fn write(&mut self, parts: [&[u8]; 2]) -> Result<usize, SendError> {
        let cut = |limit: usize| {
            let first = parts[0].len().min(limit);
            let second = parts[1].len().min(limit - first);
            [&parts[0][..first], &parts[1][..second]]
        };
        match &mut self.out {
            Outbound::Shared { ring, bell, .. } => {
                let n = ring.write(cut(STREAM_WRITE_BYTES));
                if n > 0 {
                    bell.ring();
                }
                Ok(n)
            }
            Outbound::Tcp { stream_sent, .. } => {
                let sent = *stream_sent;
                let consumed = self.group.inbound(self.index).stream_credit.load(Ordering::Acquire);
                let window = (TCP_RING_BYTES as u64).saturating_sub(sent.wrapping_sub(consumed));
                let parts = cut(STREAM_FRAME_BYTES.min(window as usize));
                let n = parts[0].len() + parts[1].len();
                if n > 0 {
                    *stream_sent += n as u64;
                    self.inbound().stream_sent.store(sent + n as u64, Ordering::Release);
                    self.frame(Kind::Stream, sent, 0, parts)?;
                }
                Ok(n)
            }
        }
    }

    /// Returns the bytes of the peer's stream that lie in one piece; possibly none.
    pub(crate) fn readable(&self) -> &[u8] {
        self.stream.readable()
    }

    /// Copies the next bytes of the peer's stream; returns whether there were enough.
    pub(crate) fn peek(&self, target: &mut [u8]) -> bool {
        self.stream.peek(target)
    }

    /// Returns the error of `op` for a frame that could not be sent.
    pub(crate) fn failed(&self, op: &'static str, error: SendError) -> CollectiveError {
        let peer = self.index;
        match error {
            SendError::Gone => CollectiveError::PeerGone { peer, op },
            SendError::TimedOut => CollectiveError::TimedOut {
                op,
                peer,
                waited_ms: u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX),
            },
        }
    }

    /// Sends a credit; a peer that is gone needs none.
    fn credit(&self, kind: Kind, aux: u64) -> Result<(), SendError> {
        match self.frame(kind, 0, aux, [&[], &[]]) {
            Err(SendError::Gone) => Ok(()),
            sent => sent,
        }
    }

    /// Gives back the first `len` bytes of [`Lane::readable`].
    pub(crate) fn consume(&mut self, len: usize) -> Result<(), SendError> {
        let wanted = self.stream.consume(len);
        match &mut self.out {
            Outbound::Shared { bell, .. } => {
                if wanted {
                    bell.ring();
                }
            }
            Outbound::Tcp { stream_credited, stream_consumed, .. } => {
                *stream_consumed += len as u64;
                let consumed = *stream_consumed;
                if consumed - *stream_credited >= TCP_RING_BYTES as u64 / 8 {
                    *stream_credited = consumed;
                    return self.credit(Kind::StreamCredit, consumed);
                }
            }
        }
        Ok(())
    }

    /// Posts the fragment at `offset` of `message`, as long as the peer's mailbox has space;
    /// returns how long it was, or none if there was no space.
    pub(crate) fn post(
        &mut self,
        message: &[u8],
        offset: usize,
    ) -> Result<Option<usize>, SendError> {
        let len = (message.len() - offset).min(mailbox::FRAGMENT_BYTES);
        let fragment = &message[offset..offset + len];
        match &mut self.out {
            Outbound::Shared { mail, bell, .. } => {
                let Some(space) = mail.space(len) else {
                    return Ok(None);
                };
                space.copy_from_slice(fragment);
                mail.post(len, message.len() as u64, offset as u64);
                bell.ring();
            }
            Outbound::Tcp { message_sent, .. } => {
                let taken = self.group.inbound(self.index).message_credit.load(Ordering::Acquire);
                let cost = message_cost(len);
                if message_sent.wrapping_sub(taken).saturating_add(cost) > MESSAGE_WINDOW {
                    return Ok(None);
                }
                *message_sent += cost;
                // The length of the whole; fragments come in order, so their places follow.
                self.frame(Kind::Message, 0, message.len() as u64, [fragment, &[]])?;
            }
        }
        Ok(Some(len))
    }

    /// Returns the next fragment from the peer.
    pub(crate) fn next_fragment(&self) -> Result<Option<mailbox::Fragment<'_>>, &'static str> {
        self.mail.next()
    }

    /// Gives back the fragment of `len` bytes that [`Lane::next_fragment`] returned.
    pub(crate) fn take_fragment(&mut self, len: usize) -> Result<(), SendError> {
        let wanted = self.mail.take();
        match &mut self.out {
            Outbound::Shared { bell, .. } => {
                if wanted {
                    bell.ring();
                }
            }
            Outbound::Tcp { message_credited, message_taken, .. } => {
                *message_taken += message_cost(len);
                let taken = *message_taken;
                if taken - *message_credited >= MESSAGE_WINDOW / 4 {
                    *message_credited = taken;
                    return self.credit(Kind::MessageCredit, taken);
                }
            }
        }
        Ok(())
    }
}
