//! The thread that reads all TCP links of a rank and notices when a peer is gone.
//!
//! It never waits for anything but the links: whatever it reads has space reserved, or its sender
//! broke the protocol and is cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::frame::{HEADER_BYTES, Header, Hello, Kind};
use crate::group::{Cause, Group};
use crate::peer::{Peer, stripe};

/// Read at once from a link; longer payloads go straight to their place.
const BUFFER_BYTES: usize = 64 << 10;

/// Turns for one link before the others have theirs.
const READS_MAX: usize = 8;

/// Groups that peers may announce before this rank makes them.
const EARLY_MAX: usize = 4096;

/// How long a rank that leaves waits for its peers to have read everything.
const LINGER: Duration = Duration::from_secs(1);

/// One side of a group being formed.
#[derive(Debug)]
pub(crate) struct Forming {
    pub(crate) group: Arc<Group>,
    pub(crate) hellos: Vec<Option<Hello>>,
    pub(crate) mapped: Vec<Option<bool>>,
}

/// The groups of a rank.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pub(crate) groups: BTreeMap<u32, Forming>,
    /// Ids in use or used before: a late frame must not reach another group.
    pub(crate) used: BTreeSet<u32>,
    /// Hellos of groups that this rank has not made yet, by group and rank in the world.
    pub(crate) early: BTreeMap<(u32, usize), Hello>,
}

/// What the reader thread shares with the communicators.
#[derive(Debug)]
pub(crate) struct Links {
    /// By rank in the world; none for this rank.
    pub(crate) peers: Vec<Option<Arc<Peer>>>,
    registry: Mutex<Registry>,
    pub(crate) changed: Condvar,
    /// Set when the rank leaves.
    pub(crate) leaving: AtomicBool,
}

impl Links {
    pub(crate) fn new(peers: Vec<Option<Arc<Peer>>>) -> Self {
        Self {
            peers,
            registry: Mutex::default(),
            changed: Condvar::new(),
            leaving: AtomicBool::new(false),
        }
    }

    /// The registry is consistent at every unlock, so a panic elsewhere does not spoil it.
    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the payload of the frame under way goes.
#[derive(Debug)]
enum Target {
    Stream(Arc<Group>, usize),
    /// Also how many bytes of the fragment have come, and its length.
    Message(Arc<Group>, usize, usize, usize),
    Hello(u32, Vec<u8>),
    Nowhere,
}

/// The reader of one connection of a link.
#[derive(Debug)]
struct Link {
    rank: usize,
    peer: Arc<Peer>,
    /// Which connection.
    number: usize,
    /// Whether its next frame must wait for one of another connection.
    held: bool,
    /// Frames begun.
    frames: u64,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Of the frame under way.
    header: Option<Header>,
    target: Target,
    left: usize,
}

/// Why a link is done with.
enum End {
    /// Closed by the peer.
    Closed,
    /// The connection broke.
    Broken,
    /// The peer does not keep to the protocol.
    Violation,
}

/// Reads until the rank has left or every peer is gone. `wake` is written to when it leaves.
pub(crate) fn run(links: &Links, wake: &UnixStream) {
    let mut open: Vec<Link> = links
        .peers
        .iter()
        .enumerate()
        .filter_map(|(rank, peer)| peer.as_ref().map(|peer| (rank, peer)))
        .flat_map(|(rank, peer)| {
            (0..peer.streams()).map(move |number| Link::new(rank, Arc::clone(peer), number))
        })
        .collect();
    let mut left_since = None;
    // Whether something that was held could go on.
    let mut moved = false;
    while !open.is_empty() {
        if links.leaving.load(Ordering::Acquire) {
            let since = *left_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= LINGER {
                break;
            }
        }
        // What is held is not asked for: there is always something, which must wait.
        let mut fds: Vec<PollFd<'_>> = open
            .iter()
            .map(|link| {
                let flags = if link.held { PollFlags::empty() } else { PollFlags::IN };
                PollFd::from_borrowed_fd(as_fd(link.peer.stream(link.number)), flags)
            })
            .collect();
        if left_since.is_none() {
            fds.push(PollFd::new(wake, PollFlags::IN));
        }
        // A group that this rank leaves frees what is held for it, without a word; and where one
        // frame came that was waited for, another may wait for that.
        let held = open.iter().any(|link| link.held);
        let soon = left_since.is_some() || held;
        let tv_nsec = if held && moved { 0 } else { 50_000_000 };
        let slice = Timespec { tv_sec: if soon { 0 } else { 60 }, tv_nsec };
        if poll(&mut fds, Some(&slice)).is_err() {
            // Interrupted by a signal; anything else would be a bad descriptor, and ours are open.
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut index = 0;
        open.retain_mut(|link| {
            let asked = ready[index] && !link.held;
            index += 1;
            !asked || stays(links, link)
        });
        // What came may have been waited for.
        moved = false;
        open.retain_mut(|link| {
            let before = (link.held, link.frames);
            let stays = !link.held || stays(links, link);
            moved |= before.0 && before.1 != link.frames;
            stays
        });
    }
    for link in &open {
        gone(links, link);
    }
}

/// Reads from a connection; returns whether it may bring more. Its peer is gone with the last one,
/// or at once when it breaks the protocol or the connection breaks.
fn stays(links: &Links, link: &mut Link) -> bool {
    let end = match link.turn(links) {
        Ok(()) => return true,
        Err(end) => end,
    };
    let last = link.peer.ended();
    if last || !matches!(end, End::Closed) {
        gone(links, link);
    }
    false
}

fn as_fd(stream: &std::net::TcpStream) -> rustix::fd::BorrowedFd<'_> {
    rustix::fd::AsFd::as_fd(stream)
}

fn gone(links: &Links, link: &Link) {
    link.peer.close();
    let registry = links.registry();
    for forming in registry.groups.values() {
        if let Some(index) = forming.group.index_of(link.rank) {
            forming.group.mark_gone(index);
        }
    }
    links.changed.notify_all();
}

impl Link {
    fn new(rank: usize, peer: Arc<Peer>, number: usize) -> Self {
        Self {
            rank,
            peer,
            number,
            held: false,
            frames: 0,
            buffer: vec![0; BUFFER_BYTES].into(),
            start: 0,
            end: 0,
            header: None,
            target: Target::Nowhere,
            left: 0,
        }
    }

    /// Reads what is there, up to a limit.
    fn turn(&mut self, links: &Links) -> Result<(), End> {
        for _ in 0..READS_MAX {
            self.use_buffered(links)?;
            if self.held {
                return Ok(());
            }
            // A long payload goes straight to its place, once the buffer is used up.
            let direct = self.start == self.end && self.left >= BUFFER_BYTES / 4;
            let read = if direct {
                self.read_direct()?
            } else {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
                let space = &mut self.buffer[self.end..];
                read(&self.peer, self.number, space)?.inspect(|n| self.end += n)
            };
            if read.is_none() {
                return Ok(());
            }
        }
        self.use_buffered(links)
    }

    /// Returns the bytes read, or none if there are none yet.
    fn read_direct(&mut self) -> Result<Option<usize>, End> {
        let n = match &mut self.target {
            Target::Stream(group, index) => {
                let mut writers = group.inbound(*index).writers();
                let writers = writers.as_mut().ok_or(End::Violation)?;
                let space = writers.ring.space();
                let len = space.len().min(self.left);
                if len == 0 {
                    return Err(End::Violation);
                }
                let n = read(&self.peer, self.number, &mut space[..len])?;
                if let Some(n) = n {
                    writers.stream_come += n as u64;
                    writers.ring.commit(n);
                    group.bell().ring();
                }
                n
            }
            Target::Message(group, index, at, len) => {
                let mut writers = group.inbound(*index).writers();
                let writers = writers.as_mut().ok_or(End::Violation)?;
                let space = &mut writers.mail.reserved(*len)[*at..];
                let n = read(&self.peer, self.number, space)?;
                *at += n.unwrap_or(0);
                n
            }
            // These are short, and what goes nowhere may go through the buffer.
            Target::Hello(..) | Target::Nowhere => {
                let n = read(&self.peer, self.number, &mut self.buffer[..])?;
                self.start = 0;
                self.end = n.unwrap_or(0);
                return Ok(n);
            }
        };
        self.left -= n.unwrap_or(0);
        Ok(n)
    }

    /// Works through the buffer.
    fn use_buffered(&mut self, links: &Links) -> Result<(), End> {
        loop {
            let have = self.end - self.start;
            if self.held {
                let Some(header) = self.header else { return Err(End::Violation) };
                if !self.is_turn(links, &header)? {
                    return Ok(());
                }
                self.held = false;
                self.frames += 1;
                self.target = self.open_target(links, &header)?;
            }
            match self.header {
                None => {
                    if have < HEADER_BYTES {
                        return Ok(());
                    }
                    let bytes: &[u8; HEADER_BYTES] = self.buffer
                        [self.start..self.start + HEADER_BYTES]
                        .try_into()
                        .map_err(|_| End::Violation)?;
                    let header = Header::decode(bytes).ok_or(End::Violation)?;
                    self.start += HEADER_BYTES;
                    self.left = header.len as usize;
                    self.header = Some(header);
                    // Looked at above, at once.
                    self.held = true;
                }
                Some(header) if self.left == 0 => {
                    self.finish(links, &header)?;
                    self.header = None;
                }
                Some(_) => {
                    if have == 0 {
                        return Ok(());
                    }
                    self.put()?;
                }
            }
        }
    }

    /// Returns whether all that was sent before a frame has come, by whichever connection.
    fn is_turn(&self, links: &Links, header: &Header) -> Result<bool, End> {
        let streams = self.peer.streams();
        if streams == 1 || !matches!(header.kind, Kind::Stream | Kind::Left) {
            return Ok(true);
        }
        let registry = links.registry();
        let Some(forming) = registry.groups.get(&header.group) else { return Ok(true) };
        let index = forming.group.index_of(self.rank).ok_or(End::Violation)?;
        let writers = forming.group.inbound(index).writers();
        let Some(writers) = writers.as_ref() else { return Ok(true) };
        let (begun, come) = (writers.stream_begun, writers.stream_come);
        Ok(match header.kind {
            Kind::Stream => begun == come && stripe(header.group, come, streams) == self.number,
            // It says how much of the stream there was.
            _ => come >= header.aux,
        })
    }

    fn open_target(&self, links: &Links, header: &Header) -> Result<Target, End> {
        if header.kind == Kind::Hello {
            return Ok(Target::Hello(header.group, Vec::new()));
        }
        let registry = links.registry();
        // Frames of a group that this rank has left are of no use.
        let Some(forming) = registry.groups.get(&header.group) else {
            return Ok(Target::Nowhere);
        };
        let group = Arc::clone(&forming.group);
        drop(registry);
        let index = group.index_of(self.rank).ok_or(End::Violation)?;
        match header.kind {
            Kind::Stream => {
                if let Some(writers) = group.inbound(index).writers().as_mut() {
                    writers.stream_begun += u64::from(header.len);
                }
                Ok(Target::Stream(group, index))
            }
            Kind::Message => {
                let len = header.len as usize;
                let mut writers = group.inbound(index).writers();
                let writers = writers.as_mut().ok_or(End::Violation)?;
                if len > crate::mailbox::FRAGMENT_BYTES || writers.mail.space(len).is_none() {
                    return Err(End::Violation);
                }
                Ok(Target::Message(Arc::clone(&group), index, 0, len))
            }
            _ => Ok(Target::Nowhere),
        }
    }

    /// Puts some of the buffer where it belongs.
    fn put(&mut self) -> Result<(), End> {
        let have = &self.buffer[self.start..self.end];
        let mut len = have.len().min(self.left);
        match &mut self.target {
            Target::Stream(group, index) => {
                let mut writers = group.inbound(*index).writers();
                let writers = writers.as_mut().ok_or(End::Violation)?;
                let space = writers.ring.space();
                len = len.min(space.len());
                if len == 0 {
                    return Err(End::Violation);
                }
                space[..len].copy_from_slice(&have[..len]);
                writers.stream_come += len as u64;
                writers.ring.commit(len);
                group.bell().ring();
            }
            Target::Message(group, index, at, whole) => {
                let mut writers = group.inbound(*index).writers();
                let writers = writers.as_mut().ok_or(End::Violation)?;
                writers.mail.reserved(*whole)[*at..*at + len].copy_from_slice(&have[..len]);
                *at += len;
            }
            Target::Hello(_, bytes) => {
                if bytes.len() + len > 1024 {
                    return Err(End::Violation);
                }
                bytes.extend_from_slice(&have[..len]);
            }
            Target::Nowhere => {}
        }
        self.start += len;
        self.left -= len;
        Ok(())
    }

    /// Acts on a frame that is complete.
    fn finish(&mut self, links: &Links, header: &Header) -> Result<(), End> {
        match (&self.target, header.kind) {
            (Target::Message(group, index, _, len), _) => {
                let mut writers = group.inbound(*index).writers();
                let writers = writers.as_mut().ok_or(End::Violation)?;
                let at = writers.message_at;
                writers.mail.post(*len, header.aux, at);
                writers.message_at = at + *len as u64;
                if writers.message_at >= header.aux {
                    writers.message_at = 0;
                }
                group.bell().ring();
            }
            (Target::Hello(id, bytes), _) => {
                let hello = Hello::decode(bytes).ok_or(End::Violation)?;
                let mut registry = links.registry();
                let registry = &mut *registry;
                if let Some(forming) = registry.groups.get_mut(id) {
                    let index = forming.group.index_of(self.rank).ok_or(End::Violation)?;
                    forming.hellos[index] = Some(hello);
                } else if !registry.used.contains(id) {
                    if registry.early.len() >= EARLY_MAX {
                        return Err(End::Violation);
                    }
                    registry.early.insert((*id, self.rank), hello);
                }
                links.changed.notify_all();
            }
            (
                _,
                Kind::Mapped | Kind::StreamCredit | Kind::MessageCredit | Kind::Abort | Kind::Left,
            ) => {
                let mut registry = links.registry();
                let Some(forming) = registry.groups.get_mut(&header.group) else {
                    return Ok(());
                };
                let index = forming.group.index_of(self.rank).ok_or(End::Violation)?;
                let group = &forming.group;
                let inbound = group.inbound(index);
                match header.kind {
                    Kind::Mapped => forming.mapped[index] = Some(header.aux == 1),
                    Kind::StreamCredit => {
                        inbound.stream_credit.store(header.aux, Ordering::Release);
                        group.bell().ring();
                    }
                    Kind::MessageCredit => {
                        inbound.message_credit.store(header.aux, Ordering::Release);
                        group.bell().ring();
                    }
                    Kind::Abort => {
                        let cause = Cause::decode(header.aux, group.ranks().len());
                        group.abort(cause.ok_or(End::Violation)?);
                    }
                    _ => group.mark_gone(index),
                }
                links.changed.notify_all();
            }
            _ => {}
        }
        Ok(())
    }
}

/// Reads once; none if there is nothing yet.
fn read(peer: &Peer, number: usize, space: &mut [u8]) -> Result<Option<usize>, End> {
    loop {
        match peer.stream(number).read(space) {
            Ok(0) if !space.is_empty() => return Err(End::Closed),
            Ok(n) => return Ok(Some(n)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(_) => return Err(End::Broken),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use proptest::prelude::*;

    use super::*;
    use crate::lane;
    use crate::region::Mapping;

    /// A reader of one link, in a group of two with id 5, and the other end of the link.
    fn linked() -> (Arc<Links>, Arc<Group>, TcpStream) {
        let (links, group, mut theirs) = linked_by(1);
        (links, group, theirs.remove(0))
    }

    /// The same with `streams` connections.
    fn linked_by(streams: usize) -> (Arc<Links>, Arc<Group>, Vec<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = |_| {
            let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (listener.accept().unwrap().0, theirs)
        };
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..streams).map(pair).unzip();
        let peer = Arc::new(Peer::new(ours, false).unwrap());
        let links = Arc::new(Links::new(vec![None, Some(peer)]));
        let inbox = Arc::new(Mapping::private(lane::inbox_bytes(2)).unwrap());
        let group = Arc::new(Group::new(5, vec![0, 1], 0, inbox));
        links.registry().groups.insert(
            5,
            Forming { group: Arc::clone(&group), hellos: vec![None; 2], mapped: vec![None; 2] },
        );
        (links, group, theirs)
    }

    /// Reads all of `bytes`, in pieces of `cut`, until the other end closes.
    fn read_all(links: &Links, mut theirs: TcpStream, bytes: &[u8], cut: usize) {
        std::thread::scope(|scope| {
            let (_wake, woken) = UnixStream::pair().unwrap();
            let reader = scope.spawn(move || run(links, &woken));
            for piece in bytes.chunks(cut.max(1)) {
                // Fails once the reader has had enough.
                if theirs.write_all(piece).is_err() {
                    break;
                }
            }
            drop(theirs);
            reader.join().unwrap();
        });
    }

    fn frame(kind: u32, group: u32, len: u32, aux: u64, payload: &[u8]) -> Vec<u8> {
        let header = Header { kind: Kind::Left, group, len, aux };
        let mut bytes = header.encode().to_vec();
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        /// Frames of any kind, of the wrong length or with nonsense in them, end the link at worst.
        #[test]
        fn no_frame_of_a_peer_brings_the_reader_down(
            frames in prop::collection::vec(
                (0u32..10, 4u32..7, 0u32..3000, any::<u64>(), 0usize..3000), 0..30,
            ),
            cut in 1usize..5000,
        ) {
            let (links, group, theirs) = linked();
            let mut bytes = Vec::new();
            for (i, (kind, id, len, aux, real)) in frames.into_iter().enumerate() {
                // Mostly of the length announced, or nothing after the first would be a frame.
                let real = if i % 5 == 4 { real } else { len as usize };
                let aux = if i % 2 == 0 { aux % 4 } else { aux };
                bytes.extend(frame(kind, id, len, aux, &vec![i as u8; real]));
            }
            read_all(&links, theirs, &bytes, cut);
            prop_assert!(group.inbound(1).gone.load(Ordering::Acquire));
        }
    }

    #[test]
    fn a_stream_by_several_connections_is_read_in_its_order_and_left_at_its_end() {
        let stripe_bytes = crate::peer::STRIPE_BYTES as usize;
        let (links, group, mut theirs) = linked_by(2);
        let (ring, _) = lane::places(group.inbox(), lane::lane_offset(1), false);
        let mut stream = crate::ring::Consumer::new(ring);
        let part =
            |value: u8, len: usize| frame(Kind::Stream as u32, 5, len as u32, 0, &vec![value; len]);
        let left = frame(Kind::Left as u32, 5, 0, 2 * stripe_bytes as u64 + 7, &[]);
        let gone = || group.inbound(1).gone.load(Ordering::Acquire);
        std::thread::scope(|scope| {
            let (wake, woken) = UnixStream::pair().unwrap();
            let links = &links;
            scope.spawn(move || run(links, &woken));
            // Group 5 begins with connection 1: what comes by the other is the second stripe.
            theirs[0].write_all(&part(2, stripe_bytes)).unwrap();
            theirs[1].write_all(&part(1, stripe_bytes)).unwrap();
            let until = |enough: &dyn Fn() -> bool| {
                let start = Instant::now();
                while !enough() {
                    assert!(start.elapsed() < Duration::from_secs(20), "nothing more comes");
                    std::thread::sleep(Duration::from_millis(1));
                }
            };
            until(&|| stream.readable().len() == 2 * stripe_bytes);
            let (first, second) = stream.readable().split_at(stripe_bytes);
            assert!(first.iter().all(|x| *x == 1) && second.iter().all(|x| *x == 2));
            stream.consume(2 * stripe_bytes);
            // The third stripe's turn is connection 1's again; it says that it leaves before that.
            theirs[0].write_all(&left).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            assert!(!gone(), "it has left, but not everything that it said has come");
            theirs[1].write_all(&part(3, 7)).unwrap();
            until(&|| gone());
            assert_eq!(stream.readable(), [3; 7]);
            // One connection that ends is not the end; the last one is.
            let last = theirs.pop().unwrap();
            drop(last);
            std::thread::sleep(Duration::from_millis(50));
            assert!(!links.peers[1].as_ref().unwrap().is_gone());
            drop(theirs);
            until(&|| links.peers[1].as_ref().unwrap().is_gone());
            drop(wake);
        });
    }

    #[test]
    fn a_stream_beyond_its_window_ends_the_link() {
        let (links, group, theirs) = linked();
        let payload = vec![7; crate::frame::PAYLOAD_MAX];
        let bytes = frame(Kind::Stream as u32, 5, payload.len() as u32, 0, &payload);
        read_all(&links, theirs, &bytes.repeat(lane::TCP_RING_BYTES / payload.len() + 1), 1 << 16);
        assert!(group.inbound(1).gone.load(Ordering::Acquire));
        let (ring, _) = lane::places(group.inbox(), lane::lane_offset(1), false);
        assert_eq!(crate::ring::Consumer::new(ring).readable(), vec![7; lane::TCP_RING_BYTES]);
    }
}
