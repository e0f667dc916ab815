//! GELU and SwiGLU, forward and backward.
#![allow(unsafe_code, reason = "dispatch by processor, and disjoint parts of one output")]

use super::GRAIN;
use super::pool::{Pool, Rows};
use super::simd::{Simd, dispatched, sigmoid};

/// sqrt(2 / pi) * 2: GELU's tanh form is `x * sigmoid(2 u)` with `u = sqrt(2 / pi) (x + c x^3)`.
const TWO_ROOT: f32 = 1.595_769;
/// The cubic coefficient of GELU's tanh form.
const CUBIC: f32 = 0.044_715;

#[inline(always)]
fn gelu_body<S: Simd>(_: S, x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x * sigmoid::<S>(TWO_ROOT * (x + CUBIC * x * x * x));
    }
}

dispatched! { fn gelu_part(x: &[f32], y: &mut [f32]) = gelu_body; }

#[inline(always)]
fn gelu_grad_body<S: Simd>(_: S, x: &[f32], dy: &mut [f32]) {
    for (&v, dy) in x.iter().zip(dy) {
        let s = sigmoid::<S>(TWO_ROOT * (v + CUBIC * v * v * v));
        let slope = TWO_ROOT * (1.0 + 3.0 * CUBIC * v * v);
        *dy *= s + v * s * (1.0 - s) * slope;
    }
}

dispatched! { fn gelu_grad_part(x: &[f32], dy: &mut [f32]) = gelu_grad_body; }

#[inline(always)]
fn swiglu_body<S: Simd>(_: S, gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
        *y = g * sigmoid::<S>(g) * u;
    }
}

dispatched! { fn swiglu_row(gate: &[f32], up: &[f32], y: &mut [f32]) = swiglu_body; }

#[inline(always)]
fn swiglu_grad_body<S: Simd>(_: S, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    for ((g, u), &dy) in gate.iter_mut().zip(up).zip(dy) {
        let s = sigmoid::<S>(*g);
        let silu = *g * s;
        let dgate = dy * *u * (s + silu * (1.0 - s));
        *u = dy * silu;
        *g = dgate;
    }
}

dispatched! { fn swiglu_grad_row(gate: &mut [f32], up: &mut [f32], dy: &[f32]) = swiglu_grad_body; }

pub(super) fn gelu(pool: &Pool, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "gelu");
    let out = Rows::new(y, 1);
    pool.split(x.len(), GRAIN, |part| {
        // SAFETY: parts are disjoint.
        gelu_part(&x[part.clone()], unsafe { out.part(part) });
    });
}

pub(super) fn gelu_grad(pool: &Pool, x: &[f32], dy: &mut [f32]) {
    assert_eq!(x.len(), dy.len(), "gelu gradient");
    let out = Rows::new(dy, 1);
    pool.split(x.len(), GRAIN, |part| {
        // SAFETY: parts are disjoint.
        gelu_grad_part(&x[part.clone()], unsafe { out.part(part) });
    });
}

pub(super) fn swiglu(pool: &Pool, width: usize, gate_up: &[f32], y: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * y.len(), "swiglu");
    let rows = y.len() / width;
    let out = Rows::new(y, width);
    pool.split(rows, (GRAIN / width).max(1), |part| {
        for row in part {
            let (gate, up) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            // SAFETY: rows of different parts are disjoint.
            swiglu_row(gate, up, unsafe { out.part(row..row + 1) });
        }
    });
}

pub(super) fn swiglu_grad(pool: &Pool, width: usize, gate_up: &mut [f32], dy: &[f32]) {
    assert_eq!(gate_up.len(), 2 * dy.len(), "swiglu gradient");
    let rows = dy.len() / width;
    let out = Rows::new(gate_up, 2 * width);
    pool.split(rows, (GRAIN / width).max(1), |part| {
        for row in part {
            // SAFETY: rows of different parts are disjoint.
            let (gate, up) = unsafe { out.part(row..row + 1) }.split_at_mut(width);
            swiglu_grad_row(gate, up, &dy[row * width..(row + 1) * width]);
        }
    });
}
