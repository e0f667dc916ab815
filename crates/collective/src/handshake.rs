//! How two ranks prove to one another that they belong to the same world.
//!
//! Both know the secret of the job's attempt and never send it: each answers the other's nonce
//! with an HMAC over the whole exchange so far. A stranger learns nothing and is dropped.
//!
//! ```text
//! connector -> acceptor  magic, version, world size, from, to, streams, stream, nonce
//! acceptor -> connector  version, nonce, HMAC("accept", all of the above), host
//! connector -> acceptor  HMAC("connect", all of the above), host
//! ```

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Raised when frames or layouts change: ranks of two versions do not mix.
const VERSION: u32 = 2;
const MAGIC: [u8; 8] = *b"DRUMLINE";
const OPENING_BYTES: usize = 64;
const REPLY_BYTES: usize = 100;

/// What a rank is to its peers before any link exists.
#[derive(Clone, Copy)]
pub(crate) struct Identity<'a> {
    pub(crate) secret: &'a [u8],
    pub(crate) world: u32,
    pub(crate) rank: u32,
    /// Streams between two ranks on different hosts: all ranks must have the same number.
    pub(crate) streams: u32,
    /// Equal for ranks that can share memory; none for one that does not want to.
    pub(crate) host: Option<[u8; 32]>,
}

/// Why a handshake failed.
#[derive(Debug)]
pub(crate) enum HandshakeError {
    /// The connection failed, ended early or took too long.
    Io(io::Error),
    /// The other side is no rank of this world.
    Refused { expected: String, got: String },
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn refused(expected: impl Into<String>, got: impl Into<String>) -> HandshakeError {
    HandshakeError::Refused { expected: expected.into(), got: got.into() }
}

fn mac(secret: &[u8], side: &[u8], parts: &[&[u8]]) -> Result<Hmac<Sha256>, HandshakeError> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret)
        .map_err(|_| refused("a secret", "one of a length that HMAC does not take"))?;
    mac.update(side);
    for part in parts {
        mac.update(part);
    }
    Ok(mac)
}

fn nonce() -> Result<[u8; 32], HandshakeError> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

/// A read that ends by `deadline` however slowly the other side drips.
fn read<const N: usize>(stream: &TcpStream, deadline: Instant) -> Result<[u8; N], HandshakeError> {
    let mut bytes = [0; N];
    let mut got = 0;
    while got < N {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match (&*stream).read(&mut bytes[got..]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn host_bytes(host: Option<[u8; 32]>) -> [u8; 32] {
    host.unwrap_or([0; 32])
}

fn same_host(own: Option<[u8; 32]>, theirs: &[u8]) -> bool {
    own.is_some_and(|own| own == theirs)
}

/// Meets rank `to` on a fresh connection, the `number`-th between the two; returns whether it shares
/// this host.
pub(crate) fn connect(
    mut stream: &TcpStream,
    own: Identity<'_>,
    to: u32,
    number: u32,
    deadline: Instant,
) -> Result<bool, HandshakeError> {
    let mut opening = [0; OPENING_BYTES];
    opening[..8].copy_from_slice(&MAGIC);
    let words = [VERSION, own.world, own.rank, to, own.streams, number];
    for (word, value) in opening[8..32].chunks_exact_mut(4).zip(words) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    opening[32..].copy_from_slice(&nonce()?);
    stream.write_all(&opening)?;

    let reply: [u8; REPLY_BYTES] = read(stream, deadline)?;
    let version = word(&reply, 0);
    if version != VERSION {
        return Err(refused(format!("collective protocol {VERSION}"), format!("{version}")));
    }
    mac(own.secret, b"accept", &[&opening, &reply[..36], &reply[68..]])?
        .verify_slice(&reply[36..68])
        .map_err(|_| refused("a rank with the same secret", "another secret"))?;

    let host = host_bytes(own.host);
    let proof = mac(own.secret, b"connect", &[&opening, &reply, &host])?;
    let mut last = [0; 64];
    last[..32].copy_from_slice(&proof.finalize().into_bytes());
    last[32..].copy_from_slice(&host);
    stream.write_all(&last)?;
    Ok(same_host(own.host, &reply[68..]))
}

/// Meets whoever connected; returns its rank, which stream of the two ranks it is, and whether it
/// shares this host.
pub(crate) fn accept(
    mut stream: &TcpStream,
    own: Identity<'_>,
    deadline: Instant,
) -> Result<(u32, u32, bool), HandshakeError> {
    let opening: [u8; OPENING_BYTES] = read(stream, deadline)?;
    if opening[..8] != MAGIC {
        return Err(refused("a rank", "a stranger"));
    }
    let mut reply = [0; REPLY_BYTES];
    reply[..4].copy_from_slice(&VERSION.to_le_bytes());
    reply[4..36].copy_from_slice(&nonce()?);
    reply[68..].copy_from_slice(&host_bytes(own.host));
    let proof = mac(own.secret, b"accept", &[&opening, &reply[..36], &reply[68..]])?;
    reply[36..68].copy_from_slice(&proof.finalize().into_bytes());
    stream.write_all(&reply)?;

    let [version, world, from, to, streams, number] =
        [8, 12, 16, 20, 24, 28].map(|at| word(&opening, at));
    let same = (version, world, to, streams) == (VERSION, own.world, own.rank, own.streams);
    if !same || from >= world || from == own.rank || number >= streams {
        return Err(refused(
            format!(
                "protocol {VERSION}, {} ranks, to rank {}, {} streams",
                own.world, own.rank, own.streams
            ),
            format!(
                "protocol {version}, {world} ranks, from rank {from} to rank {to}, stream {number} \
                 of {streams}"
            ),
        ));
    }
    let last: [u8; 64] = read(stream, deadline)?;
    mac(own.secret, b"connect", &[&opening, &reply, &last[32..]])?
        .verify_slice(&last[..32])
        .map_err(|_| refused("a rank with the same secret", "another secret"))?;
    Ok((from, number, same_host(own.host, &last[32..])))
}
