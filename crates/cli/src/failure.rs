//! How a command ends without success: the cause, a hint, and whose turn it is.

use std::fmt;
use std::io;

use tonic::{Code, Status};

/// Whose failure it is. The number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The job or service failed, or the command could not do its work.
    Failed = 1,
    /// The user's mistake: an argument, a manifest, an id.
    User = 2,
    /// The cluster cannot be reached.
    Unreachable = 3,
}

/// Why a command ended without success.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Whose failure it is.
    pub class: Class,
    /// What happened, and where; empty when everything has been said already.
    pub cause: String,
    /// What would help.
    pub hint: Option<String>,
    /// The reader of standard output has gone away: nothing is wrong.
    broken_pipe: bool,
}

impl Failure {
    /// The work failed.
    pub fn failed(cause: impl Into<String>) -> Self {
        Self::new(Class::Failed, cause)
    }

    /// The user made a mistake.
    pub fn user(cause: impl Into<String>) -> Self {
        Self::new(Class::User, cause)
    }

    /// The cluster cannot be reached.
    pub fn unreachable(cause: impl Into<String>) -> Self {
        Self::new(Class::Unreachable, cause)
    }

    /// Everything has been printed; only the exit code is left.
    #[must_use]
    pub fn said(class: Class) -> Self {
        Self::new(class, "")
    }

    fn new(class: Class, cause: impl Into<String>) -> Self {
        Self { class, cause: cause.into(), hint: None, broken_pipe: false }
    }

    /// Adds what would help.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sorts a status of the control plane at `address`.
    #[must_use]
    pub fn from_status(status: &Status, address: &str) -> Self {
        let said = status.message();
        let is_kubernetes = address.starts_with(drumline_operator::front::SCHEME);
        match status.code() {
            Code::Unavailable if is_kubernetes => {
                Self::unreachable(format!("cannot reach the cluster at {address}: {said}"))
                    .hint("does `kubectl get --raw /readyz` answer with this context?")
            }
            Code::Unauthenticated | Code::PermissionDenied if is_kubernetes => {
                Self::user(format!("the API server of {address} refused: {said}"))
                    .hint("ask for the cluster role `edit` in the namespace; for nodes and queues, `drumline-fleet-view`")
            }
            Code::Unimplemented if is_kubernetes => Self::user(said),
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
                Self::unreachable(format!("cannot reach the cluster at {address}: {}", cause(status)))
                    .hint("is it running? `drumline up` starts one on this machine, `--endpoint` names another")
            }
            Code::Unauthenticated | Code::PermissionDenied => {
                Self::user(format!("{address} refused the token: {said}"))
                    .hint("name the cluster's token file with `--token-file`, or its state folder with `--state-dir`")
            }
            Code::InvalidArgument | Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition
            | Code::OutOfRange => Self::user(said),
            Code::Unimplemented => Self::failed(format!("{address} does not know this call: {said}"))
                .hint("is the control plane older than this program? see `drumline version --cluster`"),
            Code::Internal if said.contains("h2 protocol error") => {
                Self::unreachable(format!("what listens at {address} is no control plane: {said}"))
                    .hint("one that serves other machines is named https://, and its certificate with `--ca`")
            }
            _ => Self::failed(format!("{address} answered: {said}")),
        }
    }

    /// Returns whether trying again later could help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.class == Class::Unreachable
    }

    /// Returns the exit code.
    #[must_use]
    pub fn code(&self) -> u8 {
        if self.broken_pipe { 0 } else { self.class as u8 }
    }

    /// Writes the failure to standard error, unless there is nothing to say.
    pub fn report(&self) {
        if !self.broken_pipe && !self.cause.is_empty() {
            let red = crate::output::stderr_is_coloured();
            let label = if red { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
            crate::output::note(&format!("{label} {}", self.cause));
            if let Some(hint) = &self.hint {
                crate::output::note(&format!("  hint: {hint}"));
            }
        }
    }
}

/// Returns the innermost cause that a transport error carries: "connection refused", not
/// "transport error".
fn cause(status: &Status) -> String {
    let cause = std::error::Error::source(status);
    cause.map_or_else(|| status.message().to_owned(), drumline_wire::line::deepest)
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

impl std::error::Error for Failure {}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let broken_pipe = error.kind() == io::ErrorKind::BrokenPipe;
        Self { broken_pipe, ..Self::failed(error.to_string()) }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(failure) => failure,
            Err(error) => Self::failed(format!("{error:#}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_sort_into_the_three_exit_codes() {
        for (code, exit) in [
            (Code::Unavailable, 3),
            (Code::DeadlineExceeded, 3),
            (Code::NotFound, 2),
            (Code::InvalidArgument, 2),
            (Code::Unauthenticated, 2),
            (Code::Internal, 1),
            (Code::ResourceExhausted, 1),
        ] {
            let failure = Failure::from_status(&Status::new(code, "x"), "http://h:1");
            assert_eq!(failure.code(), exit, "{code:?}");
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).code(), 0);
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::NotFound)).code(), 1);
    }
}
