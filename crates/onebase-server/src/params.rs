use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use onebase_engine::{Lease, Request};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::app::App;
use crate::error::ApiError;

/// Most answers of one call.
pub(crate) const MAX_CHOICES: usize = 128;

/// Parameters that change nothing about an answer, and are taken from clients that send them.
const HARMLESS: [&str; 6] =
    ["metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"];

/// One text, or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Texts {
    One(String),
    Many(Vec<String>),
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    pub(crate) include_usage: bool,
    /// Padding against guessing texts by sizes; there is none here.
    #[serde(default)]
    #[allow(dead_code)]
    include_obfuscation: bool,
}

/// What chats and completions have in common.
#[derive(Debug, Deserialize)]
pub(crate) struct Common {
    pub(crate) model: String,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    #[serde(default)]
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    pub(crate) n: Option<usize>,
    stop: Option<Texts>,
    #[serde(default)]
    stop_token_ids: Option<Vec<u32>>,
    #[serde(default)]
    ignore_eos: Option<bool>,
    pub(crate) max_tokens: Option<usize>,
    #[serde(default)]
    pub(crate) stream: Option<bool>,
    #[serde(default)]
    pub(crate) stream_options: Option<StreamOptions>,
}

impl Common {
    pub(crate) fn n(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n if (1..=MAX_CHOICES).contains(&n) => Ok(n),
            n => {
                let message = format!("n: expected a number from 1 to {MAX_CHOICES}, got {n}");
                Err(ApiError::parameter("n", message))
            }
        }
    }

    pub(crate) fn wants_usage(&self) -> bool {
        self.stream_options.is_some_and(|options| options.include_usage)
    }

    pub(crate) fn is_stream(&self) -> Result<bool, ApiError> {
        let is_stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !is_stream {
            let message = "stream_options: only where stream is true";
            return Err(ApiError::parameter("stream_options", message));
        }
        Ok(is_stream)
    }

    /// A request for a prompt, the tenant's own defaults where nothing is said. The number of
    /// tokens that it may add is `asked`, or what there is room for up to the server's limit.
    pub(crate) fn request(
        &self,
        app: &App,
        lease: &Lease,
        prompt: Vec<u32>,
        asked: Option<usize>,
    ) -> Result<Request, ApiError> {
        let limit = app.limits.answer_tokens;
        if let Some(asked) = asked.filter(|asked| *asked > limit) {
            let message = format!("max_tokens: expected at most {limit}, got {asked}");
            return Err(ApiError::parameter("max_tokens", message));
        }
        let room = lease.config().context_tokens.min(app.engine.kv_tokens());
        let room = room.saturating_sub(prompt.len());
        // Where there is no room at all, the engine says so.
        let max_new_tokens = asked.unwrap_or(limit.min(room).max(1));
        let mut request = Request::greedy(prompt, max_new_tokens);
        request.set_defaults(lease.text().defaults);
        request.deadline = Some(std::time::Instant::now() + app.limits.request_time);
        self.set_sampling(&mut request)?;
        request.stop_texts = match &self.stop {
            None => Vec::new(),
            Some(Texts::One(text)) => vec![text.clone()],
            Some(Texts::Many(texts)) => texts.clone(),
        };
        request.stop_tokens = self.stop_token_ids.clone().unwrap_or_default();
        request.ignore_end = self.ignore_eos.unwrap_or(false);
        Ok(request)
    }

    fn set_sampling(&self, request: &mut Request) -> Result<(), ApiError> {
        let set = |to: &mut f32, value: Option<f32>| *to = value.unwrap_or(*to);
        set(&mut request.sampling.temperature, self.temperature);
        set(&mut request.sampling.top_p, self.top_p);
        set(&mut request.penalties.presence, self.presence_penalty);
        set(&mut request.penalties.frequency, self.frequency_penalty);
        set(&mut request.penalties.repetition, self.repetition_penalty);
        match self.top_k {
            None => {}
            // As other servers have it, −1 is all.
            Some(-1) => request.sampling.top_k = 0,
            Some(k) => {
                request.sampling.top_k = usize::try_from(k).map_err(|_| {
                    ApiError::parameter("top_k", format!("top_k: expected at least -1, got {k}"))
                })?;
            }
        }
        for (token, bias) in self.logit_bias.iter().flatten() {
            let message = || format!("logit_bias: expected the number of a token, got {token:?}");
            let token = token.parse().map_err(|_| ApiError::parameter("logit_bias", message()))?;
            request.logit_bias.push((token, *bias));
        }
        request.sampling.seed =
            self.seed.map_or_else(|| RandomState::new().hash_one(0), i64::cast_unsigned);
        Ok(())
    }
}

/// Refuses parameters that are not known: one that was ignored would change the answer silently.
pub(crate) fn check_rest(rest: &Map<String, Value>) -> Result<(), ApiError> {
    let unknown =
        |(name, value): &(&String, &Value)| !value.is_null() && !HARMLESS.contains(&name.as_str());
    match rest.iter().find(unknown) {
        None => Ok(()),
        Some((name, _)) => {
            let message = format!("{name}: this server does not have that parameter");
            Err(ApiError::parameter(name, message).code("unsupported_parameter"))
        }
    }
}
