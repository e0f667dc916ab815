//! Products with stored panels by the AVX2 kernel: packing rows, blocking and threads around it.
//!
//! Rows are packed once for each product, in blocks of [`avx2::ROWS`]. For int8 they become 16-bit
//! numbers, their row's greatest being the greatest of these, and products are summed exactly, as
//! integers, over stretches short enough that no sum can overflow.
#![allow(
    unsafe_code,
    reason = "the kernel takes pointers; what they reach is asserted here, once for each block"
)]

use std::ops::Range;

use super::multiply::Extent;
use super::narrow::round_to_bf16;
use super::reorder::{Order, SPARE, reorder};
use super::{Format, GROUP, Operand, PANEL, PANEL_COLUMNS, avx2};
use crate::cpu::pool::{Pool, Rows};
use crate::cpu::simd::{Simd, dispatched, lane_greatest, lane_sum};

/// Rows of the product that one task computes, when there are many: 120 KiB of them are in L2 for
/// one stretch of the sum.
const BAND: usize = 20 * avx2::ROWS;
/// From so many rows for each thread on, tasks take bands of rows instead of panels.
const MANY: usize = 48;
/// Below so many products, other threads are not worth waking.
const SERIAL: usize = 32 << 10;
/// The greatest of the 16-bit numbers that rows are rounded to for int8.
const GREATEST: f32 = 32767.0;

/// Up to so many rows, reading the panels takes longer than computing with them.
const FEW: usize = 32;
/// How far ahead a whole panel is read, in bytes: what memory delivers within its latency.
const AHEAD: usize = 1536;

/// Rows of the sum that one pass takes, for `m` rows of the product. One group of columns of them, at
/// most 16 KiB, stays in L1 beside its rows. With few rows it is short, so that the next stretch of a
/// panel comes from memory while this one is computed. For int8 it is always the same, since sums
/// are rounded after each, and short enough that 32 bits do not overflow.
fn depth(format: Format, m: usize) -> usize {
    match format {
        Format::I8 => 128,
        _ if m <= FEW => 64,
        _ => 256,
    }
}
const _: () = assert!(127 * 32767 * 128 <= i32::MAX as u64);

/// Returns the words of one packed row.
fn words(format: Format, k: usize) -> usize {
    match format {
        Format::F32 | Format::F16 => k,
        Format::Bf16 => k.next_multiple_of(2),
        Format::I8 => k.div_ceil(4) * 2,
    }
}

/// Returns the words from one packed block of rows to the next.
fn block_words(format: Format, k: usize) -> usize {
    avx2::ROWS * words(format, k) + SPARE
}

/// Packs one block of rows of `k`.
fn pack(rounds: bool, k: usize, from: &[f32], to: &mut [f32]) {
    let m = from.len() / k;
    match (m, rounds) {
        (1, false) => to[..k].copy_from_slice(from),
        (1, true) => round_to_bf16(from, to),
        _ => {
            let order = Order { width: avx2::ROWS, padded: false, block: to.len(), rounds };
            reorder(order, Operand { values: from, row: k, column: 1 }, 0..m, 0..k, to);
        }
    }
    // For formats of two words, where `k` is odd.
    to[m * k..m * (k + 1)].fill(0.0);
}

#[inline(always)]
fn pack_pairs_body<S: Simd>(_: S, k: usize, from: &[f32], to: &mut [f32], scales: &mut [f32]) {
    let m = scales.len();
    for ((r, row), scale) in from.chunks_exact(k).enumerate().zip(scales) {
        let greatest = lane_greatest(row);
        // A row that is not finite has no finite products either. What is not finite is none times
        // zero too.
        let finite = lane_sum(k, |i| row[i] * 0.0) == 0.0;
        *scale = if finite { greatest / GREATEST } else { f32::NAN };
        let inverse = if finite && greatest > 0.0 { GREATEST / greatest } else { 0.0 };
        // Adding 1.5 * 2^23 rounds to a whole number and leaves its 16 bits lowest.
        let whole = |x: f32| (x * inverse + 12_582_912.0).to_bits();
        let word = |[low, high]: [f32; 2]| f32::from_bits(whole(low) & 0xFFFF | whole(high) << 16);
        let (pairs, rest) = row.as_chunks::<2>();
        let to = &mut to[r..];
        if m == 1 {
            to.iter_mut().zip(pairs).for_each(|(to, pair)| *to = word(*pair));
        } else {
            to.iter_mut().step_by(m).zip(pairs).for_each(|(to, pair)| *to = word(*pair));
        }
        let mut rest = rest.iter();
        for to in to.iter_mut().step_by(m).take(words(Format::I8, k)).skip(pairs.len()) {
            *to = word([rest.next().copied().unwrap_or(0.0), 0.0]);
        }
    }
}

dispatched! {
    /// Packs rows of `k`, one for each scale, as pairs of 16-bit numbers.
    fn pack_pairs(k: usize, from: &[f32], to: &mut [f32], scales: &mut [f32]) = pack_pairs_body;
}

/// A product whose rows are packed.
struct Packed<'a> {
    format: Format,
    extent: Extent<'a>,
    rows: &'a [f32],
    row_scales: &'a [f32],
    panels: &'a [f32],
}

/// Computes `c = a . b`, with `a [m, k]` row by row and `b` in panels.
pub(in crate::cpu) fn multiply_stored(
    pool: &Pool,
    format: Format,
    e: Extent<'_>,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
) {
    assert!(a.len() == e.m * e.k && c.len() == e.m * e.n && e.k > 0, "multiply stored");
    assert!(e.scales.is_none_or(|s| s.len() == e.n), "multiply stored: scales");
    assert!(e.scales.is_some() == (format == Format::I8) && !e.accumulate, "multiply stored");
    assert!(e.bias.is_none_or(|b| b.len() == e.n), "multiply stored: bias");
    assert!(size_of_val(b) >= format.bytes(e.k, e.n), "multiply stored: panels");
    if e.m == 0 || e.n == 0 {
        return;
    }
    let (blocks, block) = (e.m.div_ceil(avx2::ROWS), block_words(format, e.k));
    pool.scratch(blocks * block + e.m, |scratch| {
        let (rows, row_scales) = scratch.split_at_mut(blocks * block);
        let (to, scales) = (Rows::new(rows, block), Rows::new(row_scales, 1));
        pool.split(blocks, 1, |part| {
            let which = part.start * avx2::ROWS..e.m.min(part.end * avx2::ROWS);
            let from = &a[which.start * e.k..which.end * e.k];
            // SAFETY: each task has a block of its own.
            let (to, scales) = unsafe { (to.part(part), scales.part(which)) };
            match format {
                Format::I8 => pack_pairs(e.k, from, to, scales),
                _ => pack(format.rounds(), e.k, from, to),
            }
        });
        let p = Packed { format, extent: e, rows, row_scales, panels: b };
        p.multiply(pool, Rows::new(c, 1));
    });
}

impl Packed<'_> {
    fn multiply(&self, pool: &Pool, c: Rows<'_>) {
        let e = self.extent;
        let panels = e.n.div_ceil(PANEL_COLUMNS);
        if e.m >= MANY * pool.threads() {
            let bands = e.m.div_ceil(BAND).next_multiple_of(pool.threads());
            let band = e.m.div_ceil(bands).next_multiple_of(avx2::ROWS);
            // SAFETY: bands of rows are disjoint.
            pool.split(e.m, band, |rows| unsafe { self.part(rows, 0..panels, c) });
            return;
        }
        let serial = e.m * e.k * e.n < SERIAL || pool.threads() == 1;
        let tasks = if serial { 1 } else { 4 * pool.threads() };
        pool.split(panels, panels.div_ceil(tasks), |part| {
            // SAFETY: the panels' columns are disjoint.
            unsafe { self.part(0..e.m, part, c) };
        });
    }

    /// Computes some rows, the first of which begins a block, of some panels. Every panel is read
    /// once, but for what L1 holds.
    ///
    /// # Safety
    /// Nothing else touches these rows and columns of `c`.
    unsafe fn part(&self, rows: Range<usize>, panels: Range<usize>, c: Rows<'_>) {
        let k = self.extent.k;
        // A whole panel at once leaves nothing to come back to.
        let wide = rows.len() <= avx2::WIDE_ROWS && self.format != Format::I8;
        let depth = if wide { k } else { depth(self.format, self.extent.m) };
        for panel in panels {
            let columns = PANEL_COLUMNS.min(self.extent.n - panel * PANEL_COLUMNS);
            let groups = columns.div_ceil(GROUP);
            for start in (0..k).step_by(depth) {
                let ks = start..k.min(start + depth);
                let block = |first: usize| self.block(first, panel, ks.clone(), c);
                if rows.len() <= avx2::WIDE_ROWS && groups == PANEL {
                    // SAFETY: `block` has asserted what the kernel reaches; the caller's promise;
                    // whoever calls has asked for the processor's level.
                    unsafe { avx2::run(self.format, &block(rows.start), 0..groups) };
                    continue;
                }
                for group in 0..groups {
                    for first in rows.clone().step_by(avx2::ROWS) {
                        let mut block = block(first);
                        if self.extent.m > FEW {
                            let is_last = first + block.m == rows.end;
                            block.ahead = if is_last { self.next(&block, group) } else { 0 };
                        }
                        // SAFETY: as above.
                        unsafe { avx2::run(self.format, &block, group..group + 1) };
                    }
                }
            }
        }
    }

    /// Returns how far the lines of the group after `group` are from its own, in bytes. The last of many
    /// blocks of rows brings them to L1.
    fn next(&self, b: &avx2::Block, group: usize) -> usize {
        let line = self.format.line();
        if group + 1 < b.groups { line } else { (b.steps * b.groups - group) * line }
    }

    /// Describes the block of rows that begins at `first`, by one panel, over `ks`.
    fn block(&self, first: usize, panel: usize, ks: Range<usize>, c: Rows<'_>) -> avx2::Block {
        let (f, e) = (self.format, self.extent);
        let m = avx2::ROWS.min(e.m - first);
        let column = panel * PANEL_COLUMNS;
        let columns = PANEL_COLUMNS.min(e.n - column);
        let groups = columns.div_ceil(GROUP);
        let a = first / avx2::ROWS * block_words(f, e.k) + words(f, ks.start) * m;
        let line = f.line() / size_of::<f32>();
        let b = (panel * PANEL * f.steps(e.k) + ks.start / f.rows() * groups) * line;
        let steps = f.steps(ks.len());
        assert!(ks.start.is_multiple_of(f.rows()) && ks.end <= e.k, "block");
        assert!(a + words(f, ks.len()) * m <= self.rows.len(), "block: rows");
        assert!(b + steps * groups * line <= self.panels.len(), "block: panels");
        let is_last = ks.end == e.k;
        let of = |values: Option<&[f32]>| values.map_or(std::ptr::null(), |v| v[column..].as_ptr());
        avx2::Block {
            m,
            ahead: if e.m <= avx2::WIDE_ROWS { AHEAD } else { steps * groups * f.line() },
            a: self.rows[a..].as_ptr(),
            b: self.panels[b..].as_ptr().cast(),
            groups,
            steps,
            // Below the length of `c`: rows and columns are those of the product.
            c: c.as_ptr().wrapping_add(first * e.n + column),
            c_row: e.n,
            columns,
            resume: ks.start > 0,
            row_scales: self.row_scales[first..].as_ptr(),
            scales: of(e.scales),
            bias: of(e.bias.filter(|_| is_last)),
        }
    }
}
