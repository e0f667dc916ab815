//! Softmax with cross-entropy, over a whole vocabulary or a slice of it.
#![allow(unsafe_code, reason = "dispatch by processor, and disjoint parts of one output")]

use super::GRAIN;
use super::pool::{Pool, Rows};
use super::simd::{Simd, dispatched, exp, lane_max, lane_sum};
use crate::shape::Loss;

/// The target's column, when it lies in this slice.
fn column(s: Loss, target: u32) -> Option<usize> {
    (target as usize).checked_sub(s.offset).filter(|c| *c < s.used)
}

#[inline(always)]
fn max_body<S: Simd>(_: S, row: &[f32]) -> f32 {
    lane_max(row)
}

dispatched! { fn max_of(row: &[f32]) -> f32 = max_body; }

#[inline(always)]
fn sum_exp_body<S: Simd>(_: S, row: &[f32], max: f32) -> f32 {
    lane_sum(row.len(), |i| exp::<S>(row[i] - max))
}

dispatched! { fn sum_exp(row: &[f32], max: f32) -> f32 = sum_exp_body; }

#[inline(always)]
fn exp_into_body<S: Simd>(_: S, row: &mut [f32], max: f32) -> f32 {
    for x in row.iter_mut() {
        *x = exp::<S>(*x - max);
    }
    lane_sum(row.len(), |i| row[i])
}

dispatched! {
    /// Replaces a row by its exponentials and returns their sum.
    fn exp_into(row: &mut [f32], max: f32) -> f32 = exp_into_body;
}

#[inline(always)]
fn scale_body<S: Simd>(_: S, row: &mut [f32], factor: f32) {
    for x in row {
        *x *= factor;
    }
}

dispatched! { fn scale_row(row: &mut [f32], factor: f32) = scale_body; }

fn rows_per_task(s: Loss) -> usize {
    (GRAIN / s.columns.max(1)).max(1)
}

fn check(s: Loss, logits: usize, targets: usize) {
    assert!(s.used <= s.columns && logits == s.rows * s.columns && targets == s.rows, "loss");
}

pub(super) fn cross_entropy(
    pool: &Pool,
    s: Loss,
    targets: &[u32],
    scale: f32,
    logits: &mut [f32],
    losses: &mut [f32],
) {
    check(s, logits.len(), targets.len());
    let (logits, losses) = (Rows::new(logits, s.columns), Rows::new(losses, 1));
    pool.split(s.rows, rows_per_task(s), |part| {
        for r in part {
            // SAFETY: rows of different parts are disjoint.
            let (row, loss) = unsafe { (logits.part(r..r + 1), losses.part(r..r + 1)) };
            let (row, padding) = row.split_at_mut(s.used);
            let max = max_of(row);
            let target = column(s, targets[r]);
            let score = target.map_or(0.0, |c| row[c] - max);
            if scale == 0.0 {
                loss[0] = sum_exp(row, max).ln() - score;
                continue;
            }
            let sum = exp_into(row, max);
            loss[0] = sum.ln() - score;
            scale_row(row, scale / sum);
            if let Some(c) = target {
                row[c] -= scale;
            }
            padding.fill(0.0);
        }
    });
}

pub(super) fn row_max(pool: &Pool, s: Loss, logits: &[f32], max: &mut [f32]) {
    check(s, logits.len(), s.rows);
    let out = Rows::new(max, 1);
    pool.split(s.rows, rows_per_task(s), |part| {
        for r in part {
            // SAFETY: rows of different parts are disjoint.
            let max = unsafe { out.part(r..r + 1) };
            max[0] = max_of(&logits[r * s.columns..r * s.columns + s.used]);
        }
    });
}

pub(super) fn partial(
    pool: &Pool,
    s: Loss,
    targets: &[u32],
    logits: &[f32],
    max: &[f32],
    sums: &mut [f32],
) {
    check(s, logits.len(), targets.len());
    let (sums, scores) = sums.split_at_mut(s.rows);
    let (sums, scores) = (Rows::new(sums, 1), Rows::new(scores, 1));
    pool.split(s.rows, rows_per_task(s), |part| {
        for r in part {
            let row = &logits[r * s.columns..r * s.columns + s.used];
            // SAFETY: rows of different parts are disjoint.
            let (sum, score) = unsafe { (sums.part(r..r + 1), scores.part(r..r + 1)) };
            sum[0] = sum_exp(row, max[r]);
            score[0] = column(s, targets[r]).map_or(0.0, |c| row[c] - max[r]);
        }
    });
}

pub(super) fn partial_grad(
    pool: &Pool,
    s: Loss,
    targets: &[u32],
    scale: f32,
    max: &[f32],
    sums: &[f32],
    logits: &mut [f32],
) {
    check(s, logits.len(), targets.len());
    let logits = Rows::new(logits, s.columns);
    pool.split(s.rows, rows_per_task(s), |part| {
        for r in part {
            // SAFETY: rows of different parts are disjoint.
            let (row, padding) = unsafe { logits.part(r..r + 1) }.split_at_mut(s.used);
            exp_into(row, max[r]);
            scale_row(row, scale / sums[r]);
            if let Some(c) = column(s, targets[r]) {
                row[c] -= scale;
            }
            padding.fill(0.0);
        }
    });
}
