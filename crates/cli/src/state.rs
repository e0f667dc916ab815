//! The state folder of a cluster on this machine, and how a client finds a cluster by it.
//!
//! ```text
//! STATE-DIR/            mode 0700
//!   token               the cluster's token, mode 0600
//!   agent-token         lets agents of other machines join, and nothing else, mode 0600
//!   tls.crt, tls.key    what the control plane shows to other machines; the key mode 0600
//!   gateway-key         lets applications ask models, mode 0600
//!   dashboard-key       opens the dashboard, to read and nothing more, mode 0600
//!   lock                held by `drumline up`, with its process id
//!   endpoint.json       where the control plane listens; written when it does
//!   gateway.json        where the gateway listens
//!   store.redb          the embedded store
//!   log/*.log           what the control plane, the agents and the gateway say
//!   nodes/NODE/         each agent's own: specs, work folders and logs of its ranks
//!   shared/             what all nodes share: data, and each job's folder with its checkpoints
//! ```

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use drumline_wire::auth::Token;
use drumline_wire::line::CERTIFICATE_NAME;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// A cluster's state folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir(PathBuf);

/// Where a control plane listens; the content of `endpoint.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Endpoint {
    /// `http://HOST:PORT` of the gRPC API.
    pub control: String,
    /// `https://HOST:PORT` of the same for other machines; empty: they are not served.
    #[serde(default)]
    pub remote: String,
    /// The dashboard's address.
    #[serde(default)]
    pub dashboard: String,
    /// The control plane's metrics.
    #[serde(default)]
    pub metrics: String,
    /// The control plane's process id.
    #[serde(default)]
    pub pid: u32,
}

/// Where a gateway listens; the content of `gateway.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct GatewayEndpoint {
    /// `http://HOST:PORT`.
    pub gateway: String,
    /// The gateway's process id.
    #[serde(default)]
    pub pid: u32,
}

impl StateDir {
    /// Takes a folder, or the default one: `$XDG_STATE_HOME/drumline`, `~/.local/state/drumline`.
    ///
    /// # Errors
    /// A user's mistake when there is no default because no home folder is known.
    pub fn resolve(given: Option<&Path>) -> Result<Self, Failure> {
        if let Some(path) = given {
            // Children and manifests name the folder from other working folders.
            return std::path::absolute(path).map(Self).map_err(|error| {
                Failure::user(format!("--state-dir {}: {error}", path.display()))
            });
        }
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let base = set("XDG_STATE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".local/state")));
        match base {
            Some(base) => Ok(Self(base.join("drumline"))),
            None => Err(Failure::user("no state folder: neither XDG_STATE_HOME nor HOME is set")
                .hint("name one with `--state-dir`")),
        }
    }

    /// Returns the folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the token's file.
    #[must_use]
    pub fn token_file(&self) -> PathBuf {
        self.0.join("token")
    }

    /// Returns the file that says where the control plane listens.
    #[must_use]
    pub fn endpoint_file(&self) -> PathBuf {
        self.0.join("endpoint.json")
    }

    /// Returns the file that says where the gateway listens.
    #[must_use]
    pub fn gateway_file(&self) -> PathBuf {
        self.0.join("gateway.json")
    }

    /// Returns the file that `up` locks.
    #[must_use]
    pub fn lock_file(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// Returns the log of a process of the cluster.
    #[must_use]
    pub fn log_file(&self, process: &str) -> PathBuf {
        self.0.join("log").join(format!("{process}.log"))
    }

    /// Returns one agent's own folder.
    #[must_use]
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.0.join("nodes").join(node)
    }

    /// Returns the folder that all nodes share. Relative paths in manifests start here.
    #[must_use]
    pub fn shared_dir(&self) -> PathBuf {
        self.0.join("shared")
    }

    /// Creates the folder, readable by its owner only.
    ///
    /// # Errors
    /// When the system refuses; the text names the folder.
    pub fn create(&self) -> io::Result<()> {
        for path in [self.0.clone(), self.0.join("log"), self.0.join("nodes"), self.shared_dir()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|error| named(&error, "create", &path))?;
        }
        Ok(())
    }

    /// Reads the token, or makes one when there is none yet.
    ///
    /// # Errors
    /// When the file cannot be read or written, or holds no token.
    pub fn token_or_new(&self) -> io::Result<Token> {
        secret_or_new(&self.token_file())
    }

    /// Returns the file of the dashboard's key.
    #[must_use]
    pub fn dashboard_key_file(&self) -> PathBuf {
        self.0.join("dashboard-key")
    }

    /// Reads the dashboard's key, or makes one when there is none yet. It opens pages and nothing
    /// else, so that it may stand in an address.
    ///
    /// # Errors
    /// As [`StateDir::token_or_new`].
    pub fn dashboard_key_or_new(&self) -> io::Result<Token> {
        secret_or_new(&self.dashboard_key_file())
    }

    /// Reads the gateway's key, or makes one when there is none yet. It asks models and nothing else:
    /// for applications.
    ///
    /// # Errors
    /// As [`StateDir::token_or_new`].
    pub fn gateway_key_or_new(&self) -> io::Result<Token> {
        secret_or_new(&self.0.join("gateway-key"))
    }

    /// Reads the agents' token, or makes one when there is none yet. It lets agents join and nothing else.
    ///
    /// # Errors
    /// As [`StateDir::token_or_new`].
    pub fn agent_token_or_new(&self) -> io::Result<Token> {
        secret_or_new(&self.agent_token_file())
    }

    /// Returns the file of the agents' token.
    #[must_use]
    pub fn agent_token_file(&self) -> PathBuf {
        self.0.join("agent-token")
    }

    /// Returns the file of the certificate that other machines trust.
    #[must_use]
    pub fn certificate_file(&self) -> PathBuf {
        self.0.join("tls.crt")
    }

    /// Reads the certificate and its private key, in PEM, or makes both when one is missing. They stay
    /// the same, so that machines that trust the certificate go on to.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn certificate_or_new(&self) -> io::Result<(String, String)> {
        let (certificate, key) = (self.certificate_file(), self.0.join("tls.key"));
        if !certificate.exists() || !key.exists() {
            // A certificate without its key is none; the key comes first, so that no crash pairs a new
            // one with an old certificate.
            match fs::remove_file(&certificate) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(named(&error, "replace", &certificate));
                }
                _ => {}
            }
            let made = rcgen::generate_simple_self_signed([CERTIFICATE_NAME.to_owned()])
                .map_err(io::Error::other)?;
            place(&key, &made.signing_key.serialize_pem(), 0o600)?;
            place(&certificate, &made.cert.pem(), 0o644)?;
        }
        // Someone may have copied the folder with a lax mask.
        fs::set_permissions(&key, Permissions::from_mode(0o600))
            .map_err(|error| named(&error, "protect", &key))?;
        let read =
            |path: &Path| fs::read_to_string(path).map_err(|error| named(&error, "read", path));
        Ok((read(&certificate)?, read(&key)?))
    }

    /// Returns the dashboard's address with its key, so that it opens by itself.
    #[must_use]
    pub fn dashboard_link(&self, url: &str) -> String {
        match read_token(&self.dashboard_key_file()) {
            Ok(key) if !url.is_empty() => {
                format!("{}/?key={}", url.trim_end_matches('/'), key.expose())
            }
            _ => url.to_owned(),
        }
    }

    /// Reads where the control plane listens.
    ///
    /// # Errors
    /// When there is no such file, or it makes no sense.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        read_json(&self.endpoint_file())
    }

    /// Reads where the gateway listens.
    ///
    /// # Errors
    /// When there is no such file, or it makes no sense.
    pub fn gateway(&self) -> io::Result<GatewayEndpoint> {
        read_json(&self.gateway_file())
    }
}

/// Reads a secret's file, or makes one with 256 random bits that only its owner reads.
fn secret_or_new(path: &Path) -> io::Result<Token> {
    let mut random = [0u8; 32];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let fresh: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    if path.exists() {
        // Someone may have copied the folder with a lax mask.
        fs::set_permissions(path, Permissions::from_mode(0o600))
            .map_err(|error| named(&error, "protect", path))?;
    } else {
        place(path, &fresh, 0o600)?;
    }
    read_token(path)
}

/// Writes a file that nobody has seen yet: renamed into place, so that a crash never leaves half of it.
fn place(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let staged = path.with_file_name(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&staged)
        .map_err(|error| named(&error, "create", &staged))?;
    // One that a crash has left keeps the mode that it had.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&staged, path).map_err(|error| named(&error, "create", path))
}

/// Reads a token from its file.
///
/// # Errors
/// When the file cannot be read or holds no token; the text names the file, never its content.
pub fn read_token(path: &Path) -> io::Result<Token> {
    let text = fs::read_to_string(path).map_err(|error| named(&error, "read", path))?;
    Token::new(&text).map_err(|error| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
    })
}

/// Writes a JSON file so that a reader sees the old content or the new, never half.
///
/// # Errors
/// When the system refuses; the text names the file.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let staged = path.with_extension(format!("json.{}", std::process::id()));
    let text = serde_json::to_vec(value).map_err(io::Error::other)?;
    fs::write(&staged, text).map_err(|error| named(&error, "write", &staged))?;
    fs::rename(&staged, path).map_err(|error| named(&error, "write", path))
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<T> {
    let text = fs::read(path).map_err(|error| named(&error, "read", path))?;
    serde_json::from_slice(&text).map_err(|error| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
    })
}

fn named(error: &io::Error, what: &str, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_made_once_and_only_its_owner_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(&folder.path().join("s"))).unwrap();
        state.create().unwrap();
        let first = state.token_or_new().unwrap();
        assert!(state.token_or_new().unwrap().matches(first.expose()));
        assert_eq!(first.expose().len(), 64);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state.token_file()), 0o600);
        assert_eq!(mode(state.path()), 0o700);
        fs::set_permissions(state.token_file(), Permissions::from_mode(0o644)).unwrap();
        state.token_or_new().unwrap();
        assert_eq!(mode(&state.token_file()), 0o600);
    }

    #[test]
    fn a_broken_endpoint_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path())).unwrap();
        assert_eq!(state.endpoint().unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(state.endpoint_file(), "{").unwrap();
        assert!(state.endpoint().unwrap_err().to_string().contains("endpoint.json"));
        let endpoint = Endpoint { control: "http://127.0.0.1:1".to_owned(), ..Endpoint::default() };
        write_json(&state.endpoint_file(), &endpoint).unwrap();
        assert_eq!(state.endpoint().unwrap(), endpoint);
    }
}
