//! Adapters of the state store port: embedded (one redb file) and etcd.
//!
//! [`open()`] takes an address and returns the store behind it. Everything above sees only
//! [`drumline_ports::store::Store`].

mod address;
pub mod bench;
pub mod embedded;
#[cfg(feature = "etcd")]
pub mod etcd;

pub use address::{Address, AddressError, OpenError, OpenOptions, open};
pub use embedded::{EmbeddedOpenError, EmbeddedOptions, EmbeddedStore};
#[cfg(feature = "etcd")]
pub use etcd::{EtcdOpenError, EtcdOptions, EtcdStore, TlsError, TlsFiles};
