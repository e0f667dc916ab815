//! Writes a JSON value as YAML, with keys in their order and long texts on one line.

use serde_json::Value;

/// Returns the value as a YAML document without its `---`.
#[must_use]
pub fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    write(&mut out, value, 0);
    out
}

fn write(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(entries) if !entries.is_empty() => {
            for (key, child) in entries {
                indent(out, depth);
                out.push_str(&scalar(key));
                out.push(':');
                nested(out, child, depth + 1);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                indent(out, depth);
                out.push('-');
                match item {
                    Value::Object(entries) if !entries.is_empty() => {
                        // The first key stands beside the dash.
                        let mut inner = String::new();
                        write(&mut inner, item, depth + 1);
                        out.push(' ');
                        out.push_str(inner.trim_start());
                    }
                    _ => nested(out, item, depth + 1),
                }
            }
        }
        other => {
            indent(out, depth);
            out.push_str(&leaf(other));
            out.push('\n');
        }
    }
}

fn nested(out: &mut String, value: &Value, depth: usize) {
    let is_block = match value {
        Value::Object(entries) => !entries.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if is_block {
        out.push('\n');
        write(out, value, depth);
    } else {
        out.push(' ');
        out.push_str(&leaf(value));
        out.push('\n');
    }
}

fn indent(out: &mut String, depth: usize) {
    out.push_str(&"  ".repeat(depth));
}

fn leaf(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        other => other.to_string(),
    }
}

/// Quotes what YAML could read as something else.
fn scalar(text: &str) -> String {
    let plain = text.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '/')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./ ".contains(c))
        && !text.ends_with(' ')
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&text.to_ascii_lowercase().as_str());
    if plain { text.to_owned() } else { Value::String(text.to_owned()).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn yaml_reads_as_people_write_it() {
        let value =
            json!({ "a": [{ "b": 1, "c": ["x", "yes"] }, "plain text"], "d": {}, "e": "1:2" });
        let text =
            "a:\n  - b: 1\n    c:\n      - x\n      - \"yes\"\n  - plain text\nd: {}\ne: \"1:2\"\n";
        assert_eq!(to_yaml(&value), text);
    }
}
