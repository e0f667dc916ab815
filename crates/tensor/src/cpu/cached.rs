//! Attention to the paged cache of keys and values, for prefill and decode in one batch.
#![allow(unsafe_code, reason = "tasks write disjoint columns of one output")]

use super::pool::{Pool, Rows};
use super::simd::{Simd, dispatched, exp, lane_max, lane_sum};
use super::tile::{Tile, product};
use crate::shape::{CachedAttention, CachedSegment, KV_BLOCK};

/// Query rows that share one pass over the cache: the rows that the product kernel takes at once.
const ROWS: usize = 6;

pub(super) fn write(
    s: CachedAttention,
    qkv: &[f32],
    slots: &[u32],
    keys: &mut [f32],
    values: &mut [f32],
) {
    let e = s.head_dim;
    let width = (s.heads + 2 * s.kv_heads) * e;
    assert_eq!(qkv.len(), slots.len() * width, "cache write");
    for (row, slot) in qkv.chunks_exact(width).zip(slots) {
        let (block, place) = (*slot as usize / KV_BLOCK, *slot as usize % KV_BLOCK);
        for head in 0..s.kv_heads {
            let at = block * s.block_elements() + head * e * KV_BLOCK;
            let key = &row[(s.heads + head) * e..][..e];
            for (i, x) in key.iter().enumerate() {
                keys[at + i * KV_BLOCK + place] = *x;
            }
            let value = &row[(s.heads + s.kv_heads + head) * e..][..e];
            values[at + place * e..at + (place + 1) * e].copy_from_slice(value);
        }
    }
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
                let at = *block as usize * s.block_elements() + kv * e * KV_BLOCK;
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
                product(tile, q, &keys[at..at + e * KV_BLOCK], &mut scores[b * KV_BLOCK..]);
            }
            for (i, row) in scores.chunks_exact_mut(columns).enumerate() {
                softmax_row(row, g.position + first + i / group + 1, scale);
            }
            for (b, block) in blocks.iter().enumerate() {
                let at = *block as usize * s.block_elements() + kv * e * KV_BLOCK;
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
                product(tile, &scores[b * KV_BLOCK..], &values[at..at + e * KV_BLOCK], sums);
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
