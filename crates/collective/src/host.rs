//! Ranks in processes of their own: TCP between hosts, shared memory on one.
//!
//! Each rank binds a [`Listener`] and announces its address; once all addresses are known,
//! [`HostWorld::connect`] links every rank to every other, and [`HostWorld::group`] forms groups
//! over those links. A link stays open for as long as its ranks live, also where data goes by
//! shared memory: when it closes, the peer is gone, and whoever waits for it is told at once.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

pub use crate::communicator::HostCollective;
use crate::frame::{Header, Hello, Kind};
use crate::group::{Cause, Group};
use crate::handshake::{self, HandshakeError, Identity};
use crate::lane::{self, Lane};
use crate::peer::{Peer, stripe};
use crate::reader::{self, Forming, Links};
use crate::region::{self, Mapping};
use crate::{CollectiveError, DEADLINE_DEFAULT};

/// The most ranks of a world: each is linked to each.
pub const RANKS_MAX: usize = 1024;

/// The most TCP connections between two ranks.
pub const STREAMS_MAX: usize = 16;

/// TCP connections between two ranks on different hosts, unless set otherwise.
pub const STREAMS_DEFAULT: usize = 4;

/// How long a stranger may hold a handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// Handshakes at once beyond those of the world's own ranks.
const STRANGERS_MAX: usize = 64;

/// Between two attempts to reach a rank that does not listen yet.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// How long to look out for a peer before sleeping, when every rank of this host has a core: more
/// than a small collective takes, less than a scheduler's time slice.
const SPIN_ALONE: Duration = Duration::from_micros(30);

/// The same when ranks share cores: the peer may need this one.
const SPIN_SHARED: Duration = Duration::from_micros(2);

/// A socket that a rank's peers connect to.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Listens on a free port of `ip`.
    ///
    /// # Errors
    /// [`CollectiveError::Io`] when the system refuses.
    pub fn bind(ip: IpAddr) -> Result<Self, CollectiveError> {
        let socket = TcpListener::bind((ip, 0)).map_err(|error| refused("listen", &error))?;
        let address = socket.local_addr().map_err(|error| refused("listen", &error))?;
        Ok(Self { socket, address })
    }

    /// Returns the address to announce.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// What a rank must know to join its world.
#[derive(Clone)]
pub struct WorldOptions {
    /// This rank.
    pub rank: usize,
    /// Address of every rank's listener, in rank order, this rank's included.
    pub addresses: Vec<SocketAddr>,
    /// Known to the ranks of this attempt of this job only.
    pub secret: Vec<u8>,
    /// Longest time until all ranks are linked.
    pub connect_deadline: Duration,
    /// Longest time without progress before a collective fails.
    pub deadline: Duration,
    /// Whether to use shared memory with ranks of the same host.
    pub shared_memory: bool,
    /// TCP connections to each rank that shares no memory with this one, 1 to [`STREAMS_MAX`]; the
    /// same on all ranks.
    pub streams: usize,
}

impl WorldOptions {
    /// Options with the default deadlines and shared memory where possible.
    #[must_use]
    pub fn new(rank: usize, addresses: Vec<SocketAddr>, secret: Vec<u8>) -> Self {
        Self {
            rank,
            addresses,
            secret,
            connect_deadline: DEADLINE_DEFAULT,
            deadline: DEADLINE_DEFAULT,
            shared_memory: true,
            streams: STREAMS_DEFAULT,
        }
    }
}

/// Says everything but the secret.
impl std::fmt::Debug for WorldOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorldOptions")
            .field("rank", &self.rank)
            .field("addresses", &self.addresses)
            .field("connect_deadline", &self.connect_deadline)
            .field("deadline", &self.deadline)
            .field("shared_memory", &self.shared_memory)
            .field("streams", &self.streams)
            .finish_non_exhaustive()
    }
}

fn refused(op: &'static str, error: &io::Error) -> CollectiveError {
    CollectiveError::Io { op, message: error.to_string() }
}

/// A rank's links to all others.
#[derive(Debug, Clone)]
pub struct HostWorld {
    world: Arc<World>,
}

/// The links and the thread that reads them; they end with the last user.
#[derive(Debug)]
pub(crate) struct World {
    rank: usize,
    links: Arc<Links>,
    deadline: Duration,
    spin: Duration,
    shared_memory: bool,
    wake: UnixStream,
    reader: Mutex<Option<JoinHandle<()>>>,
}

impl HostWorld {
    /// Links this rank to all others. Strangers who connect to the listener meanwhile are dropped;
    /// afterwards it is closed.
    ///
    /// # Errors
    /// [`CollectiveError::TimedOut`] naming the first rank that is missing at the deadline,
    /// [`CollectiveError::Mismatch`] when a rank has another secret, version or world size, and
    /// [`CollectiveError::Io`].
    pub fn connect(listener: Listener, options: &WorldOptions) -> Result<Self, CollectiveError> {
        const OP: &str = "connect";
        let size = options.addresses.len();
        if options.rank >= size || size > RANKS_MAX {
            return Err(CollectiveError::Mismatch {
                op: OP,
                expected: format!("a rank of a world of at most {RANKS_MAX}"),
                got: format!("rank {} of {size}", options.rank),
            });
        }
        if !(1..=STREAMS_MAX).contains(&options.streams) {
            return Err(CollectiveError::Mismatch {
                op: OP,
                expected: format!("1 to {STREAMS_MAX} streams"),
                got: format!("{}", options.streams),
            });
        }
        let start = Instant::now();
        let deadline = start + options.connect_deadline;
        let host = if options.shared_memory { region::host_identity() } else { None };
        let own = Identity {
            secret: &options.secret,
            world: size as u32,
            rank: options.rank as u32,
            streams: options.streams as u32,
            host,
        };
        let mut met: Vec<Met> = (0..size).map(|_| Met::default()).collect();
        let accepting = Accepting::start(listener, options, host, deadline)?;
        for (peer, met) in met.iter_mut().enumerate().take(options.rank) {
            while !met.is_complete(options.streams) {
                let number = met.streams.len();
                let address = options.addresses[peer];
                let (stream, same_host) = reach(address, own, (peer, number), start, deadline)?;
                met.add(number, stream, same_host);
            }
        }
        while let Some(missing) =
            (options.rank + 1..size).find(|peer| !met[*peer].is_complete(options.streams))
        {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok((peer, number, stream, same_host)) = accepting.met.recv_timeout(left) else {
                return Err(timed_out(OP, missing, start));
            };
            if let Some(met) = met.get_mut(peer).filter(|_| peer > options.rank) {
                met.add(number, stream, same_host);
            }
        }
        drop(accepting);

        let peers = met
            .into_iter()
            .map(|met| {
                if met.streams.is_empty() {
                    return Ok(None);
                }
                let streams = met.streams.into_values().collect();
                Peer::new(streams, met.same_host).map(|peer| Some(Arc::new(peer)))
            })
            .collect::<io::Result<Vec<_>>>()
            .map_err(|error| refused(OP, &error))?;
        World::start(options, peers)
            .map(|world| Self { world: Arc::new(world) })
            .map_err(|error| refused(OP, &error))
    }

    /// Returns this rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.world.rank
    }

    /// Returns the number of ranks.
    #[must_use]
    pub fn size(&self) -> usize {
        self.world.links.peers.len()
    }

    /// Forms a group of `ranks`, of which this rank is one, in the order of the group. All of them
    /// call this with the same `id`, which serves one group only in the life of the world.
    ///
    /// # Errors
    /// [`CollectiveError::Mismatch`] when the ranks disagree or make no sense,
    /// [`CollectiveError::PeerGone`] and [`CollectiveError::TimedOut`].
    pub fn group(&self, ranks: &[usize], id: u32) -> Result<Arc<HostCollective>, CollectiveError> {
        World::form(&self.world, ranks, id).map(Arc::new)
    }
}

/// The connections to one rank that there are so far.
#[derive(Debug, Default)]
struct Met {
    streams: BTreeMap<usize, TcpStream>,
    same_host: bool,
}

impl Met {
    /// A second connection of the same number is dropped.
    fn add(&mut self, number: usize, stream: TcpStream, same_host: bool) {
        self.same_host = same_host;
        self.streams.entry(number).or_insert(stream);
    }

    /// Where memory is shared, a connection tells of life and death alone.
    fn is_complete(&self, streams: usize) -> bool {
        self.streams.len() >= if self.same_host { 1 } else { streams }
    }
}

fn timed_out(op: &'static str, peer: usize, start: Instant) -> CollectiveError {
    CollectiveError::TimedOut {
        op,
        peer,
        waited_ms: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

/// Connects to a rank below, the `number`-th time, trying again while it does not listen yet.
fn reach(
    address: SocketAddr,
    own: Identity<'_>,
    (peer, number): (usize, usize),
    start: Instant,
    deadline: Instant,
) -> Result<(TcpStream, bool), CollectiveError> {
    const OP: &str = "connect";
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(timed_out(OP, peer, start));
        }
        let met = TcpStream::connect_timeout(&address, left).map_err(HandshakeError::Io).and_then(
            |stream| {
                stream.set_nodelay(true)?;
                let same_host =
                    handshake::connect(&stream, own, peer as u32, number as u32, deadline)?;
                Ok((stream, same_host))
            },
        );
        match met {
            Ok(met) => return Ok(met),
            Err(HandshakeError::Refused { expected, got }) => {
                return Err(CollectiveError::Mismatch {
                    op: OP,
                    expected,
                    got: format!("{got} (rank {peer} at {address})"),
                });
            }
            // Not there yet, or the connection broke: a few hundred attempts fit a deadline.
            Err(HandshakeError::Io(error)) if is_passing(&error) => {
                std::thread::sleep(RETRY_PAUSE.min(left));
            }
            Err(HandshakeError::Io(error)) => return Err(refused(OP, &error)),
        }
    }
}

/// Whether a rank that fails to be reached in this way may be reached later.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    !matches!(
        error.kind(),
        K::PermissionDenied | K::AddrNotAvailable | K::InvalidInput | K::Unsupported
    )
}

/// Accepts ranks above in the background, each in a thread of its own so that a stranger who says
/// nothing keeps nobody waiting.
struct Accepting {
    met: mpsc::Receiver<(usize, usize, TcpStream, bool)>,
    /// Dropped to stop the thread.
    _stop: UnixStream,
}

impl Accepting {
    fn start(
        listener: Listener,
        options: &WorldOptions,
        host: Option<[u8; 32]>,
        deadline: Instant,
    ) -> Result<Self, CollectiveError> {
        const OP: &str = "accept";
        let (stop, stopped) = UnixStream::pair().map_err(|error| refused(OP, &error))?;
        let (world, streams) = (options.addresses.len(), options.streams);
        let (meet, met) = mpsc::sync_channel(world * streams + STRANGERS_MAX);
        let (rank, secret) = (options.rank, Arc::<[u8]>::from(options.secret.as_slice()));
        listener.socket.set_nonblocking(true).map_err(|error| refused(OP, &error))?;
        let accept = move || {
            let under_way = Arc::new(AtomicUsize::new(0));
            while wait_for_connection(&listener.socket, &stopped, deadline) {
                let Ok((stream, _)) = listener.socket.accept() else {
                    continue;
                };
                if under_way.load(Ordering::Relaxed) >= world + STRANGERS_MAX {
                    continue;
                }
                under_way.fetch_add(1, Ordering::Relaxed);
                let (meet, secret) = (meet.clone(), Arc::clone(&secret));
                let running = Arc::clone(&under_way);
                let handshake = move || {
                    let own = Identity {
                        secret: &secret,
                        world: world as u32,
                        rank: rank as u32,
                        streams: streams as u32,
                        host,
                    };
                    let by = deadline.min(Instant::now() + HANDSHAKE_MAX);
                    let met = stream
                        .set_nonblocking(false)
                        .and_then(|()| stream.set_nodelay(true))
                        .map_err(HandshakeError::Io)
                        .and_then(|()| handshake::accept(&stream, own, by));
                    // Strangers are dropped without a word; a full channel means as many ranks
                    // as can be, so one more is a stranger too.
                    if let Ok((peer, number, same_host)) = met {
                        let number = number as usize;
                        let _ = meet.try_send((peer as usize, number, stream, same_host));
                    }
                    running.fetch_sub(1, Ordering::Relaxed);
                };
                let name = "collective-handshake".to_owned();
                if std::thread::Builder::new().name(name).spawn(handshake).is_err() {
                    under_way.fetch_sub(1, Ordering::Relaxed);
                }
            }
        };
        std::thread::Builder::new()
            .name("collective-accept".to_owned())
            .spawn(accept)
            .map_err(|error| refused(OP, &error))?;
        Ok(Self { met, _stop: stop })
    }
}

/// Returns whether someone connects; not, once stopped or past the deadline.
fn wait_for_connection(socket: &TcpListener, stopped: &UnixStream, deadline: Instant) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        let slice = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        if poll(&mut fds, Some(&slice)).is_err() {
            continue;
        }
        if !fds[1].revents().is_empty() {
            return false;
        }
        if !fds[0].revents().is_empty() {
            return true;
        }
    }
}

impl World {
    fn start(options: &WorldOptions, peers: Vec<Option<Arc<Peer>>>) -> io::Result<Self> {
        let on_host = 1 + peers.iter().flatten().filter(|peer| peer.same_host).count();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let links = Arc::new(Links::new(peers));
        let (wake, woken) = UnixStream::pair()?;
        let reading = Arc::clone(&links);
        let reader = std::thread::Builder::new()
            .name("collective-reader".to_owned())
            .spawn(move || reader::run(&reading, &woken))?;
        Ok(Self {
            rank: options.rank,
            links,
            deadline: options.deadline,
            spin: if on_host <= cores { SPIN_ALONE } else { SPIN_SHARED },
            shared_memory: options.shared_memory,
            wake,
            reader: Mutex::new(Some(reader)),
        })
    }

    fn form(
        world: &Arc<Self>,
        ranks: &[usize],
        id: u32,
    ) -> Result<HostCollective, CollectiveError> {
        const OP: &str = "group";
        let links = &world.links;
        let mismatch = |expected: &str, got: String| CollectiveError::Mismatch {
            op: OP,
            expected: expected.to_owned(),
            got,
        };
        let mut sorted = ranks.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let sound = sorted.len() == ranks.len() && sorted.last() < Some(&links.peers.len());
        let Some(me) = ranks.iter().position(|rank| *rank == world.rank).filter(|_| sound) else {
            let expected = "different ranks of the world, this one among them";
            return Err(mismatch(expected, format!("{ranks:?}")));
        };

        let start = Instant::now();
        let (inbox, file, offer) = world.make_inbox(ranks).map_err(|error| refused(OP, &error))?;
        let group = Arc::new(Group::new(id, ranks.to_vec(), me, inbox));
        world.register(&group)?;
        // From here on the group is left again if forming it fails.
        let forming = FormingGuard { world, group: &group, formed: false };
        let own = Hello { ranks: digest(ranks), offer };
        let others = || (0..ranks.len()).filter(|index| *index != me);
        for index in others() {
            world.tell(&group, index, Kind::Hello, 0, &own.encode())?;
        }
        let mut mapped: Vec<Option<(Arc<Mapping>, Arc<Mapping>)>> = vec![None; ranks.len()];
        for index in others() {
            let hello = world.await_peer(&group, index, start, |forming| forming.hellos[index])?;
            if hello.ranks != own.ranks {
                return Err(mismatch(
                    &format!("group {id} of ranks {ranks:?}"),
                    format!("another list from rank {}", ranks[index]),
                ));
            }
            if let (Some(_), Some(offer)) = (&own.offer, &hello.offer)
                && world.shares_memory_with(ranks[index])
            {
                // Refused where processes may not look at one another: then TCP it is.
                mapped[index] = region::open(
                    offer,
                    lane::inbox_bytes(ranks.len()),
                    lane::INBOX_HEAD_BYTES,
                    lane::lane_offset(me),
                    lane::LANE_BYTES,
                )
                .ok();
            }
            let ok = u64::from(mapped[index].is_some());
            world.tell(&group, index, Kind::Mapped, ok, &[])?;
        }
        let mut lanes = Vec::with_capacity(ranks.len());
        for (index, mapped) in mapped.into_iter().enumerate() {
            let Some(peer) = links.peers[ranks[index]].as_ref() else {
                lanes.push(None);
                continue;
            };
            let theirs = world.await_peer(&group, index, start, |forming| forming.mapped[index])?;
            let mapped = mapped.filter(|_| theirs);
            if mapped.is_some() {
                *group.inbound(index).writers() = None;
            }
            lanes.push(Some(Lane::new(
                Arc::clone(&group),
                index,
                Arc::clone(peer),
                mapped,
                world.deadline,
            )));
        }
        // Every peer has mapped it or never will.
        drop(file);
        forming.done();
        Ok(HostCollective::new(Arc::clone(world), group, lanes, world.deadline, world.spin))
    }

    fn shares_memory_with(&self, rank: usize) -> bool {
        let peer = self.links.peers[rank].as_ref();
        self.shared_memory && peer.is_some_and(|peer| peer.same_host)
    }

    fn make_inbox(
        &self,
        ranks: &[usize],
    ) -> io::Result<(Arc<Mapping>, Option<rustix::fd::OwnedFd>, Option<region::Offer>)> {
        let len = lane::inbox_bytes(ranks.len());
        if ranks.iter().any(|rank| self.shares_memory_with(*rank))
            && let Ok((inbox, file, offer)) = region::create(len)
        {
            return Ok((inbox, Some(file), Some(offer)));
        }
        Ok((Arc::new(Mapping::private(len)?), None, None))
    }

    fn register(&self, group: &Arc<Group>) -> Result<(), CollectiveError> {
        let mut registry = self.links.registry();
        if !registry.used.insert(group.id()) {
            return Err(CollectiveError::Mismatch {
                op: "group",
                expected: "an id that no group has had".to_owned(),
                got: format!("{}", group.id()),
            });
        }
        let size = group.ranks().len();
        let mut hellos = vec![None; size];
        for (index, rank) in group.ranks().iter().enumerate() {
            hellos[index] = registry.early.remove(&(group.id(), *rank));
            if self.links.peers[*rank].as_ref().is_some_and(|peer| peer.is_gone()) {
                group.mark_gone(index);
            }
        }
        registry.early.retain(|(id, _), _| *id != group.id());
        let forming = Forming { group: Arc::clone(group), hellos, mapped: vec![None; size] };
        registry.groups.insert(group.id(), forming);
        Ok(())
    }

    /// Sends a control frame to a rank of the group.
    fn tell(
        &self,
        group: &Group,
        index: usize,
        kind: Kind,
        aux: u64,
        payload: &[u8],
    ) -> Result<(), CollectiveError> {
        let Some(peer) = &self.links.peers[group.ranks()[index]] else {
            return Ok(());
        };
        let header = Header { kind, group: group.id(), len: payload.len() as u32, aux };
        // Its own connection, which the group's messages and credits take too.
        let number = stripe(group.id(), 0, peer.streams());
        peer.send(number, header, [payload, &[]], self.deadline)
            .map_err(|_| CollectiveError::PeerGone { peer: index, op: "group" })
    }

    /// Waits until a peer has said something about the group.
    fn await_peer<T>(
        &self,
        group: &Group,
        index: usize,
        start: Instant,
        said: impl Fn(&Forming) -> Option<T>,
    ) -> Result<T, CollectiveError> {
        const OP: &str = "group";
        let mut registry = self.links.registry();
        loop {
            if group.aborted().is_some() {
                return Err(CollectiveError::Aborted);
            }
            if let Some(value) = registry.groups.get(&group.id()).and_then(&said) {
                return Ok(value);
            }
            if group.inbound(index).gone.load(Ordering::Acquire) {
                return Err(CollectiveError::PeerGone { peer: index, op: OP });
            }
            let Some(left) = self.deadline.checked_sub(start.elapsed()) else {
                return Err(timed_out(OP, index, start));
            };
            registry = self
                .links
                .changed
                .wait_timeout(registry, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Aborts a group here and tells its other ranks, once.
    pub(crate) fn abort_group(&self, group: &Group, cause: Cause) {
        if group.abort(cause) {
            for index in 0..group.ranks().len() {
                // One that cannot be told is gone.
                let _ = self.tell(group, index, Kind::Abort, cause.encode(), &[]);
            }
        }
    }

    /// Leaves a group and tells its other ranks.
    pub(crate) fn leave_group(&self, group: &Group) {
        self.links.registry().groups.remove(&group.id());
        for index in 0..group.ranks().len() {
            // One that cannot be told is gone.
            let sent = group.inbound(index).stream_sent.load(Ordering::Acquire);
            let _ = self.tell(group, index, Kind::Left, sent, &[]);
        }
    }
}

/// Leaves a group that could not be formed.
struct FormingGuard<'a> {
    world: &'a World,
    group: &'a Group,
    formed: bool,
}

impl FormingGuard<'_> {
    fn done(mut self) {
        self.formed = true;
    }
}

impl Drop for FormingGuard<'_> {
    fn drop(&mut self) {
        if !self.formed {
            self.world.leave_group(self.group);
        }
    }
}

/// What two lists of ranks have in common only if they are equal.
fn digest(ranks: &[usize]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for rank in ranks {
        hash.update((*rank as u64).to_le_bytes());
    }
    hash.finalize().into()
}

impl Drop for World {
    fn drop(&mut self) {
        self.links.leaving.store(true, Ordering::Release);
        for peer in self.links.peers.iter().flatten() {
            peer.finish();
        }
        // The reader may have ended already, when all peers are gone.
        let _ = (&self.wake).write_all(&[1]);
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reader) = reader.take() {
            // It waits a moment for peers that still read, and no longer; it never panics, and if
            // it did there would be nothing left to do.
            let _ = reader.join();
        }
    }
}
