//! Frames on the TCP link between two ranks: a fixed header, then a payload.

use crate::region::Offer;

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 24;

/// The longest payload; a longer one ends the connection.
pub(crate) const PAYLOAD_MAX: usize = 512 << 10;

/// What a frame carries. `aux` is the header's last word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Payload: [`Hello`]. The sender has made its side of the group.
    Hello,
    /// `aux`: 1 when the sender has mapped the receiver's shared memory.
    Mapped,
    /// Payload: bytes of the group's stream.
    Stream,
    /// `aux`: stream bytes that the sender has consumed so far.
    StreamCredit,
    /// Payload: the next fragment of a message of `aux` bytes.
    Message,
    /// `aux`: message fragments' [`message_cost`] that the sender has taken so far.
    MessageCredit,
    /// `aux`: [`crate::group::Cause`]. The group is aborted.
    Abort,
    /// The sender has left the group.
    Left,
}

const KINDS: [Kind; 8] = [
    Kind::Hello,
    Kind::Mapped,
    Kind::Stream,
    Kind::StreamCredit,
    Kind::Message,
    Kind::MessageCredit,
    Kind::Abort,
    Kind::Left,
];

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) group: u32,
    /// Length of the payload in bytes.
    pub(crate) len: u32,
    pub(crate) aux: u64,
}

impl Header {
    /// Marks the start of a frame: a stream out of step is noticed at once.
    const MAGIC: u32 = 0x444c_0001;

    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&Self::MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.group.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.aux.to_le_bytes());
        bytes
    }

    /// Returns none when the bytes are no header.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if word(0) != Self::MAGIC || word(12) as usize > PAYLOAD_MAX {
            return None;
        }
        Some(Self {
            kind: *KINDS.get(word(4) as usize)?,
            group: word(8),
            len: word(12),
            aux: u64::from_le_bytes(std::array::from_fn(|i| bytes[16 + i])),
        })
    }
}

/// What a fragment counts for against the window of messages under way: short ones take a slot of
/// the table, so they count as if they were longer.
pub(crate) fn message_cost(bytes: usize) -> u64 {
    let slot = crate::lane::MESSAGE_WINDOW / crate::mailbox::SLOTS as u64;
    (bytes as u64).max(slot)
}

/// What a rank says of its side of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Digest of the group's ranks in order: all must agree.
    pub(crate) ranks: [u8; 32],
    /// Its shared memory, if it made some.
    pub(crate) offer: Option<Offer>,
}

impl Hello {
    const BYTES: usize = 72;

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(&self.ranks);
        if let Some(offer) = &self.offer {
            bytes[32] = 1;
            bytes[40..44].copy_from_slice(&offer.pid.to_le_bytes());
            bytes[44..48].copy_from_slice(&offer.fd.to_le_bytes());
            bytes[48..56].copy_from_slice(&offer.len.to_le_bytes());
            bytes[56..72].copy_from_slice(&offer.nonce);
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let offer = (bytes[32] == 1).then(|| Offer {
            pid: word(40),
            fd: word(44),
            len: u64::from_le_bytes(std::array::from_fn(|i| bytes[48 + i])),
            nonce: std::array::from_fn(|i| bytes[56 + i]),
        });
        Some(Self { ranks: std::array::from_fn(|i| bytes[i]), offer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_hellos_survive_the_trip() {
        for kind in KINDS {
            let header = Header { kind, group: 7, len: 1234, aux: u64::MAX - 5 };
            assert_eq!(Header::decode(&header.encode()), Some(header));
        }
        let offer = Offer { pid: 1, fd: 2, len: 3, nonce: [4; 16] };
        for offer in [None, Some(offer)] {
            let hello = Hello { ranks: [9; 32], offer };
            assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        }
    }

    #[test]
    fn garbage_and_oversize_are_refused() {
        assert_eq!(Header::decode(&[0; HEADER_BYTES]), None);
        assert_eq!(Header::decode(b"GET / HTTP/1.1\r\nHost: x\r"), None);
        let mut bytes = Header { kind: Kind::Stream, group: 0, len: 0, aux: 0 }.encode();
        bytes[12..16].copy_from_slice(&(PAYLOAD_MAX as u32 + 1).to_le_bytes());
        assert_eq!(Header::decode(&bytes), None);
        bytes[12..16].copy_from_slice(&0u32.to_le_bytes());
        bytes[4] = 200;
        assert_eq!(Header::decode(&bytes), None);
    }
}
