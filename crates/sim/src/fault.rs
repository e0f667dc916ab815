//! Where a file is wrong, and what was expected there.

use std::ops::Range;

/// A file that cannot be used: its name, the place, and what was expected there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}:{column}: {what}")]
pub struct FileFault {
    /// The file, as the caller names it.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The character within the line, from 1.
    pub column: usize,
    /// What was expected, and what is there.
    pub what: String,
}

impl FileFault {
    /// Returns a fault at a place that is known as line and column, both from 1.
    pub fn at(file: &str, line: usize, column: usize, what: impl Into<String>) -> Self {
        let (line, column) = (line.max(1), column.max(1));
        Self { file: file.to_owned(), line, column, what: what.into() }
    }

    /// Returns a fault at a byte range of the text.
    pub fn span(file: &str, text: &str, span: Range<usize>, what: impl Into<String>) -> Self {
        let before = text.get(..span.start.min(text.len())).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Self::at(file, line, column, what)
    }

    /// Returns the fault that a TOML reader found.
    #[must_use]
    pub fn toml(file: &str, text: &str, error: &toml::de::Error) -> Self {
        let what = error.message().trim_end();
        Self::span(file, text, error.span().unwrap_or(0..0), what)
    }

    /// Returns the fault that a JSON reader found; `line` is added to its own.
    #[must_use]
    pub fn json(file: &str, line: usize, error: &serde_json::Error) -> Self {
        let text = error.to_string();
        // The reader repeats the place at the end of its sentence.
        let what = text.split(" at line ").next().unwrap_or(&text);
        Self::at(file, line + error.line().max(1), error.column(), what)
    }
}
