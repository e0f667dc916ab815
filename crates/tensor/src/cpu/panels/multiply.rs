//! Products over whole matrices: reordering, blocking and threads around the inner kernel.
#![allow(
    unsafe_code,
    reason = "the kernel takes pointers; what they reach is asserted here, once for each block"
)]

use std::ops::Range;

use super::{Format, GROUP, Operand, PANEL, PANEL_COLUMNS, kernel, pack};
use crate::cpu::pool::{Pool, Rows};

/// Rows of the sum that one pass takes: a panel of so many is 48 KiB of bf16, or 96 KiB of f32,
/// and stays in L2 beside its rows. A multiple of every format's step.
const DEPTH: usize = 512;
/// Rows of the product that one task computes, when there are enough.
const BAND: usize = 128;
/// Words of the second factor that are reordered at a time: 8 MiB, a part of L3.
const REORDERED: usize = 2 << 20;
/// Below so many products, other threads are not worth waking.
const SERIAL: usize = 32 << 10;

/// `C [m, n] (+)= A [m, k] . B [k, n]`, times a scale for each column, plus a bias for each column.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Extent<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub accumulate: bool,
    pub scales: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
}

/// Rows of the first factor as the kernel wants them.
#[derive(Clone, Copy)]
struct Left<'a> {
    words: &'a [f32],
    /// From one row to the next; none: in groups of 16 rows.
    row: Option<usize>,
    group: usize,
}

/// From one row of bf16 to the next, in words: whole lines, and never a multiple of 4 KiB, which
/// would send all rows to the same few lines of L1.
fn stride(words: usize) -> usize {
    let lines = words.next_multiple_of(GROUP);
    if lines.is_multiple_of(256) { lines + GROUP } else { lines }
}

impl<'a> Left<'a> {
    /// Returns the words of scratch that [`Left::new`] needs.
    fn scratch(format: Format, a: Operand<'_>, rows: usize, k: usize) -> usize {
        match (a.column == 1, format.rounds()) {
            (true, false) => 0,
            (true, true) => rows * stride(format.words(k)),
            (false, _) => rows.next_multiple_of(GROUP) * format.words(k),
        }
    }

    /// Prepares a part of `a`.
    fn new(
        format: Format,
        a: Operand<'a>,
        rows: Range<usize>,
        ks: Range<usize>,
        scratch: &'a mut [f32],
    ) -> Self {
        let words = format.words(ks.len());
        if a.column != 1 {
            assert!(a.row == 1 && matches!(format, Format::F32 | Format::Bf16), "left factor");
            let group = words * GROUP;
            for (g, first) in rows.clone().step_by(GROUP).enumerate() {
                reorder(
                    format,
                    a,
                    first..rows.end.min(first + GROUP),
                    ks.clone(),
                    Lines {
                        to: &mut scratch[g * group..(g + 1) * group],
                        line: GROUP,
                        lines: words,
                    },
                );
            }
            return Self { words: scratch, row: None, group };
        }
        if !format.rounds() {
            return Self {
                words: &a.values[rows.start * a.row + ks.start..],
                row: Some(a.row),
                group: 0,
            };
        }
        let step = stride(words);
        for (to, row) in scratch.chunks_exact_mut(step).zip(rows) {
            let from = &a.values[row * a.row + ks.start..row * a.row + ks.end];
            // SAFETY: formats that round have a kernel only where there is AVX-512 BF16.
            unsafe { pack::row_to_bf16(from, &mut to[..words]) };
        }
        Self { words: scratch, row: Some(step), group: 0 }
    }

    /// Returns one past the last word that `rows` rows of `words` words reach.
    fn end(&self, rows: usize, words: usize) -> usize {
        match self.row {
            Some(row) => (rows - 1) * row + words,
            None => rows.div_ceil(GROUP) * self.group,
        }
    }
}

/// Where lines go.
struct Lines<'a> {
    to: &'a mut [f32],
    line: usize,
    lines: usize,
}

/// Reorders up to 16 rows of `a` (or columns, seen from the other side) into lines along `ks`.
fn reorder(format: Format, a: Operand<'_>, lanes: Range<usize>, ks: Range<usize>, out: Lines<'_>) {
    let last = (lanes.end - 1) * a.row + (ks.end - 1) * a.column;
    assert!(last < a.values.len() && lanes.len() <= GROUP, "reorder: out of the matrix");
    assert!(a.row == 1 || a.column == 1, "reorder: both steps");
    assert!((out.lines - 1) * out.line + GROUP <= out.to.len(), "reorder: out of the output");
    let part = pack::Part {
        from: a.values[lanes.start * a.row + ks.start * a.column..].as_ptr(),
        lane: a.row,
        row: a.column,
        lanes: lanes.len(),
        k: ks.len(),
        to: out.to.as_mut_ptr(),
        line: out.line,
        lines: out.lines,
    };
    // SAFETY: asserted above; the callers have asked for the format's kernel.
    unsafe { if format == Format::Bf16 { pack::to_bf16(part) } else { pack::to_f32(part) } }
}

/// A product with its second factor in panels.
struct Panels<'a> {
    format: Format,
    extent: Extent<'a>,
    /// The panels of `columns`.
    b: &'a [f32],
    columns: Range<usize>,
}

impl Panels<'_> {
    fn count(&self) -> usize {
        self.columns.len().div_ceil(PANEL_COLUMNS)
    }

    /// Computes rows `rows` of one panel over `ks`; `left` begins at the first of them.
    ///
    /// # Safety
    /// Nothing else touches these rows and columns of `c`.
    unsafe fn block(
        &self,
        left: Left<'_>,
        rows: Range<usize>,
        ks: Range<usize>,
        panel: usize,
        c: Rows<'_>,
    ) {
        let (f, e) = (self.format, self.extent);
        let column = self.columns.start + panel * PANEL_COLUMNS;
        let columns = PANEL_COLUMNS.min(self.columns.end - column);
        let groups = columns.div_ceil(GROUP);
        let line = f.line() / size_of::<f32>();
        let first = (panel * PANEL * f.steps(e.k) + ks.start / f.rows() * groups) * line;
        let steps = f.steps(ks.len());
        assert!(ks.start.is_multiple_of(f.rows()) && ks.end <= e.k && rows.end <= e.m, "block");
        assert!(first + steps * groups * line <= self.b.len(), "block: panels");
        assert!(left.end(rows.len(), f.words(ks.len())) <= left.words.len(), "block: rows");
        assert!(e.scales.is_none_or(|s| s.len() == e.n), "block: scales");
        assert!(e.bias.is_none_or(|b| b.len() == e.n), "block: bias");
        let is_last = ks.end == e.k;
        let of = |values: Option<&[f32]>| match values {
            Some(values) if is_last => values[column..].as_ptr(),
            _ => std::ptr::null(),
        };
        let block = kernel::Block {
            m: rows.len(),
            a: left.words.as_ptr(),
            a_row: left.row,
            a_group: left.group,
            b: self.b[first..].as_ptr().cast(),
            groups,
            steps,
            // SAFETY: in bounds, as rows and columns are.
            c: unsafe { c.as_ptr().add(rows.start * e.n + column) },
            c_row: e.n,
            columns,
            resume: e.accumulate || ks.start > 0,
            scales: of(e.scales),
            bias: of(e.bias),
        };
        // SAFETY: asserted above, and by the caller's promise.
        unsafe { kernel::run(f, &block) };
    }

    /// Many rows: each task takes a band of them, and all panels.
    fn by_rows(&self, pool: &Pool, a: Operand<'_>, c: Rows<'_>) {
        let (f, e) = (self.format, self.extent);
        let bands = e.m.div_ceil(BAND).next_multiple_of(pool.threads());
        let band = e.m.div_ceil(bands).next_multiple_of(GROUP);
        let depth = DEPTH.min(e.k);
        pool.split(e.m, band, |rows| {
            lines(pool, Left::scratch(f, a, rows.len(), depth), |scratch| {
                for start in (0..e.k).step_by(DEPTH) {
                    let ks = start..e.k.min(start + DEPTH);
                    let left = Left::new(f, a, rows.clone(), ks.clone(), scratch);
                    for panel in 0..self.count() {
                        // SAFETY: the bands of rows are disjoint.
                        unsafe { self.block(left, rows.clone(), ks.clone(), panel, c) };
                    }
                }
            });
        });
    }

    /// Few rows: each task takes some panels, and all rows. Every panel is read once.
    fn by_panels(&self, pool: &Pool, a: Operand<'_>, c: Rows<'_>) {
        let (f, e) = (self.format, self.extent);
        lines(pool, Left::scratch(f, a, e.m, e.k), |scratch| {
            let left = Left::new(f, a, 0..e.m, 0..e.k, scratch);
            let serial = e.m * e.k * self.columns.len() < SERIAL || pool.threads() == 1;
            let tasks = if serial { 1 } else { 4 * pool.threads() };
            pool.split(self.count(), self.count().div_ceil(tasks), |panels| {
                for panel in panels {
                    // SAFETY: the panels' columns are disjoint.
                    unsafe { self.block(left, 0..e.m, 0..e.k, panel, c) };
                }
            });
        });
    }
}

/// Lends scratch that begins at a cache line.
pub(super) fn lines<R>(pool: &Pool, words: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    pool.scratch(words + GROUP, |scratch| {
        let at = scratch.as_ptr().align_offset(64).min(GROUP);
        f(&mut scratch[at..at + words])
    })
}

/// Computes `c`, reordering both factors on the way. The format is f32 or bf16.
pub(in crate::cpu) fn multiply(
    pool: &Pool,
    format: Format,
    e: Extent<'_>,
    a: Operand<'_>,
    b: Operand<'_>,
    c: &mut [f32],
) {
    assert!(matches!(format, Format::F32 | Format::Bf16) && format.has_kernel(), "multiply");
    assert!(a.values.len() == e.m * e.k && b.values.len() == e.k * e.n, "multiply: factors");
    assert!(c.len() == e.m * e.n && e.k > 0, "multiply: product");
    if e.m == 0 || e.n == 0 {
        return;
    }
    let c = Rows::new(c, 1);
    let steps = format.steps(e.k);
    let at_once = (REORDERED / (steps * GROUP) * GROUP).max(PANEL_COLUMNS) / PANEL_COLUMNS;
    // The columns of B are what its lines hold.
    let b = Operand { row: b.column, column: b.row, ..b };
    for start in (0..e.n).step_by(at_once * PANEL_COLUMNS) {
        let columns = start..e.n.min(start + at_once * PANEL_COLUMNS);
        let groups = columns.len().div_ceil(GROUP);
        lines(pool, groups * steps * GROUP, |panels| {
            let whole = Rows::new(panels, steps * GROUP);
            pool.split(groups.div_ceil(PANEL), 1, |panel| {
                let first = panel.start * PANEL;
                let here = PANEL.min(groups - first);
                // SAFETY: each panel is one task's.
                let to = unsafe { whole.part(first..first + here) };
                for g in 0..here {
                    let column = columns.start + (first + g) * GROUP;
                    let lanes = column..columns.end.min(column + GROUP);
                    let out = Lines { to: &mut to[g * GROUP..], line: here * GROUP, lines: steps };
                    reorder(format, b, lanes, 0..e.k, out);
                }
            });
            let p = Panels { format, extent: e, b: panels, columns };
            if e.m >= 64 * pool.threads() { p.by_rows(pool, a, c) } else { p.by_panels(pool, a, c) }
        });
    }
}

/// Computes `c = a . b`, with `a [m, k]` row by row and `b` in panels already.
pub(in crate::cpu) fn multiply_stored(
    pool: &Pool,
    format: Format,
    e: Extent<'_>,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
) {
    assert!(format.has_kernel(), "multiply stored");
    assert!(a.len() == e.m * e.k && c.len() == e.m * e.n && e.k > 0, "multiply stored");
    if e.m == 0 || e.n == 0 {
        return;
    }
    let p = Panels { format, extent: e, b, columns: 0..e.n };
    let c = Rows::new(c, 1);
    p.by_panels(pool, Operand { values: a, row: e.k, column: 1 }, c);
}
