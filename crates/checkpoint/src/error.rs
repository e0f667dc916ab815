//! Why a checkpoint could not be written, found or read.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// One file that is not what the manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file's name within the checkpoint.
    pub file: String,
    /// What was expected and what was found.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.message)
    }
}

/// Why a checkpoint could not be written, found or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// There is no complete checkpoint in the folder.
    #[error("{path} holds no complete checkpoint: manifest.json is missing")]
    Incomplete {
        /// The checkpoint's folder.
        path: PathBuf,
    },
    /// Files are missing, truncated or altered.
    #[error("checkpoint {path} is refused: {}", list(problems))]
    Damaged {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Every file that is not as it should be.
        problems: Vec<Problem>,
    },
    /// A tensor is missing, has another shape, or is not covered.
    #[error("tensor {name}: {message}")]
    Tensor {
        /// The global name.
        name: String,
        /// What was expected and what was found.
        message: String,
    },
    /// A model in the Hugging Face layout that the engine does not cover.
    #[error("{path}: {field} is {got}, but only {supported} is supported")]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        got: String,
        /// What would be accepted.
        supported: String,
    },
    /// A file is not in its format.
    #[error("{path}: {message}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// Other ranks' parts did not come in time.
    #[error("step {step}: after {waited_ms} ms the parts of ranks {missing:?} are still missing")]
    PartsMissing {
        /// The checkpoint's step.
        step: u64,
        /// The ranks that are late.
        missing: Vec<u32>,
        /// How long they were waited for, in milliseconds.
        waited_ms: u64,
    },
    /// The writer is busy for too long, or has ended.
    #[error("the checkpoint writer {state} after {waited_ms} ms, with step {step} to write")]
    Writer {
        /// What it does.
        state: &'static str,
        /// The step that waits.
        step: u64,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
}

impl CheckpointError {
    /// Returns a function that names the file or folder of an error of the system.
    pub(crate) fn io(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path: path.clone(), source }
    }
}

fn list(problems: &[Problem]) -> String {
    let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
    texts.join("; ")
}
