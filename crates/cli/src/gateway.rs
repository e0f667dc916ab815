//! The client's side of the gateway: JSON requests and server-sent events over HTTP.

use std::time::{Duration, Instant};

use bytes::Bytes;
use drumline_wire::auth::Token;
use drumline_wire::line::deepest;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use crate::failure::Failure;

/// Longest time for a connection and for the first byte of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest silence within a stream.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest wait until a model that is ready is known.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(20);
/// The largest answer that is not a stream, and the longest event of one, in bytes.
const ANSWER_MAX_BYTES: usize = 8 << 20;

/// A gateway, as a client sees it.
#[derive(Debug, Clone)]
pub struct Gateway {
    client: Client<HttpConnector, Full<Bytes>>,
    /// `http://HOST:PORT`.
    pub url: String,
    token: Token,
}

impl Gateway {
    /// Prepares calls of the gateway at `url`.
    #[must_use]
    pub fn new(url: &str, token: Token) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(Duration::from_secs(3)));
        connector.set_nodelay(true);
        Self {
            client: Client::builder(TokioExecutor::new()).build(connector),
            url: url.trim_end_matches('/').to_owned(),
            token,
        }
    }

    /// Asks for a JSON document.
    ///
    /// # Errors
    /// Unreachable, or what the gateway refused.
    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        self.json(response).await
    }

    /// Waits until the gateway takes requests for a model: it hears of one that is ready a moment after
    /// the control plane.
    ///
    /// # Errors
    /// What the gateway said last.
    pub async fn until_ready(&self, model: &str) -> Result<(), Failure> {
        let begin = Instant::now();
        let mut last = Failure::failed("the gateway does not know the model");
        while begin.elapsed() < ROUTE_TIMEOUT {
            match self.get(&format!("/v1/models/{model}")).await {
                Ok(found) if found["ready"] == Value::Bool(true) => return Ok(()),
                Ok(_) => {}
                Err(failure) => last = failure,
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(last)
    }

    /// Sends a JSON document and takes one.
    ///
    /// # Errors
    /// Unreachable, or what the gateway refused.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let response = self.send(Method::POST, path, Bytes::from(body.to_string())).await?;
        self.json(response).await
    }

    /// Sends a JSON document and takes a stream of them.
    ///
    /// # Errors
    /// Unreachable, or what the gateway refused.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Events, Failure> {
        let response = self.send(Method::POST, path, Bytes::from(body.to_string())).await?;
        if response.status().is_success() {
            Ok(Events { body: response.into_body(), buffer: Vec::new(), url: self.url.clone() })
        } else {
            self.json(response)
                .await
                .and(Err(Failure::failed("the gateway refused without a reason")))
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<http::Response<Incoming>, Failure> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token.expose()))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| Failure::user(format!("gateway address {:?}: {error}", self.url)))?;
        match tokio::time::timeout(ANSWER_TIMEOUT, self.client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.unreachable(&deepest(&error))),
            Err(_) => Err(self.unreachable("no answer in time")),
        }
    }

    async fn json(&self, response: http::Response<Incoming>) -> Result<Value, Failure> {
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX_BYTES).collect();
        let bytes = match tokio::time::timeout(ANSWER_TIMEOUT, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return Err(self.unreachable(&error.to_string())),
            Err(_) => return Err(self.unreachable("the answer did not end in time")),
        };
        let value: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        if status.is_success() {
            return Ok(value);
        }
        Err(self.refused(status, &value))
    }

    fn refused(&self, status: StatusCode, body: &Value) -> Failure {
        let said = body.pointer("/error/message").and_then(Value::as_str);
        let said = said.map_or_else(|| status.to_string(), str::to_owned);
        match status.as_u16() {
            401 | 403 => Failure::user(format!("{} refused the token: {said}", self.url))
                .hint("name the cluster's token file with `--token-file`"),
            429 => Failure::failed(said).hint("the model's queue is full; try again in a moment"),
            400..500 => Failure::user(said),
            _ => Failure::failed(format!("{} answered {status}: {said}", self.url)),
        }
    }

    fn unreachable(&self, cause: &str) -> Failure {
        Failure::unreachable(format!("cannot reach the gateway at {}: {cause}", self.url))
            .hint("is it running? `drumline up` starts one on this machine")
    }
}

/// The events of a stream, in order.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    buffer: Vec<u8>,
    url: String,
}

impl Events {
    /// Returns the next event's JSON, or nothing after `[DONE]`.
    ///
    /// # Errors
    /// When the stream broke off, or carried an error.
    pub async fn next(&mut self) -> Result<Option<Value>, Failure> {
        loop {
            if let Some(data) = take_event(&mut self.buffer) {
                if data == "[DONE]" {
                    return Ok(None);
                }
                let event: Value = serde_json::from_str(&data).map_err(|error| {
                    Failure::failed(format!("{} sent no JSON: {error}", self.url))
                })?;
                if let Some(message) = event.pointer("/error/message").and_then(Value::as_str) {
                    return Err(Failure::failed(message));
                }
                return Ok(Some(event));
            }
            if self.buffer.len() > ANSWER_MAX_BYTES {
                return Err(Failure::failed(format!("{} sent an event without end", self.url)));
            }
            match tokio::time::timeout(SILENCE_TIMEOUT, self.body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Ok(Some(Err(error))) => {
                    return Err(Failure::failed(format!("the stream broke off: {error}")));
                }
                Ok(None) => return Err(Failure::failed("the stream ended before its last event")),
                Err(_) => return Err(Failure::failed("the stream fell silent")),
            }
        }
    }
}

/// Takes the first complete event's data out of the buffer; comments and other fields are dropped.
fn take_event(buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        let find = |pattern: &[u8]| {
            buffer
                .windows(pattern.len())
                .position(|window| window == pattern)
                .map(|at| (at, pattern.len()))
        };
        let (at, length) = match (find(b"\n\n"), find(b"\r\n\r\n")) {
            (Some(a), Some(b)) => a.min(b),
            (a, b) => a.or(b)?,
        };
        let event: Vec<u8> = buffer.drain(..at + length).collect();
        let text = String::from_utf8_lossy(&event);
        let data: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("data:"))
            .map(|data| data.strip_prefix(' ').unwrap_or(data))
            .collect();
        if !data.is_empty() {
            return Some(data.join("\n"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_out_whole_wherever_the_network_cuts_them() {
        let text = b": hello\n\ndata: {\"a\":1}\n\ndata: x\r\ndata: y\r\n\r\ndata: [DONE]\n\n";
        let mut buffer = Vec::new();
        let mut events = Vec::new();
        for byte in text {
            buffer.push(*byte);
            events.extend(take_event(&mut buffer));
        }
        assert_eq!(events, ["{\"a\":1}", "x\ny", "[DONE]"]);
        assert!(buffer.is_empty());
    }
}
