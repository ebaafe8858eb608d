use std::time::{Duration, Instant};

use onebase_model::{FinishReason, KvCache, Logits};

use crate::metrics::Metrics;
use crate::registry::Lease;
use crate::request::{Event, Request, Sink, TokenLogprobs, Usage};
use crate::sampling::{Chooser, logprobs_of};
use crate::text_stream::TextStream;
use crate::{Error, Result};

/// Tokens of a prompt that are run at once when the logits of all are wanted: they take
/// memory, a vocabulary each.
const LOGPROBS_CHUNK: usize = 32;

/// What a request is told apart by.
pub(crate) type RequestId = u64;

/// A request on its way.
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) lease: Lease,
    /// Prompt and answer.
    pub(crate) tokens: Vec<u32>,
    pub(crate) cache: KvCache,
    /// Whether a step with others has failed: it is run alone until a step succeeds.
    pub(crate) is_suspect: bool,
    pub(crate) deadline: Option<Instant>,
    pub(crate) max_new_tokens: usize,
    n_prompt: usize,
    n_cached: usize,
    n_new: usize,
    chooser: Chooser,
    stop_tokens: Vec<u32>,
    text: TextStream,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    /// Of the prompt so far, where they are wanted.
    of_prompt: Vec<Option<TokenLogprobs>>,
    is_prompt_told: bool,
    sink: Sink,
    arrived: Instant,
    started: Option<Instant>,
    last_token: Option<Instant>,
}

/// What became of a sequence in a step.
pub(crate) enum Outcome {
    Continues,
    /// The answer is complete, and was told so.
    Ended,
    /// It failed, and was told so.
    Failed,
    /// Nobody listens.
    Unheard,
}

impl Sequence {
    pub(crate) fn new(id: RequestId, lease: Lease, request: Request, sink: Sink) -> Self {
        let Request { prompt, sampling, penalties, logit_bias, constraint, .. } = request;
        let mut stop_tokens = request.stop_tokens;
        if !request.ignore_end {
            stop_tokens.extend(&lease.text().stop_tokens);
        }
        let chooser = Chooser::new(sampling, penalties, logit_bias, constraint, &prompt);
        Self {
            id,
            cache: KvCache::new(lease.config()),
            lease,
            is_suspect: false,
            deadline: request.deadline,
            max_new_tokens: request.max_new_tokens,
            n_prompt: prompt.len(),
            n_cached: 0,
            n_new: 0,
            tokens: prompt,
            chooser,
            stop_tokens,
            text: TextStream::new(request.stop_texts),
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            of_prompt: Vec::new(),
            is_prompt_told: false,
            sink,
            arrived: Instant::now(),
            started: None,
            last_token: None,
        }
    }

    pub(crate) fn tenant(&self) -> &str {
        self.lease.name()
    }

    /// Tokens that are not run yet.
    pub(crate) fn n_pending(&self) -> usize {
        self.tokens.len() - self.cache.n_tokens()
    }

    /// Whether it produces tokens one by one now.
    pub(crate) fn is_decoding(&self) -> bool {
        self.is_prompt_told && self.n_pending() == 1
    }

    /// Whether keys and values of others with the same beginning serve it too.
    pub(crate) fn can_take_prefix(&self) -> bool {
        self.cache.n_tokens() == 0 && (self.prompt_logprobs.is_none() || self.is_prompt_told)
    }

    pub(crate) fn take_prefix(&mut self, cache: KvCache) {
        if self.started.is_none() {
            self.n_cached = cache.n_tokens().min(self.n_prompt);
        }
        self.cache = cache;
    }

    /// Gives up its keys and values; they are computed again from its tokens, to the same bits.
    pub(crate) fn preempt(&mut self) {
        self.cache = KvCache::new(self.lease.config());
        if !self.is_prompt_told {
            self.of_prompt.clear();
        }
    }

    pub(crate) fn start(&mut self, metrics: &mut Metrics) {
        if self.started.is_none() {
            let now = Instant::now();
            self.started = Some(now);
            let metrics = metrics.tenant(self.lease.name());
            metrics.queue_time.add(now - self.arrived);
            metrics.cached_tokens += self.n_cached as u64;
        }
    }

    /// Whether a token of it was run, or it could have been.
    pub(crate) fn is_started(&self) -> bool {
        self.started.is_some()
    }

    fn wants_prompt(&self) -> bool {
        self.prompt_logprobs.is_some() && !self.is_prompt_told
    }

    /// How many of at most `room` tokens it runs in a step, and whose logits it needs.
    pub(crate) fn chunk(&self, room: usize) -> (usize, Logits) {
        let room = if self.wants_prompt() { room.min(LOGPROBS_CHUNK) } else { room };
        let n = self.n_pending().min(room);
        let logits = match (self.wants_prompt(), n == self.n_pending()) {
            (true, _) => Logits::All,
            (false, true) => Logits::Last,
            (false, false) => Logits::None,
        };
        (n, logits)
    }

    /// Takes the logits of a step in which `n` of its tokens were run.
    pub(crate) fn advance(&mut self, n: usize, mut logits: Vec<f32>) -> Outcome {
        match self.try_advance(n, &mut logits) {
            Ok(outcome) => outcome,
            Err(error) => {
                self.fail(error);
                Outcome::Failed
            }
        }
    }

    fn try_advance(&mut self, n: usize, logits: &mut [f32]) -> Result<Outcome> {
        let vocab_size = self.lease.config().vocab_size;
        if let Some(n_top) = self.prompt_logprobs.filter(|_| !self.is_prompt_told) {
            self.take_prompt_logprobs(n, logits, vocab_size, n_top)?;
        }
        if self.n_pending() > 0 {
            return Ok(Outcome::Continues);
        }
        if !self.is_prompt_told {
            self.is_prompt_told = true;
            let logprobs = std::mem::take(&mut self.of_prompt);
            let queue_time = self.started.map_or(Duration::ZERO, |started| started - self.arrived);
            if !(self.sink)(Event::Prompt { logprobs, queue_time }) {
                return Ok(Outcome::Unheard);
            }
            if self.max_new_tokens == 0 {
                return Ok(self.end(String::new(), FinishReason::Length));
            }
        }
        let last = logits.len().saturating_sub(vocab_size);
        self.choose(&mut logits[last..])
    }

    /// The logits after a token are those of the next one of the prompt.
    fn take_prompt_logprobs(
        &mut self,
        n: usize,
        logits: &[f32],
        vocab_size: usize,
        n_top: usize,
    ) -> Result<()> {
        if self.of_prompt.is_empty() {
            self.of_prompt.push(None);
        }
        let first = self.cache.n_tokens() - n;
        for (row, logits) in logits.chunks_exact(vocab_size).enumerate() {
            if let Some(token) = self.tokens.get(first + row + 1) {
                self.check_finite(logits)?;
                self.of_prompt.push(Some(logprobs_of(logits, *token, n_top)));
            }
        }
        Ok(())
    }

    fn check_finite(&self, logits: &[f32]) -> Result<()> {
        let likeliest = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
        if likeliest.is_finite() && !logits.iter().any(|l| l.is_nan()) {
            return Ok(());
        }
        Err(onebase_model::Error::NotFinite { n_tokens: self.cache.n_tokens() }.into())
    }

    fn choose(&mut self, logits: &mut [f32]) -> Result<Outcome> {
        self.check_finite(logits)?;
        // Probabilities are the model's own, before anything changes its logits.
        let raw = self.logprobs.map(|_| logits.to_vec());
        let (token, is_complete) = self.chooser.choose(logits)?;
        self.n_new += 1;
        let logprobs = raw.zip(self.logprobs).map(|(raw, n_top)| logprobs_of(&raw, token, n_top));
        if self.stop_tokens.contains(&token) {
            let rest = self.text.finish(&self.lease.text().tokenizer)?;
            let stop_token = logprobs.map(|logprobs| (token, logprobs));
            return Ok(self.end_at(rest, FinishReason::Stop, stop_token));
        }
        self.tokens.push(token);
        let (text, is_stopped) = self.text.push(token, &self.lease.text().tokenizer)?;
        if !(self.sink)(Event::Token { token, text, logprobs }) {
            return Ok(Outcome::Unheard);
        }
        if is_stopped {
            return Ok(self.end(String::new(), FinishReason::Stop));
        }
        let is_full = self.tokens.len() >= self.lease.config().context_tokens;
        let n_answer = self.tokens.len() - self.n_prompt;
        if !is_complete && !is_full && n_answer < self.max_new_tokens {
            return Ok(Outcome::Continues);
        }
        let rest = self.text.finish(&self.lease.text().tokenizer)?;
        let reason = if is_complete { FinishReason::Stop } else { FinishReason::Length };
        Ok(self.end(rest, reason))
    }

    fn end(&mut self, text: String, finish_reason: FinishReason) -> Outcome {
        self.end_at(text, finish_reason, None)
    }

    fn end_at(
        &mut self,
        text: String,
        finish_reason: FinishReason,
        stop_token: Option<(u32, TokenLogprobs)>,
    ) -> Outcome {
        let (prompt_tokens, cached_tokens) = (self.n_prompt, self.n_cached);
        let usage = Usage { prompt_tokens, cached_tokens, new_tokens: self.n_new };
        (self.sink)(Event::End { text, finish_reason, stop_token, usage });
        Outcome::Ended
    }

    /// Tells that there will be no answer.
    pub(crate) fn fail(&mut self, error: Error) {
        (self.sink)(Event::Failed(error));
    }

    /// Counts what a step has brought: `n` tokens were run, and `n_new` of the answer before.
    pub(crate) fn account(&mut self, n: usize, n_new: usize, outcome: &Outcome, to: &mut Metrics) {
        let now = Instant::now();
        let metrics = to.tenant(self.lease.name());
        let n_chosen = (self.n_new - n_new) as u64;
        if n_new == 0 || n > 1 {
            metrics.prompt_tokens += n as u64;
        }
        metrics.new_tokens += n_chosen;
        if n_chosen > 0 {
            match self.last_token {
                Some(last) => metrics.token_time.add(now - last),
                None => metrics.first_token_time.add(now - self.arrived),
            }
            self.last_token = Some(now);
        }
        match outcome {
            Outcome::Continues => {}
            Outcome::Ended => {
                metrics.n_answered += 1;
                metrics.request_time.add(now - self.arrived);
            }
            Outcome::Failed => metrics.n_failed += 1,
            Outcome::Unheard => metrics.n_cancelled += 1,
        }
    }

    pub(crate) fn n_new(&self) -> usize {
        self.n_new
    }

    /// How long ago it was let in for the first time.
    pub(crate) fn place_time(&self) -> Duration {
        self.started.map_or(Duration::ZERO, |started| started.elapsed())
    }

    /// Whether its time is over.
    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}
