//! `POST /v1/chat/completions`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use drumline_wire::v1;
use futures::stream::StreamExt;
use serde_json::{Value, json};

use crate::completions::{Usage, finish_reason, finish_stream, sse};
use crate::error::ApiError;
use crate::generate::Generation;
use crate::params::{self, Body};
use crate::server::Gateway;
use crate::template;

/// Answers a chat request.
///
/// # Errors
/// For a body that is wrong, a model that is not served, not ready or full.
pub async fn create(State(gateway): State<Gateway>, bytes: Bytes) -> Result<Response, ApiError> {
    let mut body = Body::parse(&bytes)?;
    let sampling = params::sampling(&mut body)?;
    let messages = template::messages(&mut body)?;
    let mut request = sampling.request;
    let old_limit = body.whole("max_tokens", 1, 1 << 24)?;
    let limit = body.whole("max_completion_tokens", 1, 1 << 24)?.or(old_limit);
    // 0: as many as the context holds.
    request.max_tokens = limit.unwrap_or(0) as u32;
    let wanted = body.flag("logprobs")?;
    let top = body.whole("top_logprobs", 0, 20)?;
    if top.is_some() && !wanted {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs = true"));
    }
    request.logprobs = wanted.then(|| top.unwrap_or(0) as u32);
    body.only("response_format", &[json!({"type": "text"})])?;
    body.only("tools", &[json!([])])?;
    body.only("tool_choice", &[json!("none")])?;
    body.only("store", &[json!(false)])?;
    body.finish()?;

    let model = sampling.model;
    let health = gateway.health(&model).await?;
    let prompt =
        template::render(&health.chat_template, &messages, &health.bos_token, &health.eos_token)?;
    request.prompt = Some(v1::generate_request::Prompt::Text(prompt));
    let id = gateway.id("chatcmpl");
    request.request_id.clone_from(&id);
    let created = gateway.seconds();
    let generation = Generation::start(&gateway.routes, &gateway.meter, &model, request).await?;
    let head = move |object: &str, choices: Value| {
        json!({
            "id": id, "object": object, "created": created, "model": model, "choices": choices,
        })
    };
    if !sampling.stream {
        let event = generation.collect().await?;
        let mut usage = Usage::default();
        usage.add(&event);
        let choice = json!([{
            "index": 0,
            "message": { "role": "assistant", "content": event.text, "refusal": null },
            "logprobs": logprobs(&event, wanted),
            "finish_reason": finish_reason(&event),
        }]);
        let mut body = head("chat.completion", choice);
        body["usage"] = usage.json();
        return Ok(Json(body).into_response());
    }
    let mut usage = Usage::default();
    let last_head = head.clone();
    let mut first = true;
    let events = generation.into_stream().map(move |event| match event {
        Ok(event) => {
            let mut delta = json!({ "content": event.text });
            if std::mem::take(&mut first) {
                delta["role"] = json!("assistant");
            }
            if !event.finish_reason.is_empty() {
                usage.add(&event);
            }
            let choice = json!([{
                "index": 0, "delta": delta, "logprobs": logprobs(&event, wanted),
                "finish_reason": finish_reason(&event),
            }]);
            (sse(&head("chat.completion.chunk", choice)), usage)
        }
        Err(error) => (sse(&error.body()), usage),
    });
    Ok(finish_stream(events, sampling.include_usage, move |usage| {
        let mut chunk = last_head("chat.completion.chunk", json!([]));
        chunk["usage"] = usage.json();
        chunk
    }))
}

fn logprobs(event: &v1::GenerateEvent, wanted: bool) -> Value {
    if !wanted {
        return Value::Null;
    }
    let entry = |text: &str, logprob: f32| json!({ "token": text, "logprob": logprob, "bytes": text.as_bytes() });
    let content: Vec<Value> = event
        .tokens
        .iter()
        .map(|token| {
            let mut value = entry(&token.text, token.logprob);
            let top = token.top.iter().map(|t| entry(&t.text, t.logprob));
            value["top_logprobs"] = top.collect();
            value
        })
        .collect();
    json!({ "content": content })
}
