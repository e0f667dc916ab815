//! The values that a workload file may hold: each says what it expects when it gets another.

use std::fmt;

use drumline_spec::field::parse_duration;
use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// The longest duration of a workload file: ten years, in milliseconds.
const DURATION_MAX: u64 = 3650 * 86_400_000;
/// The greatest count and rate of a workload file.
const COUNT_MAX: u32 = 100_000_000;

/// A duration, in milliseconds; written as `500ms`, `30s`, `1h30m` or `30d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Duration(pub u64);

/// A duration, or the best one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// This one.
    Fixed(Duration),
    /// The one that loses least.
    Auto,
}

/// A whole number of at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(pub u32);

/// A number of at least 0.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct Rate(pub f64);

/// A number from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct Part(pub f64);

/// Reads a duration; days, unlike in manifests, are allowed.
pub(crate) fn duration(text: &str) -> Option<u64> {
    let (days, rest) = match text.split_once('d') {
        Some((days, rest)) => (days.parse::<u64>().ok()?, rest),
        None => (0, text),
    };
    let rest = if rest.is_empty() && rest.len() < text.len() { 0 } else { parse_duration(rest)? };
    let total = days.checked_mul(86_400_000)?.checked_add(rest)?;
    (total <= DURATION_MAX).then_some(total)
}

struct DurationVisitor;

impl Visitor<'_> for DurationVisitor {
    type Value = Duration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration with its unit, such as \"30s\", \"1h30m\" or \"30d\"")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Duration, E> {
        let wrong = || E::invalid_value(serde::de::Unexpected::Str(text), &self);
        duration(text).map(Duration).ok_or_else(wrong)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(DurationVisitor)
    }
}

impl<'de> Deserialize<'de> for Every {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct EveryVisitor;
        impl Visitor<'_> for EveryVisitor {
            type Value = Every;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\", or a duration such as \"30m\"")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Every, E> {
                let wrong = || E::invalid_value(serde::de::Unexpected::Str(text), &self);
                match text {
                    "auto" => Ok(Every::Auto),
                    other => match duration(other) {
                        Some(ms) if ms > 0 => Ok(Every::Fixed(Duration(ms))),
                        _ => Err(wrong()),
                    },
                }
            }
        }
        from.deserialize_str(EveryVisitor)
    }
}

struct NumberVisitor {
    what: &'static str,
    least: f64,
    most: f64,
}

impl Visitor<'_> for NumberVisitor {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {} to {}", self.what, self.least, self.most)
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<f64, E> {
        if (self.least..=self.most).contains(&number) {
            Ok(number)
        } else {
            Err(E::invalid_value(serde::de::Unexpected::Float(number), &self))
        }
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<f64, E> {
        if (self.least..=self.most).contains(&(number as f64)) {
            Ok(number as f64)
        } else {
            Err(E::invalid_value(serde::de::Unexpected::Signed(number), &self))
        }
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let most = f64::from(COUNT_MAX);
        let visitor = NumberVisitor { what: "a whole number", least: 1.0, most };
        from.deserialize_i64(visitor).map(|number| Self(number as u32))
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let most = f64::from(COUNT_MAX);
        let visitor = NumberVisitor { what: "a number", least: 0.0, most };
        from.deserialize_f64(visitor).map(Self)
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let visitor = NumberVisitor { what: "a number", least: 0.0, most: 1.0 };
        from.deserialize_f64(visitor).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_may_have_days() {
        for (text, ms) in [
            ("30d", Some(30 * 86_400_000)),
            ("1d12h", Some(36 * 3_600_000)),
            ("0s", Some(0)),
            ("", None),
            ("d", None),
            ("12", None),
            ("1h1d", None),
            ("-1d", None),
            ("99999d", None),
        ] {
            assert_eq!(duration(text), ms, "{text}");
        }
    }
}
