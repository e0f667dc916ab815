//! Exponential decay in whole numbers, so that every machine computes the same bits.

/// The unit of a factor: 1 is `1 << 32`.
const ONE: u64 = 1 << 32;

/// Returns 2 to the power of `-elapsed_ms / half_life_ms`, in units of 2^-32. A half-life of 0
/// forgets at once.
#[must_use]
pub fn factor(elapsed_ms: u64, half_life_ms: u64) -> u64 {
    if elapsed_ms == 0 {
        return ONE;
    }
    if half_life_ms == 0 {
        return 0;
    }
    let halvings = elapsed_ms / half_life_ms;
    if halvings >= 32 {
        return 0;
    }
    // The rest as a binary fraction of a half-life: bit i stands for a factor of 2^(-1/2^i).
    let rest = u128::from(elapsed_ms % half_life_ms);
    let fraction = ((rest << 16) / u128::from(half_life_ms)) as u32;
    let mut factor = u128::from(ONE >> halvings);
    let mut root = u128::from(ONE / 2);
    for bit in (0..16).rev() {
        // The square root of a number in units of 2^-32 is that of it times 2^32.
        root = (root << 32).isqrt();
        if fraction >> bit & 1 == 1 {
            factor = (factor * root) >> 32;
        }
    }
    factor as u64
}

/// Returns the mean of a use that was `mean` and has been `level` for `elapsed_ms` since.
#[must_use]
pub fn towards(mean: u64, level: u64, elapsed_ms: u64, half_life_ms: u64) -> u64 {
    let kept = u128::from(factor(elapsed_ms, half_life_ms));
    let new = u128::from(ONE) - kept;
    ((u128::from(mean) * kept + u128::from(level) * new) >> 32) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_half_life_halves() {
        assert_eq!(factor(0, 10), ONE);
        assert_eq!(factor(10, 10), ONE / 2);
        assert_eq!(factor(30, 10), ONE / 8);
        assert_eq!(factor(400, 10), 0);
        assert_eq!(factor(1, 0), 0);
        for elapsed in 0..130 {
            let found = factor(elapsed, 10) as f64 / ONE as f64;
            let wanted = 0.5f64.powf(elapsed as f64 / 10.0);
            assert!((found / wanted - 1.0).abs() < 1e-4, "{found} after {elapsed}");
        }
    }

    #[test]
    fn it_never_grows_with_time() {
        let mut last = ONE;
        for elapsed in 0..5_000 {
            let now = factor(elapsed, 777);
            assert!(now <= last, "at {elapsed}");
            last = now;
        }
    }

    #[test]
    fn a_constant_use_is_its_own_mean_in_the_end() {
        assert_eq!(towards(0, 8_000, 1_000_000, 1_000), 8_000);
        assert_eq!(towards(8_000, 0, 1_000, 1_000), 4_000);
        assert_eq!(towards(0, 8_000, 1_000, 1_000), 4_000);
        assert_eq!(towards(8_000, 8_000, 1_000, 1_000), 8_000);
    }
}
