use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::{
    Error, KvCache, Logits, Model, Result, Sampler, SamplingParams, Segment, Tenant, Tokenizer,
};

/// Tokens of prompts that are run in one step: enough to keep the processor
/// busy, few enough for the buffers to stay small.
const STEP_TOKENS: usize = 512;

/// One prompt to answer.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Whose weights; `None` for the base's own.
    pub tenant: Option<&'a Tenant>,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens that end the answer; they are not part of it.
    pub stop_tokens: &'a [u32],
    /// Texts that end the answer; they and what follows are not part of it.
    pub stop_texts: &'a [String],
    /// Turns the answer into text.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token or text.
    Stop,
    /// The most tokens, or the end of the context.
    Length,
}

impl FinishReason {
    /// `stop` or `length`.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The tokens added, a stop token left out.
    pub tokens: Vec<u32>,
    /// Their text, up to a stop text; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Answers, in the order of the requests.
    pub completions: Vec<Completion>,
    /// Tokens of prompts that were run.
    pub n_prompt_tokens: usize,
    /// Tokens that were chosen.
    pub n_new_tokens: usize,
    /// Chosen tokens that were run in turn: all but the last of each answer.
    pub n_decode_tokens: usize,
    /// Time of the steps, shared out by tokens where a step ran both kinds.
    pub prefill_time: Duration,
    /// The same for chosen tokens.
    pub decode_time: Duration,
}

/// A request being answered.
struct Sequence<'a> {
    index: usize,
    request: &'a Request<'a>,
    cache: KvCache,
    sampler: Sampler,
    tokens: Vec<u32>,
    text: String,
}

impl Sequence<'_> {
    /// The tokens not yet run: the rest of the prompt, or the last one chosen.
    fn pending(&self) -> &[u32] {
        let done = self.cache.n_tokens();
        if done < self.request.prompt.len() {
            &self.request.prompt[done..]
        } else {
            &self.tokens[done - self.request.prompt.len()..]
        }
    }

    /// Takes the next token; says whether the answer has ended.
    fn push(&mut self, token: u32, context_tokens: usize) -> Result<Option<FinishReason>> {
        if self.request.stop_tokens.contains(&token) {
            return Ok(Some(FinishReason::Stop));
        }
        self.tokens.push(token);
        if let Some(tokenizer) = self.request.tokenizer
            && !self.request.stop_texts.is_empty()
        {
            self.text = tokenizer.decode(&self.tokens)?;
            let cut = self.request.stop_texts.iter().filter_map(|stop| self.text.find(stop)).min();
            if let Some(cut) = cut {
                self.text.truncate(cut);
                return Ok(Some(FinishReason::Stop));
            }
        }
        let full = self.request.prompt.len() + self.tokens.len() >= context_tokens;
        let done = full || self.tokens.len() >= self.request.max_new_tokens;
        Ok(done.then_some(FinishReason::Length))
    }

    fn complete(mut self, finish_reason: FinishReason) -> Result<Completion> {
        if let Some(tokenizer) = self.request.tokenizer
            && self.request.stop_texts.is_empty()
        {
            self.text = tokenizer.decode(&self.tokens)?;
        }
        Ok(Completion { tokens: self.tokens, text: self.text, finish_reason })
    }
}

/// Answers requests, at most `batch_size` of them at a time; when one is done
/// the next joins. `on_step` is called with the number of tokens that each step
/// ran.
///
/// An answer does not depend on the other requests.
///
/// # Errors
/// When a prompt is empty, has a token outside its tenant's vocabulary, or
/// leaves no room in the context.
pub fn generate(
    model: &Model,
    requests: &[Request<'_>],
    batch_size: usize,
    mut on_step: impl FnMut(usize),
) -> Result<Generation> {
    for request in requests {
        let config = request.tenant.map_or(model.config(), Tenant::config);
        let (n_tokens, context_tokens) = (request.prompt.len(), config.context_tokens);
        if n_tokens == 0 {
            return Err(Error::EmptyPrompt);
        }
        if n_tokens >= context_tokens {
            return Err(Error::ContextTooLong { n_tokens, context_tokens });
        }
    }
    let mut completions: Vec<Option<Completion>> = vec![None; requests.len()];
    let mut waiting: VecDeque<usize> = VecDeque::new();
    for (index, request) in requests.iter().enumerate() {
        if request.max_new_tokens == 0 {
            let finish_reason = FinishReason::Length;
            let (tokens, text) = (Vec::new(), String::new());
            completions[index] = Some(Completion { tokens, text, finish_reason });
        } else {
            waiting.push_back(index);
        }
    }
    let (mut n_prompt_tokens, mut n_new_tokens, mut n_decode_tokens) = (0, 0, 0);
    let (mut prefill_time, mut decode_time) = (Duration::ZERO, Duration::ZERO);
    let mut active: Vec<Sequence<'_>> = Vec::new();
    loop {
        while active.len() < batch_size.max(1)
            && let Some(index) = waiting.pop_front()
        {
            let request = &requests[index];
            active.push(Sequence {
                index,
                request,
                cache: KvCache::new(request.tenant.map_or(model.config(), Tenant::config)),
                sampler: Sampler::new(request.sampling),
                tokens: Vec::new(),
                text: String::new(),
            });
        }
        if active.is_empty() {
            break;
        }
        // Sequences that decode take one token each; prompts share the rest.
        let decoding = active.iter().filter(|s| !s.tokens.is_empty()).count();
        let mut room = STEP_TOKENS.saturating_sub(decoding).max(1);
        let (mut stepped, mut inputs) = (Vec::new(), Vec::new());
        let mut n_prefill = 0;
        for (i, sequence) in active.iter().enumerate() {
            let pending = sequence.pending();
            let take = if sequence.tokens.is_empty() { pending.len().min(room) } else { 1 };
            if take == 0 {
                continue;
            }
            if sequence.tokens.is_empty() {
                room -= take;
                n_prefill += take;
            }
            stepped.push((i, take == pending.len()));
            inputs.push(pending[..take].to_vec());
        }
        let start = Instant::now();
        let logits = {
            let mut steps = stepped.iter().zip(&inputs).peekable();
            let mut segments = Vec::new();
            for (i, sequence) in active.iter_mut().enumerate() {
                if let Some(((_, complete), tokens)) = steps.next_if(|((at, _), _)| *at == i) {
                    segments.push(Segment {
                        tokens,
                        tenant: sequence.request.tenant,
                        cache: &mut sequence.cache,
                        logits: if *complete { Logits::Last } else { Logits::None },
                    });
                }
            }
            model.forward(&mut segments)?
        };
        let n_tokens: usize = inputs.iter().map(Vec::len).sum();
        #[allow(clippy::cast_precision_loss)]
        let prefill = start.elapsed().mul_f64(n_prefill as f64 / n_tokens as f64);
        prefill_time += prefill;
        decode_time += start.elapsed().saturating_sub(prefill);
        n_prompt_tokens += n_prefill;
        n_decode_tokens += n_tokens - n_prefill;
        on_step(n_tokens);
        let mut ended = Vec::new();
        for ((i, complete), logits) in stepped.into_iter().zip(logits) {
            if !complete {
                continue;
            }
            let sequence = &mut active[i];
            let likeliest = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
            if !likeliest.is_finite() || logits.iter().any(|l| l.is_nan()) {
                return Err(Error::NotFinite { n_tokens: sequence.cache.n_tokens() });
            }
            let token = sequence.sampler.sample(&logits);
            n_new_tokens += 1;
            let config = sequence.request.tenant.map_or(model.config(), Tenant::config);
            if let Some(reason) = sequence.push(token, config.context_tokens)? {
                ended.push((i, reason));
            }
        }
        for (i, reason) in ended.into_iter().rev() {
            let sequence = active.remove(i);
            let index = sequence.index;
            completions[index] = Some(sequence.complete(reason)?);
        }
    }
    let completions = completions
        .into_iter()
        .map(|c| c.unwrap_or_else(|| unreachable!("every request was answered")))
        .collect();
    Ok(Generation {
        completions,
        n_prompt_tokens,
        n_new_tokens,
        n_decode_tokens,
        prefill_time,
        decode_time,
    })
}
