use onebase_model::{Result, Tokenizer};

/// An answer's text as its tokens come: whole characters only, and nothing that may turn out
/// to be a text that ends the answer.
#[derive(Debug)]
pub(crate) struct TextStream {
    tokens: Vec<u32>,
    /// Tokens before it are not decoded any more.
    context: usize,
    /// Tokens before it are in `text`.
    done: usize,
    text: String,
    /// Bytes of `text` that were given out.
    given: usize,
    stops: Vec<String>,
}

impl TextStream {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { tokens: Vec::new(), context: 0, done: 0, text: String::new(), given: 0, stops }
    }

    /// Takes a token. Gives text that is certain, and whether the answer has ended with it.
    pub(crate) fn push(&mut self, token: u32, tokenizer: &Tokenizer) -> Result<(String, bool)> {
        self.tokens.push(token);
        let old = tokenizer.decode(&self.tokens[self.context..self.done])?;
        let new = tokenizer.decode(&self.tokens[self.context..])?;
        // A replacement character at the end is the beginning of a character.
        if new.len() <= old.len() || new.ends_with('\u{FFFD}') {
            return Ok((String::new(), false));
        }
        let searched = self.text.len();
        self.text.push_str(new.get(old.len()..).unwrap_or_default());
        // Tokenizers that write a space before a word leave out the first: what is decoded
        // always has a token before it.
        self.context = self.done;
        self.done = self.tokens.len();
        Ok(self.take(searched))
    }

    /// The rest, when no more tokens come.
    pub(crate) fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let old = tokenizer.decode(&self.tokens[self.context..self.done])?;
        let new = tokenizer.decode(&self.tokens[self.context..])?;
        let searched = self.text.len();
        self.text.push_str(new.get(old.len()..).unwrap_or_default());
        self.done = self.tokens.len();
        self.cut(searched);
        Ok(self.give(self.text.len()))
    }

    /// Ends the text at a stop that is in it, but not before where it was searched already.
    fn cut(&mut self, searched: usize) -> bool {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = searched.saturating_sub(longest.saturating_sub(1));
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        let found = self.stops.iter().filter_map(|stop| self.text[from..].find(stop)).min();
        if let Some(at) = found {
            self.text.truncate(from + at);
        }
        found.is_some()
    }

    fn take(&mut self, searched: usize) -> (String, bool) {
        let ended = self.cut(searched);
        let certain = if ended { self.text.len() } else { self.text.len() - self.held_back() };
        (self.give(certain), ended)
    }

    fn give(&mut self, until: usize) -> String {
        let piece = self.text.get(self.given..until).unwrap_or_default().to_owned();
        self.given += piece.len();
        piece
    }

    /// Bytes at the end that may be the beginning of a stop.
    fn held_back(&self) -> usize {
        let text = self.text.as_bytes();
        let begins = |stop: &String| {
            let most = text.len().min(stop.len() - 1);
            (1..=most).rev().find(|n| text.ends_with(&stop.as_bytes()[..*n])).unwrap_or(0)
        };
        let held = self.stops.iter().map(begins).max().unwrap_or(0);
        let mut from = text.len() - held;
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        text.len() - from
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use onebase_format::Checkpoint;
    use onebase_model::TextModel;

    use super::*;

    const TEXT: &str = "né 你好 🙂🙃, end. The end";

    fn tokenizer() -> Tokenizer {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/base");
        TextModel::from_checkpoint(&Checkpoint::open(&base).unwrap()).unwrap().tokenizer
    }

    /// The pieces of a text whose tokens come one by one, and whether a stop ended it.
    fn pieces(text: &str, stops: &[&str]) -> (Vec<String>, bool) {
        let tokenizer = tokenizer();
        let mut stream = TextStream::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut pieces = Vec::new();
        for token in tokenizer.encode(text, false).unwrap() {
            let (piece, has_ended) = stream.push(token, &tokenizer).unwrap();
            pieces.push(piece);
            if has_ended {
                return (pieces, true);
            }
        }
        pieces.push(stream.finish(&tokenizer).unwrap());
        (pieces, false)
    }

    #[test]
    fn characters_come_whole() {
        let (pieces, has_ended) = pieces(TEXT, &[]);
        assert!(!has_ended);
        assert!(pieces.iter().any(String::is_empty), "some are of several tokens: {pieces:?}");
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert_eq!(pieces.concat(), TEXT);
    }

    #[test]
    fn half_a_character_at_the_end_is_as_the_tokenizer_writes_it() {
        let tokenizer = tokenizer();
        let mut tokens = tokenizer.encode("a🙂", false).unwrap();
        tokens.pop();
        let mut stream = TextStream::new(Vec::new());
        let mut text = String::new();
        for token in &tokens {
            text.push_str(&stream.push(*token, &tokenizer).unwrap().0);
        }
        assert_eq!(text, "a");
        text.push_str(&stream.finish(&tokenizer).unwrap());
        assert_eq!(text, tokenizer.decode(&tokens).unwrap());
    }

    #[test]
    fn a_stop_ends_it_wherever_tokens_part() {
        for stop in ["end.", "d. T", "🙃", "好 🙂", "n", "The end"] {
            let (pieces, has_ended) = pieces(TEXT, &["never", stop]);
            assert!(has_ended, "{stop}");
            assert_eq!(pieces.concat(), TEXT[..TEXT.find(stop).unwrap()], "{stop}");
        }
        let (pieces, has_ended) = pieces(TEXT, &["endless", "The end!"]);
        assert!(!has_ended);
        assert_eq!(pieces.concat(), TEXT);
    }
}
