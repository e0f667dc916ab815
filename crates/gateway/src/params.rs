//! Turns a JSON body into parameters. A field that is not supported is refused, never ignored.

use drumline_wire::v1;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// The most prompts in one completion request.
pub const PROMPTS_MAX: usize = 16;
/// The most stop strings.
pub const STOPS_MAX: usize = 16;

/// A JSON body whose fields are taken one by one; what is left at the end is refused.
#[derive(Debug)]
pub struct Body {
    fields: Map<String, Value>,
}

impl Body {
    /// Parses a body.
    ///
    /// # Errors
    /// When it is not a JSON object; the message tells where it stops being one.
    pub fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(fields)) => Ok(Self { fields }),
            Ok(_) => Err(ApiError::invalid("", "the body must be a JSON object")),
            Err(error) => Err(ApiError::invalid("", format!("the body is not JSON: {error}"))),
        }
    }

    /// Takes a field; `null` counts as absent.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a text.
    ///
    /// # Errors
    /// When it is there and is no text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, "a string", &other)),
        }
    }

    /// Takes a truth value.
    ///
    /// # Errors
    /// When it is there and is none.
    pub fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(wrong(name, "true or false", &other)),
        }
    }

    /// Takes a whole number within a range.
    ///
    /// # Errors
    /// When it is there and is out of the range.
    pub fn whole(&mut self, name: &str, low: u64, high: u64) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64().filter(|number| (low..=high).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(name, &format!("a whole number from {low} to {high}"), &value)),
        }
    }

    /// Takes a number within a range.
    ///
    /// # Errors
    /// When it is there and is out of the range.
    pub fn number(&mut self, name: &str, low: f64, high: f64) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().filter(|number| (low..=high).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(name, &format!("a number from {low} to {high}"), &value)),
        }
    }

    /// Takes a field that is known but only supported at one value.
    ///
    /// # Errors
    /// When it has any other value.
    pub fn only(&mut self, name: &str, neutral: &[Value]) -> Result<(), ApiError> {
        match self.take(name) {
            None => Ok(()),
            Some(value) if neutral.contains(&value) => Ok(()),
            Some(Value::Number(number))
                if neutral.iter().any(|n| n.as_f64() == number.as_f64()) =>
            {
                Ok(())
            }
            Some(value) => Err(ApiError::invalid(
                name,
                format!("{name} = {value} is not supported; leave it out or use {}", neutral[0]),
            )),
        }
    }

    /// Ends the taking.
    ///
    /// # Errors
    /// When a field is left: it is not supported.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.fields.into_iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                Err(ApiError::invalid(&name, format!("the field {name:?} is not supported")))
            }
        }
    }
}

fn wrong(name: &str, expected: &str, got: &Value) -> ApiError {
    let mut shown = got.to_string();
    if shown.len() > 80 {
        let cut = (0..=80).rev().find(|at| shown.is_char_boundary(*at)).unwrap_or(0);
        shown.truncate(cut);
        shown.push('…');
    }
    ApiError::invalid(name, format!("{name} must be {expected}, got {shown}"))
}

/// What completions and chat have in common.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// The served model's name.
    pub model: String,
    /// Send server-sent events.
    pub stream: bool,
    /// Add a last event with the usage.
    pub include_usage: bool,
    /// The request as ranks take it, without its prompt.
    pub request: v1::GenerateRequest,
}

/// Takes the fields that completions and chat have in common.
///
/// # Errors
/// For the first field that is wrong or not supported.
pub fn sampling(body: &mut Body) -> Result<Sampling, ApiError> {
    let model =
        body.text("model")?.ok_or_else(|| ApiError::invalid("model", "model is missing"))?;
    let stream = body.flag("stream")?;
    let include_usage = stream_options(body, stream)?;
    let request = v1::GenerateRequest {
        temperature: body.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32,
        top_p: body.number("top_p", 0.0, 1.0)?.unwrap_or(1.0) as f32,
        top_k: body.whole("top_k", 0, 1 << 20)?.unwrap_or(0) as u32,
        seed: body.whole("seed", 0, u64::MAX)?,
        stop: stops(body)?,
        ignore_eos: body.flag("ignore_eos")?,
        ..v1::GenerateRequest::default()
    };
    let zero = [Value::from(0)];
    let none = [Value::Object(Map::new())];
    body.only("n", &[Value::from(1)])?;
    body.only("presence_penalty", &zero)?;
    body.only("frequency_penalty", &zero)?;
    body.only("logit_bias", &none)?;
    // Tells the provider who asks; it changes nothing in the answer.
    body.text("user")?;
    Ok(Sampling { model, stream, include_usage, request })
}

fn stream_options(body: &mut Body, stream: bool) -> Result<bool, ApiError> {
    let name = "stream_options";
    match body.take(name) {
        None => Ok(false),
        Some(_) if !stream => {
            Err(ApiError::invalid(name, "stream_options is only allowed with stream = true"))
        }
        Some(Value::Object(fields)) => {
            let mut options = Body { fields };
            let include = options.flag("include_usage")?;
            options.finish()?;
            Ok(include)
        }
        Some(other) => Err(wrong(name, "an object", &other)),
    }
}

fn stops(body: &mut Body) -> Result<Vec<String>, ApiError> {
    let expected = format!("a string or up to {STOPS_MAX} strings, none of them empty");
    let value = match body.take("stop") {
        None => return Ok(Vec::new()),
        Some(value) => value,
    };
    let list = match &value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(items) => {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        }
        _ => None,
    };
    list.filter(|list| list.len() <= STOPS_MAX && list.iter().all(|stop| !stop.is_empty()))
        .ok_or_else(|| wrong("stop", &expected, &value))
}

/// Takes `prompt`: a text, several texts, tokens, or several lists of tokens.
///
/// # Errors
/// When it is missing or of another form.
pub fn prompts(body: &mut Body) -> Result<Vec<v1::generate_request::Prompt>, ApiError> {
    use v1::generate_request::Prompt;
    let expected = "a string, strings, token ids, or lists of token ids";
    let value =
        body.take("prompt").ok_or_else(|| ApiError::invalid("prompt", "prompt is missing"))?;
    let tokens = |items: &[Value]| -> Option<Prompt> {
        let ids: Option<Vec<u32>> =
            items.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
        ids.filter(|ids| !ids.is_empty()).map(|ids| Prompt::Tokens(v1::TokenIds { ids }))
    };
    let list = match &value {
        Value::String(text) => Some(vec![Prompt::Text(text.clone())]),
        Value::Array(items) if items.first().is_some_and(Value::is_number) => {
            tokens(items).map(|prompt| vec![prompt])
        }
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => Some(Prompt::Text(text.clone())),
                Value::Array(ids) => tokens(ids),
                _ => None,
            })
            .collect::<Option<Vec<_>>>(),
        _ => None,
    };
    let list =
        list.filter(|list| !list.is_empty()).ok_or_else(|| wrong("prompt", expected, &value))?;
    if list.len() > PROMPTS_MAX {
        let message = format!("{} prompts in one request; at most {PROMPTS_MAX}", list.len());
        return Err(ApiError::invalid("prompt", message));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn body(value: &Value) -> Body {
        Body::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_field_that_is_not_supported_is_refused_by_name() {
        for (field, value) in [
            ("n", json!(2)),
            ("logit_bias", json!({"5": 1})),
            ("presence_penalty", json!(0.5)),
            ("temprature", json!(1)),
            ("stop", json!([1])),
            ("temperature", json!(-1)),
            ("top_p", json!("high")),
            ("stream_options", json!({"include_usage": true})),
        ] {
            let mut body = body(&json!({ "model": "m", field: value }));
            let outcome = sampling(&mut body).and_then(|_| body.finish());
            let error = outcome.expect_err(field);
            assert_eq!(error.param.as_deref(), Some(field));
            assert!(error.message.contains(field), "{}", error.message);
        }
    }

    #[test]
    fn neutral_values_pass() {
        let mut body = body(&json!({
            "model": "m", "n": 1, "presence_penalty": 0.0, "logit_bias": {}, "user": "me",
            "stop": "x", "seed": 7, "stream": true, "stream_options": {"include_usage": true},
            "temperature": null,
        }));
        let sampling = sampling(&mut body).unwrap();
        body.finish().unwrap();
        assert!(sampling.stream && sampling.include_usage);
        assert_eq!(sampling.request.stop, ["x"]);
        assert_eq!(sampling.request.temperature, 1.0);
    }

    #[test]
    fn every_form_of_prompt_is_understood() {
        for (prompt, count) in [
            (json!("a"), 1),
            (json!(["a", "b"]), 2),
            (json!([1, 2, 3]), 1),
            (json!([[1, 2], [3]]), 2),
        ] {
            assert_eq!(prompts(&mut body(&json!({ "prompt": prompt }))).unwrap().len(), count);
        }
        for prompt in [json!(7), json!([]), json!([[]]), json!([1, "a"]), json!([-1]), json!(null)]
        {
            assert!(prompts(&mut body(&json!({ "prompt": prompt }))).is_err(), "{prompt}");
        }
    }

    #[test]
    fn no_body_panics() {
        for bytes in [&b""[..], b"[]", b"{", b"\xff", b"7", b"{\"model\": {}}"] {
            if let Ok(mut body) = Body::parse(bytes) {
                assert!(sampling(&mut body).is_err());
            }
        }
    }
}
