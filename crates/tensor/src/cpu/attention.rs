//! Causal attention with grouped queries, forward and backward, in tiles.
//!
//! One task handles one key-value head of one sequence with all its query heads. Scores exist for
//! `QUERY_ROWS x KEY_COLUMNS` at a time; the running maximum and sum of each row are rescaled from
//! tile to tile, and the backward pass recomputes the probabilities from the saved logarithm of
//! the sum. Source: Dao 2023 (FlashAttention-2), algorithms 1 and 2.
#![allow(unsafe_code, reason = "dispatch by processor, and tasks that write disjoint columns")]

use super::pool::{Pool, Rows};
use super::simd::{Simd, dispatched, exp, lane_max, lane_sum};
use super::tile::{Tile, product};
use crate::shape::Attention;

/// Rows of queries in a tile: a multiple of the six rows that the product kernel takes at once.
const QUERY_ROWS: usize = 48;
/// Columns of keys in a tile; with 48 rows the scores take 48 KiB, well inside L2.
const KEY_COLUMNS: usize = 256;

/// One task's view of a head: where its columns lie in a row.
#[derive(Clone, Copy)]
struct Head {
    /// First row of the sequence.
    base: usize,
    /// Columns of the queries in `qkv`.
    q: usize,
    /// Columns of the keys.
    k: usize,
    /// Columns of the values.
    v: usize,
    /// Columns in the output.
    o: usize,
    /// Where its log-sums begin.
    lse: usize,
}

fn head(s: Attention, batch: usize, kv: usize, within: usize) -> Head {
    let index = kv * (s.heads / s.kv_heads) + within;
    let e = s.head_dim;
    Head {
        base: batch * s.sequence,
        q: index * e,
        k: (s.heads + kv) * e,
        v: (s.heads + s.kv_heads + kv) * e,
        o: index * e,
        lse: (batch * s.heads + index) * s.sequence,
    }
}

/// Transposes `[T, E]` columns of a row-major matrix to `[E, T]`.
fn transpose(s: Attention, base: usize, column: usize, width: usize, from: &[f32], to: &mut [f32]) {
    let (t, e) = (s.sequence, s.head_dim);
    // Blocks of 16 rows: each source line is read once, each target line written once.
    for start in (0..t).step_by(16) {
        let end = (start + 16).min(t);
        for i in 0..e {
            for row in start..end {
                to[i * t + row] = from[(base + row) * width + column + i];
            }
        }
    }
}

/// Turns a row of scores into exponentials under a running maximum. Returns the new maximum, the
/// factor for what was summed before, and the row's sum. Columns from `visible` on become 0.
#[inline(always)]
fn softmax_body<S: Simd>(
    _: S,
    row: &mut [f32],
    visible: usize,
    scale: f32,
    old: f32,
) -> (f32, f32, f32) {
    let (seen, hidden) = row.split_at_mut(visible);
    hidden.fill(0.0);
    let max = lane_max(seen) * scale;
    let new = if max > old { max } else { old };
    for x in seen.iter_mut() {
        *x = exp(*x * scale - new);
    }
    (new, exp(old - new), lane_sum(seen.len(), |i| seen[i]))
}

dispatched! {
    fn softmax_row(row: &mut [f32], visible: usize, scale: f32, old: f32) -> (f32, f32, f32)
        = softmax_body;
}

#[inline(always)]
fn scale_body<S: Simd>(_: S, row: &mut [f32], factor: f32) {
    for x in row {
        *x *= factor;
    }
}

dispatched! { fn scale_row(row: &mut [f32], factor: f32) = scale_body; }

pub(super) fn attention(pool: &Pool, s: Attention, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let (t, e, width, out_width) = (s.sequence, s.head_dim, s.qkv_width(), s.heads * s.head_dim);
    let rows = s.batch * t;
    assert!(qkv.len() == rows * width && out.len() == rows * out_width, "attention");
    assert!(lse.len() == s.batch * s.heads * t, "attention");
    let per_task = e * t + QUERY_ROWS * (KEY_COLUMNS + e);
    let (out, lse) = (Rows::new(out, 1), Rows::new(lse, 1));
    pool.split(s.batch * s.kv_heads, 1, |task| {
        let (batch, kv) = (task.start / s.kv_heads, task.start % s.kv_heads);
        pool.scratch(per_task, |scratch| {
            let (keys, scratch) = scratch.split_at_mut(e * t);
            let (scores, sums) = scratch.split_at_mut(QUERY_ROWS * KEY_COLUMNS);
            let first = head(s, batch, kv, 0);
            transpose(s, first.base, first.k, width, qkv, keys);
            for within in 0..s.heads / s.kv_heads {
                let h = head(s, batch, kv, within);
                for start in (0..t).step_by(QUERY_ROWS) {
                    let m = QUERY_ROWS.min(t - start);
                    let log_sums = forward_tile(s, h, start, m, qkv, keys, scores, sums);
                    for i in 0..m {
                        let at = (h.base + start + i) * out_width + h.o;
                        // SAFETY: this task alone writes this head's columns.
                        let row = unsafe { out.part(at..at + e) };
                        row.copy_from_slice(&sums[i * e..(i + 1) * e]);
                    }
                    // SAFETY: this task alone writes this head's log-sums.
                    let to = unsafe { lse.part(h.lse + start..h.lse + start + m) };
                    to.copy_from_slice(&log_sums[..m]);
                }
            }
        });
    });
}

/// Computes the output of `m` query rows into `sums` and returns their log-sums.
#[allow(clippy::too_many_arguments)]
fn forward_tile(
    s: Attention,
    h: Head,
    start: usize,
    m: usize,
    qkv: &[f32],
    keys: &[f32],
    scores: &mut [f32],
    sums: &mut [f32],
) -> [f32; QUERY_ROWS] {
    let (t, e, width) = (s.sequence, s.head_dim, s.qkv_width());
    let mut max = [f32::NEG_INFINITY; QUERY_ROWS];
    let mut total = [0.0f32; QUERY_ROWS];
    sums[..m * e].fill(0.0);
    for column in (0..start + m).step_by(KEY_COLUMNS) {
        let n = KEY_COLUMNS.min(start + m - column);
        let queries = &qkv[(h.base + start) * width + h.q..];
        let tile = Tile {
            m,
            n,
            k: e,
            a_row: width,
            a_column: 1,
            b_row: t,
            c_row: KEY_COLUMNS,
            accumulate: false,
        };
        product(tile, queries, &keys[column..], scores);
        for i in 0..m {
            let visible = (start + i + 1).saturating_sub(column).min(n);
            let row = &mut scores[i * KEY_COLUMNS..i * KEY_COLUMNS + n];
            if visible == 0 {
                row.fill(0.0);
                continue;
            }
            let (new, factor, sum) = softmax_row(row, visible, s.scale(), max[i]);
            if column > 0 {
                scale_row(&mut sums[i * e..(i + 1) * e], factor);
            }
            total[i] = total[i] * factor + sum;
            max[i] = new;
        }
        let tile = Tile {
            m,
            n: e,
            k: n,
            a_row: KEY_COLUMNS,
            a_column: 1,
            b_row: width,
            c_row: e,
            accumulate: true,
        };
        product(tile, scores, &qkv[(h.base + column) * width + h.v..], sums);
    }
    let mut log_sums = [0.0; QUERY_ROWS];
    for i in 0..m {
        scale_row(&mut sums[i * e..(i + 1) * e], 1.0 / total[i]);
        log_sums[i] = max[i] + total[i].ln();
    }
    log_sums
}

/// One row: probabilities in `p` from scores, and the gradient of the scores in `ds` from that of
/// the probabilities.
#[inline(always)]
fn grad_row_body<S: Simd>(
    _: S,
    p: &mut [f32],
    ds: &mut [f32],
    visible: usize,
    scale: f32,
    lse: f32,
    delta: f32,
) {
    let (p, p_hidden) = p.split_at_mut(visible);
    let (ds, ds_hidden) = ds.split_at_mut(visible);
    p_hidden.fill(0.0);
    ds_hidden.fill(0.0);
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = exp(*p * scale - lse);
        *ds = *p * (*ds - delta) * scale;
    }
}

dispatched! {
    fn grad_row(p: &mut [f32], ds: &mut [f32], visible: usize, scale: f32, lse: f32, delta: f32)
        = grad_row_body;
}

#[inline(always)]
fn dot_body<S: Simd>(_: S, a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    lane_sum(a.len(), |i| a[i] * b[i])
}

dispatched! { pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body; }

pub(super) fn attention_grad(
    pool: &Pool,
    s: Attention,
    qkv: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
) {
    let (t, e, width, out_width) = (s.sequence, s.head_dim, s.qkv_width(), s.heads * s.head_dim);
    let rows = s.batch * t;
    assert!(qkv.len() == rows * width && dqkv.len() == qkv.len(), "attention gradient");
    assert!(out.len() == rows * out_width && dout.len() == out.len(), "attention gradient");
    let per_task = 5 * e * t + 2 * QUERY_ROWS * KEY_COLUMNS;
    let dqkv = Rows::new(dqkv, 1);
    pool.split(s.batch * s.kv_heads, 1, |task| {
        let (batch, kv) = (task.start / s.kv_heads, task.start % s.kv_heads);
        pool.scratch(per_task, |scratch| {
            let (keys, scratch) = scratch.split_at_mut(e * t);
            let (values, scratch) = scratch.split_at_mut(e * t);
            let (dq, scratch) = scratch.split_at_mut(e * t);
            let (dk, scratch) = scratch.split_at_mut(e * t);
            let (dv, scratch) = scratch.split_at_mut(e * t);
            let first = head(s, batch, kv, 0);
            transpose(s, first.base, first.k, width, qkv, keys);
            transpose(s, first.base, first.v, width, qkv, values);
            dk.fill(0.0);
            dv.fill(0.0);
            let store = |column: usize, from: &[f32]| {
                for (i, from) in from.chunks_exact(e).enumerate() {
                    let at = (first.base + i) * width + column;
                    // SAFETY: this task alone writes these heads' columns.
                    unsafe { dqkv.part(at..at + e) }.copy_from_slice(from);
                }
            };
            for within in 0..s.heads / s.kv_heads {
                let h = head(s, batch, kv, within);
                dq.fill(0.0);
                let mut operands = Backward { s, h, qkv, keys, values, dq, dk, dv, scratch };
                for start in (0..t).step_by(QUERY_ROWS) {
                    let m = QUERY_ROWS.min(t - start);
                    operands.tile(start, m, out, dout, &lse[h.lse..h.lse + t]);
                }
                store(h.q, dq);
            }
            store(first.k, dk);
            store(first.v, dv);
        });
    });
}

/// What the backward pass of one head works on.
struct Backward<'a> {
    s: Attention,
    h: Head,
    qkv: &'a [f32],
    /// Keys, `[E, T]`.
    keys: &'a [f32],
    /// Values, `[E, T]`.
    values: &'a [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl Backward<'_> {
    /// Adds the gradients that `m` query rows from `start` cause.
    fn tile(&mut self, start: usize, m: usize, out: &[f32], dout: &[f32], lse: &[f32]) {
        let (s, h) = (self.s, self.h);
        let (t, e, width, out_width) =
            (s.sequence, s.head_dim, s.qkv_width(), s.heads * s.head_dim);
        let (p, ds) = self.scratch.split_at_mut(QUERY_ROWS * KEY_COLUMNS);
        let mut delta = [0.0f32; QUERY_ROWS];
        for (i, delta) in delta[..m].iter_mut().enumerate() {
            let at = (h.base + start + i) * out_width + h.o;
            *delta = dot(&out[at..at + e], &dout[at..at + e]);
        }
        let queries = &self.qkv[(h.base + start) * width + h.q..];
        let dout = &dout[(h.base + start) * out_width + h.o..];
        for column in (0..start + m).step_by(KEY_COLUMNS) {
            let n = KEY_COLUMNS.min(start + m - column);
            let scores = Tile {
                m,
                n,
                k: e,
                a_row: width,
                a_column: 1,
                b_row: t,
                c_row: KEY_COLUMNS,
                accumulate: false,
            };
            product(scores, queries, &self.keys[column..], p);
            product(Tile { a_row: out_width, ..scores }, dout, &self.values[column..], ds);
            for i in 0..m {
                let visible = (start + i + 1).saturating_sub(column).min(n);
                let range = i * KEY_COLUMNS..i * KEY_COLUMNS + n;
                let (p, ds) = (&mut p[range.clone()], &mut ds[range]);
                grad_row(p, ds, visible, s.scale(), lse[start + i], delta[i]);
            }
            // dQ += dS . K
            let to_queries = Tile {
                m,
                n: e,
                k: n,
                a_row: KEY_COLUMNS,
                a_column: 1,
                b_row: width,
                c_row: e,
                accumulate: true,
            };
            let keys = &self.qkv[(h.base + column) * width + h.k..];
            product(to_queries, ds, keys, &mut self.dq[start * e..]);
            // dV += P^T . dO and dK += dS^T . Q
            let to_keys = Tile {
                m: n,
                n: e,
                k: m,
                a_row: 1,
                a_column: KEY_COLUMNS,
                b_row: out_width,
                c_row: e,
                accumulate: true,
            };
            product(to_keys, p, dout, &mut self.dv[column * e..]);
            product(Tile { b_row: width, ..to_keys }, ds, queries, &mut self.dk[column * e..]);
        }
    }
}
