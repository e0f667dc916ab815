//! One stage's decoder layers, backward: what is not kept from the forward pass is computed again
//! first.

use drumline_collective::CollectiveError;
use drumline_spec::Recompute;
use drumline_tensor::Backend;

use crate::activations::{LayerMemory, Scratch, Slot};
use crate::gradients::Gradients;
use crate::layer::{Stage, all, all_mut};
use crate::layout::{LinearAt, NormAt};
use crate::probe::{Probe, Span, timed};

impl<B: Backend, P: Probe> Stage<'_, B, P> {
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
            m.exchange(&mut scratch.layer, self.recompute);
            self.compute_again(place, m, scratch)?;
            self.feed_backward(place, m, scratch, gradients)?;
            self.attention_backward(place, m, scratch, gradients)?;
            m.exchange(&mut scratch.layer, self.recompute);
            if let Some(buckets) = &mut gradients.buckets {
                buckets.add(self.probe, self.layout.layers[place].matrices())?;
            }
            self.look(gradients)?;
        }
        Ok(())
    }

    /// Computes what was not kept, by the kernels and thus to the bits of the forward pass. The last
    /// product's result is not needed.
    fn compute_again(
        &self,
        index: usize,
        m: &mut LayerMemory<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), CollectiveError> {
        let (b, at) = (self.backend, &self.layout.layers[index]);
        match self.recompute {
            Recompute::None => {}
            Recompute::Selective => {
                self.first_norm(at, m);
                let (a2, stats) = (all_mut(b, &mut m.a2), all_mut(b, &mut m.stats2));
                self.norm(&at.norm2, self.dims.own_rows, all(b, &m.mid), a2, stats);
                self.activate(all(b, &m.up), all_mut(b, &mut m.act));
            }
            Recompute::Full => {
                self.first_norm(at, m);
                self.attention_forward(index, m, scratch)?;
                self.expand(at, m, scratch)?;
            }
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
        let shape = self.dims.normalise(self.dims.own_rows);
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

    /// The backward pass of one linear layer: weights, bias where `dy` covers it, and input. Where the
    /// input is GELU's of `up`, and the backend has that in one operation, the gradient goes through
    /// GELU too: returns whether it did.
    #[expect(clippy::too_many_arguments, reason = "a fused operation has many operands")]
    fn linear_backward(
        &self,
        at: &LinearAt,
        input: usize,
        x: B::View<'_>,
        dy: B::View<'_>,
        dx: &mut B::Buffer,
        up: Option<B::View<'_>>,
        gradients: &mut Gradients<'_, '_, B>,
    ) -> Result<bool, CollectiveError> {
        let b = self.backend;
        let shape = self.shape(at, self.dims.rows, input);
        timed(self.probe, Span::Matmul, || {
            let dw = b.view_mut(gradients.buffer, at.weight.clone());
            b.linear_grad_weight(shape, x, dy, dw, gradients.accumulate);
        });
        self.look(gradients)?;
        let through = timed(self.probe, Span::Matmul, || {
            let w = self.of_product(&at.weight);
            let through =
                up.is_some_and(|up| b.linear_grad_input_gelu(shape, dy, w, up, all_mut(b, dx)));
            if !through {
                b.linear_grad_input(shape, dy, w, all_mut(b, dx));
            }
            through
        });
        if let Some(bias) = &at.bias {
            timed(self.probe, Span::Other, || {
                let dbias = b.view_mut(gradients.buffer, bias.clone());
                b.add_column_sums(shape.rows, shape.output, dy, dbias);
            });
        }
        self.look(gradients)?;
        Ok(through)
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
        let dy = all(b, self.every_row(&scratch.gradient, &mut scratch.gathered)?);
        let gated = d.up != d.ffn;
        let (act, dact) = (all(b, &m.act), &mut scratch.dact);
        let up = (!gated).then(|| all(b, &m.up));
        let through = self.linear_backward(&at.down, d.ffn, act, dy, dact, up, gradients)?;
        timed(self.probe, Span::Other, || {
            let (up, dact) = (&mut m.up, &mut scratch.dact);
            match (gated, through) {
                (true, _) => b.swiglu_grad(d.ffn, all_mut(b, up), all(b, dact)),
                (false, false) => b.gelu_grad(all(b, up), all_mut(b, dact)),
                (false, true) => {}
            }
        });
        let dup = all(b, if gated { &m.up } else { &scratch.dact });
        let a2 = all(b, self.every_row(&m.a2, &mut scratch.gathered)?);
        self.linear_backward(&at.up, d.hidden, a2, dup, &mut scratch.da, None, gradients)?;
        self.sum_rows(&mut scratch.da)?;
        let (da, stats) = (self.own_rows(&scratch.da), all(b, &m.stats2));
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
        let dy = all(b, self.every_row(&scratch.gradient, &mut scratch.gathered)?);
        let (input, x) = (d.attention_width(), all(b, &m.attended));
        let dattended = &mut scratch.dattended;
        self.linear_backward(&at.project, input, x, dy, dattended, None, gradients)?;
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
        let (dqkv, da) = (all(b, &scratch.dqkv), &mut scratch.da);
        let a1 = all(b, self.every_row(&m.a1, &mut scratch.gathered)?);
        self.linear_backward(&at.qkv, d.hidden, a1, dqkv, da, None, gradients)?;
        self.sum_rows(&mut scratch.da)?;
        let (da, stats) = (self.own_rows(&scratch.da), all(b, &m.stats1));
        let dx = all_mut(b, &mut scratch.gradient);
        self.norm_backward(&at.norm1, da, all(b, &m.x), stats, dx, gradients.buffer);
        self.look(gradients)
    }

    /// Adds the embedding's gradients, given that of its output in `scratch.gradient`.
    ///
    /// # Errors
    /// [`CollectiveError`] from the tensor group.
    pub fn embed_backward(
        &self,
        tokens: &[u32],
        scratch: &mut Scratch<B>,
        gradients: &mut B::Buffer,
    ) -> Result<(), CollectiveError> {
        let (b, d) = (self.backend, self.dims.hidden);
        let dy = all(b, self.every_row(&scratch.gradient, &mut scratch.gathered)?);
        timed(self.probe, Span::Other, || {
            if let Some(table) = &self.layout.embedding {
                let to = b.view_mut(gradients, table.clone());
                b.embed_grad(d, tokens, self.layout.vocab_offset, dy, to);
            }
            if let Some(table) = &self.layout.positions {
                let to = b.view_mut(gradients, table.clone());
                b.embed_grad(d, self.positions, 0, dy, to);
            }
        });
        Ok(())
    }
}
