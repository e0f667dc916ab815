//! The pods of one attempt, told apart: who waits, runs, finished, failed, or was lost.

use std::collections::BTreeMap;

use drumline_spec::DeviceKind;
use drumline_types::{Explanation, JobId, Reason};
use k8s_openapi::api::core::v1::Pod;

use crate::dra::is_claimable;
use crate::fleet::occupied;

/// Label: the job's uid.
pub const UID: &str = "drumline.dev/job-uid";
/// Label: the job's id in the decision core.
pub const JOB_ID: &str = "drumline.dev/job-id";
/// Label: the attempt.
pub const ATTEMPT: &str = "drumline.dev/attempt";
/// Label: the rank.
pub const RANK: &str = "drumline.dev/rank";
/// Label: the number of ranks of the attempt.
pub const RANKS: &str = "drumline.dev/ranks";
/// Label: the kind of device that the rank holds.
pub const DEVICE: &str = "drumline.dev/device";
/// Annotation: the extended resource that is its device.
pub const RESOURCE: &str = "drumline.dev/planned-resource";
/// Annotation: the node that the plan gave it.
pub const NODE: &str = "drumline.dev/planned-node";
/// Annotation: which of its node's devices of that resource the plan gave it.
pub const SLOT: &str = "drumline.dev/planned-device";
/// Label: the job's name.
pub const JOB: &str = "drumline.dev/job";
/// Label: the service that the pods of a model and all its replicas serve.
pub const SERVICE: &str = "drumline.dev/service";
/// The scheduler that pods of gangs name.
pub const SCHEDULER: &str = "drumline";

/// Where one member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Created, not bound to a node.
    Unbound,
    /// Bound; its container does not run yet.
    Bound,
    /// Its container runs.
    Running,
    /// Its container ended with exit code 0.
    Succeeded,
    /// Its container ended otherwise, or its node refused it.
    Failed,
}

/// One pod of a gang.
#[derive(Debug, Clone)]
pub struct Member {
    /// The pod's name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The job's uid.
    pub job: String,
    /// The job's id.
    pub job_id: Option<JobId>,
    /// The attempt that it belongs to.
    pub attempt: u32,
    /// Its rank.
    pub rank: u32,
    /// The number of ranks of its attempt; 0: not known.
    pub ranks: u32,
    /// The kind of device that it holds.
    pub device: DeviceKind,
    /// The extended resource that is its device; `None`: the first that is a GPU, or none.
    pub resource: Option<String>,
    /// Which of its node's devices of that resource the plan gave it.
    pub slot: Option<u32>,
    /// Where it stands.
    pub standing: Standing,
    /// The node that it is bound to.
    pub node: Option<String>,
    /// The node whose device it holds now: not once its containers have ended.
    pub holds: Option<String>,
    /// Whether it is ready: running and, where it has a probe, answering.
    pub is_ready: bool,
    /// Whether its deletion was asked for.
    pub is_deleting: bool,
    /// Why its node or an administrator ended it: its `DisruptionTarget` condition.
    pub disrupted: Option<String>,
    /// Whether its node refused it before it ran: there was no room, or no such device.
    pub is_refused: bool,
    /// The exit code of its container.
    pub exit_code: Option<i32>,
    /// What the node says about it.
    pub told: String,
}

impl Member {
    /// Reads a pod; `None` when it is no member of a gang.
    #[must_use]
    pub fn read(pod: &Pod) -> Option<Self> {
        let labels = pod.metadata.labels.as_ref()?;
        let spec = pod.spec.as_ref()?;
        if spec.scheduler_name.as_deref() != Some(SCHEDULER) {
            return None;
        }
        let status = pod.status.as_ref();
        let container = status
            .and_then(|status| status.container_statuses.as_ref())
            .and_then(|all| all.first())
            .and_then(|container| container.state.as_ref());
        let ended = container.and_then(|state| state.terminated.as_ref());
        let standing = match status.and_then(|status| status.phase.as_deref()) {
            Some("Succeeded") => Standing::Succeeded,
            Some("Failed") => Standing::Failed,
            Some("Running") => Standing::Running,
            _ if spec.node_name.is_some() => Standing::Bound,
            _ => Standing::Unbound,
        };
        let waits = container.and_then(|state| state.waiting.as_ref());
        let told = [
            status.and_then(|status| status.reason.clone()),
            status.and_then(|status| status.message.clone()),
            ended.and_then(|ended| ended.reason.clone()),
            ended.and_then(|ended| last_line(ended.message.as_deref()?)),
            waits.and_then(|waits| waits.reason.clone()),
        ];
        let told: Vec<String> = told.into_iter().flatten().filter(|t| !t.is_empty()).collect();
        let conditions = status.and_then(|status| status.conditions.as_ref());
        Some(Self {
            name: pod.metadata.name.clone()?,
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            job: labels.get(UID)?.clone(),
            job_id: labels.get(JOB_ID).and_then(|id| id.parse().ok()),
            attempt: labels.get(ATTEMPT)?.parse().ok()?,
            rank: labels.get(RANK)?.parse().ok()?,
            ranks: labels.get(RANKS).and_then(|text| text.parse().ok()).unwrap_or(0),
            device: match labels.get(DEVICE).map(String::as_str) {
                Some("gpu") => DeviceKind::Gpu,
                _ => DeviceKind::Cpu,
            },
            resource: annotation(pod, RESOURCE).filter(|name| asks_for(pod, name)).cloned(),
            slot: annotation(pod, SLOT).and_then(|text| text.parse().ok()),
            standing,
            node: spec.node_name.clone(),
            holds: occupied(pod).map(str::to_owned),
            is_ready: conditions
                .into_iter()
                .flatten()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True"),
            disrupted: conditions
                .into_iter()
                .flatten()
                .find(|one| one.type_ == "DisruptionTarget" && one.status == "True")
                .map(|one| one.reason.clone().unwrap_or_default()),
            is_deleting: pod.metadata.deletion_timestamp.is_some(),
            is_refused: standing == Standing::Failed
                && status.and_then(|status| status.reason.as_deref()).is_some_and(is_refusal),
            exit_code: ended.map(|ended| ended.exit_code),
            told: told.join(": "),
        })
    }
}

pub(crate) fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a String> {
    pod.metadata.annotations.as_ref()?.get(key)
}

/// Whether a pod asks for a resource. Annotations may be changed by whoever may change pods; what it
/// asks for may not.
fn asks_for(pod: &Pod, resource: &str) -> bool {
    if is_claimable(resource) {
        let claims = pod.spec.as_ref().and_then(|spec| spec.resource_claims.as_ref());
        return claims.is_some_and(|claims| !claims.is_empty());
    }
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let resources = containers.filter_map(|container| container.resources.as_ref());
    resources.filter_map(|all| all.limits.as_ref()).any(|limits| limits.contains_key(resource))
}

/// Whether a pod's reason is that its kubelet did not admit it for want of a resource.
fn is_refusal(reason: &str) -> bool {
    reason == "UnexpectedAdmissionError" || reason.starts_with("OutOf")
}

/// Returns the last line that says something: of a rank that failed, why.
fn last_line(text: &str) -> Option<String> {
    const LENGTH_MAX: usize = 400;
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.chars().take(LENGTH_MAX).collect())
}

/// What a gang as a whole shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gang {
    /// Not every rank is there and bound.
    Partial {
        /// How many are bound.
        bound: u32,
    },
    /// All bound; some do not run yet.
    Starting {
        /// How many run or have finished.
        running: u32,
    },
    /// Every rank runs or has finished with success, and not all have finished.
    Running,
    /// Every rank finished with success.
    Succeeded,
    /// A rank failed or was lost.
    Broken(Explanation),
}

/// Judges the members of the present attempt.
///
/// `is_lost` says whether a node is gone or silent. A member that finished is no missing member.
#[must_use]
pub fn judge(ranks: u32, members: &[&Member], is_lost: &dyn Fn(&str) -> bool) -> Gang {
    let by_rank: BTreeMap<u32, &Member> = members.iter().map(|m| (m.rank, *m)).collect();
    for member in by_rank.values() {
        if let Some(why) = broken(member, is_lost) {
            return Gang::Broken(why);
        }
    }
    let count = |is: &dyn Fn(&Member) -> bool| by_rank.values().filter(|m| is(m)).count() as u32;
    let bound = count(&|member| member.standing != Standing::Unbound);
    let succeeded = count(&|member| member.standing == Standing::Succeeded);
    let running =
        count(&|member| matches!(member.standing, Standing::Running | Standing::Succeeded));
    if bound < ranks {
        Gang::Partial { bound }
    } else if succeeded == ranks {
        Gang::Succeeded
    } else if running == ranks {
        Gang::Running
    } else {
        Gang::Starting { running }
    }
}

fn broken(member: &Member, is_lost: &dyn Fn(&str) -> bool) -> Option<Explanation> {
    let Member { rank, .. } = member;
    if member.standing == Standing::Succeeded {
        return None;
    }
    let node = member.node.as_deref().unwrap_or("no node");
    let is_lost_node = member.node.as_deref().is_some_and(is_lost);
    if let Some(how) = member.disrupted.as_ref().filter(|_| !is_lost_node) {
        let message = format!("the pod of rank {rank} on {node} was evicted ({how})");
        return Some(Explanation::new(Reason::Moved, message));
    }
    if member.is_refused {
        // The node has no room that its API object says it has: no fault of the job.
        let message = format!("{node} refused the pod of rank {rank} ({})", member.told);
        return Some(Explanation::new(Reason::Moved, message));
    }
    if member.standing == Standing::Failed {
        let (reason, how) = match member.exit_code {
            Some(code) if code > 128 => {
                (Reason::RankKilled, format!("was ended by signal {}", code - 128))
            }
            Some(code) => (Reason::RankFailed, format!("exited with code {code}")),
            None => (Reason::RankKilled, "was ended by its node".to_owned()),
        };
        let told =
            if member.told.is_empty() { String::new() } else { format!(" ({})", member.told) };
        return Some(Explanation::new(reason, format!("rank {rank} on {node} {how}{told}")));
    }
    if is_lost_node {
        let message = format!("node {node} with rank {rank} is gone or not ready");
        return Some(Explanation::new(Reason::NodeLost, message));
    }
    member.is_deleting.then(|| {
        let message = format!("the pod of rank {rank} on {node} was deleted or evicted");
        Explanation::new(Reason::RankKilled, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(rank: u32, standing: Standing) -> Member {
        Member {
            name: format!("j-c1-{rank}"),
            uid: String::new(),
            job: "u".to_owned(),
            job_id: None,
            attempt: 1,
            rank,
            ranks: 2,
            device: DeviceKind::Cpu,
            resource: None,
            slot: None,
            standing,
            node: (standing != Standing::Unbound).then(|| "a".to_owned()),
            holds: None,
            is_ready: false,
            is_deleting: false,
            disrupted: None,
            is_refused: false,
            exit_code: None,
            told: String::new(),
        }
    }

    fn judged(members: &[Member], is_lost: bool) -> Gang {
        let members: Vec<&Member> = members.iter().collect();
        judge(2, &members, &|_| is_lost)
    }

    #[test]
    fn finished_failed_and_missing_members_are_told_apart() {
        use Standing::{Bound, Failed, Running, Succeeded, Unbound};
        let pair = |a, b| [member(0, a), member(1, b)];
        assert_eq!(judged(&pair(Bound, Unbound), false), Gang::Partial { bound: 1 });
        assert_eq!(judged(&[member(0, Running)], false), Gang::Partial { bound: 1 });
        assert_eq!(judged(&pair(Running, Bound), false), Gang::Starting { running: 1 });
        assert_eq!(judged(&pair(Running, Succeeded), false), Gang::Running);
        assert_eq!(judged(&pair(Succeeded, Succeeded), true), Gang::Succeeded);
        let Gang::Broken(why) = judged(&pair(Running, Failed), false) else { panic!() };
        assert_eq!(why.reason, Reason::RankKilled);
        let refused = Member { is_refused: true, ..member(1, Failed) };
        let Gang::Broken(why) = judged(&[member(0, Running), refused], false) else { panic!() };
        assert_eq!(why.reason, Reason::Moved);
        assert!(is_refusal("OutOfnvidia.com/mig-1g.10gb"));
        assert!(is_refusal("OutOfnvidia.com/gpu") && !is_refusal("Evicted"));
        let Gang::Broken(why) = judged(&pair(Running, Succeeded), true) else { panic!() };
        assert_eq!(why.reason, Reason::NodeLost);
    }
}
