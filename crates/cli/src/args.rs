//! The command line: every command, and the flags that all of them take.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use clap_complete::Shell;

use crate::bench::BenchArgs;
use crate::client::Access;
use crate::commands::clear::ClearArgs;
use crate::commands::complete::CompleteArgs;
use crate::commands::data::DataArgs;
use crate::commands::describe::DescribeArgs;
use crate::commands::export::ExportArgs;
use crate::commands::jobs::{CancelArgs, JobsArgs, ScaleArgs};
use crate::commands::logs::LogsArgs;
use crate::commands::manifests::{ExplainArgs, ValidateArgs};
use crate::commands::nodes::NodesArgs;
use crate::commands::plan::PlanArgs;
use crate::commands::queues::{HoldArgs, QueuesArgs, SnapshotArgs};
use crate::commands::serve::ServeArgs;
use crate::commands::sim::SimArgs;
use crate::commands::submit::SubmitArgs;
use crate::commands::version::VersionArgs;
use crate::commands::wait::WaitArgs;
use crate::demo::DemoArgs;
use crate::doctor::DoctorArgs;
use crate::failure::Failure;
use crate::output::Format;
use crate::roles::{JoinArgs, Role};
use crate::state::StateDir;
use crate::top::TopArgs;
use crate::up::UpArgs;

/// Turns a set of machines into one computer for large models.
#[derive(Debug, Parser)]
#[command(
    name = "drumline",
    version,
    about,
    propagate_version = true,
    disable_help_subcommand = true,
    subcommand_required = false,
    max_term_width = 100,
    after_long_help = EXIT_CODES
)]
pub struct Cli {
    /// Flags that every command takes.
    #[command(flatten)]
    pub global: Global,
    /// The command; without one, help for newcomers is shown.
    #[command(subcommand)]
    pub command: Option<Command>,
}

const EXIT_CODES: &str = "Exit codes: 0 it worked; 1 the job or service failed; 2 a mistake of \
yours: arguments, manifest, unknown id, wrong token; 3 the cluster cannot be reached.
Data goes to standard output, everything else to standard error.";

/// What is shown without a command.
pub const WELCOME: &str = "\
drumline launches training runs, serves models and watches the machines that do it.

New here? This trains a small model on four ranks, kills one of them, recovers,
serves the result and prints what it says, all on this machine in a few minutes:

  drumline demo

Then, on a cluster of your own:

  drumline up                           start one on this machine, in the foreground
  drumline data build TEXT DIR          make token shards of your text
  drumline explain TrainingJob          what a manifest may say
  drumline submit job.yaml              submit it; prints the job's id
  drumline logs -f ID                   follow it to its end
  drumline serve CHECKPOINT             serve what it learned
  drumline complete \"Once upon a time\"   ask it
  drumline top                          watch everything

`drumline --help` lists every command, `drumline COMMAND --help` explains one.
";

/// Variables that name a cluster for commands.
pub(crate) const ENDPOINT_VARIABLE: &str = "DRUMLINE_ENDPOINT";
pub(crate) const TOKEN_FILE_VARIABLE: &str = "DRUMLINE_TOKEN_FILE";
pub(crate) const CA_VARIABLE: &str = "DRUMLINE_CA";

/// Flags that every command takes.
#[derive(Debug, Clone, clap::Args)]
pub struct Global {
    /// The cluster's state folder [default: $XDG_STATE_HOME/drumline or ~/.local/state/drumline].
    #[arg(
        long,
        global = true,
        env = "DRUMLINE_STATE_DIR",
        value_name = "DIR",
        hide_env_values = true
    )]
    pub state_dir: Option<PathBuf>,
    /// The control plane's address, instead of the one in the state folder. On Kubernetes:
    /// kube://CONTEXT/NAMESPACE, either of which may be left out, for those of your kubeconfig.
    #[arg(
        long,
        global = true,
        env = ENDPOINT_VARIABLE,
        value_name = "URL",
        hide_env_values = true
    )]
    pub endpoint: Option<String>,
    /// File with the cluster's token, instead of the one in the state folder.
    #[arg(
        long,
        global = true,
        env = TOKEN_FILE_VARIABLE,
        value_name = "FILE",
        hide_env_values = true
    )]
    pub token_file: Option<PathBuf>,
    /// Certificate of the control plane on another machine, `tls.crt` in its state folder: the one that
    /// an `https://` endpoint must show.
    #[arg(long, global = true, env = CA_VARIABLE, value_name = "FILE", hide_env_values = true)]
    pub ca: Option<PathBuf>,
    /// The form of data on standard output.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

impl Global {
    /// Returns how to find the cluster.
    ///
    /// # Errors
    /// The user's mistake, when there is no state folder.
    pub fn access(&self) -> Result<Access, Failure> {
        Ok(Access {
            state: StateDir::resolve(self.state_dir.as_deref())?,
            endpoint: self.endpoint.clone(),
            token_file: self.token_file.clone(),
            ca: self.ca.clone(),
        })
    }
}

/// Every command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train, break, recover, serve and ask a small model on this machine: the place to begin.
    Demo(DemoArgs),
    /// Run a cluster on this machine, in the foreground.
    Up(UpArgs),
    /// Join another machine's cluster as a node, in the foreground.
    Join(JoinArgs),
    /// Submit manifests; prints each job's id.
    Submit(SubmitArgs),
    /// List jobs, newest first.
    Jobs(JobsArgs),
    /// Describe one job in full: why it waits, where its ranks are, what happened.
    Describe(DescribeArgs),
    /// Show what a job's ranks wrote.
    Logs(LogsArgs),
    /// Wait until a job has ended or a service is ready; the exit code is its outcome.
    Wait(WaitArgs),
    /// Cancel jobs, or end services.
    Cancel(CancelArgs),
    /// Set how many replicas of a served model there are.
    Scale(ScaleArgs),
    /// Hold waiting jobs back.
    Hold(HoldArgs),
    /// Let jobs go that are held.
    Release(HoldArgs),
    /// List queues, or delete one.
    Queues(QueuesArgs),
    /// Save what the scheduler knows to a file.
    Snapshot(SnapshotArgs),
    /// List nodes, their devices and who holds them.
    Nodes(NodesArgs),
    /// Say that somebody has dealt with unhealthy GPUs, so that they are offered again.
    Clear(ClearArgs),
    /// Watch the fleet and its jobs.
    Top(TopArgs),
    /// Serve a checkpoint behind the gateway, and wait until it is ready.
    Serve(ServeArgs),
    /// Let a served model continue a prompt.
    Complete(CompleteArgs),
    /// Prepare text for training.
    Data(DataArgs),
    /// Write a checkpoint as a Hugging Face folder.
    Export(ExportArgs),
    /// Plan a run or a service: split, memory, time, money.
    Plan(PlanArgs),
    /// Simulate placement over recorded workloads.
    Sim(SimArgs),
    /// Look for GPUs and their libraries, and test every device.
    Doctor(DoctorArgs),
    /// Measure this machine.
    Bench(BenchArgs),
    /// Explain a kind of manifest, or one of its fields.
    Explain(ExplainArgs),
    /// Check manifests without submitting them.
    Validate(ValidateArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Show this program's version.
    Version(VersionArgs),
    /// The processes of a cluster; started by `up` and by agents, not by people.
    #[command(flatten)]
    Role(Role),
}

/// Reads a duration such as `90s` or `1m30s`.
///
/// # Errors
/// When it is none; the text says what one looks like.
pub fn duration(text: &str) -> Result<Duration, String> {
    match drumline_spec::field::parse_duration(text) {
        // A century: far enough, and no clock overflows.
        Some(ms) if ms <= 3_155_760_000_000 => Ok(Duration::from_millis(ms)),
        Some(_) => Err("is too long".to_owned()),
        None => Err("must be a duration such as 500ms, 30s, 1m30s or 2h".to_owned()),
    }
}
