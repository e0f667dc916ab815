//! `drumline sim replay`: a saved scheduler decides again.

use std::path::Path;

use drumline_sim::args::ReplayArgs;
use drumline_sim::replay::{
    Decision, Entry, Expected, ReplayError, read_log, read_snapshot, replay, text,
};
use drumline_types::{Timestamp, format_duration_ms};

use crate::failure::Failure;
use crate::output::{self, Format, note};

/// Runs the command.
///
/// # Errors
/// The user's mistake, for files that are none; failed, when a decision is not the expected one.
pub(super) async fn run(args: ReplayArgs, format: Format) -> Result<(), Failure> {
    tokio::task::spawn_blocking(move || again(&args, format))
        .await
        .map_err(|error| Failure::failed(error.to_string()))?
}

fn again(args: &ReplayArgs, format: Format) -> Result<(), Failure> {
    let file = args.snapshot.display().to_string();
    let saved = read_snapshot(&file, &read(&args.snapshot)?).map_err(broken)?;
    let log_file = args.log.as_ref().map(|log| log.display().to_string()).unwrap_or_default();
    let mut log = match &args.log {
        Some(log) => read_log(&log_file, &read(log)?).map_err(broken)?,
        None => Vec::new(),
    };
    if let Some(at) = args.at {
        log.push((1, Entry::Cycle(Timestamp(at))));
    }
    let mut expected = match &args.expect {
        Some(expect) => {
            Some(Expected::read(&expect.display().to_string(), &read(expect)?).map_err(broken)?)
        }
        None => None,
    };
    let (mut looks, mut starts, mut evictions) = (0u64, 0usize, 0usize);
    let mut unwritten = None;
    let outcome = replay((&file, saved), (&log_file, &log), &mut |decision| {
        looks += 1;
        starts += decision.starts.len();
        evictions += decision.evictions.len();
        if unwritten.is_none() {
            unwritten = show(&decision, format).err();
        }
        expected.as_mut().map_or(Ok(()), |expected| expected.compare(&decision))
    });
    if let Some(failure) = unwritten {
        return Err(failure);
    }
    outcome.map_err(sort)?;
    if let Some(expected) = &expected {
        let last = log.last().map_or(Timestamp(0), |(_, entry)| match entry {
            Entry::Change(at, _) | Entry::Cycle(at) => *at,
        });
        expected.end(last).map_err(sort)?;
        note("every decision is the expected one");
    }
    note(&format!("{looks} looks: {starts} gangs start, {evictions} are asked to leave"));
    Ok(())
}

/// Prints one decision: a JSON object on a line, or sentences.
fn show(decision: &Decision, format: Format) -> Result<(), Failure> {
    let value =
        || serde_json::to_value(decision).map_err(|error| Failure::failed(error.to_string()));
    match format {
        Format::Json => output::data(&format!("{}\n", value()?)),
        Format::Yaml => output::data(&format!("---\n{}", output::yaml(&value()?))),
        Format::Table => {
            let mut lines = String::new();
            for start in &decision.starts {
                let devices: Vec<String> = start.devices.iter().map(ToString::to_string).collect();
                let (job, attempt) = (&start.job, start.attempt);
                let first = devices.iter().take(8).cloned().collect::<Vec<_>>().join(" ");
                let more = devices.len().saturating_sub(8);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                lines.push_str(&format!("{job} starts attempt {attempt} on {first}{more}\n"));
            }
            for eviction in &decision.evictions {
                let why = serde_json::to_value(eviction.cause).unwrap_or_default();
                let why = why.as_str().unwrap_or_default().to_owned();
                lines.push_str(&format!("{} leaves ({why}): {}\n", eviction.job, eviction.message));
            }
            for (job, why) in &decision.told {
                lines.push_str(&format!("{job} waits: {why}\n"));
            }
            if lines.is_empty() {
                return Ok(());
            }
            let at = decision.now.0;
            let wake = match decision.wake {
                Some(wake) => {
                    format!(", looks again in {}", format_duration_ms(wake.0.saturating_sub(at)))
                }
                None => String::new(),
            };
            output::data(&format!("at {at} ms{wake}\n{lines}"))
        }
    }
}

fn read(file: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(file)
        .map_err(|error| Failure::user(format!("cannot read {}: {error}", file.display())))?;
    text(&file.display().to_string(), bytes).map_err(broken)
}

fn broken(fault: drumline_sim::FileFault) -> Failure {
    Failure::user(fault.to_string())
}

fn sort(error: ReplayError) -> Failure {
    match error {
        ReplayError::Different { .. } => Failure::failed(error.to_string()),
        ReplayError::File(_) | ReplayError::Contradiction { .. } | ReplayError::Refused { .. } => {
            Failure::user(error.to_string())
        }
    }
}
