//! Which part of a global tensor a rank holds.

use serde::{Deserialize, Serialize};

/// A rectangular part of a global tensor, keyed by the tensor's global name.
///
/// Checkpoints are keyed by these, so that another split can read them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardSpec {
    /// Global name, as the Hugging Face layout has it for weights; optimizer moments have a
    /// prefix (`adam.m/`, `adam.v/`).
    pub name: String,
    /// Shape of the whole tensor.
    pub global_shape: Vec<usize>,
    /// Where this part begins, per dimension.
    pub offset: Vec<usize>,
    /// Extent of this part, per dimension.
    pub shape: Vec<usize>,
}

impl ShardSpec {
    /// Returns the number of elements of this part.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}
