//! `drumline sim`: the scheduler that runs in the control plane, over virtual time, recorded
//! clusters and published workloads.

mod openb;
mod replay;
mod run;

use clap::{Args, Subcommand};
use drumline_sim::args::{ArgsError, PresetsArgs, ReplayArgs, RunArgs, preset};
use drumline_sim::openb::args::OpenbArgs;
use drumline_sim::{POLICIES, PRESETS, Workload};
use serde_json::json;

use crate::failure::Failure;
use crate::output::{self, Format};

/// Simulate the scheduler over virtual time, recorded clusters and published workloads.
#[derive(Debug, Args)]
pub struct SimArgs {
    /// What to simulate.
    #[command(subcommand)]
    pub what: Sim,
}

/// What can be simulated.
#[derive(Debug, Subcommand)]
pub enum Sim {
    /// Days of a fleet in seconds: arrivals, failures, checkpoints, evictions; one policy or
    /// several on the same events. Ctrl-C ends it with what is known so far.
    Run(RunArgs),
    /// Replay a saved scheduler, and what happened after, to the same decisions.
    Replay(ReplayArgs),
    /// List the workloads and policies that come with the program, or print a workload's file.
    Presets(PresetsArgs),
    /// The fragmentation experiment of Weng et al. 2023 on the openb trace: how much of the GPU
    /// capacity each policy allocates once more arrives than there is.
    Openb(OpenbArgs),
}

/// Runs the command.
///
/// # Errors
/// The user's mistake, for files and names that are none; failed, when a replay differs.
pub async fn run(args: SimArgs, format: Format) -> Result<(), Failure> {
    match args.what {
        Sim::Run(args) => run::run(args, format).await,
        Sim::Replay(args) => replay::run(args, format).await,
        Sim::Presets(args) => presets(&args, format),
        Sim::Openb(args) => openb::run(args, format).await,
    }
}

fn presets(args: &PresetsArgs, format: Format) -> Result<(), Failure> {
    if let Some(name) = &args.name {
        return output::data(preset(name).map_err(mistake)?.text);
    }
    let about = |preset: &drumline_sim::Preset| {
        Workload::read(preset.name, preset.text).map(|workload| workload.about).unwrap_or_default()
    };
    let value = json!({
        "presets": PRESETS.iter().map(|p| json!({"name": p.name, "about": about(p)})).collect::<Vec<_>>(),
        "policies": POLICIES.iter().map(|(name, about)| json!({"name": name, "about": about})).collect::<Vec<_>>(),
    });
    output::value(format, &value, || {
        let rows = |list: &mut dyn Iterator<Item = (&'static str, String)>| -> Vec<Vec<String>> {
            list.map(|(name, about)| vec![name.to_owned(), about]).collect()
        };
        let presets = rows(&mut PRESETS.iter().map(|preset| (preset.name, about(preset))));
        let policies = rows(&mut POLICIES.iter().map(|(name, about)| (*name, (*about).to_owned())));
        format!(
            "{}\n{}",
            output::table(&["WORKLOAD", "WHAT IT IS"], &presets),
            output::table(&["POLICY", "WHAT IT DOES"], &policies)
        )
    })
}

fn mistake(error: ArgsError) -> Failure {
    Failure::user(error.to_string())
}
