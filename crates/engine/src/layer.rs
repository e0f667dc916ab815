//! One stage's decoder layers, forward, with tensor parallelism inside.
//!
//! Column-parallel halves (qkv, up) need no communication; after each row-parallel half (project,
//! down) the tensor group adds its partial results, and in the backward pass it adds the partial
//! gradients of each half's input. Source: Shoeybi et al. 2019, section 3.
//!
//! Where the group shares the rows, each rank keeps its part of the residual stream: a
//! reduce-scatter takes the place of each of these sums, and an all-gather comes before each
//! column-parallel half. Source: Korthikanti et al. 2022, section 4.2.

use std::ops::Range;

use drumline_collective::{CollectiveError, ReduceOp};
use drumline_spec::Recompute;
use drumline_tensor::{Backend, Linear, WeightLayout};

use crate::activations::{Dims, LayerMemory, Scratch, Slot};
use crate::groups::Route;
use crate::layout::{LayerAt, Layout, LinearAt, NormAt};
use crate::probe::{Probe, Span, timed};

/// What the layers of a stage work with.
pub struct Stage<'a, B: Backend, P: Probe> {
    /// The device.
    pub backend: &'a B,
    /// Who watches.
    pub probe: &'a P,
    /// The tensor group.
    pub tensor: Route<'a, B>,
    /// Extents.
    pub dims: Dims,
    /// Where parameters are.
    pub layout: &'a Layout,
    /// The parameters.
    pub parameters: &'a B::Buffer,
    /// The same as products read them, where the backend keeps those narrower.
    pub copy: Option<&'a B::Buffer>,
    /// The rotary table, for families that have one.
    pub rotary: Option<&'a B::Buffer>,
    /// The position of every row.
    pub positions: &'a [u32],
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// The rows of each rank, in elements of `[N, D]`, where the tensor group shares them.
    pub rows: Option<&'a [Range<usize>]>,
}

/// Returns the whole of a buffer, to be read.
pub(crate) fn all<'a, B: Backend>(b: &B, buffer: &'a B::Buffer) -> B::View<'a> {
    b.view(buffer, 0..b.elements(buffer))
}

/// Returns the whole of a buffer, to be written.
pub(crate) fn all_mut<'a, B: Backend>(b: &B, buffer: &'a mut B::Buffer) -> B::ViewMut<'a> {
    let elements = b.elements(buffer);
    b.view_mut(buffer, 0..elements)
}

/// Adds the ranks' values, unless the group has one rank only.
pub(crate) fn add_over<B: Backend, P: Probe>(
    probe: &P,
    span: Span,
    group: Route<'_, B>,
    values: B::ViewMut<'_>,
) -> Result<(), CollectiveError> {
    if group.size() == 1 {
        return Ok(());
    }
    timed(probe, span, || group.all_reduce(values, ReduceOp::Sum))
}

impl<B: Backend, P: Probe> Stage<'_, B, P> {
    pub(crate) fn parameter(&self, range: &Range<usize>) -> B::View<'_> {
        self.backend.view(self.parameters, range.clone())
    }

    /// Returns parameters as a product reads them, its bias among them.
    pub(crate) fn of_product(&self, range: &Range<usize>) -> B::View<'_> {
        self.backend.view(self.copy.unwrap_or(self.parameters), range.clone())
    }

    pub(crate) fn bias(&self, at: &LinearAt) -> Option<B::View<'_>> {
        at.bias.as_ref().map(|r| self.parameter(r))
    }

    /// Describes the layer `at`, of `input` columns, for `rows` rows.
    pub(crate) fn shape(&self, at: &LinearAt, rows: usize, input: usize) -> Linear {
        Linear { rows, input, output: at.weight.len() / input, layout: self.layout.orientation }
    }

    /// Describes the output projection, which lies as the embedding does.
    pub(crate) fn head_shape(&self, rows: usize) -> Linear {
        Linear {
            rows,
            input: self.dims.hidden,
            output: self.layout.vocab_rows,
            layout: WeightLayout::OutIn,
        }
    }

    /// Computes the linear layer `at`. The bias of a row-parallel layer is left to what follows
    /// the all-reduce.
    pub(crate) fn linear(
        &self,
        at: &LinearAt,
        (rows, input): (usize, usize),
        x: B::View<'_>,
        y: B::ViewMut<'_>,
        with_bias: bool,
    ) {
        let bias = at.bias.as_ref().filter(|_| with_bias).map(|r| self.of_product(r));
        let shape = self.shape(at, rows, input);
        timed(self.probe, Span::Matmul, || {
            self.backend.linear(shape, x, self.of_product(&at.weight), bias, y);
        });
    }

    /// Normalises `x`.
    pub(crate) fn norm(
        &self,
        at: &NormAt,
        rows: usize,
        x: B::View<'_>,
        y: B::ViewMut<'_>,
        stats: B::ViewMut<'_>,
    ) {
        let bias = at.bias.as_ref().map(|r| self.parameter(r));
        timed(self.probe, Span::Other, || {
            let gain = self.parameter(&at.gain);
            self.backend.norm(self.dims.normalise(rows), x, gain, bias, y, stats);
        });
    }

    /// Adds a branch, with the bias of the linear layer that made it, to the residual stream and
    /// normalises the sum.
    #[expect(clippy::too_many_arguments, reason = "a fused operation has many operands")]
    pub(crate) fn add_norm(
        &self,
        at: &NormAt,
        rows: usize,
        x: B::View<'_>,
        branch: B::View<'_>,
        from: &LinearAt,
        sum: B::ViewMut<'_>,
        y: B::ViewMut<'_>,
        stats: B::ViewMut<'_>,
    ) {
        let bias = at.bias.as_ref().map(|r| self.parameter(r));
        timed(self.probe, Span::Other, || {
            let shape = self.dims.normalise(rows);
            let gain = self.parameter(&at.gain);
            self.backend.add_norm(shape, x, branch, self.bias(from), sum, gain, bias, y, stats);
        });
    }

    /// Adds the tensor group's partial results.
    pub(crate) fn add_partial(&self, values: B::ViewMut<'_>) -> Result<(), CollectiveError> {
        add_over(self.probe, Span::TensorComm, self.tensor, values)
    }

    /// Adds the tensor group's partial results `[N, D]`; where the group shares the rows, this
    /// rank's rows hold sums then, and the others nothing of use.
    pub(crate) fn sum_rows(&self, values: &mut B::Buffer) -> Result<(), CollectiveError> {
        let b = self.backend;
        let values = all_mut(b, values);
        let Some(rows) = self.rows else { return self.add_partial(values) };
        timed(self.probe, Span::TensorComm, || self.tensor.reduce_scatter_parts(values, rows))
    }

    /// Returns this rank's rows of `[N, D]`.
    pub(crate) fn own_rows<'b>(&self, values: &'b B::Buffer) -> B::View<'b> {
        self.backend.view(values, self.dims.own())
    }

    /// Returns all rows `[N, D]` of `own` `[R, D]`: it is all, or the ranks bring theirs to
    /// `gathered`.
    pub(crate) fn every_row<'b>(
        &self,
        own: &'b B::Buffer,
        gathered: &'b mut Option<B::Buffer>,
    ) -> Result<&'b B::Buffer, CollectiveError> {
        let b = self.backend;
        let (Some(rows), Some(gathered)) = (self.rows, gathered) else { return Ok(own) };
        timed(self.probe, Span::TensorComm, || {
            b.copy(all(b, own), b.view_mut(gathered, self.dims.own()));
            self.tensor.all_gather_parts(all_mut(b, gathered), rows)
        })?;
        Ok(gathered)
    }

    /// Applies the non-linearity.
    pub(crate) fn activate(&self, up: B::View<'_>, act: B::ViewMut<'_>) {
        timed(self.probe, Span::Other, || {
            if self.dims.up == self.dims.ffn {
                self.backend.gelu(up, act);
            } else {
                self.backend.swiglu(self.dims.ffn, up, act);
            }
        });
    }

    /// Looks tokens up, and positions where they are learned, into `x` `[R, D]`. `scratch` is
    /// `[N, D]`.
    ///
    /// # Errors
    /// [`CollectiveError`] from the tensor group.
    pub fn embed(
        &self,
        tokens: &[u32],
        x: &mut B::Buffer,
        scratch: &mut B::Buffer,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims.hidden);
        let Some(table) = &self.layout.embedding else { return Ok(()) };
        let offset = self.layout.vocab_offset;
        let look_up = |to: &mut B::Buffer| {
            timed(self.probe, Span::Other, || {
                b.embed(d, tokens, offset, self.parameter(table), all_mut(b, to), false);
            });
        };
        if self.rows.is_some() {
            look_up(scratch);
            self.sum_rows(scratch)?;
            b.copy(self.own_rows(scratch), all_mut(b, x));
        } else {
            look_up(x);
            self.sum_rows(x)?;
        }
        if let Some(table) = &self.layout.positions {
            let first = self.dims.own_start;
            let own = &self.positions[first..first + self.dims.own_rows];
            timed(self.probe, Span::Other, || {
                b.embed(d, own, 0, self.parameter(table), all_mut(b, x), true);
            });
        }
        Ok(())
    }

    /// Runs the stage's layers from `slot.layers[0].x` to `slot.out`; on the last stage, to the
    /// normalised output.
    ///
    /// # Errors
    /// [`CollectiveError`] from the tensor group.
    pub fn forward(
        &self,
        slot: &mut Slot<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), CollectiveError> {
        let (b, rows) = (self.backend, self.dims.own_rows);
        let again = self.recompute != Recompute::None;
        for index in 0..slot.layers.len() {
            let place = slot.first + index;
            let at = &self.layout.layers[place];
            let (this, rest) = slot.layers[index..].split_first_mut().expect("index is in range");
            this.exchange(&mut scratch.layer, self.recompute);
            if index == 0 || again {
                self.first_norm(at, this);
            }
            self.attention_forward(place, this, scratch)?;
            self.expand(at, this, scratch)?;
            self.contract(at, this, scratch)?;
            let (mid, branch) = (all(b, &this.mid), self.own_rows(&scratch.branch));
            let add = |sum: &mut B::Buffer| {
                timed(self.probe, Span::Other, || {
                    b.add(mid, branch, self.bias(&at.down), all_mut(b, sum));
                });
            };
            // The sum opens the next layer, or the final norm, or leaves the stage.
            match (rest.first_mut(), &mut slot.last, &self.layout.final_norm) {
                // Where the next layer's normalised input will be is still in use.
                (Some(next), ..) if again => add(&mut next.x),
                (Some(next), ..) => {
                    let norm = &self.layout.layers[place + 1].norm1;
                    let (x, a1) = (all_mut(b, &mut next.x), all_mut(b, &mut next.a1));
                    let stats = all_mut(b, &mut next.stats1);
                    self.add_norm(norm, rows, mid, branch, &at.down, x, a1, stats);
                }
                (None, Some(last), Some(norm)) => {
                    let (y, stats) = (all_mut(b, &mut last.y), all_mut(b, &mut last.stats));
                    let out = all_mut(b, &mut slot.out);
                    self.add_norm(norm, rows, mid, branch, &at.down, out, y, stats);
                }
                (None, ..) => add(&mut slot.out),
            }
            this.exchange(&mut scratch.layer, self.recompute);
        }
        Ok(())
    }

    /// Normalises what enters a layer.
    pub(crate) fn first_norm(&self, at: &LayerAt, m: &mut LayerMemory<B>) {
        let b = self.backend;
        let (a1, stats) = (all_mut(b, &mut m.a1), all_mut(b, &mut m.stats1));
        self.norm(&at.norm1, self.dims.own_rows, all(b, &m.x), a1, stats);
    }

    /// From the normalised input to the sum with attention, normalised.
    pub(crate) fn attention_forward(
        &self,
        index: usize,
        m: &mut LayerMemory<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims);
        let at = &self.layout.layers[index];
        let a1 = self.every_row(&m.a1, &mut scratch.gathered)?;
        self.linear(&at.qkv, (d.rows, d.hidden), all(b, a1), all_mut(b, &mut m.qkv), true);
        if let Some(table) = self.rotary {
            timed(self.probe, Span::Other, || {
                let qkv = all_mut(b, &mut m.qkv);
                b.rotary(d.rotation(d.rows, false), all(b, table), self.positions, qkv);
            });
        }
        timed(self.probe, Span::Attention, || {
            let (out, lse) = (all_mut(b, &mut m.attended), all_mut(b, &mut m.lse));
            b.attention(d.attention(), all(b, &m.qkv), out, lse);
        });
        let branch = all_mut(b, &mut scratch.branch);
        let input = (d.rows, d.attention_width());
        self.linear(&at.project, input, all(b, &m.attended), branch, false);
        self.sum_rows(&mut scratch.branch)?;
        let (x, branch) = (all(b, &m.x), self.own_rows(&scratch.branch));
        let (mid, a2) = (all_mut(b, &mut m.mid), all_mut(b, &mut m.a2));
        let stats = all_mut(b, &mut m.stats2);
        self.add_norm(&at.norm2, d.own_rows, x, branch, &at.project, mid, a2, stats);
        Ok(())
    }

    /// The feed-forward half up to the non-linearity.
    pub(crate) fn expand(
        &self,
        at: &LayerAt,
        m: &mut LayerMemory<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims);
        let a2 = self.every_row(&m.a2, &mut scratch.gathered)?;
        let shape = self.shape(&at.up, d.rows, d.hidden);
        // One operation where the backend has it; not where the non-linearity alone is computed
        // again, of what was rounded by then: that would give other bits.
        let fused = d.up == d.ffn
            && self.recompute != Recompute::Selective
            && timed(self.probe, Span::Matmul, || {
                let (w, bias) = (self.of_product(&at.up.weight), at.up.bias.as_ref());
                let (up, act) = (all_mut(b, &mut m.up), all_mut(b, &mut m.act));
                b.linear_gelu(shape, all(b, a2), w, bias.map(|r| self.of_product(r)), up, act)
            });
        if !fused {
            self.linear(&at.up, (d.rows, d.hidden), all(b, a2), all_mut(b, &mut m.up), true);
            self.activate(all(b, &m.up), all_mut(b, &mut m.act));
        }
        Ok(())
    }

    /// The rest of it, without the bias.
    fn contract(
        &self,
        at: &LayerAt,
        m: &LayerMemory<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims);
        let branch = all_mut(b, &mut scratch.branch);
        self.linear(&at.down, (d.rows, d.ffn), all(b, &m.act), branch, false);
        self.sum_rows(&mut scratch.branch)
    }
}
