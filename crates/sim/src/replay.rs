//! Replays a saved scheduler, and what happened after, to the same decisions.
//!
//! The snapshot is a [`Saved`] as JSON. The log, if there is one, has a JSON object on each line:
//! `{"at":MS,"change":...}` for what happened, and `{"at":MS,"cycle":true}` where the scheduler
//! looked. A log without the latter is replayed with a look after every moment of it; without a
//! log there is one look, at the moment of the snapshot.

use std::io::Read;

use drumline_cluster::{Change, ChangeError};
use drumline_placement::{Cycle, Eviction};
use drumline_scheduler::{Saved, Scheduler};
use drumline_types::{Attempt, DeviceId, Explanation, JobId, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::fault::FileFault;

/// The most that a file may hold once unpacked, in bytes.
const UNPACKED_MAX: u64 = 4 << 30;

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// Something happened.
    Change(Timestamp, Box<Change>),
    /// The scheduler looked.
    Cycle(Timestamp),
}

/// Who starts where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: Attempt,
    /// Its devices, in rank order.
    pub devices: Vec<DeviceId>,
}

/// What one look decided, without what has no bearing on anybody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// When.
    pub now: Timestamp,
    /// Who starts.
    pub starts: Vec<Start>,
    /// Who leaves.
    pub evictions: Vec<Eviction>,
    /// Who is told something new.
    pub told: Vec<(JobId, Explanation)>,
    /// When time alone may change something.
    pub wake: Option<Timestamp>,
}

impl From<&Cycle> for Decision {
    fn from(cycle: &Cycle) -> Self {
        let start = |plan: &drumline_placement::JobPlan| Start {
            job: plan.job.clone(),
            attempt: plan.attempt,
            devices: plan.assignments.iter().map(|a| a.device.clone()).collect(),
        };
        Self {
            now: cycle.now,
            starts: cycle.plan.jobs.iter().map(start).collect(),
            evictions: cycle.evictions.clone(),
            told: cycle.told.clone(),
            wake: cycle.wake,
        }
    }
}

/// Why a replay broke off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// A file is not what it should be.
    #[error(transparent)]
    File(#[from] FileFault),
    /// The snapshot contradicts itself.
    #[error("{file}: the snapshot contradicts itself: {why}")]
    Contradiction {
        /// The snapshot's file.
        file: String,
        /// How.
        why: ChangeError,
    },
    /// What the log says cannot have happened.
    #[error("{file}:{line}:1: expected what can have happened: {why}")]
    Refused {
        /// The log's file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// Why.
        why: ChangeError,
    },
    /// A decision is not the expected one.
    #[error("{file}:{line}:1: another decision at {at} ms: {difference}")]
    Different {
        /// The file with the expected decisions.
        file: String,
        /// The line, from 1.
        line: usize,
        /// Virtual time, in milliseconds.
        at: u64,
        /// Where, what was expected, and what was found.
        difference: String,
    },
}

/// Unpacks a file if it is packed with gzip, and returns its text.
///
/// # Errors
/// [`FileFault`] when it is no text, or unpacks to more than this program takes.
pub fn text(file: &str, bytes: Vec<u8>) -> Result<String, FileFault> {
    let bytes = if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut unpacked = Vec::new();
        let mut reader = flate2::read::MultiGzDecoder::new(bytes.as_slice()).take(UNPACKED_MAX + 1);
        reader.read_to_end(&mut unpacked).map_err(|error| {
            FileFault::at(file, 1, 1, format!("expected a whole gzip file: {error}"))
        })?;
        if unpacked.len() as u64 > UNPACKED_MAX {
            let what = format!("expected at most {UNPACKED_MAX} bytes once unpacked");
            return Err(FileFault::at(file, 1, 1, what));
        }
        unpacked
    } else {
        bytes
    };
    String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let before = String::from_utf8_lossy(&error.as_bytes()[..good]).into_owned();
        FileFault::span(file, &before, good..good, "expected UTF-8 text")
    })
}

/// Reads a snapshot.
///
/// # Errors
/// [`FileFault`] when it is none, or one of a version that this program does not know.
pub fn read_snapshot(file: &str, text: &str) -> Result<Saved, FileFault> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let wrong = |error: serde_json::Error| FileFault::json(file, 0, &error);
    let version = serde_json::from_str::<Version>(text).map_err(wrong)?.version;
    if version != Saved::VERSION {
        let known = Saved::VERSION;
        let what = format!("expected a snapshot of version {known}, found version {version}");
        let at = text.find("\"version\"").unwrap_or(0);
        return Err(FileFault::span(file, text, at..at, what));
    }
    serde_json::from_str(text).map_err(wrong)
}

/// Reads a log.
///
/// # Errors
/// [`FileFault`] for the first line that is none, or that goes back in time.
pub fn read_log(file: &str, text: &str) -> Result<Vec<(usize, Entry)>, FileFault> {
    #[derive(Deserialize)]
    struct Line {
        at: Timestamp,
        #[serde(default)]
        cycle: bool,
        #[serde(flatten)]
        rest: Map<String, Value>,
    }
    let mut entries = Vec::new();
    let mut last = Timestamp(0);
    for (line, row) in (1..).zip(text.lines()) {
        if row.trim().is_empty() {
            continue;
        }
        let read: Line =
            serde_json::from_str(row).map_err(|error| FileFault::json(file, line - 1, &error))?;
        let wrong = |what: String| FileFault::at(file, line, 1, what);
        if read.at < last {
            let what = format!("expected a time of at least {} ms, found {}", last.0, read.at.0);
            return Err(wrong(what));
        }
        last = read.at;
        let entry = if read.cycle {
            if let Some(key) = read.rest.keys().next() {
                return Err(wrong(format!("expected nothing beside \"cycle\", found {key:?}")));
            }
            Entry::Cycle(read.at)
        } else {
            let change = serde_json::from_value(Value::Object(read.rest));
            let what = |error: serde_json::Error| {
                wrong(format!("expected a change, or \"cycle\":true: {error}"))
            };
            Entry::Change(read.at, Box::new(change.map_err(what)?))
        };
        entries.push((line, entry));
    }
    Ok(entries)
}

/// Writes one line of a log.
///
/// # Errors
/// When the change cannot be written as JSON.
pub fn log_line(entry: &Entry) -> Result<String, serde_json::Error> {
    let (at, mut map) = match entry {
        Entry::Cycle(at) => (at, Map::from_iter([("cycle".to_owned(), Value::Bool(true))])),
        Entry::Change(at, change) => match serde_json::to_value(change)? {
            Value::Object(map) => (at, map),
            other => (at, Map::from_iter([("change".to_owned(), other)])),
        },
    };
    map.insert("at".to_owned(), Value::from(at.0));
    serde_json::to_string(&map)
}

/// Replays a log on a snapshot, and hands each decision on.
///
/// # Errors
/// [`ReplayError`], those of `each` included.
pub fn replay(
    (file, saved): (&str, Saved),
    (log_file, log): (&str, &[(usize, Entry)]),
    each: &mut dyn FnMut(Decision) -> Result<(), ReplayError>,
) -> Result<Scheduler, ReplayError> {
    let contradiction = |why| ReplayError::Contradiction { file: file.to_owned(), why };
    let start = saved.now;
    let mut scheduler = Scheduler::restore(saved).map_err(contradiction)?;
    let marked = log.iter().any(|(_, entry)| matches!(entry, Entry::Cycle(_)));
    for (at, (line, entry)) in log.iter().enumerate() {
        match entry {
            Entry::Cycle(now) => each(Decision::from(&scheduler.cycle(*now)))?,
            Entry::Change(now, change) => {
                scheduler.apply(Change::clone(change), *now).map_err(|why| {
                    ReplayError::Refused { file: log_file.to_owned(), line: *line, why }
                })?;
                let next = log.get(at + 1).map(|(_, entry)| match entry {
                    Entry::Cycle(at) | Entry::Change(at, _) => *at,
                });
                if !marked && next != Some(*now) {
                    each(Decision::from(&scheduler.cycle(*now)))?;
                }
            }
        }
    }
    if log.is_empty() {
        each(Decision::from(&scheduler.cycle(start)))?;
    }
    Ok(scheduler)
}

/// Decisions that a replay must make again, one on each line.
#[derive(Debug, Clone)]
pub struct Expected {
    file: String,
    lines: Vec<(usize, Value)>,
    next: usize,
}

impl Expected {
    /// Reads them.
    ///
    /// # Errors
    /// [`FileFault`] for the first line that is no decision.
    pub fn read(file: &str, text: &str) -> Result<Self, FileFault> {
        let mut lines = Vec::new();
        for (line, row) in (1..).zip(text.lines()).filter(|(_, row)| !row.trim().is_empty()) {
            let wrong = |error: serde_json::Error| FileFault::json(file, line - 1, &error);
            serde_json::from_str::<Decision>(row).map_err(wrong)?;
            lines.push((line, serde_json::from_str(row).map_err(wrong)?));
        }
        Ok(Self { file: file.to_owned(), lines, next: 0 })
    }

    /// Compares the next decision.
    ///
    /// # Errors
    /// [`ReplayError::Different`] when it is another one.
    pub fn compare(&mut self, decision: &Decision) -> Result<(), ReplayError> {
        let found = serde_json::to_value(decision).unwrap_or(Value::Null);
        let (line, expected) = match self.lines.get(self.next) {
            Some((line, expected)) => (*line, expected),
            None => (self.last_line() + 1, &Value::Null),
        };
        self.next += 1;
        match first_difference("", expected, &found) {
            None => Ok(()),
            Some(difference) => Err(self.different(line, decision.now.0, difference)),
        }
    }

    /// Checks that no decision is left.
    ///
    /// # Errors
    /// [`ReplayError::Different`] when one is.
    pub fn end(&self, now: Timestamp) -> Result<(), ReplayError> {
        match self.lines.get(self.next) {
            None => Ok(()),
            Some((line, _)) => {
                let left = self.lines.len() - self.next;
                let difference = format!("{left} more expected, and none found");
                Err(self.different(*line, now.0, difference))
            }
        }
    }

    fn last_line(&self) -> usize {
        self.lines.last().map_or(0, |(line, _)| *line)
    }

    fn different(&self, line: usize, at: u64, difference: String) -> ReplayError {
        ReplayError::Different { file: self.file.clone(), line, at, difference }
    }
}

/// Says where two values differ first.
fn first_difference(path: &str, expected: &Value, found: &Value) -> Option<String> {
    if expected == found {
        return None;
    }
    match (expected, found) {
        (Value::Object(a), Value::Object(b)) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            keys.into_iter().find_map(|key| {
                let none = &Value::Null;
                let (a, b) = (a.get(key).unwrap_or(none), b.get(key).unwrap_or(none));
                first_difference(&format!("{path}.{key}"), a, b)
            })
        }
        (Value::Array(a), Value::Array(b)) => {
            let pairs = a.iter().zip(b).enumerate();
            pairs
                .into_iter()
                .find_map(|(at, (a, b))| first_difference(&format!("{path}[{at}]"), a, b))
                .or_else(|| {
                    let (least, more) = (a.len().min(b.len()), a.len() > b.len());
                    let extra = if more { a.get(least) } else { b.get(least) };
                    let which = if more { "expected" } else { "found" };
                    let extra = short(extra.unwrap_or(&Value::Null));
                    Some(format!("{path}[{least}] is only {which}: {extra}"))
                })
        }
        _ => Some(format!("{path}: expected {}, found {}", short(expected), short(found))),
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 160 {
        return text;
    }
    let start: String = text.chars().take(160).collect();
    format!("{start}...")
}
