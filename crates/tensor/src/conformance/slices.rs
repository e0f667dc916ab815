//! A backend's operations on host slices, for tests: every operand lies at a place of its own in a
//! larger allocation, and what lies around it must stay as it was.

use std::cell::RefCell;

use crate::reference::Random;
use crate::{
    AdamW, Attention, Backend, CachedAttention, CachedSegment, DType, Draw, Linear, Loss,
    Normalise, Rotary,
};

/// Elements around an operand, at most, on each side.
const AROUND: usize = 9;
/// What lies around operands: a NaN of a pattern that no operation makes.
const GUARD: u32 = 0x7FDE_AD01;

/// A backend whose operations take host slices.
pub struct Slices<'b, B: Backend> {
    backend: &'b B,
    places: RefCell<Random>,
}

/// An operand on the device.
pub(super) struct Placed<B: Backend> {
    pub(super) buffer: B::Buffer,
    pub(super) start: usize,
    pub(super) len: usize,
}

impl<B: Backend> Placed<B> {
    pub(super) fn view(&self, b: &B) -> B::View<'_> {
        b.view(&self.buffer, self.start..self.start + self.len)
    }

    pub(super) fn view_mut(&mut self, b: &B) -> B::ViewMut<'_> {
        b.view_mut(&mut self.buffer, self.start..self.start + self.len)
    }

    /// Copies the operand back, and checks what lies around it.
    fn take(self, b: &B, to: &mut [f32]) {
        let mut all = vec![0.0; b.elements(&self.buffer)];
        b.read(b.view(&self.buffer, 0..all.len()), &mut all);
        b.status().expect("the device works");
        let end = self.start + self.len;
        let around = all[..self.start].iter().chain(&all[end..]);
        let touched = around.filter(|x| x.to_bits() != GUARD).count();
        assert_eq!(touched, 0, "elements around an operand were written");
        to.copy_from_slice(&all[self.start..end]);
    }
}

impl<'b, B: Backend> Slices<'b, B> {
    /// Wraps a backend; `r` says where operands are put.
    pub fn new(backend: &'b B, r: &mut Random) -> Self {
        Self { backend, places: RefCell::new(Random::new(r.bits())) }
    }

    fn put(&self, values: &[f32]) -> Placed<B> {
        let r = &mut *self.places.borrow_mut();
        // Half of the time where vector accesses may be used.
        let start = if r.below(2) == 0 { 0 } else { r.below(AROUND + 1) };
        let mut all = vec![f32::from_bits(GUARD); start + values.len() + r.below(AROUND + 1)];
        all[start..start + values.len()].copy_from_slice(values);
        let b = self.backend;
        let mut buffer = b.alloc(all.len()).expect("a small allocation");
        b.write(&all, b.view_mut(&mut buffer, 0..all.len()));
        Placed { buffer, start, len: values.len() }
    }

    /// Makes a stored matrix.
    pub fn matrix(&self, dtype: DType, s: Linear) -> B::Matrix {
        self.backend.alloc_matrix(dtype, s).expect("a small matrix")
    }

    /// [`Backend::write_matrix`].
    pub fn write_matrix(&self, from: &[f32], to: &mut B::Matrix) {
        self.backend.write_matrix(from, to);
    }

    /// [`Backend::matrix_bytes`].
    pub fn matrix_bytes(&self, matrix: &B::Matrix) -> usize {
        self.backend.matrix_bytes(matrix)
    }

    /// [`Backend::sum_squares`] of host values.
    pub fn sum_squares(&self, values: &[f32]) -> f64 {
        self.backend.sum_squares(self.put(values).view(self.backend))
    }

    /// [`Backend::linear`] on host values.
    pub fn linear(&self, s: Linear, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
        let x = self.put(x);
        let w = self.put(w);
        let bias = bias.map(|v| self.put(v));
        let mut own_y = self.put(y);
        self.backend.linear(
            s,
            x.view(self.backend),
            w.view(self.backend),
            bias.as_ref().map(|v| v.view(self.backend)),
            own_y.view_mut(self.backend),
        );
        own_y.take(self.backend, y);
    }

    /// [`Backend::linear_grad_input`] on host values.
    pub fn linear_grad_input(&self, s: Linear, dy: &[f32], w: &[f32], dx: &mut [f32]) {
        let dy = self.put(dy);
        let w = self.put(w);
        let mut own_dx = self.put(dx);
        self.backend.linear_grad_input(
            s,
            dy.view(self.backend),
            w.view(self.backend),
            own_dx.view_mut(self.backend),
        );
        own_dx.take(self.backend, dx);
    }

    /// [`Backend::linear_grad_weight`] on host values.
    pub fn linear_grad_weight(
        &self,
        s: Linear,
        x: &[f32],
        dy: &[f32],
        dw: &mut [f32],
        accumulate: bool,
    ) {
        let x = self.put(x);
        let dy = self.put(dy);
        let mut own_dw = self.put(dw);
        self.backend.linear_grad_weight(
            s,
            x.view(self.backend),
            dy.view(self.backend),
            own_dw.view_mut(self.backend),
            accumulate,
        );
        own_dw.take(self.backend, dw);
    }

    /// [`Backend::linear_stored`] on host values.
    pub fn linear_stored(
        &self,
        rows: usize,
        x: &[f32],
        w: &B::Matrix,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let x = self.put(x);
        let bias = bias.map(|v| self.put(v));
        let mut own_y = self.put(y);
        self.backend.linear_stored(
            rows,
            x.view(self.backend),
            w,
            bias.as_ref().map(|v| v.view(self.backend)),
            own_y.view_mut(self.backend),
        );
        own_y.take(self.backend, y);
    }

    /// [`Backend::embed_stored`] on host values.
    pub fn embed_stored(&self, indices: &[u32], offset: usize, table: &B::Matrix, out: &mut [f32]) {
        let mut own_out = self.put(out);
        self.backend.embed_stored(indices, offset, table, own_out.view_mut(self.backend));
        own_out.take(self.backend, out);
    }

    /// [`Backend::add_column_sums`] on host values.
    pub fn add_column_sums(&self, rows: usize, columns: usize, values: &[f32], sums: &mut [f32]) {
        let values = self.put(values);
        let mut own_sums = self.put(sums);
        self.backend.add_column_sums(
            rows,
            columns,
            values.view(self.backend),
            own_sums.view_mut(self.backend),
        );
        own_sums.take(self.backend, sums);
    }

    /// [`Backend::add`] on host values.
    pub fn add(&self, a: &[f32], b: &[f32], bias: Option<&[f32]>, sum: &mut [f32]) {
        let a = self.put(a);
        let b = self.put(b);
        let bias = bias.map(|v| self.put(v));
        let mut own_sum = self.put(sum);
        self.backend.add(
            a.view(self.backend),
            b.view(self.backend),
            bias.as_ref().map(|v| v.view(self.backend)),
            own_sum.view_mut(self.backend),
        );
        own_sum.take(self.backend, sum);
    }

    /// [`Backend::norm`] on host values.
    pub fn norm(
        &self,
        s: Normalise,
        x: &[f32],
        gain: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
        stats: &mut [f32],
    ) {
        let x = self.put(x);
        let gain = self.put(gain);
        let bias = bias.map(|v| self.put(v));
        let mut own_y = self.put(y);
        let mut own_stats = self.put(stats);
        self.backend.norm(
            s,
            x.view(self.backend),
            gain.view(self.backend),
            bias.as_ref().map(|v| v.view(self.backend)),
            own_y.view_mut(self.backend),
            own_stats.view_mut(self.backend),
        );
        own_y.take(self.backend, y);
        own_stats.take(self.backend, stats);
    }

    /// [`Backend::add_norm`] on host values.
    #[expect(clippy::too_many_arguments, reason = "as the operation has")]
    pub fn add_norm(
        &self,
        s: Normalise,
        x: &[f32],
        branch: &[f32],
        branch_bias: Option<&[f32]>,
        sum: &mut [f32],
        gain: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
        stats: &mut [f32],
    ) {
        let x = self.put(x);
        let branch = self.put(branch);
        let branch_bias = branch_bias.map(|v| self.put(v));
        let mut own_sum = self.put(sum);
        let gain = self.put(gain);
        let bias = bias.map(|v| self.put(v));
        let mut own_y = self.put(y);
        let mut own_stats = self.put(stats);
        self.backend.add_norm(
            s,
            x.view(self.backend),
            branch.view(self.backend),
            branch_bias.as_ref().map(|v| v.view(self.backend)),
            own_sum.view_mut(self.backend),
            gain.view(self.backend),
            bias.as_ref().map(|v| v.view(self.backend)),
            own_y.view_mut(self.backend),
            own_stats.view_mut(self.backend),
        );
        own_sum.take(self.backend, sum);
        own_y.take(self.backend, y);
        own_stats.take(self.backend, stats);
    }

    /// [`Backend::norm_grad`] on host values.
    #[expect(clippy::too_many_arguments, reason = "as the operation has")]
    pub fn norm_grad(
        &self,
        s: Normalise,
        dy: &[f32],
        x: &[f32],
        gain: &[f32],
        stats: &[f32],
        dx: &mut [f32],
        dgain: &mut [f32],
        dbias: Option<&mut [f32]>,
    ) {
        let dy = self.put(dy);
        let x = self.put(x);
        let gain = self.put(gain);
        let stats = self.put(stats);
        let mut own_dx = self.put(dx);
        let mut own_dgain = self.put(dgain);
        let mut own_dbias = dbias.as_deref().map(|v| self.put(v));
        self.backend.norm_grad(
            s,
            dy.view(self.backend),
            x.view(self.backend),
            gain.view(self.backend),
            stats.view(self.backend),
            own_dx.view_mut(self.backend),
            own_dgain.view_mut(self.backend),
            own_dbias.as_mut().map(|v| v.view_mut(self.backend)),
        );
        own_dx.take(self.backend, dx);
        own_dgain.take(self.backend, dgain);
        if let (Some(own), Some(to)) = (own_dbias, dbias) {
            own.take(self.backend, to);
        }
    }

    /// [`Backend::rotary`] on host values.
    pub fn rotary(&self, s: Rotary, table: &[f32], positions: &[u32], x: &mut [f32]) {
        let table = self.put(table);
        let mut own_x = self.put(x);
        self.backend.rotary(s, table.view(self.backend), positions, own_x.view_mut(self.backend));
        own_x.take(self.backend, x);
    }

    /// [`Backend::attention`] on host values.
    pub fn attention(&self, s: Attention, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
        let qkv = self.put(qkv);
        let mut own_out = self.put(out);
        let mut own_lse = self.put(lse);
        self.backend.attention(
            s,
            qkv.view(self.backend),
            own_out.view_mut(self.backend),
            own_lse.view_mut(self.backend),
        );
        own_out.take(self.backend, out);
        own_lse.take(self.backend, lse);
    }

    /// [`Backend::attention_grad`] on host values.
    pub fn attention_grad(
        &self,
        s: Attention,
        qkv: &[f32],
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
        dqkv: &mut [f32],
    ) {
        let qkv = self.put(qkv);
        let out = self.put(out);
        let lse = self.put(lse);
        let dout = self.put(dout);
        let mut own_dqkv = self.put(dqkv);
        self.backend.attention_grad(
            s,
            qkv.view(self.backend),
            out.view(self.backend),
            lse.view(self.backend),
            dout.view(self.backend),
            own_dqkv.view_mut(self.backend),
        );
        own_dqkv.take(self.backend, dqkv);
    }

    /// [`Backend::cache_write`] on host values.
    pub fn cache_write(
        &self,
        s: CachedAttention,
        qkv: &[f32],
        slots: &[u32],
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        let qkv = self.put(qkv);
        let mut own_keys = self.put(keys);
        let mut own_values = self.put(values);
        self.backend.cache_write(
            s,
            qkv.view(self.backend),
            slots,
            own_keys.view_mut(self.backend),
            own_values.view_mut(self.backend),
        );
        own_keys.take(self.backend, keys);
        own_values.take(self.backend, values);
    }

    /// [`Backend::cached_attention`] on host values.
    pub fn cached_attention(
        &self,
        s: CachedAttention,
        segments: &[CachedSegment<'_>],
        qkv: &[f32],
        keys: &[f32],
        values: &[f32],
        out: &mut [f32],
    ) {
        let qkv = self.put(qkv);
        let keys = self.put(keys);
        let values = self.put(values);
        let mut own_out = self.put(out);
        self.backend.cached_attention(
            s,
            segments,
            qkv.view(self.backend),
            keys.view(self.backend),
            values.view(self.backend),
            own_out.view_mut(self.backend),
        );
        own_out.take(self.backend, out);
    }

    /// [`Backend::sample`] on host values; none where the backend leaves it to others.
    pub fn sample(
        &self,
        columns: usize,
        used: usize,
        logits: &[f32],
        draws: &[Draw],
    ) -> Option<Vec<u32>> {
        let logits = self.put(logits);
        let mut tokens = vec![u32::MAX; draws.len()];
        let view = logits.view(self.backend);
        self.backend.sample(columns, used, view, draws, &mut tokens).then_some(tokens)
    }

    /// [`Backend::gelu`] on host values.
    pub fn gelu(&self, x: &[f32], y: &mut [f32]) {
        let x = self.put(x);
        let mut own_y = self.put(y);
        self.backend.gelu(x.view(self.backend), own_y.view_mut(self.backend));
        own_y.take(self.backend, y);
    }

    /// [`Backend::gelu_grad`] on host values.
    pub fn gelu_grad(&self, x: &[f32], dy: &mut [f32]) {
        let x = self.put(x);
        let mut own_dy = self.put(dy);
        self.backend.gelu_grad(x.view(self.backend), own_dy.view_mut(self.backend));
        own_dy.take(self.backend, dy);
    }

    /// [`Backend::swiglu`] on host values.
    pub fn swiglu(&self, width: usize, gate_up: &[f32], y: &mut [f32]) {
        let gate_up = self.put(gate_up);
        let mut own_y = self.put(y);
        self.backend.swiglu(width, gate_up.view(self.backend), own_y.view_mut(self.backend));
        own_y.take(self.backend, y);
    }

    /// [`Backend::swiglu_grad`] on host values.
    pub fn swiglu_grad(&self, width: usize, gate_up: &mut [f32], dy: &[f32]) {
        let mut own_gate_up = self.put(gate_up);
        let dy = self.put(dy);
        self.backend.swiglu_grad(width, own_gate_up.view_mut(self.backend), dy.view(self.backend));
        own_gate_up.take(self.backend, gate_up);
    }

    /// [`Backend::embed`] on host values.
    pub fn embed(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        table: &[f32],
        out: &mut [f32],
        accumulate: bool,
    ) {
        let table = self.put(table);
        let mut own_out = self.put(out);
        self.backend.embed(
            width,
            indices,
            offset,
            table.view(self.backend),
            own_out.view_mut(self.backend),
            accumulate,
        );
        own_out.take(self.backend, out);
    }

    /// [`Backend::embed_grad`] on host values.
    pub fn embed_grad(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        dy: &[f32],
        dtable: &mut [f32],
    ) {
        let dy = self.put(dy);
        let mut own_dtable = self.put(dtable);
        self.backend.embed_grad(
            width,
            indices,
            offset,
            dy.view(self.backend),
            own_dtable.view_mut(self.backend),
        );
        own_dtable.take(self.backend, dtable);
    }

    /// [`Backend::gather_rows`] on host values.
    pub fn gather_rows(&self, width: usize, indices: &[u32], from: &[f32], out: &mut [f32]) {
        let from = self.put(from);
        let mut own_out = self.put(out);
        self.backend.gather_rows(
            width,
            indices,
            from.view(self.backend),
            own_out.view_mut(self.backend),
        );
        own_out.take(self.backend, out);
    }

    /// [`Backend::cross_entropy`] on host values.
    pub fn cross_entropy(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        logits: &mut [f32],
        losses: &mut [f32],
    ) {
        let mut own_logits = self.put(logits);
        let mut own_losses = self.put(losses);
        self.backend.cross_entropy(
            s,
            targets,
            scale,
            own_logits.view_mut(self.backend),
            own_losses.view_mut(self.backend),
        );
        own_logits.take(self.backend, logits);
        own_losses.take(self.backend, losses);
    }

    /// [`Backend::row_max`] on host values.
    pub fn row_max(&self, s: Loss, logits: &[f32], max: &mut [f32]) {
        let logits = self.put(logits);
        let mut own_max = self.put(max);
        self.backend.row_max(s, logits.view(self.backend), own_max.view_mut(self.backend));
        own_max.take(self.backend, max);
    }

    /// [`Backend::partial_cross_entropy`] on host values.
    pub fn partial_cross_entropy(
        &self,
        s: Loss,
        targets: &[u32],
        logits: &[f32],
        max: &[f32],
        sums: &mut [f32],
    ) {
        let logits = self.put(logits);
        let max = self.put(max);
        let mut own_sums = self.put(sums);
        self.backend.partial_cross_entropy(
            s,
            targets,
            logits.view(self.backend),
            max.view(self.backend),
            own_sums.view_mut(self.backend),
        );
        own_sums.take(self.backend, sums);
    }

    /// [`Backend::partial_cross_entropy_grad`] on host values.
    pub fn partial_cross_entropy_grad(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        max: &[f32],
        sums: &[f32],
        logits: &mut [f32],
    ) {
        let max = self.put(max);
        let sums = self.put(sums);
        let mut own_logits = self.put(logits);
        self.backend.partial_cross_entropy_grad(
            s,
            targets,
            scale,
            max.view(self.backend),
            sums.view(self.backend),
            own_logits.view_mut(self.backend),
        );
        own_logits.take(self.backend, logits);
    }

    /// [`Backend::adamw`] on host values.
    pub fn adamw(
        &self,
        step: AdamW,
        parameters: &mut [f32],
        gradients: &[f32],
        first: &mut [f32],
        second: &mut [f32],
    ) {
        let mut own_parameters = self.put(parameters);
        let gradients = self.put(gradients);
        let mut own_first = self.put(first);
        let mut own_second = self.put(second);
        self.backend.adamw(
            step,
            own_parameters.view_mut(self.backend),
            None,
            gradients.view(self.backend),
            own_first.view_mut(self.backend),
            own_second.view_mut(self.backend),
        );
        own_parameters.take(self.backend, parameters);
        own_first.take(self.backend, first);
        own_second.take(self.backend, second);
    }
}
