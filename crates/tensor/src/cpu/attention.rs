//! Causal attention with grouped queries, forward and backward, in tiles.
//!
//! One task handles one key-value head of one sequence with all its query heads. Scores exist for
//! `QUERY_ROWS x KEY_COLUMNS` at a time; the running maximum and sum of each row are rescaled from
//! tile to tile, and the backward pass recomputes the probabilities from the saved logarithm of
//! the sum. Source: Dao 2023 (FlashAttention-2), algorithms 1 and 2.
#![allow(unsafe_code, reason = "dispatch by processor, and tasks that write disjoint columns")]

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::panels::reorder;
use super::pool::{Pool, Rows};
#[cfg(target_arch = "x86_64")]
use super::simd::{Level, level};
use super::simd::{Simd, dispatched, exp, lane_max, lane_sum};
use super::tile::{Tile, product};
use crate::shape::Attention;

/// Rows of queries in a tile: a multiple of the six rows that the product kernel takes at once.
const QUERY_ROWS: usize = 48;
/// Columns of keys in a tile; with 48 rows the scores take 48 KiB, well inside L2.
const KEY_COLUMNS: usize = 256;

/// Rows of a tile that are multiplied together: of a tile on the diagonal the upper half sees fewer
/// keys.
const HALF: usize = QUERY_ROWS / 2;

/// Returns the halves of `m` query rows from `start`, each with the keys that it sees of the `n` from
/// `column`. Those that see none are left out.
fn halves(
    start: usize,
    m: usize,
    column: usize,
    n: usize,
) -> impl Iterator<Item = (Range<usize>, usize)> {
    let half = move |first: usize| {
        let rows = first..m.min(first + HALF);
        let seen = n.min((start + rows.end).saturating_sub(column));
        (rows, seen)
    };
    (0..m).step_by(HALF).map(half).filter(|(_, seen)| *seen > 0)
}

/// From one row of scores to the next.
const SCORES: usize = stride(KEY_COLUMNS);

/// From one row of a copy to the next: an odd number of cache lines, so that neighbours in a column
/// do not share a few sets of the cache.
const fn stride(columns: usize) -> usize {
    (columns.div_ceil(16) | 1) * 16
}

/// Returns the product of some rows, `a_row` apart, with columns of a transposed copy of `t` rows: scores.
fn scoring(rows: usize, n: usize, e: usize, a_row: usize, t: usize) -> Tile {
    Tile {
        m: rows,
        n,
        k: e,
        a_row,
        a_column: 1,
        b_row: stride(t),
        c_row: SCORES,
        accumulate: false,
    }
}

/// Returns the product of some rows of scores with rows of a copy, added to what is there.
fn weighing(rows: usize, seen: usize, e: usize) -> Tile {
    Tile {
        m: rows,
        n: e,
        k: seen,
        a_row: SCORES,
        a_column: 1,
        b_row: stride(e),
        c_row: e,
        accumulate: true,
    }
}

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

/// Copies `[rows, E]` columns of a row-major matrix, from its first element.
fn gather(e: usize, width: usize, from: &[f32], to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(stride(e)).zip(from.chunks(width)) {
        to[..e].copy_from_slice(&from[..e]);
    }
}

/// Transposes `[T, E]` columns of a row-major matrix to `[E, T]`.
fn transpose(s: Attention, base: usize, column: usize, width: usize, from: &[f32], to: &mut [f32]) {
    let (t, e) = (s.sequence, s.head_dim);
    let line = stride(t);
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx2 {
        reorder::transpose((t, e), width, &from[base * width + column..], line, to);
        return;
    }
    // Blocks of 16 rows: each source line is read once, each target line written once.
    for start in (0..t).step_by(16) {
        let end = (start + 16).min(t);
        for i in 0..e {
            for row in start..end {
                to[i * line + row] = from[(base + row) * width + column + i];
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
        *x = exp::<S>(*x * scale - new);
    }
    (new, exp::<S>(old - new), lane_sum(seen.len(), |i| seen[i]))
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
    let per_task = e * stride(t) + t * stride(e) + QUERY_ROWS * (SCORES + e);
    let (out, lse) = (Rows::new(out, 1), Rows::new(lse, 1));
    pool.split(s.batch * s.kv_heads, 1, |task| {
        let (batch, kv) = (task.start / s.kv_heads, task.start % s.kv_heads);
        pool.scratch(per_task, |scratch| {
            let (keys, scratch) = scratch.split_at_mut(e * stride(t));
            let (values, scratch) = scratch.split_at_mut(t * stride(e));
            let (scores, sums) = scratch.split_at_mut(QUERY_ROWS * SCORES);
            let first = head(s, batch, kv, 0);
            transpose(s, first.base, first.k, width, qkv, keys);
            gather(e, width, &qkv[first.base * width + first.v..], values);
            for within in 0..s.heads / s.kv_heads {
                let h = head(s, batch, kv, within);
                for start in (0..t).step_by(QUERY_ROWS) {
                    let m = QUERY_ROWS.min(t - start);
                    let log_sums = forward_tile(s, h, start, m, qkv, keys, values, scores, sums);
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
    values: &[f32],
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
        for (rows, n) in halves(start, m, column, n) {
            let tile = scoring(rows.len(), n, e, width, t);
            let queries = &queries[rows.start * width..];
            product(tile, queries, &keys[column..], &mut scores[rows.start * SCORES..]);
        }
        for i in 0..m {
            let visible = (start + i + 1).saturating_sub(column).min(n);
            let row = &mut scores[i * SCORES..i * SCORES + n];
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
        for (rows, seen) in halves(start, m, column, n) {
            let tile = weighing(rows.len(), seen, e);
            let (scores, values) = (&scores[rows.start * SCORES..], &values[column * stride(e)..]);
            product(tile, scores, values, &mut sums[rows.start * e..]);
        }
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
        *p = exp::<S>(*p * scale - lse);
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
    let per_task = 2 * e * stride(t) + (t + 2 * QUERY_ROWS) * stride(e);
    let per_task = per_task + 3 * e * t + 2 * QUERY_ROWS * SCORES;
    let dqkv = Rows::new(dqkv, 1);
    pool.split(s.batch * s.kv_heads, 1, |task| {
        let (batch, kv) = (task.start / s.kv_heads, task.start % s.kv_heads);
        pool.scratch(per_task, |scratch| {
            let (keys, scratch) = scratch.split_at_mut(e * stride(t));
            let (values, scratch) = scratch.split_at_mut(e * stride(t));
            let (key_rows, scratch) = scratch.split_at_mut(t * stride(e));
            let (rows, scratch) = scratch.split_at_mut(2 * QUERY_ROWS * stride(e));
            let (dq, scratch) = scratch.split_at_mut(e * t);
            let (dk, scratch) = scratch.split_at_mut(e * t);
            let (dv, scratch) = scratch.split_at_mut(e * t);
            let first = head(s, batch, kv, 0);
            transpose(s, first.base, first.k, width, qkv, keys);
            transpose(s, first.base, first.v, width, qkv, values);
            gather(e, width, &qkv[first.base * width + first.k..], key_rows);
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
                let mut operands =
                    Backward { s, h, qkv, keys, values, key_rows, rows, dq, dk, dv, scratch };
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
    /// Keys, `[T, E]`.
    key_rows: &'a [f32],
    /// Takes a tile's queries and its gradient of the output.
    rows: &'a mut [f32],
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
        let (p, ds) = self.scratch.split_at_mut(QUERY_ROWS * SCORES);
        let mut delta = [0.0f32; QUERY_ROWS];
        for (i, delta) in delta[..m].iter_mut().enumerate() {
            let at = (h.base + start + i) * out_width + h.o;
            *delta = dot(&out[at..at + e], &dout[at..at + e]);
        }
        let (queries, dout_rows) = self.rows.split_at_mut(QUERY_ROWS * stride(e));
        gather(
            e,
            width,
            &self.qkv[(h.base + start) * width + h.q..],
            &mut queries[..m * stride(e)],
        );
        let from = &dout[(h.base + start) * out_width + h.o..];
        gather(e, out_width, from, &mut dout_rows[..m * stride(e)]);
        let (queries, dout) = (&*queries, &*dout_rows);
        for column in (0..start + m).step_by(KEY_COLUMNS) {
            let n = KEY_COLUMNS.min(start + m - column);
            for (rows, n) in halves(start, m, column, n) {
                let tile = scoring(rows.len(), n, e, stride(e), t);
                let (from, to) = (rows.start * stride(e), rows.start * SCORES);
                product(tile, &queries[from..], &self.keys[column..], &mut p[to..]);
                product(tile, &dout[from..], &self.values[column..], &mut ds[to..]);
            }
            for i in 0..m {
                let visible = (start + i + 1).saturating_sub(column).min(n);
                let range = i * SCORES..i * SCORES + n;
                let (p, ds) = (&mut p[range.clone()], &mut ds[range]);
                grad_row(p, ds, visible, s.scale(), lse[start + i], delta[i]);
            }
            // dQ += dS . K
            for (rows, seen) in halves(start, m, column, n) {
                let tile = weighing(rows.len(), seen, e);
                let (ds, keys) = (&ds[rows.start * SCORES..], &self.key_rows[column * stride(e)..]);
                product(tile, ds, keys, &mut self.dq[(start + rows.start) * e..]);
            }
            // dV += P^T . dO and dK += dS^T . Q: from the keys that only the last half sees, only its
            // rows.
            let mut first = 0;
            for (rows, seen) in halves(start, m, column, n) {
                let tile = Tile {
                    m: seen - first,
                    n: e,
                    k: m - rows.start,
                    a_row: 1,
                    a_column: SCORES,
                    b_row: stride(e),
                    c_row: e,
                    accumulate: true,
                };
                let (from, row) = (rows.start * SCORES + first, rows.start * stride(e));
                let to = (column + first) * e;
                product(tile, &p[from..], &dout[row..], &mut self.dv[to..]);
                product(tile, &ds[from..], &queries[row..], &mut self.dk[to..]);
                first = seen;
            }
        }
    }
}
