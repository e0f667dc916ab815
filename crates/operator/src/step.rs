//! What happens next to a job: a function of what the API server shows.
//!
//! Level-triggered: it remembers nothing, so an operator that was killed anywhere comes to the same
//! answer as one that was not. It does nothing itself.
//!
//! # Invariants
//! - The attempt's number is in the status before any pod of the attempt exists, and only grows.
//! - A gang that is partly bound while nobody binds it is taken back whole.
//! - A job's object outlives its pods.

use drumline_spec::{JobSpec, Work};
use drumline_types::{Explanation, JobPhase, Reason};

use crate::crd::status::JobStatus;
use crate::gang::{Gang, Member, Standing, judge};
use crate::job::Job;
use crate::status::told;

/// A run of this length counts as progress, in milliseconds; the same as off Kubernetes.
const PROGRESS_RUN_MS: u64 = 60_000;
/// The longest wait before a restart, in milliseconds; the same as off Kubernetes.
const BACKOFF_MAX_MS: u64 = 300_000;

/// Nodes get so much longer for a start than off Kubernetes, in milliseconds: they pull images.
const PULL_MS: u64 = 600_000;
/// When to look again at a job whose shown state is behind its pods', in milliseconds.
const STALE_MS: u64 = 500;

/// What is to be done for one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Nothing before something changes, or before this moment, in milliseconds since 1970.
    Nothing {
        /// When to look again; `None`: at the next change.
        at_ms: Option<u64>,
    },
    /// Put the finalizer on it.
    Adopt,
    /// Write the status; nothing else may happen before it is stored.
    Write(Box<JobStatus>),
    /// Delete pods, by name and uid; the flag says that their node will not answer.
    Remove(Vec<Doomed>),
    /// It wants devices.
    Consider,
    /// Its pods are gone: delete its service and let it go.
    Release,
}

/// A pod that is to be deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doomed {
    /// Its name.
    pub name: String,
    /// Its uid, so that no later pod of the name is hit.
    pub uid: String,
    /// Its node is gone: do not wait for a kubelet.
    pub is_lost: bool,
}

/// What is looked at.
pub struct View<'a> {
    /// The job.
    pub job: &'a Job,
    /// Its pods, of any attempt.
    pub members: &'a [Member],
    /// Whether its gang is being bound or taken back at this moment.
    pub is_busy: bool,
    /// Whether a node is gone or silent.
    pub is_lost: &'a dyn Fn(&str) -> bool,
    /// Milliseconds since 1970.
    pub now_ms: u64,
}

/// Returns what is to be done next.
#[must_use]
pub fn step(view: &View<'_>) -> Next {
    let job = view.job;
    if view.is_busy {
        return Next::Nothing { at_ms: None };
    }
    if job.is_deleting {
        return deleting(view);
    }
    if !job.has_finalizer {
        return Next::Adopt;
    }
    if view.members.iter().any(|member| member.attempt > job.status.attempt) {
        // The attempt is written down before its pods exist: what we see of the job is stale.
        return Next::Nothing { at_ms: Some(view.now_ms + STALE_MS) };
    }
    let spec = match &job.spec {
        Ok(spec) => spec,
        Err(mistakes) => {
            let message = format!("the spec is refused: {mistakes}");
            let why = Explanation::new(Reason::NotYetConsidered, message);
            return write(job, told(job, JobPhase::Failed, &why, view.now_ms));
        }
    };
    match phase(&job.status) {
        JobPhase::Pending => pending(view),
        JobPhase::Starting | JobPhase::Running => {
            // What an attempt that was taken back left behind, however late it comes to light.
            let left = |member: &Member| is_alive(member) && member.attempt < job.status.attempt;
            doomed(view, left).unwrap_or_else(|| attempt(view, spec))
        }
        // Restarting: what is left of the attempt goes, then it waits again.
        JobPhase::Restarting | JobPhase::Cancelling => match doomed(view, is_alive) {
            Some(next) => next,
            None => {
                let why = Explanation::new(Reason::BackingOff, job.status.message.clone());
                write(job, told(job, JobPhase::Pending, &why, view.now_ms))
            }
        },
        JobPhase::Succeeded | JobPhase::Failed | JobPhase::Cancelled => {
            doomed(view, is_alive).unwrap_or(Next::Nothing { at_ms: None })
        }
    }
}

/// Returns where a job stands.
#[must_use]
pub fn phase(status: &JobStatus) -> JobPhase {
    match status.phase.as_str() {
        "starting" => JobPhase::Starting,
        "running" => JobPhase::Running,
        "restarting" => JobPhase::Restarting,
        "succeeded" => JobPhase::Succeeded,
        "failed" => JobPhase::Failed,
        "cancelled" => JobPhase::Cancelled,
        _ => JobPhase::Pending,
    }
}

fn is_alive(member: &Member) -> bool {
    !matches!(member.standing, Standing::Succeeded | Standing::Failed)
}

/// Deletes the pods that `which` names. `None`: there are none. Pods whose deletion was asked for
/// are waited for, unless their node is lost.
fn doomed(view: &View<'_>, which: impl Fn(&Member) -> bool) -> Option<Next> {
    let theirs: Vec<&Member> = view.members.iter().filter(|member| which(member)).collect();
    if theirs.is_empty() {
        return None;
    }
    // A pod that was deleted while it was bound to no node has no kubelet that could end it.
    let lost = |member: &Member| member.node.as_deref().map_or(member.is_deleting, view.is_lost);
    let now: Vec<Doomed> = theirs
        .into_iter()
        .filter(|member| !member.is_deleting || lost(member))
        .map(|member| Doomed {
            name: member.name.clone(),
            uid: member.uid.clone(),
            is_lost: lost(member),
        })
        .collect();
    Some(if now.is_empty() { Next::Nothing { at_ms: None } } else { Next::Remove(now) })
}

fn deleting(view: &View<'_>) -> Next {
    if !view.job.has_finalizer {
        return Next::Nothing { at_ms: None };
    }
    doomed(view, |_| true).unwrap_or(Next::Release)
}

fn pending(view: &View<'_>) -> Next {
    // What an interrupted binding left, and finished pods of attempts before the last one.
    let newest = view.job.status.attempt;
    let left = |member: &Member| is_alive(member) || member.attempt < newest;
    if let Some(next) = doomed(view, left) {
        return next;
    }
    Next::Consider
}

fn attempt(view: &View<'_>, spec: &JobSpec) -> Next {
    let job = view.job;
    let now = view.now_ms;
    let ranks = spec.gang().ranks;
    let members: Vec<&Member> =
        view.members.iter().filter(|m| m.attempt == job.status.attempt).collect();
    let is_running = phase(&job.status) == JobPhase::Running;
    match judge(ranks, &members, view.is_lost) {
        Gang::Partial { bound } if is_running => {
            let message = format!("{} of {ranks} pods are gone", ranks.saturating_sub(bound));
            failed(view, spec, &Explanation::new(Reason::RankKilled, message))
        }
        Gang::Partial { bound } => {
            let message = format!(
                "the binding of attempt {} was cut off with {bound} of {ranks} ranks bound; it is \
                 taken back whole",
                job.status.attempt
            );
            let why = Explanation::new(Reason::NotYetConsidered, message);
            write(job, told(job, JobPhase::Pending, &why, now))
        }
        Gang::Broken(why) => failed(view, spec, &why),
        Gang::Succeeded => {
            let why = Explanation::new(Reason::Completed, format!("all {ranks} ranks finished"));
            write(
                job,
                JobStatus {
                    ready: format!("0/{ranks}"),
                    replicas: 0,
                    ..told(job, JobPhase::Succeeded, &why, now)
                },
            )
        }
        Gang::Running => {
            let why = Explanation::new(Reason::Completed, format!("{ranks} ranks run"));
            let mut status = told(job, JobPhase::Running, &why, now);
            status.ready = format!("{ranks}/{ranks}");
            status.replicas = u32::from(matches!(spec.work, Work::ModelService(_)));
            if status.running_since_ms == 0 {
                status.running_since_ms = now;
            }
            write(job, status)
        }
        Gang::Starting { running } => {
            let limit = spec.settings.start_timeout_ms.saturating_add(PULL_MS);
            let deadline = job.status.launched_ms.saturating_add(limit);
            if now >= deadline {
                let message = format!(
                    "{running} of {ranks} ranks ran within {}",
                    drumline_types::format_duration_ms(limit)
                );
                return failed(view, spec, &Explanation::new(Reason::RendezvousTimedOut, message));
            }
            let message = format!("attempt {} is bound; its containers start", job.status.attempt);
            let why = Explanation::new(Reason::StartingRanks, message);
            let mut status = told(job, JobPhase::Starting, &why, now);
            // The count is told when the gang runs: one write for a gang, not one for each pod.
            status.ready = format!("0/{ranks}");
            match write(job, status) {
                Next::Nothing { .. } => Next::Nothing { at_ms: Some(deadline) },
                next => next,
            }
        }
    }
}

/// The attempt ended without success: another follows, or none.
fn failed(view: &View<'_>, spec: &JobSpec, why: &Explanation) -> Next {
    let job = view.job;
    let now = view.now_ms;
    let policy = spec.settings.restarts;
    let since = job.status.running_since_ms;
    let has_progressed = since > 0 && now.saturating_sub(since) >= PROGRESS_RUN_MS;
    // A node that died is the fleet's fault, not the job's.
    let is_blameless = why.reason == Reason::NodeLost;
    let fruitless = match (has_progressed, is_blameless) {
        (true, _) => 0,
        (false, true) => job.status.fruitless,
        (false, false) => job.status.fruitless + 1,
    };
    let ranks = spec.gang().ranks;
    if policy.limit == 0 || fruitless > policy.limit {
        let message = format!(
            "attempt {} failed, and no restart is left: {}",
            job.status.attempt, why.message
        );
        let reason = if policy.limit == 0 { why.reason } else { Reason::RestartsExhausted };
        let last = Explanation::new(reason, message);
        let mut status = told(job, JobPhase::Failed, &last, now);
        status.ready = format!("0/{ranks}");
        status.replicas = 0;
        return write(job, status);
    }
    let wait_ms = match fruitless {
        0 => 0,
        _ if is_blameless => 0,
        n => policy.backoff_ms.saturating_mul(1 << (n - 1).min(32)).min(BACKOFF_MAX_MS),
    };
    let mut status = told(job, JobPhase::Restarting, why, now);
    status.fruitless = fruitless;
    status.restarts += 1;
    status.not_before_ms = now + wait_ms;
    status.running_since_ms = 0;
    status.ready = format!("0/{ranks}");
    status.replicas = 0;
    write(job, status)
}

/// Writes a status unless it says what is stored already.
fn write(job: &Job, status: JobStatus) -> Next {
    if job.has_status && job.status == status {
        Next::Nothing { at_ms: None }
    } else {
        Next::Write(Box::new(status))
    }
}
