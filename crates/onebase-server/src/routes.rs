use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;

use crate::app::App;
use crate::error::ApiError;
use crate::{admin, chat, completions, metrics, models, page, tokenize, traces};

/// The routes of an app.
pub fn router(app: Arc<App>) -> Router {
    let limit = DefaultBodyLimit::max(app.limits.body_bytes);
    let traced = axum::middleware::from_fn_with_state(Arc::clone(&app), traces::traced);
    let answers = Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route_layer(traced);
    Router::new()
        .route("/", get(page::index))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/openapi.json", get(page::openapi))
        .merge(answers)
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::get))
        .route("/v1/load_lora_adapter", post(admin::load_adapter))
        .route("/v1/unload_lora_adapter", post(admin::unload_adapter))
        .route("/admin/tenants", get(admin::list))
        .route("/admin/tenants/{*name}", put(admin::put).delete(admin::delete))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/status", get(models::status))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics::metrics))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(limit)
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(app)
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    if !app.engine.is_serving() {
        return ApiError::from(onebase_engine::Error::Draining).into_response();
    }
    Json(json!({"status": "ready"})).into_response()
}

async fn unknown(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no {}", uri.path()))
}

async fn wrong_method(uri: Uri) -> ApiError {
    let message = format!("{} has another method", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

// By value: the signature that the layer calls.
#[allow(clippy::needless_pass_by_value)]
fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    ApiError::from(onebase_engine::Error::Internal).into_response()
}
