//! What happens next to a job: a function of what the API server shows.
//!
//! Level-triggered: it remembers nothing, so an operator that was killed anywhere comes to the same
//! answer as one that was not. It does nothing itself.
//!
//! # Invariants
//! - The attempt's number is in the status before any pod of the attempt exists, and only grows.
//! - A gang that is partly bound while nobody binds it is taken back whole.
//! - A job's object outlives its pods.

use drumline_lifecycle::cause::is_peer_gone;
use drumline_spec::{JobSpec, Work};
use drumline_types::{Explanation, JobPhase, Reason};

use crate::crd::status::JobStatus;
use crate::gang::{Gang, Member, Standing, judge};
use crate::job::Job;
use crate::pods::is_native;
use crate::ranks::worlds::Told;
use crate::status::told;

/// A run of this length counts as progress, in milliseconds; the same as off Kubernetes.
const PROGRESS_RUN_MS: u64 = 60_000;
/// The longest wait before a restart, in milliseconds; the same as off Kubernetes.
const BACKOFF_MAX_MS: u64 = 300_000;

/// The wait after a node refused a pod, in milliseconds.
const REFUSED_WAIT_MS: u64 = 2_000;

/// Nodes get so much longer for a start than off Kubernetes, in milliseconds: they pull images.
const PULL_MS: u64 = 600_000;
/// Ranks whose place is told when a gang has stalled.
const POSITIONS_TOLD: usize = 8;
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
    /// What the ranks of its newest attempt have told; `None`: nothing yet.
    pub told: Option<&'a Told>,
    /// When this operator began to lead, in milliseconds since 1970: nobody was listened to before.
    pub since_ms: u64,
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
                let why = Explanation::new(left_for(&job.status), job.status.message.clone());
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
    let members: Vec<&Member> =
        view.members.iter().filter(|m| m.attempt == job.status.attempt).collect();
    let ranks = match job.status.ranks {
        0 => spec.gang().ranks,
        ranks => ranks,
    };
    let is_running = phase(&job.status) == JobPhase::Running;
    let gang = match judge(ranks, &members, view.is_lost) {
        // Native ranks run once they have met, not once their containers do.
        Gang::Running
            if is_native(spec) && !is_running && !view.told.is_some_and(|t| t.is_joined) =>
        {
            Gang::Starting { running: ranks }
        }
        gang => gang,
    };
    match gang {
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
        Gang::Broken(why) => failed(view, spec, &with_errors(why, &members, view.told)),
        Gang::Succeeded => {
            let why = Explanation::new(Reason::Completed, format!("all {ranks} ranks finished"));
            let mut status = told(job, JobPhase::Succeeded, &why, now);
            progressed(&mut status, spec, view.told);
            status.ready = format!("0/{ranks}");
            write(job, status)
        }
        Gang::Running => {
            let stalls = stalls_at(view, spec);
            if let Some(why) = stalls.filter(|at| *at <= now).map(|_| stalled(view, spec)) {
                return failed(view, spec, &why);
            }
            let why = Explanation::new(Reason::Completed, format!("{ranks} ranks run"));
            let mut status = told(job, JobPhase::Running, &why, now);
            progressed(&mut status, spec, view.told);
            status.ready = format!("{ranks}/{ranks}");
            if status.running_since_ms == 0 {
                status.running_since_ms = now;
            }
            match write(job, status) {
                Next::Nothing { .. } => Next::Nothing { at_ms: stalls },
                next => next,
            }
        }
        Gang::Starting { running } => {
            let limit = spec.settings.start_timeout_ms.saturating_add(PULL_MS);
            let deadline = job.status.launched_ms.saturating_add(limit);
            if now >= deadline {
                let within = drumline_types::format_duration_ms(limit);
                let message = match running {
                    all if all == ranks => format!("not all ranks joined within {within}"),
                    some => format!("{some} of {ranks} ranks ran within {within}"),
                };
                return failed(view, spec, &Explanation::new(Reason::RendezvousTimedOut, message));
            }
            let attempt = job.status.attempt;
            let message = if running == ranks {
                format!("attempt {attempt} runs; its ranks are meeting")
            } else {
                format!("attempt {attempt} is bound; its containers start")
            };
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
    let has_progressed = has_progressed(view, spec);
    // A node that died or is emptied is the fleet's fault, not the job's.
    let is_blameless = matches!(why.reason, Reason::NodeLost | Reason::Moved);
    let fruitless = match (has_progressed, is_blameless) {
        (true, _) => 0,
        (false, true) => job.status.fruitless,
        (false, false) => job.status.fruitless + 1,
    };
    let ranks = spec.gang().ranks;
    let checkpoint = view.told.and_then(|told| told.checkpoint).max(job.status.checkpoint);
    if policy.limit == 0 || fruitless > policy.limit {
        let message = format!(
            "attempt {} failed, and no restart is left: {}",
            job.status.attempt, why.message
        );
        let reason = if policy.limit == 0 { why.reason } else { Reason::RestartsExhausted };
        let last = Explanation::new(reason, message);
        let mut status = told(job, JobPhase::Failed, &last, now);
        progressed(&mut status, spec, view.told);
        status.ready = format!("0/{ranks}");
        return write(job, status);
    }
    let is_refused = view.members.iter().any(|m| m.is_refused && m.attempt == job.status.attempt);
    let wait_ms = match fruitless {
        // A node that refuses may take a moment until it says what it has.
        _ if is_refused => REFUSED_WAIT_MS,
        0 => 0,
        _ if is_blameless => 0,
        n => policy.backoff_ms.saturating_mul(1 << (n - 1).min(32)).min(BACKOFF_MAX_MS),
    };
    let mut status = told(job, JobPhase::Restarting, why, now);
    status.fruitless = fruitless;
    status.checkpoint = checkpoint;
    status.restarts += 1;
    status.not_before_ms = now + wait_ms;
    status.running_since_ms = 0;
    status.ready = format!("0/{ranks}");
    write(job, status)
}

/// Whether the attempt has brought the job on: a newer checkpoint of a training run, a minute of
/// running for the others.
fn has_progressed(view: &View<'_>, spec: &JobSpec) -> bool {
    let status = &view.job.status;
    if let Work::TrainingJob(_) = spec.work {
        let newest = view.told.and_then(|told| told.checkpoint).max(status.checkpoint);
        return newest > status.checkpoint_at_launch;
    }
    let since = status.running_since_ms;
    since > 0 && view.now_ms.saturating_sub(since) >= PROGRESS_RUN_MS
}

/// Takes over what the ranks have told.
fn progressed(status: &mut JobStatus, spec: &JobSpec, told: Option<&Told>) {
    let (Work::TrainingJob(_), Some(told)) = (&spec.work, told) else { return };
    if told.step > 0 {
        status.step = Some(told.step);
    }
    if told.loss.is_some() {
        status.loss.clone_from(&told.loss);
    }
    status.checkpoint = status.checkpoint.max(told.checkpoint);
}

/// Returns when the watchdog ends the attempt if nothing is heard until then.
fn stalls_at(view: &View<'_>, spec: &JobSpec) -> Option<u64> {
    let timeout = spec.settings.stall_timeout_ms;
    if timeout == 0 || !is_native(spec) {
        return None;
    }
    let heard = view.told.map_or(0, |told| told.progressed_ms);
    // Weights are still being loaded before the first step: that may take as long as a start.
    let grace = if heard == 0 { spec.settings.start_timeout_ms } else { 0 };
    let since = heard.max(view.job.status.running_since_ms).max(view.since_ms);
    Some(since.saturating_add(timeout).saturating_add(grace))
}

/// Says what the watchdog saw.
fn stalled(view: &View<'_>, spec: &JobSpec) -> Explanation {
    let within = drumline_types::format_duration_ms(spec.settings.stall_timeout_ms);
    let stood = view.told.map(|told| {
        let all = told.positions.iter().take(POSITIONS_TOLD);
        all.map(|(rank, at)| format!("rank {rank}: {at}")).collect::<Vec<_>>().join("; ")
    });
    let step = view.told.map_or(0, |told| told.step);
    let stood = stood.filter(|text| !text.is_empty()).map(|text| format!(" ({text})"));
    let message = format!("no step within {within} after step {step}{}", stood.unwrap_or_default());
    Explanation::new(Reason::Stalled, message)
}

/// Adds what a rank said before it ended: of several, the one that did not only lose a peer.
fn with_errors(why: Explanation, members: &[&Member], told: Option<&Told>) -> Explanation {
    let Some(told) = told.filter(|told| !told.errors.is_empty()) else { return why };
    if why.reason == Reason::NodeLost {
        return why;
    }
    let own = told.errors.iter().find(|(_, error)| !is_peer_gone(error));
    let Some((rank, error)) = own.or_else(|| told.errors.iter().next()) else { return why };
    let node = members.iter().find(|member| member.rank == *rank).and_then(|m| m.node.as_deref());
    let node = node.unwrap_or("no node");
    Explanation::new(Reason::RankFailed, format!("rank {rank} on {node}: {error}"))
}

/// Returns why a job waits that has just left its devices.
fn left_for(status: &JobStatus) -> Reason {
    match Reason::from_token(&status.reason) {
        Some(why @ (Reason::Preempted | Reason::Reclaimed | Reason::Moved)) => why,
        _ => Reason::BackingOff,
    }
}

/// Returns the status of a gang that is asked to leave: no failure, and nothing is held against it.
#[must_use]
pub fn evicted(view: &View<'_>, why: &Explanation) -> JobStatus {
    let job = view.job;
    let mut status = told(job, JobPhase::Restarting, why, view.now_ms);
    status.checkpoint = view.told.and_then(|told| told.checkpoint).max(job.status.checkpoint);
    status.not_before_ms = view.now_ms;
    status.running_since_ms = 0;
    status.ready = format!("0/{}", job.status.ranks);
    status
}

/// Writes a status unless it says what is stored already.
fn write(job: &Job, status: JobStatus) -> Next {
    if job.has_status && job.status == status {
        Next::Nothing { at_ms: None }
    } else {
        Next::Write(Box::new(status))
    }
}
