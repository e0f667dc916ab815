//! What a field of a manifest is: the rows of the one table that drives parsing, `explain` and the
//! JSON schema.

/// One field of a manifest.
#[derive(Debug)]
pub struct Field {
    /// The name, as written in manifests.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// Whether it must be there, and what holds when it is not.
    pub presence: Presence,
    /// The unit of a number; empty when it has none.
    pub unit: &'static str,
    /// What it means and does, in whole sentences.
    pub doc: &'static str,
    /// The word that an object may be replaced by, and what the word means.
    pub word: Option<(&'static str, &'static str)>,
}

impl Field {
    /// Lets `word` stand in for the object.
    pub(crate) const fn or_word(self, word: &'static str, doc: &'static str) -> Self {
        Self { word: Some((word, doc)), ..self }
    }
}

/// What a field holds.
#[derive(Debug)]
pub enum Kind {
    /// Further fields.
    Object(&'static [Field]),
    /// A whole number.
    Integer {
        /// The least value.
        min: i64,
        /// The greatest value.
        max: i64,
    },
    /// A number.
    Number {
        /// The least value.
        min: f64,
        /// The greatest value.
        max: f64,
    },
    /// `true` or `false`.
    Bool,
    /// Text that follows a rule.
    Text(TextRule),
    /// One of these words; each with its meaning.
    Choice(&'static [(&'static str, &'static str)]),
    /// A list of texts.
    Texts {
        /// The least number of elements.
        min: usize,
        /// The greatest number of elements.
        max: usize,
    },
    /// Texts by name.
    Map(MapRule),
    /// A time with its unit, as in `500ms`, `30s`, `1m30s`, `2h`.
    Duration {
        /// The least time, in milliseconds.
        min_ms: u64,
        /// The greatest time, in milliseconds.
        max_ms: u64,
    },
}

/// What a text must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextRule {
    /// A DNS label of at most so many characters.
    Name {
        /// The greatest length.
        max: usize,
    },
    /// A path: 1 to 4096 bytes without NUL.
    Path,
    /// 1 to 100 characters of letters, digits, `.`, `_`, `-`, `/` and `:`.
    ModelName,
}

/// What the keys and values of a map must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapRule {
    /// Environment variables that Drumline does not set itself.
    Environment,
    /// Labels: names and short texts.
    Labels,
    /// Annotations: names and texts of any length that a manifest may have.
    Annotations,
    /// Numbers of devices by class.
    Counts,
}

/// Whether a field must be there.
#[derive(Debug)]
pub enum Presence {
    /// It must.
    Required,
    /// When it is absent, this holds, written as in a manifest.
    Default(&'static str),
    /// When it is absent, something else decides, as told here.
    Optional(&'static str),
}

/// One kind of manifest.
#[derive(Debug)]
pub struct Manifest {
    /// The `kind`.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// Its fields, from the root.
    pub fields: &'static [Field],
}

impl Kind {
    /// Returns the type and its bounds in words.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Object(_) => "object".to_owned(),
            Self::Integer { min, max } => format!("whole number, {min} to {max}"),
            Self::Number { min, max } => format!("number, {} to {}", number(*min), number(*max)),
            Self::Bool => "true or false".to_owned(),
            Self::Text(TextRule::Name { max }) => {
                format!("name, 1 to {max} characters of a-z, 0-9 and '-'")
            }
            Self::Text(TextRule::Path) => "path".to_owned(),
            Self::Text(TextRule::ModelName) => {
                "1 to 100 characters of letters, digits and . _ - / :".to_owned()
            }
            Self::Choice(words) => {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                format!("one of {}", words.join(", "))
            }
            Self::Texts { min, max } => format!("list of {min} to {max} texts"),
            Self::Map(_) => "map of texts".to_owned(),
            Self::Duration { min_ms, max_ms } => {
                format!("duration, {} to {}", duration(*min_ms), duration(*max_ms))
            }
        }
    }
}

/// Writes a number as a person would, without a tail of zeros.
pub(crate) fn number(value: f64) -> String {
    if value != 0.0 && (value.abs() < 1e-3 || value.abs() >= 1e7) {
        format!("{value:e}")
    } else {
        format!("{value}")
    }
}

/// Writes a duration so that it reads back as the same number of milliseconds.
#[must_use]
pub fn duration(ms: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(3_600_000, "h"), (60_000, "m"), (1000, "s")];
    match UNITS.iter().find(|(size, _)| ms >= *size && ms.is_multiple_of(*size)) {
        Some((size, unit)) => format!("{}{unit}", ms / size),
        None => format!("{ms}ms"),
    }
}

/// Reads a duration such as `500ms`, `30s`, `1m30s` or `2h`; units go from great to small.
#[must_use]
pub fn parse_duration(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
    let mut rest = text;
    let mut total = 0u64;
    let mut least = u64::MAX;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let amount: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (_, size) = UNITS.iter().find(|(unit, _)| *unit == &rest[..letters])?;
        if *size >= least {
            return None;
        }
        least = *size;
        total = total.checked_add(amount.checked_mul(*size)?)?;
        rest = &rest[letters..];
    }
    (least != u64::MAX).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_carry_their_unit() {
        for (text, ms) in [
            ("500ms", Some(500)),
            ("30s", Some(30_000)),
            ("1m30s", Some(90_000)),
            ("2h", Some(7_200_000)),
            ("0s", Some(0)),
            ("30", None),
            ("", None),
            ("s", None),
            ("-1s", None),
            ("1s1s", None),
            ("1s1m", None),
            ("1.5s", None),
            ("3d", None),
            ("99999999999999999999s", None),
            ("18446744073709551615h", None),
        ] {
            assert_eq!(parse_duration(text), ms, "{text}");
        }
        for ms in [0, 1, 999, 1000, 61_000, 3_600_000, 90_000_000] {
            assert_eq!(parse_duration(&duration(ms)), Some(ms));
        }
    }
}
