//! Reductions over slices, in rank order, vectorised for the processor at hand.
//!
//! Element-wise only: the order of additions of one element never depends on its place, on the
//! length or on the vector width, so that every path gives the same bits.

use crate::ReduceOp;

/// Elements that are reduced over all inputs before going on: two of these stay in the L1 cache.
const STRIP: usize = 2048;

/// Reduces `own` with `inputs`, in the order of ranks: `before` of the inputs come before `own`.
///
/// All slices have the same length.
pub(crate) fn reduce_in_order(op: ReduceOp, own: &mut [f32], inputs: &[&[f32]], before: usize) {
    let mut scratch = [0.0; STRIP];
    let mut at = 0;
    while at < own.len() {
        let len = STRIP.min(own.len() - at);
        let strip = &mut own[at..at + len];
        let (prefix, suffix) = inputs.split_at(before);
        match prefix {
            [] => {}
            [first] => fold_before(op, strip, &first[at..at + len]),
            [first, rest @ ..] => {
                let scratch = &mut scratch[..len];
                scratch.copy_from_slice(&first[at..at + len]);
                for input in rest {
                    fold(op, scratch, &input[at..at + len]);
                }
                fold_before(op, strip, scratch);
            }
        }
        for input in suffix {
            fold(op, strip, &input[at..at + len]);
        }
        at += len;
    }
}

/// Returns the greater value; of NaN and a number, NaN, whichever side it is on, so that a rank
/// that diverged is seen by all.
#[inline(always)]
pub(crate) fn max(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

macro_rules! kernel {
    ($name:ident, $wide:ident, |$acc:ident, $x:ident| $sum:expr, $max:expr) => {
        #[inline(always)]
        fn $wide(op: ReduceOp, acc: &mut [f32], input: &[f32]) {
            match op {
                ReduceOp::Sum => {
                    for (a, &$x) in acc.iter_mut().zip(input) {
                        let $acc = *a;
                        *a = $sum;
                    }
                }
                ReduceOp::Max => {
                    for (a, &$x) in acc.iter_mut().zip(input) {
                        let $acc = *a;
                        *a = $max;
                    }
                }
            }
        }

        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "wider vectors where the processor has them")]
        fn $name(op: ReduceOp, acc: &mut [f32], input: &[f32]) {
            #[target_feature(enable = "avx512f,avx512vl")]
            fn avx512(op: ReduceOp, acc: &mut [f32], input: &[f32]) {
                $wide(op, acc, input);
            }
            #[target_feature(enable = "avx2")]
            fn avx2(op: ReduceOp, acc: &mut [f32], input: &[f32]) {
                $wide(op, acc, input);
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                // SAFETY: the processor has the features.
                unsafe { avx512(op, acc, input) }
            } else if is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has the feature.
                unsafe { avx2(op, acc, input) }
            } else {
                $wide(op, acc, input);
            }
        }

        #[cfg(not(target_arch = "x86_64"))]
        fn $name(op: ReduceOp, acc: &mut [f32], input: &[f32]) {
            $wide(op, acc, input);
        }
    };
}

// `acc = acc op input`, and `acc = input op acc` for an input that comes first.
kernel!(fold, fold_plain, |a, x| a + x, max(a, x));
kernel!(fold_before, fold_before_plain, |a, x| x + a, max(x, a));

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_rank_computes_the_bits_of_a_plain_loop_in_rank_order(
            ranks in 1usize..7, len in 0usize..5000, seed in any::<u32>(), max_op in any::<bool>(),
        ) {
            let op = if max_op { ReduceOp::Max } else { ReduceOp::Sum };
            let value = |rank: usize, i: usize| {
                let x = (seed as usize).wrapping_add(rank * 7919 + i * 104_729) % 2001;
                (x as f32 - 1000.0) * 10f32.powi((x % 13) as i32 - 6)
            };
            let data: Vec<Vec<f32>> =
                (0..ranks).map(|r| (0..len).map(|i| value(r, i)).collect()).collect();
            let plain: Vec<u32> = (0..len)
                .map(|i| {
                    let of = |a: f32, b: f32| if max_op { a.max(b) } else { a + b };
                    (1..ranks).fold(data[0][i], |acc, r| of(acc, data[r][i])).to_bits()
                })
                .collect();
            for me in 0..ranks {
                let mut own = data[me].clone();
                let inputs: Vec<&[f32]> =
                    (0..ranks).filter(|&r| r != me).map(|r| data[r].as_slice()).collect();
                reduce_in_order(op, &mut own, &inputs, me);
                let bits: Vec<u32> = own.iter().map(|x| x.to_bits()).collect();
                prop_assert_eq!(&bits, &plain);
            }
        }
    }

    #[test]
    fn the_greatest_of_a_number_and_nan_is_nan_on_either_side() {
        assert!(max(f32::NAN, 1.0).is_nan());
        assert!(max(1.0, f32::NAN).is_nan());
        assert_eq!(max(f32::NEG_INFINITY, -1.0), -1.0);
    }
}
