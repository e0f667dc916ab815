//! Products of whole matrices by the AVX2 kernel: reordering, blocking and threads around it.
//!
//! Both factors are reordered on the way: a stretch of the second into groups of 16 columns, and each
//! task's rows of the first into blocks of [`avx2::ROWS`]. A stretch goes on from what the one before
//! has left in the product, so that sums run along k in order: a result depends on its own row and
//! column alone, not on blocking or on threads.
#![allow(
    unsafe_code,
    reason = "the kernel takes pointers; what they reach is asserted here, once for each block"
)]

use std::ops::Range;

use super::multiply::{Extent, lines};
use super::reorder::{Order, SPARE, reorder};
use super::{Format, GROUP, Operand, avx2};
use crate::cpu::pool::{Pool, Rows};

/// Rows of the sum that one pass takes, at most: a group of columns of so many is 24 KiB of L1. As
/// measured, shorter ones cost more in passes over the product, and longer ones win nothing.
const DEPTH: usize = 384;
/// Rows of the product that one task computes, when there are enough: 144 KiB of them stay in L2.
const BAND: usize = 16 * avx2::ROWS;
/// Below so many rows a task reads columns more often than they can be had.
const LEAST: usize = 8 * avx2::ROWS;
/// Columns that are reordered at a time: 4.5 MiB, a part of L3.
const COLUMNS: usize = 192 * GROUP;
/// Groups of columns that one task reorders.
const GROUPS: usize = 8;
/// Below so many products, other threads are not worth waking.
const SERIAL: usize = 32 << 10;

/// A product over one stretch of the sum, for some columns that are in groups already.
struct Stretch<'a> {
    extent: Extent<'a>,
    rounds: bool,
    a: Operand<'a>,
    columns: Range<usize>,
    ks: Range<usize>,
    groups: &'a [f32],
    /// From one group to the next, in words.
    group: usize,
}

/// Computes `c`, with both factors rounded to bf16 or not. The caller has asked for AVX2.
pub(in crate::cpu) fn multiply(
    pool: &Pool,
    rounds: bool,
    e: Extent<'_>,
    a: Operand<'_>,
    b: Operand<'_>,
    c: &mut [f32],
) {
    assert!(a.values.len() == e.m * e.k && b.values.len() == e.k * e.n, "multiply: factors");
    assert!(c.len() == e.m * e.n && e.k > 0, "multiply: product");
    assert!(e.scales.is_none() && e.bias.is_none_or(|b| b.len() == e.n), "multiply: columns");
    if e.m == 0 || e.n == 0 {
        return;
    }
    let c = Rows::new(c, 1);
    let depth = e.k.div_ceil(e.k.div_ceil(DEPTH));
    // A line more than they need: groups whole pages apart would share a few sets of L1.
    let group = depth * GROUP + SPARE;
    let order = Order { width: GROUP, padded: true, block: group, rounds };
    let grain = if e.m * e.k * e.n < SERIAL { usize::MAX } else { GROUPS };
    // The columns of B are its lanes.
    let b = Operand { row: b.column, column: b.row, ..b };
    lines(pool, e.n.min(COLUMNS).div_ceil(GROUP) * group, |groups| {
        for first in (0..e.n).step_by(COLUMNS) {
            let columns = first..e.n.min(first + COLUMNS);
            for start in (0..e.k).step_by(depth) {
                let ks = start..e.k.min(start + depth);
                let whole = Rows::new(groups, group);
                pool.split(columns.len().div_ceil(GROUP), grain, |part| {
                    let end = columns.end.min(first + part.end * GROUP);
                    let lanes = first + part.start * GROUP..end;
                    // SAFETY: each task has groups of its own.
                    reorder(order, b, lanes, ks.clone(), unsafe { whole.part(part) });
                });
                let columns = columns.clone();
                Stretch { extent: e, rounds, a, columns, ks, groups, group }.multiply(pool, c);
            }
        }
    });
}

impl Stretch<'_> {
    /// Cuts the product into tasks: bands of rows, and where these are few, parts of the columns.
    fn multiply(&self, pool: &Pool, c: Rows<'_>) {
        let (m, depth) = (self.extent.m, self.ks.len());
        let serial = m * self.columns.len() * self.extent.k < SERIAL;
        let threads = if serial { 1 } else { pool.threads() };
        // Two for each thread, so that one that is held up leaves something to the others.
        let tasks = if threads == 1 { 1 } else { 2 * threads };
        let bands = m.div_ceil(BAND).max(tasks.min(m.div_ceil(LEAST)));
        let bands = if bands > threads { bands.next_multiple_of(threads) } else { bands };
        let band = m.div_ceil(bands).next_multiple_of(avx2::ROWS);
        let bands = m.div_ceil(band);
        let groups = self.columns.len().div_ceil(GROUP);
        let part = groups.div_ceil(tasks.div_ceil(bands));
        let parts = groups.div_ceil(part);
        let block = avx2::ROWS * depth + SPARE;
        let order = Order { width: avx2::ROWS, padded: false, block, rounds: self.rounds };
        pool.split(bands * parts, 1, |task| {
            let (i, j) = (task.start / parts, task.start % parts);
            let rows = i * band..m.min((i + 1) * band);
            let groups = j * part..groups.min((j + 1) * part);
            pool.scratch(rows.len().div_ceil(avx2::ROWS) * block, |left| {
                reorder(order, self.a, rows.clone(), self.ks.clone(), left);
                // SAFETY: the tasks' rows and columns are disjoint.
                unsafe { self.part(rows, left, block, groups, c) };
            });
        });
    }

    /// Computes some rows, which `left` holds in blocks, of some groups of columns.
    ///
    /// # Safety
    /// Nothing else touches these rows and columns of `c`.
    unsafe fn part(
        &self,
        rows: Range<usize>,
        left: &[f32],
        block: usize,
        groups: Range<usize>,
        c: Rows<'_>,
    ) {
        let (e, depth) = (self.extent, self.ks.len());
        assert!(rows.end <= e.m && self.ks.end <= e.k && self.columns.end <= e.n, "part");
        let bias = e.bias.filter(|_| self.ks.end == e.k);
        for group in groups {
            let column = self.columns.start + group * GROUP;
            let columns = GROUP.min(self.columns.end - column);
            let b = &self.groups[group * self.group..][..depth * GROUP];
            for (left, first) in left.chunks_exact(block).zip(rows.clone().step_by(avx2::ROWS)) {
                let m = avx2::ROWS.min(rows.end - first);
                let is_last = first + m == rows.end;
                let block = avx2::Block {
                    m,
                    a: left[..m * depth].as_ptr(),
                    b: b.as_ptr().cast(),
                    groups: 1,
                    steps: depth,
                    // Its last block brings the next group of columns to L1.
                    ahead: if is_last { self.group * size_of::<f32>() } else { 0 },
                    // Below the length of `c`: rows and columns are those of the product.
                    c: c.as_ptr().wrapping_add(first * e.n + column),
                    c_row: e.n,
                    columns,
                    resume: e.accumulate || self.ks.start > 0,
                    row_scales: std::ptr::null(),
                    scales: std::ptr::null(),
                    bias: bias.map_or(std::ptr::null(), |b| b[column..].as_ptr()),
                };
                // SAFETY: asserted above; the caller's promise; whoever calls has asked for AVX2.
                unsafe { avx2::run(Format::F32, &block, 0..1) };
            }
        }
    }
}
