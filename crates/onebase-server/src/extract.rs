use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::app::App;
use crate::error::ApiError;

/// A body of JSON, refused in the form of OpenAI's errors.
///
/// The content type must say so: a page of another site cannot send that without the browser
/// asking first, which nothing here allows.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.map(|kind| kind.split(';').next().unwrap_or_default().trim());
        if !kind.is_some_and(|kind| kind.eq_ignore_ascii_case("application/json")) {
            let got = kind.unwrap_or("nothing");
            let message = format!("content-type: expected application/json, got {got}");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        // Before it is read, so that what is refused need not be sent.
        let said = request.headers().get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok());
        let (said, limit) = (said.and_then(|n| n.parse::<u64>().ok()), app.limits.body_bytes);
        if said.is_some_and(|n| n > limit as u64) {
            let message = format!("the body: expected at most {limit} bytes");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message));
        }
        let bytes = timeout(app.limits.body_time, Bytes::from_request(request, app)).await;
        let bytes = bytes.map_err(|_| {
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")
        })?;
        let bytes = bytes.map_err(|e| ApiError::new(e.status(), e.body_text()))?;
        let value = serde_json::from_slice(&bytes);
        value.map(Self).map_err(|e| ApiError::bad_request(format!("the body: {e}")))
    }
}
