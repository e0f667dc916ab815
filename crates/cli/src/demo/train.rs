//! The demo's training run: submitted as a user would, watched, and broken on purpose.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use drumline_types::format_duration_ms;
use drumline_wire::v1;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal};

use crate::client::{Access, Patience};
use crate::commands::wait::outcome;
use crate::failure::Failure;
use crate::output::note;
use crate::told;

/// Longest time without a connection to the control plane.
const PATIENCE: Duration = Duration::from_secs(60);

/// A finished run.
#[derive(Debug)]
pub(super) struct Run {
    /// The job as it ended.
    pub job: v1::JobView,
    /// Tokens per second over the stretches in which it trained.
    pub tokens_per_second: f64,
}

/// Watches the job to its end; kills a rank on the way, if asked.
///
/// # Errors
/// Failed, when the job did; unreachable.
pub(super) async fn watch(access: &Access, id: &str, kill: bool) -> Result<Run, Failure> {
    let mut patience = Patience::new(PATIENCE);
    let mut show = Show::new();
    let mut kill = Kill { wanted: kill, done: None };
    let mut meter = Meter::default();
    loop {
        let failure = match follow(access, id, &mut show, &mut kill, &mut meter).await {
            Ok(job) => {
                show.finish();
                outcome(&job)?;
                if kill.wanted && kill.done.is_none() {
                    return Err(Failure::failed(
                        "the run ended before a rank could be killed: it has too few steps",
                    ));
                }
                return Ok(Run { job, tokens_per_second: meter.rate() });
            }
            Err(failure) => failure,
        };
        patience.after(failure).await?;
    }
}

async fn follow(
    access: &Access,
    id: &str,
    show: &mut Show,
    kill: &mut Kill,
    meter: &mut Meter,
) -> Result<v1::JobView, Failure> {
    let client = access.connect().await?;
    let mut control = client.control.clone();
    let request = v1::GetJobRequest { id: id.to_owned() };
    let opened = control.watch_job(request).await.map_err(|status| client.failure(&status))?;
    let mut stream = opened.into_inner();
    loop {
        match stream.message().await {
            Ok(Some(job)) => {
                meter.see(&job);
                show.job(&job);
                kill.consider(&job, show);
                if job.has_ended() {
                    return Ok(job);
                }
            }
            Ok(None) => return Err(Failure::unreachable("the control plane ended the watch")),
            Err(status) => return Err(client.failure(&status)),
        }
    }
}

/// Measures throughput over the stretches in which steps were reported without a restart between.
#[derive(Debug, Default)]
struct Meter {
    last: Option<(u32, u64, Instant)>,
    tokens: u64,
    time: Duration,
}

impl Meter {
    fn see(&mut self, job: &v1::JobView) {
        let Some(training) = job.training.as_ref().filter(|training| training.step > 0) else {
            return;
        };
        let now = (job.attempt, training.tokens, Instant::now());
        match self.last {
            Some((attempt, tokens, at)) if attempt == job.attempt => {
                if training.tokens > tokens {
                    self.tokens += training.tokens - tokens;
                    self.time += now.2 - at;
                    self.last = Some(now);
                }
            }
            _ => self.last = Some(now),
        }
    }

    fn rate(&self) -> f64 {
        let seconds = self.time.as_secs_f64();
        if seconds > 0.0 { self.tokens as f64 / seconds } else { 0.0 }
    }
}

/// Kills one rank in the second half of the run, between two checkpoints.
#[derive(Debug)]
struct Kill {
    wanted: bool,
    done: Option<u64>,
}

impl Kill {
    fn consider(&mut self, job: &v1::JobView, show: &Show) {
        let Some(training) = &job.training else { return };
        // Far enough from the last checkpoint that steps are lost, and from the end that there is one
        // to kill. No narrower: what is shown may be many steps later each time.
        let since = training.step.saturating_sub(training.checkpoint_step);
        let past_checkpoint = training.checkpoint_step > 0 && since >= 3;
        let half_way = training.step * 2 >= training.steps && training.step + 4 <= training.steps;
        if !self.wanted || self.done.is_some() || !past_checkpoint || !half_way {
            return;
        }
        let Some(rank) =
            job.ranks.iter().rev().find(|rank| rank.phase == "running" && rank.pid > 0)
        else {
            return;
        };
        let Some(pid) = Pid::from_raw(rank.pid.cast_signed()) else { return };
        if rustix::process::kill_process(pid, Signal::KILL).is_ok() {
            self.done = Some(training.step);
            show.say(&format!(
                "killed rank {} on {} (process {}) with SIGKILL after step {}; the last complete \
                 checkpoint is of step {}",
                rank.rank, rank.node, rank.pid, training.step, training.checkpoint_step
            ));
        }
    }
}

/// A progress bar on a terminal, a line now and then elsewhere.
struct Show {
    bar: ProgressBar,
    phase: String,
    restarts: u32,
    told_at: Instant,
}

impl Show {
    fn new() -> Self {
        let style = "{bar:32} {pos}/{len}  {msg}";
        let bar = ProgressBar::new(0);
        bar.set_style(
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Self { bar, phase: String::new(), restarts: 0, told_at: Instant::now() }
    }

    fn say(&self, line: &str) {
        if self.bar.is_hidden() { note(line) } else { self.bar.println(line) }
    }

    fn job(&mut self, job: &v1::JobView) {
        if self.phase != job.phase {
            match job.phase.as_str() {
                "running" | "succeeded" => self.say(&format!("{} is {}", job.id, job.phase)),
                _ => self.say(&format!("{} is {}: {}", job.id, job.phase, told::reason(job))),
            }
            self.phase.clone_from(&job.phase);
        }
        if job.restarts > self.restarts {
            self.restarts = job.restarts;
            if let Some(failure) = &job.first_failure {
                let how = told::failure(failure);
                self.say(&format!("the gang restarts: rank {}: {how}", failure.rank));
            }
        }
        let Some(training) = job.training.as_ref().filter(|training| training.step > 0) else {
            return;
        };
        let line = format!(
            "loss {:.3}  {:.0} tokens/s  {} of matmul peak  {} left",
            training.loss,
            training.tokens_per_second,
            told::percent(training.mfu),
            format_duration_ms(training.eta_ms)
        );
        self.bar.set_length(training.steps);
        self.bar.set_position(training.step);
        self.bar.set_message(line.clone());
        if self.bar.is_hidden() && self.told_at.elapsed() > Duration::from_secs(5) {
            self.told_at = Instant::now();
            note(&format!("step {}/{}  {line}", training.step, training.steps));
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Compares the losses of steps that were made twice, before and after a restart: the same bits,
/// or the recovery is not exact. Returns how many steps were made twice.
///
/// # Errors
/// Failed, when a loss differs, or the run's record cannot be read.
pub(super) fn check_repeated_losses(record: &Path) -> Result<u64, Failure> {
    let text = std::fs::read_to_string(record)
        .map_err(|error| Failure::failed(format!("{}: {error}", record.display())))?;
    let mut first: BTreeMap<u64, u64> = BTreeMap::new();
    let mut repeated = 0;
    for line in text.lines() {
        // A line that was cut off by the kill says nothing.
        let Ok(entry) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let (Some(step), Some(loss)) = (entry["step"].as_u64(), entry["loss"].as_f64()) else {
            continue;
        };
        match first.insert(step, loss.to_bits()) {
            None => {}
            Some(bits) if bits == loss.to_bits() => repeated += 1,
            Some(bits) => {
                return Err(Failure::failed(format!(
                    "step {step} had the loss {} before the restart and {loss} after it",
                    f64::from_bits(bits)
                )));
            }
        }
    }
    Ok(repeated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_differs_after_a_restart_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let same = "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":2.25}\n{\"st\n{\"step\":2,\"loss\":2.25}\n";
        std::fs::write(file.path(), same).unwrap();
        assert_eq!(check_repeated_losses(file.path()).unwrap(), 1);
        std::fs::write(file.path(), format!("{same}{{\"step\":1,\"loss\":2.5000001}}\n")).unwrap();
        assert!(check_repeated_losses(file.path()).unwrap_err().to_string().contains("step 1"));
    }

    #[test]
    fn throughput_leaves_restarts_out() {
        let view = |attempt, step| v1::JobView {
            attempt,
            training: Some(v1::TrainingView { step, tokens: step * 100, ..Default::default() }),
            ..Default::default()
        };
        let mut meter = Meter::default();
        meter.see(&view(1, 1));
        std::thread::sleep(Duration::from_millis(20));
        meter.see(&view(1, 3));
        meter.see(&view(2, 2));
        assert_eq!(meter.tokens, 200);
        assert!(meter.rate() > 0.0 && meter.rate() <= 10_000.0, "{}", meter.rate());
    }
}
