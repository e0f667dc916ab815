//! The reference page of manifests, `docs/reference/manifests.md`, from the table.

use crate::explain::absent;
use crate::field::{Field, Kind};
use crate::table::{API_VERSION, MANIFESTS, each_field};

/// Returns the page as Markdown.
#[must_use]
pub fn markdown() -> String {
    let mut page = format!(
        "# Manifests\n\n\
         Generated from the table that also drives parsing, `drumline explain` and the JSON schema \
         (`crates/spec/src/table.rs`). Do not edit.\n\n\
         A file holds one manifest or several, in YAML (separated by `---`) or JSON. Every one has \
         `apiVersion: {API_VERSION}`, a `kind`, `metadata` and a `spec`; a `status` is not read. \
         Aliases are expanded within a bound; tags and merge keys are not supported. `null` stands \
         for absence. Text that YAML would read as a number or a truth value must be quoted.\n\n\
         `drumline validate FILE` reports every mistake at once; a wrong file stores nothing.\n"
    );
    for manifest in MANIFESTS {
        page.push_str(&format!("\n## {}\n\n{}\n\n", manifest.name, manifest.doc));
        page.push_str("| Field | Holds | Absent | Meaning |\n|---|---|---|---|\n");
        each_field(manifest, &mut |path, field| {
            if path != "apiVersion" && path != "kind" {
                page.push_str(&row(path, field));
            }
        });
    }
    page
}

fn row(path: &str, field: &Field) -> String {
    let unit = if field.unit.is_empty() { String::new() } else { format!(" ({})", field.unit) };
    let mut doc = field.doc.to_owned();
    if let Kind::Choice(words) = field.kind {
        for (word, meaning) in words {
            doc.push_str(&format!(" `{word}`: {meaning}"));
        }
    }
    if let Some((word, meaning)) = field.word {
        doc.push_str(&format!(" Or the word `{word}`: {meaning}"));
    }
    format!("| `{path}` | {}{unit} | {} | {doc} |\n", field.kind.describe(), absent(field))
}
