//! Rounding f32 to bf16 and f16, to the nearest and of two to the even one, and back.
#![allow(unsafe_code, reason = "the dispatch to vector instructions")]

use crate::cpu::simd::{Simd, dispatched};

/// Returns the bits of the nearest bf16.
#[inline(always)]
pub(in crate::cpu) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    if bits & 0x7FFF_FFFF > 0x7F80_0000 {
        // A NaN stays one: rounding could carry it into infinity.
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

/// Returns the value of a bf16.
#[inline(always)]
pub(in crate::cpu) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Returns the bits of the nearest f16; beyond the greatest, infinity.
pub(in crate::cpu) fn f16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let magnitude = bits & 0x7FFF_FFFF;
    if magnitude > 0x7F80_0000 {
        return sign | 0x7E00;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7C00;
    }
    if magnitude < 0x3880_0000 {
        // Below 2^-14 the steps are 2^-24: adding 0.5 leaves their number in the low bits.
        let steps = f32::from_bits(magnitude) + 0.5;
        return sign | (steps.to_bits() - 0.5f32.to_bits()) as u16;
    }
    // The exponent's bias goes from 127 to 15; the carry of rounding may reach the exponent, and
    // from the greatest value makes infinity.
    let moved = magnitude - (112 << 23);
    sign | (moved.wrapping_add(0xFFF + (moved >> 13 & 1)) >> 13) as u16
}

/// Returns the value of an f16.
pub(in crate::cpu) fn f16_value(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let (exponent, mantissa) = (u32::from(bits >> 10 & 0x1F), u32::from(bits & 0x3FF));
    let magnitude = match exponent {
        0 => (mantissa as f32 * (1.0 / 16_777_216.0)).to_bits(),
        31 => 0x7F80_0000 | mantissa << 13,
        _ => (exponent + 112) << 23 | mantissa << 13,
    };
    f32::from_bits(sign | magnitude)
}

#[inline(always)]
fn round_body<S: Simd>(_: S, from: &[f32], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16_value(bf16_bits(*from));
    }
}

dispatched! {
    /// Rounds values to bf16, and stores them as f32.
    pub(in crate::cpu) fn round_to_bf16(from: &[f32], to: &mut [f32]) = round_body;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_and_what_lies_between_goes_to_the_nearest_even_one() {
        for bits in 0..=u16::MAX {
            let x = f16_value(bits);
            if x.is_nan() {
                assert!(f16_value(f16_bits(x)).is_nan());
                continue;
            }
            assert_eq!(f16_bits(x), bits, "{x}");
            let next = f16_value(bits.wrapping_add(1));
            if bits & 0x7FFF < 0x7BFF {
                let middle = ((f64::from(x) + f64::from(next)) / 2.0) as f32;
                let even = if bits & 1 == 0 { bits } else { bits + 1 };
                assert_eq!(f16_bits(middle), even, "between {x} and {next}");
            }
        }
        assert_eq!(f16_bits(65519.0), 0x7BFF);
        assert_eq!(f16_bits(65520.0), 0x7C00);
        assert_eq!(f16_bits(-1e9), 0xFC00);
        assert_eq!(f16_bits(1e-9), 0);
    }

    #[test]
    fn every_bf16_survives_and_what_lies_between_goes_to_the_nearest_even_one() {
        for bits in 0..=u16::MAX {
            let x = bf16_value(bits);
            if x.is_nan() {
                assert!(bf16_value(bf16_bits(x)).is_nan());
                continue;
            }
            assert_eq!(bf16_bits(x), bits, "{x}");
            if bits & 0x7FFF < 0x7F7F {
                let middle = f32::from_bits(u32::from(bits) << 16 | 0x8000);
                let even = if bits & 1 == 0 { bits } else { bits + 1 };
                assert_eq!(bf16_bits(middle), even, "after {x}");
                assert_eq!(bf16_bits(f32::from_bits(middle.to_bits() + 1)), bits + 1);
                assert_eq!(bf16_bits(f32::from_bits(middle.to_bits() - 1)), bits);
            }
        }
    }
}
