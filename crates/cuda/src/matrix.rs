//! Matrices that are only multiplied by, as `kernels/stored.cu` reads them: `[output, stride]`, with a
//! row's stride a multiple of 16 elements.

use std::sync::Arc;

use drumline_tensor::{DType, Linear, WeightLayout};

use crate::device::Device;
use crate::error::CudaError;
use crate::memory::Bytes;

/// A stored matrix.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) dtype: DType,
    pub(crate) input: usize,
    pub(crate) output: usize,
    layout: WeightLayout,
    pub(crate) values: Bytes,
    /// One for each output, for int8 alone.
    pub(crate) scales: Option<Bytes>,
}

impl Matrix {
    pub(crate) fn zeros(device: &Arc<Device>, dtype: DType, s: Linear) -> Result<Self, CudaError> {
        let bytes = s.output * stride(s.input) * dtype.bytes();
        let scales = match dtype {
            DType::I8 => Some(Bytes::zeros(device, s.output * size_of::<f32>())?),
            DType::F32 | DType::Bf16 | DType::F16 => None,
        };
        Ok(Self {
            dtype,
            input: s.input,
            output: s.output,
            layout: s.layout,
            values: Bytes::zeros(device, bytes)?,
            scales,
        })
    }

    pub(crate) fn stride(&self) -> usize {
        stride(self.input)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.values.len() + self.scales.as_ref().map_or(0, Bytes::len)
    }

    pub(crate) fn scales(&self) -> u64 {
        self.scales.as_ref().map_or(0, Bytes::address)
    }

    /// Rounds host values and sends them.
    pub(crate) fn write(&mut self, from: &[f32]) -> Result<(), CudaError> {
        assert_eq!(from.len(), self.input * self.output, "a matrix of this shape");
        let (stride, input) = (self.stride(), self.input);
        let value = |o: usize, i: usize| match self.layout {
            WeightLayout::OutIn => from[o * input + i],
            WeightLayout::InOut => from[i * self.output + o],
        };
        // A row of `stride` elements, zeros behind the input.
        let rows = || {
            (0..self.output).flat_map(move |o| {
                (0..stride).map(move |i| (o, if i < input { value(o, i) } else { 0.0 }))
            })
        };
        match self.dtype {
            DType::F32 => self.values.put(&rows().map(|(_, x)| x).collect::<Vec<f32>>()),
            DType::Bf16 => self.values.put(&rows().map(|(_, x)| bf16(x)).collect::<Vec<u16>>()),
            DType::F16 => self.values.put(&rows().map(|(_, x)| f16(x)).collect::<Vec<u16>>()),
            DType::I8 => {
                let scales: Vec<f32> = (0..self.output)
                    .map(|o| (0..input).map(|i| value(o, i).abs()).fold(0.0, f32::max) / 127.0)
                    .collect();
                let byte = |(o, x): (usize, f32)| match scales[o] {
                    0.0 => 0i8,
                    scale => (x * (1.0 / scale)).round_ties_even() as i8,
                };
                self.values.put(&rows().map(byte).collect::<Vec<i8>>())?;
                self.scales.as_ref().map_or(Ok(()), |to| to.put(&scales))
            }
        }
    }
}

fn stride(input: usize) -> usize {
    input.next_multiple_of(16)
}

/// Rounds to the nearest bf16, ties to even.
fn bf16(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7FC0;
    }
    let bits = x.to_bits();
    (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

/// Rounds to the nearest f16, ties to even; what is too large becomes infinite.
fn f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | 0x7E00;
    }
    if magnitude >= 65_520.0 {
        return sign | 0x7C00;
    }
    if magnitude < 6.103_515_6e-5 {
        // Below 2^-14 the unit is 2^-24; the sum of 1024 units is the first normal number.
        return sign | (f64::from(magnitude) * f64::from(1u32 << 24)).round_ties_even() as u16;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0xFFF + (bits >> 13 & 1);
    sign | ((rounded >> 13) - ((127 - 15) << 10)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        for (x, want) in [(0.0, 0), (1.0, 0x3F80), (-2.0, 0xC000), (1.003_906_3, 0x3F80)] {
            assert_eq!(bf16(x), want, "{x}");
        }
        let table = [
            (0.0, 0x0000),
            (1.0, 0x3C00),
            (-2.0, 0xC000),
            (65_504.0, 0x7BFF),
            (65_519.0, 0x7BFF),
            (65_520.0, 0x7C00),
            (6.103_515_6e-5, 0x0400),
            (6.1e-5, 0x03FF),
            (5.960_464_5e-8, 0x0001),
            (2.980_232_2e-8, 0x0000),
            (1.000_488_3, 0x3C00),
            (1.001_464_8, 0x3C02),
        ];
        for (x, want) in table {
            assert_eq!(f16(x), want, "{x}");
        }
    }
}
