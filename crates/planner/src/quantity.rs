//! Reads amounts as people write them, `300B`, `1.5T`, `64..16384`, and writes them back.

use crate::error::PlanError;

/// Reads a positive amount with an optional suffix: K, M, B or G, T, P, E.
///
/// # Errors
/// [`PlanError::Invalid`] for anything else.
pub fn parse(field: &str, text: &str) -> Result<f64, PlanError> {
    let trimmed = text.trim().replace('_', "");
    let (number, factor) = match trimmed.chars().last() {
        Some('K' | 'k') => (&trimmed[..trimmed.len() - 1], 1e3),
        Some('M' | 'm') => (&trimmed[..trimmed.len() - 1], 1e6),
        Some('B' | 'b' | 'G' | 'g') => (&trimmed[..trimmed.len() - 1], 1e9),
        Some('T' | 't') => (&trimmed[..trimmed.len() - 1], 1e12),
        Some('P' | 'p') => (&trimmed[..trimmed.len() - 1], 1e15),
        Some('E') => (&trimmed[..trimmed.len() - 1], 1e18),
        _ => (trimmed.as_str(), 1.0),
    };
    match number.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 && (value * factor).is_finite() => {
            Ok(value * factor)
        }
        _ => Err(PlanError::invalid(
            field,
            format!("'{text}' is not a positive amount such as 300B, 1.5T or 3e11"),
        )),
    }
}

/// Writes an amount in three digits with a suffix.
#[must_use]
pub fn show(value: f64) -> String {
    for (factor, suffix) in [(1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")] {
        if value.abs() >= factor * 0.9995 {
            let scaled = value / factor;
            return if scaled >= 99.95 {
                format!("{scaled:.0}{suffix}")
            } else if scaled >= 9.995 {
                format!("{scaled:.1}{suffix}")
            } else {
                format!("{scaled:.2}{suffix}")
            };
        }
    }
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}

/// Writes seconds in the unit that suits them.
#[must_use]
pub fn seconds(value: f64) -> String {
    if value >= 172_800.0 {
        format!("{:.1} d", value / 86_400.0)
    } else if value >= 7200.0 {
        format!("{:.1} h", value / 3600.0)
    } else if value >= 120.0 {
        format!("{:.1} min", value / 60.0)
    } else if value >= 1.0 {
        format!("{value:.2} s")
    } else if value >= 1e-3 {
        format!("{:.1} ms", value * 1e3)
    } else {
        format!("{:.0} us", value * 1e6)
    }
}

/// Reads `name=low..high` and returns the doublings from low to high, high included.
///
/// # Errors
/// [`PlanError::Invalid`] for another form, an empty range or more than 40 points.
pub fn sweep(text: &str) -> Result<(String, Vec<u32>), PlanError> {
    let wrong =
        || PlanError::invalid("sweep", format!("'{text}' is not of the form gpus=64..16384"));
    let (name, range) = text.split_once('=').ok_or_else(wrong)?;
    let (low, high) = range.split_once("..").ok_or_else(wrong)?;
    let read = |part: &str| part.trim().trim_start_matches('=').parse::<u32>().map_err(|_| wrong());
    let (low, high) = (read(low)?, read(high)?);
    if low == 0 || high < low || high > 1 << 20 {
        return Err(PlanError::invalid(
            "sweep",
            format!("{low}..{high} must rise and lie from 1 to 1,048,576"),
        ));
    }
    let mut points = Vec::new();
    let mut at = low;
    while at < high {
        points.push(at);
        at *= 2;
    }
    points.push(high);
    Ok((name.trim().to_owned(), points))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_and_shown() {
        for (text, value) in [("300B", 300e9), ("1.5T", 1.5e12), ("3e11", 3e11), ("3_000", 3e3)] {
            assert_eq!(parse("tokens", text).unwrap(), value);
        }
        for text in ["", "B", "-3B", "nan", "inf", "3x", "1e400"] {
            assert!(parse("tokens", text).is_err(), "{text}");
        }
        assert_eq!(show(174.6e9), "175B");
        assert_eq!(show(1.008e12), "1.01T");
        assert_eq!(seconds(1.42), "1.42 s");
    }

    #[test]
    fn a_sweep_doubles_to_its_end() {
        assert_eq!(sweep("gpus=64..512").unwrap(), ("gpus".to_owned(), vec![64, 128, 256, 512]));
        assert_eq!(sweep("gpus=64..300").unwrap().1, [64, 128, 256, 300]);
        for text in ["gpus", "gpus=3", "gpus=9..3", "gpus=0..3", "gpus=a..b"] {
            assert!(sweep(text).is_err(), "{text}");
        }
    }
}
