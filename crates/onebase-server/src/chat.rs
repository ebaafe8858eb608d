use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use onebase_engine::Request;
use onebase_model::Message;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::app::App;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::Body;
use crate::flow::Flow;
use crate::params::{Common, check_rest};
use crate::render::{Form, Head};
use crate::stream::respond;
use crate::structured::schema_of;
use crate::traces::Trace;

#[derive(Deserialize)]
pub(crate) struct ChatBody {
    messages: Vec<ChatMessage>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    max_completion_tokens: Option<usize>,
    response_format: Option<Value>,
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A message as clients write it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChatMessage {
    role: String,
    content: Option<Content>,
    /// Who of several speaks in a role; templates of this kind of model have no place for it.
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    refusal: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl ChatMessage {
    /// The message as a chat template gets it.
    pub(crate) fn plain(self) -> Result<Message, ApiError> {
        let bad = |message: String| Err(ApiError::parameter("messages", message));
        let role = match self.role.as_str() {
            "developer" => "system",
            role @ ("system" | "user" | "assistant") => role,
            role => {
                return bad(format!(
                    "messages: expected role system, user or assistant, got {role:?}"
                ));
            }
        };
        if self.name.is_some() || self.refusal.is_some_and(|refusal| !refusal.is_null()) {
            return bad(
                "messages: name and refusal have no place in the model's chat template".into()
            );
        }
        let content = match self.content {
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let mut content = String::new();
                for part in parts {
                    match (part.kind.as_str(), part.text) {
                        ("text", Some(text)) => content.push_str(&text),
                        (kind, _) => {
                            return bad(format!("messages: expected parts of text, got {kind:?}"));
                        }
                    }
                }
                content
            }
            None => return bad("messages: a message has no content".into()),
        };
        Ok(Message { role: role.to_owned(), content })
    }
}

impl ChatBody {
    fn top_logprobs(&self) -> Result<Option<usize>, ApiError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Ok(Some(top.unwrap_or(0))),
            (false, None) => Ok(None),
            (false, Some(_)) => {
                let message = "top_logprobs: only where logprobs is true";
                Err(ApiError::parameter("top_logprobs", message))
            }
        }
    }

    fn max_tokens(&self) -> Result<Option<usize>, ApiError> {
        match (self.max_completion_tokens, self.common.max_tokens) {
            (Some(new), Some(old)) if new != old => {
                let message = "max_completion_tokens and max_tokens are two numbers";
                Err(ApiError::parameter("max_tokens", message))
            }
            (new, old) => Ok(new.or(old)),
        }
    }
}

/// `POST /v1/chat/completions`
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    caller: Caller,
    trace: Trace,
    Body(body): Body<ChatBody>,
) -> Result<Response, ApiError> {
    check_rest(&body.rest)?;
    let schema = schema_of(body.response_format.as_ref())?;
    let (n, logprobs, asked) = (body.common.n()?, body.top_logprobs()?, body.max_tokens()?);
    let (is_stream, wants_usage) = (body.common.is_stream()?, body.common.wants_usage());
    let (lease, load_time) = app.lease(&caller, &body.common.model).await?;
    trace.leased(&lease, load_time);
    if body.messages.is_empty() {
        return Err(ApiError::parameter("messages", "messages: expected at least one"));
    }
    let messages =
        body.messages.into_iter().map(ChatMessage::plain).collect::<Result<Vec<_>, _>>()?;
    let speaker = lease.clone();
    let prompt = app.blocking(move || Ok(speaker.text().encode_chat(&messages)?)).await?;
    let constraints = app.constraints(&lease, schema, n).await?;
    let requests = constraints
        .into_iter()
        .zip(0u64..)
        .map(|(constraint, index)| {
            let mut request = body.common.request(&app, &lease, prompt.clone(), asked)?;
            request.sampling.seed = request.sampling.seed.wrapping_add(index);
            request.logprobs = logprobs;
            request.constraint = constraint;
            Ok(request)
        })
        .collect::<Result<Vec<Request>, ApiError>>()?;
    let flow = Flow::start(&app, &lease, requests, caller, trace)?;
    let head = Head::new(&app, Form::Chat, lease, logprobs.is_some(), vec![None; n], n);
    let head = Head { load_time, ..head };
    respond(head, flow, n, is_stream, wants_usage).await
}
