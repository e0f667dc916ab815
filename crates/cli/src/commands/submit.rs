//! `drumline submit`: checks manifests here, hands them to the cluster, and prints the ids.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use drumline_wire::v1;
use serde_json::Value;

use crate::client::{Access, Patience};
use crate::commands::manifests;
use crate::failure::Failure;
use crate::output::{self, Format, note};
use crate::views;

/// Submit manifests: all of them, or none.
#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// File with manifests, YAML or JSON; `-` reads standard input.
    pub file: PathBuf,
    /// Show where each rank would go, or why the job would wait; store nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// The largest file that is read: what a request may hold, with room for the rest of it.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// Longest time without a connection before a submission is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the command.
///
/// # Errors
/// The user's mistake for a wrong manifest, with every mistake told; unreachable.
pub async fn run(args: &SubmitArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let (bytes, name) = read(&args.file)?;
    // Here first: a mistake should not need a cluster to be told.
    manifests::check(&bytes, &name)?;
    let text = String::from_utf8(bytes).map_err(|error| Failure::user(error.to_string()))?;
    let answer = hand_in(access, text, &name, args.dry_run).await?;
    let jobs = answer.jobs;
    for queue in &answer.queues {
        note(&format!(
            "queue {queue}: {}",
            if args.dry_run { "is as it should be" } else { "stored" }
        ));
    }
    if !args.dry_run {
        for job in jobs.iter().filter(|job| !job.split.is_empty()) {
            note(&format!("{}: {}", job.id, job.split));
        }
    }
    let value = Value::Array(jobs.iter().map(|job| views::submitted(job, args.dry_run)).collect());
    output::value(format, &value, || {
        if args.dry_run {
            jobs.iter().map(planned).collect()
        } else {
            jobs.iter().map(|job| format!("{}\n", job.id)).collect()
        }
    })
}

/// Hands manifests to the cluster. While it cannot be reached the same submission is repeated under
/// the same key, so that nothing is stored twice.
///
/// # Errors
/// What the cluster refused, or that it cannot be reached.
pub async fn submit(
    access: &Access,
    manifests: String,
    source_name: &str,
    dry_run: bool,
) -> Result<Vec<v1::SubmittedJob>, Failure> {
    Ok(hand_in(access, manifests, source_name, dry_run).await?.jobs)
}

async fn hand_in(
    access: &Access,
    manifests: String,
    source_name: &str,
    dry_run: bool,
) -> Result<v1::SubmitResponse, Failure> {
    let request = v1::SubmitRequest {
        manifests,
        source_name: source_name.to_owned(),
        dry_run,
        user: std::env::var("USER").unwrap_or_default(),
        idempotency_key: key()?,
    };
    let mut patience = Patience::new(PATIENCE);
    let mut tried = false;
    loop {
        let request = request.clone();
        let result = async {
            let client = access.connect().await?;
            tried = true;
            client.call(|mut c| async move { c.submit(request).await }).await
        };
        match result.await {
            Ok(response) => return Ok(response),
            // Only a submission whose answer was lost is worth repeating: who never reached the
            // cluster wants to know at once.
            Err(failure) if tried => patience.after(failure).await?,
            Err(failure) => return Err(failure),
        }
    }
}

fn planned(job: &v1::SubmittedJob) -> String {
    let mut text = format!("{} {} ({} ranks): ", job.kind, job.name, job.ranks);
    if job.placement.is_empty() {
        text.push_str(&format!("would wait: {}: {}\n", job.reason, job.message));
    } else {
        text.push_str("would start now\n");
        for rank in &job.placement {
            text.push_str(&format!("  rank {} on {}/{}\n", rank.rank, rank.node, rank.device));
        }
    }
    if !job.split.is_empty() {
        text.push_str(&format!("  split: {}\n", job.split));
    }
    text
}

/// Reads a file, or standard input for `-`, and returns its name for messages.
///
/// # Errors
/// The user's mistake, with the file's name.
pub fn read(file: &Path) -> Result<(Vec<u8>, String), Failure> {
    let mut bytes = Vec::new();
    let from_stdin = file == Path::new("-");
    let name = if from_stdin { "stdin".to_owned() } else { file.display().to_string() };
    let outcome = if from_stdin {
        std::io::stdin().take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(file)
            .and_then(|opened| opened.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes))
    };
    outcome.map_err(|error| Failure::user(format!("cannot read {name}: {error}")))?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(Failure::user(format!("{name} is larger than {FILE_MAX_BYTES} bytes")));
    }
    if from_stdin && bytes.is_empty() {
        note("standard input was empty");
    }
    Ok((bytes, name))
}

/// A key that no other submission has.
fn key() -> Result<String, Failure> {
    let mut random = [0u8; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
