//! Admission: the order of the waiting jobs, and what their queues let through.

use std::collections::BTreeMap;

use drumline_spec::DeviceKind;
use drumline_types::{Explanation, JobId, QueueName, Reason, Timestamp, format_duration_ms};

use crate::limits::{Queues, Usage};
use crate::waiting::{Admitted, Waiting};

/// Who may have devices now, in order, and why the others may not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Admission {
    /// In the order in which they choose devices.
    pub admitted: Vec<Admitted>,
    /// Every other job, with the first reason that holds.
    pub refused: Vec<(JobId, Explanation)>,
}

/// Sorts the waiting jobs (priority, then arrival) and admits those whose queue has quota left.
///
/// A gang is charged to its queue whole or not at all. A job that waits for quota keeps those
/// behind it in the same queue and device kind waiting too: a stream of small jobs cannot starve
/// a big one. A job that exceeds its queue's limit outright keeps nobody waiting.
#[must_use]
pub fn admit(queues: &Queues, usage: &Usage, waiting: &[Waiting], now: Timestamp) -> Admission {
    let mut order: Vec<&Waiting> = waiting.iter().collect();
    order.sort_by(|a, b| a.order(b));
    let mut usage = usage.clone();
    let mut first_in_line: BTreeMap<(QueueName, DeviceKind), JobId> = BTreeMap::new();
    let mut admission = Admission::default();
    for job in order {
        match refuse(queues, &usage, &mut first_in_line, job, now) {
            Some(why) => admission.refused.push((job.job.clone(), why)),
            None => {
                usage.add(&job.settings.queue, job.gang.device, job.gang.ranks);
                admission.admitted.push(Admitted::new(job.clone()));
            }
        }
    }
    admission
}

fn refuse(
    queues: &Queues,
    usage: &Usage,
    first_in_line: &mut BTreeMap<(QueueName, DeviceKind), JobId>,
    job: &Waiting,
    now: Timestamp,
) -> Option<Explanation> {
    let (queue, kind, need) = (&job.settings.queue, job.gang.device, job.gang.ranks);
    if job.held {
        return Some(Explanation::new(Reason::Held, "held by a user"));
    }
    if !queues.exists(queue) {
        let message = format!("there is no queue {queue}");
        return Some(Explanation::new(Reason::QueueMissing, message));
    }
    if job.not_before > now {
        let left = format_duration_ms(job.not_before.since_ms(now));
        let message = format!("attempt {} starts in {left}", job.attempt);
        return Some(Explanation::new(Reason::BackingOff, message));
    }
    let limit = queues.limit(queue, kind)?;
    let kind_name = kind.as_str();
    if need > limit {
        let message =
            format!("needs {need} {kind_name} devices; queue {queue} may use {limit} at most");
        return Some(Explanation::new(Reason::ExceedsQuota, message));
    }
    if let Some(first) = first_in_line.get(&(queue.clone(), kind)) {
        let message = format!("queue {queue} has {first} first in line for its quota");
        return Some(Explanation::new(Reason::WaitingForQuota, message));
    }
    let used = usage.of(queue, kind);
    if need > limit.saturating_sub(used) {
        first_in_line.insert((queue.clone(), kind), job.job.clone());
        let message = format!(
            "needs {need} {kind_name} devices; queue {queue} uses {used} of {limit}, so {} are left",
            limit.saturating_sub(used)
        );
        return Some(Explanation::new(Reason::WaitingForQuota, message));
    }
    None
}
