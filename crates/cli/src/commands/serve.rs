//! `drumline serve`: submits a service for a checkpoint and waits until it is ready.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use drumline_wire::v1;
use serde_json::{Map, Value, json};

use crate::client::Access;
use crate::commands::submit::submit;
use crate::commands::wait::{Progress, Until, deadline, outcome, until_done};
use crate::commands::{describe, manifests};
use crate::failure::Failure;
use crate::gateway::Gateway;
use crate::output::{self, Format, note};
use crate::views;

/// Serve a checkpoint behind the gateway, and wait until it is ready.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A checkpoint, a run's folder, or a folder in the Hugging Face layout.
    pub checkpoint: String,
    /// The model's name in requests; the folder's name if not given.
    #[arg(long)]
    pub name: Option<String>,
    /// Ranks that share each layer.
    #[arg(long, default_value_t = 1)]
    pub tensor: u32,
    /// Pipeline stages.
    #[arg(long, default_value_t = 1)]
    pub pipeline: u32,
    /// Copies of the model, each on devices of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=drumline_spec::table::REPLICAS_MAX))]
    pub replicas: u32,
    /// Most sequences in one batch.
    #[arg(long, default_value_t = 8)]
    pub max_batch: u32,
    /// Requests that may wait before the gateway answers 429.
    #[arg(long, default_value_t = 64)]
    pub max_queue: u32,
    /// Most tokens of prompt and completion; 0 is the model's context.
    #[arg(long, default_value_t = 0)]
    pub max_context: u32,
    /// How matrices are stored: bf16 and f16 take half the memory of f32, int8 a quarter.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16", "int8"])]
    pub weights: String,
    /// How the keys and values of past tokens are stored; auto: as the matrices are.
    #[arg(long, default_value = "auto", value_parser = ["auto", "f32", "bf16", "f16"])]
    pub kv_cache: String,
    /// Longest wait until it is ready.
    #[arg(long, default_value = "2m", value_parser = crate::args::duration)]
    pub timeout: Duration,
    /// Print the id and do not wait.
    #[arg(long)]
    pub no_wait: bool,
}

/// Runs the command.
///
/// # Errors
/// Failed, when the service failed or did not get ready in time; unreachable.
pub async fn run(args: &ServeArgs, access: &Access, format: Format) -> Result<(), Failure> {
    if access.kubernetes().is_some() {
        return Err(Failure::user("on Kubernetes a model is a folder of a volume, not of this machine")
            .hint("`drumline submit` a ModelService that names the claim: `drumline explain ModelService`"));
    }
    let manifest = manifest(args).to_string();
    manifests::check(manifest.as_bytes(), "serve")?;
    let jobs = submit(access, manifest, "serve", false).await?;
    let Some(job) = jobs.first() else {
        return Err(Failure::failed("the cluster accepted the service and named no id"));
    };
    if args.no_wait {
        let value = views::submitted(job, false);
        return output::value(format, &value, || format!("{}\n", job.id));
    }
    note(&format!("submitted {}", job.id));
    let until = Until {
        deadline: deadline(args.timeout),
        reconnect: Duration::from_secs(60),
        service_ready_is_enough: true,
    };
    let ready = until_done(access, &job.id, &until, &mut Progress::default()).await?;
    outcome(&ready)?;
    let endpoint = endpoint(access, &job.id).await?;
    let name =
        ready.service.as_ref().map_or_else(String::new, |service| service.served_name.clone());
    // Who asks it next shall find it. A gateway that cannot be reached from here may serve others.
    if access.is_remote() {
        note("the gateway listens on the cluster's machine alone: forward its port over SSH");
    } else {
        let gateway = Gateway::new(endpoint.trim_end_matches("/v1"), access.token()?);
        if let Err(failure) = gateway.until_ready(&name).await {
            note(&format!("the gateway does not serve {name} yet: {failure}"));
        }
    }
    let value = json!({ "id": job.id, "model": name, "endpoint": endpoint });
    output::value(format, &value, || format!("{endpoint}\n"))?;
    note(&format!(
        "`drumline complete --model {name} PROMPT` asks it; `drumline cancel {}` ends it",
        job.id
    ));
    Ok(())
}

/// Returns the base address for OpenAI clients. The gateway may tell the control plane a moment
/// after the service is ready.
async fn endpoint(access: &Access, id: &str) -> Result<String, Failure> {
    for _ in 0..50 {
        let client = access.connect().await?;
        let version =
            client.call(|mut c| async move { c.version(v1::VersionRequest {}).await }).await?;
        let job = describe::get(&client, id).await?;
        let known = job.service.map(|service| service.gateway_url).unwrap_or_default();
        for url in [known, version.gateway_url] {
            if let Some(url) = views::gateway_v1(&url).as_str() {
                return Ok(url.to_owned());
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Err(Failure::failed(format!("{id} is ready, but no gateway has reported to the control plane"))
        .hint("is the gateway running? see log/gateway.log in the state folder"))
}

/// Makes the manifest that a user would have written.
fn manifest(args: &ServeArgs) -> Value {
    // The cluster has other working folders: a path that is here is told in full.
    let here = Path::new(&args.checkpoint);
    let model = match here.canonicalize() {
        Ok(full) => full.display().to_string(),
        Err(_) => args.checkpoint.clone(),
    };
    let folder = Path::new(&model).file_name().map(|name| name.to_string_lossy().into_owned());
    let served = args.name.clone().or_else(|| folder.clone()).unwrap_or_else(|| "model".to_owned());
    let mut spec = Map::new();
    for (name, value) in [
        ("model", json!(model)),
        ("servedName", json!(served)),
        ("parallelism", json!({ "tensor": args.tensor, "pipeline": args.pipeline })),
        ("replicas", json!(args.replicas)),
        ("maxBatch", json!(args.max_batch)),
        ("maxContext", json!(args.max_context)),
        ("maxQueue", json!(args.max_queue)),
        ("weights", json!(args.weights)),
        ("kvCache", json!(args.kv_cache)),
    ] {
        spec.insert(name.to_owned(), value);
    }
    json!({
        "apiVersion": drumline_spec::table::API_VERSION,
        "kind": "ModelService",
        "metadata": { "name": label(&served) },
        "spec": spec,
    })
}

/// Makes a job's name of a model's: a DNS label of at most 50 characters.
fn label(name: &str) -> String {
    let label: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(50)
        .collect();
    let label = label.trim_matches('-');
    if label.is_empty() { "model".to_owned() } else { label.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_model_name_makes_a_legal_job_name() {
        for (name, expected) in [
            ("step-00000060", "step-00000060"),
            ("My/Model_7B", "my-model-7b"),
            ("---", "model"),
            ("é", "model"),
        ] {
            assert_eq!(label(name), expected);
        }
        assert!(label(&"x".repeat(99)).len() <= drumline_spec::table::JOB_NAME_MAX);
    }
}
