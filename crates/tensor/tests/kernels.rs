//! What the CPU backend promises beyond the suite of every backend (`conformance.rs`): the same bits on
//! any number of threads, products larger than every block, int8 beside 16-bit numbers.

mod levels;

use drumline_tensor::cpu::simd::Level;
use drumline_tensor::reference::{self as plain, Random};
use drumline_tensor::{
    Attention, Backend, Cpu, CpuOptions, DType, Linear, MatmulPrecision, WeightLayout,
};

/// Asserts that values agree within `tolerance`, relative to the greatest of the wanted ones: a
/// sum of k products in f32 is off by about sqrt(k) roundings of its greatest term.
fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0.05f32, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}, element {i}: got {g}, want {w}");
    }
}

fn backend(threads: usize, matmul: MatmulPrecision, deterministic: bool) -> Cpu {
    Cpu::with_options(CpuOptions { threads, matmul, deterministic }).unwrap()
}

/// The three products of a linear layer.
struct Layer {
    s: Linear,
    x: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
    bias: Vec<f32>,
}

impl Layer {
    fn new(r: &mut Random, rows: usize, input: usize, output: usize, layout: WeightLayout) -> Self {
        let s = Linear { rows, input, output, layout };
        let (x, w) = (r.values(rows * input), r.values(input * output));
        Self { s, x, w, dy: r.values(rows * output), bias: r.values(output) }
    }

    fn run(&self, cpu: &Cpu) -> [Vec<f32>; 3] {
        let Self { s, x, w, dy, bias } = self;
        let (mut y, mut dx) = (vec![f32::NAN; dy.len()], vec![f32::NAN; x.len()]);
        let mut dw = vec![1.0; w.len()];
        cpu.linear(*s, x, w, Some(bias), &mut y);
        cpu.linear_grad_input(*s, dy, w, &mut dx);
        cpu.linear_grad_weight(*s, x, dy, &mut dw, true);
        [y, dx, dw]
    }
}

const LAYOUTS: [WeightLayout; 2] = [WeightLayout::OutIn, WeightLayout::InOut];

#[test]
fn products_of_several_stretches_bands_and_parts_are_the_references() {
    levels::each(|level| {
        let mut r = Random::new(11);
        for (rows, input, output) in [(420, 530, 71), (61, 300, 3100), (33, 1030, 19)] {
            for layout in LAYOUTS {
                let layer = Layer::new(&mut r, rows, input, output, layout);
                let Layer { s, x, w, dy, bias } = &layer;
                let mut dw = plain::linear_grad_weight(*s, x, dy);
                dw.iter_mut().for_each(|d| *d += 1.0);
                let want =
                    [plain::linear(*s, x, w, Some(bias)), plain::linear_grad_input(*s, dy, w), dw];
                for threads in [1, 3] {
                    let got = layer.run(&backend(threads, MatmulPrecision::F32, false));
                    for (got, want) in got.iter().zip(&want) {
                        assert_close(got, want, 1e-5, &format!("{level:?}, {threads}, {s:?}"));
                    }
                }
            }
        }
    });
}

#[test]
fn deterministic_products_repeat_bit_for_bit_on_any_number_of_threads() {
    levels::each(|level| {
        for matmul in [MatmulPrecision::F32, MatmulPrecision::Bf16] {
            let backends = [1, 2, 3, 5].map(|threads| backend(threads, matmul, true));
            let mut r = Random::new(5);
            for (rows, input, output) in [(700, 600, 100), (90, 70, 300), (256, 1100, 130)] {
                for layout in LAYOUTS {
                    let layer = Layer::new(&mut r, rows, input, output, layout);
                    let one = layer.run(&backends[0]);
                    for cpu in &backends[1..] {
                        let what = format!("{level:?}, {matmul:?} {:?}", layer.s);
                        assert!(layer.run(cpu) == one, "{what} on {} threads", cpu.threads());
                    }
                }
            }
        }
    });
}

/// Without that option too, where the kernels are our own: on AVX2 all, with AVX-512 those of bf16.
#[test]
fn products_of_our_own_kernels_repeat_bit_for_bit_on_any_number_of_threads() {
    levels::each(|level| {
        let ours: &[MatmulPrecision] = match level {
            Level::Avx2 => &[MatmulPrecision::F32, MatmulPrecision::Bf16],
            Level::Avx512Bf16 => &[MatmulPrecision::Bf16],
            Level::Plain | Level::Avx512 => &[],
        };
        for matmul in ours {
            let (one, three) = (backend(1, *matmul, false), backend(3, *matmul, false));
            let mut r = Random::new(3);
            for (rows, input, output) in [(700, 600, 100), (40, 70, 300), (17, 1300, 90)] {
                let layer = Layer::new(&mut r, rows, input, output, WeightLayout::OutIn);
                let what = format!("{level:?}, {matmul:?} {:?}", layer.s);
                let all = layer.run(&one);
                assert!(all == layer.run(&three), "{what}");
                // A row does not depend on the others.
                let mut some = vec![0.0; 17 * output];
                let s = Linear { rows: 17, ..layer.s };
                let x = &layer.x[(rows - 17) * input..];
                one.linear(s, x, &layer.w, Some(&layer.bias), &mut some);
                assert_eq!(some, all[0][(rows - 17) * output..], "{what}");
            }
        }
    });
}

/// What a matrix of `[output, input]` is after it was stored as int8.
fn bytes(s: Linear, w: &[f32]) -> Vec<f32> {
    let row = |row: &[f32]| -> Vec<f32> {
        let scale = row.iter().fold(0.0f32, |g, x| g.max(x.abs())) / 127.0;
        row.iter().map(|x| (x * (1.0 / scale)).round_ties_even() * scale).collect()
    };
    w.chunks_exact(s.input).flat_map(row).collect()
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

/// Closer than the suite of every backend asks, which allows other factors in bf16.
#[test]
fn int8_is_multiplied_by_16_bit_numbers_or_by_bf16_and_by_nothing_coarser() {
    levels::each(|level| {
        for seed in 0..60 {
            let mut r = Random::new(seed);
            let rows = if r.below(2) == 0 { 1 + r.below(18) } else { 1 + r.below(100) };
            let input = if r.below(8) == 0 { 513 + r.below(700) } else { 1 + r.below(140) };
            let output = 1 + r.below(200);
            let s = Linear { rows, input, output, layout: WeightLayout::OutIn };
            let (x, w) = (r.values(rows * input), r.values(input * output));
            let x2 = match level {
                Level::Avx2 | Level::Avx512 => whole_numbers(&x, input),
                Level::Plain | Level::Avx512Bf16 => x.iter().map(|x| plain::bf16(*x)).collect(),
            };
            let want = plain::linear(s, &x2, &bytes(s, &w), None);
            for threads in [1, 3] {
                let cpu = Cpu::new(threads).unwrap();
                let mut matrix = cpu.alloc_matrix(DType::I8, s).unwrap();
                cpu.write_matrix(&w, &mut matrix);
                let mut y = vec![f32::NAN; rows * output];
                cpu.linear_stored(rows, &x, &matrix, None, &mut y);
                let what = format!("{level:?}, {threads} threads, seed {seed}, {s:?}");
                assert_close(&y, &want, 3e-5, &what);
                let whole = output.next_multiple_of(16) * input.next_multiple_of(4);
                assert!(cpu.matrix_bytes(&matrix) <= whole + 16 + output * 4, "{what}");
            }
        }
    });
}

#[test]
fn a_row_of_a_stored_product_does_not_depend_on_the_others_nor_on_threads() {
    levels::each(|level| {
        if level < Level::Avx2 {
            return; // No kernels for panels.
        }
        let (one, three) = (Cpu::new(1).unwrap(), Cpu::new(3).unwrap());
        let mut r = Random::new(8);
        let s = Linear { rows: 170, input: 1300, output: 170, layout: WeightLayout::OutIn };
        let (x, w) = (r.values(s.rows * s.input), r.values(s.input * s.output));
        for dtype in [DType::F32, DType::F16, DType::Bf16, DType::I8] {
            let mut matrix = one.alloc_matrix(dtype, s).unwrap();
            one.write_matrix(&w, &mut matrix);
            let mut all = vec![0.0; s.rows * s.output];
            three.linear_stored(s.rows, &x, &matrix, None, &mut all);
            for rows in [1, 2, 5, 16, 33, 70] {
                let mut some = vec![0.0; rows * s.output];
                one.linear_stored(rows, &x[..rows * s.input], &matrix, None, &mut some);
                assert_eq!(some, all[..rows * s.output], "{level:?}, {dtype:?}, {rows} rows");
            }
        }
    });
}

#[test]
fn int8_sums_of_the_greatest_factors_do_not_overflow_and_rows_that_are_not_finite_stay_so() {
    levels::each(|level| {
        let cpu = Cpu::new(1).unwrap();
        let s = Linear { rows: 3, input: 2050, output: 50, layout: WeightLayout::OutIn };
        let mut matrix = cpu.alloc_matrix(DType::I8, s).unwrap();
        cpu.write_matrix(&vec![-2.0; s.input * s.output], &mut matrix);
        let (mut x, mut y) = (vec![3.0; s.rows * s.input], vec![0.0; s.rows * s.output]);
        x[2 * s.input + 7] = f32::INFINITY;
        cpu.linear_stored(s.rows, &x, &matrix, None, &mut y);
        let (finite, last) = y.split_at(2 * s.output);
        let want = vec![-2.0 * 3.0 * 2050.0; 2 * s.output];
        assert_close(finite, &want, 1e-5, &format!("{level:?}, greatest factors"));
        assert!(last.iter().all(|y| !y.is_finite()), "{level:?}");
    });
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    levels::each(|level| {
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
        assert_eq!(run(&one), run(&four), "{level:?}");
    });
}
