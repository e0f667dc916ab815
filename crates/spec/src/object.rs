//! Manifests as the objects that they are: what is handed on to an API that has its own checks.

use serde_json::{Map, Number};

use crate::document::{self, Node, Value};

/// Returns every document of a text as a JSON value, in their order.
///
/// It checks nothing: [`crate::manifest::parse_all`] comes first, and after it a scalar without
/// quotes is a number or a truth value exactly where it looks like one.
#[must_use]
pub fn objects(text: &str) -> Vec<serde_json::Value> {
    document::read(text).0.iter().map(|(_, root)| json(root)).collect()
}

fn json(node: &Node) -> serde_json::Value {
    match &node.value {
        Value::Null => serde_json::Value::Null,
        Value::Quoted(text) => serde_json::Value::String(text.clone()),
        Value::Plain(text) => plain(text),
        Value::List(items) => items.iter().map(json).collect(),
        Value::Map(entries) => {
            let entries = entries.iter().map(|entry| (entry.key.clone(), json(&entry.value)));
            serde_json::Value::Object(entries.collect::<Map<_, _>>())
        }
    }
}

fn plain(text: &str) -> serde_json::Value {
    match text {
        "true" | "True" | "TRUE" => return true.into(),
        "false" | "False" | "FALSE" => return false.into(),
        _ => {}
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.bytes().all(|b| b.is_ascii_digit())
        && let Ok(number) = text.parse::<i64>()
    {
        return number.into();
    }
    let is_number = text.bytes().any(|b| b.is_ascii_digit())
        && text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
    match text.parse::<f64>().ok().and_then(Number::from_f64) {
        Some(number) if is_number => number.into(),
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn scalars_are_what_yaml_says_they_are() {
        let text = "a: 12\nb: '12'\nc: 1.5e-3\nd: true\ne: 30s\nf: [x, -1, ~]\n---\n{g: 1.10.1}\n";
        assert_eq!(
            objects(text),
            [
                json!({ "a": 12, "b": "12", "c": 0.0015, "d": true, "e": "30s", "f": ["x", -1, null] }),
                json!({ "g": "1.10.1" }),
            ]
        );
    }
}
