//! One mistake in a manifest: where it is, what it is, and the nearest that would be right.

use std::fmt;

use serde::Serialize;

/// A place in a file, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// The column, in characters.
    pub column: usize,
}

impl Place {
    /// The beginning of a file.
    pub const START: Self = Self { line: 1, column: 1 };
}

/// One mistake in a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mistake {
    /// The file's name, as it was given to [`crate::manifest::parse`].
    pub source: String,
    /// The document within the file, from 1.
    pub document: usize,
    /// The field at fault, as in `spec.model.heads`; empty when the fault is no field's.
    pub path: String,
    /// Where the fault is.
    #[serde(flatten)]
    pub place: Place,
    /// What is wrong, with the numbers.
    pub message: String,
    /// The nearest valid name, when one is near.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nearest: Option<String>,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { line, column } = self.place;
        write!(f, "{}:{line}:{column}: ", self.source)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        match &self.nearest {
            Some(nearest) => write!(f, "; did you mean `{nearest}`?"),
            None => Ok(()),
        }
    }
}

/// Returns the candidate that looks most like `wrong`, if one is near enough to be meant.
pub(crate) fn nearest<'a>(
    wrong: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // Case and separators are the commonest slips: `kv_heads`, `KVHeads`.
    let fold = |text: &str| -> String {
        text.chars()
            .filter(|c| !matches!(c, '_' | '-' | ' '))
            .flat_map(char::to_lowercase)
            .take(64)
            .collect()
    };
    let folded = fold(wrong);
    candidates
        .into_iter()
        .map(|candidate| {
            (strsim::normalized_damerau_levenshtein(&folded, &fold(candidate)), candidate)
        })
        .filter(|(likeness, _)| *likeness >= 0.55)
        .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(a.1)))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_case_order_and_one_letter_are_recognised() {
        let names = ["layers", "hidden", "heads", "kvHeads"];
        for (wrong, right) in [
            ("kv_heads", Some("kvHeads")),
            ("haeds", Some("heads")),
            ("Layer", Some("layers")),
            ("hiden", Some("hidden")),
            ("temperature", None),
        ] {
            assert_eq!(nearest(wrong, names), right, "{wrong}");
        }
    }
}
