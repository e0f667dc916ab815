//! One stage's decoder layers, forward and backward, with tensor parallelism inside.
//!
//! Column-parallel halves (qkv, up) need no communication; after each row-parallel half (project,
//! down) the tensor group adds its partial results, and in the backward pass it adds the partial
//! gradients of each half's input. Source: Shoeybi et al. 2019, section 3.

use drumline_collective::{Collective, CollectiveError, ReduceOp};
use drumline_tensor::{Backend, Linear, WeightLayout};

use crate::activations::{Dims, LayerMemory, Scratch, Slot};
use crate::gradients::Gradients;
use crate::layout::{Layout, LinearAt, NormAt};
use crate::probe::{Probe, Span, timed};

/// What the layers of a stage work with.
pub struct Stage<'a, B: Backend, P: Probe> {
    /// The device.
    pub backend: &'a B,
    /// Who watches.
    pub probe: &'a P,
    /// The tensor group.
    pub tensor: &'a dyn Collective,
    /// Extents.
    pub dims: Dims,
    /// Where parameters are.
    pub layout: &'a Layout,
    /// The parameters.
    pub parameters: &'a B::Buffer,
    /// The rotary table, for families that have one.
    pub rotary: Option<&'a B::Buffer>,
    /// The position of every row.
    pub positions: &'a [u32],
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
    backend: &B,
    probe: &P,
    span: Span,
    group: &dyn Collective,
    values: B::ViewMut<'_>,
) -> Result<(), CollectiveError> {
    if group.size() == 1 {
        return Ok(());
    }
    timed(probe, span, || backend.on_host(values, |v| group.all_reduce(v, ReduceOp::Sum)))
}

impl<B: Backend, P: Probe> Stage<'_, B, P> {
    fn parameter(&self, range: &std::ops::Range<usize>) -> B::View<'_> {
        self.backend.view(self.parameters, range.clone())
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
        let bias = if with_bias { self.bias(at) } else { None };
        let shape = self.shape(at, rows, input);
        timed(self.probe, Span::Matmul, || {
            self.backend.linear(shape, x, self.parameter(&at.weight), bias, y);
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
        add_over(self.backend, self.probe, Span::TensorComm, self.tensor, values)
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

    /// Looks tokens up, and positions where they are learned, into `x`.
    ///
    /// # Errors
    /// [`CollectiveError`] from the tensor group.
    pub fn embed(&self, tokens: &[u32], x: &mut B::Buffer) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims.hidden);
        let Some(table) = &self.layout.embedding else { return Ok(()) };
        let offset = self.layout.vocab_offset;
        let n = tokens.len() * d;
        timed(self.probe, Span::Other, || {
            b.embed(d, tokens, offset, self.parameter(table), b.view_mut(x, 0..n), false);
        });
        self.add_partial(b.view_mut(x, 0..n))?;
        if let Some(table) = &self.layout.positions {
            timed(self.probe, Span::Other, || {
                b.embed(d, self.positions, 0, self.parameter(table), b.view_mut(x, 0..n), true);
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
        let (b, n) = (self.backend, self.dims.rows);
        for index in 0..slot.layers.len() {
            let place = slot.first + index;
            let at = &self.layout.layers[place];
            let (this, rest) = slot.layers[index..].split_first_mut().expect("index is in range");
            if index == 0 {
                let (a1, stats) = (all_mut(b, &mut this.a1), all_mut(b, &mut this.stats1));
                self.norm(&at.norm1, n, all(b, &this.x), a1, stats);
            }
            self.attention_forward(place, this, scratch)?;
            self.feed_forward(place, this, scratch)?;
            let (mid, branch) = (all(b, &this.mid), all(b, &scratch.branch));
            // The sum opens the next layer, or the final norm, or leaves the stage.
            if let Some(next) = rest.first_mut() {
                let norm = &self.layout.layers[place + 1].norm1;
                let (x, a1) = (all_mut(b, &mut next.x), all_mut(b, &mut next.a1));
                let stats = all_mut(b, &mut next.stats1);
                self.add_norm(norm, n, mid, branch, &at.down, x, a1, stats);
            } else if let (Some(last), Some(norm)) = (&mut slot.last, &self.layout.final_norm) {
                let (y, stats) = (all_mut(b, &mut last.y), all_mut(b, &mut last.stats));
                let out = all_mut(b, &mut slot.out);
                self.add_norm(norm, n, mid, branch, &at.down, out, y, stats);
            } else {
                timed(self.probe, Span::Other, || {
                    b.add(mid, branch, self.bias(&at.down), all_mut(b, &mut slot.out));
                });
            }
        }
        Ok(())
    }

    fn attention_forward(
        &self,
        index: usize,
        m: &mut LayerMemory<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims);
        let at = &self.layout.layers[index];
        let input = (d.rows, d.hidden);
        self.linear(&at.qkv, input, all(b, &m.a1), all_mut(b, &mut m.qkv), true);
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
        self.add_partial(all_mut(b, &mut scratch.branch))?;
        let (x, branch) = (all(b, &m.x), all(b, &scratch.branch));
        let (mid, a2) = (all_mut(b, &mut m.mid), all_mut(b, &mut m.a2));
        let stats = all_mut(b, &mut m.stats2);
        self.add_norm(&at.norm2, d.rows, x, branch, &at.project, mid, a2, stats);
        Ok(())
    }

    fn feed_forward(
        &self,
        index: usize,
        m: &mut LayerMemory<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims);
        let at = &self.layout.layers[index];
        self.linear(&at.up, (d.rows, d.hidden), all(b, &m.a2), all_mut(b, &mut m.up), true);
        self.activate(all(b, &m.up), all_mut(b, &mut m.act));
        let branch = all_mut(b, &mut scratch.branch);
        self.linear(&at.down, (d.rows, d.ffn), all(b, &m.act), branch, false);
        self.add_partial(all_mut(b, &mut scratch.branch))
    }

    /// Runs the layers backward: `scratch.gradient` holds the gradient of the stage's output, and
    /// then that of its input. Gradients of matrices replace what is there unless they are to
    /// accumulate; those of vectors are added.
    ///
    /// # Errors
    /// [`CollectiveError`] from the tensor group.
    pub fn backward(
        &self,
        slot: &mut Slot<B>,
        scratch: &mut Scratch<B>,
        gradients: &mut Gradients<'_, '_, B>,
    ) -> Result<(), CollectiveError> {
        let b = self.backend;
        if let (Some(last), Some(norm)) = (&slot.last, &self.layout.final_norm) {
            b.fill(all_mut(b, &mut scratch.gradient), 0.0);
            let (dy, stats) = (all(b, &last.dy), all(b, &last.stats));
            let dx = all_mut(b, &mut scratch.gradient);
            self.norm_backward(norm, dy, all(b, &slot.out), stats, dx, gradients.buffer);
        }
        for index in (0..slot.layers.len()).rev() {
            let (m, place) = (&mut slot.layers[index], slot.first + index);
            self.feed_backward(place, m, scratch, gradients)?;
            self.attention_backward(place, m, scratch, gradients)?;
            if let Some(buckets) = &mut gradients.buckets {
                buckets.add(self.probe, self.layout.layers[place].matrices())?;
            }
            self.look(gradients)?;
        }
        Ok(())
    }

    fn norm_backward(
        &self,
        at: &NormAt,
        dy: B::View<'_>,
        x: B::View<'_>,
        stats: B::View<'_>,
        dx: B::ViewMut<'_>,
        gradients: &mut B::Buffer,
    ) {
        let b = self.backend;
        let d = self.dims.hidden;
        let shape = self.dims.normalise(self.dims.rows);
        let gain = self.parameter(&at.gain);
        timed(self.probe, Span::Other, || match &at.bias {
            None => {
                let dgain = b.view_mut(gradients, at.gain.clone());
                b.norm_grad(shape, dy, x, gain, stats, dx, dgain, None);
            }
            Some(bias) => {
                // Gain and bias are neighbours: one view, then two halves of it.
                let both = b.view_mut(gradients, at.gain.start..bias.end);
                let (dgain, dbias) = b.split_mut(both, bias.start - at.gain.start);
                let (dgain, _) = b.split_mut(dgain, d);
                b.norm_grad(shape, dy, x, gain, stats, dx, dgain, Some(dbias));
            }
        });
    }

    /// The backward pass of one linear layer: weights, bias where `dy` covers it, and input.
    fn linear_backward(
        &self,
        at: &LinearAt,
        input: usize,
        x: B::View<'_>,
        dy: B::View<'_>,
        dx: B::ViewMut<'_>,
        gradients: &mut Gradients<'_, '_, B>,
    ) -> Result<(), CollectiveError> {
        let b = self.backend;
        let shape = self.shape(at, self.dims.rows, input);
        timed(self.probe, Span::Matmul, || {
            let dw = b.view_mut(gradients.buffer, at.weight.clone());
            b.linear_grad_weight(shape, x, dy, dw, gradients.accumulate);
        });
        self.look(gradients)?;
        timed(self.probe, Span::Matmul, || {
            b.linear_grad_input(shape, dy, self.parameter(&at.weight), dx);
        });
        if let Some(bias) = &at.bias {
            timed(self.probe, Span::Other, || {
                let dbias = b.view_mut(gradients.buffer, bias.clone());
                b.add_column_sums(shape.rows, shape.output, dy, dbias);
            });
        }
        self.look(gradients)
    }

    /// Moves the reduction of gradients on, if one is under way.
    fn look(&self, gradients: &mut Gradients<'_, '_, B>) -> Result<(), CollectiveError> {
        match &mut gradients.buckets {
            Some(buckets) => buckets.poll(self.backend, self.probe, gradients.buffer),
            None => Ok(()),
        }
    }

    fn feed_backward(
        &self,
        index: usize,
        m: &mut LayerMemory<B>,
        scratch: &mut Scratch<B>,
        gradients: &mut Gradients<'_, '_, B>,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims);
        let at = &self.layout.layers[index];
        let (dy, dact) = (all(b, &scratch.gradient), all_mut(b, &mut scratch.dact));
        self.linear_backward(&at.down, d.ffn, all(b, &m.act), dy, dact, gradients)?;
        timed(self.probe, Span::Other, || {
            let (up, dact) = (all_mut(b, &mut m.up), all(b, &scratch.dact));
            if d.up == d.ffn { b.gelu_grad(up, dact) } else { b.swiglu_grad(d.ffn, up, dact) }
        });
        let (dup, da) = (all(b, &m.up), all_mut(b, &mut scratch.da));
        self.linear_backward(&at.up, d.hidden, all(b, &m.a2), dup, da, gradients)?;
        self.add_partial(all_mut(b, &mut scratch.da))?;
        let (da, stats) = (all(b, &scratch.da), all(b, &m.stats2));
        let dx = all_mut(b, &mut scratch.gradient);
        self.norm_backward(&at.norm2, da, all(b, &m.mid), stats, dx, gradients.buffer);
        self.look(gradients)
    }

    fn attention_backward(
        &self,
        index: usize,
        m: &mut LayerMemory<B>,
        scratch: &mut Scratch<B>,
        gradients: &mut Gradients<'_, '_, B>,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims);
        let at = &self.layout.layers[index];
        let (dy, dattended) = (all(b, &scratch.gradient), all_mut(b, &mut scratch.dattended));
        let (input, x) = (d.attention_width(), all(b, &m.attended));
        self.linear_backward(&at.project, input, x, dy, dattended, gradients)?;
        timed(self.probe, Span::Attention, || {
            let (qkv, out, lse) = (all(b, &m.qkv), all(b, &m.attended), all(b, &m.lse));
            let (dout, dqkv) = (all(b, &scratch.dattended), all_mut(b, &mut scratch.dqkv));
            b.attention_grad(d.attention(), qkv, out, lse, dout, dqkv);
        });
        if let Some(table) = self.rotary {
            timed(self.probe, Span::Other, || {
                let dqkv = all_mut(b, &mut scratch.dqkv);
                b.rotary(d.rotation(d.rows, true), all(b, table), self.positions, dqkv);
            });
        }
        let (dqkv, da) = (all(b, &scratch.dqkv), all_mut(b, &mut scratch.da));
        self.linear_backward(&at.qkv, d.hidden, all(b, &m.a1), dqkv, da, gradients)?;
        self.add_partial(all_mut(b, &mut scratch.da))?;
        let (da, stats) = (all(b, &scratch.da), all(b, &m.stats1));
        let dx = all_mut(b, &mut scratch.gradient);
        self.norm_backward(&at.norm1, da, all(b, &m.x), stats, dx, gradients.buffer);
        self.look(gradients)
    }

    /// Adds the embedding's gradients, given that of its output in `scratch.gradient`.
    pub fn embed_backward(&self, tokens: &[u32], scratch: &Scratch<B>, gradients: &mut B::Buffer) {
        let (b, d) = (self.backend, self.dims.hidden);
        let dy = || all(b, &scratch.gradient);
        timed(self.probe, Span::Other, || {
            if let Some(table) = &self.layout.embedding {
                let to = b.view_mut(gradients, table.clone());
                b.embed_grad(d, tokens, self.layout.vocab_offset, dy(), to);
            }
            if let Some(table) = &self.layout.positions {
                let to = b.view_mut(gradients, table.clone());
                b.embed_grad(d, self.positions, 0, dy(), to);
            }
        });
    }
}
