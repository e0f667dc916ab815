//! Sorts etcd's errors by what may be concluded from them.

use std::error::Error as _;
use std::io;

use etcd_client::Error;

use drumline_ports::store::{LeaseId, Op, Revision, StoreError, Txn};

/// What an error says about the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// No connection was made: it never left this machine.
    NotSent,
    /// etcd answered, and did nothing.
    Definite(Definite),
    /// It may have been done or not, or still be under way.
    Doubtful,
}

/// An answer of etcd's that settles the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Definite {
    Compacted,
    Future,
    NoLease,
    Invalid(String),
    Refused(String),
}

impl Definite {
    /// The port's error. Revisions and leases are filled in by the caller, who knows them.
    pub(super) fn of(self, op: &str) -> StoreError {
        match self {
            Self::Compacted => {
                StoreError::Compacted { requested: Revision(0), oldest: Revision(0) }
            }
            Self::Future => {
                StoreError::FutureRevision { requested: Revision(0), current: Revision(0) }
            }
            Self::NoLease => StoreError::LeaseNotFound { lease: LeaseId(0) },
            Self::Invalid(what) => StoreError::Invalid { op: op.to_owned(), what },
            Self::Refused(cause) => StoreError::unavailable(op, cause),
        }
    }
}

/// gRPC's status codes, by number: the client crate does not pass the type on.
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const OUT_OF_RANGE: i32 = 11;
const UNAUTHENTICATED: i32 = 16;

/// Sorts an error, and says in words what it was.
pub(super) fn sort(error: &Error) -> (Kind, String) {
    let kind = match error {
        Error::GRpcStatus(status) => {
            let message = status.message();
            // What etcd itself answers begins so; else the client or something between made it up.
            let own = message.starts_with("etcdserver:");
            match i32::from(status.code()) {
                OUT_OF_RANGE if message.contains("compacted") => {
                    Kind::Definite(Definite::Compacted)
                }
                OUT_OF_RANGE if message.contains("future") => Kind::Definite(Definite::Future),
                NOT_FOUND if message.contains("lease") => Kind::Definite(Definite::NoLease),
                INVALID_ARGUMENT if own => Kind::Definite(Definite::Invalid(message.to_owned())),
                PERMISSION_DENIED | UNAUTHENTICATED | FAILED_PRECONDITION | RESOURCE_EXHAUSTED
                    if own =>
                {
                    Kind::Definite(Definite::Refused(message.to_owned()))
                }
                _ if never_connected(status.source()) => Kind::NotSent,
                _ => Kind::Doubtful,
            }
        }
        Error::TransportError(transport) if never_connected(transport.source()) => Kind::NotSent,
        // The client's own words for an answer without time to live.
        Error::LeaseKeepAliveError(text) if text == "lease not found" => {
            Kind::Definite(Definite::NoLease)
        }
        Error::InvalidArgs(text) => Kind::Definite(Definite::Invalid(text.clone())),
        _ => Kind::Doubtful,
    };
    (kind, words(error))
}

/// Whether the cause is that no connection came about, so that nothing can have been sent.
fn never_connected(mut source: Option<&(dyn std::error::Error + 'static)>) -> bool {
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return matches!(
                io.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
            );
        }
        source = error.source();
    }
    false
}

/// The innermost cause says most: the layers above only say that a transport failed.
fn words(error: &Error) -> String {
    let (head, mut source) = match error {
        Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        Error::TransportError(transport) => (transport.to_string(), transport.source()),
        other => (other.to_string(), other.source()),
    };
    let mut innermost = None;
    while let Some(error) = source {
        innermost = Some(error.to_string());
        source = error.source();
    }
    match innermost {
        Some(cause) if !head.contains(&cause) => format!("{head}: {cause}"),
        _ => head,
    }
}

/// Says which lease was missing, where only one can have been.
pub(super) fn name_lease(error: StoreError, txn: &Txn) -> StoreError {
    let StoreError::LeaseNotFound { .. } = error else {
        return error;
    };
    let ops = txn.then_ops.iter().chain(&txn.else_ops);
    let mut leases = ops.filter_map(|op| match op {
        Op::Put { lease, .. } => *lease,
        _ => None,
    });
    let lease = leases.next().unwrap_or(LeaseId(0));
    StoreError::LeaseNotFound { lease }
}
