//! Chat templates: messages to the one text that a model continues.

use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::Value;

use crate::error::ApiError;
use crate::params::Body;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// Used where the model brings none: plain lines, since a base model knows no special tokens.
const PLAIN: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\
                     {% endfor %}assistant:";

/// Takes `messages`.
///
/// # Errors
/// When a message has another form, or a role or content that is not supported.
pub fn messages(body: &mut Body) -> Result<Vec<Message>, ApiError> {
    let missing = || ApiError::invalid("messages", "messages must be a list with at least one");
    let Some(Value::Array(items)) = body.take("messages") else { return Err(missing()) };
    if items.is_empty() {
        return Err(missing());
    }
    items.into_iter().enumerate().map(|(index, item)| message(index, item)).collect()
}

fn message(index: usize, item: Value) -> Result<Message, ApiError> {
    let place = |field: &str| format!("messages[{index}].{field}");
    let Value::Object(mut fields) = item else {
        return Err(ApiError::invalid(&format!("messages[{index}]"), "a message is an object"));
    };
    let role = match fields.remove("role") {
        Some(Value::String(role))
            if ["system", "developer", "user", "assistant"].contains(&role.as_str()) =>
        {
            role
        }
        _ => {
            let text = "role must be system, developer, user or assistant";
            return Err(ApiError::invalid(&place("role"), text));
        }
    };
    let content = match fields.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|part| {
                let is_text = part.get("type").and_then(Value::as_str) == Some("text");
                part.get("text").and_then(Value::as_str).filter(|_| is_text)
            })
            .collect::<Option<String>>()
            .ok_or_else(|| {
                ApiError::invalid(&place("content"), "only parts of type text are supported")
            })?,
        _ => return Err(ApiError::invalid(&place("content"), "content must be text")),
    };
    fields.retain(|_, value| !value.is_null());
    match fields.keys().next() {
        None => Ok(Message { role, content }),
        Some(other) => {
            Err(ApiError::invalid(&place(other), format!("the field {other:?} is not supported")))
        }
    }
}

/// Renders messages with a model's template, or a plain one where it has none.
///
/// # Errors
/// When the template refuses them, with its own words.
pub fn render(
    template: &str,
    messages: &[Message],
    bos_token: &str,
    eos_token: &str,
) -> Result<String, ApiError> {
    let source = if template.is_empty() { PLAIN } else { template };
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    // A template is the model's, not ours: it gets a bound on its work.
    environment.set_recursion_limit(64);
    environment.add_function(
        "raise_exception",
        |text: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, text))
        },
    );
    environment
        .render_str(
            source,
            context! { messages, bos_token, eos_token, add_generation_prompt => true },
        )
        .map_err(|error| ApiError::invalid("messages", format!("the chat template: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: &Value) -> Result<Vec<Message>, ApiError> {
        messages(&mut Body::parse(json!({ "messages": value }).to_string().as_bytes()).unwrap())
    }

    #[test]
    fn messages_become_one_text() {
        let talk = parse(&json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ]))
        .unwrap();
        assert_eq!(render("", &talk, "", "").unwrap(), "system: be brief\nuser: hi\nassistant:");
        let own = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
        assert_eq!(render(own, &talk, "<s>", "").unwrap(), "<s>[system]be brief[user]hi");
    }

    #[test]
    fn what_is_not_supported_is_refused_with_its_place() {
        for bad in [
            json!([]),
            json!([{"role": "tool", "content": "x"}]),
            json!([{"role": "user"}]),
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            json!([{"role": "user", "content": "x", "tool_calls": []}]),
            json!(["x"]),
        ] {
            let error = parse(&bad).expect_err(&bad.to_string());
            assert!(error.param.unwrap().starts_with("messages"));
        }
        assert!(render("{% endfor %}", &[], "", "").is_err());
    }
}
