//! LayerNorm and RMSNorm with the residual addition, forward and backward; sums of columns.
#![allow(unsafe_code, reason = "dispatch by processor, and disjoint parts of one output")]

use super::GRAIN;
use super::pool::{Pool, Rows};
use super::simd::{Simd, dispatched, lane_sum};
use crate::shape::{NormKind, Normalise};

/// Rows whose gradients of gain and bias are summed together; fixed, so that the order of
/// additions does not depend on the number of threads.
const GRAD_ROWS: usize = 64;
/// Columns that one task sums: twelve cache lines of each row, so that memory is read in runs.
const SUM_COLUMNS: usize = 192;

#[inline(always)]
fn row_body<S: Simd>(
    _: S,
    s: Normalise,
    x: &[f32],
    gain: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) -> (f32, f32) {
    let d = s.width;
    let (x, gain, y) = (&x[..d], &gain[..d], &mut y[..d]);
    let inverse = 1.0 / d as f32;
    let mean = match s.kind {
        NormKind::Layer => lane_sum(d, |i| x[i]) * inverse,
        NormKind::Rms => 0.0,
    };
    let variance = lane_sum(d, |i| (x[i] - mean) * (x[i] - mean)) * inverse;
    let rstd = 1.0 / (variance + s.epsilon).sqrt();
    match bias {
        Some(bias) => {
            let bias = &bias[..d];
            for i in 0..d {
                y[i] = (x[i] - mean) * rstd * gain[i] + bias[i];
            }
        }
        None => {
            for i in 0..d {
                y[i] = (x[i] - mean) * rstd * gain[i];
            }
        }
    }
    (mean, rstd)
}

dispatched! {
    fn norm_row(s: Normalise, x: &[f32], gain: &[f32], bias: Option<&[f32]>, y: &mut [f32])
        -> (f32, f32) = row_body;
}

#[inline(always)]
fn add_body<S: Simd>(_: S, a: &[f32], b: &[f32], bias: Option<&[f32]>, sum: &mut [f32]) {
    match bias {
        Some(bias) => {
            for (((s, a), b), c) in sum.iter_mut().zip(a).zip(b).zip(bias) {
                *s = a + b + c;
            }
        }
        None => {
            for ((s, a), b) in sum.iter_mut().zip(a).zip(b) {
                *s = a + b;
            }
        }
    }
}

dispatched! {
    pub(super) fn add_row(a: &[f32], b: &[f32], bias: Option<&[f32]>, sum: &mut [f32]) = add_body;
}

pub(super) fn add(pool: &Pool, a: &[f32], b: &[f32], bias: Option<&[f32]>, sum: &mut [f32]) {
    assert!(a.len() == b.len() && a.len() == sum.len(), "add");
    let width = bias.map_or(1, <[f32]>::len);
    let (rows, grain) = (a.len() / width, (GRAIN / width).max(1));
    let out = Rows::new(sum, width);
    pool.split(rows, grain, |part| {
        // SAFETY: parts are disjoint.
        let out = unsafe { out.part(part.clone()) };
        let (a, b) =
            (&a[part.start * width..part.end * width], &b[part.start * width..part.end * width]);
        if bias.is_some() {
            for ((o, a), b) in
                out.chunks_exact_mut(width).zip(a.chunks_exact(width)).zip(b.chunks_exact(width))
            {
                add_row(a, b, bias, o);
            }
        } else {
            add_row(a, b, None, out);
        }
    });
}

pub(super) fn norm(
    pool: &Pool,
    s: Normalise,
    x: &[f32],
    gain: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
    stats: &mut [f32],
) {
    let d = s.width;
    assert!(x.len() == s.rows * d && y.len() == x.len() && stats.len() == 2 * s.rows, "norm");
    let (means, rstds) = stats.split_at_mut(s.rows);
    let (y, means, rstds) = (Rows::new(y, d), Rows::new(means, 1), Rows::new(rstds, 1));
    pool.split(s.rows, (GRAIN / d).max(1), |part| {
        for r in part {
            // SAFETY: rows of different parts are disjoint.
            let (y, mean, rstd) =
                unsafe { (y.part(r..r + 1), means.part(r..r + 1), rstds.part(r..r + 1)) };
            (mean[0], rstd[0]) = norm_row(s, &x[r * d..(r + 1) * d], gain, bias, y);
        }
    });
}

#[allow(clippy::too_many_arguments)]
pub(super) fn add_norm(
    pool: &Pool,
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
    let d = s.width;
    assert!(x.len() == s.rows * d && y.len() == x.len() && sum.len() == x.len(), "add_norm");
    assert!(branch.len() == x.len() && stats.len() == 2 * s.rows, "add_norm");
    let (means, rstds) = stats.split_at_mut(s.rows);
    let (sum, y) = (Rows::new(sum, d), Rows::new(y, d));
    let (means, rstds) = (Rows::new(means, 1), Rows::new(rstds, 1));
    pool.split(s.rows, (GRAIN / d).max(1), |part| {
        for r in part {
            // SAFETY: rows of different parts are disjoint.
            let (sum, y) = unsafe { (sum.part(r..r + 1), y.part(r..r + 1)) };
            // SAFETY: as above.
            let (mean, rstd) = unsafe { (means.part(r..r + 1), rstds.part(r..r + 1)) };
            add_row(&x[r * d..(r + 1) * d], &branch[r * d..(r + 1) * d], branch_bias, sum);
            (mean[0], rstd[0]) = norm_row(s, sum, gain, bias, y);
        }
    });
}

/// One row: adds to `dx`, and to the running sums of the gain's and bias's gradients.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn grad_body<S: Simd>(
    _: S,
    kind: NormKind,
    dy: &[f32],
    x: &[f32],
    gain: &[f32],
    mean: f32,
    rstd: f32,
    dx: &mut [f32],
    dgain: &mut [f32],
    dbias: Option<&mut [f32]>,
) {
    let d = dy.len();
    let (x, gain, dx, dgain) = (&x[..d], &gain[..d], &mut dx[..d], &mut dgain[..d]);
    let inverse = 1.0 / d as f32;
    let along = lane_sum(d, |i| dy[i] * gain[i] * (x[i] - mean)) * rstd * inverse;
    let average = match kind {
        NormKind::Layer => lane_sum(d, |i| dy[i] * gain[i]) * inverse,
        NormKind::Rms => 0.0,
    };
    for i in 0..d {
        let normal = (x[i] - mean) * rstd;
        dx[i] += rstd * (dy[i] * gain[i] - average - normal * along);
        dgain[i] += dy[i] * normal;
    }
    if let Some(dbias) = dbias {
        for (b, dy) in dbias.iter_mut().zip(dy) {
            *b += dy;
        }
    }
}

dispatched! {
    fn grad_row(kind: NormKind, dy: &[f32], x: &[f32], gain: &[f32], mean: f32, rstd: f32,
        dx: &mut [f32], dgain: &mut [f32], dbias: Option<&mut [f32]>) = grad_body;
}

#[allow(clippy::too_many_arguments)]
pub(super) fn norm_grad(
    pool: &Pool,
    s: Normalise,
    dy: &[f32],
    x: &[f32],
    gain: &[f32],
    stats: &[f32],
    dx: &mut [f32],
    dgain: &mut [f32],
    dbias: Option<&mut [f32]>,
) {
    let d = s.width;
    assert!(dy.len() == s.rows * d && x.len() == dy.len() && dx.len() == dy.len(), "norm gradient");
    let (means, rstds) = stats.split_at(s.rows);
    let parts = s.rows.div_ceil(GRAD_ROWS);
    let has_bias = dbias.is_some();
    let width = if has_bias { 2 * d } else { d };
    let dx = Rows::new(dx, d);
    pool.scratch(parts * width, |partial| {
        partial.fill(0.0);
        let partials = Rows::new(partial, width);
        pool.split(s.rows, GRAD_ROWS, |part| {
            let index = part.start / GRAD_ROWS;
            // SAFETY: each part has a row of partial sums of its own.
            let (dgain, dbias) = unsafe { partials.part(index..index + 1) }.split_at_mut(d);
            for r in part {
                // SAFETY: rows of different parts are disjoint.
                let dx = unsafe { dx.part(r..r + 1) };
                let (dy, x) = (&dy[r * d..(r + 1) * d], &x[r * d..(r + 1) * d]);
                let dbias = has_bias.then_some(&mut *dbias);
                grad_row(s.kind, dy, x, gain, means[r], rstds[r], dx, dgain, dbias);
            }
        });
        for row in partial.chunks_exact(width) {
            dgain.iter_mut().zip(&row[..d]).for_each(|(g, p)| *g += p);
        }
        if let Some(dbias) = dbias {
            for row in partial.chunks_exact(width) {
                dbias.iter_mut().zip(&row[d..]).for_each(|(b, p)| *b += p);
            }
        }
    });
}

#[inline(always)]
fn sums_body<S: Simd>(_: S, columns: usize, from: usize, values: &[f32], sums: &mut [f32]) {
    let mut running = [0.0f32; SUM_COLUMNS];
    let running = &mut running[..sums.len()];
    for row in values.chunks_exact(columns) {
        for (r, v) in running.iter_mut().zip(&row[from..]) {
            *r += v;
        }
    }
    sums.iter_mut().zip(running).for_each(|(s, r)| *s += *r);
}

dispatched! {
    fn sums_part(columns: usize, from: usize, values: &[f32], sums: &mut [f32]) = sums_body;
}

pub(super) fn add_column_sums(
    pool: &Pool,
    rows: usize,
    columns: usize,
    values: &[f32],
    sums: &mut [f32],
) {
    assert!(values.len() == rows * columns && sums.len() == columns, "column sums");
    let out = Rows::new(sums, 1);
    pool.split(columns, SUM_COLUMNS, |part| {
        // SAFETY: parts are disjoint columns.
        sums_part(columns, part.start, values, unsafe { out.part(part.clone()) });
    });
}
