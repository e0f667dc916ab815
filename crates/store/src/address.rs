//! Where the state lives: `embedded:PATH` or `etcd://HOST:PORT[,HOST:PORT]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use drumline_ports::store::Store;

use crate::embedded::{EmbeddedOpenError, EmbeddedOptions, EmbeddedStore};
#[cfg(feature = "etcd")]
use crate::etcd::{EtcdOpenError, EtcdOptions, EtcdStore};

/// The forms that an address may have, for messages.
const FORMS: &str = "valid forms: embedded:PATH, etcd://HOST:PORT[,HOST:PORT...]";

/// A parsed store address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A file on this machine.
    Embedded {
        /// The file.
        path: PathBuf,
    },
    /// An etcd cluster.
    Etcd {
        /// Its members, each `HOST:PORT`.
        members: Vec<String>,
    },
}

/// Why an address was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("store address {text:?}: {problem}; {FORMS}")]
pub struct AddressError {
    /// The address as given.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refuse = |problem: String| AddressError { text: text.to_owned(), problem };
        if let Some(path) = text.strip_prefix("embedded:") {
            if path.is_empty() {
                return Err(refuse("the path is missing".to_owned()));
            }
            return Ok(Self::Embedded { path: path.into() });
        }
        let Some(list) = text.strip_prefix("etcd://") else {
            return Err(refuse(match text.split_once(':') {
                Some((scheme, _)) => format!("unknown scheme {scheme:?}"),
                None => "no scheme".to_owned(),
            }));
        };
        let members: Vec<String> =
            list.trim_end_matches('/').split(',').map(str::to_owned).collect();
        for member in &members {
            check_member(member).map_err(refuse)?;
        }
        Ok(Self::Etcd { members })
    }
}

/// Checks `HOST:PORT`, with an IPv6 host in brackets.
fn check_member(member: &str) -> Result<(), String> {
    let (host, port) = member.rsplit_once(':').ok_or_else(|| format!("{member:?} has no port"))?;
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let legal = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let host_is_legal = match bare {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(legal),
    };
    if !host_is_legal {
        return Err(format!("{member:?} has no valid host"));
    }
    match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(()),
        _ => Err(format!("{member:?} has no valid port (1 to 65535)")),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded { path } => write!(f, "embedded:{}", path.display()),
            Self::Etcd { members } => write!(f, "etcd://{}", members.join(",")),
        }
    }
}

/// How to open a store, for either adapter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// For `embedded:` addresses.
    pub embedded: EmbeddedOptions,
    /// For `etcd://` addresses.
    #[cfg(feature = "etcd")]
    pub etcd: EtcdOptions,
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The address makes no sense.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The file could not be opened.
    #[error(transparent)]
    Embedded(#[from] EmbeddedOpenError),
    /// The cluster could not be reached.
    #[cfg(feature = "etcd")]
    #[error(transparent)]
    Etcd(#[from] EtcdOpenError),
    /// This build has no etcd adapter.
    #[cfg(not(feature = "etcd"))]
    #[error("store {address} needs etcd, which this build leaves out; build with feature `etcd`")]
    EtcdLeftOut {
        /// The address.
        address: String,
    },
}

/// Opens the store at `address`.
///
/// # Errors
/// [`OpenError`]; the message names the address and says what would help.
pub async fn open(address: &str, options: &OpenOptions) -> Result<Arc<dyn Store>, OpenError> {
    match address.parse()? {
        Address::Embedded { path } => {
            let options = options.embedded.clone();
            let opened = tokio::task::spawn_blocking({
                let path = path.clone();
                move || EmbeddedStore::open(&path, &options)
            });
            match opened.await {
                Ok(store) => Ok(Arc::new(store?)),
                Err(panic) => Err(OpenError::Embedded(EmbeddedOpenError::Corrupt {
                    path,
                    cause: panic.to_string(),
                })),
            }
        }
        #[cfg(feature = "etcd")]
        Address::Etcd { members } => {
            Ok(Arc::new(EtcdStore::connect(&members, &options.etcd).await?))
        }
        #[cfg(not(feature = "etcd"))]
        Address::Etcd { .. } => Err(OpenError::EtcdLeftOut { address: address.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_as_written() {
        for text in
            ["embedded:state/store.redb", "etcd://127.0.0.1:2379", "etcd://a:1,b.example:2,[::1]:3"]
        {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_wrong_address_lists_the_valid_forms() {
        for (text, evidence) in [
            ("", "no scheme"),
            ("embedded:", "path is missing"),
            ("redis://x:1", "unknown scheme \"redis\""),
            ("etcd://", "no port"),
            ("etcd://host", "no port"),
            ("etcd://host:0", "no valid port"),
            ("etcd://host:99999", "no valid port"),
            ("etcd://:2379", "no valid host"),
            ("etcd://a:1,,b:2", "no port"),
            ("etcd://user@host:1", "no valid host"),
            ("etcd://::1:2379", "no valid host"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(evidence), "{error} lacks {evidence}");
            assert!(error.contains("etcd://HOST:PORT"), "{error}");
        }
    }
}
