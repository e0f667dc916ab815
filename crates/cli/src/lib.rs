//! The `drumline` binary: the command line of people, and every process of a cluster.
//!
//! It holds no decisions: it reads arguments, calls the control API or a crate's `run`, and shows
//! the answer.

pub mod args;
pub mod bench;
pub mod client;
pub mod cluster;
pub mod commands;
pub mod demo;
pub mod doctor;
pub mod failure;
pub mod gateway;
pub mod output;
pub mod reference;
pub mod roles;
pub mod state;
pub mod told;
pub mod top;
pub mod up;
pub mod views;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Cli, Command, Global, WELCOME};
use crate::failure::Failure;

/// Runs the program: the whole of `main`.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let command = match cli.command {
        None => return end(output::data(WELCOME)),
        Some(Command::Role(role)) => match role.run_plain() {
            Ok(code) => return code,
            Err(role) => {
                log_to_stderr();
                Command::Role(*role)
            }
        },
        Some(command @ (Command::Up(_) | Command::Join(_))) => {
            log_to_stderr();
            command
        }
        Some(command) => command,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime {
        Ok(runtime) => {
            let code = end(runtime.block_on(run(command, &cli.global)));
            // A thread that still reads standard input must not hold the program up.
            runtime.shutdown_background();
            code
        }
        Err(error) => end(Err(Failure::failed(format!("cannot start threads: {error}")))),
    }
}

async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let format = global.output;
    match command {
        // These need no cluster, and no home folder either.
        Command::Explain(args) => commands::manifests::explain(&args, format),
        Command::Doctor(args) => doctor::run(&args, format).await,
        Command::Validate(args) => commands::manifests::validate(&args, format),
        Command::Completions { shell } => completions(shell),
        Command::Plan(args) => commands::plan::run(&args, format),
        Command::Sim(args) => commands::sim::run(args, format).await,
        Command::Role(role) => role.run(global).await,
        Command::Demo(args) => demo::run(&args, global).await,
        Command::Up(args) => up::run(&args, &global.access()?, format).await,
        Command::Join(args) => roles::join(args, global).await,
        Command::Submit(args) => commands::submit::run(&args, &global.access()?, format).await,
        Command::Jobs(args) => commands::jobs::list(&args, &global.access()?, format).await,
        Command::Describe(args) => commands::describe::run(&args, &global.access()?, format).await,
        Command::Logs(args) => commands::logs::run(&args, &global.access()?).await,
        Command::Wait(args) => commands::wait::run(&args, &global.access()?, format).await,
        Command::Cancel(args) => commands::jobs::cancel(&args, &global.access()?, format).await,
        Command::Scale(args) => commands::jobs::scale(&args, &global.access()?, format).await,
        Command::Hold(args) => commands::queues::hold(&args, true, &global.access()?, format).await,
        Command::Release(args) => {
            commands::queues::hold(&args, false, &global.access()?, format).await
        }
        Command::Queues(args) => commands::queues::run(&args, &global.access()?, format).await,
        Command::Snapshot(args) => commands::queues::snapshot(&args, &global.access()?).await,
        Command::Nodes(args) => commands::nodes::run(&args, &global.access()?, format).await,
        Command::Clear(args) => commands::clear::run(&args, &global.access()?, format).await,
        Command::Data(args) => commands::data::run(args, &global.access()?, format).await,
        Command::Bench(args) => bench::run(&args, format).await,
        Command::Export(args) => commands::export::run(args, &global.access()?, format).await,
        Command::Top(args) => top::run(&args, &global.access()?, format).await,
        Command::Serve(args) => commands::serve::run(&args, &global.access()?, format).await,
        Command::Complete(args) => commands::complete::run(&args, &global.access()?, format).await,
        Command::Version(args) => commands::version::run(&args, &global.access()?, format).await,
    }
}

fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "drumline", &mut script);
    output::bytes(&script)
}

fn end(outcome: Result<(), Failure>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            ExitCode::from(failure.code())
        }
    }
}

/// Logs of long-lived processes: `DRUMLINE_LOG` chooses, as in `drumline_control=debug,warn`.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("DRUMLINE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,drumline=info"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::stderr_is_coloured())
        .try_init();
}
