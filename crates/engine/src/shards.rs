//! Copies of a rank's shards in host memory: what checkpoints are written from.

use std::ops::Range;

use drumline_mesh::ShardSpec;
use drumline_tensor::Backend;

use crate::layout::Parameter;

/// The prefix of a first moment's name.
pub const FIRST_MOMENT: &str = "adam.m/";
/// The prefix of a second moment's name.
pub const SECOND_MOMENT: &str = "adam.v/";

/// A rank's own shards (the replicated ones on one rank alone) at one step, contiguous and in
/// host memory, independent of the trainer: it can be written while training goes on.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    shards: Vec<(ShardSpec, Range<usize>)>,
    values: Vec<f32>,
}

impl Snapshot {
    /// Returns the shards with their values, row-major.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = (&ShardSpec, &[f32])> {
        self.shards.iter().map(|(shard, range)| (shard, &self.values[range.clone()]))
    }

    /// Returns the size of the values in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.values.len() * size_of::<f32>()
    }

    /// Prepares the places for what this rank owns of each list, under its prefix, once.
    pub(crate) fn plan(&mut self, lists: &[(&str, &[Parameter])]) {
        if !self.shards.is_empty() {
            return;
        }
        let mut start = 0;
        for (prefix, list) in lists {
            for p in list.iter().filter(|p| p.owner) {
                let shard = prefixed(prefix, &p.shard);
                let end = start + shard.elements();
                self.shards.push((shard, start..end));
                start = end;
            }
        }
        self.values.resize(start, 0.0);
    }

    /// Copies what this rank owns of `list` out of its buffer to the places from the `index`-th on;
    /// returns the next index.
    pub(crate) fn take<B: Backend>(
        &mut self,
        backend: &B,
        list: &[Parameter],
        buffer: &B::Buffer,
        mut index: usize,
    ) -> usize {
        for p in list.iter().filter(|p| p.owner) {
            let to = &mut self.values[self.shards[index].1.clone()];
            gather(backend, p, buffer, to);
            index += 1;
        }
        index
    }
}

/// Returns `shard` under a prefixed name.
#[must_use]
pub fn prefixed(prefix: &str, shard: &ShardSpec) -> ShardSpec {
    ShardSpec { name: format!("{prefix}{}", shard.name), ..shard.clone() }
}

/// Copies a parameter's elements out of a flat buffer, row-major.
pub(crate) fn gather<B: Backend>(backend: &B, p: &Parameter, from: &B::Buffer, to: &mut [f32]) {
    if p.stride == p.columns {
        return backend.read(backend.view(from, p.start..p.start + p.rows * p.columns), to);
    }
    for (r, row) in to.chunks_exact_mut(p.columns).enumerate() {
        let start = p.start + r * p.stride;
        backend.read(backend.view(from, start..start + p.columns), row);
    }
}

/// Copies a parameter's elements, row-major, into a flat buffer.
pub(crate) fn scatter<B: Backend>(backend: &B, p: &Parameter, from: &[f32], to: &mut B::Buffer) {
    if p.stride == p.columns {
        let range = p.start..p.start + p.rows * p.columns;
        return backend.write(from, backend.view_mut(to, range));
    }
    for (r, row) in from.chunks_exact(p.columns).enumerate() {
        let start = p.start + r * p.stride;
        backend.write(row, backend.view_mut(to, start..start + p.columns));
    }
}
