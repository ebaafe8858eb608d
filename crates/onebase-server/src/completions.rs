use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use onebase_engine::{Lease, Request};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::app::App;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::Body;
use crate::flow::Flow;
use crate::params::{Common, MAX_CHOICES, check_rest};
use crate::render::{Echo, Form, Head};
use crate::stream::respond;
use crate::structured::schema_of;
use crate::traces::Trace;

/// Tokens that an answer has where no number is asked for, as OpenAI has it.
const DEFAULT_TOKENS: usize = 16;

#[derive(Deserialize)]
pub(crate) struct CompletionBody {
    prompt: Prompt,
    echo: Option<bool>,
    logprobs: Option<usize>,
    best_of: Option<usize>,
    response_format: Option<Value>,
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    ManyTokens(Vec<Vec<u32>>),
}

impl Prompt {
    fn echoes(self, lease: &Lease) -> Result<Vec<Echo>, ApiError> {
        let tokenizer = &lease.text().tokenizer;
        let text = |text: String| -> Result<Echo, ApiError> {
            let tokens = tokenizer.encode(&text, true)?;
            Ok(Echo { text, tokens })
        };
        let tokens = |tokens: Vec<u32>| -> Result<Echo, ApiError> {
            Ok(Echo { text: tokenizer.decode(&tokens)?, tokens })
        };
        match self {
            Prompt::Text(one) => Ok(vec![text(one)?]),
            Prompt::Tokens(one) => Ok(vec![tokens(one)?]),
            Prompt::Texts(many) => many.into_iter().map(text).collect(),
            Prompt::ManyTokens(many) => many.into_iter().map(tokens).collect(),
        }
    }
}

/// `POST /v1/completions`
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    caller: Caller,
    trace: Trace,
    Body(body): Body<CompletionBody>,
) -> Result<Response, ApiError> {
    check_rest(&body.rest)?;
    let schema = schema_of(body.response_format.as_ref())?;
    let (n, is_echo) = (body.common.n()?, body.echo.unwrap_or(false));
    if let Some(best_of) = body.best_of.filter(|best_of| *best_of != n) {
        let message = format!("best_of: expected n, {n}, got {best_of}");
        return Err(ApiError::parameter("best_of", message));
    }
    let (is_stream, wants_usage) = (body.common.is_stream()?, body.common.wants_usage());
    let (lease, load_time) = app.lease(&caller, &body.common.model).await?;
    trace.leased(&lease, load_time);
    let (speaker, prompt) = (lease.clone(), body.prompt);
    let prompts = app.blocking(move || prompt.echoes(&speaker)).await?;
    let n_choices = prompts.len().saturating_mul(n);
    if !(1..=MAX_CHOICES).contains(&n_choices) {
        let message = format!("prompt: expected 1 to {MAX_CHOICES} answers, got {n_choices}");
        return Err(ApiError::parameter("prompt", message));
    }
    let asked = body.common.max_tokens.unwrap_or(DEFAULT_TOKENS);
    let mut constraints = app.constraints(&lease, schema, n_choices).await?.into_iter();
    let (mut requests, mut echoes): (Vec<Request>, Vec<Option<Echo>>) = (Vec::new(), Vec::new());
    for prompt in prompts {
        for index in 0..n {
            let tokens = prompt.tokens.clone();
            let mut request = body.common.request(&app, &lease, tokens, Some(asked))?;
            request.sampling.seed = request.sampling.seed.wrapping_add(index as u64);
            request.logprobs = body.logprobs;
            request.prompt_logprobs = body.logprobs.filter(|_| is_echo);
            request.constraint = constraints.next().flatten();
            requests.push(request);
            echoes.push(is_echo.then(|| prompt.clone()));
        }
    }
    let flow = Flow::start(&app, &lease, requests, caller, trace)?;
    let head = Head::new(&app, Form::Completion, lease, body.logprobs.is_some(), echoes, n);
    let head = Head { load_time, ..head };
    respond(head, flow, n_choices, is_stream, wants_usage).await
}
