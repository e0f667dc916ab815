//! A job's next status: phase, reason and conditions, changed only where they differ.

use drumline_types::{Explanation, JobPhase};
use k8s_openapi::jiff::Timestamp;

use crate::crd::status::{Condition, JobStatus};
use crate::gang::UID;
use crate::job::Job;
use crate::replicas::selector;

/// Returns the job's status with this phase and reason.
#[must_use]
pub fn told(job: &Job, phase: JobPhase, why: &Explanation, now_ms: u64) -> JobStatus {
    let mut status = job.status.clone();
    phase.as_str().clone_into(&mut status.phase);
    // A gang that runs has nothing to explain.
    let reason = if phase == JobPhase::Running { "" } else { why.reason.token() };
    reason.clone_into(&mut status.reason);
    status.message.clone_from(&why.message);
    status.observed_generation = job.generation;
    status.selector = selector(job).unwrap_or_else(|| format!("{UID}={}", job.uid));
    let running = phase == JobPhase::Running;
    let succeeded = phase == JobPhase::Succeeded;
    let failed = phase == JobPhase::Failed;
    let was = std::mem::take(&mut status.conditions);
    status.conditions = [("Ready", running), ("Complete", succeeded), ("Failed", failed)]
        .map(|(kind, holds)| condition(&was, job, phase, kind, holds, why, now_ms))
        .to_vec();
    status
}

fn condition(
    was: &[Condition],
    job: &Job,
    phase: JobPhase,
    kind: &str,
    holds: bool,
    why: &Explanation,
    now_ms: u64,
) -> Condition {
    let status = if holds { "True" } else { "False" };
    match was.iter().find(|condition| condition.kind == kind && condition.status == status) {
        // Only a change is worth a new time and a new reason.
        Some(same) => same.clone(),
        None => Condition {
            kind: kind.to_owned(),
            status: status.to_owned(),
            reason: if phase == JobPhase::Running { "Running" } else { why.reason.token() }
                .to_owned(),
            message: why.message.clone(),
            last_transition_time: rfc3339(now_ms),
            observed_generation: job.generation,
        },
    }
}

fn rfc3339(ms: u64) -> String {
    let ms = i64::try_from(ms / 1000 * 1000).unwrap_or(0);
    Timestamp::from_millisecond(ms).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_told_as_the_api_server_wants_it() {
        assert_eq!(rfc3339(1_700_000_000_123), "2023-11-14T22:13:20Z");
    }
}
