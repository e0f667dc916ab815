//! Decoding a stream of tokens into text, without ever sending half a character.

use crate::tokenizer::{TokenizerError, library};

/// Decodes tokens one by one.
///
/// A byte-level token may end within a character; its bytes are held back until the rest comes.
/// All pieces and the one of [`IncrementalDecoder::finish`], put together, equal
/// [`Tokenizer::decode`](crate::Tokenizer::decode) of all tokens, wherever the stream is cut.
///
/// One exception, for tokenizers with byte fall-back (LLaMA 1 and 2): they decode a run of byte
/// tokens that is not UTF-8 as a whole to U+FFFD, also what was a character until then and has
/// been sent. For text that is UTF-8 the above holds for them too.
#[derive(Debug)]
pub struct IncrementalDecoder<'a> {
    tokenizer: &'a tokenizers::Tokenizer,
    state: State<'a>,
}

#[derive(Debug)]
enum State<'a> {
    /// Tokens are bytes: hold back what may still become a character.
    Bytes { table: &'a ByteTable, pending: Vec<u8> },
    /// Tokens depend on their neighbours (leading spaces, byte fall-back): decode a window.
    Window { ids: Vec<u32>, prefix: String, prefix_index: usize },
}

impl<'a> IncrementalDecoder<'a> {
    pub(crate) fn new(tokenizer: &'a tokenizers::Tokenizer, bytes: Option<&'a ByteTable>) -> Self {
        let state = match bytes {
            Some(table) => State::Bytes { table, pending: Vec::new() },
            None => State::Window { ids: Vec::new(), prefix: String::new(), prefix_index: 0 },
        };
        Self { tokenizer, state }
    }

    /// Takes one token and returns the text that is certain now, possibly none. Special tokens and
    /// ids outside the vocabulary add nothing.
    ///
    /// # Errors
    /// [`TokenizerError::Library`] from tokenizers that are not byte-level.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        match &mut self.state {
            State::Bytes { table, pending } => {
                pending.extend_from_slice(table.get(id));
                Ok(take_certain(pending))
            }
            State::Window { ids, prefix, prefix_index } => tokenizers::step_decode_stream(
                self.tokenizer,
                vec![id],
                true,
                ids,
                prefix,
                prefix_index,
            )
            .map(Option::unwrap_or_default)
            .map_err(library("decode")),
        }
    }

    /// Returns whether something is held back.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        match &self.state {
            State::Bytes { pending, .. } => !pending.is_empty(),
            State::Window { ids, prefix_index, .. } => ids.len() > *prefix_index,
        }
    }

    /// Ends the stream and returns what was held back: U+FFFD for a character that never came to
    /// its end.
    ///
    /// # Errors
    /// As [`IncrementalDecoder::push`].
    pub fn finish(self) -> Result<String, TokenizerError> {
        match self.state {
            State::Bytes { pending, .. } => Ok(String::from_utf8_lossy(&pending).into_owned()),
            State::Window { ids, prefix, .. } => {
                let text = self.tokenizer.decode(&ids, true).map_err(library("decode"))?;
                Ok(text.strip_prefix(&prefix).unwrap_or_default().to_owned())
            }
        }
    }
}

/// Takes from `pending` all that no further byte can change: whole characters, and U+FFFD for
/// bytes that cannot be part of one. What stays is the beginning of a character, at most 3 bytes.
fn take_certain(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut at = 0;
    loop {
        match str::from_utf8(&pending[at..]) {
            Ok(rest) => {
                text.push_str(rest);
                at = pending.len();
            }
            Err(e) => {
                let valid = at + e.valid_up_to();
                // `valid_up_to` says that this much is UTF-8.
                text.push_str(str::from_utf8(&pending[at..valid]).unwrap_or_default());
                at = valid;
                if let Some(bad) = e.error_len() {
                    text.push(char::REPLACEMENT_CHARACTER);
                    at += bad;
                    continue;
                }
            }
        }
        pending.drain(..at);
        return text;
    }
}

/// The bytes of every token of a byte-level vocabulary; none for special ones.
#[derive(Debug)]
pub(crate) struct ByteTable {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl ByteTable {
    pub(crate) fn new(tokenizer: &tokenizers::Tokenizer) -> Self {
        let from_char = alphabet();
        let mut tokens: Vec<(u32, String)> =
            tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.sort_unstable();
        let added = tokenizer.get_added_tokens_decoder();
        let mut table = Self { bytes: Vec::new(), ends: Vec::new() };
        for (id, token) in tokens {
            // Ids that the vocabulary leaves out have no bytes.
            while table.ends.len() <= id as usize {
                table.ends.push(table.bytes.len() as u32);
            }
            if added.get(&id).is_some_and(|token| token.special) {
                continue;
            }
            let start = table.bytes.len();
            for c in token.chars() {
                match from_char.get(c as usize).copied().flatten() {
                    Some(byte) => table.bytes.push(byte),
                    None => {
                        // An added token outside the alphabet stands for its own text.
                        table.bytes.truncate(start);
                        table.bytes.extend_from_slice(token.as_bytes());
                        break;
                    }
                }
            }
            if let Some(end) = table.ends.last_mut() {
                *end = table.bytes.len() as u32;
            }
        }
        table
    }

    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..*end as usize]
    }
}

/// Maps the characters by which GPT-2's vocabulary writes bytes to those bytes: printable ones
/// stand for themselves, the others follow from U+0100 on in order.
fn alphabet() -> Vec<Option<u8>> {
    let mut from_char = vec![None; 0x200];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let c = if printable {
            usize::from(byte)
        } else {
            next += 1;
            next - 1
        };
        from_char[c] = Some(byte);
    }
    from_char
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;
    use crate::tokenizer::tests::trained;

    #[test]
    fn the_alphabet_is_the_librarys() {
        let ours: std::collections::BTreeSet<char> = alphabet()
            .iter()
            .enumerate()
            .filter_map(|(c, byte)| byte.and(char::from_u32(c as u32)))
            .collect();
        assert_eq!(ours, ByteLevel::alphabet().into_iter().collect());
    }

    #[test]
    fn a_crab_arrives_whole() {
        let tokenizer = trained();
        // One token per byte: the alphabet comes right after the special token.
        let ids: Vec<u32> = tokenizer.encode("🦫x").unwrap();
        assert!(ids.len() > 2, "not merged: {ids:?}");
        let mut decoder = tokenizer.incremental();
        let mut parts = Vec::new();
        for id in ids {
            parts.push(decoder.push(id).unwrap());
        }
        assert!(!decoder.is_pending());
        assert_eq!(parts.pop().as_deref(), Some("x"));
        assert_eq!(parts.pop().as_deref(), Some("🦫"));
        assert!(parts.iter().all(String::is_empty), "{parts:?}");
        assert_eq!(decoder.finish().unwrap(), "");
    }

    #[test]
    fn a_window_decoder_streams_what_it_decodes_at_once() {
        // A tokenizer in LLaMA's style: word-initial spaces as U+2581, bytes as <0x..>.
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
            "normalizer":null,"pre_tokenizer":null,"post_processor":null,
            "decoder":{"type":"Sequence","decoders":[
                {"type":"Replace","pattern":{"String":"▁"},"content":" "},
                {"type":"ByteFallback"},{"type":"Fuse"},
                {"type":"Strip","content":" ","start":1,"stop":0}]},
            "model":{"type":"BPE","dropout":null,"unk_token":null,
                "continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,
                "byte_fallback":true,"ignore_merges":false,
                "vocab":{"▁a":0,"b":1,"▁c":2,"<0xC3>":3,"<0xA9>":4},"merges":[]}}"#;
        let tokenizer =
            crate::Tokenizer::from_json(std::path::Path::new("t"), json.as_bytes()).unwrap();
        for ids in [&[0, 1, 2, 3, 4, 0][..], &[0, 0, 1, 2], &[3, 4, 0], &[2, 3], &[]] {
            let mut decoder = tokenizer.incremental();
            let mut text = String::new();
            for id in ids {
                text += &decoder.push(*id).unwrap();
            }
            text += &decoder.finish().unwrap();
            assert_eq!(text, tokenizer.decode(ids).unwrap(), "{ids:?}");
        }
    }

    proptest! {
        /// Any token ids, so also bytes that are no text: every prefix that was streamed is a
        /// prefix of the whole, and all of it together is the whole.
        #[test]
        fn streaming_equals_decoding_at_every_boundary(
            ids in prop::collection::vec(0u32..610, 0..40),
        ) {
            let tokenizer = trained();
            let whole = tokenizer.decode(&ids).unwrap();
            let mut decoder = tokenizer.incremental();
            let mut streamed = String::new();
            for (at, id) in ids.iter().enumerate() {
                streamed += &decoder.push(*id).unwrap();
                prop_assert!(whole.starts_with(&streamed));
                // Nothing is held back that is certain: at most the beginning of one character.
                let so_far = tokenizer.decode(&ids[..=at]).unwrap();
                prop_assert!(so_far.chars().count() <= streamed.chars().count() + 1);
            }
            streamed += &decoder.finish().unwrap();
            prop_assert_eq!(streamed, whole);
        }

        #[test]
        fn text_streams_back(text in "[a-zé東🦀 \\n]{0,40}") {
            let tokenizer = trained();
            let mut decoder = tokenizer.incremental();
            let mut streamed = String::new();
            for id in tokenizer.encode(&text).unwrap() {
                streamed += &decoder.push(id).unwrap();
            }
            prop_assert!(!decoder.is_pending());
            prop_assert_eq!(streamed, text);
        }
    }
}
