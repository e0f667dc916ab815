//! The JSON schema of a manifest, from the table: for editors, and for the Kubernetes resources.

use serde_json::{Map, Value, json};

use crate::field::{Field, Kind, MapRule, Presence, TextRule};
use crate::table::{API_VERSION, manifest};

/// Returns the JSON schema (draft 2020-12) of a kind, or nothing when there is no such kind.
///
/// It knows each field by itself; what fields must be together (heads divisible by tensor) only
/// [`crate::manifest::parse`] checks.
#[must_use]
pub fn schema(kind: &str) -> Option<Value> {
    let manifest = manifest(kind)?;
    let mut root = object(manifest.fields);
    let entries = root.as_object_mut()?;
    entries.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
    entries.insert("title".to_owned(), json!(manifest.name));
    entries.insert("description".to_owned(), json!(manifest.doc));
    let properties = entries.get_mut("properties")?.as_object_mut()?;
    properties.insert("apiVersion".to_owned(), json!({ "const": API_VERSION }));
    properties.insert("kind".to_owned(), json!({ "const": manifest.name }));
    properties.insert(
        "status".to_owned(),
        json!({ "description": "Written by the cluster; not read.", "type": "object" }),
    );
    Some(root)
}

fn object(fields: &[Field]) -> Value {
    let mut properties = Map::new();
    for field in fields {
        properties.insert(field.name.to_owned(), one(field));
    }
    let required: Vec<_> = fields
        .iter()
        .filter(|field| matches!(field.presence, Presence::Required))
        .map(|field| field.name)
        .collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn one(field: &Field) -> Value {
    let mut schema = match &field.kind {
        Kind::Object(fields) => object(fields),
        Kind::Integer { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::Number { min, max } => json!({ "type": "number", "minimum": min, "maximum": max }),
        Kind::Bool => json!({ "type": "boolean" }),
        Kind::Text(TextRule::Name { max }) => json!({
            "type": "string", "maxLength": max, "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        }),
        Kind::Text(TextRule::Path) => {
            json!({ "type": "string", "minLength": 1, "maxLength": 4096 })
        }
        Kind::Text(TextRule::ModelName) => {
            json!({ "type": "string", "pattern": "^[A-Za-z0-9._/:-]{1,100}$" })
        }
        Kind::Choice(words) => {
            let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            json!({ "type": "string", "enum": words })
        }
        Kind::Texts { min, max } => {
            json!({ "type": "array", "items": { "type": "string" }, "minItems": min, "maxItems": max })
        }
        Kind::Map(MapRule::Counts) => {
            json!({ "type": "object", "additionalProperties": { "type": "integer", "minimum": 0 } })
        }
        Kind::Map(_) => json!({ "type": "object", "additionalProperties": { "type": "string" } }),
        Kind::Duration { .. } => {
            json!({ "type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$" })
        }
    };
    let Some(entries) = schema.as_object_mut() else {
        return schema;
    };
    if let Some((word, _)) = field.word {
        // The fields bind objects only, the pattern texts only.
        entries.insert("type".to_owned(), json!(["object", "string"]));
        entries.insert("pattern".to_owned(), json!(format!("^{word}$")));
    }
    let unit =
        if field.unit.is_empty() { String::new() } else { format!(" Unit: {}.", field.unit) };
    let otherwise = match field.presence {
        Presence::Optional(otherwise) => format!(" Absent: {otherwise}."),
        _ => String::new(),
    };
    entries.insert("description".to_owned(), json!(format!("{}{unit}{otherwise}", field.doc)));
    if let Presence::Default(text) = field.presence {
        let value = match field.kind {
            Kind::Integer { .. } => json!(text.parse::<i64>().unwrap_or_default()),
            Kind::Number { .. } => json!(text.parse::<f64>().unwrap_or_default()),
            Kind::Bool => json!(text == "true"),
            _ => json!(text),
        };
        entries.insert("default".to_owned(), value);
    }
    schema
}
