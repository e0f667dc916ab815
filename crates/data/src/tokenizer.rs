//! Byte-level BPE: training, loading, encoding and decoding.
//!
//! The file format is Hugging Face's `tokenizer.json`, so that every tool of the field reads it.
//! Chat templates belong to the gateway.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, Model, ModelWrapper, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, PreTokenizerWrapper, TokenizerImpl, Trainer,
};

use crate::incremental::{ByteTable, IncrementalDecoder};
use crate::words::{self, WordCache};

/// The special token that ends a document, as GPT-2 has it.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The least vocabulary of a byte-level tokenizer: every byte, and the end of text.
pub const VOCAB_MIN: u32 = 257;

// What other families call the end of a text, in the order they are looked for.
const END_NAMES: [&str; 5] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<|eot_id|>", "<eos>"];

// Normalizer, pre-tokenizer, post-processor and decoder; there is no normalizer.
type ByteLevelBpe =
    TokenizerImpl<BPE, tokenizers::NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>;

/// Why a tokenizer could not be trained, read or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not a tokenizer.
    #[error("{path} is not a tokenizer: {message}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The vocabulary is smaller than the bytes.
    #[error(
        "a byte-level vocabulary has at least {VOCAB_MIN} tokens (256 bytes and the end of text), got {got}"
    )]
    VocabTooSmall {
        /// The size that was asked for.
        got: u32,
    },
    /// The library refused.
    #[error("failed to {op}: {message}")]
    Library {
        /// What was tried.
        op: &'static str,
        /// Its reason.
        message: String,
    },
}

/// A tokenizer, ready to encode and decode. Shared between threads by reference.
#[derive(Debug)]
pub struct Tokenizer {
    // Takes the words of special tokens in a text for text.
    plain: tokenizers::Tokenizer,
    // Takes them for special tokens; made when first needed.
    special: OnceLock<tokenizers::Tokenizer>,
    // The bytes of each token, where the decoder is byte-level.
    bytes: Option<ByteTable>,
    // Whether words of ASCII can be cut and looked up without the library.
    cuts_as_gpt2: bool,
}

impl Tokenizer {
    /// Trains a byte-level BPE of at most `vocab` tokens; [`END_OF_TEXT`] is token 0.
    ///
    /// A small text has fewer pairs worth merging: ask [`Tokenizer::vocab`] what became of it.
    /// The same texts in any order give the same tokenizer.
    ///
    /// # Errors
    /// [`TokenizerError::VocabTooSmall`], [`TokenizerError::Library`].
    pub fn train(texts: &[&str], vocab: u32) -> Result<Self, TokenizerError> {
        if vocab < VOCAB_MIN {
            return Err(TokenizerError::VocabTooSmall { got: vocab });
        }
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab as usize)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        let mut model = BPE::default();
        trainer
            .feed(texts.iter(), words_to_count)
            .and_then(|()| trainer.train(&mut model))
            .map_err(library("train a tokenizer"))?;
        let mut inner = ByteLevelBpe::new(model);
        inner
            .with_pre_tokenizer(Some(byte_level()))
            .with_post_processor(Some(ByteLevel::new(false, false, true)))
            .with_decoder(Some(byte_level()));
        inner.add_special_tokens(&[AddedToken::from(END_OF_TEXT, true)]);
        // Through its file form, so that a trained tokenizer and a loaded one are the same.
        let json = inner.to_string(false).map_err(library("write a tokenizer"))?;
        Self::from_json(Path::new("(just trained)"), json.as_bytes())
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Io`] and [`TokenizerError::Format`], with the path.
    pub fn open(path: &Path) -> Result<Self, TokenizerError> {
        let json = std::fs::read(path)
            .map_err(|source| TokenizerError::Io { path: path.to_owned(), source })?;
        Self::from_json(path, &json)
    }

    /// Reads a tokenizer from the bytes of a `tokenizer.json`; `path` names it in errors.
    ///
    /// # Errors
    /// [`TokenizerError::Format`].
    pub fn from_json(path: &Path, json: &[u8]) -> Result<Self, TokenizerError> {
        let mut plain = tokenizers::Tokenizer::from_bytes(json).map_err(|e| {
            TokenizerError::Format { path: path.to_owned(), message: e.to_string() }
        })?;
        plain.set_encode_special_tokens(true);
        let bytes = matches!(plain.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
            .then(|| ByteTable::new(&plain));
        let added = plain.get_added_tokens_decoder();
        let cuts_as_gpt2 = plain.get_normalizer().is_none()
            && plain.get_truncation().is_none()
            && plain.get_padding().is_none()
            && added.values().all(|token| token.special)
            && matches!(plain.get_model(), ModelWrapper::BPE(_))
            && matches!(
                plain.get_pre_tokenizer(),
                Some(PreTokenizerWrapper::ByteLevel(level))
                    if level.use_regex && !level.add_prefix_space
            );
        Ok(Self { plain, special: OnceLock::new(), bytes, cuts_as_gpt2 })
    }

    /// Returns the `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Library`].
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.plain.to_string(true).map_err(library("write a tokenizer"))
    }

    /// Returns one more than the greatest token id: the rows that an embedding needs.
    #[must_use]
    pub fn vocab(&self) -> u32 {
        let added = self.plain.get_added_tokens_decoder();
        let top_added = added.keys().max().map_or(0, |id| id + 1);
        let model = self.plain.get_model().get_vocab();
        let top_model = model.values().max().map_or(0, |id| id + 1);
        top_added.max(top_model)
    }

    /// Encodes text in which the words of special tokens mean nothing: what users write.
    ///
    /// # Errors
    /// [`TokenizerError::Library`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        encode(&self.plain, text)
    }

    /// Encodes as [`Tokenizer::encode`] does, with words that were seen before from memory.
    pub(crate) fn encode_cached(
        &self,
        text: &str,
        cache: &mut WordCache,
    ) -> Result<Vec<u32>, TokenizerError> {
        if self.cuts_as_gpt2 && text.is_ascii() {
            cache.encode(self.plain.get_model(), text)
        } else {
            self.encode(text)
        }
    }

    /// Encodes text in which special tokens are recognised: what a chat template wrote.
    ///
    /// # Errors
    /// [`TokenizerError::Library`].
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let special = self.special.get_or_init(|| {
            let mut special = self.plain.clone();
            special.set_encode_special_tokens(false);
            special
        });
        encode(special, text)
    }

    /// Decodes tokens, without special ones. Bytes that are not UTF-8 become U+FFFD, and ids
    /// outside the vocabulary nothing.
    ///
    /// # Errors
    /// [`TokenizerError::Library`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.plain.decode(ids, true).map_err(library("decode"))
    }

    /// Starts decoding a stream of tokens; the pieces put together are [`Tokenizer::decode`] of
    /// all tokens.
    #[must_use]
    pub fn incremental(&self) -> IncrementalDecoder<'_> {
        IncrementalDecoder::new(&self.plain, self.bytes.as_ref())
    }

    /// Returns the id of a token by its name, special or not.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.plain.token_to_id(token)
    }

    /// Returns the name of a token.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.plain.id_to_token(id)
    }

    /// Returns the id of the token that ends a text, under any of the names in use.
    #[must_use]
    pub fn end_of_text(&self) -> Option<u32> {
        END_NAMES.iter().find_map(|name| self.token_id(name))
    }
}

/// GPT-2's way to cut text into words and to write their bytes.
fn byte_level() -> ByteLevel {
    ByteLevel::new(false, true, true)
}

/// Cuts a text into the words that training counts, written in the vocabulary's alphabet.
fn words_to_count(text: &str) -> tokenizers::Result<Vec<String>> {
    if text.is_ascii() {
        let written = |word: &str| word.bytes().map(words::letter).collect();
        return Ok(words::split(text).map(written).collect());
    }
    let mut cut = PreTokenizedString::from(text);
    byte_level().pre_tokenize(&mut cut)?;
    let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).collect())
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    tokenizer
        .encode_fast(text, false)
        .map(|encoding| encoding.get_ids().to_vec())
        .map_err(library("encode"))
}

pub(crate) fn library(op: &'static str) -> impl Fn(tokenizers::Error) -> TokenizerError {
    move |e| TokenizerError::Library { op, message: e.to_string() }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn trained() -> &'static Tokenizer {
        static TRAINED: OnceLock<Tokenizer> = OnceLock::new();
        TRAINED.get_or_init(|| {
            let text = include_str!("tokenizer.rs");
            Tokenizer::train(&[text, "naïve café, 東京, 🦀🦀 Straße\n"], 600).unwrap()
        })
    }

    #[test]
    fn training_is_deterministic_and_its_file_reads_back() {
        let texts = [include_str!("tokenizer.rs"), include_str!("incremental.rs")];
        let json = Tokenizer::train(&texts, 800).unwrap().to_json().unwrap();
        for _ in 0..4 {
            let again = Tokenizer::train(&[texts[1], texts[0]], 800).unwrap();
            assert_eq!(again.to_json().unwrap(), json);
        }
        let read = Tokenizer::from_json(Path::new("t"), json.as_bytes()).unwrap();
        assert_eq!(read.vocab(), 800);
        assert_eq!(read.end_of_text(), Some(0));
        assert_eq!(read.to_json().unwrap(), json);
    }

    #[test]
    fn our_words_train_the_tokenizer_that_the_librarys_would() {
        let texts = [include_str!("tokenizer.rs"), include_str!("words.rs"), "naïve 東京  🦀\n"];
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(700)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        let mut theirs = ByteLevelBpe::new(BPE::default());
        theirs
            .with_pre_tokenizer(Some(byte_level()))
            .with_post_processor(Some(ByteLevel::new(false, false, true)))
            .with_decoder(Some(byte_level()));
        theirs.train(&mut trainer, texts.iter()).unwrap();
        let ours = Tokenizer::train(&texts, 700).unwrap();
        assert_eq!(ours.to_json().unwrap(), theirs.to_string(true).unwrap());
    }

    #[test]
    fn words_of_special_tokens_are_text_unless_a_template_wrote_them() {
        let tokenizer = trained();
        let text = format!("a{END_OF_TEXT}b");
        let plain = tokenizer.encode(&text).unwrap();
        assert!(!plain.contains(&0));
        assert_eq!(tokenizer.decode(&plain).unwrap(), text);
        let special = tokenizer.encode_with_special(&text).unwrap();
        assert_eq!(special.len(), 3);
        assert_eq!(special[1], 0);
        assert_eq!(tokenizer.decode(&special).unwrap(), "ab");
    }

    #[test]
    fn merges_shorten_the_text_they_were_trained_on() {
        let text = include_str!("tokenizer.rs");
        let ids = trained().encode(text).unwrap();
        assert!(ids.len() * 2 < text.len(), "{} tokens", ids.len());
    }

    #[test]
    fn wrong_input_is_refused_by_name() {
        let error = Tokenizer::train(&["x"], 100).unwrap_err().to_string();
        assert!(error.contains("257") && error.contains("100"), "{error}");
        let error = Tokenizer::from_json(Path::new("some.json"), b"{}").unwrap_err();
        assert!(error.to_string().contains("some.json"), "{error}");
        assert!(Tokenizer::open(Path::new("/nonexistent/t.json")).is_err());
        assert_eq!(trained().decode(&[9_999_999]).unwrap(), "");
    }

    proptest! {
        #[test]
        fn decode_of_encode_is_the_text(text in "\\PC{0,60}|[ \\n\\tа-яa-z0-9🦀é]{0,60}") {
            let ids = trained().encode(&text).unwrap();
            prop_assert_eq!(trained().decode(&ids).unwrap(), text);
        }
    }
}
