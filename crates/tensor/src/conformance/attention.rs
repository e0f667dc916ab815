//! Attention, to whole sequences and to the cache.

use super::{POISON, Slices, assert_close};
use crate::reference::{self as plain, Random};
use crate::{Attention, Backend, CachedAttention, CachedSegment, DType, KV_BLOCK};

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

/// Checks causal attention and its gradient.
///
/// # Panics
/// When a result is not the reference's.
pub fn attention_and_its_gradient<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let b = Slices::new(b, r);
    let s = attention_shape(r);
    let what = &format!("{what}, {s:?}");
    let rows = s.batch * s.sequence;
    let mut qkv = r.values(rows * s.qkv_width());
    // Sharper than chance, so that maxima matter.
    qkv.iter_mut().for_each(|x| *x *= 3.0);
    let (mut out, mut lse) =
        (vec![POISON; rows * s.heads * s.head_dim], vec![POISON; rows * s.heads]);
    b.attention(s, &qkv, &mut out, &mut lse);
    let (want, want_lse) = plain::attention(s, &qkv);
    assert_close(&out, &want, 1e-5, what);
    assert_close(&lse, &want_lse, 1e-5, what);
    let dout = r.values(out.len());
    let mut dqkv = vec![POISON; qkv.len()];
    b.attention_grad(s, &qkv, &out, &lse, &dout, &mut dqkv);
    assert_close(&dqkv, &plain::attention_grad(s, &qkv, &dout), 3e-5, what);
}

/// Checks the paged cache, in every format that the backend has for it.
///
/// # Panics
/// When a result is not the reference's.
pub fn attention_to_the_cache_equals_attention_to_the_sequence<B: Backend>(
    b: &B,
    r: &mut Random,
    what: &str,
) {
    let formats = b.cache_formats();
    let stored = formats[r.below(formats.len())];
    // Keys and values are rounded once; scores and their weights are f32.
    let tolerance = match stored {
        DType::F32 => 1e-5,
        DType::F16 => 1.5e-3,
        DType::Bf16 | DType::I8 => 1.2e-2,
    };
    let b = Slices::new(b, r);
    let s = Attention { batch: 1, ..attention_shape(r) };
    let what = &format!("{what}, {s:?}, {stored:?}");
    let (t, width) = (s.sequence, s.qkv_width());
    let qkv = r.values(t * width);
    let (want, _) = plain::attention(s, &qkv);
    let c = CachedAttention { heads: s.heads, kv_heads: s.kv_heads, head_dim: s.head_dim, stored };
    let count = t.div_ceil(KV_BLOCK);
    // Blocks in a shuffled order, in a cache that is larger and full of other numbers.
    let mut blocks: Vec<u32> = (0..count as u32 + 3).collect();
    for i in (1..blocks.len()).rev() {
        blocks.swap(i, r.below(i + 1));
    }
    let (mut keys, mut values) =
        (r.values((count + 3) * c.block_elements()), r.values((count + 3) * c.block_elements()));
    let mut done = 0;
    while done < t {
        let rows = (1 + r.below(20)).min(t - done);
        let slots: Vec<u32> = (done..done + rows)
            .map(|p| blocks[p / KV_BLOCK] * KV_BLOCK as u32 + (p % KV_BLOCK) as u32)
            .collect();
        let new = &qkv[done * width..(done + rows) * width];
        b.cache_write(c, new, &slots, &mut keys, &mut values);
        let segment = CachedSegment { row: 0, rows, position: done, blocks: &blocks };
        let mut out = vec![POISON; rows * s.heads * s.head_dim];
        b.cached_attention(c, &[segment], new, &keys, &values, &mut out);
        let row = s.heads * s.head_dim;
        assert_close(&out, &want[done * row..(done + rows) * row], tolerance, what);
        done += rows;
    }
}

/// Checks attention of heads of 64 and 128 on a backend that may round its factors to bf16.
///
/// # Panics
/// When a result is further from the reference than 1e-2, norm of the difference over the norm:
/// factors of 8 bits, probabilities and gradients of scores rounded once more.
pub fn bf16_attention_and_its_gradient<B: Backend>(b: &B, r: &mut Random, what: &str) {
    let kv_heads = 1 + r.below(2);
    let s = Attention {
        batch: 1 + r.below(2),
        // Not so short that a row's log-sum is next to nothing, and its error relative to that large.
        sequence: 16 + r.below(150),
        heads: kv_heads * (1 + r.below(2)),
        kv_heads,
        head_dim: [64, 128][r.below(2)],
    };
    let what = &format!("{what}, {s:?}");
    let b = Slices::new(b, r);
    let rows = s.batch * s.sequence;
    let qkv = r.values(rows * s.qkv_width());
    let (mut out, mut lse) =
        (vec![POISON; rows * s.heads * s.head_dim], vec![POISON; rows * s.heads]);
    b.attention(s, &qkv, &mut out, &mut lse);
    let (want, want_lse) = plain::attention(s, &qkv);
    assert_near(&out, &want, what);
    assert_near(&lse, &want_lse, what);
    let dout = r.values(out.len());
    let mut dqkv = vec![POISON; qkv.len()];
    b.attention_grad(s, &qkv, &out, &lse, &dout, &mut dqkv);
    assert_near(&dqkv, &plain::attention_grad(s, &qkv, &dout), what);
}

fn assert_near(got: &[f32], want: &[f32], what: &str) {
    let square = |x: f32| f64::from(x).powi(2);
    let off: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    let all: f64 = want.iter().map(|w| square(*w)).sum();
    let off = (off / all.max(1e-6)).sqrt();
    assert!(off < 1e-2, "{what}: off by {off:e}");
}
