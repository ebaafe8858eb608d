use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use onebase_engine::Error as EngineError;
use serde_json::{Value, json};

/// A refusal in the form that OpenAI's clients turn into their exceptions.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    message: String,
    /// The parameter at fault.
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<Duration>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message, param: None, code: None, retry_after: None }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A parameter is out of range, or is none that this server knows.
    pub(crate) fn parameter(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::bad_request(message) }
    }

    pub(crate) fn no_model(name: &str) -> Self {
        let message = format!("there is no model {name:?}");
        let param = Some("model".to_owned());
        Self { param, ..Self::new(StatusCode::NOT_FOUND, message) }.code("model_not_found")
    }

    pub(crate) fn too_many(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, message);
        Self { retry_after: Some(retry_after), ..error }
    }

    pub(crate) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(Duration::from_secs(seconds));
        self
    }

    /// The error object.
    pub(crate) fn object(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let mut message = error.full();
        if let Some(hint) = error.hint() {
            message = format!("{message} (hint: {hint})");
        }
        let with = |status| Self::new(status, message.clone());
        match &error {
            EngineError::UnknownTenant { .. } => {
                let param = Some("model".to_owned());
                Self { param, ..with(StatusCode::NOT_FOUND) }.code("model_not_found")
            }
            EngineError::TenantFailed { .. } => {
                with(StatusCode::SERVICE_UNAVAILABLE).code("model_failed").retry_after(5)
            }
            EngineError::Generation { .. } => with(StatusCode::CONFLICT).code("generation"),
            EngineError::Busy { .. } => with(StatusCode::CONFLICT).code("busy"),
            EngineError::NoRoom { .. } => {
                with(StatusCode::SERVICE_UNAVAILABLE).code("no_memory").retry_after(1)
            }
            EngineError::QueueFull { retry_after, .. } => {
                Self::too_many(message, *retry_after).code("queue_full")
            }
            EngineError::Deadline => with(StatusCode::GATEWAY_TIMEOUT).code("timeout"),
            EngineError::Draining => {
                with(StatusCode::SERVICE_UNAVAILABLE).code("shutting_down").retry_after(1)
            }
            EngineError::Context { .. } | EngineError::KvTooSmall { .. } => {
                with(StatusCode::BAD_REQUEST).code("context_length_exceeded")
            }
            EngineError::Invalid { field, .. } => Self::parameter(field, message),
            EngineError::Internal | EngineError::Threads(_) => {
                with(StatusCode::INTERNAL_SERVER_ERROR)
            }
            EngineError::Model(e) if matches!(**e, onebase_model::Error::NotFinite { .. }) => {
                with(StatusCode::INTERNAL_SERVER_ERROR)
            }
            _ => with(StatusCode::BAD_REQUEST),
        }
    }
}

impl From<onebase_model::Error> for ApiError {
    fn from(error: onebase_model::Error) -> Self {
        EngineError::from(error).into()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.object())).into_response();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0);
            if let Ok(value) = HeaderValue::from_str(&format!("{seconds:.0}")) {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let value = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
        response
    }
}
