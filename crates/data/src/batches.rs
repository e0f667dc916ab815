//! Batches as a pure function of dataset, seed and step.
//!
//! The training tokens are cut into windows of `sequence` tokens, each with the token after it as
//! the last target. An epoch visits every window once, in an order drawn from the seed and the
//! epoch's number. Global sample `g` of the run is window `order(epoch, g mod windows)`; step `s`
//! takes samples `s * global_batch ..`, and data rank `d` the `d`-th equal part of them.
//!
//! So the global batch of a step is the same under any data-parallel split and micro-batch size,
//! and there is no state to save: a run that resumes at step `s` asks for step `s`.

use std::sync::Arc;

use drumline_spec::TrainingJob;

use crate::dataset::{Dataset, Split};
use crate::permutation::Permutation;

/// Why there are no batches.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// The shape does not divide.
    #[error(
        "global batch {global_batch} is not divisible by data {data} x micro-batch {micro_batch}"
    )]
    Shape {
        /// Sequences in a step.
        global_batch: u32,
        /// Copies of the model.
        data: u32,
        /// Sequences in a forward pass.
        micro_batch: u32,
    },
    /// The split is too small for one sequence.
    #[error("the {split} split has {tokens} tokens, but one sequence needs {needed}")]
    TooFewTokens {
        /// `train` or `validation`.
        split: &'static str,
        /// Tokens there are.
        tokens: u64,
        /// Tokens that one sequence and its last target need.
        needed: u64,
    },
    /// The dataset's vocabulary is larger than the model's.
    #[error("the dataset has token ids up to {dataset}, the model's vocabulary only {model}")]
    Vocabulary {
        /// The dataset's vocabulary.
        dataset: u32,
        /// The model's.
        model: u32,
    },
    /// A place outside the split or the step was asked for.
    #[error("{what} {index} does not exist, there are {count}")]
    OutOfRange {
        /// What was asked for.
        what: &'static str,
        /// Which.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// A shard holds an id that its vocabulary does not.
    #[error("token id {id} is not in the vocabulary of {vocab}")]
    ForeignToken {
        /// The id.
        id: u32,
        /// The vocabulary's size.
        vocab: u32,
    },
}

/// How steps are cut into batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShape {
    /// Tokens in one sequence, T.
    pub sequence: u32,
    /// Sequences in one forward pass of one rank, B.
    pub micro_batch: u32,
    /// Sequences in one step, over all ranks.
    pub global_batch: u32,
    /// Copies of the model that share the step's sequences.
    pub data: u32,
}

impl From<&TrainingJob> for BatchShape {
    fn from(job: &TrainingJob) -> Self {
        Self {
            sequence: job.sequence,
            micro_batch: job.micro_batch,
            global_batch: job.global_batch,
            data: job.parallelism.data,
        }
    }
}

/// Tokens and what should follow each of them, both `[rows, sequence]`, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Number of sequences, B.
    pub rows: usize,
    /// Tokens in each, T.
    pub sequence: usize,
    /// The input tokens.
    pub tokens: Vec<u32>,
    /// The token after each of them.
    pub targets: Vec<u32>,
}

/// Batches of one dataset. Cheap to clone, shared between threads by reference.
#[derive(Debug, Clone)]
pub struct Batches {
    dataset: Arc<Dataset>,
    shape: BatchShape,
    seed: u64,
    windows: u64,
    validation_windows: u64,
}

impl Batches {
    /// Prepares the batches of a shape.
    ///
    /// # Errors
    /// [`BatchError::Shape`] and [`BatchError::TooFewTokens`].
    pub fn new(dataset: Arc<Dataset>, shape: BatchShape, seed: u64) -> Result<Self, BatchError> {
        let BatchShape { sequence, micro_batch, global_batch, data } = shape;
        let parts = data.checked_mul(micro_batch).filter(|parts| *parts > 0);
        if global_batch == 0 || parts.is_none_or(|parts| !global_batch.is_multiple_of(parts)) {
            return Err(BatchError::Shape { global_batch, data, micro_batch });
        }
        let windows = |split| {
            let tokens = dataset.tokens(split).len();
            tokens.saturating_sub(1) / u64::from(sequence.max(1))
        };
        if sequence == 0 || windows(Split::Train) == 0 {
            return Err(BatchError::TooFewTokens {
                split: Split::Train.as_str(),
                tokens: dataset.tokens(Split::Train).len(),
                needed: u64::from(sequence) + 1,
            });
        }
        Ok(Self {
            windows: windows(Split::Train),
            validation_windows: windows(Split::Validation),
            dataset,
            shape,
            seed,
        })
    }

    /// Prepares the batches of a training job, and checks that the model knows every token.
    ///
    /// # Errors
    /// As [`Batches::new`], and [`BatchError::Vocabulary`].
    pub fn of_job(dataset: Arc<Dataset>, job: &TrainingJob) -> Result<Self, BatchError> {
        let vocab = dataset.manifest().tokenizer.vocab;
        if vocab > job.model.vocab {
            return Err(BatchError::Vocabulary { dataset: vocab, model: job.model.vocab });
        }
        Self::new(dataset, job.into(), job.seed)
    }

    /// Returns the dataset.
    #[must_use]
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// Returns the number of training windows: sequences in one epoch.
    #[must_use]
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// Returns the number of forward passes that one rank makes in one step.
    #[must_use]
    pub fn micro_batches(&self) -> u32 {
        self.shape.global_batch / (self.shape.data * self.shape.micro_batch)
    }

    /// Returns the epoch that a step's first sequence belongs to, from 0.
    #[must_use]
    pub fn epoch(&self, step: u64) -> u64 {
        step.saturating_mul(u64::from(self.shape.global_batch)) / self.windows
    }

    /// Returns micro-batch `micro` of data rank `data_rank` in step `step`, all counted from 0.
    /// Its rows are `micro_batch`. Every rank of a tensor or pipeline group asks with the same
    /// `data_rank` and gets the same batch.
    ///
    /// # Errors
    /// [`BatchError::OutOfRange`], [`BatchError::ForeignToken`].
    pub fn batch(&self, step: u64, data_rank: u32, micro: u32) -> Result<Batch, BatchError> {
        let per_rank = self.shape.global_batch / self.shape.data;
        check("data rank", data_rank.into(), self.shape.data.into())?;
        check("micro-batch", micro.into(), self.micro_batches().into())?;
        let first = u64::from(data_rank * per_rank + micro * self.shape.micro_batch);
        let step_limit = u64::MAX / u64::from(self.shape.global_batch) - 1;
        check("step", step, step_limit)?;
        let start = step * u64::from(self.shape.global_batch) + first;
        let mut rows = Rows::new(self, Split::Train, self.shape.micro_batch);
        let mut order: Option<(u64, Permutation)> = None;
        for sample in start..start + u64::from(self.shape.micro_batch) {
            let epoch = sample / self.windows;
            let permutation = match order {
                Some((of, permutation)) if of == epoch => permutation,
                _ => Permutation::new(self.windows, self.seed, epoch),
            };
            order = Some((epoch, permutation));
            let within = sample % self.windows;
            let window = permutation.get(within).ok_or(BatchError::OutOfRange {
                what: "window",
                index: within,
                count: self.windows,
            })?;
            rows.push(window)?;
        }
        Ok(rows.batch)
    }

    /// Returns the number of held-out sequences.
    #[must_use]
    pub fn validation_sequences(&self) -> u64 {
        self.validation_windows
    }

    /// Returns held-out sequences `first..first + rows`, in the order of the text. They are the
    /// same under any split and seed.
    ///
    /// # Errors
    /// [`BatchError::OutOfRange`] beyond [`Batches::validation_sequences`];
    /// [`BatchError::TooFewTokens`] when there are none.
    pub fn validation(&self, first: u64, rows: u32) -> Result<Batch, BatchError> {
        if self.validation_windows == 0 {
            return Err(BatchError::TooFewTokens {
                split: Split::Validation.as_str(),
                tokens: self.dataset.tokens(Split::Validation).len(),
                needed: u64::from(self.shape.sequence) + 1,
            });
        }
        let last = first.saturating_add(rows.saturating_sub(1).into());
        check("held-out sequence", last, self.validation_windows)?;
        let mut out = Rows::new(self, Split::Validation, rows);
        for window in first..first + u64::from(rows) {
            out.push(window)?;
        }
        Ok(out.batch)
    }
}

fn check(what: &'static str, index: u64, count: u64) -> Result<(), BatchError> {
    if index < count { Ok(()) } else { Err(BatchError::OutOfRange { what, index, count }) }
}

struct Rows<'a> {
    batches: &'a Batches,
    split: Split,
    window: Vec<u32>,
    batch: Batch,
}

impl<'a> Rows<'a> {
    fn new(batches: &'a Batches, split: Split, rows: u32) -> Self {
        let (rows, sequence) = (rows as usize, batches.shape.sequence as usize);
        Self {
            batches,
            split,
            window: Vec::with_capacity(sequence + 1),
            batch: Batch {
                rows,
                sequence,
                tokens: Vec::with_capacity(rows * sequence),
                targets: Vec::with_capacity(rows * sequence),
            },
        }
    }

    fn push(&mut self, window: u64) -> Result<(), BatchError> {
        let sequence = self.batch.sequence;
        let tokens = self.batches.dataset.tokens(self.split);
        self.window.clear();
        if !tokens.extend(window * sequence as u64, sequence + 1, &mut self.window) {
            return Err(BatchError::OutOfRange {
                what: "window",
                index: window,
                count: tokens.len().saturating_sub(1) / sequence as u64,
            });
        }
        let vocab = self.batches.dataset.manifest().tokenizer.vocab;
        if let Some(id) = self.window.iter().copied().find(|id| *id >= vocab) {
            return Err(BatchError::ForeignToken { id, vocab });
        }
        self.batch.tokens.extend(&self.window[..sequence]);
        self.batch.targets.extend(&self.window[1..]);
        Ok(())
    }
}
