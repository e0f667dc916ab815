//! Why the engine could not do as asked.

use drumline_collective::CollectiveError;
use drumline_mesh::ScheduleError;
use drumline_tensor::TensorError;

/// Why the engine could not do as asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// A peer is gone, silent or out of step.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The device has no memory or no threads left.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// The pipeline has no schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The model cannot be split so.
    #[error("{field}: {message}")]
    Split {
        /// The manifest field at fault.
        field: &'static str,
        /// What is wrong, with the numbers.
        message: String,
    },
    /// The communicators do not fit the split.
    #[error("the {axis} group has {got} ranks, the split has {expected}")]
    Group {
        /// Which group.
        axis: &'static str,
        /// What the split asks for.
        expected: usize,
        /// What was given.
        got: usize,
    },
    /// A batch has the wrong shape.
    #[error("a batch has {got} {what}, expected {expected}")]
    Batch {
        /// What was counted.
        what: &'static str,
        /// What the job asks for.
        expected: usize,
        /// What was given.
        got: usize,
    },
    /// A token is not in the vocabulary.
    #[error("token {token} is not below the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// The size of the vocabulary.
        vocab: u32,
    },
    /// The loss is no longer a number: the run has diverged.
    #[error("the loss of step {step} is {loss}: the run has diverged")]
    Diverged {
        /// The step.
        step: u64,
        /// The loss.
        loss: f32,
    },
    /// Weights could not be had.
    #[error("failed to load {name}: {message}")]
    Load {
        /// The tensor.
        name: String,
        /// What the source said.
        message: String,
    },
    /// A message from the leader cannot be read.
    #[error("a step plan is malformed: {0}")]
    Plan(&'static str),
}
