//! Serves what the demo trained, and asks it.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::Access;
use crate::commands::submit::submit;
use crate::commands::wait::{Progress, Until, deadline, outcome, until_done};
use crate::demo::report::ServingReport;
use crate::failure::Failure;
use crate::gateway::Gateway;
use crate::output::{bytes, note};

/// The name under which the demo's model is served.
const MODEL: &str = "demo";
/// Tokens of the completion.
const TOKENS: u32 = 64;

/// Serves the checkpoint over two ranks and streams one completion; to standard output, unless
/// that is for JSON.
///
/// # Errors
/// Failed, when the service did not get ready or the completion is empty.
pub(super) async fn serve_and_ask(
    access: &Access,
    gateway: &Gateway,
    checkpoint: &Path,
    prompt: &str,
    quiet: bool,
) -> Result<ServingReport, Failure> {
    let manifest = json!({
        "apiVersion": drumline_spec::table::API_VERSION,
        "kind": "ModelService",
        "metadata": { "name": "serve-demo" },
        "spec": {
            "model": checkpoint.display().to_string(),
            "servedName": MODEL,
            "parallelism": { "tensor": 2 },
            "maxBatch": 8,
            "maxQueue": 64,
        },
    });
    let jobs = submit(access, manifest.to_string(), "demo", false).await?;
    let id = jobs.first().map(|job| job.id.clone()).unwrap_or_default();
    note(&format!("serving the checkpoint as {id} with tensor 2"));
    let until = Until {
        deadline: deadline(Duration::from_secs(180)),
        reconnect: Duration::from_secs(30),
        service_ready_is_enough: true,
    };
    let ready = until_done(access, &id, &until, &mut Progress::default()).await?;
    outcome(&ready)?;
    gateway.until_ready(MODEL).await?;

    note(&format!("prompt: {prompt:?}"));
    let request = json!({
        "model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.7, "top_k": 40,
        "seed": 7, "stream": true,
    });
    let mut events = gateway.stream("/v1/completions", &request).await?;
    let mut completion = String::new();
    while let Some(event) = events.next().await? {
        let text = event.pointer("/choices/0/text").and_then(Value::as_str).unwrap_or_default();
        completion.push_str(text);
        if !quiet {
            bytes(text.as_bytes())?;
        }
    }
    if !quiet {
        bytes(b"\n")?;
    }
    if completion.is_empty() {
        return Err(Failure::failed("the served model said nothing"));
    }
    let endpoint = format!("{}/v1", gateway.url);
    Ok(ServingReport { endpoint, model: MODEL.to_owned(), completion })
}
