//! `drumline describe`: everything about one job, the reason first.

use clap::{Args, Subcommand};
use drumline_types::{format_bytes, format_duration_ms};
use drumline_wire::v1;

use crate::client::{Access, Client};
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::{told, views};

/// Describe one thing in full.
#[derive(Debug, Args)]
pub struct DescribeArgs {
    /// What to describe.
    #[command(subcommand)]
    pub what: What,
}

/// What can be described.
#[derive(Debug, Subcommand)]
pub enum What {
    /// A job: why it waits, where its ranks are, what happened.
    Job {
        /// Its id, as `jobs` shows it.
        id: String,
    },
}

/// Runs the command.
///
/// # Errors
/// The user's mistake for an unknown id; unreachable.
pub async fn run(args: &DescribeArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let What::Job { id } = &args.what;
    let client = access.connect().await?;
    let job = get(&client, id).await?;
    output::value(format, &views::job(&job), || text(&job))
}

/// Asks for one job.
///
/// # Errors
/// The user's mistake for an unknown id; unreachable.
pub async fn get(client: &Client, id: &str) -> Result<v1::JobView, Failure> {
    client
        .call(|mut c| async move { c.get_job(v1::GetJobRequest { id: id.to_owned() }).await })
        .await
}

fn text(job: &v1::JobView) -> String {
    let now = drumline_wire::now_ms();
    let mut text = format!("{} {}\n", job.kind, job.id);
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            text.push_str(&format!("  {name:<12}{value}\n"));
        }
    };
    line("phase", job.phase.clone());
    line("reason", told::reason(job));
    line("remedy", if job.phase == "succeeded" { String::new() } else { job.remedy.clone() });
    line("progress", told::progress(job));
    line("queue", format!("{}, priority {}", job.queue, job.priority));
    let split = if job.kind == "CommandJob" {
        format!("{} on {} devices", job.world_size, job.device_kind)
    } else {
        format!(
            "{} on {} devices: tensor {} x pipeline {} x data {}",
            job.world_size, job.device_kind, job.tensor, job.pipeline, job.data
        )
    };
    line("ranks", split);
    line("spares", spares(&job.spares));
    line("attempt", format!("{}, after {} restarts", job.attempt, job.restarts));
    line("submitted", format!("{} ago", told::ago(now, job.created_ms)));
    if job.started_ms > 0 {
        let waited = job.started_ms.saturating_sub(job.created_ms);
        line("started", format!("{} after it was submitted", format_duration_ms(waited)));
    }
    if job.finished_ms > 0 {
        let ran = job.finished_ms.saturating_sub(job.started_ms.max(job.created_ms));
        line(
            "ended",
            format!("{} ago, after {}", told::ago(now, job.finished_ms), format_duration_ms(ran)),
        );
    }
    if let Some(run) = &job.training {
        line("parameters", told::count(run.parameters as f64));
        line("tokens", told::count(run.tokens as f64));
        if run.loss_validation > 0.0 {
            line("held-out", format!("loss {:.4}", run.loss_validation));
        }
        if run.mfu > 0.0 {
            line("matmul peak", told::percent(run.mfu));
        }
        if run.eta_ms > 0 && !job.has_ended() {
            line("time left", format_duration_ms(run.eta_ms));
        }
        if !run.checkpoint_path.is_empty() {
            line("checkpoint", format!("step {} in {}", run.checkpoint_step, run.checkpoint_path));
        }
    }
    if let Some(service) = &job.service {
        line("model", service.served_name.clone());
        if !service.replica_of.is_empty() {
            let going = if service.drains { ", finishes its requests and goes" } else { "" };
            line("replica", format!("{} of {}{going}", service.replica, service.replica_of));
        } else if service.replicas > 1 || !service.replica_jobs.is_empty() {
            let (ready, wanted) = (service.replicas_ready, service.replicas);
            let others = service.replica_jobs.join(", ");
            line("replicas", format!("{ready} of {wanted} serve; beside this one {others}"));
        }
        line("endpoint", views::gateway_v1(&service.gateway_url).as_str().unwrap_or("").to_owned());
        line("KV cache", format!("{} in use", told::percent(service.kv_usage)));
    }
    if let Some(exit) = &job.first_failure {
        let how = told::failure(exit);
        line(
            "failure",
            format!("rank {} on {} in attempt {}: {how}", exit.rank, exit.node, exit.attempt),
        );
    }
    if !job.ranks.is_empty() {
        text.push_str("\nRanks\n");
        text.push_str(&indented(&ranks(&job.ranks)));
    }
    if !job.events.is_empty() {
        text.push_str("\nEvents\n");
        for event in &job.events {
            text.push_str(&format!(
                "  {}  {:<8}{}: {}\n",
                told::clock(event.at_ms),
                event.severity,
                event.reason,
                event.message
            ));
        }
    }
    text
}

fn spares(spares: &[v1::SpareView]) -> String {
    let one = |spare: &v1::SpareView| match spare.lent_to.as_str() {
        "" => format!("{}/{}", spare.node, spare.device),
        lent_to => format!("{}/{} (lent to {lent_to})", spare.node, spare.device),
    };
    spares.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn ranks(ranks: &[v1::RankView]) -> String {
    let rows: Vec<_> = ranks
        .iter()
        .map(|rank| {
            vec![
                rank.rank.to_string(),
                format!("{}/{}", rank.node, rank.device),
                format!("{},{},{}", rank.tensor, rank.pipeline, rank.data),
                rank.phase.clone(),
                if rank.pid == 0 { String::new() } else { rank.pid.to_string() },
                rank.step.to_string(),
                if rank.memory_bytes == 0 {
                    String::new()
                } else {
                    format_bytes(rank.memory_bytes)
                },
                told::exit(rank.exit_code, rank.signal),
            ]
        })
        .collect();
    output::table(&["RANK", "DEVICE", "T,P,D", "PHASE", "PID", "STEP", "MEMORY", "ENDED"], &rows)
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
