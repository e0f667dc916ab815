//! `drumline explain`: what a kind or a field is, from the table.

use crate::field::{Field, Kind, Presence};
use crate::mistake::nearest;
use crate::table::{MANIFESTS, each_field, manifest};

/// Nothing in the manifests is called that.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("nothing is called {asked:?}{}", .nearest.as_ref().map_or_else(String::new, |near| format!("; did you mean `{near}`?")))]
pub struct Unknown {
    /// What was asked for.
    pub asked: String,
    /// The nearest that exists.
    pub nearest: Option<String>,
}

/// Explains a kind (`TrainingJob`) or a field (`TrainingJob.model.heads`; a leading `spec` may be
/// left out). An empty question lists the kinds.
///
/// # Errors
/// [`Unknown`], with the nearest name.
pub fn explain(asked: &str) -> Result<String, Unknown> {
    let asked = asked.trim().trim_end_matches('.');
    if asked.is_empty() {
        let mut text = "The kinds of manifests:\n".to_owned();
        for manifest in MANIFESTS {
            text.push_str(&format!("\n{}\n", manifest.name));
            text.push_str(&wrapped(manifest.doc, "  "));
        }
        text.push_str("\n`drumline explain KIND` shows a kind's fields, `drumline explain KIND.FIELD` one of them.\n");
        return Ok(text);
    }
    let (kind, path) = asked.split_once('.').unwrap_or((asked, ""));
    let Some(manifest) = manifest(kind) else {
        let near = nearest(kind, MANIFESTS.iter().map(|manifest| manifest.name));
        return Err(Unknown { asked: asked.to_owned(), nearest: near.map(str::to_owned) });
    };
    if path.is_empty() {
        let mut text = format!("{kind}\n{}\nFields:\n", wrapped(manifest.doc, "  "));
        list(manifest.fields, 1, 3, &mut text);
        return Ok(text);
    }
    let found =
        find(manifest.fields, path).or_else(|| find(manifest.fields, &format!("spec.{path}")));
    let Some((full, field)) = found else {
        let mut paths = Vec::new();
        each_field(manifest, &mut |path, _| paths.push(path.to_owned()));
        let short = |path: &'_ str| path.strip_prefix("spec.").unwrap_or(path).to_owned();
        let shorts: Vec<_> = paths.iter().map(|path| short(path)).collect();
        let leaf = path.rsplit('.').next().unwrap_or(path);
        // First a path that ends in the same word, then one that looks alike.
        let near = shorts
            .iter()
            .find(|short| short.rsplit('.').next() == Some(leaf))
            .map(String::as_str)
            .or_else(|| nearest(path, shorts.iter().map(String::as_str)));
        let near = near.map(|near| format!("{kind}.{near}"));
        return Err(Unknown { asked: asked.to_owned(), nearest: near });
    };
    let mut text = format!("{kind}.{full}\n{}\n", wrapped(field.doc, "  "));
    text.push_str(&format!("  type:    {}\n", field.kind.describe()));
    if !field.unit.is_empty() {
        text.push_str(&format!("  unit:    {}\n", field.unit));
    }
    text.push_str(&format!("  absent:  {}\n", absent(field)));
    if let Some((word, doc)) = field.word {
        text.push_str(&format!("\nOr the word {word}:\n{}", wrapped(doc, "  ")));
    }
    match &field.kind {
        Kind::Choice(words) => {
            text.push('\n');
            for (word, doc) in *words {
                text.push_str(&format!("  {word:<8} {doc}\n"));
            }
        }
        Kind::Object(fields) => {
            text.push_str("\nFields:\n");
            list(fields, 1, 2, &mut text);
        }
        _ => {}
    }
    Ok(text)
}

/// Says what holds when a field is absent.
pub(crate) fn absent(field: &Field) -> String {
    match field.presence {
        Presence::Required => "not allowed".to_owned(),
        Presence::Default(value) | Presence::Optional(value) => value.to_owned(),
    }
}

fn find(fields: &'static [Field], path: &str) -> Option<(String, &'static Field)> {
    let (first, rest) = path.split_once('.').unwrap_or((path, ""));
    let field = fields.iter().find(|field| field.name == first)?;
    if rest.is_empty() {
        return Some((first.to_owned(), field));
    }
    match field.kind {
        Kind::Object(fields) => {
            find(fields, rest).map(|(rest, field)| (format!("{first}.{rest}"), field))
        }
        _ => None,
    }
}

fn list(fields: &'static [Field], depth: usize, levels: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    for field in fields {
        let type_ = match &field.kind {
            Kind::Object(_) => match field.word {
                Some((word, _)) => format!("object, or {word}"),
                None => "object".to_owned(),
            },
            kind => kind.describe(),
        };
        let need = match field.presence {
            Presence::Required => "required".to_owned(),
            Presence::Default(value) => format!("default {value}"),
            Presence::Optional(_) => "optional".to_owned(),
        };
        text.push_str(&format!("{indent}{}  <{type_}>  {need}\n", field.name));
        if let Kind::Object(inner) = field.kind
            && levels > 1
        {
            list(inner, depth + 1, levels - 1, text);
        }
    }
}

/// Breaks a text into lines of at most 88 characters.
pub(crate) fn wrapped(text: &str, indent: &str) -> String {
    const WIDTH: usize = 88;
    let mut out = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && indent.len() + line.len() + 1 + word.len() > WIDTH {
            out.push_str(&format!("{indent}{line}\n"));
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        out.push_str(&format!("{indent}{line}\n"));
    }
    out
}
