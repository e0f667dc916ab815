//! `drumline plan`: what a run or a service would need, before anyone reserves a GPU. The planner
//! is pure; this reads its files and writes its answers.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use drumline_planner::PlanError;
use drumline_planner::command::{
    self, BudgetArgs, Inputs, Output, ServeArgs, TextFile, TrainArgs, ValidateArgs,
};

use crate::commands::submit::read;
use crate::failure::Failure;
use crate::output::{self, Format, note};

/// Plan a run or a service: split, memory, time, money.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// What to plan.
    #[command(subcommand)]
    pub what: Plan,
    /// Models, GPUs and networks that extend the built-in catalogue; may be given several times.
    #[arg(long, global = true, value_name = "FILE")]
    pub catalogue: Vec<PathBuf>,
    /// A measured profile, instead of the published figures.
    #[arg(long, global = true, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Write the plot of a sweep to this SVG file.
    #[arg(long, global = true, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

/// What can be planned.
#[derive(Debug, Subcommand)]
pub enum Plan {
    /// A training run: the fastest split, its memory, time and cost.
    Train(Box<TrainArgs>),
    /// A served model: the split, how many requests it holds, how fast.
    Serve(Box<ServeArgs>),
    /// What model and how much data a budget should go to.
    Budget(BudgetArgs),
    /// Compare predictions with a table of published runs.
    Validate(ValidateArgs),
}

/// Runs the command.
///
/// # Errors
/// The user's mistake, with what is short and the nearest that works.
pub fn run(args: &PlanArgs, format: Format) -> Result<(), Failure> {
    let mut inputs = Inputs::default();
    for file in &args.catalogue {
        inputs.catalogues.push(text(file)?);
    }
    inputs.profile = args.profile.as_deref().map(text).transpose()?;
    let answer = match &args.what {
        Plan::Train(args) => {
            inputs.model = model(&args.model)?;
            command::train(args, &inputs)
        }
        Plan::Serve(args) => {
            inputs.model = model(&args.model)?;
            command::serve(args, &inputs)
        }
        Plan::Budget(args) => {
            inputs.runs = args.fit.as_deref().map(Path::new).map(text).transpose()?;
            command::budget(args, &inputs)
        }
        Plan::Validate(args) => {
            inputs.runs = Some(text(Path::new(&args.file))?);
            command::validate(args, &inputs)
        }
    };
    show(&answer.map_err(|error: PlanError| Failure::user(error.to_string()))?, args, format)
}

fn show(answer: &Output, args: &PlanArgs, format: Format) -> Result<(), Failure> {
    for warning in &answer.warnings {
        note(&format!("warning: {warning}"));
    }
    if let (Some(plot), Some(file)) = (&answer.plot, &args.plot) {
        std::fs::write(file, plot)
            .map_err(|error| Failure::user(format!("--plot {}: {error}", file.display())))?;
        note(&format!("the plot is in {}", file.display()));
    }
    match &answer.manifest {
        // A manifest is the answer, ready for `submit`.
        Some(manifest) if format == Format::Table => output::data(manifest),
        _ => output::value(format, &answer.json, || answer.table.clone()),
    }
}

/// Reads `--model` when it is a file; a name is the catalogue's.
fn model(name: &str) -> Result<Option<TextFile>, Failure> {
    let path = Path::new(name);
    let looks_like_a_file = name.contains('/')
        || path.extension().is_some_and(|ext| ["json", "yaml", "yml"].iter().any(|e| ext == *e));
    if looks_like_a_file || path.is_file() { text(path).map(Some) } else { Ok(None) }
}

fn text(file: &Path) -> Result<TextFile, Failure> {
    let (bytes, name) = read(file)?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(TextFile { name, text }),
        Err(_) => Err(Failure::user(format!("{name} is not UTF-8 text"))),
    }
}
