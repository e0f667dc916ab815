//! Checks one document against the table: every value's type and bounds, every name, and what is
//! missing. Values that hold on their own come out by path; what they mean together is
//! `manifest`'s.

use std::collections::{BTreeMap, BTreeSet};

use drumline_types::ids::check_name;

use crate::document::{Entry, Node, Value};
use crate::field::{Field, Kind, MapRule, Presence, TextRule, duration, number, parse_duration};
use crate::mistake::{Mistake, Place, nearest};
use crate::table::join;

/// Variables that the launch sets; a manifest cannot.
const RESERVED: [&str; 10] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
];

/// The longest text of one argument or variable, in bytes: Linux allows one of 128 KiB.
const TEXT_MAX_BYTES: usize = 128 << 10;

/// One value that obeys its row of the table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Checked {
    Integer(i64),
    Number(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Map(BTreeMap<String, String>),
    DurationMs(u64),
}

/// What one document holds, and what is wrong with it.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    source: &'a str,
    document: usize,
    /// Values by path, defaults included.
    values: BTreeMap<String, Checked>,
    /// Where fields stand that the document has.
    places: BTreeMap<String, Place>,
    /// Every mistake so far.
    pub(crate) mistakes: Vec<Mistake>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(source: &'a str, document: usize) -> Self {
        Self {
            source,
            document,
            values: BTreeMap::new(),
            places: BTreeMap::new(),
            mistakes: Vec::new(),
        }
    }

    /// Returns a value that obeys its row, given or by default.
    pub(crate) fn get(&self, path: &str) -> Option<&Checked> {
        self.values.get(path)
    }

    /// Returns whether the document itself has the field.
    pub(crate) fn is_given(&self, path: &str) -> bool {
        self.places.contains_key(path)
    }

    /// Reports a mistake at the field, or at its nearest parent that the document has.
    pub(crate) fn wrong_field(&mut self, path: &str, message: impl Into<String>) {
        let mut parent = path;
        let place = loop {
            if let Some(place) = self.places.get(parent) {
                break *place;
            }
            match parent.rfind('.') {
                Some(dot) => parent = &parent[..dot],
                None => break self.places.get("").copied().unwrap_or(Place::START),
            }
        };
        self.wrong(path, place, message.into(), None);
    }

    pub(crate) fn wrong(&mut self, path: &str, at: Place, message: String, near: Option<&str>) {
        self.mistakes.push(Mistake {
            source: self.source.to_owned(),
            document: self.document,
            path: shown(path),
            place: at,
            message,
            nearest: near.map(str::to_owned),
        });
    }

    /// Checks the root of a document. A `status`, which Kubernetes adds, is not read.
    pub(crate) fn root(&mut self, fields: &'static [Field], node: &Node) {
        self.places.insert(String::new(), node.at);
        self.object("", fields, node, fields);
    }

    fn object(
        &mut self,
        path: &str,
        fields: &'static [Field],
        node: &Node,
        root: &'static [Field],
    ) {
        let entries: &[Entry] = match &node.value {
            Value::Map(entries) => entries,
            Value::Null => &[],
            other => {
                let message = format!("must be an object with fields, and is {}", told(other));
                self.wrong(path, node.at, message, None);
                return;
            }
        };
        let mut seen: BTreeMap<&str, Place> = BTreeMap::new();
        for entry in entries {
            let at_path = join(path, &entry.key);
            if let Some(first) = seen.get(entry.key.as_str()) {
                let message = format!("is given twice; the first is on line {}", first.line);
                self.wrong(&at_path, entry.at, message, None);
                continue;
            }
            seen.insert(&entry.key, entry.at);
            match fields.iter().find(|field| field.name == entry.key) {
                Some(field) => {
                    self.places.insert(at_path.clone(), entry.at);
                    self.field(&at_path, field, &entry.value, root);
                }
                None if path.is_empty() && entry.key == "status" => {}
                None => self.unknown(&at_path, entry, fields, root),
            }
        }
        for field in fields {
            let at_path = join(path, field.name);
            if !self.places.contains_key(&at_path) {
                self.absent(&at_path, field, node.at);
            }
        }
    }

    fn unknown(
        &mut self,
        path: &str,
        entry: &Entry,
        fields: &'static [Field],
        root: &'static [Field],
    ) {
        if entry.key == "<<" {
            let message = "merge keys are not supported; repeat the fields".to_owned();
            self.wrong(path, entry.at, message, None);
            return;
        }
        // The right name in the wrong place is as common as a slip of the pen.
        let elsewhere = find(root, "", &entry.key);
        let near = nearest(&entry.key, fields.iter().map(|field| field.name));
        match (near, elsewhere) {
            (None, Some(place)) => {
                let message = format!("unknown field here; `{}` belongs at {place}", entry.key);
                self.wrong(path, entry.at, message, None);
            }
            (None, None) => {
                let names: Vec<_> = fields.iter().map(|field| field.name).collect();
                let message = format!("unknown field; the fields here are {}", names.join(", "));
                self.wrong(path, entry.at, message, None);
            }
            (near, _) => self.wrong(path, entry.at, "unknown field".to_owned(), near),
        }
    }

    fn absent(&mut self, path: &str, field: &'static Field, at: Place) {
        match (&field.presence, &field.kind) {
            (Presence::Required, kind) => {
                let message = format!("is missing ({})", kind.describe());
                self.wrong(path, at, message, None);
            }
            (Presence::Default(text), kind) => {
                let node = Node { value: Value::Plain((*text).to_owned()), at };
                match self.scalar(path, kind, &node) {
                    Some(value) => drop(self.values.insert(path.to_owned(), value)),
                    None => debug_assert!(false, "the default of {path} breaks its own rule"),
                }
            }
            (Presence::Optional(_), Kind::Object(fields)) => {
                for field in *fields {
                    self.absent(&join(path, field.name), field, at);
                }
            }
            (Presence::Optional(_), _) => {}
        }
    }

    fn field(&mut self, path: &str, field: &'static Field, node: &Node, root: &'static [Field]) {
        if let Kind::Object(fields) = field.kind {
            match (field.word, &node.value) {
                (Some((word, _)), Value::Plain(text) | Value::Quoted(text)) => {
                    self.word(path, word, text, fields, node.at);
                }
                _ => self.object(path, fields, node, root),
            }
        } else if matches!(node.value, Value::Null) {
            // As in Kubernetes, null stands for absence.
            self.places.remove(path);
            self.absent(path, field, node.at);
            self.places.insert(path.to_owned(), node.at);
        } else if let Some(value) = self.scalar(path, &field.kind, node) {
            self.values.insert(path.to_owned(), value);
        }
    }

    /// Takes the word that stands for an object; the object's own fields are then as if absent.
    fn word(
        &mut self,
        path: &str,
        word: &'static str,
        text: &str,
        fields: &'static [Field],
        at: Place,
    ) {
        if text == word {
            self.values.insert(path.to_owned(), Checked::Text(word.to_owned()));
            for field in fields {
                self.absent(&join(path, field.name), field, at);
            }
            return;
        }
        let message = format!("must be an object with fields, or {word}, and is {}", quote(text));
        self.wrong(path, at, message, nearest(text, [word]));
    }

    /// Checks a value that is no object, and reports what is wrong with it.
    fn scalar(&mut self, path: &str, kind: &Kind, node: &Node) -> Option<Checked> {
        let result = match kind {
            Kind::Object(_) => return None,
            Kind::Map(rule) => return self.map(path, *rule, node),
            Kind::Texts { min, max } => return self.texts(path, *min, *max, node),
            Kind::Integer { min, max } => integer(&node.value, *min, *max).map(Checked::Integer),
            Kind::Number { min, max } => real(&node.value, *min, *max).map(Checked::Number),
            Kind::Bool => truth(&node.value).map(Checked::Bool),
            Kind::Duration { min_ms, max_ms } => {
                time(&node.value, *min_ms, *max_ms).map(Checked::DurationMs)
            }
            Kind::Text(rule) => {
                text(&node.value).and_then(|text| obey(*rule, text)).map(Checked::Text)
            }
            Kind::Choice(words) => {
                let given = match text(&node.value) {
                    Ok(given) => given,
                    Err(message) => {
                        self.wrong(path, node.at, message, None);
                        return None;
                    }
                };
                if words.iter().any(|(word, _)| *word == given) {
                    return Some(Checked::Text(given.to_owned()));
                }
                let names = || words.iter().map(|(word, _)| *word);
                let list = names().collect::<Vec<_>>().join(", ");
                let message = format!("{} is not one of {list}", quote(given));
                let near = nearest(given, names());
                self.wrong(path, node.at, message, near);
                return None;
            }
        };
        match result {
            Ok(value) => Some(value),
            Err(message) => {
                self.wrong(path, node.at, message, None);
                None
            }
        }
    }

    fn texts(&mut self, path: &str, min: usize, max: usize, node: &Node) -> Option<Checked> {
        let Value::List(items) = &node.value else {
            let message =
                format!("must be a list, as in [\"a\", \"b\"], and is {}", told(&node.value));
            self.wrong(path, node.at, message, None);
            return None;
        };
        if items.len() < min || items.len() > max {
            let message = format!("has {} elements; {min} to {max} are allowed", items.len());
            self.wrong(path, node.at, message, None);
            return None;
        }
        let mut texts = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match text(&item.value).and_then(plain_bytes) {
                Ok(text) if index == 0 && text.is_empty() => {
                    self.wrong(
                        &format!("{path}[0]"),
                        item.at,
                        "must name a program".to_owned(),
                        None,
                    );
                }
                Ok(text) => texts.push(text),
                Err(message) => self.wrong(&format!("{path}[{index}]"), item.at, message, None),
            }
        }
        (texts.len() == items.len()).then_some(Checked::Texts(texts))
    }

    fn map(&mut self, path: &str, rule: MapRule, node: &Node) -> Option<Checked> {
        let Value::Map(entries) = &node.value else {
            let message = format!("must be an object of texts, and is {}", told(&node.value));
            self.wrong(path, node.at, message, None);
            return None;
        };
        let mut map = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for entry in entries {
            let at_path = join(path, &entry.key);
            if !seen.insert(entry.key.as_str()) {
                self.wrong(&at_path, entry.at, "is given twice".to_owned(), None);
                continue;
            }
            if let Err(message) = key(rule, &entry.key) {
                self.wrong(&at_path, entry.at, message, None);
                continue;
            }
            if rule == MapRule::Counts {
                match integer(&entry.value.value, 0, crate::scheduling::QUOTA_MAX) {
                    Ok(count) => drop(map.insert(entry.key.clone(), count.to_string())),
                    Err(message) => self.wrong(&at_path, entry.value.at, message, None),
                }
                continue;
            }
            match text(&entry.value.value).and_then(plain_bytes) {
                Ok(text) if rule == MapRule::Labels && text.chars().count() > 256 => {
                    let message = "a label has at most 256 characters".to_owned();
                    self.wrong(&at_path, entry.value.at, message, None);
                }
                Ok(text) => drop(map.insert(entry.key.clone(), text)),
                Err(message) => self.wrong(&at_path, entry.value.at, message, None),
            }
        }
        (map.len() == entries.len()).then_some(Checked::Map(map))
    }
}

/// Makes a path fit to print: keys are the user's, and may hold anything.
fn shown(path: &str) -> String {
    const SHOWN: usize = 120;
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut shown: String = path.chars().take(SHOWN).map(printable).collect();
    if shown.len() < path.len() && path.chars().count() > SHOWN {
        shown.push_str("...");
    }
    shown
}

/// Finds the path of a field with this name anywhere below.
fn find(fields: &'static [Field], path: &str, name: &str) -> Option<String> {
    for field in fields {
        let at = join(path, field.name);
        if field.name == name {
            return Some(at);
        }
        if let Kind::Object(fields) = field.kind
            && let Some(found) = find(fields, &at, name)
        {
            return Some(found);
        }
    }
    None
}

fn key(rule: MapRule, key: &str) -> Result<(), String> {
    match rule {
        MapRule::Environment => {
            let mut letters = key.chars();
            let start = letters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
            if !start || !letters.all(|c| c.is_ascii_alphanumeric() || c == '_') {
                Err("a variable's name has letters, digits and '_', and starts with no digit"
                    .to_owned())
            } else if RESERVED.contains(&key) || key.starts_with("DRUMLINE_") {
                Err("is set by Drumline for each rank and cannot be overridden".to_owned())
            } else {
                Ok(())
            }
        }
        MapRule::Counts => {
            if (1..=100).contains(&key.len()) && !key.chars().any(char::is_control) {
                Ok(())
            } else {
                Err("a class of devices is a model's name of 1 to 100 bytes, or gpu or cpu"
                    .to_owned())
            }
        }
        MapRule::Labels | MapRule::Annotations => {
            let legal = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
            if (1..=128).contains(&key.len()) && key.chars().all(legal) {
                Ok(())
            } else {
                Err("a label's name has 1 to 128 letters, digits, '-', '_', '.' and '/'".to_owned())
            }
        }
    }
}

/// Says what a value is, for a message about what it should be.
fn told(value: &Value) -> String {
    match value {
        Value::Null => "empty".to_owned(),
        Value::Plain(text) | Value::Quoted(text) => quote(text),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "an object".to_owned(),
    }
}

/// Quotes a text, shortened: a message must stay one readable line whatever the file holds.
fn quote(text: &str) -> String {
    const SHOWN: usize = 60;
    if text.chars().count() > SHOWN {
        let start: String = text.chars().take(SHOWN).collect();
        format!("{start:?}...")
    } else {
        format!("{text:?}")
    }
}

fn integer(value: &Value, min: i64, max: i64) -> Result<i64, String> {
    let text = match value {
        Value::Plain(text) => text,
        Value::Quoted(text) if text.parse::<i64>().is_ok() => {
            return Err(format!("must be a whole number; take {text:?} out of its quotes"));
        }
        other => return Err(format!("must be a whole number, and is {}", told(other))),
    };
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("must be a whole number, and is {}", quote(text)));
    }
    match text.parse::<i64>() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        Ok(number) => Err(format!("{number} is out of range; {min} to {max} are allowed")),
        // Digits that no i64 holds.
        Err(_) => Err(format!("{} is out of range; {min} to {max} are allowed", shorten(text))),
    }
}

fn shorten(text: &str) -> String {
    if text.len() > 40 {
        format!("{}... ({} digits)", &text[..40], text.len())
    } else {
        text.to_owned()
    }
}

fn real(value: &Value, min: f64, max: f64) -> Result<f64, String> {
    let text = match value {
        Value::Plain(text) => text,
        Value::Quoted(text) if text.parse::<f64>().is_ok() => {
            return Err(format!("must be a number; take {} out of its quotes", quote(text)));
        }
        other => return Err(format!("must be a number, and is {}", told(other))),
    };
    let is_number = text.bytes().any(|b| b.is_ascii_digit())
        && text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
    match text.parse::<f64>() {
        Ok(value) if is_number && (min..=max).contains(&value) => Ok(value),
        Ok(_) if is_number => Err(format!(
            "{} is out of range; {} to {} are allowed",
            shorten(text),
            number(min),
            number(max)
        )),
        _ => Err(format!("must be a number, and is {}", quote(text))),
    }
}

fn truth(value: &Value) -> Result<bool, String> {
    match value {
        Value::Plain(text) => match text.as_str() {
            "true" | "True" | "TRUE" => Ok(true),
            "false" | "False" | "FALSE" => Ok(false),
            _ => Err(format!("must be true or false, and is {}", quote(text))),
        },
        other => Err(format!("must be true or false, and is {}", told(other))),
    }
}

fn time(value: &Value, min_ms: u64, max_ms: u64) -> Result<u64, String> {
    let (Value::Plain(text) | Value::Quoted(text)) = value else {
        return Err(format!("must be a duration such as 30s, and is {}", told(value)));
    };
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        let text = shorten(text);
        return Err(format!("a duration needs its unit: {text}s or {text}ms"));
    }
    match parse_duration(text) {
        Some(ms) if (min_ms..=max_ms).contains(&ms) => Ok(ms),
        Some(_) => Err(format!(
            "{} is out of range; {} to {} are allowed",
            quote(text),
            duration(min_ms),
            duration(max_ms)
        )),
        None => Err(format!(
            "must be a duration such as 500ms, 30s, 1m30s or 2h, and is {}",
            quote(text)
        )),
    }
}

/// Takes text. What YAML would read as a number or a truth value must be quoted, as Kubernetes
/// demands too: `no` and `1.10` have surprised enough people.
fn text(value: &Value) -> Result<&str, String> {
    match value {
        Value::Quoted(text) => Ok(text),
        Value::Plain(text) => {
            let number = text.bytes().any(|b| b.is_ascii_digit()) && text.parse::<f64>().is_ok();
            if number || truth(value).is_ok() {
                Err(format!("must be text; put {text} in quotes"))
            } else {
                Ok(text)
            }
        }
        other => Err(format!("must be text, and is {}", told(other))),
    }
}

fn plain_bytes(text: &str) -> Result<String, String> {
    if text.contains('\0') {
        Err("must not hold a NUL character".to_owned())
    } else if text.len() > TEXT_MAX_BYTES {
        Err(format!("has {} bytes; at most {TEXT_MAX_BYTES} are allowed", text.len()))
    } else {
        Ok(text.to_owned())
    }
}

pub(crate) fn obey(rule: TextRule, text: &str) -> Result<String, String> {
    match rule {
        TextRule::Name { max } => {
            if check_name(text).is_ok() && text.len() <= max {
                Ok(text.to_owned())
            } else {
                Err(format!(
                    "{} must be 1 to {max} characters of a-z, 0-9 and '-', starting and ending \
                     with a letter or digit",
                    quote(text)
                ))
            }
        }
        TextRule::Path => {
            if text.is_empty() || text.len() > 4096 {
                Err(format!("a path has 1 to 4096 bytes, and this has {}", text.len()))
            } else {
                plain_bytes(text)
            }
        }
        TextRule::ModelName => {
            let legal = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
            if (1..=100).contains(&text.len()) && text.chars().all(legal) {
                Ok(text.to_owned())
            } else {
                Err(format!(
                    "{} must be 1 to 100 characters of letters, digits, '.', '_', '-', '/' and ':'",
                    quote(text)
                ))
            }
        }
    }
}
