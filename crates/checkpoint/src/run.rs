//! A run's folder: which checkpoints it holds, which of them are sound, which may go.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::durable::{self, TEMPORARY_PREFIX};
use crate::error::{CheckpointError, Problem};
use crate::manifest::{FORMAT_VERSION, FileEntry, MANIFEST_FILE, Manifest, check_coverage};
use crate::reader::{Reader, TensorFile};

/// A complete checkpoint whose every file is as the manifest says.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    reader: Reader,
}

impl Checkpoint {
    /// Opens the checkpoint in `path` and verifies every file's length and checksum.
    ///
    /// # Errors
    /// [`CheckpointError::Incomplete`] without a manifest; [`CheckpointError::Damaged`] with every
    /// file that is missing, truncated or altered; [`CheckpointError::Tensor`] when the shards do
    /// not cover a tensor.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let manifest = read_manifest(path)?;
        let checked: Vec<_> = manifest
            .files
            .par_iter()
            .map(|entry| verify(path, entry).and_then(|()| parse(path, entry)))
            .collect();
        let mut problems = Vec::new();
        let mut reader = Reader::default();
        for result in checked {
            match result {
                Ok(file) => {
                    reader.add_file(file);
                }
                Err(problem) => problems.push(problem),
            }
        }
        if let Some(entry) = &manifest.tokenizer
            && let Err(problem) = verify(path, entry)
        {
            problems.push(problem);
        }
        if !problems.is_empty() {
            return Err(CheckpointError::Damaged { path: path.to_owned(), problems });
        }
        check_coverage(&manifest.shards)?;
        for shard in &manifest.shards {
            // All files were added, in the manifest's order.
            let number = manifest.files.iter().position(|f| f.file == shard.file);
            let number = number.ok_or_else(|| CheckpointError::Tensor {
                name: shard.spec.name.clone(),
                message: format!("its file {} is not in the manifest", shard.file),
            })?;
            reader.add_part(shard.spec.clone(), number, &shard.key)?;
        }
        Ok(Self { path: path.to_owned(), manifest, reader })
    }

    /// Returns the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of optimizer steps that were finished.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Returns the manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the tensors.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Gives the tensors away.
    #[must_use]
    pub fn into_reader(self) -> Reader {
        self.reader
    }

    /// Returns the path of the tokenizer's file, where the run had one.
    #[must_use]
    pub fn tokenizer_path(&self) -> Option<PathBuf> {
        let entry = self.manifest.tokenizer.as_ref()?;
        Some(self.path.join(&entry.file))
    }
}

fn read_manifest(folder: &Path) -> Result<Manifest, CheckpointError> {
    let path = folder.join(MANIFEST_FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(CheckpointError::Incomplete { path: folder.to_owned() });
        }
        Err(e) => return Err(CheckpointError::io(&path)(e)),
    };
    let damaged = |message: String| CheckpointError::Damaged {
        path: folder.to_owned(),
        problems: vec![Problem { file: MANIFEST_FILE.to_owned(), message }],
    };
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
    if manifest.format_version != FORMAT_VERSION {
        return Err(damaged(format!(
            "format version {}, expected {FORMAT_VERSION}",
            manifest.format_version
        )));
    }
    let inside = |file: &str| {
        let mut parts = Path::new(file).components();
        matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None))
    };
    let files = manifest.files.iter().chain(&manifest.tokenizer);
    if let Some(entry) = files.into_iter().find(|entry| !inside(&entry.file)) {
        return Err(damaged(format!("{} is not in the folder", entry.file)));
    }
    Ok(manifest)
}

/// Checks a file's length and checksum.
fn verify(folder: &Path, entry: &FileEntry) -> Result<(), Problem> {
    let problem = |message: String| Problem { file: entry.file.clone(), message };
    let path = folder.join(&entry.file);
    let file = fs::File::open(&path).map_err(|e| {
        problem(if e.kind() == io::ErrorKind::NotFound {
            "it is missing".to_owned()
        } else {
            e.to_string()
        })
    })?;
    let length = file.metadata().map_err(|e| problem(e.to_string()))?.len();
    if length != entry.bytes {
        return Err(problem(format!("{length} bytes, expected {}", entry.bytes)));
    }
    let map = crate::map::Mapped::new(&file).map_err(|e| problem(e.to_string()))?;
    let crc32 = crc32fast::hash(&map);
    if crc32 != entry.crc32 {
        return Err(problem(format!("checksum {crc32:08x}, expected {:08x}", entry.crc32)));
    }
    Ok(())
}

fn parse(folder: &Path, entry: &FileEntry) -> Result<TensorFile, Problem> {
    TensorFile::open(&folder.join(&entry.file))
        .map_err(|e| Problem { file: entry.file.clone(), message: e.to_string() })
}

/// A checkpoint that was passed over, and why.
#[derive(Debug)]
pub struct Refused {
    /// Its folder.
    pub path: PathBuf,
    /// Its step.
    pub step: u64,
    /// What is wrong with it.
    pub error: CheckpointError,
}

/// What [`latest`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The newest checkpoint that is complete and sound; none when a run must start anew.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that have a manifest but were refused, newest first. Folders without a manifest
    /// are not checkpoints and not listed.
    pub refused: Vec<Refused>,
}

/// Finds the newest checkpoint of a run that is complete and sound. A folder that does not exist
/// holds none.
///
/// # Errors
/// [`CheckpointError::Io`] when the run's folder cannot be listed. What is wrong with a checkpoint
/// is not an error but in [`Found::refused`].
pub fn latest(run: &Path) -> Result<Found, CheckpointError> {
    let mut found = Found::default();
    for (step, path) in steps(run)?.into_iter().rev() {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => {
                found.checkpoint = Some(checkpoint);
                break;
            }
            Err(CheckpointError::Incomplete { .. }) => {}
            Err(error) => found.refused.push(Refused { path, step, error }),
        }
    }
    Ok(found)
}

/// Returns the folder of a step's checkpoint.
#[must_use]
pub fn step_folder(run: &Path, step: u64) -> PathBuf {
    run.join(format!("step-{step:08}"))
}

/// Lists the steps that have a folder, complete or not, oldest first.
///
/// # Errors
/// [`CheckpointError::Io`]; a run's folder that does not exist has none.
pub fn steps(run: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let failed = CheckpointError::io(run);
    let entries = match fs::read_dir(run) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut steps = Vec::new();
    for entry in entries {
        let entry = entry.map_err(&failed)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("step-"));
        if let Some(step) = number.and_then(|n| n.parse().ok())
            && step_folder(run, step).file_name() == Some(&name)
        {
            steps.push((step, entry.path()));
        }
    }
    steps.sort_unstable();
    Ok(steps)
}

/// Removes what interrupted writers left: folders without a manifest, and in the others files
/// that the manifest does not list. Call it before anybody writes to the run's folder.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn clean(run: &Path) -> Result<(), CheckpointError> {
    for (_, path) in steps(run)? {
        match read_manifest(&path) {
            Ok(manifest) => remove_unlisted(&path, &manifest)?,
            Err(CheckpointError::Incomplete { .. }) => remove(&path)?,
            // Damaged: it may still tell somebody something.
            Err(_) => {}
        }
    }
    Ok(())
}

/// Removes files of ours that the manifest does not list: parts, and shards of other attempts.
pub(crate) fn remove_unlisted(folder: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    let failed = CheckpointError::io(folder);
    for entry in fs::read_dir(folder).map_err(&failed)? {
        let entry = entry.map_err(&failed)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let ours = name.starts_with(TEMPORARY_PREFIX)
            || name.starts_with("part-") && name.ends_with(".json")
            || name.starts_with("rank-") && name.ends_with(".safetensors");
        if ours && !manifest.files.iter().any(|f| f.file == name) {
            unless_gone(fs::remove_file(entry.path())).map_err(&failed)?;
        }
    }
    Ok(())
}

/// Keeps the newest `keep` complete checkpoints up to `step`, which was just completed, and
/// removes older ones and what was never completed below it. Newer ones are not touched.
pub(crate) fn prune(run: &Path, step: u64, keep: usize) -> Result<(), CheckpointError> {
    let mut complete = 0;
    for (at, path) in steps(run)?.into_iter().rev() {
        if at > step {
            continue;
        }
        let exists = path.join(MANIFEST_FILE).exists();
        complete += usize::from(exists);
        if complete > keep.max(1) || !exists {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes a checkpoint, manifest first, so that no reader takes the rest for whole.
fn remove(folder: &Path) -> Result<(), CheckpointError> {
    let failed = CheckpointError::io(folder);
    unless_gone(fs::remove_file(folder.join(MANIFEST_FILE))).map_err(&failed)?;
    match durable::sync_folder(folder).and_then(|()| fs::remove_dir_all(folder)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}

fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
