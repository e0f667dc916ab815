//! What a rank keeps from step to step: weights, gradients and the optimizer's moments, in flat
//! buffers.
//!
//! With a sharded optimizer (`ZeRO` stage 1: Rajbhandari et al. 2020, section 5.1) the flat buffer
//! is cut into one share for each copy of the model. A copy gets the summed gradients of its share
//! alone, keeps the moments of its share alone, updates its share of the weights, and the copies
//! gather the rest. A moment is the same number whoever keeps it, so checkpoints do not show how
//! the optimizer was shared.

use std::ops::Range;

use drumline_collective::CollectiveError;
use drumline_mesh::ShardSpec;
use drumline_spec::WeightRounding;
use drumline_tensor::{AdamW, Backend, DType, Rounding, TensorError};

use crate::groups::Route;
use crate::init;
use crate::layer::{all, all_mut};
use crate::layout::{ALIGN, Layout, Parameter, Split};
use crate::shards::{FIRST_MOMENT, SECOND_MOMENT, Snapshot, prefixed, scatter};

/// Returns which elements of the flat buffers each copy keeps the optimizer of; one range of all
/// where it is not shared.
pub(crate) fn shares(split: Split, elements: usize) -> Vec<Range<usize>> {
    let copies = if split.shards_optimizer { split.copies } else { 1 };
    drumline_collective::parts(elements, copies, ALIGN)
}

/// The share of the copy that `split` names.
pub(crate) fn share(split: Split, elements: usize) -> Range<usize> {
    let copy = if split.shards_optimizer { split.copy } else { 0 };
    shares(split, elements).swap_remove(copy)
}

fn common(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// How the copy is rounded from element `first` on.
fn rounding(chance: Option<u64>, first: usize) -> Rounding {
    match chance {
        Some(seed) => Rounding::Stochastic { seed, first: first as u64 },
        None => Rounding::Nearest,
    }
}

/// Weights, gradients and moments of one rank.
pub(crate) struct State<B: Backend> {
    pub(crate) parameters: B::Buffer,
    /// The parameters as products read them, where the backend keeps those narrower.
    pub(crate) copy: Option<B::Buffer>,
    pub(crate) gradients: B::Buffer,
    first: B::Buffer,
    second: B::Buffer,
    /// What each copy keeps the moments of.
    shares: Vec<Range<usize>>,
    /// What this rank keeps the moments of.
    own: Range<usize>,
    /// The parts of parameters in it, as they lie in the moments' buffers.
    moments: Vec<Parameter>,
    /// Whether this rank's gradients count towards the global norm.
    speaks: bool,
    /// The seed of the copy's rounding, where that is by chance.
    chance: Option<u64>,
}

impl<B: Backend> State<B> {
    /// Allocates, and initialises the weights from the seed.
    pub(crate) fn new(
        b: &B,
        layout: &Layout,
        split: Split,
        seed: u64,
        rounding: WeightRounding,
    ) -> Result<Self, TensorError> {
        let shares = shares(split, layout.elements);
        let own = share(split, layout.elements);
        let mut moments = layout.parameters.clone();
        if split.shards_optimizer {
            moments = layout.parameters.iter().flat_map(|p| p.within(&own)).collect();
            moments.iter_mut().for_each(|p| p.owner = p.answers);
        }
        let mut parameters = b.alloc(layout.elements)?;
        let mut values = Vec::new();
        for p in &layout.parameters {
            values.resize(p.shard.elements(), 0.0);
            init::fill(seed, p.init, &p.shard, &mut values);
            scatter(b, p, &values, &mut parameters);
        }
        let mut copy = None;
        if b.activation_dtype() != DType::F32 {
            copy = Some(b.alloc_activation(layout.elements)?);
        }
        let mut state = Self {
            parameters,
            copy,
            gradients: b.alloc(layout.elements)?,
            first: b.alloc(own.len())?,
            second: b.alloc(own.len())?,
            // Every copy has the same gradients, or the sums of its share.
            speaks: split.shards_optimizer || split.copy == 0,
            shares,
            own,
            moments,
            chance: (rounding == WeightRounding::Stochastic).then_some(seed),
        };
        state.copy_parameters(b);
        Ok(state)
    }

    /// Makes the copy anew.
    fn copy_parameters(&mut self, b: &B) {
        if let Some(copy) = &mut self.copy {
            let rounding = rounding(self.chance, 0);
            b.copy_rounded(all(b, &self.parameters), all_mut(b, copy), rounding);
        }
    }

    /// Returns the bytes of weights, gradients and moments.
    pub(crate) fn bytes(&self, b: &B) -> [u64; 3] {
        let bytes = |buffer: &B::Buffer| b.bytes(buffer) as u64;
        let moments = bytes(&self.first) + bytes(&self.second);
        let copy = self.copy.as_ref().map_or(0, bytes);
        [bytes(&self.parameters) + copy, bytes(&self.gradients), moments]
    }

    /// Returns the shares of the copies, where the optimizer is shared.
    pub(crate) fn shared(&self) -> Option<&[Range<usize>]> {
        (self.shares.len() > 1).then_some(&self.shares)
    }

    /// Vectors are added to and start from zero; matrices are replaced by the first micro-batch,
    /// but for an embedding without a projection, which only rows are added to.
    pub(crate) fn clear_gradients(&mut self, b: &B, layout: &Layout) {
        b.fill(b.view_mut(&mut self.gradients, layout.decayed..layout.elements), 0.0);
        if let Some(table) = layout.embedding.as_ref().filter(|t| layout.head.as_ref() != Some(t)) {
            b.fill(b.view_mut(&mut self.gradients, table.clone()), 0.0);
        }
    }

    /// Returns this rank's part of the square of the global norm.
    pub(crate) fn sum_squares(&self, b: &B, layout: &Layout) -> f64 {
        if !self.speaks {
            return 0.0;
        }
        let square = |counted: &Range<usize>| {
            b.sum_squares(b.view(&self.gradients, common(counted, &self.own)))
        };
        layout.counted.iter().map(square).sum()
    }

    /// Updates this rank's share of the weights.
    pub(crate) fn update(&mut self, b: &B, layout: &Layout, constants: AdamW) {
        let (decayed, all) = (layout.decayed, layout.elements);
        for (part, weight_decay) in [(0..decayed, constants.weight_decay), (decayed..all, 0.0)] {
            let range = common(&part, &self.own);
            if range.is_empty() {
                continue;
            }
            let kept = range.start - self.own.start..range.end - self.own.start;
            let rounding = rounding(self.chance, range.start);
            b.adamw(
                AdamW { weight_decay, rounding, ..constants },
                b.view_mut(&mut self.parameters, range.clone()),
                self.copy.as_mut().map(|copy| b.view_mut(copy, range.clone())),
                b.view(&self.gradients, range),
                b.view_mut(&mut self.first, kept.clone()),
                b.view_mut(&mut self.second, kept),
            );
        }
    }

    /// Brings the other copies' shares of the weights.
    pub(crate) fn gather(&mut self, b: &B, data: Route<'_, B>) -> Result<(), CollectiveError> {
        data.all_gather_parts(all_mut(b, &mut self.parameters), &self.shares)?;
        self.copy_parameters(b);
        Ok(())
    }

    /// Copies what this rank owns to host memory: weights, then both moments.
    pub(crate) fn snapshot(&self, b: &B, layout: &Layout, mut reuse: Snapshot) -> Snapshot {
        let (weights, moments) = (layout.parameters.as_slice(), self.moments.as_slice());
        reuse.plan(&[("", weights), (FIRST_MOMENT, moments), (SECOND_MOMENT, moments)]);
        let index = reuse.take(b, weights, &self.parameters, 0);
        let index = reuse.take(b, moments, &self.first, index);
        reuse.take(b, moments, &self.second, index);
        reuse
    }

    /// Copies the gradients that this rank owns.
    pub(crate) fn snapshot_gradients(&self, b: &B) -> Snapshot {
        let start = self.own.start;
        let moved = |p: &Parameter| Parameter { start: p.start + start, ..p.clone() };
        let parts: Vec<Parameter> = self.moments.iter().map(moved).collect();
        let mut snapshot = Snapshot::default();
        snapshot.plan(&[("", &parts)]);
        snapshot.take(b, &parts, &self.gradients, 0);
        snapshot
    }

    /// Returns every shard that this rank needs to go on.
    pub(crate) fn needed<'a>(
        &'a self,
        layout: &'a Layout,
    ) -> impl Iterator<Item = ShardSpec> + use<'a, B> {
        let moments = [FIRST_MOMENT, SECOND_MOMENT]
            .into_iter()
            .flat_map(|prefix| self.moments.iter().map(move |p| prefixed(prefix, &p.shard)));
        layout.parameters.iter().map(|p| p.shard.clone()).chain(moments)
    }

    /// Fills every shard that this rank needs from `source`.
    pub(crate) fn load<E>(
        &mut self,
        b: &B,
        layout: &Layout,
        mut source: impl FnMut(&ShardSpec, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut values = Vec::new();
        for (prefix, list, buffer) in [
            ("", &layout.parameters, &mut self.parameters),
            (FIRST_MOMENT, &self.moments, &mut self.first),
            (SECOND_MOMENT, &self.moments, &mut self.second),
        ] {
            for p in list {
                values.resize(p.shard.elements(), 0.0);
                source(&prefixed(prefix, &p.shard), &mut values)?;
                scatter(b, p, &values, buffer);
            }
        }
        self.copy_parameters(b);
        Ok(())
    }
}
