//! An etcd server of the benchmark's own: one member, on this machine, that syncs to disk as etcd
//! does by default.

use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use crate::failure::Failure;

/// How long the server has until it answers.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// A server that ends with this value.
pub(super) struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// Starts a server whose data is in `folder`.
    ///
    /// # Errors
    /// The user's mistake, when there is no `etcd` to start; failed, when it does not answer.
    pub(super) async fn start(folder: &Path) -> Result<Self, Failure> {
        let (client, peer) = (free_port()?, free_port()?);
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.join("etcd"))
            .args(["--name", "bench", "--log-level", "error"])
            .args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)])
            .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
            .args(["--initial-cluster", &format!("bench={}", url(peer))])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| {
                Failure::user(format!(
                    "--store etcd: cannot start etcd: {error}; install it, or name a server with \
                     --store etcd://HOST:PORT"
                ))
            })?;
        let mut server = Self { child, address: format!("etcd://127.0.0.1:{client}") };
        let started = Instant::now();
        loop {
            if tokio::net::TcpStream::connect(("127.0.0.1", client)).await.is_ok() {
                return Ok(server);
            }
            if let Ok(Some(status)) = server.child.try_wait() {
                return Err(Failure::failed(format!("etcd ended at its start: {status}")));
            }
            if started.elapsed() > STARTS_WITHIN {
                let within = STARTS_WITHIN.as_secs();
                return Err(Failure::failed(format!("etcd did not answer within {within} s")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Returns where it is, as an address of the store.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Returns the processor time that it has used so far, in seconds; `None` where it cannot be
    /// told.
    pub(super) fn cpu_s(&self) -> Option<f64> {
        super::cpu_s(&self.child.id()?.to_string())
    }
}

/// Returns a port that nobody listens on.
fn free_port() -> Result<u16, Failure> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
