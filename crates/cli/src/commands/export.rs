//! `drumline export`: a checkpoint in the layout that `transformers` loads.

use std::path::PathBuf;

use clap::Args;
use drumline_checkpoint::{CheckpointError, hf, open_model};
use serde_json::json;

use crate::client::Access;
use crate::failure::Failure;
use crate::output::{self, Format, note};

/// Write a checkpoint as a Hugging Face folder.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A checkpoint, or a run's folder (its latest complete checkpoint).
    pub checkpoint: PathBuf,
    /// The folder to write: config.json, model.safetensors, tokenizer.json.
    pub dir: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// The user's mistake, when there is no sound checkpoint; failed, when the folder cannot be
/// written.
pub async fn run(args: ExportArgs, access: &Access, format: Format) -> Result<(), Failure> {
    // As in manifests, a path that is not here may start at the folder that all nodes share.
    let shared = access.state.shared_dir().join(&args.checkpoint);
    let from = if args.checkpoint.exists() { args.checkpoint.clone() } else { shared };
    tokio::task::spawn_blocking(move || export(&from, &args, format))
        .await
        .map_err(|error| Failure::failed(error.to_string()))?
}

fn export(from: &std::path::Path, args: &ExportArgs, format: Format) -> Result<(), Failure> {
    if !from.exists() {
        return Err(Failure::user(format!("there is no {}", args.checkpoint.display()))
            .hint("`drumline describe job ID` names a run's checkpoint"));
    }
    let source = open_model(from).map_err(|error| Failure::user(error.to_string()))?;
    for refused in &source.refused {
        note(&format!("passed over: {}", refused.error));
    }
    hf::export(&source, &args.dir).map_err(|error| match error {
        CheckpointError::Io { .. } => Failure::failed(error.to_string()),
        other => Failure::user(other.to_string()),
    })?;
    let value = json!({
        "path": args.dir,
        "from": source.path,
        "step": source.step,
        "parameters": source.model.parameters(),
    });
    output::value(format, &value, || format!("{}\n", args.dir.display()))
}
