//! Which text to train on: a list of files in a fixed order, read piece by piece.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

mod cargo_source;
mod folder;

pub use cargo_source::CargoSource;

/// Why there is no corpus.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// Nothing to read in the place that was named.
    #[error("no text found in {place}: {remedy}")]
    Empty {
        /// The file or folder that was searched.
        place: PathBuf,
        /// What helps.
        remedy: String,
    },
    /// A file or folder could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The lock file is not one.
    #[error("{path} is not a Cargo.lock: {message}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The Cargo registry's place is unknown.
    #[error(
        "the Cargo home is unknown: set CARGO_HOME or HOME, or name a file or folder with --data"
    )]
    NoCargoHome,
}

/// What a corpus is made of, for the manifest and for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorpusSummary {
    /// Where it comes from, in words.
    pub description: String,
    /// Files that were taken.
    pub files: u64,
    /// Bytes of text that were taken.
    pub bytes: u64,
    /// Files left out because they are not UTF-8 text.
    pub skipped_not_text: u64,
    /// Files left out because they are larger than the limit for one file.
    pub skipped_large: u64,
    /// Files left out because they say that a program wrote them, or look so.
    pub skipped_generated: u64,
    /// Files left out because the byte budget was used up.
    pub skipped_budget: u64,
    /// Pinned crates whose source is not in the local registry.
    pub missing_crates: u64,
}

/// One file of a corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceFile {
    /// A name that is the same on every machine.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}

/// A stretch of text that is held out or trained on as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The file's name, and the piece's number within it.
    pub name: String,
    /// The text.
    pub text: String,
    /// Whether the file ends here, so that an end-of-text token follows.
    pub ends_file: bool,
}

/// Text files in a fixed order.
#[derive(Debug, Clone)]
pub struct Corpus {
    files: Vec<SourceFile>,
    summary: CorpusSummary,
    piece_bytes: usize,
}

// The held-out split takes whole pieces; 64 KiB is about 20,000 tokens.
const PIECE_BYTES_MAX: usize = 64 << 10;
const PIECE_BYTES_MIN: usize = 256;
// Aims for this many pieces in a corpus of few files, so that the held-out share is near its goal.
const PIECES_AIM: u64 = 128;
// With fewer files than this the held-out split takes pieces of files rather than files.
const FILES_FOR_WHOLE_FILE_SPLIT: usize = 50;

impl Corpus {
    /// Lists a text file, or every text file below a folder in the order of their paths.
    ///
    /// Hidden files and links are left out, and so are files that are not UTF-8. `budget_bytes`
    /// caps the whole corpus; a single file is cut off there.
    ///
    /// # Errors
    /// [`CorpusError::Read`] and [`CorpusError::Empty`].
    pub fn from_path(path: &Path, budget_bytes: u64) -> Result<Self, CorpusError> {
        folder::list(path, budget_bytes).map(Self::new)
    }

    /// Lists the Rust source of the crates that a `Cargo.lock` pins, from the local registry.
    ///
    /// # Errors
    /// [`CorpusError`]; [`CorpusError::Empty`] names the registry and what fills it.
    pub fn from_cargo(source: &CargoSource) -> Result<Self, CorpusError> {
        source.list().map(Self::new)
    }

    fn new((files, summary): (Vec<SourceFile>, CorpusSummary)) -> Self {
        let piece_bytes = if files.len() >= FILES_FOR_WHOLE_FILE_SPLIT {
            PIECE_BYTES_MAX
        } else {
            usize::try_from(summary.bytes / PIECES_AIM)
                .unwrap_or(PIECE_BYTES_MAX)
                .clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX)
        };
        Self { files, summary, piece_bytes }
    }

    /// Returns what the corpus is made of.
    #[must_use]
    pub fn summary(&self) -> &CorpusSummary {
        &self.summary
    }

    /// Returns the number of files.
    #[must_use]
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// Reads file `index` as documents of bounded size.
    ///
    /// # Errors
    /// [`CorpusError::Read`], also when the file is no longer the text that was listed.
    pub fn read(&self, index: usize) -> Result<Vec<Document>, CorpusError> {
        let file = &self.files[index];
        let text = read_text(&file.path, file.bytes)?.ok_or_else(|| CorpusError::Read {
            path: file.path.clone(),
            source: io::Error::new(
                io::ErrorKind::InvalidData,
                "it changed and is no longer UTF-8 text",
            ),
        })?;
        Ok(pieces(&file.name, text, self.piece_bytes))
    }

    /// Returns the name by which a document is held out: its file's where there are many files,
    /// so that no file is on both sides, and its own otherwise.
    pub(crate) fn split_key<'a>(&self, document: &'a Document) -> &'a str {
        if self.splits_by_file() {
            document.name.rsplit_once('#').map_or(document.name.as_str(), |(file, _)| file)
        } else {
            &document.name
        }
    }

    /// Returns the key that all documents of a file share; none when each has its own.
    pub(crate) fn whole_file_key(&self, index: usize) -> Option<&str> {
        self.splits_by_file().then(|| self.files[index].name.as_str())
    }

    fn splits_by_file(&self) -> bool {
        self.files.len() >= FILES_FOR_WHOLE_FILE_SPLIT
    }
}

/// Reads at most `limit` bytes of a file; none when that is not UTF-8 text.
fn read_text(path: &Path, limit: u64) -> Result<Option<String>, CorpusError> {
    use std::io::Read;
    let failed = |source| CorpusError::Read { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    let cut = bytes.len() as u64 == limit;
    match String::from_utf8(bytes) {
        Ok(text) => Ok((!text.contains('\0')).then_some(text)),
        // The limit may fall within a character.
        Err(e) if cut && e.utf8_error().error_len().is_none() => {
            let end = e.utf8_error().valid_up_to();
            let mut bytes = e.into_bytes();
            bytes.truncate(end);
            Ok(String::from_utf8(bytes).ok().filter(|text| !text.contains('\0')))
        }
        Err(_) => Ok(None),
    }
}

/// Returns the greatest place of at most `at` that is between two characters.
fn char_floor(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// Cuts a text into pieces of about `size` bytes, after a blank line where there is one in the
/// second half, otherwise after a line, otherwise between two characters.
fn pieces(name: &str, text: String, size: usize) -> Vec<Document> {
    let document = |number: usize, text: String, ends_file| Document {
        name: format!("{name}#{number}"),
        text,
        ends_file,
    };
    // A last piece of less than half the size joins its predecessor.
    if text.len() <= size + size / 2 {
        return vec![document(0, text, true)];
    }
    let mut out = Vec::new();
    let mut rest = text.as_str();
    while rest.len() > size + size / 2 {
        let window = &rest[..char_floor(rest, size)];
        let half = window.len() / 2;
        let cut = match (window.rfind("\n\n"), window.rfind('\n')) {
            (Some(at), _) if at + 2 > half => at + 2,
            (_, Some(at)) if at + 1 > half => at + 1,
            _ => window.len(),
        };
        out.push(document(out.len(), rest[..cut].to_owned(), false));
        rest = &rest[cut..];
    }
    out.push(document(out.len(), rest.to_owned(), true));
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_put_together_are_the_text(text in "[a-zé\n ]{0,3000}", size in 256usize..700) {
            let pieces = pieces("f", text.clone(), size);
            let joined: String = pieces.iter().map(|p| p.text.as_str()).collect();
            prop_assert_eq!(joined, text);
            prop_assert!(pieces.iter().all(|p| p.text.len() <= size + size / 2));
            prop_assert_eq!(pieces.iter().filter(|p| p.ends_file).count(), 1);
            prop_assert!(pieces.last().unwrap().ends_file);
        }
    }

    #[test]
    fn a_limit_within_a_character_cuts_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t");
        fs::write(&path, "abé").unwrap();
        assert_eq!(read_text(&path, 3).unwrap().as_deref(), Some("ab"));
        assert_eq!(read_text(&path, 4).unwrap().as_deref(), Some("abé"));
        fs::write(&path, b"ab\xFF\xFE").unwrap();
        assert_eq!(read_text(&path, 100).unwrap(), None);
        fs::write(&path, b"ab\0c").unwrap();
        assert_eq!(read_text(&path, 100).unwrap(), None);
    }
}
