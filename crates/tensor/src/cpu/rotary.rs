//! Rotary positions, in place.
#![allow(unsafe_code, reason = "dispatch by processor, and disjoint parts of one output")]

use super::GRAIN;
use super::pool::{Pool, Rows};
use super::simd::{Simd, dispatched};
use crate::shape::Rotary;

#[inline(always)]
fn row_body<S: Simd>(_: S, sign: f32, cos: &[f32], sin: &[f32], heads: &mut [f32]) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(2 * half) {
        let (low, high) = head.split_at_mut(half);
        for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let s = s * sign;
            let (x, y) = (*a, *b);
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}

dispatched! { fn rotate_row(sign: f32, cos: &[f32], sin: &[f32], heads: &mut [f32]) = row_body; }

pub(super) fn rotary(pool: &Pool, s: Rotary, table: &[f32], positions: &[u32], x: &mut [f32]) {
    assert!(positions.len() == s.rows && x.len() == s.rows * s.width, "rotary");
    assert!(s.heads * s.head_dim <= s.width && s.head_dim.is_multiple_of(2), "rotary");
    let sign = if s.inverse { -1.0 } else { 1.0 };
    let half = s.head_dim / 2;
    let rows = Rows::new(x, s.width);
    pool.split(s.rows, (GRAIN / s.width).max(1), |part| {
        for row in part {
            let position = positions[row] as usize * s.head_dim;
            let (cos, sin) = table[position..position + s.head_dim].split_at(half);
            // SAFETY: rows of different parts are disjoint.
            let x = unsafe { rows.part(row..row + 1) };
            rotate_row(sign, cos, sin, &mut x[..s.heads * s.head_dim]);
        }
    });
}
