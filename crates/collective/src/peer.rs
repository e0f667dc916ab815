//! The TCP link to one peer: written by any thread, a frame at a time; read by the reader thread.
//!
//! Between hosts it may be several connections. What belongs to one group goes by the connection
//! that the group's id names, but for its stream of collectives, which goes by all in turn: which
//! one follows from how much of the stream has gone before, and so both sides know it.

use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use crate::frame::Header;

/// Bytes of a group's stream after which its next frame goes by the next connection.
pub(crate) const STRIPE_BYTES: u64 = 256 << 10;

/// Returns the connection, of `streams`, by which a frame goes that begins at byte `at` of the
/// stream of group `id`.
pub(crate) fn stripe(id: u32, at: u64, streams: usize) -> usize {
    ((u64::from(id) + at / STRIPE_BYTES) % streams as u64) as usize
}

/// Why a frame could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SendError {
    /// The connection is closed.
    Gone,
    /// The peer's host took nothing for the whole deadline.
    TimedOut,
}

/// One connection to a peer.
#[derive(Debug)]
struct Wire {
    stream: TcpStream,
    /// Held while a frame is written.
    writing: Mutex<()>,
}

/// A link to a peer: one connection, or several between hosts.
#[derive(Debug)]
pub(crate) struct Peer {
    wires: Vec<Wire>,
    /// Connections that still bring something.
    open: AtomicUsize,
    gone: AtomicBool,
    /// Whether the peer can share memory with this rank.
    pub(crate) same_host: bool,
}

impl Peer {
    /// Takes over connections after their handshakes.
    pub(crate) fn new(streams: Vec<TcpStream>, same_host: bool) -> io::Result<Self> {
        for stream in &streams {
            stream.set_read_timeout(None)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
        }
        let wires: Vec<Wire> =
            streams.into_iter().map(|stream| Wire { stream, writing: Mutex::new(()) }).collect();
        let open = AtomicUsize::new(wires.len());
        Ok(Self { wires, open, gone: AtomicBool::new(false), same_host })
    }

    /// Returns the number of connections.
    pub(crate) fn streams(&self) -> usize {
        self.wires.len()
    }

    /// Returns a connection.
    pub(crate) fn stream(&self, number: usize) -> &TcpStream {
        &self.wires[number].stream
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Takes note that one connection brings nothing more; returns whether it was the last one.
    pub(crate) fn ended(&self) -> bool {
        self.open.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Marks the peer as gone and closes the link; its reader finds out too.
    pub(crate) fn close(&self) {
        self.gone.store(true, Ordering::Release);
        self.shut(Shutdown::Both);
    }

    /// Says that nothing more will be sent: the peer reads what is under way, then the end.
    pub(crate) fn finish(&self) {
        self.shut(Shutdown::Write);
    }

    fn shut(&self, how: Shutdown) {
        for wire in &self.wires {
            // Fails only when it is closed already.
            let _ = wire.stream.shutdown(how);
        }
    }

    /// Sends one frame by connection `number`, its payload `parts`, one after the other. Waits while
    /// the peer's buffers are full, which its reader thread empties whatever its other threads do.
    ///
    /// A frame that cannot be finished leaves the stream out of step, so the link is closed.
    pub(crate) fn send(
        &self,
        number: usize,
        header: Header,
        parts: [&[u8]; 2],
        deadline: Duration,
    ) -> Result<(), SendError> {
        let head = header.encode();
        let Wire { stream, writing } = &self.wires[number];
        let _writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
        let total = head.len() + parts[0].len() + parts[1].len();
        let mut sent = 0;
        let mut stuck_since = None;
        while sent < total {
            if self.is_gone() {
                return Err(SendError::Gone);
            }
            let mut slices = [&head[..], parts[0], parts[1]];
            let mut skip = sent;
            for slice in &mut slices {
                let cut = skip.min(slice.len());
                *slice = &slice[cut..];
                skip -= cut;
            }
            let slices = slices.map(IoSlice::new);
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(stream, &slices, &mut SendAncillaryBuffer::default(), flags) {
                Ok(n) => {
                    sent += n;
                    stuck_since = None;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    let since = *stuck_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= deadline {
                        self.close();
                        return Err(SendError::TimedOut);
                    }
                    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
                    let slice = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                    // Whatever it says, the next attempt to send knows better.
                    let _ = poll(&mut fds, Some(&slice));
                }
                Err(_) => {
                    self.close();
                    return Err(SendError::Gone);
                }
            }
        }
        Ok(())
    }
}
