//! `drumline complete`: a prompt to a served model, streamed through the gateway.

use std::io::Read;

use clap::Args;
use drumline_wire::v1;
use serde_json::{Map, Value, json};

use crate::client::Access;
use crate::failure::Failure;
use crate::gateway::Gateway;
use crate::output::{self, Format, bytes, data};

/// Let a served model continue a prompt; the text streams to standard output.
#[derive(Debug, Args)]
pub struct CompleteArgs {
    /// The prompt; `-` reads standard input.
    pub prompt: String,
    /// The model's name; not needed when only one is served.
    #[arg(long)]
    pub model: Option<String>,
    /// The gateway's address, if it is not the cluster's own.
    #[arg(long, value_name = "URL")]
    pub gateway: Option<String>,
    /// Most tokens to make.
    #[arg(long, default_value_t = 128)]
    pub max_tokens: u32,
    /// 0 always takes the likeliest token; greater values are more varied.
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Choose among the likeliest tokens that have this share together.
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Choose among this many of the likeliest tokens.
    #[arg(long)]
    pub top_k: Option<u32>,
    /// Make the choice repeatable.
    #[arg(long)]
    pub seed: Option<u64>,
    /// End before this text; may be given several times.
    #[arg(long)]
    pub stop: Vec<String>,
    /// Ask as a chat: the prompt is the user's message.
    #[arg(long)]
    pub chat: bool,
}

/// The largest prompt that is read from standard input, in bytes.
const PROMPT_MAX_BYTES: u64 = 4 << 20;

/// Runs the command.
///
/// # Errors
/// Failed, when the service fails; the user's mistake, for an unknown model; unreachable.
pub async fn run(args: &CompleteArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let prompt = prompt(&args.prompt)?;
    let gateway = find(args, access).await?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => only_model(&gateway).await?,
    };
    let request = request(args, &model, &prompt);
    let path = if args.chat { "/v1/chat/completions" } else { "/v1/completions" };
    if format != Format::Table {
        let answer = gateway.post(path, &request).await?;
        return output::value(format, &answer, String::new);
    }
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let mut events = gateway.stream(path, &streamed).await?;
    let text_at = if args.chat { "/choices/0/delta/content" } else { "/choices/0/text" };
    let mut ends_with_newline = true;
    while let Some(event) = events.next().await? {
        let text = event.pointer(text_at).and_then(Value::as_str).unwrap_or_default();
        if !text.is_empty() {
            bytes(text.as_bytes())?;
            ends_with_newline = text.ends_with('\n');
        }
    }
    if ends_with_newline { Ok(()) } else { data("\n") }
}

fn prompt(given: &str) -> Result<String, Failure> {
    if given != "-" {
        return Ok(given.to_owned());
    }
    let mut text = String::new();
    std::io::stdin().take(PROMPT_MAX_BYTES).read_to_string(&mut text).map_err(|error| {
        Failure::user(format!("cannot read the prompt from standard input: {error}"))
    })?;
    Ok(text)
}

/// Finds the gateway: as told, as the state folder says, or as the control plane knows.
async fn find(args: &CompleteArgs, access: &Access) -> Result<Gateway, Failure> {
    let token = access.token();
    if let Some(url) = &args.gateway {
        return Ok(Gateway::new(url, token?));
    }
    if access.endpoint.is_none()
        && let Ok(found) = access.state.gateway()
    {
        return Ok(Gateway::new(&found.gateway, token?));
    }
    if access.is_remote() {
        // The control plane knows its own machine's loopback address: here somebody else may listen there.
        return Err(Failure::user(
            "the gateway of a cluster on another machine listens there alone",
        )
        .hint("forward its port over SSH, and name it with `--gateway http://127.0.0.1:PORT`"));
    }
    let client = access.connect().await?;
    let version =
        client.call(|mut c| async move { c.version(v1::VersionRequest {}).await }).await?;
    if version.gateway_url.is_empty() {
        return Err(Failure::unreachable("no gateway has reported to the control plane")
            .hint("name one with `--gateway`"));
    }
    Ok(Gateway::new(&version.gateway_url, token?))
}

/// Returns the one model that is served. One that has just been submitted is given a moment.
async fn only_model(gateway: &Gateway) -> Result<String, Failure> {
    let listed = gateway.get("/v1/models").await?;
    let names: Vec<&str> = listed
        .get("data")
        .and_then(Value::as_array)
        .map(|models| models.iter().filter_map(|model| model.get("id")?.as_str()).collect())
        .unwrap_or_default();
    match names.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => {
            Err(Failure::user("no model is served").hint("`drumline serve CHECKPOINT` serves one"))
        }
        many => Err(Failure::user(format!("several models are served: {}", many.join(", ")))
            .hint("name one with `--model`")),
    }
}

fn request(args: &CompleteArgs, model: &str, prompt: &str) -> Value {
    let mut request = Map::new();
    let mut set = |name: &str, value: Value| request.insert(name.to_owned(), value);
    set("model", json!(model));
    if args.chat {
        set("messages", json!([{ "role": "user", "content": prompt }]));
    } else {
        set("prompt", json!(prompt));
    }
    set("max_tokens", json!(args.max_tokens));
    for (name, value) in [("temperature", args.temperature), ("top_p", args.top_p)] {
        if let Some(value) = value {
            // Through text, so that 0.7 is not sent as 0.699999988079071.
            set(name, serde_json::from_str(&value.to_string()).unwrap_or(Value::Null));
        }
    }
    if let Some(top_k) = args.top_k {
        set("top_k", json!(top_k));
    }
    if let Some(seed) = args.seed {
        set("seed", json!(seed));
    }
    if !args.stop.is_empty() {
        set("stop", json!(args.stop));
    }
    Value::Object(request)
}
