//! Errors as OpenAI's clients expect them.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// A refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
    pub kind: &'static str,
    /// A short stable code.
    pub code: &'static str,
    /// What is wrong and what would help.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// Seconds after which another try makes sense.
    pub retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: String) -> Self {
        Self { status, kind, code, message, param: None, retry_after: None }
    }

    /// The request is wrong; `param` names the field.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        let kind = "invalid_request_error";
        let mut error = Self::new(StatusCode::BAD_REQUEST, kind, "invalid_value", message.into());
        error.param = (!param.is_empty()).then(|| param.to_owned());
        error
    }

    /// No valid key was shown.
    #[must_use]
    pub fn unauthenticated() -> Self {
        let message = "no valid key: send `Authorization: Bearer KEY`; it is in the state folder's file `gateway-key`";
        let kind = "authentication_error";
        Self::new(StatusCode::UNAUTHORIZED, kind, "invalid_api_key", message.to_owned())
    }

    /// The model is not served.
    #[must_use]
    pub fn no_such_model(model: &str, served: &[String]) -> Self {
        let list = if served.is_empty() {
            "no model is served now".to_owned()
        } else {
            format!("served now: {}", served.join(", "))
        };
        let message = format!("the model {model:?} does not exist here; {list}");
        let kind = "invalid_request_error";
        let mut error = Self::new(StatusCode::NOT_FOUND, kind, "model_not_found", message);
        error.param = Some("model".to_owned());
        error
    }

    /// The queue is full.
    #[must_use]
    pub fn busy(message: String) -> Self {
        let status = StatusCode::TOO_MANY_REQUESTS;
        let mut error = Self::new(status, "rate_limit_error", "queue_full", message);
        error.retry_after = Some(1);
        error
    }

    /// The model is not ready or its ranks are gone.
    #[must_use]
    pub fn unavailable(message: String) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let mut error = Self::new(status, "server_error", "model_unavailable", message);
        error.retry_after = Some(2);
        error
    }

    /// What a rank answered, as a client shall see it.
    #[must_use]
    pub fn from_rank(status: &tonic::Status) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            tonic::Code::ResourceExhausted => Self::busy(message),
            tonic::Code::InvalidArgument => Self::invalid("", message),
            tonic::Code::DeadlineExceeded => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                "timeout",
                format!("the model did not answer in time: {message}"),
            ),
            _ => Self::unavailable(format!("the model's ranks are gone: {message}")),
        }
    }

    /// Returns the JSON body.
    #[must_use]
    pub fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let response = (self.status, Json(self.body())).into_response();
        match self.retry_after {
            Some(seconds) => drumline_web::retry_after(response, seconds),
            None => response,
        }
    }
}
