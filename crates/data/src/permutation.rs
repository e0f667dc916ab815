//! A seeded shuffle of `0..n` that is computed, not stored.
//!
//! A balanced Feistel network permutes `0..2^(2k)`, the smallest such range that holds `n`
//! indices; an image outside `0..n` is fed through again until it falls inside (cycle walking,
//! Black and Rogaway 2002), which keeps the map a bijection. The range is less than four times
//! `n`, so that takes fewer than four passes on average. It is a shuffle, not a cipher.

/// A bijection of `0..n` onto itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

// Four rounds make a pseudo-random permutation when the round function is random (Luby and Rackoff
// 1988); two more cover for a round function that is merely a good mixer.
const ROUNDS: usize = 6;

impl Permutation {
    /// Creates the permutation of `0..n` that belongs to `seed` and `stream` (the epoch).
    #[must_use]
    pub fn new(n: u64, seed: u64, stream: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut state = mix(seed ^ mix(stream.wrapping_add(0x9E37_79B9_7F4A_7C15)));
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            mix(state)
        });
        Self { n, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Returns the image of `index`; none when `index >= n`.
    #[must_use]
    pub fn get(&self, index: u64) -> Option<u64> {
        if index >= self.n {
            return None;
        }
        let mut image = self.pass(index);
        // Ends: `index` itself lies on its own cycle and inside the range.
        while image >= self.n {
            image = self.pass(image);
        }
        Some(image)
    }

    fn pass(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_has_no_permutation_and_one_has_one() {
        assert_eq!(Permutation::new(0, 1, 2).get(0), None);
        assert_eq!(Permutation::new(1, 1, 2).get(0), Some(0));
        assert!(Permutation::new(u64::MAX, 1, 2).get(u64::MAX - 1).is_some());
    }

    #[test]
    fn every_order_of_four_turns_up_about_equally_often() {
        // 24 orders, 24,000 seeds: each expected 1,000 times, standard deviation 31.
        let mut seen = std::collections::BTreeMap::new();
        for seed in 0..24_000 {
            let p = Permutation::new(4, seed, 0);
            let order: Vec<_> = (0..4).filter_map(|i| p.get(i)).collect();
            *seen.entry(order).or_insert(0u32) += 1;
        }
        assert_eq!(seen.len(), 24);
        for (order, times) in seen {
            assert!((800..1200).contains(&times), "{order:?} came {times} times");
        }
    }

    proptest! {
        #[test]
        fn it_is_a_bijection(n in 1u64..5_000, seed: u64, stream: u64) {
            let p = Permutation::new(n, seed, stream);
            let mut images: Vec<_> = (0..n).map(|i| p.get(i).unwrap()).collect();
            images.sort_unstable();
            prop_assert!(images.iter().copied().eq(0..n));
            prop_assert_eq!(p.get(n), None);
        }

        #[test]
        fn another_epoch_has_another_order(n in 200u64..2_000, seed: u64, epoch in 0u64..1000) {
            let (a, b) = (Permutation::new(n, seed, epoch), Permutation::new(n, seed, epoch + 1));
            let same = (0..n).filter(|i| a.get(*i) == b.get(*i)).count();
            // Two random orders agree in one place on average; 12 has odds below 1e-9.
            prop_assert!(same < 12, "{} of {} places agree", same, n);
        }
    }
}
