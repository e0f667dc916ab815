//! `drumline sim openb`: the placement experiment on the openb trace.

use std::path::Path;

use drumline_sim::openb::{self, args::OpenbArgs};

use crate::failure::Failure;
use crate::output::{self, Format, note};

/// Runs the command.
///
/// # Errors
/// The user's mistake, for files that are no trace.
pub(super) async fn run(args: OpenbArgs, format: Format) -> Result<(), Failure> {
    let report = tokio::task::spawn_blocking(move || experiment(&args))
        .await
        .map_err(|error| Failure::failed(error.to_string()))??;
    let value =
        serde_json::to_value(&report).map_err(|error| Failure::failed(error.to_string()))?;
    output::value(format, &value, || {
        let rows: Vec<_> = report
            .policies
            .iter()
            .map(|policy| {
                vec![
                    policy.name.to_string(),
                    format!("{:.2}", policy.mean),
                    format!("{:.2}", policy.min),
                    format!("{:.2}", policy.max),
                    format!("{:.3}", policy.seconds_per_run),
                ]
            })
            .collect();
        let header = ["POLICY", "ALLOCATED %", "LEAST", "MOST", "SECONDS A RUN"];
        format!("{}\n{}", report.workload, output::table(&header, &rows))
    })?;
    if !report.impossible.is_empty() {
        note(&format!("{} pods fit no node of the trace", report.impossible.len()));
    }
    Ok(())
}

fn experiment(args: &OpenbArgs) -> Result<openb::Report, Failure> {
    let options = args.options().map_err(Failure::user)?;
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|error| Failure::user(format!("cannot read {}: {error}", path.display())))
    };
    let (nodes, pods) = (read(&args.nodes)?, read(&args.pods)?);
    let known = match &args.values {
        Some(file) if file.exists() => Some((file.display().to_string(), read(file)?)),
        _ => None,
    };
    let kept = known.as_ref().map(|(file, text)| (file.as_str(), text.as_str()));
    let (report, learned) = openb::run::run_kept(&nodes, &pods, &options, kept)
        .map_err(|error| Failure::user(error.to_string()))?;
    if let (Some(file), Some(text)) = (&args.values, learned) {
        std::fs::write(file, text)
            .map_err(|error| Failure::user(format!("cannot write {}: {error}", file.display())))?;
        note(&format!("what was learned is kept in {}", file.display()));
    }
    Ok(report)
}
