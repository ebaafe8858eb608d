use onebase_format::Digest;
use onebase_model::{ModelConfig, TextModel};

use crate::sequences::Sequence;
use crate::task::{Prompt, Question};
use crate::{Error, Result, Task, TextFile};

/// Most tokens of a text that are run as one document, unless more are asked for.
const MAX_WINDOW_TOKENS: usize = 2048;

/// Tokens by which a reply may be longer than the bytes of the right answer: white
/// space around it, and a token that ends it.
const SPARE_TOKENS: usize = 16;

/// A task as tokens of the fine-tune's tokenizer.
#[derive(Debug)]
pub(crate) struct PreparedTask {
    pub(crate) task: Task,
    pub(crate) questions: Vec<PreparedQuestion>,
    /// Prompt and right answer; every position from the prompt's last token on is
    /// wanted.
    pub(crate) sequences: Vec<Sequence>,
}

/// A question as it is asked.
#[derive(Debug)]
pub(crate) struct PreparedQuestion {
    pub(crate) prompt: Vec<u32>,
    pub(crate) stop_texts: Vec<String>,
    pub(crate) max_new_tokens: usize,
}

impl PreparedTask {
    pub(crate) fn new(task: Task, text_model: &TextModel, config: &ModelConfig) -> Result<Self> {
        let mut questions = Vec::new();
        let mut sequences = Vec::new();
        for question in &task.questions {
            let at =
                |source| Error::Question { path: task.path.clone(), line: question.line, source };
            let (prompt, answer) = tokens(question, text_model).map_err(at)?;
            let (n_tokens, context_tokens) = (prompt.len() + answer.len(), config.context_tokens);
            if prompt.is_empty() {
                return Err(at(onebase_model::Error::EmptyPrompt));
            }
            if n_tokens >= context_tokens {
                let (path, line) = (task.path.clone(), question.line);
                return Err(Error::TooLong { path, line, n_tokens, context_tokens });
            }
            let n_context = prompt.len() - 1;
            let all = [&prompt[..], &answer].concat();
            check_vocabulary(&all, config).map_err(at)?;
            sequences.push(Sequence { tokens: all, n_context });
            // A plain text has no end of its own: an answer on one line ends there.
            let one_line =
                matches!(question.prompt, Prompt::Text(_)) && !question.expected().contains('\n');
            questions.push(PreparedQuestion {
                prompt,
                stop_texts: if one_line { vec!["\n".to_owned()] } else { Vec::new() },
                // No reply that has more tokens can be the answer: each but a few adds at
                // least a byte.
                max_new_tokens: question.expected().len() + SPARE_TOKENS,
            });
        }
        Ok(Self { task, questions, sequences })
    }

    /// Tokens of all prompts and right answers.
    pub(crate) fn n_tokens(&self) -> u64 {
        self.sequences.iter().map(|s| s.tokens.len() as u64).sum()
    }
}

/// The tokens of the prompt and of the right answer after it. After a plain text the
/// white space before the answer belongs to it; in a conversation the template has
/// written what there is.
fn tokens(
    question: &Question,
    text_model: &TextModel,
) -> Result<(Vec<u32>, Vec<u32>), onebase_model::Error> {
    let tokenizer = &text_model.tokenizer;
    Ok(match &question.prompt {
        Prompt::Messages(messages) => {
            let prompt = text_model.encode_chat(messages)?;
            (prompt, tokenizer.encode(question.expected(), false)?)
        }
        Prompt::Text(text) => {
            let prompt = tokenizer.encode(text, true)?;
            (prompt, tokenizer.encode(question.answer.trim_end(), false)?)
        }
    })
}

/// Checks that the fine-tune has every token that its tokenizer gives.
fn check_vocabulary(tokens: &[u32], config: &ModelConfig) -> Result<(), onebase_model::Error> {
    let vocab_size = config.vocab_size;
    match tokens.iter().find(|token| **token as usize >= vocab_size) {
        Some(token) => Err(onebase_model::Error::Token { token: *token, vocab_size }),
        None => Ok(()),
    }
}

/// The tokens of a text.
///
/// # Errors
/// When it cannot be tokenized, has a token that the fine-tune lacks, or fewer than two.
pub(crate) fn text_tokens(
    text: &TextFile,
    text_model: &TextModel,
    config: &ModelConfig,
) -> Result<Vec<u32>> {
    let at = |source| Error::Text { path: text.path.clone(), source };
    let tokens = text_model.tokenizer.encode(&text.text, true).map_err(at)?;
    check_vocabulary(&tokens, config).map_err(at)?;
    if tokens.len() < 2 {
        return Err(Error::ShortText { path: text.path.clone(), n_tokens: tokens.len() });
    }
    Ok(tokens)
}

/// A text in windows.
#[derive(Debug)]
pub(crate) struct PreparedText {
    pub(crate) name: String,
    pub(crate) digest: Digest,
    pub(crate) window_tokens: usize,
    pub(crate) windows: Vec<Sequence>,
    /// The tokens that follow each position of each window.
    pub(crate) targets: Vec<Vec<u32>>,
}

impl PreparedText {
    pub(crate) fn new(
        text: &TextFile,
        window_tokens: Option<usize>,
        text_model: &TextModel,
        config: &ModelConfig,
    ) -> Result<Self> {
        let tokens = text_tokens(text, text_model, config)?;
        let window_tokens =
            window_tokens.unwrap_or(MAX_WINDOW_TOKENS).min(config.context_tokens).max(2);
        // A window's last token is a target only.
        let windows = tokens.chunks(window_tokens).filter(|window| window.len() > 1);
        let (windows, targets) = windows
            .map(|window| {
                let tokens = window[..window.len() - 1].to_vec();
                (Sequence { tokens, n_context: 0 }, window[1..].to_vec())
            })
            .unzip();
        let (name, digest) = (text.name.clone(), text.digest);
        Ok(Self { name, digest, window_tokens, windows, targets })
    }

    /// Tokens that are predicted.
    pub(crate) fn n_tokens(&self) -> usize {
        self.targets.iter().map(Vec::len).sum()
    }
}
