//! `drumline sim`: the placement that runs in the control plane, over recorded workloads.

use std::path::Path;

use clap::{Args, Subcommand};
use drumline_sim::openb::{self, args::OpenbArgs};

use crate::failure::Failure;
use crate::output::{self, Format, note};

/// Simulate placement over recorded workloads.
#[derive(Debug, Args)]
pub struct SimArgs {
    /// What to simulate.
    #[command(subcommand)]
    pub what: Sim,
}

/// What can be simulated.
#[derive(Debug, Subcommand)]
pub enum Sim {
    /// The fragmentation experiment of Weng et al. 2023 on the openb trace: how much of the GPU
    /// capacity each policy allocates once more arrives than there is.
    Openb(OpenbArgs),
}

/// Runs the command.
///
/// # Errors
/// The user's mistake, for files that are no trace.
pub async fn run(args: SimArgs, format: Format) -> Result<(), Failure> {
    let Sim::Openb(args) = args.what;
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
    openb::run(&read(&args.nodes)?, &read(&args.pods)?, &options)
        .map_err(|error| Failure::user(error.to_string()))
}
