//! AdamW and the sum of squares over flat ranges.
#![allow(unsafe_code, reason = "dispatch by processor, and disjoint parts of one output")]

use super::GRAIN;
use super::pool::{Pool, Rows};
use super::simd::{Simd, dispatched, lane_sum};
use crate::backend::AdamW;

#[inline(always)]
fn adamw_body<S: Simd>(_: S, a: AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let keep = 1.0 - a.learning_rate * a.weight_decay;
    let rate = a.learning_rate / a.correction1;
    let root = 1.0 / a.correction2.sqrt();
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * a.gradient_scale;
        *m = a.beta1 * *m + (1.0 - a.beta1) * g;
        *v = a.beta2 * *v + (1.0 - a.beta2) * g * g;
        *p = *p * keep - rate * *m / (v.sqrt() * root + a.epsilon);
    }
}

dispatched! {
    fn adamw_part(a: AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) = adamw_body;
}

#[inline(always)]
fn read_body<S: Simd>(s: S, values: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 8];
    for block in values.chunks_exact(8 * S::LANES) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the block has eight vectors.
            *sum = s.add(*sum, unsafe { s.load(block.as_ptr().add(i * S::LANES)) });
        }
    }
    let sum = sums.into_iter().reduce(|a, b| s.add(a, b)).unwrap_or(s.splat(0.0));
    s.sum(sum)
}

dispatched! { fn read_part(values: &[f32]) -> f32 = read_body; }

/// Adds values up, but for the last few, only to read them: 1 MiB to a task.
pub(super) fn read_through(pool: &Pool, values: &[f32]) -> f32 {
    let grain = 256 << 10;
    let mut sums = vec![0.0; values.len().div_ceil(grain)];
    let out = Rows::new(&mut sums, 1);
    pool.split(values.len(), grain, |part| {
        let at = part.start / grain;
        // SAFETY: each task has a sum of its own.
        let to = unsafe { out.part(at..at + 1) };
        to[0] = read_part(&values[part]);
    });
    sums.iter().sum()
}

pub(super) fn adamw(
    pool: &Pool,
    step: AdamW,
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) {
    assert!(p.len() == g.len() && m.len() == g.len() && v.len() == g.len(), "adamw");
    let (p, m, v) = (Rows::new(p, 1), Rows::new(m, 1), Rows::new(v, 1));
    pool.split(g.len(), GRAIN, |part| {
        // SAFETY: parts are disjoint.
        let (p, m, v) =
            unsafe { (p.part(part.clone()), m.part(part.clone()), v.part(part.clone())) };
        adamw_part(step, p, &g[part], m, v);
    });
}

#[inline(always)]
fn sum_squares_body<S: Simd>(_: S, values: &[f32]) -> f64 {
    // Sums in f32 over short stretches, in f64 between them.
    values.chunks(1024).map(|c| f64::from(lane_sum(c.len(), |i| c[i] * c[i]))).sum()
}

dispatched! { fn sum_squares_part(values: &[f32]) -> f64 = sum_squares_body; }

/// Parts whose sums lie on the stack: a step allocates nothing.
const PARTS: usize = 256;

pub(super) fn sum_squares(pool: &Pool, values: &[f32]) -> f64 {
    let mut total = 0.0;
    for values in values.chunks(PARTS * GRAIN) {
        let mut sums = [0.0f64; PARTS];
        let slots = std::sync::Mutex::new(&mut sums);
        pool.split(values.len(), GRAIN, |part| {
            let index = part.start / GRAIN;
            let sum = sum_squares_part(&values[part]);
            slots.lock().expect("nothing panics under the lock")[index] = sum;
        });
        sums[..values.len().div_ceil(GRAIN)].iter().for_each(|sum| total += sum);
    }
    total
}
