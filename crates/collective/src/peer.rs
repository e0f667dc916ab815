//! The TCP link to one peer: written by any thread, a frame at a time; read by the reader thread.

use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use crate::frame::Header;

/// Why a frame could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SendError {
    /// The connection is closed.
    Gone,
    /// The peer's host took nothing for the whole deadline.
    TimedOut,
}

/// A link to a peer.
#[derive(Debug)]
pub(crate) struct Peer {
    stream: TcpStream,
    /// Held while a frame is written.
    writing: Mutex<()>,
    gone: AtomicBool,
    /// Whether the peer can share memory with this rank.
    pub(crate) same_host: bool,
}

impl Peer {
    /// Takes over a connection after its handshake.
    pub(crate) fn new(stream: TcpStream, same_host: bool) -> io::Result<Self> {
        stream.set_read_timeout(None)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, writing: Mutex::new(()), gone: AtomicBool::new(false), same_host })
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Marks the peer as gone and closes the link; its reader finds out too.
    pub(crate) fn close(&self) {
        self.gone.store(true, Ordering::Release);
        // Fails only when it is closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Says that nothing more will be sent: the peer reads what is under way, then the end.
    pub(crate) fn finish(&self) {
        // Fails only when it is closed already.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Sends one frame whose payload is `parts`, one after the other. Waits while the peer's
    /// buffers are full, which its reader thread empties whatever its other threads do.
    ///
    /// A frame that cannot be finished leaves the stream out of step, so the link is closed.
    pub(crate) fn send(
        &self,
        header: Header,
        parts: [&[u8]; 2],
        deadline: Duration,
    ) -> Result<(), SendError> {
        let head = header.encode();
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
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
            match sendmsg(&self.stream, &slices, &mut SendAncillaryBuffer::default(), flags) {
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
                    let mut fds = [PollFd::new(&self.stream, PollFlags::OUT)];
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
