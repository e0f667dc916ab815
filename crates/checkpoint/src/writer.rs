//! Writes checkpoints beside the step loop.
//!
//! Each writing rank has one [`Writer`] with a thread and a place for one snapshot that waits. The
//! first writing rank commits: its thread waits until the parts of all others are on disk. Ranks
//! need no barrier for it; they meet in the run's folder, which they share.
//!
//! File names carry the attempt, so that a part that an earlier attempt left at the same step is
//! never taken for one of this attempt, and a checkpoint that is replaced stays whole until the
//! new manifest takes the old one's name.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use drumline_spec::{ModelConfig, Parallelism};

use crate::durable;
use crate::error::CheckpointError;
use crate::file::{Shards, write_shards};
use crate::manifest::{
    FORMAT_VERSION, FileEntry, MANIFEST_FILE, Manifest, Part, RunState, TOKENIZER_FILE, merge,
};
use crate::run::{prune, remove_unlisted, step_folder};

/// What a rank's writer needs to know.
#[derive(Debug, Clone)]
pub struct WriterOptions {
    /// The run's folder, shared by all writing ranks; it is made if it is missing.
    pub run: PathBuf,
    /// This rank.
    pub rank: u32,
    /// All ranks that write, this one among them; the first commits. Every tensor must be covered
    /// by their snapshots together.
    pub writers: Vec<u32>,
    /// The gang's attempt: a restarted gang has another number.
    pub attempt: u64,
    /// How many complete checkpoints are kept, at least 1.
    pub keep: u32,
    /// The model's shape.
    pub model: ModelConfig,
    /// The split.
    pub parallelism: Parallelism,
    /// Seed, data, job.
    pub state: RunState,
    /// The tokenizer's file, copied into each checkpoint.
    pub tokenizer: Option<PathBuf>,
    /// How long the committing rank waits for the others' parts.
    pub parts_timeout: Duration,
}

/// What became of one submitted snapshot.
#[derive(Debug)]
pub struct Outcome {
    /// Its step.
    pub step: u64,
    /// What was written, or why not. A failed one leaves the earlier checkpoints as they were.
    pub result: Result<Written, CheckpointError>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// Whether the checkpoint is complete now: on the committing rank only.
    pub complete: bool,
    /// Bytes that this rank wrote.
    pub bytes: u64,
    /// How long this rank's own file took, syncing included.
    pub write: Duration,
    /// How long all of it took, with waiting for the others and committing.
    pub total: Duration,
}

/// Writes a rank's checkpoints on a thread of its own. Dropped, it ends once what was submitted is
/// written; [`Writer::finish`] waits for that.
#[derive(Debug)]
pub struct Writer<S: Shards> {
    shared: Arc<Shared<S>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared<S> {
    slot: Mutex<Slot<S>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Slot<S> {
    // At most one snapshot waits while another is written.
    waiting: Option<(u64, S)>,
    writing: Option<u64>,
    spare: Option<S>,
    outcomes: Vec<Outcome>,
    closed: bool,
    ended: bool,
}

impl<S> Shared<S> {
    /// Nothing that holds the lock can leave the slot half changed: a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Slot<S>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Shards> Writer<S> {
    /// Starts the writer's thread.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] when the folder cannot be made or the thread not be started;
    /// [`CheckpointError::Format`] when the rank is not among the writers.
    pub fn start(options: WriterOptions) -> Result<Self, CheckpointError> {
        if !options.writers.contains(&options.rank) {
            return Err(CheckpointError::Format {
                path: options.run,
                message: format!(
                    "rank {} is not among the writing ranks {:?}",
                    options.rank, options.writers
                ),
            });
        }
        durable::create_folder(&options.run).map_err(CheckpointError::io(&options.run))?;
        let shared = Arc::new(Shared {
            slot: Mutex::new(Slot {
                waiting: None,
                writing: None,
                spare: None,
                outcomes: Vec::new(),
                closed: false,
                ended: false,
            }),
            changed: Condvar::new(),
        });
        let run = options.run.clone();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || {
                // Also when writing panics: nobody may wait for an ended thread.
                let _ended = Ended(&theirs);
                write_all(&options, &theirs);
            })
            .map_err(CheckpointError::io(&run))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Hands a snapshot over; the step loop goes on. It waits only while an earlier snapshot still
    /// waits to be written, and returns how long.
    ///
    /// # Errors
    /// [`CheckpointError::Writer`] after `timeout`, or when the writer has ended; the snapshot is
    /// lost then.
    pub fn submit(
        &self,
        step: u64,
        snapshot: S,
        timeout: Duration,
    ) -> Result<Duration, CheckpointError> {
        let start = Instant::now();
        let slot = self.wait(start, timeout, |slot| slot.waiting.is_none() || slot.ended);
        match slot {
            Some(mut slot) if !slot.ended => {
                slot.waiting = Some((step, snapshot));
                self.shared.changed.notify_all();
                Ok(start.elapsed())
            }
            late => Err(CheckpointError::Writer {
                state: if late.is_some() { "has ended" } else { "is busy" },
                step,
                waited_ms: millis(start.elapsed()),
            }),
        }
    }

    /// Returns what has been written since the last call, in order.
    pub fn outcomes(&self) -> Vec<Outcome> {
        std::mem::take(&mut self.shared.lock().outcomes)
    }

    /// Returns a snapshot that has been written, to be filled again instead of allocating one.
    #[must_use]
    pub fn spare(&self) -> Option<S> {
        self.shared.lock().spare.take()
    }

    /// Waits until everything that was submitted is written, and ends the thread. Returns what was
    /// written since [`Writer::outcomes`].
    ///
    /// # Errors
    /// [`CheckpointError::Writer`] after `timeout`; the thread goes on by itself then.
    pub fn finish(mut self, timeout: Duration) -> Result<Vec<Outcome>, CheckpointError> {
        let start = Instant::now();
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        let Some(mut slot) = self.wait(start, timeout, |slot| slot.ended) else {
            let slot = self.shared.lock();
            let waiting = slot.waiting.as_ref().map(|(step, _)| *step);
            return Err(CheckpointError::Writer {
                state: "is busy",
                step: slot.writing.or(waiting).unwrap_or_default(),
                waited_ms: millis(start.elapsed()),
            });
        };
        let outcomes = std::mem::take(&mut slot.outcomes);
        drop(slot);
        if let Some(thread) = self.thread.take() {
            // It has ended or is about to; a panic in it was reported as an outcome's absence.
            let _ = thread.join();
        }
        Ok(outcomes)
    }

    /// Waits for a condition; none after the deadline.
    fn wait(
        &self,
        start: Instant,
        timeout: Duration,
        mut until: impl FnMut(&Slot<S>) -> bool,
    ) -> Option<MutexGuard<'_, Slot<S>>> {
        let mut slot = self.shared.lock();
        while !until(&slot) {
            let left = timeout.checked_sub(start.elapsed())?;
            let (next, _) = self
                .shared
                .changed
                .wait_timeout(slot, left)
                .unwrap_or_else(PoisonError::into_inner);
            slot = next;
        }
        Some(slot)
    }
}

impl<S: Shards> Drop for Writer<S> {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

/// Marks the thread as ended, however it ends.
struct Ended<'a, S>(&'a Shared<S>);

impl<S> Drop for Ended<'_, S> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

fn write_all<S: Shards>(options: &WriterOptions, shared: &Shared<S>) {
    loop {
        let (step, snapshot) = {
            let mut slot = shared.lock();
            loop {
                if let Some(next) = slot.waiting.take() {
                    slot.writing = Some(next.0);
                    shared.changed.notify_all();
                    break next;
                }
                if slot.closed {
                    return;
                }
                // Ends with the writer, which closes the slot when it is dropped.
                slot = shared.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let result = write_one(options, step, &snapshot);
        let mut slot = shared.lock();
        slot.writing = None;
        slot.spare = Some(snapshot);
        slot.outcomes.push(Outcome { step, result });
        shared.changed.notify_all();
    }
}

fn write_one<S: Shards>(
    options: &WriterOptions,
    step: u64,
    snapshot: &S,
) -> Result<Written, CheckpointError> {
    let start = Instant::now();
    let folder = step_folder(&options.run, step);
    durable::create_folder(&folder).map_err(CheckpointError::io(&folder))?;
    let (rank, attempt) = (options.rank, options.attempt);
    let shard_path = folder.join(format!("rank-{rank:05}-{attempt}.safetensors"));
    let (file, shards) = write_shards(&shard_path, &snapshot.shards())?;
    let bytes = file.bytes;
    let write = start.elapsed();
    let part = Part { format_version: FORMAT_VERSION, step, attempt, rank, file, shards };
    let complete = options.writers.first() == Some(&rank);
    if complete {
        commit(options, step, &folder, part)?;
    } else {
        write_json(&part_path(&folder, rank, attempt), &part)?;
    }
    Ok(Written { path: folder, complete, bytes, write, total: start.elapsed() })
}

/// Waits for the other parts, merges them, and makes the checkpoint exist.
fn commit(
    options: &WriterOptions,
    step: u64,
    folder: &Path,
    own: Part,
) -> Result<(), CheckpointError> {
    let others: Vec<u32> =
        options.writers.iter().copied().filter(|rank| *rank != options.rank).collect();
    let mut parts = vec![own];
    parts.extend(wait_for_parts(options, step, folder, &others)?);
    let shards = merge(&parts)?;
    let tokenizer = match &options.tokenizer {
        None => None,
        Some(path) => {
            let json = fs::read(path).map_err(CheckpointError::io(path))?;
            let copy = folder.join(TOKENIZER_FILE);
            durable::write(&copy, &json).map_err(CheckpointError::io(&copy))?;
            Some(FileEntry {
                file: TOKENIZER_FILE.to_owned(),
                bytes: json.len() as u64,
                crc32: crc32fast::hash(&json),
            })
        }
    };
    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        step,
        attempt: options.attempt,
        model: options.model.clone(),
        parallelism: options.parallelism,
        state: options.state.clone(),
        tokenizer,
        files: parts.into_iter().map(|part| part.file).collect(),
        shards,
    };
    write_json(&folder.join(MANIFEST_FILE), &manifest)?;
    remove_unlisted(folder, &manifest)?;
    prune(&options.run, step, options.keep as usize)
}

// Between two looks for parts: short against a step, long against a look.
const LOOK_EVERY: Duration = Duration::from_millis(5);

fn wait_for_parts(
    options: &WriterOptions,
    step: u64,
    folder: &Path,
    ranks: &[u32],
) -> Result<Vec<Part>, CheckpointError> {
    let start = Instant::now();
    let mut found: Vec<Option<Part>> = ranks.iter().map(|_| None).collect();
    loop {
        for (rank, part) in ranks.iter().zip(&mut found) {
            if part.is_none() {
                *part = read_part(&part_path(folder, *rank, options.attempt), step)?;
            }
        }
        if found.iter().all(Option::is_some) {
            return Ok(found.into_iter().flatten().collect());
        }
        if start.elapsed() >= options.parts_timeout {
            let late = ranks.iter().zip(&found).filter(|(_, part)| part.is_none());
            return Err(CheckpointError::PartsMissing {
                step,
                missing: late.map(|(rank, _)| *rank).collect(),
                waited_ms: millis(start.elapsed()),
            });
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Reads another rank's part; none while it is not there.
fn read_part(path: &Path, step: u64) -> Result<Option<Part>, CheckpointError> {
    let json = match fs::read(path) {
        Ok(json) => json,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(CheckpointError::io(path)(e)),
    };
    let format = |message: String| CheckpointError::Format { path: path.to_owned(), message };
    // It was renamed into place whole.
    let part: Part = serde_json::from_slice(&json).map_err(|e| format(e.to_string()))?;
    if (part.format_version, part.step) != (FORMAT_VERSION, step) {
        return Err(format(format!(
            "it is of step {} in format {}, expected step {step} in format {FORMAT_VERSION}",
            part.step, part.format_version
        )));
    }
    Ok(Some(part))
}

fn part_path(folder: &Path, rank: u32, attempt: u64) -> PathBuf {
    folder.join(format!("part-{rank:05}-{attempt}.json"))
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), CheckpointError> {
    let mut json = serde_json::to_vec_pretty(value)
        .map_err(|e| CheckpointError::Format { path: path.to_owned(), message: e.to_string() })?;
    json.push(b'\n');
    durable::write(path, &json).map_err(CheckpointError::io(path))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
