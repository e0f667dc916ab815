//! From the JSON schema of a manifest to what Kubernetes calls a structural schema.
//!
//! Differences: no `const`, no word in place of an object (the object form is kept), no `additionalProperties: false`
//! (the API server prunes or, under strict validation, refuses what is unknown), and an object that
//! may be absent gets the default `{}`, so that the defaults inside it are filled in.

use serde_json::{Map, Value, json};

/// The longest text of a list or a map, in characters: what the parser allows.
const TEXT_MAX: u64 = 128 << 10;
/// How the table says that a field must be given where its object is, although the object may be
/// absent. Such an object gets no default: being there means something.
const REQUIRED_HERE: &str = " Absent: required.";
/// The greatest whole number that a float tells from its neighbours.
const EXACT_MAX: i64 = 1 << 53;
/// Most entries of a map; the API server needs a bound to weigh the rules on it.
const ENTRIES_MAX: u64 = 256;

/// Returns the structural form of one schema.
#[must_use]
pub fn from_json_schema(schema: &Value) -> Value {
    // A word may stand in for the object: the one thing that a structural schema cannot say.
    let or_word = schema["type"].is_array();
    let Some(entries) = schema.as_object() else {
        return json!({});
    };
    let mut out = Map::new();
    for (key, value) in entries {
        match key.as_str() {
            "$schema" | "title" | "required" => {}
            "pattern" if or_word => {}
            "type" if or_word => {
                out.insert(key.clone(), json!("object"));
            }
            "const" => {
                out.insert("type".to_owned(), json!("string"));
                out.insert("enum".to_owned(), json!([value]));
            }
            "properties" => {
                let fields = value.as_object().into_iter().flatten();
                let fields = fields.map(|(name, field)| (name.clone(), from_json_schema(field)));
                out.insert(key.clone(), Value::Object(fields.collect()));
            }
            "items" => {
                out.insert(key.clone(), bounded(from_json_schema(value)));
            }
            "additionalProperties" if value.is_object() => {
                out.insert(key.clone(), bounded(from_json_schema(value)));
                out.insert("maxProperties".to_owned(), json!(ENTRIES_MAX));
            }
            "additionalProperties" => {}
            // The API server reads bounds as floats; `format: int64` says the same.
            "maximum" if value.as_i64().is_some_and(|most| most > EXACT_MAX) => {}
            _ => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    if out.get("type") == Some(&json!("integer")) {
        out.insert("format".to_owned(), json!("int64"));
    }
    require(&mut out, &schema["required"]);
    Value::Object(out)
}

fn bounded(mut schema: Value) -> Value {
    if schema["type"] == "string" && schema.get("maxLength").is_none() {
        schema["maxLength"] = json!(TEXT_MAX);
    }
    schema
}

/// Lists what must be given, and gives the objects that may be absent an empty default.
fn require(out: &mut Map<String, Value>, required: &Value) {
    let mut required: Vec<String> = required
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect();
    if let Some(Value::Object(fields)) = out.get("properties") {
        let in_company = fields.iter().filter(|(_, field)| {
            field["description"].as_str().is_some_and(|text| text.ends_with(REQUIRED_HERE))
        });
        required.extend(in_company.map(|(name, _)| name.clone()));
    }
    if let Some(Value::Object(fields)) = out.get_mut("properties") {
        for (name, field) in fields.iter_mut() {
            let may_be_empty = field["type"] == "object"
                && field["properties"].is_object()
                && field["required"].is_null();
            if may_be_empty && !required.contains(name) && field["default"].is_null() {
                field["default"] = json!({});
            }
        }
    }
    if !required.is_empty() {
        out.insert("required".to_owned(), json!(required));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_that_may_be_absent_gets_an_empty_default() {
        let schema = json!({ "type": "object", "additionalProperties": false,
        "required": ["b"],
        "properties": {
            "a": { "type": "object", "required": [],
                   "properties": { "n": { "type": "integer", "default": 1 } } },
            "b": { "const": "x" },
            "d": { "type": "object", "required": [], "properties": {
                "n": { "type": "integer", "description": "N. Absent: required." } } },
            "c": { "type": ["object", "string"], "pattern": "^auto$", "properties": {},
                   "required": [], "description": "c" },
        }});
        let out = from_json_schema(&schema);
        assert_eq!(out["properties"]["a"]["default"], json!({}));
        assert_eq!(out["properties"]["a"]["properties"]["n"]["format"], "int64");
        assert_eq!(out["properties"]["b"], json!({ "type": "string", "enum": ["x"] }));
        assert_eq!(out["properties"]["c"]["type"], "object");
        assert!(out["properties"]["c"].get("pattern").is_none());
        assert_eq!(out["required"], json!(["b"]));
        assert_eq!(out["properties"]["d"]["required"], json!(["n"]));
        assert!(out["properties"]["d"].get("default").is_none());
        assert!(out.get("additionalProperties").is_none());
    }
}
