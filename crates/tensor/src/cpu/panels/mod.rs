//! Matrices reordered for the matrix kernels: panels of 48 columns, in which every step along the
//! sum is one run of memory.
//!
//! A panel holds [`PANEL`] groups of [`GROUP`] columns (the last one may hold fewer). It is a
//! sequence of steps; a step holds one line for each group; a line holds 16 columns by 1 (f32,
//! f16), 2 (bf16) or 4 (int8) rows of the matrix. Columns and rows beyond the matrix are zeros.
//! The inner kernel keeps 8 rows by 48 columns of the product in registers and sums along k in
//! order, so that a result depends on its own row and column alone: not on the number of rows, on
//! blocking or on threads.
//!
//! The kernels of [`multiply`] need AVX-512 ([`Format::has_kernel`]). Where there is none for a format,
//! [`stored`] multiplies with AVX2, and [`blocks`] does so matrices that are reordered on the way; and
//! where there is neither, [`expand`] turns panels back into f32, for the products of [`super::tile`].
#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "parts that only the AVX-512 kernels use")
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod blocks;
#[cfg(target_arch = "x86_64")]
mod kernel;
#[cfg(target_arch = "x86_64")]
pub(super) mod multiply;
pub(super) mod narrow;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(target_arch = "x86_64")]
pub(super) mod reorder;
#[cfg(target_arch = "x86_64")]
pub(super) mod stored;

use super::simd::{self, Level};
use narrow::{bf16_bits, bf16_value, f16_bits, f16_value};

/// Columns of one vector.
pub(super) const GROUP: usize = 16;
/// Groups of a whole panel.
pub(super) const PANEL: usize = 3;
/// Columns of a whole panel.
pub(super) const PANEL_COLUMNS: usize = GROUP * PANEL;

/// A matrix in memory: rows and columns may be swapped, one of the two steps is 1.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Operand<'a> {
    pub values: &'a [f32],
    /// From one row to the next.
    pub row: usize,
    /// From one column to the next.
    pub column: usize,
}

/// How the numbers of a panel are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// f32, multiplied by f32.
    F32,
    /// f16, multiplied by f32.
    F16,
    /// Pairs of bf16, multiplied by bf16 and summed in f32.
    Bf16,
    /// Sign and magnitude in a byte each, multiplied by bf16; the scale of a column comes last.
    I8,
}

impl Format {
    /// Returns the rows of the matrix in one step.
    pub(super) fn rows(self) -> usize {
        match self {
            Self::F32 | Self::F16 => 1,
            Self::Bf16 => 2,
            Self::I8 => 4,
        }
    }

    /// Returns the bytes of one line.
    pub(super) fn line(self) -> usize {
        match self {
            Self::F16 => 32,
            Self::F32 | Self::Bf16 | Self::I8 => 64,
        }
    }

    /// Returns the steps that cover `k` rows.
    pub(super) fn steps(self, k: usize) -> usize {
        k.div_ceil(self.rows())
    }

    /// Returns the 32-bit words of one row of the other factor: an f32, or a pair of bf16.
    pub(super) fn words(self, k: usize) -> usize {
        match self {
            Self::F32 | Self::F16 => k,
            Self::Bf16 => k.div_ceil(2),
            Self::I8 => k.div_ceil(4) * 2,
        }
    }

    /// Returns whether the other factor is rounded to bf16.
    pub(super) fn rounds(self) -> bool {
        matches!(self, Self::Bf16 | Self::I8)
    }

    /// Returns the bytes that a `[k, n]` matrix takes.
    pub(super) fn bytes(self, k: usize, n: usize) -> usize {
        n.div_ceil(GROUP) * self.steps(k) * self.line()
    }

    /// Returns whether this processor has the AVX-512 instructions of the format's kernel.
    pub(super) fn has_kernel(self) -> bool {
        match self {
            Self::F32 | Self::F16 => simd::level() >= Level::Avx512,
            Self::Bf16 | Self::I8 => simd::level() >= Level::Avx512Bf16,
        }
    }

    /// Returns where the first line of a column's group begins, and the step to the next, in bytes.
    fn column(self, k: usize, n: usize, column: usize) -> (usize, usize) {
        let group = column / GROUP;
        let first = group / PANEL * PANEL;
        let groups = (n.div_ceil(GROUP) - first).min(PANEL);
        let line = first * self.steps(k) + (group - first);
        (line * self.line(), groups * self.line())
    }

    /// Returns the byte of row `part` of `lane` in a line.
    fn within(self, lane: usize, part: usize) -> usize {
        match self {
            Self::F32 => lane * 4,
            Self::F16 => lane * 2,
            Self::Bf16 => lane * 4 + part * 2,
            // The order in which unpacking the low, then the high bytes of 128-bit lanes gives two
            // lines of pairs.
            Self::I8 => {
                let pair = lane * 2 + part % 2;
                pair / 8 * 16 + part / 2 * 8 + pair % 8
            }
        }
    }

    /// Stores one value, for [`Format::I8`] already divided by its scale, at the head of `to`.
    fn put(self, to: &mut [u8], value: f32) {
        match self {
            Self::F32 => to[..4].copy_from_slice(&value.to_le_bytes()),
            Self::F16 => to[..2].copy_from_slice(&f16_bits(value).to_le_bytes()),
            Self::Bf16 => to[..2].copy_from_slice(&bf16_bits(value).to_le_bytes()),
            Self::I8 => {
                let whole = value.round_ties_even().clamp(-127.0, 127.0);
                to[0] = whole.abs() as u8 | if whole < 0.0 { 0x80 } else { 0 };
            }
        }
    }

    /// Returns the value at the head of `from`, without the scale of [`Format::I8`].
    fn get(self, from: &[u8]) -> f32 {
        match self {
            Self::F32 => f32::from_le_bytes([from[0], from[1], from[2], from[3]]),
            Self::F16 => f16_value(u16::from_le_bytes([from[0], from[1]])),
            Self::Bf16 => bf16_value(u16::from_le_bytes([from[0], from[1]])),
            Self::I8 => {
                let magnitude = f32::from(from[0] & 0x7F);
                if from[0] & 0x80 == 0 { magnitude } else { -magnitude }
            }
        }
    }

    /// Stores column `column` of a `[k, n]` matrix in `to`, which held zeros.
    pub(super) fn store_column(
        self,
        k: usize,
        n: usize,
        column: usize,
        at: impl Fn(usize) -> f32,
        to: &mut [u8],
    ) {
        let (first, step) = self.column(k, n, column);
        for row in 0..k {
            let place = first + row / self.rows() * step;
            self.put(&mut to[place + self.within(column % GROUP, row % self.rows())..], at(row));
        }
    }

    /// Reads column `column` of a `[k, n]` matrix, without the scale of [`Format::I8`].
    pub(super) fn load_column(
        self,
        k: usize,
        n: usize,
        column: usize,
        from: &[u8],
        to: &mut [f32],
    ) {
        let (first, step) = self.column(k, n, column);
        for (row, to) in to.iter_mut().enumerate().take(k) {
            let place = first + row / self.rows() * step;
            *to = self.get(&from[place + self.within(column % GROUP, row % self.rows())..]);
        }
    }
}

/// Turns one group of a stored `[k, n]` matrix back into f32, `[k, GROUP]`; columns beyond the matrix
/// are zeros.
pub(super) fn expand(f: Format, k: usize, n: usize, group: usize, from: &[u8], to: &mut [f32]) {
    let (first, step) = f.column(k, n, group * GROUP);
    for (row, to) in to[..k * GROUP].chunks_exact_mut(GROUP).enumerate() {
        let line = &from[first + row / f.rows() * step..][..f.line()];
        for (lane, to) in to.iter_mut().enumerate() {
            *to = f.get(&line[f.within(lane, row % f.rows())..]);
        }
    }
}
