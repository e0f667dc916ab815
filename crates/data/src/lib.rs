//! From text to batches: corpora, byte-level BPE tokenizers, token shards, resumable batches.
//!
//! The flow: a [`Corpus`] lists text files in a fixed order; [`build`] trains a [`Tokenizer`] on a
//! bounded sample of it, writes token shards and, last, `dataset.json`; [`Dataset`] maps the
//! shards into memory; [`Batches`] turns (step, data rank, micro-batch) into tokens and targets
//! without any state. Serving uses [`Tokenizer`] and [`IncrementalDecoder`] alone.
//!
//! Resuming is exact by construction: a batch is a pure function of the dataset, the seed and the
//! step, so the only cursor that a checkpoint needs is the step. The dataset's
//! [`fingerprint`](Manifest::fingerprint) tells whether it is still the same data.
//!
//! Every step of a build is deterministic: the same files and options give the same bytes.

pub mod batches;
pub mod build;
pub mod corpus;
pub mod dataset;
pub mod durable;
pub mod incremental;
mod map;
pub mod permutation;
pub mod shard;
pub mod tokenizer;
mod words;

pub use batches::{Batch, BatchError, BatchShape, Batches};
pub use build::{BuildError, BuildOptions, Progress, Stage, build};
pub use corpus::{Corpus, CorpusError};
pub use dataset::{Dataset, DatasetError, Manifest, Split};
pub use incremental::IncrementalDecoder;
pub use tokenizer::{END_OF_TEXT, Tokenizer, TokenizerError};
