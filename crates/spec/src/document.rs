//! Reads YAML (and so JSON) into trees in which every key and value knows its place.
//!
//! Bounded: the size of the text, the depth, the number of nodes after aliases are expanded, and
//! the number of documents. It knows nothing of manifests.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use crate::mistake::Place;

/// The longest text that is read, in bytes.
pub(crate) const TEXT_MAX_BYTES: usize = 1 << 20;
/// The deepest nesting that is read.
pub(crate) const DEPTH_MAX: usize = 32;
/// The most nodes that one file may hold, each alias counted as what it stands for.
pub(crate) const NODES_MAX: usize = 50_000;
/// The most documents that one file may hold.
pub(crate) const DOCUMENTS_MAX: usize = 256;

/// One value and its place.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) at: Place,
}

/// What a node holds.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// A scalar without quotes: a number, a truth value or text.
    Plain(String),
    /// A scalar in quotes or a block: always text.
    Quoted(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One key and its value. Keys may repeat: the walker reports that, with its path.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) at: Place,
    pub(crate) value: Node,
}

/// A fault of the text itself.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) document: usize,
    pub(crate) at: Place,
    pub(crate) message: String,
}

/// Reads every document, numbered from 1. A document with a fault is left out, and reading goes on
/// at the next `---`.
pub(crate) fn read(text: &str) -> (Vec<(usize, Node)>, Vec<Fault>) {
    let mut reader = Reader::default();
    if text.len() > TEXT_MAX_BYTES {
        reader.faults.push(Fault {
            document: 1,
            at: Place::START,
            message: format!(
                "the file has {} bytes; at most {TEXT_MAX_BYTES} are read",
                text.len()
            ),
        });
        return (reader.documents, reader.faults);
    }
    // A byte order mark is legal at the start and would shift the first column.
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut line = 1;
    while let Some(fault_line) = reader.stream(rest, line) {
        // The fault may be told on the very `---` that ends its document, but never on the one that
        // starts it.
        let own = usize::from(fault_line == reader.started_on);
        let skip = (fault_line - line + own).max(1);
        let Some((offset, skipped)) = next_document(rest, skip) else {
            break;
        };
        rest = &rest[offset..];
        line += skipped;
    }
    (reader.documents, reader.faults)
}

/// Finds the first line after the first `skip` lines that starts a document: its offset in bytes
/// and in lines.
fn next_document(text: &str, skip: usize) -> Option<(usize, usize)> {
    let mut offset = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let mark = line.strip_prefix("---");
        if index >= skip
            && mark.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\n', '\r', '\t']))
        {
            return Some((offset, index));
        }
        offset += line.len();
    }
    None
}

/// A collection that is not closed yet.
struct Open {
    at: Place,
    anchor: usize,
    kind: Collection,
}

enum Collection {
    List(Vec<Node>),
    Map { entries: Vec<Entry>, key: Option<(String, Place)> },
}

#[derive(Default)]
struct Reader {
    documents: Vec<(usize, Node)>,
    faults: Vec<Fault>,
    started: usize,
    /// The line on which the present document starts.
    started_on: usize,
    nodes: usize,
}

impl Reader {
    /// Reads documents until the text ends or has a fault, and returns the fault's line.
    fn stream(&mut self, text: &str, first_line: usize) -> Option<usize> {
        let place =
            |mark: &Marker| Place { line: mark.line() + first_line - 1, column: mark.col() + 1 };
        let mut parser = Parser::new_from_str(text);
        let mut open: Vec<Open> = Vec::new();
        let mut anchors: BTreeMap<usize, (Node, usize)> = BTreeMap::new();
        let mut root: Option<Node> = None;
        let mut inside = false;
        loop {
            let (event, span) = match parser.next_event() {
                None => return None,
                Some(Ok(event)) => event,
                Some(Err(error)) => {
                    let at = place(error.marker());
                    self.started += usize::from(!inside);
                    return self.fault(self.started, at, error.info().to_owned());
                }
            };
            let at = place(&span.start);
            let (node, anchor) = match event {
                Event::Nothing | Event::StreamStart => continue,
                Event::StreamEnd => return None,
                Event::DocumentStart(_) => {
                    self.started += 1;
                    self.started_on = at.line;
                    inside = true;
                    anchors.clear();
                    if self.started > DOCUMENTS_MAX {
                        self.fault(
                            self.started,
                            at,
                            format!("more than {DOCUMENTS_MAX} documents in one file"),
                        );
                        return None;
                    }
                    continue;
                }
                Event::DocumentEnd => {
                    inside = false;
                    if let Some(node) = root.take()
                        && !matches!(node.value, Value::Null)
                    {
                        self.documents.push((self.started, node));
                    }
                    continue;
                }
                Event::SequenceStart(anchor, tag) | Event::MappingStart(anchor, tag)
                    if tag.is_some() =>
                {
                    let _ = anchor;
                    return self.fault(self.started, at, "tags are not supported".to_owned());
                }
                Event::SequenceStart(anchor, _) => {
                    if open.len() >= DEPTH_MAX {
                        return self.too_deep(at);
                    }
                    open.push(Open { at, anchor, kind: Collection::List(Vec::new()) });
                    continue;
                }
                Event::MappingStart(anchor, _) => {
                    if open.len() >= DEPTH_MAX {
                        return self.too_deep(at);
                    }
                    let kind = Collection::Map { entries: Vec::new(), key: None };
                    open.push(Open { at, anchor, kind });
                    continue;
                }
                Event::SequenceEnd | Event::MappingEnd => {
                    let Some(closed) = open.pop() else { continue };
                    let value = match closed.kind {
                        Collection::List(items) => Value::List(items),
                        Collection::Map { entries, .. } => Value::Map(entries),
                    };
                    (Node { value, at: closed.at }, closed.anchor)
                }
                Event::Alias(id) => {
                    let Some((node, size)) = anchors.get(&id) else {
                        return self.fault(
                            self.started,
                            at,
                            "an alias stands inside the value that it repeats".to_owned(),
                        );
                    };
                    self.nodes += size;
                    (Node { value: node.value.clone(), at }, 0)
                }
                Event::Scalar(text, style, anchor, tag) => {
                    let plain = style == ScalarStyle::Plain;
                    let value = match tag {
                        Some(tag) if tag.is_yaml_core_schema() && tag.suffix == "str" => {
                            Value::Quoted(text.into_owned())
                        }
                        Some(_) => {
                            return self.fault(
                                self.started,
                                at,
                                "tags other than !!str are not supported".to_owned(),
                            );
                        }
                        None if plain && is_null(&text) => Value::Null,
                        None if plain => Value::Plain(text.into_owned()),
                        None => Value::Quoted(text.into_owned()),
                    };
                    (Node { value, at }, anchor)
                }
            };
            self.nodes += 1;
            if self.nodes > NODES_MAX {
                self.fault(
                    self.started,
                    at,
                    format!("more than {NODES_MAX} values in one file, aliases expanded"),
                );
                return None;
            }
            if anchor > 0 {
                let size = count(&node);
                anchors.insert(anchor, (node.clone(), size));
                self.nodes += size;
            }
            match open.last_mut().map(|open| &mut open.kind) {
                None => root = Some(node),
                Some(Collection::List(items)) => items.push(node),
                Some(Collection::Map { entries, key }) => match key.take() {
                    Some((key, at)) => entries.push(Entry { key, at, value: node }),
                    None => match node.value {
                        Value::Plain(text) | Value::Quoted(text) => *key = Some((text, node.at)),
                        Value::Null | Value::List(_) | Value::Map(_) => {
                            return self.fault(
                                self.started,
                                node.at,
                                "a field's name must be text".to_owned(),
                            );
                        }
                    },
                },
            }
        }
    }

    fn too_deep(&mut self, at: Place) -> Option<usize> {
        self.fault(self.started, at, format!("nested deeper than {DEPTH_MAX} levels"))
    }

    fn fault(&mut self, document: usize, at: Place, message: String) -> Option<usize> {
        self.faults.push(Fault { document, at, message });
        Some(at.line)
    }
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// Counts the nodes of a tree, itself included. Depth is bounded, so recursion is.
fn count(node: &Node) -> usize {
    1 + match &node.value {
        Value::Null | Value::Plain(_) | Value::Quoted(_) => 0,
        Value::List(items) => items.iter().map(count).sum(),
        Value::Map(entries) => entries.iter().map(|entry| count(&entry.value)).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(text: &str) -> Vec<String> {
        read(text)
            .1
            .into_iter()
            .map(|fault| format!("{}:{} {}", fault.at.line, fault.at.column, fault.message))
            .collect()
    }

    #[test]
    fn a_fault_hides_no_later_document() {
        let (documents, faults) = read("a: [1\n---\nb: 2\n---\nc: }\n---\nd: 4\n");
        assert_eq!(faults.len(), 2, "{faults:?}");
        let numbers: Vec<_> =
            documents.iter().map(|(number, node)| (*number, node.at.line)).collect();
        assert_eq!(numbers, [(2, 3), (4, 7)]);
        let (documents, faults) = read("a: 1\n--- ]\n---\nb: 2\n");
        assert_eq!((documents.len(), faults.len()), (2, 1), "{faults:?}");
    }

    #[test]
    fn aliases_expand_within_a_bound() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..9 {
            let refs = vec![format!("*a{}", level - 1); 10].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{refs}]\n"));
        }
        let faults = faults(&bomb);
        assert_eq!(faults.len(), 1);
        assert!(faults[0].contains("aliases expanded"), "{faults:?}");
        assert_eq!(read("a: &x {b: 1}\nc: *x\n").0.len(), 1);
    }

    #[test]
    fn depth_is_bounded_without_recursion() {
        for open in ["[", "{a: "] {
            let deep = open.repeat(10_000);
            assert!(!faults(&deep).is_empty());
        }
        let blocks = (0..2000).map(|n| format!("{}a:\n", " ".repeat(n))).collect::<String>();
        assert!(!faults(&blocks[..TEXT_MAX_BYTES.min(blocks.len())]).is_empty());
        assert!(!faults(&"- ".repeat(5000)).is_empty());
    }

    #[test]
    fn json_is_read_with_tabs_and_escapes() {
        let (documents, faults) = read("{\n\t\"a\": \"\\u00e4\\/b\",\n\t\"c\": [1, 2]\n}\n");
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(documents.len(), 1);
    }

    #[test]
    fn an_alias_of_itself_is_a_fault() {
        assert_eq!(faults("a: &a [*a]\n").len(), 1);
    }
}
