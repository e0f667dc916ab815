//! What goes over the wire: messages generated from `proto/`, and the only conversions between
//! them and the domain.

pub mod auth;
pub mod contract;
pub mod convert;
pub mod line;
pub mod rank_host;

/// Messages, clients and servers of `drumline.v1alpha1`.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("drumline.v1alpha1");
}

impl v1::JobView {
    /// Returns whether the job has ended for good.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.phase.as_str(), "succeeded" | "failed" | "cancelled")
    }
}

/// Returns milliseconds since the Unix epoch, as every `at_ms` of the messages has it.
#[must_use]
pub fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// The longest message that any of our servers or clients takes, in bytes.
pub const MESSAGE_MAX_BYTES: usize = 8 << 20;
