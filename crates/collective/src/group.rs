//! What the reader thread and a communicator share about one group.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bell::Bell;
use crate::lane;
use crate::region::Mapping;
use crate::{mailbox, ring};

/// Why a group is aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Someone asked for it, or a rank met an error of another kind.
    Asked,
    /// The rank of the group that is gone.
    PeerGone(usize),
}

impl Cause {
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Asked => 1,
            Self::PeerGone(rank) => 2 + rank as u64,
        }
    }

    /// Returns none for what is no cause in a group of `size`.
    pub(crate) fn decode(word: u64, size: usize) -> Option<Self> {
        match word {
            0 => None,
            1 => Some(Self::Asked),
            _ => usize::try_from(word - 2).ok().filter(|rank| *rank < size).map(Self::PeerGone),
        }
    }
}

/// The writing ends of one lane of the own inbox, for the reader thread.
#[derive(Debug)]
pub(crate) struct Writers {
    pub(crate) ring: ring::Producer,
    pub(crate) mail: mailbox::Sender,
    /// How much of the message under way has been posted.
    pub(crate) message_at: u64,
    /// Stream bytes announced so far, by frames that have begun.
    pub(crate) stream_begun: u64,
    /// Stream bytes that have come: less than begun while a frame is on its way.
    pub(crate) stream_come: u64,
}

/// What comes from one peer.
#[derive(Debug, Default)]
pub(crate) struct Inbound {
    /// None for a peer that writes into the inbox itself.
    pub(crate) writers: Mutex<Option<Writers>>,
    /// Stream bytes of ours that went to the peer by TCP.
    pub(crate) stream_sent: AtomicU64,
    /// Stream bytes of ours that the peer has consumed.
    pub(crate) stream_credit: AtomicU64,
    /// Cost of the messages of ours that the peer has taken.
    pub(crate) message_credit: AtomicU64,
    /// Whether the peer has left the group or is gone altogether.
    pub(crate) gone: AtomicBool,
}

impl Inbound {
    pub(crate) fn writers(&self) -> MutexGuard<'_, Option<Writers>> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One group, seen from this rank.
#[derive(Debug)]
pub(crate) struct Group {
    id: u32,
    /// Ranks in the world, in the order of the group.
    ranks: Vec<usize>,
    rank: usize,
    inbox: Arc<Mapping>,
    bell: Bell,
    inbound: Vec<Inbound>,
    /// [`Cause::encode`], or 0.
    aborted: AtomicU64,
}

impl Group {
    /// Makes this rank's side of a group around its `inbox`.
    pub(crate) fn new(id: u32, ranks: Vec<usize>, rank: usize, inbox: Arc<Mapping>) -> Self {
        let inbound = (0..ranks.len())
            .map(|from| {
                let (ring, mail) = lane::places(&inbox, lane::lane_offset(from), false);
                Inbound {
                    writers: Mutex::new(Some(Writers {
                        ring: ring::Producer::new(ring),
                        mail: mailbox::Sender::new(mail),
                        message_at: 0,
                        stream_begun: 0,
                        stream_come: 0,
                    })),
                    ..Inbound::default()
                }
            })
            .collect();
        Self {
            id,
            ranks,
            rank,
            bell: lane::bell(&inbox),
            inbox,
            inbound,
            aborted: AtomicU64::new(0),
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// This rank's place in the group.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks in the world, in the order of the group.
    pub(crate) fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Returns the place in the group of a rank of the world.
    pub(crate) fn index_of(&self, world_rank: usize) -> Option<usize> {
        self.ranks.iter().position(|rank| *rank == world_rank)
    }

    pub(crate) fn inbox(&self) -> &Arc<Mapping> {
        &self.inbox
    }

    pub(crate) fn bell(&self) -> &Bell {
        &self.bell
    }

    /// What comes from the peer with rank `index` in the group.
    pub(crate) fn inbound(&self, index: usize) -> &Inbound {
        &self.inbound[index]
    }

    /// Returns why the group is aborted, if it is.
    pub(crate) fn aborted(&self) -> Option<Cause> {
        Cause::decode(self.aborted.load(Ordering::Acquire), self.ranks.len())
    }

    /// Aborts the group here; returns whether it was not aborted before.
    pub(crate) fn abort(&self, cause: Cause) -> bool {
        let first = self
            .aborted
            .compare_exchange(0, cause.encode(), Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        self.bell.ring();
        first
    }

    /// Notes that a peer will bring nothing more.
    pub(crate) fn mark_gone(&self, index: usize) {
        self.inbound[index].gone.store(true, Ordering::Release);
        self.bell.ring();
    }
}
