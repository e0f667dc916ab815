//! `drumline data build`: from text to token shards that a `TrainingJob` names.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};
use drumline_data::{BuildError, BuildOptions, Corpus, CorpusError, Stage};
use drumline_types::format_bytes;
use serde_json::json;

use crate::client::Access;
use crate::failure::Failure;
use crate::output::{self, Format, note};

/// Prepare text for training.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// What to do.
    #[command(subcommand)]
    pub what: DataCommand,
}

/// What can be done with data.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Train a tokenizer on text, and write token shards.
    Build(BuildArgs),
}

/// Arguments of `data build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// A text file, or a folder of them.
    pub text: PathBuf,
    /// The dataset's folder. A relative path starts at the folder that all nodes share, as in
    /// manifests; an absolute one is taken as it is.
    pub dataset: PathBuf,
    /// Size of the vocabulary; a small text ends with fewer.
    #[arg(long, default_value_t = 8192)]
    pub vocab: u32,
    /// Share of the documents that is held out.
    #[arg(long, default_value_t = 0.02)]
    pub held_out: f64,
    /// Take at most so many MiB of text.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub limit_mib: u64,
    /// Use this tokenizer.json instead of training one.
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// The user's mistake for text or options that do not do; failed, when the folder cannot be
/// written.
pub async fn run(args: DataArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let DataCommand::Build(args) = args.what;
    let folder = access.state.shared_dir().join(&args.dataset);
    // It takes all cores for a while, and the runtime's threads are not for that.
    tokio::task::spawn_blocking(move || build(&args, &folder, format))
        .await
        .map_err(|error| Failure::failed(error.to_string()))?
}

fn build(args: &BuildArgs, folder: &std::path::Path, format: Format) -> Result<(), Failure> {
    let begin = Instant::now();
    let corpus = Corpus::from_path(&args.text, args.limit_mib << 20).map_err(corpus_failure)?;
    let summary = corpus.summary();
    note(&format!("{} in {} files", format_bytes(summary.bytes), summary.files));
    let options = BuildOptions {
        vocab: args.vocab,
        held_out: args.held_out,
        tokenizer: args.tokenizer.clone(),
        ..BuildOptions::default()
    };
    let mut stage = None;
    let mut progress = |progress: drumline_data::Progress| {
        if stage.replace(progress.stage) != Some(progress.stage) {
            note(match progress.stage {
                Stage::Tokenizer => "training the tokenizer",
                Stage::Encode => "encoding",
                Stage::Commit => "writing",
            });
        }
    };
    let manifest = drumline_data::build(&corpus, folder, &options, &mut progress).map_err(
        |error| match error {
            BuildError::Corpus(error) => corpus_failure(error),
            BuildError::Option { .. } | BuildError::Tokenizer(_) => {
                Failure::user(error.to_string())
            }
            other => Failure::failed(other.to_string()),
        },
    )?;
    let value = json!({
        "path": folder,
        "vocab": manifest.tokenizer.vocab,
        "tokens": manifest.train.tokens,
        "tokens_held_out": manifest.validation.tokens,
        "bytes": manifest.source.bytes,
        "files": manifest.source.files,
        "fingerprint": manifest.fingerprint,
        "seconds": begin.elapsed().as_secs_f64(),
    });
    output::value(format, &value, || {
        format!(
            "{}: {} tokens to train on, {} held out, vocabulary of {}\n",
            folder.display(),
            manifest.train.tokens,
            manifest.validation.tokens,
            manifest.tokenizer.vocab
        )
    })
}

fn corpus_failure(error: CorpusError) -> Failure {
    Failure::user(error.to_string()).hint("TEXT is a text file in UTF-8, or a folder of them")
}
