use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::App;
use crate::auth::Caller;
use crate::chat::ChatMessage;
use crate::error::ApiError;
use crate::extract::Body;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenizeBody {
    model: String,
    prompt: Option<String>,
    messages: Option<Vec<ChatMessage>>,
    add_special_tokens: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DetokenizeBody {
    model: String,
    tokens: Vec<u32>,
}

/// `POST /tokenize`
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body(body): Body<TokenizeBody>,
) -> Result<Json<Value>, ApiError> {
    let (lease, _) = app.lease(&caller, &body.model).await?;
    let context_tokens = lease.config().context_tokens;
    let tokens = app
        .blocking(move || match (body.prompt, body.messages) {
            (Some(prompt), None) => {
                let is_begun = body.add_special_tokens.unwrap_or(true);
                Ok(lease.text().tokenizer.encode(&prompt, is_begun)?)
            }
            (None, Some(messages)) => {
                let messages = messages.into_iter().map(ChatMessage::plain);
                let messages = messages.collect::<Result<Vec<_>, _>>()?;
                Ok(lease.text().encode_chat(&messages)?)
            }
            _ => Err(ApiError::bad_request("expected one of prompt and messages")),
        })
        .await?;
    let count = tokens.len();
    Ok(Json(json!({"tokens": tokens, "count": count, "max_model_len": context_tokens})))
}

/// `POST /detokenize`
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body(body): Body<DetokenizeBody>,
) -> Result<Json<Value>, ApiError> {
    let (lease, _) = app.lease(&caller, &body.model).await?;
    let prompt = app.blocking(move || Ok(lease.text().tokenizer.decode(&body.tokens)?)).await?;
    Ok(Json(json!({"prompt": prompt})))
}
