//! What a backend keeps as bf16: every operation on activations gives what it gives on f32, but for the
//! rounding of what it writes.
//!
//! The bodies run an operation twice on the same values, all of them numbers of bf16: once with every
//! operand in f32, which the other bodies hold against the references, once with activations as
//! [`Backend::alloc_activation`] keeps them.

use super::rows::STEP;
use super::slices::Placed;
use crate::reference::{self as plain, Random};
use crate::{
    AdamW, Attention, Backend, DType, Linear, Loss, NormKind, Normalise, Rotary, Rounding,
    WeightLayout,
};

/// A rounding is off by up to 2^-9 of its value; where a result is rounded twice, or a rounded one is
/// used again, a few of these come together.
const TOLERANCE: f64 = 6e-3;
/// What lies around operands: a number of bf16 that no operation makes.
const GUARD: f32 = -1.5e38;

/// An operand: its values before, and what it is.
#[derive(Clone)]
struct Operand {
    values: Vec<f32>,
    activation: bool,
    result: bool,
}

fn activation(values: Vec<f32>) -> Operand {
    Operand { values, activation: true, result: false }
}

fn wide(values: Vec<f32>) -> Operand {
    Operand { values, activation: false, result: false }
}

fn result(operand: Operand) -> Operand {
    Operand { result: true, ..operand }
}

/// A result that is written and not read before.
fn written(elements: usize) -> Operand {
    result(activation(vec![f32::NAN; elements]))
}

fn distance(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
    let all: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    if off == 0.0 { 0.0 } else { (off / all).sqrt() }
}

/// Runs an operation on operands of both kinds and compares its results.
fn compare<B: Backend>(
    b: &B,
    what: &str,
    operands: &[Operand],
    r: &mut Random,
    run: impl Fn(&mut [Placed<B>]),
) {
    let mut wanted = Vec::new();
    for narrow in [false, true] {
        let mut placed: Vec<Placed<B>> = operands
            .iter()
            .map(|o| {
                let len = o.values.len();
                // Half of the time where vector accesses may be used.
                let start = if r.below(2) == 0 { 0 } else { 1 + r.below(9) };
                let mut all = vec![GUARD; start + len + r.below(9)];
                for (to, x) in all[start..].iter_mut().zip(&o.values) {
                    *to = if o.activation && !x.is_nan() { plain::bf16(*x) } else { *x };
                }
                let activation = o.activation && narrow;
                let buffer =
                    if activation { b.alloc_activation(all.len()) } else { b.alloc(all.len()) };
                let mut buffer = buffer.expect("a small allocation");
                let bytes = if activation { 2 } else { 4 };
                assert_eq!(b.bytes(&buffer), bytes * all.len(), "{what}");
                b.write(&all, b.view_mut(&mut buffer, 0..all.len()));
                Placed { buffer, start, len }
            })
            .collect();
        run(&mut placed);
        for (at, (o, p)) in operands.iter().zip(&placed).enumerate() {
            let mut all = vec![0.0; b.elements(&p.buffer)];
            b.read(b.view(&p.buffer, 0..all.len()), &mut all);
            b.status().expect("the device works");
            let end = p.start + p.len;
            let guard = if o.activation { plain::bf16(GUARD) } else { GUARD };
            let around = all[..p.start].iter().chain(&all[end..]);
            let whole = around.filter(|x| **x != GUARD && **x != guard).count() == 0;
            assert!(whole, "{what}: elements around operand {at} were written");
            let values = all[p.start..end].to_vec();
            if !o.result {
                continue;
            }
            if !narrow {
                wanted.push(values);
                continue;
            }
            let want = wanted.remove(0);
            let off = distance(&values, &want);
            assert!(off < TOLERANCE, "{what}: operand {at} is off by {off:e}");
        }
    }
}

/// Checks products whose factors, results and biases are kept as bf16.
///
/// # Panics
/// When a result is not that of f32.
pub fn narrow_linear_layers<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let layout = [WeightLayout::OutIn, WeightLayout::InOut][r.below(2)];
    let s =
        Linear { rows: 1 + r.below(90), input: 1 + r.below(90), output: 1 + r.below(90), layout };
    let what = &format!("{what}, {s:?}");
    let (x, w) = (r.values(s.rows * s.input), r.values(s.input * s.output));
    let (bias, dy) = (r.values(s.output), r.values(s.rows * s.output));
    let operands = [&x, &w, &bias].map(|v| activation(v.clone()));
    let with_bias = r.below(2) == 0;
    let y = [&operands[..], &[written(s.rows * s.output)]].concat();
    compare(b, what, &y, r, |p| {
        let [x, w, bias, y] = p else { unreachable!("four operands") };
        let bias = with_bias.then(|| bias.view(b));
        b.linear(s, x.view(b), w.view(b), bias, y.view_mut(b));
    });
    let dx = [activation(dy.clone()), activation(w), written(s.rows * s.input)];
    compare(b, what, &dx, r, |p| {
        let [dy, w, dx] = p else { unreachable!("three operands") };
        b.linear_grad_input(s, dy.view(b), w.view(b), dx.view_mut(b));
    });
    let dw = result(wide(r.values(s.input * s.output)));
    let accumulate = r.below(2) == 0;
    compare(b, what, &[activation(x), activation(dy), dw], r, |p| {
        let [x, dy, dw] = p else { unreachable!("three operands") };
        b.linear_grad_weight(s, x.view(b), dy.view(b), dw.view_mut(b), accumulate);
    });
}

/// Checks products with GELU behind them, forward and backward, against the operations one by one.
/// `fused` says whether the backend has them for widths that are multiples of eight.
///
/// # Panics
/// When a result is not that of the operations one by one.
pub fn narrow_epilogues<B: Backend>(b: &B, r: &mut Random, fused: bool, what: &str) {
    let layout = [WeightLayout::OutIn, WeightLayout::InOut][r.below(2)];
    let width = if r.below(4) == 0 { 1 + r.below(60) } else { 8 + 8 * r.below(9) };
    let s = Linear { rows: 1 + r.below(60), input: 1 + r.below(60), output: width, layout };
    let back = Linear { input: s.output, output: s.input, ..s };
    let what = &format!("{what}, {s:?}");
    let mut place = |elements: usize| {
        let mut buffer = b.alloc_activation(elements).expect("a small allocation");
        b.write(&r.values(elements), b.view_mut(&mut buffer, 0..elements));
        Placed::<B> { buffer, start: 0, len: elements }
    };
    let (x, w, bias) = (place(s.rows * s.input), place(s.input * s.output), place(s.output));
    let [mut up, mut act, mut up2, mut act2] = [(); 4].map(|()| place(s.rows * s.output));
    let did =
        b.linear_gelu(s, x.view(b), w.view(b), Some(bias.view(b)), up.view_mut(b), act.view_mut(b));
    assert_eq!(did, fused && width.is_multiple_of(8), "{what}");
    if !did {
        return;
    }
    b.linear(s, x.view(b), w.view(b), Some(bias.view(b)), up2.view_mut(b));
    b.gelu(up2.view(b), act2.view_mut(b));
    let dy = place(s.rows * s.input);
    let (mut dx, mut dx2) = (place(s.rows * s.output), place(s.rows * s.output));
    let did = b.linear_grad_input_gelu(back, dy.view(b), w.view(b), up.view(b), dx.view_mut(b));
    assert!(did, "{what}");
    b.linear_grad_input(back, dy.view(b), w.view(b), dx2.view_mut(b));
    b.gelu_grad(up.view(b), dx2.view_mut(b));
    for (got, want) in [(up, up2), (act, act2), (dx, dx2)] {
        let [got, want] = [got, want].map(|p| {
            let mut values = vec![0.0; p.len];
            b.read(p.view(b), &mut values);
            values
        });
        b.status().expect("the device works");
        let off = distance(&got, &want);
        assert!(off < TOLERANCE, "{what}: off by {off:e}");
    }
}

/// Checks attention over what is kept as bf16.
///
/// # Panics
/// When a result is not that of f32.
pub fn narrow_attention<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let kv_heads = 1 + r.below(2);
    let s = Attention {
        batch: 1 + r.below(2),
        sequence: 1 + r.below(150),
        heads: kv_heads * (1 + r.below(2)),
        kv_heads,
        head_dim: [8, 24, 64, 64, 128][r.below(5)],
    };
    let what = &format!("{what}, {s:?}");
    let rows = s.batch * s.sequence;
    let (qkv, out) = (r.values(rows * s.qkv_width()), rows * s.heads * s.head_dim);
    let dout = r.values(out);
    // Whole buffers: these are read sixteen bytes at a time, and nothing else is offered.
    let run = |narrow: bool| {
        let place = |values: &[f32]| {
            let buffer =
                if narrow { b.alloc_activation(values.len()) } else { b.alloc(values.len()) };
            let mut buffer = buffer.expect("a small allocation");
            let rounded: Vec<f32> = values.iter().map(|x| plain::bf16(*x)).collect();
            b.write(&rounded, b.view_mut(&mut buffer, 0..values.len()));
            Placed::<B> { buffer, start: 0, len: values.len() }
        };
        let (qkv, dout) = (place(&qkv), place(&dout));
        let (mut out, mut dqkv) = (place(&vec![1.0; out]), place(&vec![1.0; qkv.len]));
        let mut lse = b.alloc(rows * s.heads).expect("a small allocation");
        let lse_all = 0..rows * s.heads;
        b.attention(s, qkv.view(b), out.view_mut(b), b.view_mut(&mut lse, lse_all.clone()));
        let (lse, to) = (b.view(&lse, lse_all), dqkv.view_mut(b));
        b.attention_grad(s, qkv.view(b), out.view(b), lse, dout.view(b), to);
        [out, dqkv].map(|p| {
            let mut values = vec![0.0; p.len];
            b.read(p.view(b), &mut values);
            values
        })
    };
    let [want, got] = [false, true].map(run);
    b.status().expect("the device works");
    for (got, want) in got.iter().zip(&want) {
        let off = distance(got, want);
        assert!(off < TOLERANCE, "{what}: off by {off:e}");
    }
}

/// Checks everything else that takes activations.
///
/// # Panics
/// When a result is not that of f32.
pub fn narrow_rows<B: Backend>(b: &B, r: &mut Random, what: &str) {
    // Fours, and what is none.
    let width = if r.below(2) == 0 { 4 + 4 * r.below(40) } else { 1 + r.below(150) };
    let rows = 1 + r.below(80);
    let n = rows * width;
    let what = &format!("{what}, [{rows}, {width}]");
    let kind = [NormKind::Layer, NormKind::Rms][r.below(2)];
    let s = Normalise { rows, width, kind, epsilon: 1e-5 };
    let vector = |r: &mut Random| wide(r.values(width));
    let stats = || result(wide(vec![f32::NAN; 2 * rows]));
    let sum = result(wide(vec![f32::NAN; n]));
    let norm = [wide(r.values(n)), activation(r.values(n)), sum, vector(r), vector(r)];
    compare(b, what, &[&norm[..], &[written(n), stats()]].concat(), r, |p| {
        let [x, branch, sum, gain, bias, y, stats] = p else { unreachable!("seven operands") };
        let (gain, bias, stats) = (gain.view(b), Some(bias.view(b)), stats.view_mut(b));
        let (branch, sum, y) = (branch.view(b), sum.view_mut(b), y.view_mut(b));
        b.add_norm(s, x.view(b), branch, None, sum, gain, bias, y, stats);
    });
    let gradient = [wide(r.values(2 * rows)), result(wide(r.values(n))), result(vector(r))];
    let operands = [activation(r.values(n)), wide(r.values(n)), vector(r)];
    compare(b, what, &[&operands[..], &gradient].concat(), r, |p| {
        let [dy, x, gain, stats, dx, dgain] = p else { unreachable!("six operands") };
        let (x, gain, stats) = (x.view(b), gain.view(b), stats.view(b));
        b.norm_grad(s, dy.view(b), x, gain, stats, dx.view_mut(b), dgain.view_mut(b), None);
    });
    let sums = result(wide(r.values(width)));
    compare(b, what, &[activation(r.values(n)), sums], r, |p| {
        let [values, sums] = p else { unreachable!("two operands") };
        b.add_column_sums(rows, width, values.view(b), sums.view_mut(b));
    });
    let sum = result(wide(vec![f32::NAN; n]));
    compare(b, what, &[wide(r.values(n)), activation(r.values(n)), vector(r), sum], r, |p| {
        let [x, y, bias, sum] = p else { unreachable!("four operands") };
        b.add(x.view(b), y.view(b), Some(bias.view(b)), sum.view_mut(b));
    });
    compare(b, what, &[activation(r.values(n)), written(n)], r, |p| {
        let [x, y] = p else { unreachable!("two operands") };
        b.gelu(x.view(b), y.view_mut(b));
    });
    compare(b, what, &[activation(r.values(n)), result(activation(r.values(n)))], r, |p| {
        let [x, dy] = p else { unreachable!("two operands") };
        b.gelu_grad(x.view(b), dy.view_mut(b));
    });
    compare(b, what, &[activation(r.values(2 * n)), written(n)], r, |p| {
        let [x, y] = p else { unreachable!("two operands") };
        b.swiglu(width, x.view(b), y.view_mut(b));
    });
    compare(b, what, &[result(activation(r.values(2 * n))), activation(r.values(n))], r, |p| {
        let [x, dy] = p else { unreachable!("two operands") };
        b.swiglu_grad(width, x.view_mut(b), dy.view(b));
    });
    let (heads, half) = (1 + r.below(3), 1 + r.below(9));
    let s =
        Rotary { rows, width: (heads + 1) * 2 * half, heads, head_dim: 2 * half, inverse: false };
    let positions: Vec<u32> = (0..rows).map(|_| r.below(9) as u32).collect();
    let x = result(activation(r.values(rows * s.width)));
    compare(b, what, &[wide(r.values(9 * s.head_dim)), x], r, |p| {
        let [table, x] = p else { unreachable!("two operands") };
        b.rotary(s, table.view(b), &positions, x.view_mut(b));
    });
    let indices: Vec<u32> = (0..rows).map(|_| r.below(20) as u32).collect();
    compare(b, what, &[wide(r.values(15 * width)), written(n)], r, |p| {
        let [table, out] = p else { unreachable!("two operands") };
        b.embed(width, &indices, 3, table.view(b), out.view_mut(b), false);
    });
    compare(b, what, &[activation(r.values(n)), result(wide(r.values(15 * width)))], r, |p| {
        let [dy, table] = p else { unreachable!("two operands") };
        b.embed_grad(width, &indices, 3, dy.view(b), table.view_mut(b));
    });
    compare(b, what, &[result(activation(r.values(n))), result(wide(r.values(n)))], r, |p| {
        let [narrow, wide] = p else { unreachable!("two operands") };
        b.copy(wide.view(b), narrow.view_mut(b));
        b.fill(wide.view_mut(b), 0.1);
        b.copy(narrow.view(b), wide.view_mut(b));
        b.on_host(narrow.view_mut(b), |values| values.iter_mut().for_each(|x| *x *= 3.0));
    });
    narrow_loss(b, r, rows, width, what);
    narrow_copies(b, r, n, what);
}

fn narrow_loss<B: Backend>(b: &B, r: &mut Random, rows: usize, columns: usize, what: &str) {
    let s = Loss { rows, columns, used: columns - r.below(columns.min(3)), offset: 2 };
    let targets: Vec<u32> = (0..rows).map(|_| r.below(columns + 4) as u32).collect();
    let logits = result(activation(r.values(rows * columns)));
    let losses = result(wide(vec![f32::NAN; rows]));
    compare(b, what, &[logits.clone(), losses.clone()], r, |p| {
        let [logits, losses] = p else { unreachable!("two operands") };
        b.cross_entropy(s, &targets, 0.5, logits.view_mut(b), losses.view_mut(b));
    });
    let sums = result(wide(vec![f32::NAN; 2 * rows]));
    compare(b, what, &[logits, losses, sums], r, |p| {
        let [logits, max, sums] = p else { unreachable!("three operands") };
        b.row_max(s, logits.view(b), max.view_mut(b));
        b.partial_cross_entropy(s, &targets, logits.view(b), max.view(b), sums.view_mut(b));
        let sums = b.view(&sums.buffer, sums.start..sums.start + rows);
        b.partial_cross_entropy_grad(s, &targets, 0.5, max.view(b), sums, logits.view_mut(b));
    });
}

/// The copy of the parameters that products read.
fn narrow_copies<B: Backend>(b: &B, r: &mut Random, n: usize, what: &str) {
    assert_eq!(b.activation_dtype(), DType::Bf16, "{what}");
    let [mut p, mut g, mut m, mut v] = [(); 4].map(|()| b.alloc(n).expect("a small allocation"));
    for buffer in [&mut p, &mut g, &mut m, &mut v] {
        let values: Vec<f32> = r.values(n).iter().map(|x| x.abs()).collect();
        b.write(&values, b.view_mut(buffer, 0..n));
    }
    let mut copy = b.alloc_activation(n).expect("a small allocation");
    let (seed, first) = (r.bits(), r.bits() >> 28);
    for rounding in [Rounding::Nearest, Rounding::Stochastic { seed, first }] {
        b.adamw(
            AdamW { rounding, ..STEP },
            b.view_mut(&mut p, 0..n),
            Some(b.view_mut(&mut copy, 0..n)),
            b.view(&g, 0..n),
            b.view_mut(&mut m, 0..n),
            b.view_mut(&mut v, 0..n),
        );
        let (mut whole, mut rounded) = (vec![0.0; n], vec![0.0; n]);
        b.read(b.view(&p, 0..n), &mut whole);
        b.read(b.view(&copy, 0..n), &mut rounded);
        b.status().expect("the device works");
        for (i, (whole, rounded)) in whole.iter().zip(&rounded).enumerate() {
            let want = match rounding {
                Rounding::Nearest => plain::bf16(*whole),
                Rounding::Stochastic { seed, first } => {
                    plain::bf16_by_chance(*whole, first + i as u64, seed)
                }
            };
            assert_eq!(want, *rounded, "{what}, {rounding:?}");
        }
        // A copy that is made anew, as after a restart, and from its middle.
        let mut again = b.alloc_activation(n).expect("a small allocation");
        let at = r.below(n + 1);
        for part in [0..at, at..n] {
            let rounding = match rounding {
                Rounding::Nearest => rounding,
                Rounding::Stochastic { seed, first } => {
                    Rounding::Stochastic { seed, first: first + part.start as u64 }
                }
            };
            b.copy_rounded(b.view(&p, part.clone()), b.view_mut(&mut again, part), rounding);
        }
        let mut anew = vec![0.0; n];
        b.read(b.view(&again, 0..n), &mut anew);
        assert_eq!(anew, rounded, "{what}, {rounding:?}");
    }
}
