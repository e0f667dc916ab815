//! From tokens to text that is certain: never part of a character, never part of a stop string.

use drumline_data::{IncrementalDecoder, TokenizerError};

/// Text of one completion as it grows.
pub struct Text<'a> {
    decoder: Option<IncrementalDecoder<'a>>,
    stops: &'a [String],
    held: String,
    stopped: bool,
}

impl<'a> Text<'a> {
    /// Begins a completion that ends before the first of `stops`.
    #[must_use]
    pub fn new(decoder: IncrementalDecoder<'a>, stops: &'a [String]) -> Self {
        Self { decoder: Some(decoder), stops, held: String::new(), stopped: false }
    }

    /// Takes a token; returns the text that is now certain.
    ///
    /// # Errors
    /// When the tokenizer does not know the token.
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        if let Some(decoder) = &mut self.decoder
            && !self.stopped
        {
            self.held.push_str(&decoder.push(token)?);
        }
        Ok(self.release())
    }

    /// Ends the completion; returns what is left of it.
    ///
    /// # Errors
    /// As [`Text::push`].
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        if let Some(decoder) = self.decoder.take()
            && !self.stopped
        {
            self.held.push_str(&decoder.finish()?);
        }
        let certain = self.release();
        let rest = if self.stopped { String::new() } else { std::mem::take(&mut self.held) };
        Ok(certain + &rest)
    }

    /// Returns whether a stop string has come.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    fn release(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }
}

/// Returns the length of the longest end of `text` with which `stop` could begin.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|length| {
            stop.is_char_boundary(*length) && text.as_bytes().ends_with(&stop.as_bytes()[..*length])
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use drumline_data::Tokenizer;

    fn collect(tokenizer: &Tokenizer, tokens: &[u32], stops: &[String]) -> (Vec<String>, bool) {
        let mut text = Text::new(tokenizer.incremental(), stops);
        let mut parts = Vec::new();
        for token in tokens {
            parts.push(text.push(*token).unwrap());
            if text.is_stopped() {
                return (parts, true);
            }
        }
        parts.push(text.finish().unwrap());
        let stopped = text.is_stopped();
        (parts, stopped)
    }

    #[test]
    fn streaming_says_the_same_as_the_whole_with_and_without_stops() {
        let source = "fn main() { println!(\"grüße, 世界 🦀\"); } // end of the line\n";
        let tokenizer = Tokenizer::train(&[source], 300).unwrap();
        let tokens = tokenizer.encode(source).unwrap();
        let whole = tokenizer.decode(&tokens).unwrap();
        for stops in [
            vec![],
            vec!["世界".to_owned()],
            vec!["🦀\"".to_owned(), "// end".to_owned()],
            vec!["not there".to_owned(), "line\n\n".to_owned()],
            vec!["f".to_owned()],
        ] {
            let (parts, stopped) = collect(&tokenizer, &tokens, &stops);
            let cut = stops.iter().filter_map(|stop| whole.find(stop.as_str())).min();
            let expected = &whole[..cut.unwrap_or(whole.len())];
            assert_eq!(parts.concat(), expected, "{stops:?}");
            assert_eq!(stopped, cut.is_some(), "{stops:?}");
        }
    }

    #[test]
    fn only_what_could_begin_a_stop_is_held_back() {
        assert_eq!(overlap("abcab", "abc"), 2);
        assert_eq!(overlap("abc", "abc"), 0, "the whole is found, not held");
        assert_eq!(overlap("xyz", "abc"), 0);
        assert_eq!(overlap("ü", "üb"), 2);
        assert_eq!(overlap("", "abc"), 0);
    }
}
