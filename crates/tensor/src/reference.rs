//! Every operation once more, as plainly as its formula reads: what the fast kernels are checked
//! against. Sums are in f64; nothing here is meant to be fast.

use crate::backend::AdamW;
use crate::shape::{Attention, Linear, NormKind, Normalise, Rotary, WeightLayout};

/// A small generator for test values (splitmix64), so that a failing seed can be run again.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts a sequence.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns a number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// Returns a value in -1 .. 1.
    pub fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Returns `count` values in -1 .. 1.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }
}

fn weight(s: Linear, w: &[f32], i: usize, o: usize) -> f64 {
    f64::from(match s.layout {
        WeightLayout::OutIn => w[o * s.input + i],
        WeightLayout::InOut => w[i * s.output + o],
    })
}

/// Rounds a finite number to bf16: of the two neighbours the nearer one, or the even one.
#[must_use]
pub fn bf16(x: f32) -> f32 {
    let below = f32::from_bits(x.to_bits() & 0xFFFF_0000);
    let above = f32::from_bits((x.to_bits() & 0xFFFF_0000).wrapping_add(0x1_0000));
    let (down, up) =
        ((f64::from(x) - f64::from(below)).abs(), (f64::from(above) - f64::from(x)).abs());
    let below_is_even = x.to_bits() & 0x1_0000 == 0;
    if down < up || (down == up && below_is_even) { below } else { above }
}

/// Rounds a finite number to one of its two neighbours in bf16, up in magnitude as often as the part that is
/// cut off says. The chance is 16 bits of a hash of the number, its place and a seed (splitmix64's
/// finaliser).
#[must_use]
pub fn bf16_by_chance(x: f32, place: u64, seed: u64) -> f32 {
    let key = seed ^ (place << 32 | u64::from(x.to_bits())) ^ (place >> 32);
    let chance = Random::new(key).bits() >> 48;
    let bits = u64::from(x.to_bits()) + chance;
    f32::from_bits(bits as u32 & 0xFFFF_0000)
}

/// Computes `x . w (+ bias)`.
#[must_use]
pub fn linear(s: Linear, x: &[f32], w: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let mut y = vec![0.0; s.rows * s.output];
    for r in 0..s.rows {
        for o in 0..s.output {
            let products = (0..s.input).map(|i| f64::from(x[r * s.input + i]) * weight(s, w, i, o));
            y[r * s.output + o] =
                (products.sum::<f64>() + bias.map_or(0.0, |b| f64::from(b[o]))) as f32;
        }
    }
    y
}

/// Computes the gradient of [`linear`]'s input.
#[must_use]
pub fn linear_grad_input(s: Linear, dy: &[f32], w: &[f32]) -> Vec<f32> {
    let mut dx = vec![0.0; s.rows * s.input];
    for r in 0..s.rows {
        for i in 0..s.input {
            let products =
                (0..s.output).map(|o| f64::from(dy[r * s.output + o]) * weight(s, w, i, o));
            dx[r * s.input + i] = products.sum::<f64>() as f32;
        }
    }
    dx
}

/// Computes the gradient of [`linear`]'s weights.
#[must_use]
pub fn linear_grad_weight(s: Linear, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let mut dw = vec![0.0; s.input * s.output];
    for i in 0..s.input {
        for o in 0..s.output {
            let products = (0..s.rows)
                .map(|r| f64::from(x[r * s.input + i]) * f64::from(dy[r * s.output + o]));
            let at = match s.layout {
                WeightLayout::OutIn => o * s.input + i,
                WeightLayout::InOut => i * s.output + o,
            };
            dw[at] = products.sum::<f64>() as f32;
        }
    }
    dw
}

/// Normalises one row; returns mean and reciprocal deviation too.
#[must_use]
pub fn norm_row(s: Normalise, x: &[f32], gain: &[f32], bias: &[f32]) -> (Vec<f32>, f64, f64) {
    let d = s.width as f64;
    let mean = match s.kind {
        NormKind::Layer => x.iter().map(|v| f64::from(*v)).sum::<f64>() / d,
        NormKind::Rms => 0.0,
    };
    let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / d;
    let rstd = 1.0 / (variance + f64::from(s.epsilon)).sqrt();
    let y =
        x.iter().zip(gain).zip(bias).map(|((x, g), b)| {
            ((f64::from(*x) - mean) * rstd * f64::from(*g) + f64::from(*b)) as f32
        });
    (y.collect(), mean, rstd)
}

/// Computes the gradient of one normalised row: of its input, of the gain and of the bias.
#[must_use]
pub fn norm_row_grad(
    s: Normalise,
    dy: &[f32],
    x: &[f32],
    gain: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (_, mean, rstd) = norm_row(s, x, gain, &vec![0.0; s.width]);
    let d = s.width as f64;
    let normal: Vec<f64> = x.iter().map(|v| (f64::from(*v) - mean) * rstd).collect();
    let scaled: Vec<f64> = dy.iter().zip(gain).map(|(a, g)| f64::from(a * g)).collect();
    let along = scaled.iter().zip(&normal).map(|(a, n)| a * n).sum::<f64>() / d;
    let average = match s.kind {
        NormKind::Layer => scaled.iter().sum::<f64>() / d,
        NormKind::Rms => 0.0,
    };
    let dx = scaled.iter().zip(&normal).map(|(a, n)| (rstd * (a - average - n * along)) as f32);
    let dgain = dy.iter().zip(&normal).map(|(a, n)| (f64::from(*a) * n) as f32);
    (dx.collect(), dgain.collect(), dy.to_vec())
}

/// Rotates the heads of one row by the angles `position * theta^(-2 i / E)`.
pub fn rotary_row(s: Rotary, theta: f64, position: usize, row: &mut [f32]) {
    let half = s.head_dim / 2;
    for head in 0..s.heads {
        for i in 0..half {
            let angle = position as f64 * theta.powf(-2.0 * i as f64 / s.head_dim as f64);
            let angle = if s.inverse { -angle } else { angle };
            let (a, b) = (head * s.head_dim + i, head * s.head_dim + i + half);
            let (x, y) = (f64::from(row[a]), f64::from(row[b]));
            row[a] = (x * angle.cos() - y * angle.sin()) as f32;
            row[b] = (y * angle.cos() + x * angle.sin()) as f32;
        }
    }
}

/// Computes causal attention and each row's log-sum.
#[must_use]
pub fn attention(s: Attention, qkv: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (t, e, width) = (s.sequence, s.head_dim, s.qkv_width());
    let mut out = vec![0.0; s.batch * t * s.heads * e];
    let mut lse = vec![0.0; s.batch * s.heads * t];
    for_each_row(s, |b, h, kv, i| {
        let p = probabilities(s, qkv, b, h, kv, i);
        for c in 0..e {
            let v = |j: usize| qkv[(b * t + j) * width + (s.heads + s.kv_heads + kv) * e + c];
            out[((b * t + i) * s.heads + h) * e + c] =
                p.0.iter().enumerate().map(|(j, p)| p * f64::from(v(j))).sum::<f64>() as f32;
        }
        lse[(b * s.heads + h) * t + i] = p.1 as f32;
    });
    (out, lse)
}

/// Computes the gradient of [`attention`]'s input.
#[must_use]
pub fn attention_grad(s: Attention, qkv: &[f32], dout: &[f32]) -> Vec<f32> {
    let (t, e, width) = (s.sequence, s.head_dim, s.qkv_width());
    let mut d = vec![0.0f64; qkv.len()];
    let scale = 1.0 / (e as f64).sqrt();
    for_each_row(s, |b, h, kv, i| {
        let (p, _) = probabilities(s, qkv, b, h, kv, i);
        let dout = &dout[((b * t + i) * s.heads + h) * e..][..e];
        let q = (b * t + i) * width + h * e;
        let k = |j: usize| (b * t + j) * width + (s.heads + kv) * e;
        let v = |j: usize| (b * t + j) * width + (s.heads + s.kv_heads + kv) * e;
        let dp: Vec<f64> = (0..=i)
            .map(|j| (0..e).map(|c| f64::from(dout[c]) * f64::from(qkv[v(j) + c])).sum())
            .collect();
        let mean: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
        for j in 0..=i {
            let ds = p[j] * (dp[j] - mean) * scale;
            for c in 0..e {
                d[v(j) + c] += p[j] * f64::from(dout[c]);
                d[q + c] += ds * f64::from(qkv[k(j) + c]);
                d[k(j) + c] += ds * f64::from(qkv[q + c]);
            }
        }
    });
    d.into_iter().map(|x| x as f32).collect()
}

fn for_each_row(s: Attention, mut f: impl FnMut(usize, usize, usize, usize)) {
    for b in 0..s.batch {
        for h in 0..s.heads {
            for i in 0..s.sequence {
                f(b, h, h / (s.heads / s.kv_heads), i);
            }
        }
    }
}

fn probabilities(
    s: Attention,
    qkv: &[f32],
    b: usize,
    h: usize,
    kv: usize,
    i: usize,
) -> (Vec<f64>, f64) {
    let (t, e, width) = (s.sequence, s.head_dim, s.qkv_width());
    let q = &qkv[(b * t + i) * width + h * e..][..e];
    let scores: Vec<f64> = (0..=i)
        .map(|j| {
            let k = &qkv[(b * t + j) * width + (s.heads + kv) * e..][..e];
            q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
                / (e as f64).sqrt()
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|x| (x - max).exp()).sum();
    (scores.iter().map(|x| (x - max).exp() / sum).collect(), max + sum.ln())
}

/// GELU, tanh form.
#[must_use]
pub fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}

/// `silu(gate) * up`.
#[must_use]
pub fn swiglu(gate: f64, up: f64) -> f64 {
    gate / (1.0 + (-gate).exp()) * up
}

/// Cross-entropy of one row, and the gradient of its logits.
#[must_use]
pub fn cross_entropy_row(logits: &[f32], target: usize) -> (f64, Vec<f64>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    let p = logits
        .iter()
        .enumerate()
        .map(|(i, x)| f64::from(x - max).exp() / sum - if i == target { 1.0 } else { 0.0 });
    (sum.ln() - f64::from(logits[target] - max), p.collect())
}

/// One parameter's step of AdamW: parameter, first and second moment.
#[must_use]
pub fn adamw(a: AdamW, p: f64, g: f64, m: f64, v: f64) -> (f64, f64, f64) {
    let g = g * f64::from(a.gradient_scale);
    let (b1, b2) = (f64::from(a.beta1), f64::from(a.beta2));
    let m = b1 * m + (1.0 - b1) * g;
    let v = b2 * v + (1.0 - b2) * g * g;
    let rate = f64::from(a.learning_rate);
    let mean = m / f64::from(a.correction1);
    let root = (v / f64::from(a.correction2)).sqrt();
    (p - rate * (mean / (root + f64::from(a.epsilon)) + f64::from(a.weight_decay) * p), m, v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_by_chance_is_right_on_average_and_takes_a_neighbour() {
        let r = &mut Random::new(9);
        for _ in 0..40 {
            let x = r.value() * 3.0;
            let below = f32::from_bits(x.to_bits() & 0xFFFF_0000);
            let above = f32::from_bits((x.to_bits() & 0xFFFF_0000) + 0x1_0000);
            let draws = 20_000;
            let mut ups = 0;
            for place in 0..draws {
                let rounded = bf16_by_chance(x, place, 5);
                assert!(rounded == below || rounded == above, "{x}: {rounded}");
                ups += u64::from(rounded == above);
            }
            // Four standard deviations of a fair draw, at most.
            let share = f64::from(x.to_bits() & 0xFFFF) / 65536.0;
            assert!((ups as f64 / draws as f64 - share).abs() < 0.015, "{x}: {ups}, not {share}");
        }
        // What bf16 has stays as it is; other places and seeds draw otherwise.
        assert_eq!(bf16_by_chance(-1.5, 3, 7), -1.5);
        let drawn =
            |seed| (0..99).map(|place| bf16_by_chance(0.3, place, seed)).collect::<Vec<_>>();
        assert_ne!(drawn(1), drawn(2));
    }
}
