//! From logits to a token: the rule that every backend follows.
//!
//! Sums of probabilities are whole numbers of 2^-32 of the likeliest token's, so that they do not depend
//! on the order of additions, and a device's choice is the host's unless a draw falls within a rounding
//! of an exponential of a border between two tokens.

/// How one token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// 0: the likeliest token. Otherwise logits are divided by it.
    pub temperature: f32,
    /// Only so many of the likeliest tokens; 0: all. Of equal logits the lower token is the likelier.
    pub top_k: u32,
    /// Of those, only the likeliest that together have this share of their probability; 1: all.
    pub top_p: f32,
    /// Where the draw falls among the probabilities of what is left, in the order of tokens: a uniform
    /// number over 2^64.
    pub point: u64,
}

impl Draw {
    /// The likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, point: 0 };

    /// Returns whether nothing is drawn: the likeliest token is taken.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 || self.top_k == 1
    }
}

/// Chooses a token. Logits that are no numbers have no probability; where nothing has any, the token is
/// the likeliest.
#[must_use]
pub fn choose(draw: &Draw, logits: &[f32]) -> u32 {
    let likeliest = argmax(logits);
    let Some(max) = logits.get(likeliest as usize) else { return 0 };
    if draw.is_greedy() {
        return likeliest;
    }
    let inverse = 1.0 / draw.temperature;
    let mut weights: Vec<u64> = logits.iter().map(|x| weight((x - max) * inverse)).collect();
    cut(draw, logits, &mut weights);
    let total: u64 = weights.iter().sum();
    let mut left = ((u128::from(total) * u128::from(draw.point)) >> 64) as u64;
    for (token, weight) in weights.iter().enumerate() {
        if left < *weight {
            return token as u32;
        }
        left -= weight;
    }
    likeliest
}

/// Returns the greatest logit's token; the lowest of equals; 0 where there is none.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, x) in logits.iter().enumerate() {
        if *x > logits[best] || logits[best].is_nan() && !x.is_nan() {
            best = token;
        }
    }
    best as u32
}

/// Returns `exp(x)` for x up to 0, in whole numbers of 2^-32; 0 for what is no number.
fn weight(x: f32) -> u64 {
    // exp(-23) is less than 2^-33.
    if x > -23.0 { (x.exp() * 4_294_967_296.0) as u64 } else { 0 }
}

/// Takes the weights of tokens that are cut off.
fn cut(draw: &Draw, logits: &[f32], weights: &mut [u64]) {
    let count = match draw.top_k as usize {
        0 => logits.len(),
        k => k.min(logits.len()),
    };
    if count == logits.len() && draw.top_p >= 1.0 {
        return;
    }
    // The likeliest first: by logit, then by token.
    let mut ranks: Vec<u64> = logits.iter().zip(0u32..).map(|(x, t)| rank(*x, t)).collect();
    let token = |rank: &u64| !(*rank as u32) as usize;
    if count < ranks.len() {
        ranks.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
        ranks.truncate(count);
    }
    let mut last = ranks.iter().copied().min().unwrap_or(0);
    if draw.top_p < 1.0 {
        let mass = |ranks: &[u64]| ranks.iter().map(|r| weights[token(r)]).sum::<u64>();
        let mut wanted = share(draw.top_p, mass(&ranks));
        // The shortest beginning of the order with so much is searched by halves.
        let mut rest = &mut ranks[..];
        while rest.len() > 1 {
            let half = rest.len() / 2;
            rest.select_nth_unstable_by(half - 1, |a, b| b.cmp(a));
            let (upper, lower) = rest.split_at_mut(half);
            let has = mass(upper);
            if has >= wanted {
                rest = upper;
            } else {
                wanted -= has;
                rest = lower;
            }
        }
        last = rest.first().copied().unwrap_or(last);
    }
    for ((x, token), weight) in logits.iter().zip(0u32..).zip(weights) {
        if rank(*x, token) < last {
            *weight = 0;
        }
    }
}

/// The weight that a share of `total` comes to, at least 1.
fn share(top_p: f32, total: u64) -> u64 {
    ((f64::from(top_p) * total as f64).ceil() as u64).max(1)
}

/// Orders logits and tokens: the greater, the likelier. No numbers come last.
fn rank(x: f32, token: u32) -> u64 {
    // -0 becomes 0, which it equals.
    let bits = (x + 0.0).to_bits();
    let ordered = match bits >> 31 {
        _ if x.is_nan() => 0,
        0 => bits | 1 << 31,
        _ => !bits,
    };
    u64::from(ordered) << 32 | u64::from(!token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::Random;

    /// The rule once more, by sorting: the tokens that are kept, and which of them the point falls on.
    fn plainly(draw: &Draw, logits: &[f32]) -> u32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
        if draw.is_greedy() {
            return order[0] as u32;
        }
        let max = logits[order[0]];
        let weights: Vec<u64> =
            logits.iter().map(|x| weight((x - max) * (1.0 / draw.temperature))).collect();
        if draw.top_k > 0 {
            order.truncate(draw.top_k as usize);
        }
        let total: u64 = order.iter().map(|t| weights[*t]).sum();
        let mut sum = 0;
        let kept = order.iter().position(|t| {
            sum += weights[*t];
            sum as f64 >= f64::from(draw.top_p) * total as f64
        });
        if draw.top_p < 1.0 {
            order.truncate(kept.unwrap() + 1);
        }
        order.sort_unstable();
        let total: u64 = order.iter().map(|t| weights[*t]).sum();
        let point = ((u128::from(total) * u128::from(draw.point)) >> 64) as u64;
        let mut sum = 0;
        let at = order.iter().position(|t| {
            sum += weights[*t];
            sum > point
        });
        order[at.unwrap()] as u32
    }

    #[test]
    fn it_is_what_sorting_finds() {
        for seed in 0..400 {
            let r = &mut Random::new(seed);
            let n = 1 + r.below(60);
            // Few values, so that many are equal.
            let logits: Vec<f32> = (0..n).map(|_| (r.value() * 8.0).round() / 2.0).collect();
            let draw = Draw {
                temperature: [0.0, 0.3, 1.0, 2.5][r.below(4)],
                top_k: [0, 1, 2, 7, 100][r.below(5)],
                top_p: [1.0, 0.9, 0.5, 1e-6][r.below(4)],
                point: r.bits(),
            };
            assert_eq!(choose(&draw, &logits), plainly(&draw, &logits), "seed {seed}: {draw:?}");
        }
    }

    #[test]
    fn what_is_no_number_is_never_drawn() {
        let hot = |point| Draw { temperature: 1.0, point, ..Draw::GREEDY };
        let logits = [f32::NAN, 1.0, f32::NAN, 1.0, f32::NEG_INFINITY];
        for point in [0, u64::MAX / 4, u64::MAX / 2 + 9, u64::MAX] {
            for draw in [hot(point), Draw { top_k: 4, ..hot(point) }] {
                let token = choose(&draw, &logits);
                assert_eq!(token, if point > u64::MAX / 2 { 3 } else { 1 });
            }
        }
        assert_eq!(choose(&Draw::GREEDY, &logits), 1);
        assert_eq!(choose(&hot(7), &[f32::NAN; 3]), 0);
        assert_eq!(choose(&hot(7), &[0.0, f32::INFINITY, 1.0]), 1);
        assert_eq!(choose(&hot(7), &[]), 0);
        // So cold that nothing but the likeliest is left, even where its own weight is no number.
        assert_eq!(choose(&Draw { temperature: 1e-45, ..hot(u64::MAX) }, &[0.0, 2.0, 1.0]), 1);
    }
}
