//! Splits ASCII text into GPT-2's words without a regular expression, and remembers their tokens.
//!
//! Text repeats its words: encoding a corpus is mostly looking words up. This path is taken only
//! where it gives exactly what the library gives (a test says so), which is several times slower.

use std::collections::HashMap;

use tokenizers::{Model, ModelWrapper};

use crate::tokenizer::{TokenizerError, library};

/// Cuts ASCII text as GPT-2's pattern does:
/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
pub(crate) fn split(text: &str) -> impl Iterator<Item = &str> {
    debug_assert!(text.is_ascii());
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = first_word(rest.as_bytes());
        // ASCII: every place is between two characters.
        let (word, after) = rest.split_at(end);
        rest = after;
        (!word.is_empty()).then_some(word)
    })
}

/// Returns the length of the word that `text` begins with; 0 at its end.
fn first_word(text: &[u8]) -> usize {
    let suffixes: [&[u8]; 7] = [b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d"];
    if let Some(suffix) = suffixes.iter().find(|suffix| text.starts_with(suffix)) {
        return suffix.len();
    }
    let run = |from: usize, class: Class| {
        let end = text[from..].iter().position(|byte| Class::of(*byte) != class);
        end.map_or(text.len(), |end| from + end)
    };
    // A word may begin with one space.
    let start = usize::from(text.first() == Some(&b' '));
    match text.get(start).map(|byte| Class::of(*byte)) {
        Some(class) if class != Class::Space => run(start, class),
        None => text.len(),
        Some(_) => match run(0, Class::Space) {
            // The last space of several belongs to the word that follows.
            end if end < text.len() && end > 1 => end - 1,
            end => end,
        },
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Space,
    Other,
}

impl Class {
    fn of(byte: u8) -> Self {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' => Self::Letter,
            b'0'..=b'9' => Self::Number,
            // Vertical tabs and form feeds too, which `u8::is_ascii_whitespace` has only in part.
            b'\t'..=b'\r' | b' ' => Self::Space,
            _ => Self::Other,
        }
    }
}

/// The tokens of words that were seen.
#[derive(Debug, Default)]
pub(crate) struct WordCache {
    words: HashMap<Box<str>, Box<[u32]>>,
    mapped: String,
}

// About 30 MB of words of a natural length.
const WORDS_MAX: usize = 200_000;

impl WordCache {
    /// Encodes ASCII text by a byte-level model that has no normalizer.
    pub(crate) fn encode(
        &mut self,
        model: &ModelWrapper,
        text: &str,
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for word in split(text) {
            if let Some(known) = self.words.get(word) {
                ids.extend_from_slice(known);
                continue;
            }
            self.mapped.clear();
            self.mapped.extend(word.bytes().map(letter));
            let tokens = model.tokenize(&self.mapped).map_err(library("encode"))?;
            let fresh: Box<[u32]> = tokens.iter().map(|token| token.id).collect();
            ids.extend_from_slice(&fresh);
            if self.words.len() >= WORDS_MAX {
                self.words.clear();
            }
            self.words.insert(word.into(), fresh);
        }
        Ok(ids)
    }
}

/// Returns the character by which GPT-2's vocabulary writes an ASCII byte: the unprintable ones
/// follow from U+0100 on in order, and 0x7F comes after the 33 below and including the space.
pub(crate) fn letter(byte: u8) -> char {
    let c = match byte {
        b'!'..=b'~' => u32::from(byte),
        0..=b' ' => 0x100 + u32::from(byte),
        _ => 0x121 + u32::from(byte - 0x7F),
    };
    char::from_u32(c).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::tests::trained;

    #[test]
    fn words_are_cut_as_the_pattern_cuts_them() {
        let cases: [(&str, &[&str]); 6] = [
            ("it's we'll 'sx", &["it", "'s", " we", "'ll", " '", "sx"]),
            ("a  b\n\n  c", &["a", " ", " b", "\n\n ", " c"]),
            ("x = 10;\n", &["x", " =", " 10", ";", "\n"]),
            ("end  ", &["end", "  "]),
            ("\x0b\x1ca\x7f", &["\x0b", "\x1c", "a", "\x7f"]),
            ("", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(split(text).collect::<Vec<_>>(), expected, "{text:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// The two ways to encode agree on any ASCII, and particularly on what is hard to cut.
        #[test]
        fn words_encode_as_the_library_encodes(
            text in "[\\x00-\\x7F]{0,40}|('s|'ll|'re|'| |  |\n|\t|a|Bc|7|;|\\(|\x0B|\x1C){0,25}",
        ) {
            let tokenizer = trained();
            let mut cache = WordCache::default();
            let expected = tokenizer.encode(&text).unwrap();
            // The second time from memory.
            for _ in 0..2 {
                prop_assert_eq!(&tokenizer.encode_cached(&text, &mut cache).unwrap(), &expected);
            }
        }
    }
}
