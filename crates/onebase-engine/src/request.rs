use std::time::{Duration, Instant};

use onebase_model::{FinishReason, GenerationDefaults, SamplingParams};

use crate::{Error, Result};

/// Most alternatives to a token that an answer can list.
pub const MAX_LOGPROBS: usize = 20;

/// Most texts that can end an answer.
pub const MAX_STOP_TEXTS: usize = 16;

/// What tokens that are there already do to the logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Taken off the logit of every token of the answer.
    pub presence: f32,
    /// Taken off the logit of a token for each time it is in the answer.
    pub frequency: f32,
    /// Divides positive logits of tokens of prompt and answer, multiplies negative ones (CTRL,
    /// arXiv 1909.05858, section 4.1).
    pub repetition: f32,
}

impl Penalties {
    /// Nothing.
    pub const NONE: Penalties = Penalties { presence: 0.0, frequency: 0.0, repetition: 1.0 };
}

/// Decides which tokens may come next, such as those of a grammar.
pub trait Constraint: Send {
    /// Sets the logits of tokens that may not come to negative infinity.
    ///
    /// # Errors
    /// When it cannot go on, with the reason.
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Takes the token that was chosen. Whether the answer is complete with it.
    ///
    /// # Errors
    /// When it cannot go on, with the reason.
    fn accept(&mut self, token: u32) -> Result<bool, String>;
}

/// A prompt to answer, and how.
pub struct Request {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// What tokens that are there already do.
    pub penalties: Penalties,
    /// Added to the logits of tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that end the answer, besides the tenant's; they are not part of it.
    pub stop_tokens: Vec<u32>,
    /// Texts that end the answer; they and what follows are not part of it.
    pub stop_texts: Vec<String>,
    /// Go on past the tokens with which the tenant's answers end.
    pub ignore_end: bool,
    /// How many alternatives each token of the answer is told with; `None` for no probabilities.
    pub logprobs: Option<usize>,
    /// The same for the prompt.
    pub prompt_logprobs: Option<usize>,
    /// When nobody waits any more.
    pub deadline: Option<Instant>,
    /// Which tokens may come.
    pub constraint: Option<Box<dyn Constraint>>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let n_prompt_tokens = self.prompt.len();
        f.debug_struct("Request")
            .field("n_prompt_tokens", &n_prompt_tokens)
            .field("max_new_tokens", &self.max_new_tokens)
            .field("sampling", &self.sampling)
            .finish_non_exhaustive()
    }
}

impl Request {
    /// A greedy request.
    pub fn greedy(prompt: Vec<u32>, max_new_tokens: usize) -> Self {
        Self {
            prompt,
            max_new_tokens,
            sampling: SamplingParams::GREEDY,
            penalties: Penalties::NONE,
            logit_bias: Vec::new(),
            stop_tokens: Vec::new(),
            stop_texts: Vec::new(),
            ignore_end: false,
            logprobs: None,
            prompt_logprobs: None,
            deadline: None,
            constraint: None,
        }
    }

    /// Chooses tokens as a model's publisher says, at temperature 1 where that is silent.
    pub fn set_defaults(&mut self, defaults: GenerationDefaults) {
        self.sampling.temperature = defaults.temperature.unwrap_or(1.0);
        self.sampling.top_p = defaults.top_p.unwrap_or(1.0);
        self.sampling.top_k = defaults.top_k.unwrap_or(0);
        self.penalties.repetition = defaults.repetition_penalty.unwrap_or(1.0);
    }

    /// Checks all that does not depend on how busy the engine is.
    pub(crate) fn check(&self, vocab_size: usize, context_tokens: usize) -> Result<()> {
        let (prompt_tokens, max_new_tokens) = (self.prompt.len(), self.max_new_tokens);
        if prompt_tokens == 0 {
            return Err(onebase_model::Error::EmptyPrompt.into());
        }
        if prompt_tokens.saturating_add(max_new_tokens) > context_tokens {
            return Err(Error::Context { prompt_tokens, max_new_tokens, context_tokens });
        }
        let tokens = self.prompt.iter().chain(self.logit_bias.iter().map(|(token, _)| token));
        if let Some(token) = tokens.copied().find(|t| *t as usize >= vocab_size) {
            return Err(onebase_model::Error::Token { token, vocab_size }.into());
        }
        self.check_numbers()
    }

    fn check_numbers(&self) -> Result<()> {
        let range = |field, got: f32, low: f32, high: f32| {
            let expected = format!("a number from {low} to {high}");
            let fits = (low..=high).contains(&got);
            if fits {
                Ok(())
            } else {
                Err(Error::Invalid { field, expected, got: got.to_string() })
            }
        };
        range("temperature", self.sampling.temperature, 0.0, 100.0)?;
        range("top_p", self.sampling.top_p, f32::MIN_POSITIVE, 1.0)?;
        range("presence_penalty", self.penalties.presence, -2.0, 2.0)?;
        range("frequency_penalty", self.penalties.frequency, -2.0, 2.0)?;
        range("repetition_penalty", self.penalties.repetition, 0.01, 100.0)?;
        for (_, bias) in &self.logit_bias {
            range("logit_bias", *bias, -100.0, 100.0)?;
        }
        let most = |field, got: usize, most: usize| {
            let expected = format!("at most {most}");
            if got <= most {
                Ok(())
            } else {
                Err(Error::Invalid { field, expected, got: got.to_string() })
            }
        };
        most("logprobs", self.logprobs.unwrap_or(0), MAX_LOGPROBS)?;
        most("logprobs", self.prompt_logprobs.unwrap_or(0), MAX_LOGPROBS)?;
        most("stop", self.stop_texts.len(), MAX_STOP_TEXTS)?;
        if self.stop_texts.iter().any(String::is_empty) {
            let (expected, got) = ("texts with a character".to_owned(), "an empty one".to_owned());
            return Err(Error::Invalid { field: "stop", expected, got });
        }
        Ok(())
    }
}

/// How likely a token was, of the model's own distribution, before temperature, penalties and
/// constraints.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The natural logarithm of its probability.
    pub logprob: f64,
    /// The likeliest tokens with theirs, the likeliest first.
    pub top: Vec<(u32, f64)>,
}

/// What a request cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those whose keys and values were there already.
    pub cached_tokens: usize,
    /// Tokens that were chosen, one that ended the answer included.
    pub new_tokens: usize,
}

/// What happens to a request, in this order: the prompt, tokens, and one of the last two.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt was run.
    Prompt {
        /// How likely its tokens were, where that was asked for; the first has no probability.
        logprobs: Vec<Option<TokenLogprobs>>,
        /// From its arrival to its first step.
        queue_time: Duration,
    },
    /// A token of the answer.
    Token {
        /// The token.
        token: u32,
        /// Text that is complete now; it may be that of earlier tokens, or none.
        text: String,
        /// How likely it was, where that was asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The answer has ended.
    End {
        /// Text that was held back.
        text: String,
        /// Why.
        finish_reason: FinishReason,
        /// The token that ended it and is no part of it, and how likely it was, where that was
        /// asked for.
        stop_token: Option<(u32, TokenLogprobs)>,
        /// What it cost.
        usage: Usage,
    },
    /// The request was not answered, or not to its end.
    Failed(Error),
}

/// Takes a request's events; `false` when nobody listens any more. It must not block.
pub type Sink = Box<dyn FnMut(Event) -> bool + Send>;
