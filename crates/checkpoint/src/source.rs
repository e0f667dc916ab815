//! Opens a model by path, whatever kind of folder it is.

use std::path::{Path, PathBuf};

use drumline_spec::ModelConfig;

use crate::error::CheckpointError;
use crate::hf;
use crate::manifest::MANIFEST_FILE;
use crate::reader::Reader;
use crate::run::{Checkpoint, Refused, latest, steps};

/// A model that can be served, exported or trained on.
#[derive(Debug)]
pub struct ModelSource {
    /// The folder that was opened in the end.
    pub path: PathBuf,
    /// The model's shape.
    pub model: ModelConfig,
    /// The weights, under the names of the Hugging Face layout.
    pub reader: Reader,
    /// The tokenizer's file, where there is one.
    pub tokenizer: Option<PathBuf>,
    /// The checkpoint's step; none for the Hugging Face layout.
    pub step: Option<u64>,
    /// Checkpoints of the run that were passed over.
    pub refused: Vec<Refused>,
}

/// Opens a checkpoint, the latest checkpoint of a run, or a folder in the Hugging Face layout.
///
/// # Errors
/// [`CheckpointError`] of the kind of folder that it is; [`CheckpointError::Incomplete`] when it is
/// none of the three or the run has no sound checkpoint.
pub fn open_model(path: &Path) -> Result<ModelSource, CheckpointError> {
    if path.join(MANIFEST_FILE).exists() {
        return Ok(of_checkpoint(Checkpoint::open(path)?, Vec::new()));
    }
    if path.join(hf::CONFIG_FILE).exists() {
        return hf::open(path);
    }
    if !steps(path)?.is_empty() {
        let found = latest(path)?;
        if let Some(checkpoint) = found.checkpoint {
            return Ok(of_checkpoint(checkpoint, found.refused));
        }
        if let Some(refused) = found.refused.into_iter().next() {
            return Err(refused.error);
        }
    }
    Err(CheckpointError::Incomplete { path: path.to_owned() })
}

fn of_checkpoint(checkpoint: Checkpoint, refused: Vec<Refused>) -> ModelSource {
    ModelSource {
        path: checkpoint.path().to_owned(),
        model: checkpoint.manifest().model.clone(),
        tokenizer: checkpoint.tokenizer_path(),
        step: Some(checkpoint.step()),
        reader: checkpoint.into_reader(),
        refused,
    }
}
