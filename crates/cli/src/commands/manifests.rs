//! `drumline validate` and `drumline explain`: what a manifest may say, without a cluster.

use std::path::PathBuf;

use clap::Args;
use drumline_spec::manifest::Manifests;
use drumline_spec::{JobSpec, Mistake, Work};
use serde_json::{Value, json};

use crate::commands::submit::read;
use crate::failure::{Class, Failure};
use crate::output::{self, Format, note};

/// Check manifests without submitting them; every mistake is told at once.
#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// File with manifests, YAML or JSON; `-` reads standard input.
    pub file: PathBuf,
}

/// Explain a kind of manifest, or one of its fields.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// `KIND` or `KIND.field`, such as TrainingJob.model.heads; nothing lists the kinds.
    #[arg(default_value = "")]
    pub what: String,
    /// Print the kind's JSON schema instead.
    #[arg(long)]
    pub schema: bool,
}

/// Checks manifests and tells every mistake on standard error.
///
/// # Errors
/// The user's mistake, already told.
pub fn check(bytes: &[u8], name: &str) -> Result<Manifests, Failure> {
    drumline_spec::manifest::parse_bytes(bytes, name).map_err(|mistakes| {
        tell(&mistakes);
        Failure::said(Class::User)
    })
}

fn tell(mistakes: &[Mistake]) {
    for mistake in mistakes {
        note(&format!("error: {mistake}"));
    }
    let plural = if mistakes.len() == 1 { "mistake" } else { "mistakes" };
    note(&format!(
        "{} {plural}; nothing is stored. `drumline explain KIND.field` tells what a field holds.",
        mistakes.len()
    ));
}

/// Runs `validate`.
///
/// # Errors
/// The user's mistake when the manifests are wrong.
pub fn validate(args: &ValidateArgs, format: Format) -> Result<(), Failure> {
    let (bytes, name) = read(&args.file)?;
    match drumline_spec::manifest::parse_bytes(&bytes, &name) {
        Ok(all) => {
            let queues =
                all.queues.iter().map(|queue| json!({ "kind": "Queue", "name": queue.name }));
            let manifests: Vec<Value> = queues.chain(all.jobs.iter().map(summary)).collect();
            output::value(format, &json!({ "valid": true, "manifests": manifests }), || {
                let queues =
                    all.queues.iter().map(|queue| format!("Queue {}: valid\n", queue.name));
                queues.chain(all.jobs.iter().map(|spec| format!("{}\n", sentence(spec)))).collect()
            })
        }
        Err(mistakes) => {
            if format == Format::Table {
                tell(&mistakes);
            } else {
                let value = json!({ "valid": false, "mistakes": mistakes });
                output::value(format, &value, String::new)?;
            }
            Err(Failure::said(Class::User))
        }
    }
}

fn summary(spec: &JobSpec) -> Value {
    let mut value = json!({
        "kind": spec.kind().as_str(),
        "name": spec.name,
        "ranks": spec.gang().ranks,
        "device": spec.device.as_str(),
    });
    if let (true, Some(entries)) = (spec.split.is_open(), value.as_object_mut()) {
        entries.insert("ranks".to_owned(), Value::Null);
        entries.insert("parallelism".to_owned(), json!("auto"));
    }
    if let (Work::TrainingJob(job), Some(entries)) = (&spec.work, value.as_object_mut()) {
        entries.insert("parameters".to_owned(), json!(job.model.parameters()));
        let tokens = job.tokens_per_step().saturating_mul(job.steps);
        entries.insert("tokens".to_owned(), json!(tokens));
    }
    value
}

fn sentence(spec: &JobSpec) -> String {
    let gang = spec.gang();
    let ranks = if gang.ranks == 1 { "rank" } else { "ranks" };
    let device = gang.device.as_str();
    let mut text = format!("{} {}: valid; ", spec.kind(), spec.name);
    text.push_str(&if spec.split.is_open() {
        format!("split over {device} devices chosen at submit, for the cluster as it is then")
    } else {
        format!("{} {ranks} on {device} devices", gang.ranks)
    });
    if let Work::TrainingJob(job) = &spec.work {
        let millions = job.model.parameters() as f64 / 1e6;
        let tokens = job.tokens_per_step().saturating_mul(job.steps) as f64 / 1e6;
        text.push_str(&format!(
            "; {millions:.1} million parameters, {} steps, {tokens:.2} million tokens",
            job.steps
        ));
    }
    text
}

/// Runs `explain`.
///
/// # Errors
/// The user's mistake when nothing is called that.
pub fn explain(args: &ExplainArgs, format: Format) -> Result<(), Failure> {
    if args.schema || format != Format::Table {
        let kind = args.what.split('.').next().unwrap_or_default();
        let format = if format == Format::Table { Format::Json } else { format };
        return match drumline_spec::schema(kind) {
            Some(schema) => output::value(format, &schema, String::new),
            None => Err(unknown(&args.what)),
        };
    }
    match drumline_spec::explain(&args.what) {
        Ok(text) => output::data(&text),
        Err(error) => Err(Failure::user(error.to_string())
            .hint("`drumline explain` lists the kinds, `drumline explain KIND` its fields")),
    }
}

fn unknown(what: &str) -> Failure {
    match drumline_spec::explain(what) {
        Err(error) => Failure::user(error.to_string()),
        Ok(_) => Failure::user("name one kind: TrainingJob, ModelService or CommandJob"),
    }
}
