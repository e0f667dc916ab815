//! The weights of a served model: matrices stored as the service asks, vectors as f32.

use std::collections::BTreeMap;
use std::ops::Range;

use drumline_mesh::ShardSpec;
use drumline_tensor::{Backend, DType, Linear, TensorError, WeightLayout};

use crate::layout::{Layout, LinearAt, NormAt, Parameter};
use crate::shards::scatter;

/// One rank's weights.
pub(super) struct Weights<B: Backend> {
    /// By where they begin in the layout. A tied head and embedding are one.
    matrices: BTreeMap<usize, B::Matrix>,
    /// Gains, biases and learned positions.
    pub(super) vectors: B::Buffer,
    /// The layout, with the ranges of vectors moved to where they are here. Ranges of matrices stay:
    /// they name them.
    pub(super) layout: Layout,
    /// Where vectors began.
    offset: usize,
}

impl<B: Backend> Weights<B> {
    /// Allocates zeros for every matrix and vector of a layout, for a model of width `hidden`.
    pub(super) fn new(
        b: &B,
        mut layout: Layout,
        hidden: usize,
        dtype: DType,
    ) -> Result<Self, TensorError> {
        let mut matrices = BTreeMap::new();
        let mut add = |range: &Range<usize>, input: usize, layout: WeightLayout| {
            if !matrices.contains_key(&range.start) && input > 0 {
                let s = Linear { rows: 0, input, output: range.len() / input, layout };
                matrices.insert(range.start, b.alloc_matrix(dtype, s)?);
            }
            Ok::<_, TensorError>(())
        };
        for table in [&layout.embedding, &layout.head].into_iter().flatten() {
            add(table, hidden, WeightLayout::OutIn)?;
        }
        for layer in &layout.layers {
            for from_hidden in [&layer.qkv, &layer.up] {
                add(&from_hidden.weight, hidden, layout.orientation)?;
            }
            for to_hidden in [&layer.project, &layer.down] {
                add(&to_hidden.weight, to_hidden.weight.len() / hidden, layout.orientation)?;
            }
        }
        let offset = layout.decayed;
        let vectors = b.alloc(layout.elements - offset)?;
        move_vectors(&mut layout, offset);
        Ok(Self { matrices, vectors, layout, offset })
    }

    /// Returns the matrix of a range of the layout.
    pub(super) fn matrix(&self, range: &Range<usize>) -> &B::Matrix {
        self.matrices.get(&range.start).expect("`new` has made one for every range")
    }

    /// Returns the memory that matrices and vectors take, in bytes.
    pub(super) fn bytes(&self, b: &B) -> usize {
        let matrices: usize = self.matrices.values().map(|m| b.matrix_bytes(m)).sum();
        matrices + b.elements(&self.vectors) * size_of::<f32>()
    }

    /// Fills everything from `source`, one matrix at a time.
    pub(super) fn load<E>(
        &mut self,
        b: &B,
        mut source: impl FnMut(&ShardSpec, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let parameters = std::mem::take(&mut self.layout.parameters);
        // Once, and as large as needed: what grows step by step leaves its pieces behind.
        let greatest = |lengths: &mut dyn Iterator<Item = usize>| lengths.max().unwrap_or(0);
        let in_parts =
            parameters.iter().filter(|p| p.start >= self.offset || p.stride != p.columns);
        let mut part = Vec::with_capacity(greatest(&mut in_parts.map(|p| p.shard.elements())));
        let ranges = ranges(&self.layout);
        let mut whole: Vec<f32> = Vec::with_capacity(greatest(&mut ranges.iter().map(Range::len)));
        let (matrices, vectors): (Vec<_>, Vec<_>) =
            parameters.iter().partition(|p| p.start < self.offset);
        for p in vectors {
            part.resize(p.shard.elements(), 0.0);
            source(&p.shard, &mut part)?;
            let here = Parameter { start: p.start - self.offset, ..p.clone() };
            scatter(b, &here, &part, &mut self.vectors);
        }
        for (range, matrix) in ranges.iter().zip(self.matrices.values_mut()) {
            whole.clear();
            whole.resize(range.len(), 0.0);
            for p in matrices.iter().filter(|p| range.contains(&p.start)) {
                if p.stride == p.columns {
                    let at = p.start - range.start;
                    source(&p.shard, &mut whole[at..at + p.shard.elements()])?;
                    continue;
                }
                part.resize(p.shard.elements(), 0.0);
                source(&p.shard, &mut part)?;
                for (r, row) in part.chunks_exact(p.columns.max(1)).enumerate() {
                    let at = p.start - range.start + r * p.stride;
                    whole[at..at + p.columns].copy_from_slice(row);
                }
            }
            b.write_matrix(&whole, matrix);
        }
        self.layout.parameters = parameters;
        Ok(())
    }
}

/// The ranges of all matrices, in order, each once.
fn ranges(layout: &Layout) -> Vec<Range<usize>> {
    let tables = [&layout.embedding, &layout.head].into_iter().flatten();
    let layers = layout
        .layers
        .iter()
        .flat_map(|l| [&l.qkv.weight, &l.project.weight, &l.up.weight, &l.down.weight]);
    let mut ranges: Vec<_> = tables.chain(layers).cloned().collect();
    ranges.sort_by_key(|range| range.start);
    ranges.dedup();
    ranges
}

/// Moves the ranges of vectors down by `offset`.
fn move_vectors(layout: &mut Layout, offset: usize) {
    let moved = |range: &mut Range<usize>| {
        *range = range.start - offset..range.end - offset;
    };
    let norm = |at: &mut NormAt| {
        moved(&mut at.gain);
        at.bias.iter_mut().for_each(moved);
    };
    let linear = |at: &mut LinearAt| at.bias.iter_mut().for_each(moved);
    layout.positions.iter_mut().for_each(moved);
    layout.final_norm.iter_mut().for_each(norm);
    for layer in &mut layout.layers {
        norm(&mut layer.norm1);
        norm(&mut layer.norm2);
        for at in [&mut layer.qkv, &mut layer.project, &mut layer.up, &mut layer.down] {
            linear(at);
        }
    }
}
