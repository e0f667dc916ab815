//! Stored matrices: weights that are only multiplied by, in panels, as f32, f16, bf16 or int8.
#![allow(unsafe_code, reason = "threads write disjoint columns of one output")]

use super::panels::narrow::round_to_bf16;
use super::panels::{Format, GROUP, PANEL, expand};
#[cfg(target_arch = "x86_64")]
use super::panels::{
    multiply::{self, Extent},
    stored,
};
use super::pool::{Pool, Rows};
use super::simd::{Level, level};
use super::tile::{Tile, product};
use super::{Cpu, CpuBuffer, matmul};
use crate::backend::{Backend, TensorError};
use crate::dtype::DType;
use crate::shape::{Linear, WeightLayout};

/// A matrix in the order of the kernels.
pub struct CpuMatrix {
    input: usize,
    output: usize,
    /// How the values lie that it is written from.
    layout: WeightLayout,
    storage: Storage,
    /// The panels' bytes, or the matrix as it came.
    values: CpuBuffer,
    /// For int8, the scale of each output.
    scales: Option<CpuBuffer>,
}

#[derive(Clone, Copy)]
enum Storage {
    Panels(Format),
    /// f32 where there is no kernel for panels.
    AsItCame,
}

#[allow(unsafe_code, reason = "numbers are seen as their bytes")]
fn bytes_of(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: every f32 is four bytes, and any four bytes are an f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

#[allow(unsafe_code, reason = "numbers are seen as their bytes")]
fn bytes(values: &[f32]) -> &[u8] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

impl CpuMatrix {
    /// Allocates zeros; see [`Backend::alloc_matrix`].
    pub(super) fn new(cpu: &Cpu, dtype: DType, s: Linear) -> Result<Self, TensorError> {
        let (input, output) = (s.input, s.output);
        let storage = match dtype {
            DType::F32 if level() < Level::Avx2 => Storage::AsItCame,
            DType::F32 => Storage::Panels(Format::F32),
            DType::F16 => Storage::Panels(Format::F16),
            DType::Bf16 => Storage::Panels(Format::Bf16),
            DType::I8 => Storage::Panels(Format::I8),
        };
        let values = cpu.alloc(match storage {
            Storage::AsItCame => input * output,
            Storage::Panels(format) => format.bytes(input, output) / size_of::<f32>(),
        })?;
        let scales = if dtype == DType::I8 { Some(cpu.alloc(output)?) } else { None };
        Ok(Self { input, output, layout: s.layout, storage, values, scales })
    }

    /// Takes new values; see [`Backend::write_matrix`].
    pub(super) fn write(&mut self, pool: &Pool, from: &[f32]) {
        let (input, output, layout) = (self.input, self.output, self.layout);
        assert_eq!(from.len(), input * output, "matrix to store");
        let Storage::Panels(format) = self.storage else {
            self.values.as_mut_slice().copy_from_slice(from);
            return;
        };
        let at = |row: usize, column: usize| match layout {
            WeightLayout::OutIn => from[column * input + row],
            WeightLayout::InOut => from[row * output + column],
        };
        if let Some(scales) = &mut self.scales {
            for (column, scale) in scales.as_mut_slice().iter_mut().enumerate() {
                let greatest = (0..input).fold(0.0f32, |m, row| m.max(at(row, column).abs()));
                *scale = greatest / 127.0;
            }
        }
        let scales = self.scales.as_ref();
        let inverse = |column: usize| match scales.map(|s| s.as_slice()[column]) {
            None => 1.0,
            Some(scale) if scale > 0.0 => 1.0 / scale,
            Some(_) => 0.0,
        };
        // A task for each panel: the bytes of panels do not overlap.
        let groups = output.div_ceil(GROUP);
        let words = format.steps(input) * format.line() / size_of::<f32>();
        let panels = Rows::new(self.values.as_mut_slice(), words);
        pool.split(groups, PANEL, |part| {
            let first = part.start * GROUP;
            // SAFETY: parts are disjoint.
            let to = bytes_of(unsafe { panels.part(part) });
            let columns = output.min(first + PANEL * GROUP) - first;
            for column in 0..columns {
                let factor = inverse(first + column);
                let value = |row: usize| at(row, first + column) * factor;
                format.store_column(input, columns, column, value, to);
            }
        });
    }

    /// Returns the memory that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (self.values.elements + self.scales.as_ref().map_or(0, |s| s.elements)) * size_of::<f32>()
    }

    /// Computes `y = x . w (+ bias)`.
    pub(super) fn linear(
        &self,
        pool: &Pool,
        rows: usize,
        x: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let (k, n) = (self.input, self.output);
        assert!(x.len() == rows * k && y.len() == rows * n, "stored linear");
        assert!(bias.is_none_or(|b| b.len() == n), "stored linear: bias");
        let format = match self.storage {
            Storage::Panels(format) => format,
            Storage::AsItCame => {
                let s = Linear { rows, input: k, output: n, layout: self.layout };
                let w = self.values.as_slice();
                matmul::linear(pool, matmul::Products::default(), s, x, w, bias, y);
                return;
            }
        };
        #[cfg(target_arch = "x86_64")]
        if level() >= Level::Avx2 && k > 0 {
            let scales = self.scales.as_ref().map(CpuBuffer::as_slice);
            let extent = Extent { m: rows, n, k, accumulate: false, scales, bias };
            let values = self.values.as_slice();
            if format.has_kernel() {
                multiply::multiply_stored(pool, format, extent, x, values, y);
            } else {
                stored::multiply_stored(pool, format, extent, x, values, y);
            }
            return;
        }
        if format.rounds() {
            pool.scratch(x.len(), |rounded| {
                round_to_bf16(x, rounded);
                self.expanded(pool, format, rows, rounded, bias, y);
            });
        } else {
            self.expanded(pool, format, rows, x, bias, y);
        }
    }

    /// The product where the format has no kernel: 16 columns at a time as f32.
    fn expanded(
        &self,
        pool: &Pool,
        format: Format,
        rows: usize,
        x: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let (k, n) = (self.input, self.output);
        let from = bytes(self.values.as_slice());
        let out = Rows::new(y, 1);
        pool.split(n.div_ceil(GROUP), 4, |groups| {
            pool.scratch((k + rows) * GROUP, |scratch| {
                let (weights, local) = scratch.split_at_mut(k * GROUP);
                for group in groups {
                    expand(format, k, n, group, from, weights);
                    let tile = Tile {
                        m: rows,
                        n: GROUP,
                        k,
                        a_row: k,
                        a_column: 1,
                        b_row: GROUP,
                        c_row: GROUP,
                        accumulate: false,
                    };
                    product(tile, x, weights, local);
                    let columns = group * GROUP..n.min((group + 1) * GROUP);
                    for (row, sums) in local.chunks_exact(GROUP).enumerate() {
                        // SAFETY: this task alone writes these columns.
                        let to =
                            unsafe { out.part(row * n + columns.start..row * n + columns.end) };
                        for ((to, sum), column) in to.iter_mut().zip(sums).zip(columns.clone()) {
                            let scale = self.scales.as_ref().map_or(1.0, |s| s.as_slice()[column]);
                            *to = sum * scale + bias.map_or(0.0, |b| b[column]);
                        }
                    }
                }
            });
        });
    }

    /// Copies the weights of some outputs; see [`Backend::embed_stored`].
    pub(super) fn embed(&self, indices: &[u32], offset: usize, out: &mut [f32]) {
        let (k, n) = (self.input, self.output);
        assert_eq!(out.len(), indices.len() * k, "stored embedding");
        for (out, index) in out.chunks_exact_mut(k).zip(indices) {
            let column = (*index as usize).checked_sub(offset).filter(|column| *column < n);
            let Some(column) = column else {
                out.fill(0.0);
                continue;
            };
            let values = self.values.as_slice();
            match (self.storage, self.layout) {
                (Storage::Panels(format), _) => {
                    format.load_column(k, n, column, bytes(values), out);
                    if let Some(scales) = &self.scales {
                        let scale = scales.as_slice()[column];
                        out.iter_mut().for_each(|x| *x *= scale);
                    }
                }
                (Storage::AsItCame, WeightLayout::OutIn) => {
                    out.copy_from_slice(&values[column * k..(column + 1) * k]);
                }
                (Storage::AsItCame, WeightLayout::InOut) => {
                    for (row, to) in out.iter_mut().enumerate() {
                        *to = values[row * n + column];
                    }
                }
            }
        }
    }
}
