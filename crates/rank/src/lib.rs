//! One rank: a process on one device that trains or serves its part of a model.
//!
//! It joins the [`engine`](drumline_engine) to its IO: the agent that started it ([`host`]), its
//! peers ([`world`]), the data, the checkpoints, and, for a service's leader, the gateway's
//! requests ([`serve`]).

pub mod context;
pub mod cores;
pub mod gpu;
pub mod host;
pub mod record;
pub mod serve;
pub mod stopwatch;
pub mod train;
pub mod world;

use std::process::ExitCode;

use drumline_spec::Work;
use drumline_wire::line::Credential;

use crate::context::Context;
use crate::host::Host;

/// Why a rank ends without success.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// The environment is not that of a rank.
    #[error(transparent)]
    Context(#[from] context::ContextError),
    /// The agent cannot be talked to.
    #[error(transparent)]
    Host(#[from] host::HostError),
    /// The peers cannot be reached.
    #[error(transparent)]
    World(#[from] world::WorldError),
    /// The engine refused or lost a peer.
    #[error(transparent)]
    Engine(#[from] drumline_engine::EngineError),
    /// The GPU cannot be used.
    #[error(transparent)]
    Gpu(#[from] drumline_cuda::CudaError),
    /// A peer is gone, silent or out of step.
    #[error(transparent)]
    Collective(#[from] drumline_collective::CollectiveError),
    /// The data cannot be read.
    #[error(transparent)]
    Dataset(#[from] drumline_data::DatasetError),
    /// The data does not fit the job.
    #[error(transparent)]
    Batch(#[from] drumline_data::BatchError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] drumline_data::TokenizerError),
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] drumline_checkpoint::CheckpointError),
    /// The operating system refused.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Something else that a user can mend.
    #[error("{0}")]
    Refused(String),
}

/// Runs this process as a rank: the body of `drumline rank`.
#[must_use]
pub fn run() -> ExitCode {
    // Before any thread is started: they inherit it.
    if let Err(why) = cores::keep() {
        println!("cores are not kept to: {why}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Reports and requests only: the work is done by this thread and the backend's pool.
        .worker_threads(1)
        .enable_all()
        .build();
    // Nothing of it is looked at again after a panic.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.map_err(RankError::from).and_then(|runtime| work(&runtime))
    }));
    // The last line of the log is what the agent tells of a rank that failed.
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("rank: {error}");
            ExitCode::FAILURE
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            eprintln!("rank: a bug: {}", text.unwrap_or("panicked without a message"));
            ExitCode::from(101)
        }
    }
}

/// Ends this process at SIGTERM. In a pod a rank is the first process, to which the kernel delivers
/// no signal that it does not ask for; elsewhere its supervisor sees to its end.
fn end_when_asked() -> Result<(), std::io::Error> {
    /// What a shell says of a program that SIGTERM ended.
    const TERMINATED: i32 = 128 + 15;
    let mut asked = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::spawn(async move {
        asked.recv().await;
        println!("asked to end");
        std::process::exit(TERMINATED);
    });
    Ok(())
}

fn work(runtime: &tokio::runtime::Runtime) -> Result<(), RankError> {
    let context = Context::from_environment()?;
    if matches!(context.credential, Credential::File(_)) {
        let _inside = runtime.enter();
        end_when_asked()?;
    }
    std::fs::create_dir_all(&context.job_dir).map_err(|error| {
        std::io::Error::new(error.kind(), format!("{}: {error}", context.job_dir.display()))
    })?;
    let host = {
        let _inside = runtime.enter();
        Host::open(&context)?
    };
    let outcome = match &context.spec.work {
        Work::TrainingJob(job) => train::run(&context, job, &host, runtime.handle()),
        Work::ModelService(service) => serve::run(&context, service, &host, runtime.handle()),
        Work::CommandJob(_) => {
            Err(RankError::Refused("a CommandJob brings its own program".to_owned()))
        }
    };
    if let Err(error) = &outcome {
        let text = error.to_string();
        runtime.block_on(host.report_last(|report| report.error = text));
    }
    outcome
}
