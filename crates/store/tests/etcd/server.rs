//! A real etcd on loopback, with a data folder of its own; killed when it goes out of scope.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use drumline_store::etcd::{EtcdOptions, EtcdStore};

/// Longest wait for a started server to answer.
const START_MAX: Duration = Duration::from_secs(120);

/// A running server.
pub(crate) struct EtcdServer {
    child: Child,
    client_port: u16,
    peer_port: u16,
    folder: tempfile::TempDir,
    extra: Vec<String>,
    scheme: &'static str,
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Returns where etcd is, or says that the test is skipped.
///
/// # Panics
/// When etcd is missing although `DRUMLINE_REQUIRE_ETCD` says that it must be there.
pub(crate) fn find() -> Option<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|f| f.join("etcd")).find(|p| p.is_file());
    if found.is_none() {
        let missing = "no `etcd` on PATH (Debian and Ubuntu: package etcd-server)";
        assert!(
            std::env::var_os("DRUMLINE_REQUIRE_ETCD").is_none(),
            "{missing}, and DRUMLINE_REQUIRE_ETCD is set"
        );
        eprintln!("SKIPPED: {missing}");
    }
    found
}

impl EtcdServer {
    /// Starts a server and waits until it answers; `None` when there is no etcd on this machine.
    pub(crate) async fn start() -> Option<Self> {
        let server = Self::launch("http", &[])?;
        server.wait(&EtcdOptions::default()).await;
        Some(server)
    }

    /// Starts a server with further arguments, without waiting for it.
    pub(crate) fn launch(scheme: &'static str, extra: &[String]) -> Option<Self> {
        let binary = find()?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (client_port, peer_port) = (free_port(), free_port());
        let child = spawn(&binary, scheme, client_port, peer_port, &folder, extra);
        Some(Self { child, client_port, peer_port, folder, extra: extra.to_vec(), scheme })
    }

    /// Where it listens.
    pub(crate) fn member(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// The port for clients.
    pub(crate) fn port(&self) -> u16 {
        self.client_port
    }

    /// Kills it with SIGKILL.
    pub(crate) fn kill(&mut self) {
        // Fails only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again where it was, after [`EtcdServer::kill`].
    pub(crate) async fn restart(&mut self) {
        let binary = find().expect("it was there before");
        self.child = spawn(
            &binary,
            self.scheme,
            self.client_port,
            self.peer_port,
            &self.folder,
            &self.extra,
        );
        self.wait(&EtcdOptions::default()).await;
    }

    /// Waits until it answers.
    pub(crate) async fn wait(&self, options: &EtcdOptions) -> EtcdStore {
        let options = EtcdOptions { deadline: Duration::from_secs(2), ..options.clone() };
        let end = Instant::now() + START_MAX;
        loop {
            match EtcdStore::connect(&[self.member()], &options).await {
                Ok(store) => return store,
                Err(error) => assert!(Instant::now() < end, "etcd did not start: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn spawn(
    binary: &std::path::Path,
    scheme: &str,
    client_port: u16,
    peer_port: u16,
    folder: &tempfile::TempDir,
    extra: &[String],
) -> Child {
    let client = format!("{scheme}://127.0.0.1:{client_port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    Command::new(binary)
        .args(["--name", "test", "--log-level", "error", "--logger", "zap"])
        .arg("--data-dir")
        .arg(folder.path())
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("test={peer}")])
        .args(extra)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd starts")
}

/// Returns a port on which nobody listens now.
///
/// It lies below those that the system gives to whoever names none, and is returned once: nobody else
/// has it before it is used.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Processes that run at the same time begin at other places.
        let at = std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (at % 10_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
