//! Filters for NVML's and DCGM's words for "no value", which otherwise look like measurements.
//!
//! NVML answers all ones. DCGM, and drivers that pass its values on, use a range at the top of each
//! type. A number that no GPU can have is no measurement either.

/// From here on, 32-bit values are reasons rather than numbers (`DCGM_INT32_BLANK` and above).
const BLANK_U32: u32 = 0x7fff_fff0;
/// The same for 64 bits (`DCGM_INT64_BLANK` and above).
const BLANK_U64: u64 = 0x7fff_ffff_ffff_fff0;
/// The same for floating point (`DCGM_FP64_BLANK` and above).
const BLANK_F64: f64 = 140_737_488_355_328.0;

/// Returns a value that is one, and is at most `most`.
#[must_use]
pub fn known_u32(value: u32, most: u32) -> Option<u32> {
    (value < BLANK_U32 && value <= most).then_some(value)
}

/// Returns a value that is one.
#[must_use]
pub fn known_u64(value: u64) -> Option<u64> {
    (value < BLANK_U64).then_some(value)
}

/// Returns a value that is one, finite, and from 0 to `most`.
#[must_use]
pub fn known_f64(value: f64, most: f64) -> Option<f64> {
    (value < BLANK_F64 && (0.0..=most).contains(&value)).then_some(value)
}

/// Returns a percentage as a ratio.
#[must_use]
pub fn ratio(percent: f64) -> Option<f64> {
    // Rounding and the edges of the interval may push a little over the whole.
    known_f64(percent, 110.0).map(|percent| (percent / 100.0).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_of_every_kind_are_no_values() {
        for blank in [0x7fff_fff0, 0x7fff_fff1, 0x7fff_fff2, 0x7fff_fff3, u32::MAX, u32::MAX - 1] {
            assert_eq!(known_u32(blank, u32::MAX), None, "{blank:#x}");
        }
        for blank in [0x7fff_ffff_ffff_fff0, 0x7fff_ffff_ffff_fff3, u64::MAX] {
            assert_eq!(known_u64(blank), None, "{blank:#x}");
        }
        for blank in [140_737_488_355_328.0, 140_737_488_355_331.0, f64::NAN, f64::INFINITY, -1.0] {
            assert_eq!(known_f64(blank, f64::MAX), None, "{blank}");
        }
    }

    #[test]
    fn numbers_are_kept_within_what_can_be() {
        assert_eq!(known_u32(83, 200), Some(83));
        assert_eq!(known_u32(255, 200), None, "no GPU has 255 degrees");
        assert_eq!(known_u64(0), Some(0));
        assert_eq!(ratio(37.5), Some(0.375));
        assert_eq!(ratio(100.4), Some(1.0));
        assert_eq!(ratio(4000.0), None);
    }
}
