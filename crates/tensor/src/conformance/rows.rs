//! Everything but products and attention.

use super::{POISON, Slices, assert_close};
use crate::reference::{self as plain, Random};
use crate::sampling::choose;
use crate::{AdamW, Backend, Draw, Loss, NormKind, Normalise, Rotary, Rounding};

/// Checks LayerNorm and RMSNorm, with the residual and backward.
///
/// # Panics
/// When a result is not the reference's.
pub fn norms_with_residual_and_their_gradients<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
    let kind = [NormKind::Layer, NormKind::Rms][r.below(2)];
    let s = Normalise { rows: 1 + r.below(150), width: 1 + r.below(100), kind, epsilon: 1e-5 };
    let what = &format!("{what}, {s:?}");
    let (n, d) = (s.rows, s.width);
    let (x, branch, dy) = (r.values(n * d), r.values(n * d), r.values(n * d));
    let (gain, beta, extra) = (r.values(d), r.values(d), r.values(d));
    let bias = (kind == NormKind::Layer).then_some(&beta[..]);
    let (mut sum, mut y, mut stats) =
        (vec![POISON; n * d], vec![POISON; n * d], vec![POISON; 2 * n]);
    b.add_norm(s, &x, &branch, Some(&extra), &mut sum, &gain, bias, &mut y, &mut stats);
    let want_sum: Vec<f32> = (0..n * d).map(|i| x[i] + branch[i] + extra[i % d]).collect();
    assert_close(&sum, &want_sum, 1e-6, what);
    let (mut y2, mut stats2) = (vec![POISON; n * d], vec![POISON; 2 * n]);
    b.norm(s, &sum, &gain, bias, &mut y2, &mut stats2);
    assert_eq!((&y, &stats), (&y2, &stats2), "{what}");
    let before = r.values(n * d);
    let (mut dx, mut dgain, mut dbias) = (before.clone(), vec![1.0; d], vec![2.0; d]);
    let to_bias = bias.is_some().then_some(&mut dbias[..]);
    b.norm_grad(s, &dy, &sum, &gain, &stats, &mut dx, &mut dgain, to_bias);
    let (mut want_dgain, mut want_dbias) = (vec![1.0; d], vec![2.0; d]);
    let zeros = vec![0.0; d];
    for row in 0..n {
        let at = row * d..(row + 1) * d;
        let (want, _, _) = plain::norm_row(s, &sum[at.clone()], &gain, bias.unwrap_or(&zeros));
        assert_close(&y[at.clone()], &want, 2e-4, what);
        let (mut want, g, b) = plain::norm_row_grad(s, &dy[at.clone()], &sum[at.clone()], &gain);
        want.iter_mut().zip(&before[at.clone()]).for_each(|(w, b)| *w += b);
        assert_close(&dx[at], &want, 2e-4, what);
        want_dgain.iter_mut().zip(g).for_each(|(w, g)| *w += g);
        want_dbias.iter_mut().zip(b).for_each(|(w, b)| *w += b);
    }
    assert_close(&dgain, &want_dgain, 2e-4, what);
    if bias.is_some() {
        assert_close(&dbias, &want_dbias, 1e-5, what);
    }
}

/// Checks sums of columns, sums of squares and additions.
///
/// # Panics
/// When a result is not the reference's.
pub fn sums_of_columns_and_of_squares_and_additions<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
    let (rows, columns) = (1 + r.below(90), 1 + r.below(200));
    let values = r.values(rows * columns);
    let mut sums = vec![1.0; columns];
    b.add_column_sums(rows, columns, &values, &mut sums);
    let want: Vec<f32> = (0..columns)
        .map(|c| 1.0 + (0..rows).map(|r| values[r * columns + c]).sum::<f32>())
        .collect();
    assert_close(&sums, &want, 1e-5, what);
    let long = r.values(r.clone().below(100_000));
    let want: f64 = long.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let got = b.sum_squares(&long);
    assert!((got - want).abs() <= 1e-6 * want.max(1.0), "{what}: {got} {want}");
    let (a, bias) = (r.values(rows * columns), r.values(columns));
    let mut out = vec![0.0; rows * columns];
    b.add(&a, &values, Some(&bias), &mut out);
    let want: Vec<f32> = (0..out.len()).map(|i| a[i] + values[i] + bias[i % columns]).collect();
    assert_close(&out, &want, 1e-6, what);
}

/// Checks rotary positions, both ways.
///
/// # Panics
/// When a result is not the reference's.
pub fn rotary_positions_turn_and_turn_back<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
    let (heads, half, rows) = (1 + r.below(4), 1 + r.below(20), 1 + r.below(20));
    let s =
        Rotary { rows, width: (heads + 1) * 2 * half, heads, head_dim: 2 * half, inverse: false };
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
    b.rotary(s, &table, &positions, &mut got);
    for (row, p) in want.chunks_exact_mut(s.width).zip(&positions) {
        plain::rotary_row(s, 10_000.0, *p as usize, row);
    }
    assert_close(&got, &want, 1e-6, what);
    b.rotary(Rotary { inverse: true, ..s }, &table, &positions, &mut got);
    assert_close(&got, &x, 1e-6, what);
}

/// Checks GELU and SwiGLU.
///
/// # Panics
/// When a result is not the reference's.
pub fn activations_and_their_gradients<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
    let (rows, width) = (1 + r.below(40), 1 + r.below(90));
    let x: Vec<f32> = r.values(rows * width).iter().map(|x| x * 6.0).collect();
    let dy = r.values(rows * width);
    let mut y = vec![POISON; rows * width];
    b.gelu(&x, &mut y);
    let want: Vec<f32> = x.iter().map(|x| plain::gelu(f64::from(*x)) as f32).collect();
    assert_close(&y, &want, 1e-6, what);
    let mut dx = dy.clone();
    b.gelu_grad(&x, &mut dx);
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
    b.swiglu(width, &gate_up, &mut y);
    let pair = |i: usize| {
        let at = i / width * 2 * width + i % width;
        (f64::from(gate_up[at]), f64::from(gate_up[at + width]))
    };
    let want: Vec<f32> = (0..y.len()).map(|i| plain::swiglu(pair(i).0, pair(i).1) as f32).collect();
    assert_close(&y, &want, 1e-6, what);
    let mut d = gate_up.clone();
    b.swiglu_grad(width, &mut d, &dy);
    let mut want = vec![0.0; d.len()];
    for (i, dy) in dy.iter().enumerate() {
        let (g, u) = pair(i);
        let slope = (plain::swiglu(g + h, u) - plain::swiglu(g - h, u)) / (2.0 * h);
        let at = i / width * 2 * width + i % width;
        want[at] = (slope * f64::from(*dy)) as f32;
        want[at + width] = (plain::swiglu(g, 1.0) * f64::from(*dy)) as f32;
    }
    assert_close(&d, &want, 1e-5, what);
}

/// Checks the loss over a whole vocabulary and over slices of it.
///
/// # Panics
/// When a result is not the reference's.
pub fn cross_entropy_whole_and_in_slices<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
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
    let (mut grad, mut losses) = (logits.clone(), vec![POISON; rows]);
    b.cross_entropy(whole, &targets, 0.0, &mut grad, &mut losses);
    assert_close(&losses, &want, 1e-5, what);
    assert_eq!(grad, logits, "{what}: a scale of 0 changes nothing");
    b.cross_entropy(whole, &targets, scale, &mut grad, &mut losses);
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
        let mut own = vec![POISON; rows];
        b.row_max(*s, part, &mut own);
        max.iter_mut().zip(own).for_each(|(m, o)| *m = m.max(o));
    }
    let mut sums = vec![0.0; 2 * rows];
    for (s, part) in &parts {
        let mut own = vec![POISON; 2 * rows];
        b.partial_cross_entropy(*s, &targets, part, &max, &mut own);
        sums.iter_mut().zip(own).for_each(|(s, o)| *s += o);
    }
    let got: Vec<f32> = (0..rows).map(|i| sums[i].ln() - sums[rows + i]).collect();
    assert_close(&got, &want, 1e-5, what);
    for (s, mut part) in parts {
        b.partial_cross_entropy_grad(s, &targets, scale, &max, &sums, &mut part);
        for (i, row) in part.chunks_exact(columns).enumerate() {
            let at = i * vocab + s.offset;
            assert_close(&row[..s.used], &want_grad[at..at + s.used], 1e-5, what);
            assert!(row[s.used..].iter().all(|x| *x == 0.0), "{what}: padding has a gradient");
        }
    }
}

/// Checks embeddings and their gradient.
///
/// # Panics
/// When a result is not the reference's.
pub fn embeddings_look_up_and_add_up<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
    let (rows, width, table_rows) = (1 + r.below(30), 1 + r.below(40), 1 + r.below(20));
    let offset = r.below(10);
    let table = r.values(table_rows * width);
    let indices: Vec<u32> = (0..rows).map(|_| r.below(table_rows + 15) as u32).collect();
    let place = |i: u32| (i as usize).checked_sub(offset).filter(|p| *p < table_rows);
    for accumulate in [false, true] {
        let before = r.values(rows * width);
        let mut out = before.clone();
        b.embed(width, &indices, offset, &table, &mut out, accumulate);
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
    b.embed_grad(width, &indices, offset, &dy, &mut d);
    let mut want = vec![0.0; table_rows * width];
    for (i, index) in indices.iter().enumerate() {
        if let Some(p) = place(*index) {
            (0..width).for_each(|c| want[p * width + c] += dy[i * width + c]);
        }
    }
    assert_close(&d, &want, 1e-6, what);
}

/// A step of the optimizer in which every term counts.
pub(super) const STEP: AdamW = AdamW {
    rounding: Rounding::Nearest,
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-8,
    weight_decay: 0.1,
    correction1: 0.271,
    correction2: 0.142_625,
    gradient_scale: 0.5,
};

/// Checks the optimizer.
///
/// # Panics
/// When a result is not the reference's.
pub fn adamw_steps<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
    let n = 1 + r.below(40_000);
    let (p, g, m) = (r.values(n), r.values(n), r.values(n));
    let v: Vec<f32> = r.values(n).iter().map(|x| x * x).collect();
    let (mut p2, mut m2, mut v2) = (p.clone(), m.clone(), v.clone());
    b.adamw(STEP, &mut p2, &g, &mut m2, &mut v2);
    for i in 0..n {
        let [p, g, m, v] = [p[i], g[i], m[i], v[i]].map(f64::from);
        let (p, m, v) = plain::adamw(STEP, p, g, m, v);
        for (got, want) in [(p2[i], p), (m2[i], m), (v2[i], v)] {
            // Where the second moment is next to nothing the step is long: f32 has 24 bits of it.
            let most = 1e-5_f64.max(want.abs() * 1e-6);
            assert!((f64::from(got) - want).abs() < most, "{what}, {i}: {got} {want}");
        }
    }
}

/// Checks copies, fills and the way to the host and back, of parts of buffers.
///
/// # Panics
/// When a result is not the reference's.
pub fn moves_between_host_and_device<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let n = 2 + r.below(5000);
    let (values, cut) = (r.values(n), r.below(n));
    let mut buffer = b.alloc(n).expect("a small allocation");
    let mut got = vec![POISON; n];
    b.read(b.view(&buffer, 0..n), &mut got);
    assert!(got.iter().all(|x| *x == 0.0), "{what}: an allocation is zeros");
    b.write(&values, b.view_mut(&mut buffer, 0..n));
    let (low, high) = b.split_mut(b.view_mut(&mut buffer, 0..n), cut);
    b.fill(low, 7.0);
    let doubled = b.on_host(high, |v| {
        v.iter_mut().for_each(|x| *x *= 2.0);
        v.len()
    });
    assert_eq!(doubled, n - cut, "{what}");
    let mut other = b.alloc(n).expect("a small allocation");
    b.copy(b.view(&buffer, 0..n), b.view_mut(&mut other, 0..n));
    b.read(b.view(&other, 0..n), &mut got);
    for (i, (got, value)) in got.iter().zip(&values).enumerate() {
        assert_eq!(*got, if i < cut { 7.0 } else { value * 2.0 }, "{what}, element {i}");
    }
    let (width, picks) = (1 + r.below(40), 1 + r.below(9));
    let table = r.values(20 * width);
    let indices: Vec<u32> = (0..picks).map(|_| r.below(20) as u32).collect();
    let mut out = vec![POISON; picks * width];
    Slices::new(b, r).gather_rows(width, &indices, &table, &mut out);
    for (row, index) in out.chunks_exact(width).zip(&indices) {
        assert_eq!(row, &table[*index as usize * width..][..width], "{what}");
    }
}

/// Checks that a backend that chooses tokens chooses as the rule says: greedily, hot and cold, with cuts by
/// rank and by share, among equal logits and beside columns that stand for no token.
///
/// # Panics
/// When a token is not the rule's, even with the draw or the share moved by a rounding of an exponential.
pub fn tokens_are_drawn_from_logits<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let used = [1 + r.below(8), 1 + r.below(300), 1 + r.below(5000)][r.below(3)];
    let columns = used + [0, r.below(20)][r.below(2)];
    let rows = 1 + r.below(6);
    // Few values, so that many are equal; or all kinds.
    let step = [0.5, 0.0][r.below(2)];
    let mut logits: Vec<f32> = r.values(rows * columns).iter().map(|x| x * 9.0).collect();
    if step > 0.0 {
        logits.iter_mut().for_each(|x| *x = (*x / step).round() * step);
    }
    for row in logits.chunks_exact_mut(columns) {
        row[used..].fill(POISON);
        if r.below(4) == 0 {
            row[r.below(used)] = [f32::NEG_INFINITY, f32::NAN][r.below(2)];
        }
    }
    let draws: Vec<Draw> = (0..rows)
        .map(|_| Draw {
            temperature: [0.0, 0.2, 1.0, 3.0][r.below(4)],
            top_k: [0, 0, 1, 40, 5000][r.below(5)],
            top_p: [1.0, 0.95, 0.5, 1e-6][r.below(4)],
            point: r.bits(),
        })
        .collect();
    let Some(tokens) = Slices::new(b, r).sample(columns, used, &logits, &draws) else { return };
    for (row, (draw, token)) in draws.iter().zip(tokens).enumerate() {
        let own = &logits[row * columns..][..used];
        let is_right = [0.0, 1e-5, -1e-5].iter().any(|by: &f64| {
            let moved = (*by * u64::MAX as f64) as i64;
            [0.0, 1e-5, -1e-5].iter().any(|share| {
                let top_p = if draw.top_p < 1.0 { draw.top_p + share } else { draw.top_p };
                let point = draw.point.saturating_add_signed(moved);
                token == choose(&Draw { top_p, point, ..*draw }, own)
            })
        });
        assert!(is_right, "{what}, row {row} of {rows} x {used}: {token} for {draw:?}");
    }
}
