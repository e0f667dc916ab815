//! A TCP proxy for gRPC that loses requests or their answers, and cuts connections.
//!
//! It reads HTTP/2 frames, so that it acts on a request's data and not on a ping, and knows when the
//! server has answered.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use drumline_ports::conformance::store::Loss;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

const NOTHING: u8 = 0;
const ACK: u8 = 1;
const REQUEST: u8 = 2;

/// What a client says first on an HTTP/2 connection.
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;

struct Shared {
    server_port: u16,
    armed: AtomicU8,
    closed: AtomicBool,
    fired: AtomicU32,
    cuts: watch::Sender<u32>,
}

/// A running proxy.
pub(crate) struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

impl Proxy {
    /// Starts a proxy in front of a port on loopback.
    pub(crate) async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let (cuts, _) = watch::channel(0);
        let shared = Arc::new(Shared {
            server_port,
            armed: AtomicU8::new(NOTHING),
            closed: AtomicBool::new(false),
            fired: AtomicU32::new(0),
            cuts,
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { port, shared, accepting }
    }

    /// Where it listens.
    pub(crate) fn member(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Lets the next request be lost.
    pub(crate) fn lose_next(&self, what: Loss) {
        let code = match what {
            Loss::Ack => ACK,
            Loss::Request => REQUEST,
        };
        self.shared.armed.store(code, Ordering::SeqCst);
    }

    /// How many requests were lost so far.
    pub(crate) fn fired(&self) -> u32 {
        self.shared.fired.load(Ordering::SeqCst)
    }

    /// Cuts all connections and lets none through.
    pub(crate) fn cut(&self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.cuts.send_modify(|n| *n += 1);
    }

    /// Lets connections through again.
    pub(crate) fn restore(&self) {
        self.shared.closed.store(false, Ordering::SeqCst);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        if !shared.closed.load(Ordering::SeqCst) {
            tokio::spawn(relay(client, Arc::clone(&shared)));
        }
    }
}

/// Copies both ways until either end closes, the connection is cut, or a loss is done.
async fn relay(client: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    let Ok(server) = TcpStream::connect(("127.0.0.1", shared.server_port)).await else {
        return;
    };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let doomed = Doomed::default();
    tokio::select! {
        _ = cuts.changed() => {}
        _ = back(from_server, to_client, &doomed) => {}
        _ = forth(from_client, to_server, &shared, &doomed) => {}
    }
}

/// The request whose answer shall be lost. From then on nothing goes back to the client.
#[derive(Default)]
struct Doomed {
    /// Its stream; 0 while there is none.
    stream: AtomicU32,
    /// The server has answered it, and so has applied it.
    answered: Notify,
}

/// A frame of HTTP/2.
struct Frame {
    header: [u8; FRAME_HEADER_BYTES],
    payload: Vec<u8>,
}

impl Frame {
    async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut header = [0; FRAME_HEADER_BYTES];
        from.read_exact(&mut header).await?;
        let bytes = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let mut payload = vec![0; bytes as usize];
        from.read_exact(&mut payload).await?;
        Ok(Self { header, payload })
    }

    async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        to.write_all(&self.header).await?;
        to.write_all(&self.payload).await
    }

    fn kind(&self) -> u8 {
        self.header[3]
    }

    fn stream(&self) -> u32 {
        u32::from_be_bytes([self.header[5] & 0x7f, self.header[6], self.header[7], self.header[8]])
    }
}

async fn back(
    mut server: OwnedReadHalf,
    mut client: OwnedWriteHalf,
    doomed: &Doomed,
) -> io::Result<()> {
    loop {
        let frame = Frame::read(&mut server).await?;
        match doomed.stream.load(Ordering::SeqCst) {
            0 => frame.write(&mut client).await?,
            stream if frame.stream() == stream && matches!(frame.kind(), DATA | HEADERS) => {
                doomed.answered.notify_one();
            }
            _ => {}
        }
    }
}

async fn forth(
    mut client: OwnedReadHalf,
    mut server: OwnedWriteHalf,
    shared: &Shared,
    doomed: &Doomed,
) -> io::Result<()> {
    let mut preface = [0; PREFACE_BYTES];
    client.read_exact(&mut preface).await?;
    server.write_all(&preface).await?;
    loop {
        let frame = Frame::read(&mut client).await?;
        let carries_request = frame.kind() == DATA && !frame.payload.is_empty();
        let loss =
            if carries_request { shared.armed.swap(NOTHING, Ordering::SeqCst) } else { NOTHING };
        if loss != NOTHING {
            shared.fired.fetch_add(1, Ordering::SeqCst);
        }
        if loss == REQUEST {
            return Ok(());
        }
        if loss == ACK {
            doomed.stream.store(frame.stream(), Ordering::SeqCst);
        }
        frame.write(&mut server).await?;
        if loss == ACK {
            doomed.answered.notified().await;
            return Ok(());
        }
    }
}
