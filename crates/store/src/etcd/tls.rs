//! Certificates for the way to etcd.

use std::io;
use std::path::{Path, PathBuf};

use etcd_client::{Certificate, Identity, TlsOptions};

/// Files in PEM form. The certificate and the key come together or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsFiles {
    /// Who may vouch for the servers; `None` uses the system's authorities.
    pub ca: Option<PathBuf>,
    /// This client's certificate.
    pub cert: Option<PathBuf>,
    /// This client's private key.
    pub key: Option<PathBuf>,
    /// The name in the servers' certificates, where it is not the host of the address.
    pub server_name: Option<String>,
}

/// Why certificates could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("etcd {what} {} cannot be read: {source}", .path.display())]
    Unreadable {
        /// Which of the files.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("etcd {what} {} holds no PEM block \"BEGIN {block}\"", .path.display())]
    NotPem {
        /// Which of the files.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What it should hold.
        block: &'static str,
    },
    /// A certificate without key, or the other way round.
    #[error(
        "etcd client authentication needs both a certificate and a key; only the {given} is given"
    )]
    Half {
        /// The one that is given.
        given: &'static str,
    },
}

impl TlsFiles {
    /// Reads the files.
    pub(super) async fn load(&self) -> Result<TlsOptions, TlsError> {
        let mut tls = TlsOptions::new();
        match &self.ca {
            Some(path) => {
                let ca = pem("certificate authority", path, "CERTIFICATE").await?;
                tls = tls.ca_certificate(Certificate::from_pem(ca));
            }
            None => tls = tls.with_enabled_roots(),
        }
        match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                let cert = pem("certificate", cert, "CERTIFICATE").await?;
                let key = pem("key", key, "").await?;
                tls = tls.identity(Identity::from_pem(cert, key));
            }
            (Some(_), None) => return Err(TlsError::Half { given: "certificate" }),
            (None, Some(_)) => return Err(TlsError::Half { given: "key" }),
            (None, None) => {}
        }
        if let Some(name) = &self.server_name {
            tls = tls.domain_name(name);
        }
        Ok(tls)
    }
}

/// Reads a PEM file; `block` may be empty where several kinds of block do.
async fn pem(what: &'static str, path: &Path, block: &'static str) -> Result<String, TlsError> {
    let text = tokio::fs::read_to_string(path).await;
    let text =
        text.map_err(|source| TlsError::Unreadable { what, path: path.to_owned(), source })?;
    if !text.contains(&format!("-----BEGIN {block}")) {
        return Err(TlsError::NotPem { what, path: path.to_owned(), block });
    }
    Ok(text)
}
