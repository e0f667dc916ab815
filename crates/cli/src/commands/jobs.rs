//! `drumline jobs`, `drumline cancel` and `drumline scale`.

use clap::{Args, ValueEnum};
use drumline_wire::v1;
use serde_json::Value;

use crate::client::Access;
use crate::failure::Failure;
use crate::output::{self, Format, note};
use crate::{told, views};

/// List jobs, newest first.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// Leave out jobs that have ended.
    #[arg(long)]
    pub active: bool,
    /// Only this kind.
    #[arg(long)]
    pub kind: Option<KindName>,
    /// At most so many.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
}

/// The kinds, as in manifests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum KindName {
    /// A training run.
    #[value(alias = "training")]
    TrainingJob,
    /// A served model.
    #[value(alias = "service")]
    ModelService,
    /// Any program.
    #[value(alias = "command")]
    CommandJob,
}

/// Cancel jobs, or end services.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// Ids, as `jobs` shows them.
    #[arg(required = true)]
    pub ids: Vec<String>,
}

/// Set how many replicas of a served model there are.
#[derive(Debug, Args)]
pub struct ScaleArgs {
    /// The service's id, as `jobs` shows it.
    pub id: String,
    /// How many replicas there should be. Those that go finish their requests first.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=drumline_spec::table::REPLICAS_MAX))]
    pub replicas: u32,
}

/// Runs `scale`.
///
/// # Errors
/// When the job is no service, or scales by itself; unreachable.
pub async fn scale(args: &ScaleArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let client = access.connect().await?;
    let user = std::env::var("USER").unwrap_or_default();
    let request = v1::ScaleJobRequest { id: args.id.clone(), replicas: args.replicas, user };
    let job = client.call(|mut c| async move { c.scale_job(request).await }).await?;
    output::value(format, &views::job(&job), || {
        format!("{} scales to {} replicas\n", job.id, args.replicas)
    })
}

/// Runs `jobs`.
///
/// # Errors
/// Unreachable.
pub async fn list(args: &JobsArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let client = access.connect().await?;
    let kind = match args.kind {
        None => "",
        Some(KindName::TrainingJob) => "TrainingJob",
        Some(KindName::ModelService) => "ModelService",
        Some(KindName::CommandJob) => "CommandJob",
    };
    let request =
        v1::ListJobsRequest { kind: kind.to_owned(), active_only: args.active, limit: args.limit };
    let response = client.call(|mut c| async move { c.list_jobs(request).await }).await?;
    let value = Value::Array(response.jobs.iter().map(views::job).collect());
    output::value(format, &value, || table(&response.jobs))?;
    if response.truncated {
        note(&format!("more jobs exist; `--limit` shows more than {}", args.limit));
    }
    if response.jobs.is_empty() && format == Format::Table {
        note("no jobs; `drumline submit FILE` submits one");
    }
    Ok(())
}

fn table(jobs: &[v1::JobView]) -> String {
    let now = drumline_wire::now_ms();
    let rows: Vec<_> = jobs
        .iter()
        .map(|job| {
            let why = if job.has_ended() && job.phase == "succeeded" {
                String::new()
            } else {
                told::reason(job)
            };
            vec![
                job.id.clone(),
                job.kind.clone(),
                job.phase.clone(),
                job.world_size.to_string(),
                job.restarts.to_string(),
                told::ago(now, job.created_ms),
                told::progress(job),
                why,
            ]
        })
        .collect();
    output::table(&["ID", "KIND", "PHASE", "RANKS", "RESTARTS", "AGE", "PROGRESS", "REASON"], &rows)
}

/// Runs `cancel`. Every id is tried, even if an earlier one is unknown.
///
/// # Errors
/// The first failure.
pub async fn cancel(args: &CancelArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let client = access.connect().await?;
    let user = std::env::var("USER").unwrap_or_default();
    let mut first = None;
    let mut cancelled = Vec::new();
    for id in &args.ids {
        let request = v1::CancelJobRequest { id: id.clone(), user: user.clone() };
        match client.call(|mut c| async move { c.cancel_job(request).await }).await {
            Ok(job) => cancelled.push(job),
            Err(failure) => {
                if first.is_some() {
                    failure.report();
                }
                first.get_or_insert(failure);
            }
        }
    }
    let value = Value::Array(cancelled.iter().map(views::job).collect());
    output::value(format, &value, || {
        cancelled.iter().map(|job| format!("{} {}\n", job.id, job.phase)).collect()
    })?;
    first.map_or(Ok(()), Err)
}
