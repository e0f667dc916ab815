//! The output projection and the loss, over a vocabulary that the tensor group shares.
//!
//! Logits exist for a chunk of rows at a time: projected, turned into the loss and its gradient,
//! and multiplied back, before the next chunk takes their place.

use drumline_collective::{CollectiveError, ReduceOp};
use drumline_tensor::{Backend, Loss};

use crate::activations::{LastMemory, Scratch};
use crate::layer::{Stage, all_mut};
use crate::probe::{Probe, Span, timed};

/// What the loss's gradient is wanted for.
pub struct Gradient<'a, B: Backend> {
    /// Where the output projection's gradient goes.
    pub gradients: &'a mut B::Buffer,
    /// Factor on the gradient: one over the tokens of the global batch.
    pub scale: f32,
    /// Add to the projection's gradient instead of replacing it.
    pub accumulate: bool,
}

impl<B: Backend, P: Probe> Stage<'_, B, P> {
    /// Computes the sum of the losses of all rows; with a `gradient`, also the gradients of the
    /// projection and, in `last.dy`, of its input.
    ///
    /// # Errors
    /// [`CollectiveError`] from the tensor group.
    pub fn loss(
        &self,
        targets: &[u32],
        last: &mut LastMemory<B>,
        scratch: &mut Scratch<B>,
        mut gradient: Option<Gradient<'_, B>>,
    ) -> Result<f64, CollectiveError> {
        let (b, d, rows) = (self.backend, self.dims.hidden, self.dims.rows);
        let (Some(head), Some(logits)) = (&self.layout.head, &mut scratch.logits) else {
            return Ok(0.0);
        };
        let mut total = 0.0f64;
        let y = self.every_row(&last.y, &mut scratch.gathered)?;
        // The gradients of all rows are partial sums before they are this rank's rows' own.
        let shared = self.rows.is_some();
        let dy = if shared { &mut scratch.da } else { &mut last.dy };
        for start in (0..rows).step_by(scratch.chunk) {
            let n = scratch.chunk.min(rows - start);
            let shape = self.head_shape(n);
            let range = start * d..(start + n) * d;
            let columns = self.layout.vocab_rows;
            timed(self.probe, Span::Matmul, || {
                let w = self.of_product(head);
                let out = b.view_mut(logits, 0..n * columns);
                b.linear(shape, b.view(y, range.clone()), w, None, out);
            });
            let loss = Loss {
                rows: n,
                columns,
                used: self.layout.vocab_used,
                offset: self.layout.vocab_offset,
            };
            let scale = gradient.as_ref().map_or(0.0, |g| g.scale);
            let targets = &targets[start..start + n];
            self.cross_entropy(loss, targets, scale, logits, &mut scratch.row_values)?;
            let host = &mut scratch.host[..n];
            b.read(b.view(&scratch.row_values, 0..n), host);
            total += host.iter().map(|x| f64::from(*x)).sum::<f64>();
            if let Some(g) = &mut gradient {
                timed(self.probe, Span::Matmul, || {
                    let dlogits = || b.view(logits, 0..n * columns);
                    let dw = b.view_mut(g.gradients, head.clone());
                    let accumulate = g.accumulate || start > 0;
                    let y = b.view(y, range.clone());
                    b.linear_grad_weight(shape, y, dlogits(), dw, accumulate);
                    let w = self.of_product(head);
                    b.linear_grad_input(shape, dlogits(), w, b.view_mut(dy, range));
                });
            }
        }
        if gradient.is_some() {
            self.sum_rows(dy)?;
            if shared {
                b.copy(self.own_rows(&scratch.da), all_mut(b, &mut last.dy));
            }
        }
        Ok(total)
    }

    /// Leaves each row's loss at the start of `values`, and in `logits` their gradient when
    /// `scale` is not 0.
    fn cross_entropy(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        logits: &mut B::Buffer,
        values: &mut B::Buffer,
    ) -> Result<(), CollectiveError> {
        let (b, n) = (self.backend, s.rows);
        let size = n * s.columns;
        if self.tensor.size() == 1 {
            timed(self.probe, Span::Other, || {
                let (logits, losses) = (b.view_mut(logits, 0..size), b.view_mut(values, 0..n));
                b.cross_entropy(s, targets, scale, logits, losses);
            });
            return Ok(());
        }
        // [0, n): losses; [n, 2n): maxima; [2n, 4n): sums, then targets' scores.
        let (maxima, sums) = (n..2 * n, 2 * n..4 * n);
        timed(self.probe, Span::Other, || {
            b.row_max(s, b.view(logits, 0..size), b.view_mut(values, maxima.clone()));
        });
        timed(self.probe, Span::TensorComm, || {
            let maxima = b.view_mut(values, maxima.clone());
            self.tensor.all_reduce(maxima, ReduceOp::Max)
        })?;
        timed(self.probe, Span::Other, || {
            let (max, sums) = b.split_mut(b.view_mut(values, n..4 * n), n);
            b.partial_cross_entropy(s, targets, b.view(logits, 0..size), b.as_view(&max), sums);
        });
        self.add_partial(b.view_mut(values, sums.clone()))?;
        timed(self.probe, Span::Other, || {
            if scale != 0.0 {
                let (max, sums) = (b.view(values, maxima), b.view(values, 2 * n..3 * n));
                let logits = b.view_mut(logits, 0..size);
                b.partial_cross_entropy_grad(s, targets, scale, max, sums, logits);
            }
            // On the host: a few thousand numbers.
            b.on_host(b.view_mut(values, 0..4 * n), |v| {
                let (losses, rest) = v.split_at_mut(n);
                for (i, loss) in losses.iter_mut().enumerate() {
                    *loss = rest[n + i].ln() - rest[2 * n + i];
                }
            });
        });
        Ok(())
    }
}
