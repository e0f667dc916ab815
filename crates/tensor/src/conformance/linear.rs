//! Linear layers: f32, bf16, stored matrices.

use super::{POISON, Slices, assert_close};
use crate::reference::{self as plain, Random};
use crate::{Backend, DType, Linear, WeightLayout};

/// Checks linear layers of f32 and their gradients.
///
/// # Panics
/// When a result is not the reference's.
pub fn linear_layers_and_their_gradients<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
    let rows = if r.below(2) == 0 { 1 + r.below(18) } else { 1 + r.below(150) };
    let layout = [WeightLayout::OutIn, WeightLayout::InOut][r.below(2)];
    let s = Linear { rows, input: 1 + r.below(140), output: 1 + r.below(200), layout };
    let what = &format!("{what}, {s:?}");
    let (x, w) = (r.values(rows * s.input), r.values(s.input * s.output));
    let (bias, dy) = (r.values(s.output), r.values(rows * s.output));
    let bias = (r.below(2) == 0).then_some(&bias[..]);
    let mut y = vec![POISON; rows * s.output];
    b.linear(s, &x, &w, bias, &mut y);
    assert_close(&y, &plain::linear(s, &x, &w, bias), 1e-5, what);
    let mut dx = vec![POISON; rows * s.input];
    b.linear_grad_input(s, &dy, &w, &mut dx);
    assert_close(&dx, &plain::linear_grad_input(s, &dy, &w), 1e-5, what);
    let mut dw = r.values(s.input * s.output);
    let mut want = plain::linear_grad_weight(s, &x, &dy);
    let accumulate = r.below(2) == 0;
    if accumulate {
        want.iter_mut().zip(&dw).for_each(|(w, d)| *w += d);
    }
    b.linear_grad_weight(s, &x, &dy, &mut dw, accumulate);
    assert_close(&dw, &want, 1e-5, what);
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|x| plain::bf16(*x)).collect()
}

/// Asserts that a product of factors that were rounded to bf16 is as near to the exact one as two
/// roundings of 2^-8 each in every term allow (8 bits of significand, half a unit), and the summing
/// in f32.
fn assert_bf16_bound(got: &[f32], exact: &[f32], magnitudes: &[f32], what: &str) {
    for (i, ((g, e), m)) in got.iter().zip(exact).zip(magnitudes).enumerate() {
        let bound = m * (1.0 / 128.0 + 1e-4);
        assert!((g - e).abs() <= bound, "{what}, element {i}: got {g}, want {e} +- {bound}");
    }
}

/// Checks a backend whose products round their factors to bf16.
///
/// # Panics
/// When a result is not the reference's.
pub fn bf16_linear_layers_round_their_factors_and_nothing_else<B: Backend>(
    b: &B,
    r: &mut Random,
    what: &str,
) {
    let b = Slices::new(b, r);
    let rows = if r.below(2) == 0 { 1 + r.below(18) } else { 1 + r.below(300) };
    let layout = [WeightLayout::OutIn, WeightLayout::InOut][r.below(2)];
    let input = if r.below(8) == 0 { 513 + r.below(700) } else { 1 + r.below(140) };
    let s = Linear { rows, input, output: 1 + r.below(200), layout };
    let what = &format!("{what}, {s:?}");
    let (x, w) = (r.values(rows * s.input), r.values(s.input * s.output));
    let (bias, dy) = (r.values(s.output), r.values(rows * s.output));
    let bias = (r.below(2) == 0).then_some(&bias[..]);
    let [x2, w2, dy2] = [&x, &w, &dy].map(|v| rounded(v));
    let abs = |v: &[f32]| v.iter().map(|x| x.abs()).collect::<Vec<f32>>();
    let mut y = vec![POISON; rows * s.output];
    b.linear(s, &x, &w, bias, &mut y);
    assert_close(&y, &plain::linear(s, &x2, &w2, bias), 2e-5, what);
    let magnitudes = plain::linear(s, &abs(&x), &abs(&w), None);
    assert_bf16_bound(&y, &plain::linear(s, &x, &w, bias), &magnitudes, what);
    let mut dx = vec![POISON; rows * s.input];
    b.linear_grad_input(s, &dy, &w, &mut dx);
    assert_close(&dx, &plain::linear_grad_input(s, &dy2, &w2), 2e-5, what);
    let mut dw = r.values(s.input * s.output);
    let mut want = plain::linear_grad_weight(s, &x2, &dy2);
    let accumulate = r.below(2) == 0;
    if accumulate {
        want.iter_mut().zip(&dw).for_each(|(w, d)| *w += d);
    }
    b.linear_grad_weight(s, &x, &dy, &mut dw, accumulate);
    assert_close(&dw, &want, 2e-5, what);
}

/// What a matrix is after it was stored as `dtype`.
fn stored(dtype: DType, s: Linear, w: &[f32]) -> Vec<f32> {
    let output = |i: usize| match s.layout {
        WeightLayout::OutIn => i / s.input,
        WeightLayout::InOut => i % s.output,
    };
    let mut greatest = vec![0.0f32; s.output];
    for (i, x) in w.iter().enumerate() {
        greatest[output(i)] = greatest[output(i)].max(x.abs());
    }
    let value = |(i, x): (usize, &f32)| match dtype {
        DType::F32 => *x,
        DType::Bf16 => plain::bf16(*x),
        // The test's weights are normal numbers of f16: 10 bits after the first.
        DType::F16 => {
            let unit = 2f64.powi(f64::from(x.abs()).log2().floor() as i32 - 10);
            ((f64::from(*x) / unit).round_ties_even() * unit) as f32
        }
        DType::I8 => {
            let scale = greatest[output(i)] / 127.0;
            (x * (1.0 / scale)).round_ties_even() * scale
        }
    };
    w.iter().enumerate().map(value).collect()
}

/// Checks products with stored matrices, and looking their rows up.
///
/// # Panics
/// When a result is not the reference's.
pub fn stored_matrices_multiply_as_what_they_were_rounded_to<B: Backend>(
    b: &B,
    r: &mut Random,
    what: &str,
) {
    let b = Slices::new(b, r);
    let rows = if r.below(2) == 0 { 1 + r.below(18) } else { 1 + r.below(300) };
    let layout = [WeightLayout::OutIn, WeightLayout::InOut][r.below(2)];
    let input = if r.below(8) == 0 { 513 + r.below(700) } else { 1 + r.below(140) };
    let s = Linear { rows, input, output: 1 + r.below(200), layout };
    let (x, bias) = (r.values(rows * s.input), r.values(s.output));
    let mut w = r.values(s.input * s.output);
    w.iter_mut().for_each(|x| *x = x.signum() * x.abs().max(1e-3));
    let bias = (r.below(2) == 0).then_some(&bias[..]);
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::I8] {
        let what = &format!("{what}, {dtype:?}, {s:?}");
        let w2 = stored(dtype, s, &w);
        let x2 = if dtype == DType::Bf16 { rounded(&x) } else { x.clone() };
        let mut matrix = b.matrix(dtype, s);
        b.write_matrix(&w, &mut matrix);
        let mut y = vec![POISON; rows * s.output];
        b.linear_stored(rows, &x, &matrix, bias, &mut y);
        let want = plain::linear(s, &x2, &w2, bias);
        if dtype == DType::I8 {
            // A backend may round the other factor to bf16 or more finely.
            let abs = |v: &[f32]| v.iter().map(|x| x.abs()).collect::<Vec<f32>>();
            let magnitudes = plain::linear(s, &abs(&x), &abs(&w2), None);
            assert_bf16_bound(&y, &want, &magnitudes, what);
        } else {
            assert_close(&y, &want, 3e-5, what);
        }
        let whole = s.output.next_multiple_of(16) * s.input.next_multiple_of(16);
        assert!(b.matrix_bytes(&matrix) <= (whole + 16) * dtype.bytes() + s.output * 4);
        let tokens: Vec<u32> = (0..9).map(|_| r.below(s.output + 9) as u32).collect();
        let mut rows = vec![POISON; 9 * s.input];
        b.embed_stored(&tokens, 3, &matrix, &mut rows);
        for (row, token) in rows.chunks_exact(s.input).zip(&tokens) {
            let o = (*token as usize).checked_sub(3).filter(|o| *o < s.output);
            let at = |i: usize, o: usize| match layout {
                WeightLayout::OutIn => w2[o * s.input + i],
                WeightLayout::InOut => w2[i * s.output + o],
            };
            let want: Vec<f32> = (0..s.input).map(|i| o.map_or(0.0, |o| at(i, o))).collect();
            assert_close(row, &want, 1e-6, what);
        }
    }
}
