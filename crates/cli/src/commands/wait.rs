//! `drumline wait`: until a job has ended or a service is ready, through restarts of the control
//! plane.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use drumline_wire::v1;

use crate::client::{Access, Patience};
use crate::failure::Failure;
use crate::output::{self, Format, note};
use crate::{told, views};

/// Wait until a job has ended or a service is ready; the exit code is its outcome.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// Its id, as `jobs` shows it.
    pub id: String,
    /// Give up after this time, such as 90s or 2h; 0s never does.
    #[arg(long, default_value = "0s", value_parser = crate::args::duration)]
    pub timeout: Duration,
    /// Give up when the cluster could not be reached for this long.
    #[arg(long, default_value = "60s", value_parser = crate::args::duration)]
    pub reconnect: Duration,
    /// Wait for a service until it has ended, not until it is ready.
    #[arg(long)]
    pub ended: bool,
}

/// Runs the command.
///
/// # Errors
/// Failed, when the job failed or was cancelled or time was up; unreachable.
pub async fn run(args: &WaitArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let until = Until {
        deadline: deadline(args.timeout),
        reconnect: args.reconnect,
        service_ready_is_enough: !args.ended,
    };
    let job = until_done(access, &args.id, &until, &mut Progress::default()).await?;
    output::value(format, &views::job(&job), || match told::progress(&job).as_str() {
        "" => format!("{} {}\n", job.id, job.phase),
        progress => format!("{} {}: {progress}\n", job.id, job.phase),
    })?;
    outcome(&job)
}

/// Returns the moment at which waiting ends, if it does.
#[must_use]
pub fn deadline(timeout: Duration) -> Option<Instant> {
    if timeout.is_zero() { None } else { Instant::now().checked_add(timeout) }
}

/// Turns a job's end into the command's.
///
/// # Errors
/// Failed, with the reason, when the job failed or was cancelled.
pub fn outcome(job: &v1::JobView) -> Result<(), Failure> {
    match job.phase.as_str() {
        "failed" => {
            let mut cause = format!("{} failed: {}", job.id, told::reason(job));
            if let Some(exit) = &job.first_failure {
                let how = told::failure(exit);
                cause.push_str(&format!(
                    "\n  first failure: rank {} on {}: {how}",
                    exit.rank, exit.node
                ));
            }
            Err(Failure::failed(cause).hint(job.remedy.clone()))
        }
        "cancelled" => Err(Failure::failed(format!("{} was cancelled", job.id))),
        _ => Ok(()),
    }
}

/// How long, and for what, to wait.
#[derive(Debug, Clone)]
pub struct Until {
    /// The moment at which waiting ends.
    pub deadline: Option<Instant>,
    /// Longest time without a connection.
    pub reconnect: Duration,
    /// A service that is ready is waited for no longer.
    pub service_ready_is_enough: bool,
}

/// Watches a job until it has ended or is ready, and connects again when the connection is lost.
///
/// # Errors
/// Failed, when time is up; the user's mistake, when the job is unknown; unreachable.
pub async fn until_done(
    access: &Access,
    id: &str,
    until: &Until,
    progress: &mut Progress,
) -> Result<v1::JobView, Failure> {
    let mut patience = Patience::new(until.reconnect);
    let mut last: Option<v1::JobView> = None;
    let watching = async {
        loop {
            let failure = match watch(access, id, until, progress, &mut last, &mut patience).await {
                Ok(job) => return Ok(job),
                Err(failure) => failure,
            };
            patience.after(failure).await?;
        }
    };
    let Some(deadline) = until.deadline else { return watching.await };
    match tokio::time::timeout_at(deadline.into(), watching).await {
        Ok(result) => result,
        Err(_) => {
            progress.finish();
            Err(match &last {
                Some(job) => Failure::failed(format!(
                    "time is up: {id} is {}: {}",
                    job.phase,
                    told::reason(job)
                ))
                .hint(job.remedy.clone()),
                None => Failure::unreachable(format!("time is up: nothing was heard of {id}")),
            })
        }
    }
}

/// One connection's worth of watching.
async fn watch(
    access: &Access,
    id: &str,
    until: &Until,
    progress: &mut Progress,
    last: &mut Option<v1::JobView>,
    patience: &mut Patience,
) -> Result<v1::JobView, Failure> {
    let client = access.connect().await?;
    let mut stream = client
        .call(|mut c| async move { c.watch_job(v1::GetJobRequest { id: id.to_owned() }).await })
        .await?;
    loop {
        match stream.message().await {
            Ok(Some(job)) => {
                patience.succeeded();
                progress.show(&job);
                let ready = until.service_ready_is_enough
                    && job.service.as_ref().is_some_and(|service| service.ready);
                if job.has_ended() || ready {
                    progress.finish();
                    return Ok(job);
                }
                *last = Some(job);
            }
            Ok(None) => {
                return Err(Failure::unreachable(format!("{} ended the watch", client.address)));
            }
            Err(status) => return Err(client.failure(&status)),
        }
    }
}

/// Tells on standard error how a job goes on: a line that renews itself on a terminal, and
/// otherwise a line for each phase.
#[derive(Debug, Default)]
pub struct Progress {
    is_silent: bool,
    phase: String,
    reason: String,
    line_open: bool,
}

impl Progress {
    /// Tells nothing.
    #[must_use]
    pub fn silent() -> Self {
        Self { is_silent: true, ..Self::default() }
    }

    fn show(&mut self, job: &v1::JobView) {
        if self.is_silent {
            return;
        }
        let changed = self.phase != job.phase || self.reason != job.reason;
        if changed {
            self.finish();
            let line = match job.phase.as_str() {
                "running" | "succeeded" => format!("{} is {}", job.id, job.phase),
                _ => format!("{} is {}: {}", job.id, job.phase, told::reason(job)),
            };
            note(&line);
            self.phase.clone_from(&job.phase);
            self.reason.clone_from(&job.reason);
        }
        let text = told::progress(job);
        if std::io::stderr().is_terminal() && !text.is_empty() {
            use std::io::Write;
            // Back to the start of the line, the text, and nothing left of a longer one.
            let _ = write!(std::io::stderr(), "\r{text}\x1b[K");
            self.line_open = true;
        }
    }

    fn finish(&mut self) {
        if std::mem::take(&mut self.line_open) {
            note("");
        }
    }
}
