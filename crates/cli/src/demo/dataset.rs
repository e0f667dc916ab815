//! The demo's text: found, tokenized and written as shards.

use std::path::{Path, PathBuf};

use drumline_data::corpus::CargoSource;
use drumline_data::{BuildOptions, Corpus, Manifest, Stage, build};

use crate::failure::Failure;
use crate::output::note;

/// Text that is taken at most, in bytes: enough for many more steps than the demo makes.
const TEXT_BYTES: u64 = 8 << 20;
/// Text that the tokenizer is trained on, in bytes.
const SAMPLE_BYTES: u64 = 2 << 20;

/// Builds the dataset in `folder`, from `data` or from the local cargo registry.
///
/// # Errors
/// The user's mistake, when there is no text; failed, when it cannot be written.
pub(super) async fn prepare(
    data: Option<PathBuf>,
    folder: PathBuf,
    vocab: u32,
) -> Result<Manifest, Failure> {
    tokio::task::spawn_blocking(move || blocking(data.as_deref(), &folder, vocab))
        .await
        .map_err(|error| Failure::failed(format!("building the dataset: {error}")))?
}

fn blocking(data: Option<&Path>, folder: &Path, vocab: u32) -> Result<Manifest, Failure> {
    let user = |error: drumline_data::CorpusError| Failure::user(error.to_string());
    let corpus = match data {
        Some(path) => Corpus::from_path(path, TEXT_BYTES).map_err(user)?,
        None => {
            let lock = lock_file()?;
            let source = CargoSource::from_environment(&lock, TEXT_BYTES).map_err(user)?;
            Corpus::from_cargo(&source).map_err(|error| {
                user(error).hint("name a file or folder with text: `drumline demo --data PATH`")
            })?
        }
    };
    let summary = corpus.summary();
    note(&format!(
        "text: {} files, {}: {}",
        summary.files,
        drumline_types::format_bytes(summary.bytes),
        summary.description
    ));
    let options = BuildOptions { vocab, sample_bytes: SAMPLE_BYTES, ..BuildOptions::default() };
    let mut stage = None;
    build(&corpus, folder, &options, &mut |progress| {
        if stage.replace(progress.stage) != Some(progress.stage) {
            note(match progress.stage {
                Stage::Tokenizer => "training a byte-level BPE tokenizer",
                Stage::Encode => "writing token shards",
                Stage::Commit => "making the dataset durable",
            });
        }
    })
    .map_err(|error| Failure::failed(error.to_string()))
}

/// Finds the `Cargo.lock` of this folder or of one above it; else that of the source tree from
/// which this program was built, where it still is.
fn lock_file() -> Result<PathBuf, Failure> {
    let here = std::env::current_dir()?;
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.lock");
    let found =
        here.ancestors().map(|folder| folder.join("Cargo.lock")).find(|path| path.is_file());
    found.or_else(|| Some(built).filter(|path| path.is_file())).ok_or_else(|| {
        Failure::user("no Cargo.lock in this folder or above it, to find Rust source by")
            .hint("name a file or folder with text: `drumline demo --data PATH`")
    })
}
