//! The communicators of one rank: over the host for every backend, and beside them, where the device
//! has a way of its own to its peers, groups that take values where they are.

use std::ops::Range;
use std::sync::Arc;

use drumline_collective::{Collective, CollectiveError, ReduceOp};
use drumline_spec::Parallelism;
use drumline_tensor::Backend;

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

/// The same ranks as a [`Collective`], for values that are on the device.
///
/// Calls take their place in the order of the backend's operations and need not wait: what is computed
/// afterwards sees what they bring. So a failure may be told late, by [`DeviceGroup::check`].
pub trait DeviceGroup<B: Backend>: Send + Sync {
    /// Replaces `values` on every rank by the reduction over all ranks.
    ///
    /// # Errors
    /// [`CollectiveError`]; the group is of no use then. So with every call.
    fn all_reduce(&self, values: B::ViewMut<'_>, op: ReduceOp) -> Result<(), CollectiveError>;

    /// Begins a sum beside what is computed afterwards. Nothing uses the values until
    /// [`DeviceGroup::finish`].
    ///
    /// # Errors
    /// As [`DeviceGroup::all_reduce`].
    fn start_sum(&self, values: B::ViewMut<'_>) -> Result<(), CollectiveError>;

    /// Makes what is computed from now on see every sum that was started.
    ///
    /// # Errors
    /// As [`DeviceGroup::all_reduce`].
    fn finish(&self) -> Result<(), CollectiveError>;

    /// Sums `values` over all ranks and leaves each rank its own of `parts`, one for each rank, each
    /// beginning where the one before ends; what the rest holds means nothing.
    ///
    /// # Errors
    /// As [`DeviceGroup::all_reduce`].
    fn reduce_scatter_parts(
        &self,
        values: B::ViewMut<'_>,
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError>;

    /// Fills `values` with each rank's own of `parts`.
    ///
    /// # Errors
    /// As [`DeviceGroup::all_reduce`].
    fn all_gather_parts(
        &self,
        values: B::ViewMut<'_>,
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError>;

    /// Sends `values` to rank `to`. They may be overwritten at once, and nothing waits for the
    /// receiver as long as no more than a few messages are under way.
    ///
    /// # Errors
    /// As [`DeviceGroup::all_reduce`].
    fn send(&self, values: B::View<'_>, to: usize) -> Result<(), CollectiveError>;

    /// Receives values from rank `from`, in the order sent.
    ///
    /// # Errors
    /// As [`DeviceGroup::all_reduce`].
    fn recv(&self, values: B::ViewMut<'_>, from: usize) -> Result<(), CollectiveError>;

    /// Tells an error of anything that was queued before. Does not wait.
    ///
    /// # Errors
    /// As [`DeviceGroup::all_reduce`].
    fn check(&self) -> Result<(), CollectiveError>;
}

/// The device's own groups of one rank, of the ranks of [`Groups`]' groups of the same names. Where
/// there is none, values go through host memory.
pub struct DeviceGroups<B: Backend> {
    /// Ranks that share each layer's matrices.
    pub tensor: Option<Arc<dyn DeviceGroup<B>>>,
    /// The stages of this copy of the model.
    pub pipeline: Option<Arc<dyn DeviceGroup<B>>>,
    /// The copies of this part of the model.
    pub data: Option<Arc<dyn DeviceGroup<B>>>,
}

impl<B: Backend> Default for DeviceGroups<B> {
    fn default() -> Self {
        Self { tensor: None, pipeline: None, data: None }
    }
}

impl<B: Backend> Clone for DeviceGroups<B> {
    fn clone(&self) -> Self {
        let (tensor, pipeline) = (self.tensor.clone(), self.pipeline.clone());
        Self { tensor, pipeline, data: self.data.clone() }
    }
}

impl<B: Backend> DeviceGroups<B> {
    /// Tells an error of anything that was queued before.
    ///
    /// # Errors
    /// [`CollectiveError`].
    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        let all = [&self.tensor, &self.pipeline, &self.data];
        all.into_iter().flatten().try_for_each(|group| group.check())
    }
}

/// One group's ranks, and the way that values of a backend take between them.
pub struct Route<'a, B: Backend> {
    backend: &'a B,
    host: &'a dyn Collective,
    device: Option<&'a dyn DeviceGroup<B>>,
}

impl<B: Backend> Clone for Route<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Route<'_, B> {}

impl<'a, B: Backend> Route<'a, B> {
    pub(crate) fn new(
        backend: &'a B,
        host: &'a dyn Collective,
        device: Option<&'a Arc<dyn DeviceGroup<B>>>,
    ) -> Self {
        Self { backend, host, device: device.map(|group| &**group) }
    }

    /// The number of ranks.
    pub(crate) fn size(self) -> usize {
        self.host.size()
    }

    /// The same ranks over the host: for values that are there, or that are few.
    pub(crate) fn host(self) -> &'a dyn Collective {
        self.host
    }

    pub(crate) fn all_reduce(
        self,
        values: B::ViewMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CollectiveError> {
        match self.device {
            Some(device) => device.all_reduce(values, op),
            None => self.backend.on_host(values, |v| self.host.all_reduce(v, op)),
        }
    }

    pub(crate) fn reduce_scatter_parts(
        self,
        values: B::ViewMut<'_>,
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        match self.device {
            Some(device) => device.reduce_scatter_parts(values, parts),
            None => self.backend.on_host(values, |v| self.host.reduce_scatter_parts(v, parts)),
        }
    }

    pub(crate) fn all_gather_parts(
        self,
        values: B::ViewMut<'_>,
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        match self.device {
            Some(device) => device.all_gather_parts(values, parts),
            None => self.backend.on_host(values, |v| self.host.all_gather_parts(v, parts)),
        }
    }

    pub(crate) fn send(self, values: B::ViewMut<'_>, to: usize) -> Result<(), CollectiveError> {
        match self.device {
            Some(device) => device.send(self.backend.as_view(&values), to),
            None => self.backend.on_host(values, |v| self.host.send(v, to)),
        }
    }

    pub(crate) fn recv(self, values: B::ViewMut<'_>, from: usize) -> Result<(), CollectiveError> {
        match self.device {
            Some(device) => device.recv(values, from),
            None => self.backend.on_host(values, |v| self.host.recv(v, from)),
        }
    }
}
