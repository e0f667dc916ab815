//! Adapters of the state store port: embedded (one redb file) and etcd.
//!
//! [`open()`] takes an address and returns the store behind it. Everything above sees only
//! [`drumline_ports::store::Store`].

mod address;
pub mod embedded;

pub use address::{Address, AddressError, OpenError, OpenOptions, open};
pub use embedded::{EmbeddedOpenError, EmbeddedOptions, EmbeddedStore};
