//! Every kernel of the CPU backend against its plain reference, on random shapes. A failure prints
//! the seed that makes it again.

use std::sync::{Mutex, PoisonError};

use drumline_tensor::cpu::simd::{self, Level};
use drumline_tensor::reference::{self as plain, Random};
use drumline_tensor::{
    AdamW, Attention, Backend, CachedAttention, CachedSegment, Cpu, CpuOptions, DType, KV_BLOCK,
    Linear, Loss, MatmulPrecision, NormKind, Normalise, Rotary, WeightLayout,
};

/// The limit on instructions is the process's: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs `test` with one thread and with three, with every level of instructions that the processor
/// has, for each of `seeds` seeds.
fn for_seeds(seeds: u64, test: impl Fn(&Cpu, &mut Random, &str)) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let has = simd::level();
    for level in [Level::Plain, Level::Avx2, Level::Avx512, Level::Avx512Bf16] {
        if level > has {
            eprintln!("not tested: {level:?} is not on this processor");
            continue;
        }
        simd::limit(level);
        assert_eq!(simd::level(), level);
        for threads in [1, 3] {
            let cpu = Cpu::new(threads).unwrap();
            for seed in 0..seeds {
                let what = format!("{level:?}, {threads} threads, seed {seed}");
                test(&cpu, &mut Random::new(seed), &what);
            }
        }
    }
    simd::limit(Level::Avx512Bf16);
}

/// Asserts that values agree within `tolerance`, relative to the greatest of the wanted ones: a
/// sum of k products in f32 is off by about sqrt(k) roundings of its greatest term.
fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0.05f32, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}, element {i}: got {g}, want {w}");
    }
}

#[test]
fn linear_layers_and_their_gradients() {
    for_seeds(60, |cpu, r, what| {
        let rows = if r.below(2) == 0 { 1 + r.below(18) } else { 1 + r.below(150) };
        let layout = [WeightLayout::OutIn, WeightLayout::InOut][r.below(2)];
        let s = Linear { rows, input: 1 + r.below(140), output: 1 + r.below(200), layout };
        let what = format!("{what}, {s:?}");
        let (x, w) = (r.values(rows * s.input), r.values(s.input * s.output));
        let (bias, dy) = (r.values(s.output), r.values(rows * s.output));
        let bias = (r.below(2) == 0).then_some(&bias[..]);
        let mut y = vec![9.0; rows * s.output];
        cpu.linear(s, &x, &w, bias, &mut y);
        assert_close(&y, &plain::linear(s, &x, &w, bias), 1e-5, &what);
        let mut dx = vec![9.0; rows * s.input];
        cpu.linear_grad_input(s, &dy, &w, &mut dx);
        assert_close(&dx, &plain::linear_grad_input(s, &dy, &w), 1e-5, &what);
        let mut dw = r.values(s.input * s.output);
        let mut want = plain::linear_grad_weight(s, &x, &dy);
        let accumulate = r.below(2) == 0;
        if accumulate {
            want.iter_mut().zip(&dw).for_each(|(w, d)| *w += d);
        }
        cpu.linear_grad_weight(s, &x, &dy, &mut dw, accumulate);
        assert_close(&dw, &want, 1e-5, &what);
    });
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|x| plain::bf16(*x)).collect()
}

/// Asserts that a product of factors that were rounded to bf16 is as near to the exact one as two
/// roundings of 2^-9 each in every term allow, and the summing in f32.
fn assert_bf16_bound(got: &[f32], exact: &[f32], magnitudes: &[f32], what: &str) {
    for (i, ((g, e), m)) in got.iter().zip(exact).zip(magnitudes).enumerate() {
        let bound = m * (1.0 / 256.0 + 1e-4);
        assert!((g - e).abs() <= bound, "{what}, element {i}: got {g}, want {e} +- {bound}");
    }
}

#[test]
fn bf16_linear_layers_round_their_factors_and_nothing_else() {
    for_seeds(40, |cpu, r, what| {
        let options = CpuOptions {
            threads: cpu.threads(),
            matmul: MatmulPrecision::Bf16,
            ..CpuOptions::default()
        };
        let cpu = Cpu::with_options(options).unwrap();
        let rows = if r.below(2) == 0 { 1 + r.below(18) } else { 1 + r.below(300) };
        let layout = [WeightLayout::OutIn, WeightLayout::InOut][r.below(2)];
        let input = if r.below(8) == 0 { 513 + r.below(700) } else { 1 + r.below(140) };
        let s = Linear { rows, input, output: 1 + r.below(200), layout };
        let what = format!("{what}, {s:?}");
        let (x, w) = (r.values(rows * s.input), r.values(s.input * s.output));
        let (bias, dy) = (r.values(s.output), r.values(rows * s.output));
        let bias = (r.below(2) == 0).then_some(&bias[..]);
        let [x2, w2, dy2] = [&x, &w, &dy].map(|v| rounded(v));
        let abs = |v: &[f32]| v.iter().map(|x| x.abs()).collect::<Vec<f32>>();
        let mut y = vec![9.0; rows * s.output];
        cpu.linear(s, &x, &w, bias, &mut y);
        assert_close(&y, &plain::linear(s, &x2, &w2, bias), 2e-5, &what);
        let magnitudes = plain::linear(s, &abs(&x), &abs(&w), None);
        assert_bf16_bound(&y, &plain::linear(s, &x, &w, bias), &magnitudes, &what);
        let mut dx = vec![9.0; rows * s.input];
        cpu.linear_grad_input(s, &dy, &w, &mut dx);
        assert_close(&dx, &plain::linear_grad_input(s, &dy2, &w2), 2e-5, &what);
        let mut dw = r.values(s.input * s.output);
        let mut want = plain::linear_grad_weight(s, &x2, &dy2);
        let accumulate = r.below(2) == 0;
        if accumulate {
            want.iter_mut().zip(&dw).for_each(|(w, d)| *w += d);
        }
        cpu.linear_grad_weight(s, &x, &dy, &mut dw, accumulate);
        assert_close(&dw, &want, 2e-5, &what);
    });
}

#[test]
fn deterministic_products_repeat_bit_for_bit_on_any_number_of_threads() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for matmul in [MatmulPrecision::F32, MatmulPrecision::Bf16] {
        let backend = |threads| {
            Cpu::with_options(CpuOptions { threads, matmul, deterministic: true }).unwrap()
        };
        let backends = [1, 2, 3, 5].map(backend);
        let mut r = Random::new(5);
        for (rows, input, output) in [(700, 600, 100), (90, 70, 300), (256, 1100, 130)] {
            for layout in [WeightLayout::OutIn, WeightLayout::InOut] {
                let s = Linear { rows, input, output, layout };
                let (x, w, dy) =
                    (r.values(rows * input), r.values(input * output), r.values(rows * output));
                let run = |cpu: &Cpu| {
                    let (mut y, mut dx) = (vec![0.0; rows * output], vec![0.0; rows * input]);
                    let mut dw = vec![0.0; input * output];
                    cpu.linear(s, &x, &w, None, &mut y);
                    cpu.linear_grad_input(s, &dy, &w, &mut dx);
                    cpu.linear_grad_weight(s, &x, &dy, &mut dw, false);
                    (y, dx, dw)
                };
                let one = run(&backends[0]);
                for cpu in &backends[1..] {
                    assert!(run(cpu) == one, "{matmul:?} {s:?} on {} threads", cpu.threads());
                }
            }
        }
    }
}

#[test]
fn bf16_linear_layers_repeat_bit_for_bit_on_any_number_of_threads() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if simd::level() < Level::Avx512Bf16 {
        eprintln!("not tested: this processor has no AVX-512 BF16");
        return;
    }
    let backend = |threads| {
        Cpu::with_options(CpuOptions {
            threads,
            matmul: MatmulPrecision::Bf16,
            ..CpuOptions::default()
        })
        .unwrap()
    };
    let (one, three) = (backend(1), backend(3));
    let mut r = Random::new(3);
    for (rows, input, output) in [(700, 600, 100), (40, 70, 300), (1, 1300, 90)] {
        let s = Linear { rows, input, output, layout: WeightLayout::OutIn };
        let (x, w, dy) =
            (r.values(rows * input), r.values(input * output), r.values(rows * output));
        let run = |cpu: &Cpu| {
            let (mut y, mut dw) = (vec![0.0; rows * output], vec![0.0; input * output]);
            cpu.linear(s, &x, &w, None, &mut y);
            cpu.linear_grad_weight(s, &x, &dy, &mut dw, false);
            (y, dw)
        };
        assert_eq!(run(&one), run(&three), "{s:?}");
        // A row does not depend on the others.
        let (all, _) = run(&one);
        let mut last = vec![0.0; output];
        let alone = Linear { rows: 1, ..s };
        one.linear(alone, &x[(rows - 1) * input..], &w, None, &mut last);
        assert_eq!(last, all[(rows - 1) * output..], "{s:?}");
    }
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

/// Rows of `width` as 16-bit numbers of a scale of their own: what int8 is multiplied by without
/// AVX-512 BF16.
fn whole_numbers(x: &[f32], width: usize) -> Vec<f32> {
    let row = |row: &[f32]| -> Vec<f32> {
        let scale = row.iter().fold(0.0f32, |g, x| g.max(x.abs())) / 32767.0;
        row.iter().map(|x| (x / scale).round_ties_even() * scale).collect()
    };
    x.chunks_exact(width).flat_map(row).collect()
}

#[test]
fn stored_matrices_multiply_as_what_they_were_rounded_to() {
    for_seeds(30, |cpu, r, what| {
        let rows = if r.below(2) == 0 { 1 + r.below(18) } else { 1 + r.below(300) };
        let layout = [WeightLayout::OutIn, WeightLayout::InOut][r.below(2)];
        let input = if r.below(8) == 0 { 513 + r.below(700) } else { 1 + r.below(140) };
        let s = Linear { rows, input, output: 1 + r.below(200), layout };
        let (x, bias) = (r.values(rows * s.input), r.values(s.output));
        let mut w = r.values(s.input * s.output);
        w.iter_mut().for_each(|x| *x = x.signum() * x.abs().max(1e-3));
        let bias = (r.below(2) == 0).then_some(&bias[..]);
        for dtype in [DType::F32, DType::F16, DType::Bf16, DType::I8] {
            let what = format!("{what}, {dtype:?}, {s:?}");
            let w2 = stored(dtype, s, &w);
            let x2 = match (dtype, simd::level()) {
                (DType::F32 | DType::F16, _) => x.clone(),
                (DType::I8, Level::Avx2 | Level::Avx512) => whole_numbers(&x, s.input),
                (DType::Bf16 | DType::I8, _) => rounded(&x),
            };
            let mut matrix = cpu.alloc_matrix(dtype, s).unwrap();
            cpu.write_matrix(&w, &mut matrix);
            let mut y = vec![9.0; rows * s.output];
            cpu.linear_stored(rows, &x, &matrix, bias, &mut y);
            assert_close(&y, &plain::linear(s, &x2, &w2, bias), 3e-5, &what);
            let whole = s.output.next_multiple_of(16) * s.input.next_multiple_of(4);
            assert!(cpu.matrix_bytes(&matrix) <= (whole + 16) * dtype.bytes() + s.output * 4);
            let tokens: Vec<u32> = (0..9).map(|_| r.below(s.output + 9) as u32).collect();
            let mut rows = vec![9.0; 9 * s.input];
            cpu.embed_stored(&tokens, 3, &matrix, &mut rows);
            for (row, token) in rows.chunks_exact(s.input).zip(&tokens) {
                let o = (*token as usize).checked_sub(3).filter(|o| *o < s.output);
                let at = |i: usize, o: usize| match layout {
                    WeightLayout::OutIn => w2[o * s.input + i],
                    WeightLayout::InOut => w2[i * s.output + o],
                };
                let want: Vec<f32> = (0..s.input).map(|i| o.map_or(0.0, |o| at(i, o))).collect();
                assert_close(row, &want, 1e-6, &what);
            }
        }
    });
}

#[test]
fn a_row_of_a_stored_product_does_not_depend_on_the_others_nor_on_threads() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (one, three) = (Cpu::new(1).unwrap(), Cpu::new(3).unwrap());
    let mut r = Random::new(8);
    let s = Linear { rows: 170, input: 1300, output: 170, layout: WeightLayout::OutIn };
    let (x, w) = (r.values(s.rows * s.input), r.values(s.input * s.output));
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::I8] {
        if simd::level() < Level::Avx2 {
            eprintln!("not tested: this processor has no kernels for panels");
            return;
        }
        let mut matrix = one.alloc_matrix(dtype, s).unwrap();
        one.write_matrix(&w, &mut matrix);
        let mut all = vec![0.0; s.rows * s.output];
        three.linear_stored(s.rows, &x, &matrix, None, &mut all);
        for rows in [1, 2, 5, 16, 33, 70] {
            let mut some = vec![0.0; rows * s.output];
            one.linear_stored(rows, &x[..rows * s.input], &matrix, None, &mut some);
            assert_eq!(some, all[..rows * s.output], "{dtype:?}, {rows} rows");
        }
    }
}

#[test]
fn int8_sums_of_the_greatest_factors_do_not_overflow_and_rows_that_are_not_finite_stay_so() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let cpu = Cpu::new(1).unwrap();
    let s = Linear { rows: 3, input: 2050, output: 50, layout: WeightLayout::OutIn };
    let mut matrix = cpu.alloc_matrix(DType::I8, s).unwrap();
    cpu.write_matrix(&vec![-2.0; s.input * s.output], &mut matrix);
    let (mut x, mut y) = (vec![3.0; s.rows * s.input], vec![0.0; s.rows * s.output]);
    x[2 * s.input + 7] = f32::INFINITY;
    cpu.linear_stored(s.rows, &x, &matrix, None, &mut y);
    let (finite, last) = y.split_at(2 * s.output);
    assert_close(finite, &vec![-2.0 * 3.0 * 2050.0; 2 * s.output], 1e-5, "greatest factors");
    assert!(last.iter().all(|y| !y.is_finite()));
}

#[test]
fn norms_with_residual_and_their_gradients() {
    for_seeds(40, |cpu, r, what| {
        let kind = [NormKind::Layer, NormKind::Rms][r.below(2)];
        let s = Normalise { rows: 1 + r.below(150), width: 1 + r.below(100), kind, epsilon: 1e-5 };
        let what = format!("{what}, {s:?}");
        let (n, d) = (s.rows, s.width);
        let (x, branch, dy) = (r.values(n * d), r.values(n * d), r.values(n * d));
        let (gain, beta, extra) = (r.values(d), r.values(d), r.values(d));
        let bias = (kind == NormKind::Layer).then_some(&beta[..]);
        let (mut sum, mut y, mut stats) = (vec![9.0; n * d], vec![9.0; n * d], vec![9.0; 2 * n]);
        cpu.add_norm(s, &x, &branch, Some(&extra), &mut sum, &gain, bias, &mut y, &mut stats);
        let want_sum: Vec<f32> = (0..n * d).map(|i| x[i] + branch[i] + extra[i % d]).collect();
        assert_close(&sum, &want_sum, 1e-6, &what);
        let (mut y2, mut stats2) = (vec![9.0; n * d], vec![9.0; 2 * n]);
        cpu.norm(s, &sum, &gain, bias, &mut y2, &mut stats2);
        assert_eq!((&y, &stats), (&y2, &stats2), "{what}");
        let before = r.values(n * d);
        let (mut dx, mut dgain, mut dbias) = (before.clone(), vec![1.0; d], vec![2.0; d]);
        let to_bias = bias.is_some().then_some(&mut dbias[..]);
        cpu.norm_grad(s, &dy, &sum, &gain, &stats, &mut dx, &mut dgain, to_bias);
        let (mut want_dgain, mut want_dbias) = (vec![1.0; d], vec![2.0; d]);
        let zeros = vec![0.0; d];
        for row in 0..n {
            let at = row * d..(row + 1) * d;
            let (want, _, _) = plain::norm_row(s, &sum[at.clone()], &gain, bias.unwrap_or(&zeros));
            assert_close(&y[at.clone()], &want, 2e-4, &what);
            let (mut want, g, b) =
                plain::norm_row_grad(s, &dy[at.clone()], &sum[at.clone()], &gain);
            want.iter_mut().zip(&before[at.clone()]).for_each(|(w, b)| *w += b);
            assert_close(&dx[at], &want, 2e-4, &what);
            want_dgain.iter_mut().zip(g).for_each(|(w, g)| *w += g);
            want_dbias.iter_mut().zip(b).for_each(|(w, b)| *w += b);
        }
        assert_close(&dgain, &want_dgain, 2e-4, &what);
        if bias.is_some() {
            assert_close(&dbias, &want_dbias, 1e-5, &what);
        }
    });
}

#[test]
fn sums_of_columns_and_of_squares_and_additions() {
    for_seeds(30, |cpu, r, what| {
        let (rows, columns) = (1 + r.below(90), 1 + r.below(200));
        let values = r.values(rows * columns);
        let mut sums = vec![1.0; columns];
        cpu.add_column_sums(rows, columns, &values, &mut sums);
        let want: Vec<f32> = (0..columns)
            .map(|c| 1.0 + (0..rows).map(|r| values[r * columns + c]).sum::<f32>())
            .collect();
        assert_close(&sums, &want, 1e-5, what);
        let long = r.values(r.clone().below(100_000));
        let want: f64 = long.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let got = cpu.sum_squares(&long);
        assert!((got - want).abs() <= 1e-6 * want.max(1.0), "{what}: {got} {want}");
        let (a, bias) = (r.values(rows * columns), r.values(columns));
        let mut out = vec![0.0; rows * columns];
        cpu.add(&a, &values, Some(&bias), &mut out);
        let want: Vec<f32> = (0..out.len()).map(|i| a[i] + values[i] + bias[i % columns]).collect();
        assert_close(&out, &want, 1e-6, what);
    });
}

#[test]
fn rotary_positions_turn_and_turn_back() {
    for_seeds(20, |cpu, r, what| {
        let (heads, half, rows) = (1 + r.below(4), 1 + r.below(20), 1 + r.below(20));
        let s = Rotary {
            rows,
            width: (heads + 1) * 2 * half,
            heads,
            head_dim: 2 * half,
            inverse: false,
        };
        let positions: Vec<u32> = (0..rows).map(|_| r.below(50) as u32).collect();
        let mut table = vec![0.0; 50 * 2 * half];
        for (p, row) in table.chunks_exact_mut(2 * half).enumerate() {
            for i in 0..half {
                let angle = p as f64 * 10_000f64.powf(-(i as f64) / half as f64);
                (row[i], row[half + i]) = (angle.cos() as f32, angle.sin() as f32);
            }
        }
        let x = r.values(rows * s.width);
        let (mut got, mut want) = (x.clone(), x.clone());
        cpu.rotary(s, &table, &positions, &mut got);
        for (row, p) in want.chunks_exact_mut(s.width).zip(&positions) {
            plain::rotary_row(s, 10_000.0, *p as usize, row);
        }
        assert_close(&got, &want, 1e-6, what);
        cpu.rotary(Rotary { inverse: true, ..s }, &table, &positions, &mut got);
        assert_close(&got, &x, 1e-6, what);
    });
}

fn attention_shape(r: &mut Random) -> Attention {
    let kv_heads = 1 + r.below(3);
    // Now and then longer than a tile of keys, so that running maxima are rescaled.
    let sequence = if r.below(6) == 0 { 257 + r.below(60) } else { 1 + r.below(100) };
    Attention {
        batch: 1 + r.below(2),
        sequence,
        heads: kv_heads * (1 + r.below(3)),
        kv_heads,
        head_dim: [4, 8, 16, 24, 64][r.below(5)],
    }
}

#[test]
fn attention_and_its_gradient() {
    for_seeds(24, |cpu, r, what| {
        let s = attention_shape(r);
        let what = format!("{what}, {s:?}");
        let rows = s.batch * s.sequence;
        let mut qkv = r.values(rows * s.qkv_width());
        // Sharper than chance, so that maxima matter.
        qkv.iter_mut().for_each(|x| *x *= 3.0);
        let (mut out, mut lse) =
            (vec![9.0; rows * s.heads * s.head_dim], vec![9.0; rows * s.heads]);
        cpu.attention(s, &qkv, &mut out, &mut lse);
        let (want, want_lse) = plain::attention(s, &qkv);
        assert_close(&out, &want, 1e-5, &what);
        assert_close(&lse, &want_lse, 1e-5, &what);
        let dout = r.values(out.len());
        let mut dqkv = vec![9.0; qkv.len()];
        cpu.attention_grad(s, &qkv, &out, &lse, &dout, &mut dqkv);
        assert_close(&dqkv, &plain::attention_grad(s, &qkv, &dout), 3e-5, &what);
    });
}

#[test]
fn attention_to_the_cache_equals_attention_to_the_sequence() {
    for_seeds(24, |cpu, r, what| {
        let s = Attention { batch: 1, ..attention_shape(r) };
        let what = format!("{what}, {s:?}");
        let (t, width) = (s.sequence, s.qkv_width());
        let qkv = r.values(t * width);
        let (want, _) = plain::attention(s, &qkv);
        let c = CachedAttention { heads: s.heads, kv_heads: s.kv_heads, head_dim: s.head_dim };
        let count = t.div_ceil(KV_BLOCK);
        // Blocks in a shuffled order, in a cache that is larger and full of other numbers.
        let mut blocks: Vec<u32> = (0..count as u32 + 3).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, r.below(i + 1));
        }
        let (mut keys, mut values) = (
            r.values((count + 3) * c.block_elements()),
            r.values((count + 3) * c.block_elements()),
        );
        let mut done = 0;
        while done < t {
            let rows = (1 + r.below(20)).min(t - done);
            let slots: Vec<u32> = (done..done + rows)
                .map(|p| blocks[p / KV_BLOCK] * KV_BLOCK as u32 + (p % KV_BLOCK) as u32)
                .collect();
            let new = &qkv[done * width..(done + rows) * width];
            cpu.cache_write(c, new, &slots, &mut keys, &mut values);
            let segment = CachedSegment { row: 0, rows, position: done, blocks: &blocks };
            let mut out = vec![9.0; rows * s.heads * s.head_dim];
            cpu.cached_attention(c, &[segment], new, &keys, &values, &mut out);
            let row = s.heads * s.head_dim;
            assert_close(&out, &want[done * row..(done + rows) * row], 1e-5, &what);
            done += rows;
        }
    });
}

#[test]
fn activations_and_their_gradients() {
    for_seeds(20, |cpu, r, what| {
        let (rows, width) = (1 + r.below(40), 1 + r.below(90));
        let x: Vec<f32> = r.values(rows * width).iter().map(|x| x * 6.0).collect();
        let dy = r.values(rows * width);
        let mut y = vec![9.0; rows * width];
        cpu.gelu(&x, &mut y);
        let want: Vec<f32> = x.iter().map(|x| plain::gelu(f64::from(*x)) as f32).collect();
        assert_close(&y, &want, 1e-6, what);
        let mut dx = x.clone();
        cpu.gelu_grad(&mut dx, &dy);
        let h = 1e-5;
        let want: Vec<f32> = (0..x.len())
            .map(|i| {
                let x = f64::from(x[i]);
                let slope = (plain::gelu(x + h) - plain::gelu(x - h)) / (2.0 * h);
                (slope * f64::from(dy[i])) as f32
            })
            .collect();
        assert_close(&dx, &want, 1e-5, what);

        let gate_up: Vec<f32> = r.values(rows * 2 * width).iter().map(|x| x * 6.0).collect();
        cpu.swiglu(width, &gate_up, &mut y);
        let pair = |i: usize| {
            let at = i / width * 2 * width + i % width;
            (f64::from(gate_up[at]), f64::from(gate_up[at + width]))
        };
        let want: Vec<f32> =
            (0..y.len()).map(|i| plain::swiglu(pair(i).0, pair(i).1) as f32).collect();
        assert_close(&y, &want, 1e-6, what);
        let mut d = gate_up.clone();
        cpu.swiglu_grad(width, &mut d, &dy);
        let mut want = vec![0.0; d.len()];
        for (i, dy) in dy.iter().enumerate() {
            let (g, u) = pair(i);
            let slope = (plain::swiglu(g + h, u) - plain::swiglu(g - h, u)) / (2.0 * h);
            let at = i / width * 2 * width + i % width;
            want[at] = (slope * f64::from(*dy)) as f32;
            want[at + width] = (plain::swiglu(g, 1.0) * f64::from(*dy)) as f32;
        }
        assert_close(&d, &want, 1e-5, what);
    });
}

#[test]
fn cross_entropy_whole_and_in_slices() {
    for_seeds(30, |cpu, r, what| {
        let (rows, vocab, slices) = (1 + r.below(40), 3 + r.below(150), 1 + r.below(3));
        let logits: Vec<f32> = r.values(rows * vocab).iter().map(|x| x * 8.0).collect();
        let targets: Vec<u32> = (0..rows).map(|_| r.below(vocab) as u32).collect();
        let scale = 0.25;
        let (mut want, mut want_grad) = (Vec::new(), Vec::new());
        for (row, target) in logits.chunks_exact(vocab).zip(&targets) {
            let (loss, grad) = plain::cross_entropy_row(row, *target as usize);
            want.push(loss as f32);
            want_grad.extend(grad.iter().map(|g| (g * 0.25) as f32));
        }
        let whole = Loss { rows, columns: vocab, used: vocab, offset: 0 };
        let (mut grad, mut losses) = (logits.clone(), vec![9.0; rows]);
        cpu.cross_entropy(whole, &targets, 0.0, &mut grad, &mut losses);
        assert_close(&losses, &want, 1e-5, what);
        assert_eq!(grad, logits, "{what}: a scale of 0 changes nothing");
        cpu.cross_entropy(whole, &targets, scale, &mut grad, &mut losses);
        assert_close(&losses, &want, 1e-5, what);
        assert_close(&grad, &want_grad, 1e-5, what);

        // The same in slices with padding, reduced by hand.
        let columns = vocab.div_ceil(slices);
        let parts: Vec<(Loss, Vec<f32>)> = (0..slices)
            .map(|i| {
                let offset = (i * columns).min(vocab);
                let used = columns.min(vocab - offset);
                let mut part = Vec::new();
                for row in logits.chunks_exact(vocab) {
                    part.extend(&row[offset..offset + used]);
                    part.extend(std::iter::repeat_n(f32::MAX, columns - used));
                }
                (Loss { rows, columns, used, offset }, part)
            })
            .collect();
        let mut max = vec![f32::NEG_INFINITY; rows];
        for (s, part) in &parts {
            let mut own = vec![9.0; rows];
            cpu.row_max(*s, part, &mut own);
            max.iter_mut().zip(own).for_each(|(m, o)| *m = m.max(o));
        }
        let mut sums = vec![0.0; 2 * rows];
        for (s, part) in &parts {
            let mut own = vec![9.0; 2 * rows];
            cpu.partial_cross_entropy(*s, &targets, part, &max, &mut own);
            sums.iter_mut().zip(own).for_each(|(s, o)| *s += o);
        }
        let got: Vec<f32> = (0..rows).map(|i| sums[i].ln() - sums[rows + i]).collect();
        assert_close(&got, &want, 1e-5, what);
        for (s, mut part) in parts {
            cpu.partial_cross_entropy_grad(s, &targets, scale, &max, &sums, &mut part);
            for (i, row) in part.chunks_exact(columns).enumerate() {
                let at = i * vocab + s.offset;
                assert_close(&row[..s.used], &want_grad[at..at + s.used], 1e-5, what);
                assert!(row[s.used..].iter().all(|x| *x == 0.0), "{what}: padding has a gradient");
            }
        }
    });
}

#[test]
fn embeddings_look_up_and_add_up() {
    for_seeds(20, |cpu, r, what| {
        let (rows, width, table_rows) = (1 + r.below(30), 1 + r.below(40), 1 + r.below(20));
        let offset = r.below(10);
        let table = r.values(table_rows * width);
        let indices: Vec<u32> = (0..rows).map(|_| r.below(table_rows + 15) as u32).collect();
        let place = |i: u32| (i as usize).checked_sub(offset).filter(|p| *p < table_rows);
        for accumulate in [false, true] {
            let before = r.values(rows * width);
            let mut out = before.clone();
            cpu.embed(width, &indices, offset, &table, &mut out, accumulate);
            for (i, index) in indices.iter().enumerate() {
                for c in 0..width {
                    let old = if accumulate { before[i * width + c] } else { 0.0 };
                    let want = old + place(*index).map_or(0.0, |p| table[p * width + c]);
                    assert_eq!(out[i * width + c], want, "{what}");
                }
            }
        }
        let dy = r.values(rows * width);
        let mut d = vec![0.0; table_rows * width];
        cpu.embed_grad(width, &indices, offset, &dy, &mut d);
        let mut want = vec![0.0; table_rows * width];
        for (i, index) in indices.iter().enumerate() {
            if let Some(p) = place(*index) {
                (0..width).for_each(|c| want[p * width + c] += dy[i * width + c]);
            }
        }
        assert_close(&d, &want, 1e-6, what);
    });
}

#[test]
fn adamw_steps() {
    for_seeds(10, |cpu, r, what| {
        let n = 1 + r.below(40_000);
        let step = AdamW {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            correction1: 0.271,
            correction2: 0.142_625,
            gradient_scale: 0.5,
        };
        let (p, g, m) = (r.values(n), r.values(n), r.values(n));
        let v: Vec<f32> = r.values(n).iter().map(|x| x * x).collect();
        let (mut p2, mut m2, mut v2) = (p.clone(), m.clone(), v.clone());
        cpu.adamw(step, &mut p2, &g, &mut m2, &mut v2);
        for i in 0..n {
            let [p, g, m, v] = [p[i], g[i], m[i], v[i]].map(f64::from);
            let (p, m, v) = plain::adamw(step, p, g, m, v);
            for (got, want) in [(p2[i], p), (m2[i], m), (v2[i], v)] {
                assert!((f64::from(got) - want).abs() < 1e-5, "{what}, {i}: {got} {want}");
            }
        }
    });
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (one, four) = (Cpu::new(1).unwrap(), Cpu::new(4).unwrap());
    let mut r = Random::new(5);
    let s = Attention { batch: 2, sequence: 70, heads: 4, kv_heads: 2, head_dim: 16 };
    let qkv = r.values(140 * s.qkv_width());
    let run = |cpu: &Cpu| {
        let (mut out, mut lse) = (vec![0.0; 140 * 64], vec![0.0; 140 * 4]);
        cpu.attention(s, &qkv, &mut out, &mut lse);
        let mut dqkv = vec![0.0; qkv.len()];
        cpu.attention_grad(s, &qkv, &out, &lse, &out, &mut dqkv);
        (out, lse, dqkv, cpu.sum_squares(&qkv).to_bits())
    };
    assert_eq!(run(&one), run(&four));
}
