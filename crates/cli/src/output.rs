//! Where output goes: data to standard output, as a table, JSON or YAML; everything else to
//! standard error. A reader that goes away ends the command quietly.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde_json::Value;

use crate::failure::Failure;

/// The form of a command's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
}

/// Writes text to standard output.
///
/// # Errors
/// When standard output cannot take it; a reader that went away is a failure with exit code 0.
pub fn data(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())
}

/// Writes bytes to standard output, at once.
///
/// # Errors
/// As [`data`].
pub fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Writes a line to standard error. When nobody reads it, nothing is lost.
pub fn note(line: &str) {
    let mut err = io::stderr().lock();
    let _ = writeln!(err, "{line}");
}

/// Writes a value in the wanted form; `table` makes the form for people.
///
/// # Errors
/// As [`data`].
pub fn value(format: Format, value: &Value, table: impl FnOnce() -> String) -> Result<(), Failure> {
    match format {
        Format::Table => data(&table()),
        Format::Json => data(&format!("{value:#}\n")),
        Format::Yaml => data(&yaml(value)),
    }
}

/// Returns whether standard error shows colours: it is a terminal and nobody objects.
#[must_use]
pub fn stderr_is_coloured() -> bool {
    io::stderr().is_terminal() && colours_wanted()
}

/// Returns whether standard output shows colours.
#[must_use]
pub fn stdout_is_coloured() -> bool {
    io::stdout().is_terminal() && colours_wanted()
}

fn colours_wanted() -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Aligns rows under a header; numbers in a column are not treated differently. Empty cells show
/// as `-`, so that every line has the same number of words per column.
#[must_use]
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |text: &str| -> String {
        let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if line.trim().is_empty() { "-".to_owned() } else { line }
    };
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|text| cell(text)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|text| text.chars().count());
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&widths) {
            let pad = width.saturating_sub(cell.chars().count()) + 2;
            line.push_str(cell);
            line.push_str(&" ".repeat(pad));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    line(&mut header.iter().copied());
    for row in &rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// Writes a JSON value as YAML.
#[must_use]
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => block(value, 0, &mut text),
        Value::Array(list) if !list.is_empty() => block(value, 0, &mut text),
        other => text = format!("{}\n", scalar(other)),
    }
    text
}

fn block(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    let nested = |value: &Value| match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => !list.is_empty(),
        _ => false,
    };
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let key = scalar(&Value::String(key.clone()));
                if nested(value) {
                    text.push_str(&format!("{indent}{key}:\n"));
                    block(value, depth + 1, text);
                } else {
                    text.push_str(&format!("{indent}{key}: {}\n", scalar(value)));
                }
            }
        }
        Value::Array(list) => {
            for value in list {
                if nested(value) {
                    // The first line of the inner block stands behind the dash.
                    let mut inner = String::new();
                    block(value, depth + 1, &mut inner);
                    text.push_str(&format!("{indent}- {}", inner.trim_start()));
                } else {
                    text.push_str(&format!("{indent}- {}\n", scalar(value)));
                }
            }
        }
        other => text.push_str(&format!("{indent}{}\n", scalar(other))),
    }
}

/// A scalar; text is quoted unless it can be nothing else. A JSON string is a YAML one.
fn scalar(value: &Value) -> String {
    let Value::String(text) = value else { return value.to_string() };
    let safe = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    let word = text.chars().all(safe) && text.starts_with(|c: char| c.is_ascii_alphabetic());
    let reserved = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    if word && !reserved.contains(&text.to_ascii_lowercase().as_str()) {
        text.clone()
    } else {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_is_aligned_and_has_no_control_characters() {
        let rows = vec![
            vec!["a".to_owned(), String::new()],
            vec!["long\x1b[31m".to_owned(), "x".to_owned()],
        ];
        assert_eq!(table(&["ID", "B"], &rows), "ID         B\na          -\nlong [31m  x\n");
    }

    #[test]
    fn yaml_quotes_what_would_be_read_as_something_else() {
        let value =
            json!({"a": "no", "b": [{"c": "x: y", "d": 1}, []], "e": {}, "f": "plain", "g": null});
        assert_eq!(
            yaml(&value),
            "a: \"no\"\nb:\n  - c: \"x: y\"\n    d: 1\n  - []\ne: {}\nf: plain\ng: null\n"
        );
        assert_eq!(yaml(&json!([])), "[]\n");
    }
}
