//! Attention to the paged cache of keys and values, for prefill and decode in one batch.
#![allow(
    unsafe_code,
    reason = "tasks write disjoint columns of one output; halves lie in buffers of f32"
)]

use super::pool::{Pool, Rows};
use super::simd::{Simd, dispatched, exp, lane_max, lane_sum};
use super::tile::{Bf16, Element, F16, Tile, product, product_bf16, product_f16};
use crate::dtype::DType;
use crate::shape::{CachedAttention, CachedSegment, KV_BLOCK};

/// Query rows that share one pass over the cache: the rows that the product kernel takes at once.
const ROWS: usize = 6;
/// New rows from which on storing them is worth several threads.
const MANY: usize = 16;

/// An element of the cache, and its product kernel.
trait Stored: Element {
    fn product(t: Tile, a: &[f32], b: &[Self], c: &mut [f32]);
}

impl Stored for f32 {
    fn product(t: Tile, a: &[f32], b: &[Self], c: &mut [f32]) {
        product(t, a, b, c);
    }
}

impl Stored for F16 {
    fn product(t: Tile, a: &[f32], b: &[Self], c: &mut [f32]) {
        product_f16(t, a, b, c);
    }
}

impl Stored for Bf16 {
    fn product(t: Tile, a: &[f32], b: &[Self], c: &mut [f32]) {
        product_bf16(t, a, b, c);
    }
}

/// Sees f32 as the elements that they hold.
fn elements<E: Stored>(words: &[f32]) -> &[E] {
    let count = size_of_val(words) / size_of::<E>();
    // SAFETY: the types of `Stored` are as wide as f32, or half as wide and aligned to that, and have a
    // value for every pattern of bits.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), count) }
}

/// As [`elements`], to be written.
fn elements_mut<E: Stored>(words: &mut [f32]) -> &mut [E] {
    let count = size_of_val(words) / size_of::<E>();
    // SAFETY: as in `elements`.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), count) }
}

pub(super) fn write(
    pool: &Pool,
    s: CachedAttention,
    qkv: &[f32],
    slots: &[u32],
    keys: &mut [f32],
    values: &mut [f32],
) {
    let width = (s.heads + 2 * s.kv_heads) * s.head_dim;
    assert_eq!(qkv.len(), slots.len() * width, "cache write");
    assert!(keys.len() == values.len(), "cache write");
    let held = keys.len() / s.block_elements().max(1) * KV_BLOCK;
    assert!(
        slots.iter().all(|slot| (*slot as usize) < held),
        "cache write: a slot beyond the cache"
    );
    match s.stored {
        DType::F16 => write_as::<F16>(pool, s, qkv, slots, keys, values),
        DType::Bf16 => write_as::<Bf16>(pool, s, qkv, slots, keys, values),
        DType::F32 | DType::I8 => write_as::<f32>(pool, s, qkv, slots, keys, values),
    }
}

fn write_as<E: Stored>(
    pool: &Pool,
    s: CachedAttention,
    qkv: &[f32],
    slots: &[u32],
    keys: &mut [f32],
    values: &mut [f32],
) {
    let e = s.head_dim;
    let width = (s.heads + 2 * s.kv_heads) * e;
    let (keys, values) = (Rows::new(keys, s.head_words()), Rows::new(values, s.head_words()));
    let at_once = if slots.len() < MANY { s.kv_heads } else { 1 };
    pool.split(s.kv_heads, at_once, |heads| {
        for (row, slot) in qkv.chunks_exact(width).zip(slots) {
            let (block, place) = (*slot as usize / KV_BLOCK, *slot as usize % KV_BLOCK);
            for head in heads.clone() {
                let part = block * s.kv_heads + head;
                // SAFETY: this task alone writes these heads; the block was checked.
                let (keys, values) =
                    unsafe { (keys.part(part..part + 1), values.part(part..part + 1)) };
                let key = &row[(s.heads + head) * e..][..e];
                let lanes = elements_mut::<E>(keys).chunks_exact_mut(KV_BLOCK);
                for (lane, x) in lanes.zip(key) {
                    lane[place] = E::nearest(*x);
                }
                let value = &row[(s.heads + s.kv_heads + head) * e..][..e];
                let line = &mut elements_mut::<E>(values)[place * e..(place + 1) * e];
                for (to, x) in line.iter_mut().zip(value) {
                    *to = E::nearest(*x);
                }
            }
        }
    });
}

#[inline(always)]
fn softmax_body<S: Simd>(_: S, row: &mut [f32], visible: usize, scale: f32) {
    let (seen, hidden) = row.split_at_mut(visible);
    hidden.fill(0.0);
    let max = lane_max(seen) * scale;
    for x in seen.iter_mut() {
        *x = exp::<S>(*x * scale - max);
    }
    let factor = 1.0 / lane_sum(seen.len(), |i| seen[i]);
    for x in seen {
        *x *= factor;
    }
}

dispatched! { fn softmax_row(row: &mut [f32], visible: usize, scale: f32) = softmax_body; }

pub(super) fn attention(
    pool: &Pool,
    s: CachedAttention,
    segments: &[CachedSegment<'_>],
    qkv: &[f32],
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
) {
    match s.stored {
        DType::F16 => attend::<F16>(pool, s, segments, qkv, keys, values, out),
        DType::Bf16 => attend::<Bf16>(pool, s, segments, qkv, keys, values, out),
        DType::F32 | DType::I8 => attend::<f32>(pool, s, segments, qkv, keys, values, out),
    }
}

fn attend<E: Stored>(
    pool: &Pool,
    s: CachedAttention,
    segments: &[CachedSegment<'_>],
    qkv: &[f32],
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
) {
    fn part<E: Stored>(s: CachedAttention, words: &[f32], block: u32, head: usize) -> &[E] {
        let at = block as usize * s.block_elements() + head * s.head_words();
        elements(&words[at..at + s.head_words()])
    }
    let (e, group) = (s.head_dim, s.heads / s.kv_heads);
    let width = (s.heads + 2 * s.kv_heads) * e;
    let out_width = s.heads * e;
    // A task: up to ROWS consecutive rows of one segment, under one key-value head.
    let tasks: Vec<(usize, usize)> = segments
        .iter()
        .enumerate()
        .flat_map(|(i, g)| (0..g.rows).step_by(ROWS).map(move |row| (i, row)))
        .collect();
    let out = Rows::new(out, 1);
    let scale = 1.0 / (e as f32).sqrt();
    pool.split(tasks.len() * s.kv_heads, 1, |task| {
        let (index, first) = tasks[task.start / s.kv_heads];
        let kv = task.start % s.kv_heads;
        let g = segments[index];
        let rows = ROWS.min(g.rows - first);
        let seen = g.position + first + rows;
        let blocks = &g.blocks[..seen.div_ceil(KV_BLOCK)];
        let columns = blocks.len() * KV_BLOCK;
        let queries = rows * group;
        pool.scratch(queries * (columns + 2 * e), |scratch| {
            let (scores, scratch) = scratch.split_at_mut(queries * columns);
            let (q, sums) = scratch.split_at_mut(queries * e);
            for r in 0..rows {
                let from = &qkv[(g.row + first + r) * width + kv * group * e..][..group * e];
                q[r * group * e..(r + 1) * group * e].copy_from_slice(from);
            }
            for (b, block) in blocks.iter().enumerate() {
                let tile = Tile {
                    m: queries,
                    n: KV_BLOCK,
                    k: e,
                    a_row: e,
                    a_column: 1,
                    b_row: KV_BLOCK,
                    c_row: columns,
                    accumulate: false,
                };
                E::product(tile, q, part(s, keys, *block, kv), &mut scores[b * KV_BLOCK..]);
            }
            for (i, row) in scores.chunks_exact_mut(columns).enumerate() {
                softmax_row(row, g.position + first + i / group + 1, scale);
            }
            for (b, block) in blocks.iter().enumerate() {
                let tile = Tile {
                    m: queries,
                    n: e,
                    k: KV_BLOCK.min(seen - b * KV_BLOCK),
                    a_row: columns,
                    a_column: 1,
                    b_row: e,
                    c_row: e,
                    accumulate: b > 0,
                };
                E::product(tile, &scores[b * KV_BLOCK..], part(s, values, *block, kv), sums);
            }
            for r in 0..rows {
                let at = (g.row + first + r) * out_width + kv * group * e;
                // SAFETY: this task alone writes these rows under this head.
                let to = unsafe { out.part(at..at + group * e) };
                to.copy_from_slice(&sums[r * group * e..(r + 1) * group * e]);
            }
        });
    });
}
