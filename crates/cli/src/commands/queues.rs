//! `drumline queues`, `hold`, `release` and `snapshot`: who may use how much, and what the
//! scheduler knows.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use drumline_wire::v1;
use serde_json::{Value, json};

use crate::client::Access;
use crate::failure::Failure;
use crate::output::{self, Format, note};
use crate::views;

/// List queues with what they use; `queues delete NAME` deletes one. A manifest of kind Queue
/// makes or changes one: `drumline submit FILE`.
#[derive(Debug, Args)]
pub struct QueuesArgs {
    /// What to do instead of listing.
    #[command(subcommand)]
    pub action: Option<QueueAction>,
}

/// What can be done with queues.
#[derive(Debug, Subcommand)]
pub enum QueueAction {
    /// Delete a queue that has no children and no jobs.
    Delete {
        /// Its name.
        name: String,
    },
}

/// Hold waiting jobs back, or let them go.
#[derive(Debug, Args)]
pub struct HoldArgs {
    /// Ids, as `jobs` shows them.
    #[arg(required = true)]
    pub ids: Vec<String>,
}

/// Write everything that the scheduler's decisions depend on; `drumline sim replay` reads it.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The file; `-` writes standard output.
    pub file: PathBuf,
}

/// Runs `queues`.
///
/// # Errors
/// Unreachable; the user's mistake for a queue that cannot be deleted.
pub async fn run(args: &QueuesArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let client = access.connect().await?;
    if let Some(QueueAction::Delete { name }) = &args.action {
        let request = v1::DeleteQueueRequest { name: name.clone(), user: user() };
        client.call(|mut c| async move { c.delete_queue(request).await }).await?;
        return output::value(format, &json!({ "deleted": name }), || format!("{name} deleted\n"));
    }
    let request = v1::ListQueuesRequest {};
    let answer = client.call(|mut c| async move { c.list_queues(request).await }).await?;
    let value = Value::Array(answer.queues.iter().map(view).collect());
    output::value(format, &value, || table(&answer.queues))
}

pub(crate) fn user() -> String {
    std::env::var("USER").unwrap_or_default()
}

fn view(queue: &v1::QueueView) -> Value {
    json!({
        "name": queue.name,
        "parent": if queue.parent.is_empty() { Value::Null } else { json!(queue.parent) },
        "quota": sorted(&queue.quota),
        "used": sorted(&queue.used),
        "weight": queue.weight,
        "held": queue.held,
        "pending": queue.pending,
        "running": queue.running,
        "spec": serde_json::from_str::<Value>(&queue.spec_json).unwrap_or(Value::Null),
    })
}

fn sorted(
    counts: &std::collections::HashMap<String, u32>,
) -> std::collections::BTreeMap<&str, u32> {
    counts.iter().map(|(class, count)| (class.as_str(), *count)).collect()
}

fn counts(counts: &std::collections::HashMap<String, u32>, none: &str) -> String {
    let text: Vec<String> =
        sorted(counts).into_iter().map(|(class, count)| format!("{count} {class}")).collect();
    if text.is_empty() { none.to_owned() } else { text.join(", ") }
}

fn table(queues: &[v1::QueueView]) -> String {
    let mut depth: std::collections::BTreeMap<&str, usize> = std::collections::BTreeMap::new();
    let rows: Vec<_> = queues
        .iter()
        .map(|queue| {
            let at = depth.get(queue.parent.as_str()).map_or(0, |above| above + 1);
            depth.insert(&queue.name, at);
            vec![
                format!("{}{}", "  ".repeat(at), queue.name),
                counts(&queue.quota, "no limit"),
                counts(&queue.used, "-"),
                queue.weight.to_string(),
                queue.running.to_string(),
                queue.pending.to_string(),
                if queue.held { "held" } else { "" }.to_owned(),
            ]
        })
        .collect();
    output::table(&["QUEUE", "QUOTA", "USED", "WEIGHT", "RUNNING", "PENDING", ""], &rows)
}

/// Runs `hold` and `release`. Every id is tried, even if an earlier one is refused.
///
/// # Errors
/// The first failure.
pub async fn hold(
    args: &HoldArgs,
    held: bool,
    access: &Access,
    format: Format,
) -> Result<(), Failure> {
    let client = access.connect().await?;
    let mut first: Option<Failure> = None;
    let mut done = Vec::new();
    for id in &args.ids {
        let request = v1::HoldJobRequest { id: id.clone(), held, user: user() };
        match client.call(|mut c| async move { c.hold_job(request).await }).await {
            Ok(job) => done.push(job),
            Err(failure) => {
                if first.is_some() {
                    failure.report();
                }
                first.get_or_insert(failure);
            }
        }
    }
    let word = if held { "held" } else { "released" };
    output::value(format, &Value::Array(done.iter().map(views::job).collect()), || {
        done.iter().map(|job| format!("{} {word}\n", job.id)).collect()
    })?;
    first.map_or(Ok(()), Err)
}

/// Runs `snapshot`.
///
/// # Errors
/// Unreachable; the user's mistake for a file that cannot be written.
pub async fn snapshot(args: &SnapshotArgs, access: &Access) -> Result<(), Failure> {
    let client = access.connect().await?;
    let request = v1::SnapshotRequest {};
    let answer = client.call(|mut c| async move { c.snapshot(request).await }).await?;
    if args.file.as_os_str() == "-" {
        return output::data(&format!("{}\n", answer.json));
    }
    std::fs::write(&args.file, &answer.json)
        .map_err(|error| Failure::user(format!("cannot write {}: {error}", args.file.display())))?;
    note(&format!("{} bytes in {}", answer.json.len(), args.file.display()));
    Ok(())
}
