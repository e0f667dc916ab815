//! Rank <-> coordinates, innermost first: tensor, pipeline, data.

use drumline_spec::Parallelism;
use serde::{Deserialize, Serialize};

/// An axis of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Ranks that share each layer's matrices.
    Tensor,
    /// Ranks that hold successive layers.
    Pipeline,
    /// Ranks that hold copies and share the batch.
    Data,
}

/// One rank's place in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Coords {
    /// Place in its tensor group.
    pub tensor: u32,
    /// Its pipeline stage.
    pub pipeline: u32,
    /// Its copy of the model.
    pub data: u32,
}

/// A mesh of `tensor x pipeline x data` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mesh {
    shape: Parallelism,
}

impl Mesh {
    /// Creates the mesh of a split whose every axis is at least 1.
    ///
    /// # Panics
    /// When an axis is 0: a validated spec has none.
    #[must_use]
    pub fn new(shape: Parallelism) -> Self {
        assert!(shape.world_size() > 0, "a validated split has no axis of 0");
        Self { shape }
    }

    /// Returns the extent of each axis.
    #[must_use]
    pub fn shape(&self) -> Parallelism {
        self.shape
    }

    /// Returns the number of ranks.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.shape.world_size()
    }

    /// Returns the coordinates of `rank`, which must be below [`Mesh::size`].
    #[must_use]
    pub fn coords(&self, rank: u32) -> Coords {
        let Parallelism { tensor, pipeline, .. } = self.shape;
        Coords {
            tensor: rank % tensor,
            pipeline: rank / tensor % pipeline,
            data: rank / (tensor * pipeline),
        }
    }

    /// Returns the rank at `coords`.
    #[must_use]
    pub fn rank(&self, coords: Coords) -> u32 {
        let Parallelism { tensor, pipeline, .. } = self.shape;
        coords.tensor + tensor * (coords.pipeline + pipeline * coords.data)
    }

    /// Returns the ranks that differ from `rank` only along `axis`, itself included, in the order
    /// of that axis. A rank's place in this list is its rank in the group's communicator.
    #[must_use]
    pub fn group(&self, rank: u32, axis: Axis) -> Vec<u32> {
        let own = self.coords(rank);
        let along = |extent: u32, set: fn(&mut Coords, u32)| {
            (0..extent)
                .map(|i| {
                    let mut coords = own;
                    set(&mut coords, i);
                    self.rank(coords)
                })
                .collect()
        };
        match axis {
            Axis::Tensor => along(self.shape.tensor, |c, i| c.tensor = i),
            Axis::Pipeline => along(self.shape.pipeline, |c, i| c.pipeline = i),
            Axis::Data => along(self.shape.data, |c, i| c.data = i),
        }
    }
}
