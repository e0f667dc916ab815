//! Builds a dataset: a tokenizer from a sample, then token shards, then the manifest.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::corpus::{Corpus, CorpusError, Document};
use crate::dataset::{
    DatasetError, FORMAT_VERSION, MANIFEST_FILE, Manifest, Split, SplitEntry, TOKENIZER_FILE,
    TokenizerEntry,
};
use crate::durable;
use crate::permutation::mix;
use crate::shard::{ShardError, ShardWriter, TokenWidth, hex};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::words::WordCache;

/// Why a dataset could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The text.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A token shard.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The folder.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// What was built does not open.
    #[error("the dataset that was just built does not open: {0}")]
    Check(#[from] DatasetError),
    /// The options make no sense.
    #[error("{option} must be {expected}, got {got}")]
    Option {
        /// The option.
        option: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it was.
        got: String,
    },
}

/// How a dataset is built.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Size of the vocabulary asked for, at least [`crate::tokenizer::VOCAB_MIN`]; a small text
    /// ends with fewer.
    pub vocab: u32,
    /// Bytes of text that the tokenizer is trained on, about; drawn evenly over the documents.
    pub sample_bytes: u64,
    /// Share of the documents that is held out, 0 to 0.5; at least one document where there are
    /// two.
    pub held_out: f64,
    /// Greatest number of tokens in a shard, about.
    pub shard_tokens: u64,
    /// A tokenizer to use instead of training one.
    pub tokenizer: Option<PathBuf>,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            vocab: 8192,
            sample_bytes: 4 << 20,
            held_out: 0.02,
            shard_tokens: 64 << 20,
            tokenizer: None,
        }
    }
}

/// What a build is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Training the tokenizer.
    Tokenizer,
    /// Encoding documents.
    Encode,
    /// Making it durable.
    Commit,
}

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// Bytes of text that this stage has done.
    pub bytes: u64,
    /// Bytes of text that this stage has to do.
    pub total_bytes: u64,
}

// Text that is in memory at once while encoding, beyond one file: enough work for many cores.
const ENCODE_BYTES: usize = 4 << 20;

/// Builds the dataset of `corpus` in `folder`, which is made if it is missing.
///
/// An earlier dataset in the folder stops existing at once and is replaced. The new one exists
/// once its manifest is there, which comes last. The same corpus and options give the same bytes.
///
/// # Errors
/// [`BuildError`]; the folder then holds no dataset.
pub fn build(
    corpus: &Corpus,
    folder: &Path,
    options: &BuildOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Manifest, BuildError> {
    if !(0.0..=0.5).contains(&options.held_out) {
        return Err(BuildError::Option {
            option: "held_out",
            expected: "between 0 and 0.5",
            got: options.held_out.to_string(),
        });
    }
    fs::create_dir_all(folder).map_err(io_error(folder))?;
    let manifest_path = folder.join(MANIFEST_FILE);
    match fs::remove_file(&manifest_path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(io_error(&manifest_path)(e));
        }
        _ => {}
    }
    let held_out = HeldOut::choose(corpus, options.held_out)?;
    let total_bytes = corpus.summary().bytes;
    progress(Progress {
        stage: Stage::Tokenizer,
        bytes: 0,
        total_bytes: total_bytes.min(options.sample_bytes),
    });
    let tokenizer = match &options.tokenizer {
        Some(path) => Tokenizer::open(path)?,
        None => train_tokenizer(corpus, &held_out, options)?,
    };
    let json = tokenizer.to_json()?;
    let tokenizer_path = folder.join(TOKENIZER_FILE);
    durable::write_file(&tokenizer_path, json.as_bytes()).map_err(io_error(&tokenizer_path))?;
    let end_of_text = tokenizer.end_of_text().ok_or_else(|| TokenizerError::Format {
        path: tokenizer_path,
        message: "it has no token that ends a text".to_owned(),
    })?;
    let entry = TokenizerEntry {
        file: TOKENIZER_FILE.to_owned(),
        sha256: hex(&Sha256::digest(json.as_bytes())),
        vocab: tokenizer.vocab(),
        end_of_text,
    };

    let mut encoder = Encoder {
        corpus,
        tokenizer: &tokenizer,
        end_of_text,
        held_out: &held_out,
        train: Writer::new(folder, Split::Train, entry.vocab, options.shard_tokens),
        validation: Writer::new(folder, Split::Validation, entry.vocab, options.shard_tokens),
        caches: Mutex::new(Vec::new()),
    };
    let mut done = 0;
    let mut waiting: Vec<Document> = Vec::new();
    let mut waiting_bytes = 0;
    let mut report = |bytes| progress(Progress { stage: Stage::Encode, bytes, total_bytes });
    report(0);
    for file in 0..corpus.files() {
        for document in corpus.read(file)? {
            waiting_bytes += document.text.len();
            waiting.push(document);
            if waiting_bytes >= ENCODE_BYTES {
                encoder.encode(&waiting)?;
                waiting.clear();
                done += waiting_bytes as u64;
                waiting_bytes = 0;
                report(done);
            }
        }
    }
    encoder.encode(&waiting)?;
    report(done + waiting_bytes as u64);
    progress(Progress { stage: Stage::Commit, bytes: total_bytes, total_bytes });
    let mut manifest = Manifest {
        format_version: FORMAT_VERSION,
        source: corpus.summary().clone(),
        token_width: TokenWidth::of_vocab(entry.vocab),
        tokenizer: entry,
        train: encoder.train.finish()?,
        validation: encoder.validation.finish()?,
        fingerprint: String::new(),
    };
    manifest.fingerprint = manifest.compute_fingerprint();
    remove_old_shards(folder, &manifest).map_err(io_error(folder))?;
    let mut text = serde_json::to_vec_pretty(&manifest)
        .map_err(|e| BuildError::Io { path: manifest_path.clone(), source: e.into() })?;
    text.push(b'\n');
    durable::write_file(&manifest_path, &text).map_err(io_error(&manifest_path))?;
    Ok(manifest)
}

/// Which documents are held out: those with the lowest hashes of their names, so that a document
/// stays on its side when others come or go (all but the few at the edge).
struct HeldOut {
    below: u64,
}

impl HeldOut {
    fn choose(corpus: &Corpus, share: f64) -> Result<Self, BuildError> {
        let mut hashes = Vec::new();
        for file in 0..corpus.files() {
            match corpus.whole_file_key(file) {
                Some(name) => hashes.push(hash(name)),
                None => hashes.extend(corpus.read(file)?.iter().map(|d| hash(&d.name))),
            }
        }
        hashes.sort_unstable();
        let wanted = (hashes.len() as f64 * share).round() as usize;
        let count = if share > 0.0 && hashes.len() > 1 { wanted.max(1) } else { 0 };
        Ok(Self { below: hashes.get(count).copied().unwrap_or(0) })
    }

    fn holds(&self, corpus: &Corpus, document: &Document) -> bool {
        hash(corpus.split_key(document)) < self.below
    }
}

/// FNV-1a and a finaliser: the same on every machine and in every version.
fn hash(name: &str) -> u64 {
    mix(name.bytes().fold(0xCBF2_9CE4_8422_2325, |h, byte| {
        (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    }))
}

fn train_tokenizer(
    corpus: &Corpus,
    held_out: &HeldOut,
    options: &BuildOptions,
) -> Result<Tokenizer, BuildError> {
    let total = corpus.summary().bytes.max(1);
    // Another hash than the held-out one, which would leave out the lowest.
    let share = options.sample_bytes as f64 / total as f64;
    let drawn = |name: &str| (mix(hash(name) ^ 0x5A5A) as f64 / u64::MAX as f64) < share;
    let mut sample = Vec::new();
    for file in 0..corpus.files() {
        // A file's documents share its draw where the split is by file, which saves reading it.
        if corpus.whole_file_key(file).is_some_and(|name| !drawn(name)) {
            continue;
        }
        for document in corpus.read(file)? {
            if !held_out.holds(corpus, &document) && drawn(corpus.split_key(&document)) {
                sample.push(document.text);
            }
        }
    }
    if sample.is_empty() {
        // A corpus of very few documents: take the first.
        sample.extend(corpus.read(0)?.into_iter().take(1).map(|d| d.text));
    }
    let texts: Vec<&str> = sample.iter().map(String::as_str).collect();
    Ok(Tokenizer::train(&texts, options.vocab)?)
}

struct Encoder<'a> {
    corpus: &'a Corpus,
    tokenizer: &'a Tokenizer,
    end_of_text: u32,
    held_out: &'a HeldOut,
    train: Writer,
    validation: Writer,
    // As many as threads encode at once; each document borrows one.
    caches: Mutex<Vec<WordCache>>,
}

impl Encoder<'_> {
    fn take_cache(&self) -> WordCache {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn encode(&mut self, documents: &[Document]) -> Result<(), BuildError> {
        let encoded = documents
            .par_iter()
            .map(|document| {
                let mut cache = self.take_cache();
                let ids = self.tokenizer.encode_cached(&document.text, &mut cache);
                self.caches.lock().unwrap_or_else(PoisonError::into_inner).push(cache);
                let mut ids = ids?;
                if document.ends_file {
                    ids.push(self.end_of_text);
                }
                Ok(ids)
            })
            .collect::<Result<Vec<_>, TokenizerError>>()?;
        for (document, ids) in documents.iter().zip(encoded) {
            let writer = if self.held_out.holds(self.corpus, document) {
                &mut self.validation
            } else {
                &mut self.train
            };
            writer.append(document.text.len() as u64, &ids)?;
        }
        Ok(())
    }
}

/// Writes the shards of one split.
struct Writer {
    folder: PathBuf,
    split: Split,
    width: TokenWidth,
    shard_tokens: u64,
    open: Option<ShardWriter>,
    entry: SplitEntry,
}

impl Writer {
    fn new(folder: &Path, split: Split, vocab: u32, shard_tokens: u64) -> Self {
        Self {
            folder: folder.to_owned(),
            split,
            width: TokenWidth::of_vocab(vocab),
            shard_tokens: shard_tokens.max(1),
            open: None,
            entry: SplitEntry::default(),
        }
    }

    fn append(&mut self, bytes: u64, ids: &[u32]) -> Result<(), ShardError> {
        if self.open.as_ref().is_some_and(|s| s.tokens() >= self.shard_tokens) {
            self.close()?;
        }
        let shard = match &mut self.open {
            Some(shard) => shard,
            None => {
                let number = self.entry.shards.len();
                let name = format!("{}-{number:05}.tokens", self.split.as_str());
                self.open.insert(ShardWriter::create(self.folder.join(name), self.width)?)
            }
        };
        shard.append(ids)?;
        self.entry.documents += 1;
        self.entry.bytes += bytes;
        Ok(())
    }

    fn close(&mut self) -> Result<(), ShardError> {
        if let Some(shard) = self.open.take() {
            let shard = shard.commit()?;
            self.entry.tokens += shard.tokens;
            self.entry.shards.push(shard);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<SplitEntry, ShardError> {
        self.close()?;
        Ok(self.entry)
    }
}

/// Removes the shards of an earlier dataset that had more of them.
fn remove_old_shards(folder: &Path, manifest: &Manifest) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let ours = [Split::Train, Split::Validation].iter().any(|split| {
            name.strip_prefix(split.as_str())
                .and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".tokens"))
                .is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()))
        });
        let listed = [&manifest.train, &manifest.validation]
            .iter()
            .any(|split| split.shards.iter().any(|shard| shard.file == name));
        if ours && !listed {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn io_error(path: &Path) -> impl Fn(std::io::Error) -> BuildError + use<> {
    let path = path.to_owned();
    move |source| BuildError::Io { path: path.clone(), source }
}
