//! What a store operation can fail with, sorted by what the caller may conclude.

use super::model::{LeaseId, Revision};

/// Why an operation of a [`Store`](super::Store) failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The write may or may not have been applied, and may still be: read back.
    #[error("outcome of {op} is unknown: {cause}")]
    Unknown {
        /// What was attempted, with its first key.
        op: String,
        /// What went wrong underneath.
        cause: String,
    },
    /// Nothing was changed, and nothing could be read.
    #[error("store unavailable during {op}: {cause}")]
    Unavailable {
        /// What was attempted.
        op: String,
        /// What went wrong underneath.
        cause: String,
    },
    /// History before `oldest` is gone: list again and watch from there.
    #[error("history from revision {requested} was compacted; the oldest kept is {oldest}")]
    Compacted {
        /// The revision asked for.
        requested: Revision,
        /// The first revision that a watch may start from.
        oldest: Revision,
    },
    /// The revision lies beyond the store's own: it is not the store the caller last saw.
    #[error("revision {requested} lies in the future of a store at {current}")]
    FutureRevision {
        /// The revision asked for.
        requested: Revision,
        /// The store's present revision.
        current: Revision,
    },
    /// The lease has expired or was revoked.
    #[error("lease {lease} does not exist: it expired or was revoked")]
    LeaseNotFound {
        /// The lease asked for.
        lease: LeaseId,
    },
    /// The request breaks a limit or contradicts itself; it was not sent.
    #[error("invalid {op}: {what}")]
    Invalid {
        /// What was attempted.
        op: String,
        /// The rule and the figure that broke it.
        what: String,
    },
    /// The store answered with something that breaks its contract.
    #[error("store returned corrupt data during {op}: {what}")]
    Corrupt {
        /// What was attempted.
        op: String,
        /// What was found.
        what: String,
    },
}

impl StoreError {
    /// Builds [`StoreError::Unknown`].
    pub fn unknown(op: impl Into<String>, cause: impl ToString) -> Self {
        Self::Unknown { op: op.into(), cause: cause.to_string() }
    }

    /// Builds [`StoreError::Unavailable`].
    pub fn unavailable(op: impl Into<String>, cause: impl ToString) -> Self {
        Self::Unavailable { op: op.into(), cause: cause.to_string() }
    }

    /// Whether trying the same call again later can succeed without any other change.
    ///
    /// True for reads that failed with it and for writes that surely were not applied.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// Whether a write that failed with this error may nevertheless have been applied.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown { .. })
    }

    /// Whether a watch that failed with this error must start from a new listing.
    #[must_use]
    pub fn needs_listing(&self) -> bool {
        matches!(self, Self::Compacted { .. } | Self::FutureRevision { .. })
    }
}
