//! The communicators of one rank.

use std::sync::Arc;

use drumline_collective::Collective;
use drumline_spec::Parallelism;

use crate::error::EngineError;

/// One communicator for each axis, and one for all ranks. A rank's place in each is its
/// coordinate, as [`drumline_mesh::Mesh::group`] orders them.
#[derive(Clone)]
pub struct Groups {
    /// Ranks that share each layer's matrices.
    pub tensor: Arc<dyn Collective>,
    /// The stages of this copy of the model.
    pub pipeline: Arc<dyn Collective>,
    /// The copies of this part of the model.
    pub data: Arc<dyn Collective>,
    /// All ranks.
    pub world: Arc<dyn Collective>,
}

impl Groups {
    /// Checks that the communicators fit a split.
    ///
    /// # Errors
    /// [`EngineError::Group`] names the one that does not.
    pub fn check(&self, split: Parallelism) -> Result<(), EngineError> {
        let world = split.tensor * split.pipeline * split.data;
        for (axis, group, expected) in [
            ("tensor", &self.tensor, split.tensor),
            ("pipeline", &self.pipeline, split.pipeline),
            ("data", &self.data, split.data),
            ("world", &self.world, world),
        ] {
            if group.size() != expected as usize {
                let got = group.size();
                return Err(EngineError::Group { axis, expected: expected as usize, got });
            }
        }
        Ok(())
    }
}
