//! `POST /v1/completions`.

use std::convert::Infallible;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use drumline_wire::v1;
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::generate::Generation;
use crate::params::{self, Body};
use crate::server::Gateway;

/// The default of `max_tokens`, as OpenAI has it.
const MAX_TOKENS_DEFAULT: u64 = 16;

/// Answers a completion request.
///
/// # Errors
/// For a body that is wrong, a model that is not served, not ready or full.
pub async fn create(State(gateway): State<Gateway>, bytes: Bytes) -> Result<Response, ApiError> {
    let mut body = Body::parse(&bytes)?;
    let sampling = params::sampling(&mut body)?;
    let prompts = params::prompts(&mut body)?;
    let mut request = sampling.request;
    request.max_tokens = body.whole("max_tokens", 1, 1 << 24)?.unwrap_or(MAX_TOKENS_DEFAULT) as u32;
    request.logprobs = body.whole("logprobs", 0, 20)?.map(|count| count as u32);
    request.echo = body.flag("echo")?;
    body.only("best_of", &[json!(1)])?;
    body.only("suffix", &[json!("")])?;
    body.finish()?;

    if let Some(places) = gateway.routes.places(&sampling.model)
        && prompts.len() > places
    {
        let message = format!("{} prompts at once; this model takes {places}", prompts.len());
        return Err(ApiError::invalid("prompt", message));
    }
    let head = Head { id: gateway.id("cmpl"), model: sampling.model, created: gateway.seconds() };
    let mut generations = Vec::new();
    for (index, prompt) in prompts.into_iter().enumerate() {
        let mut request = request.clone();
        request.request_id = format!("{}-{index}", head.id);
        request.prompt = Some(prompt);
        generations
            .push(Generation::start(&gateway.routes, &gateway.meter, &head.model, request).await?);
    }
    if sampling.stream {
        Ok(streamed(generations, head, sampling.include_usage))
    } else {
        let mut choices = Vec::new();
        let mut usage = Usage::default();
        let parts = futures::future::try_join_all(generations.into_iter().map(Generation::collect));
        for (index, event) in parts.await?.into_iter().enumerate() {
            usage.add(&event);
            choices.push(choice(index, &event, 0));
        }
        let mut body = head.chunk(&choices);
        body["usage"] = usage.json();
        Ok(Json(body).into_response())
    }
}

/// What every part of one answer repeats.
#[derive(Debug, Clone)]
struct Head {
    id: String,
    model: String,
    created: u64,
}

impl Head {
    fn chunk(&self, choices: &[Value]) -> Value {
        json!({
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.model, "choices": choices,
        })
    }
}

/// Tokens of one answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    prompt: u32,
    completion: u32,
    cached: u32,
}

impl Usage {
    /// Adds a finished generation.
    pub fn add(&mut self, event: &v1::GenerateEvent) {
        self.prompt += event.prompt_tokens;
        self.completion += event.completion_tokens;
        self.cached += event.cached_tokens;
    }

    /// Returns the `usage` object.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// Returns a finish reason as clients expect it: `null` while it goes on.
#[must_use]
pub fn finish_reason(event: &v1::GenerateEvent) -> Value {
    match event.finish_reason.as_str() {
        "" => Value::Null,
        reason => json!(reason),
    }
}

fn choice(index: usize, event: &v1::GenerateEvent, text_offset: usize) -> Value {
    json!({
        "index": index, "text": event.text, "logprobs": logprobs(event, text_offset),
        "finish_reason": finish_reason(event),
    })
}

fn logprobs(event: &v1::GenerateEvent, text_offset: usize) -> Value {
    let tokens = &event.tokens;
    if tokens.iter().all(|token| token.top.is_empty()) {
        return Value::Null;
    }
    let mut offset = text_offset;
    let offsets: Vec<usize> = tokens
        .iter()
        .map(|token| {
            let here = offset;
            offset += token.text.chars().count();
            here
        })
        .collect();
    json!({
        "tokens": tokens.iter().map(|token| token.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(|token| {
            Value::Object(token.top.iter().map(|t| (t.text.clone(), json!(t.logprob))).collect())
        }).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

fn streamed(generations: Vec<Generation>, head: Head, include_usage: bool) -> Response {
    let parts = generations.into_iter().enumerate().map(|(index, generation)| {
        generation.into_stream().map(move |event| (index, event)).boxed()
    });
    let mut usage = Usage::default();
    let mut offset = std::collections::BTreeMap::<usize, usize>::new();
    let last_head = head.clone();
    let events = stream::select_all(parts).map(move |(index, event)| match event {
        Ok(event) => {
            let at = offset.entry(index).or_default();
            let part = choice(index, &event, *at);
            *at += event.text.chars().count();
            if !event.finish_reason.is_empty() {
                usage.add(&event);
            }
            (sse(&head.chunk(&[part])), usage)
        }
        Err(error) => (sse(&error.body()), usage),
    });
    finish_stream(events, include_usage, move |usage| {
        let mut chunk = last_head.chunk(&[]);
        chunk["usage"] = usage.json();
        chunk
    })
}

/// Returns one server-sent event.
pub fn sse(value: &Value) -> Event {
    Event::default().data(value.to_string())
}

/// Ends a stream of events, each with the usage so far, as OpenAI's clients expect it: with the
/// usage, where it was asked for, and `[DONE]`.
pub fn finish_stream(
    events: impl stream::Stream<Item = (Event, Usage)> + Send + 'static,
    include_usage: bool,
    usage_chunk: impl FnOnce(Usage) -> Value + Send + 'static,
) -> Response {
    let state = (Box::pin(events), Usage::default(), Some(usage_chunk), 0);
    let whole = stream::unfold(state, move |(mut events, usage, chunk, stage)| async move {
        match stage {
            0 => match events.next().await {
                Some((event, usage)) => Some((event, (events, usage, chunk, 0))),
                None if include_usage => {
                    let make = chunk?;
                    Some((sse(&make(usage)), (events, usage, None, 1)))
                }
                None => Some((Event::default().data("[DONE]"), (events, usage, None, 2))),
            },
            1 => Some((Event::default().data("[DONE]"), (events, usage, None, 2))),
            _ => None,
        }
    });
    Sse::new(whole.map(Ok::<_, Infallible>)).keep_alive(KeepAlive::default()).into_response()
}
