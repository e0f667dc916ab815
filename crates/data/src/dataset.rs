//! A built dataset: `dataset.json`, its tokenizer and its token shards, mapped into memory.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::corpus::CorpusSummary;
use crate::shard::{Shard, ShardEntry, ShardError, TokenWidth, hex};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// The manifest's file name. The dataset exists when this file does.
pub const MANIFEST_FILE: &str = "dataset.json";
/// The tokenizer's file name.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The version of `dataset.json` that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Why a dataset was refused.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// There is no dataset.
    #[error(
        "no dataset in {folder}: {MANIFEST_FILE} is missing; build one with `drumline data build`"
    )]
    Missing {
        /// The folder.
        folder: PathBuf,
    },
    /// The manifest could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The manifest is not one, or contradicts itself.
    #[error("{path} is damaged: {message}")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A shard was refused.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The tokenizer was refused.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Which part of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is held out.
    Validation,
}

impl Split {
    /// Returns the word used in file names.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }
}

/// One split, as the manifest lists it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitEntry {
    /// Number of documents.
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Number of tokens, ends of text included.
    pub tokens: u64,
    /// The shards, in order.
    pub shards: Vec<ShardEntry>,
}

/// The tokenizer, as the manifest lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerEntry {
    /// File name within the dataset's folder.
    pub file: String,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// One more than the greatest token id.
    pub vocab: u32,
    /// The token that follows every file's end.
    pub end_of_text: u32,
}

/// `dataset.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// What the text was.
    pub source: CorpusSummary,
    /// The tokenizer.
    pub tokenizer: TokenizerEntry,
    /// Width of a token on disk.
    pub token_width: TokenWidth,
    /// What is trained on.
    pub train: SplitEntry,
    /// What is held out.
    pub validation: SplitEntry,
    /// SHA-256 over the tokenizer and all shards, in hexadecimal: the same fingerprint, the same
    /// tokens in the same order. A checkpoint records it.
    pub fingerprint: String,
}

impl Manifest {
    /// Returns a split's entry.
    #[must_use]
    pub fn split(&self, split: Split) -> &SplitEntry {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    pub(crate) fn compute_fingerprint(&self) -> String {
        let mut sha = Sha256::new();
        sha.update(&self.tokenizer.sha256);
        for split in [&self.train, &self.validation] {
            sha.update((split.shards.len() as u64).to_le_bytes());
            for shard in &split.shards {
                sha.update(shard.tokens.to_le_bytes());
                sha.update(&shard.sha256);
            }
        }
        hex(&sha.finalize())
    }
}

/// A dataset, open for reading. Shared between threads by reference.
#[derive(Debug)]
pub struct Dataset {
    folder: PathBuf,
    manifest: Manifest,
    train: Tokens,
    validation: Tokens,
}

impl Dataset {
    /// Opens the dataset in `folder` and checks every shard against its checksum.
    ///
    /// # Errors
    /// [`DatasetError`], which names the file that is missing or damaged.
    pub fn open(folder: &Path) -> Result<Self, DatasetError> {
        let manifest = read_manifest(folder)?;
        let map = |entry: &SplitEntry| Tokens::open(folder, entry);
        Ok(Self {
            train: map(&manifest.train)?,
            validation: map(&manifest.validation)?,
            folder: folder.to_owned(),
            manifest,
        })
    }

    /// Returns the manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the path of the tokenizer's file.
    #[must_use]
    pub fn tokenizer_path(&self) -> PathBuf {
        self.folder.join(&self.manifest.tokenizer.file)
    }

    /// Reads the tokenizer.
    ///
    /// # Errors
    /// [`DatasetError::Tokenizer`], also when it is not the one that the tokens were made with.
    pub fn tokenizer(&self) -> Result<Tokenizer, DatasetError> {
        let path = self.tokenizer_path();
        let json =
            fs::read(&path).map_err(|source| DatasetError::Io { path: path.clone(), source })?;
        if hex(&Sha256::digest(&json)) != self.manifest.tokenizer.sha256 {
            return Err(DatasetError::Tokenizer(TokenizerError::Format {
                path,
                message: "its checksum is not the one in dataset.json".to_owned(),
            }));
        }
        Ok(Tokenizer::from_json(&path, &json)?)
    }

    /// Returns the tokens of a split.
    #[must_use]
    pub fn tokens(&self, split: Split) -> &Tokens {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }
}

fn read_manifest(folder: &Path) -> Result<Manifest, DatasetError> {
    let path = folder.join(MANIFEST_FILE);
    let text = fs::read(&path).map_err(|source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            DatasetError::Missing { folder: folder.to_owned() }
        } else {
            DatasetError::Io { path: path.clone(), source }
        }
    })?;
    let damaged = |message| DatasetError::Manifest { path: path.clone(), message };
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
    if manifest.format_version != FORMAT_VERSION {
        return Err(damaged(format!(
            "format version {}, expected {FORMAT_VERSION}",
            manifest.format_version
        )));
    }
    for split in [Split::Train, Split::Validation] {
        let entry = manifest.split(split);
        let listed = entry.shards.iter().try_fold(0u64, |sum, shard| sum.checked_add(shard.tokens));
        if listed != Some(entry.tokens) {
            return Err(damaged(format!(
                "{} says {} tokens, its shards hold {listed:?}",
                split.as_str(),
                entry.tokens
            )));
        }
        let inside = |file: &str| Path::new(file).components().count() == 1 && file != "..";
        if let Some(shard) = entry.shards.iter().find(|s| !inside(&s.file)) {
            return Err(damaged(format!("shard {} is not in the folder", shard.file)));
        }
    }
    if manifest.fingerprint != manifest.compute_fingerprint() {
        return Err(damaged("its fingerprint is not that of its entries".to_owned()));
    }
    Ok(manifest)
}

/// The tokens of one split: its shards, end to end.
#[derive(Debug)]
pub struct Tokens {
    shards: Vec<Shard>,
    // Where each shard begins.
    starts: Vec<u64>,
    total: u64,
}

impl Tokens {
    fn open(folder: &Path, entry: &SplitEntry) -> Result<Self, ShardError> {
        let mut tokens = Self {
            shards: Vec::with_capacity(entry.shards.len()),
            starts: Vec::with_capacity(entry.shards.len()),
            total: 0,
        };
        for shard in &entry.shards {
            tokens.starts.push(tokens.total);
            tokens.total += shard.tokens;
            tokens.shards.push(Shard::open(folder, shard)?);
        }
        Ok(tokens)
    }

    /// Returns the number of tokens.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.total
    }

    /// Returns whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Appends tokens `start..start + count` to `out`; false, and nothing appended, when they do
    /// not all exist.
    pub fn extend(&self, start: u64, count: usize, out: &mut Vec<u32>) -> bool {
        let Some(end) = start.checked_add(count as u64).filter(|end| *end <= self.total) else {
            return false;
        };
        let mut at = start;
        let mut shard = self.starts.partition_point(|s| *s <= at).saturating_sub(1);
        while at < end {
            let inner = at - self.starts[shard];
            let here = (self.shards[shard].tokens() - inner).min(end - at);
            // Both are bounded by the length of a mapped file.
            self.shards[shard].extend(inner as usize, here as usize, out);
            at += here;
            shard += 1;
        }
        true
    }
}
