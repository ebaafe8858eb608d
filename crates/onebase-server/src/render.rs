//! Answers as OpenAI's API writes them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use onebase_engine::{Event, Lease, TokenLogprobs, Usage};
use onebase_model::{FinishReason, Tokenizer};
use serde_json::{Map, Value, json};

use crate::app::App;

/// Which of the two forms an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Chat,
    Completion,
}

/// What all parts of a call's answer say.
pub(crate) struct Head {
    pub(crate) form: Form,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) fingerprint: String,
    pub(crate) lease: Lease,
    /// Whether probabilities are told.
    pub(crate) has_logprobs: bool,
    /// The texts that answers begin with where the prompt is repeated; one for each answer.
    pub(crate) echoes: Vec<Option<Echo>>,
    pub(crate) n_per_prompt: usize,
    /// How long reading the tenant took, where it was not in memory.
    pub(crate) load_time: Option<Duration>,
}

/// A prompt that is repeated.
#[derive(Clone)]
pub(crate) struct Echo {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
}

/// An answer so far.
#[derive(Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    logprobs: Logprobs,
    pub(crate) finish_reason: Option<FinishReason>,
    usage: Usage,
}

/// Probabilities of some tokens, in the order of the tokens.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<(u32, Option<TokenLogprobs>)>,
}

/// Calls so far; with the time of the server's start it tells their answers apart.
static N_CALLS: AtomicU64 = AtomicU64::new(0);

impl Head {
    pub(crate) fn new(
        app: &App,
        form: Form,
        lease: Lease,
        has_logprobs: bool,
        echoes: Vec<Option<Echo>>,
        n_per_prompt: usize,
    ) -> Self {
        let prefix = match form {
            Form::Chat => "chatcmpl",
            Form::Completion => "cmpl",
        };
        let number = N_CALLS.fetch_add(1, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            form,
            id: format!("{prefix}-{:x}-{number:x}", app.created),
            created: now.map_or(0, |now| now.as_secs()),
            fingerprint: app.fingerprint(&lease),
            lease,
            has_logprobs,
            echoes,
            n_per_prompt,
            load_time: None,
        }
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.lease.text().tokenizer
    }

    fn object(&self, is_chunk: bool, choices: &[Value]) -> Map<String, Value> {
        let kind = match (self.form, is_chunk) {
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Chat, false) => "chat.completion",
            (Form::Completion, _) => "text_completion",
        };
        let object = json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.lease.name(),
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        });
        match object {
            Value::Object(object) => object,
            _ => unreachable!("it is written as an object"),
        }
    }

    /// Takes an event into an answer; the text and the tokens that are new with it.
    fn take(&self, index: usize, choice: &mut Choice, event: Event) -> (String, Logprobs) {
        let mut fresh = Logprobs::default();
        let text = match event {
            Event::Prompt { logprobs, .. } => match self.echoes.get(index).and_then(Option::as_ref)
            {
                None => String::new(),
                Some(echo) => {
                    fresh.tokens = echo.tokens.iter().copied().zip(logprobs).collect();
                    echo.text.clone()
                }
            },
            Event::Token { token, text, logprobs } => {
                fresh.tokens.extend(logprobs.map(|logprobs| (token, Some(logprobs))));
                text
            }
            Event::End { text, finish_reason, stop_token, usage } => {
                (choice.finish_reason, choice.usage) = (Some(finish_reason), usage);
                // Evaluations that ask for one token more than they want count on it.
                if self.form == Form::Completion {
                    fresh.tokens.extend(stop_token.map(|(token, of)| (token, Some(of))));
                }
                text
            }
            Event::Failed(_) => String::new(),
        };
        choice.text.push_str(&text);
        (text, fresh)
    }

    /// Takes an event into an answer.
    pub(crate) fn collect(&self, index: usize, choice: &mut Choice, event: Event) {
        let (_, fresh) = self.take(index, choice, event);
        choice.logprobs.tokens.extend(fresh.tokens);
    }

    /// All answers.
    pub(crate) fn whole(&self, choices: &[Choice]) -> Value {
        let one = |(index, choice): (usize, &Choice)| {
            let (logprobs, _) = self.logprobs(&choice.logprobs, 0);
            let reason = choice.finish_reason.map(FinishReason::name);
            match self.form {
                Form::Chat => json!({
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": null},
                    "logprobs": logprobs,
                    "finish_reason": reason,
                }),
                Form::Completion => json!({
                    "index": index,
                    "text": choice.text,
                    "logprobs": logprobs,
                    "finish_reason": reason,
                }),
            }
        };
        let list: Vec<Value> = choices.iter().enumerate().map(one).collect();
        let mut object = self.object(false, &list);
        object.insert("usage".to_owned(), self.usage(choices));
        Value::Object(object)
    }

    /// What all answers cost; a prompt with several is counted once.
    pub(crate) fn usage(&self, choices: &[Choice]) -> Value {
        let firsts = choices.iter().step_by(self.n_per_prompt.max(1));
        let (prompt, cached) = firsts.fold((0, 0), |(prompt, cached), choice| {
            (prompt + choice.usage.prompt_tokens, cached + choice.usage.cached_tokens)
        });
        let new: usize = choices.iter().map(|choice| choice.usage.new_tokens).sum();
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }

    /// The first piece of every answer of a chat says who speaks.
    pub(crate) fn opening(&self, n_choices: usize) -> Vec<Map<String, Value>> {
        if self.form == Form::Completion {
            return Vec::new();
        }
        let delta = json!({"role": "assistant", "content": ""});
        let one = |index: usize| self.chunk(index, &delta, &Value::Null, None);
        (0..n_choices).map(one).collect()
    }

    /// The piece that an event brings, if it brings one; `offset` is counted on. A token brings
    /// one without a text, too, while a character is not complete: clients see that it goes on.
    pub(crate) fn piece(
        &self,
        index: usize,
        choice: &mut Choice,
        event: Event,
        offset: &mut usize,
    ) -> Option<Map<String, Value>> {
        let is_token = matches!(event, Event::Token { .. });
        let (text, fresh) = self.take(index, choice, event);
        let (logprobs, end) = self.logprobs(&fresh, *offset);
        *offset = end;
        // Only the text's end is of use to a piece that comes later.
        choice.text.clear();
        let reason = choice.finish_reason;
        if !is_token && text.is_empty() && reason.is_none() {
            return None;
        }
        let logprobs = if fresh.tokens.is_empty() { Value::Null } else { logprobs };
        let content = match self.form {
            Form::Chat if reason.is_some() && text.is_empty() => json!({}),
            Form::Chat => json!({"content": text}),
            Form::Completion => Value::String(text),
        };
        Some(self.chunk(index, &content, &logprobs, reason))
    }

    fn chunk(
        &self,
        index: usize,
        content: &Value,
        logprobs: &Value,
        reason: Option<FinishReason>,
    ) -> Map<String, Value> {
        let content_name = match self.form {
            Form::Chat => "delta",
            Form::Completion => "text",
        };
        let choice = json!({
            "index": index,
            content_name: content,
            "logprobs": logprobs,
            "finish_reason": reason.map(FinishReason::name),
        });
        self.object(true, &[choice])
    }

    /// The piece without an answer that says what all have cost.
    pub(crate) fn closing(&self, choices: &[Choice]) -> Map<String, Value> {
        let mut object = self.object(true, &[]);
        object.insert("usage".to_owned(), self.usage(choices));
        object
    }

    /// Probabilities in the answer's form, and where the text ends that begins at `offset`.
    fn logprobs(&self, logprobs: &Logprobs, offset: usize) -> (Value, usize) {
        if !self.has_logprobs {
            return (Value::Null, offset);
        }
        match self.form {
            Form::Chat => (self.chat_logprobs(logprobs), offset),
            Form::Completion => self.completion_logprobs(logprobs, offset),
        }
    }

    fn token_text(&self, token: u32) -> String {
        self.tokenizer().token_text(token).unwrap_or_default()
    }

    fn chat_logprobs(&self, logprobs: &Logprobs) -> Value {
        let one = |token: u32, logprob: f64| {
            let text = self.token_text(token);
            let bytes: Vec<u8> = text.bytes().collect();
            json!({"token": text, "logprob": logprob, "bytes": bytes})
        };
        let content = logprobs.tokens.iter().filter_map(|(token, logprobs)| {
            let logprobs = logprobs.as_ref()?;
            let top: Vec<Value> = logprobs.top.iter().map(|(t, l)| one(*t, *l)).collect();
            let mut object = one(*token, logprobs.logprob);
            object["top_logprobs"] = Value::Array(top);
            Some(object)
        });
        json!({"content": content.collect::<Vec<_>>(), "refusal": null})
    }

    fn completion_logprobs(&self, logprobs: &Logprobs, mut offset: usize) -> (Value, usize) {
        let (mut tokens, mut of, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
        for (token, logprobs) in &logprobs.tokens {
            let text = self.token_text(*token);
            offsets.push(offset);
            offset += text.chars().count();
            tokens.push(text);
            of.push(logprobs.as_ref().map(|logprobs| logprobs.logprob));
            top.push(logprobs.as_ref().map(|logprobs| self.top(logprobs)));
        }
        let object = json!({
            "tokens": tokens,
            "token_logprobs": of,
            "top_logprobs": top,
            "text_offset": offsets,
        });
        (object, offset)
    }

    /// The likeliest tokens by text; one whose text another has goes by its name in the
    /// vocabulary.
    fn top(&self, logprobs: &TokenLogprobs) -> Value {
        let mut top = Map::new();
        for (token, logprob) in &logprobs.top {
            let mut name = self.token_text(*token);
            if top.contains_key(&name) {
                name = self.tokenizer().token_name(*token).unwrap_or_else(|| token.to_string());
            }
            top.insert(name, (*logprob).into());
        }
        Value::Object(top)
    }
}
