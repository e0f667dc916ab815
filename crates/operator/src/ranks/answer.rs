//! What the core answers to ranks, and tells to gateways.

use std::collections::BTreeMap;

use drumline_types::Timestamp;
use drumline_wire::rank_host::RankCall;
use drumline_wire::v1;
use kube::runtime::reflector::ObjectRef;
use tonic::Status;

use crate::core::Core;
use crate::figures::Figures;
use crate::gang::Member;
use crate::job::Job;
use crate::ranks::admit::Admitted;
use crate::ranks::services::view;
use crate::ranks::worlds::GangRef;

impl Core {
    /// Answers a rank. Returns whether everything should be looked at now.
    pub(crate) fn rank_call(&mut self, admitted: Admitted, now: Timestamp) -> bool {
        let Admitted { pod, call } = admitted;
        let known = self.stores.pods.get(&ObjectRef::new(&pod.name).within(&pod.namespace));
        let member = known.and_then(|known| Member::read(&known));
        // The watch may be behind: whoever asks too early asks again.
        let Some(member) = member.filter(|member| member.uid == pod.uid) else {
            call.refuse(Status::unavailable("the pod is not known yet"));
            return false;
        };
        let of = GangRef { job: &member.job, attempt: member.attempt, ranks: member.ranks };
        let (job, attempt, rank) = match &call {
            RankCall::Join { join, .. } => (&join.job, join.attempt, join.rank),
            RankCall::Report { report, .. } => (&report.job, report.attempt, report.rank),
        };
        let is_itself = member.job_id.as_ref().is_some_and(|id| id.as_str() == job)
            && attempt == member.attempt
            && rank == member.rank;
        if !is_itself {
            call.refuse(Status::permission_denied("the pod is another rank than it says"));
            return false;
        }
        match call {
            RankCall::Join { join, reply, .. } => {
                let secret = self.keys.secret(&member.job, member.attempt);
                self.worlds.join(of, join, secret.expose(), reply)
            }
            RankCall::Report { report, reply, .. } => {
                let (answer, is_news) = match self.worlds.report(of, &report, now.0) {
                    Ok((command, is_news)) => (Ok(command), is_news),
                    Err(status) => (Err(status), false),
                };
                let _ = reply.send(answer);
                is_news
            }
        }
    }

    /// Tells gateways where models are served, and readers of metrics how jobs do. Returns whether any
    /// job's ranks tell figures.
    pub(crate) fn publish(&self, jobs: &BTreeMap<String, Job>, now: Timestamp) -> bool {
        let figures: Vec<Figures> =
            jobs.values().filter_map(|job| Figures::of(job, &self.worlds, now.0)).collect();
        let some = !figures.is_empty();
        self.figures.send_replace(figures);
        let services: Vec<v1::ServiceView> = jobs
            .values()
            .filter_map(|job| {
                let told = self.worlds.told(&job.uid, job.status.attempt);
                view(job, told, &self.keys, self.replicas.drains(&job.uid), now.0)
            })
            .collect();
        self.board.send_if_modified(|board| {
            let is_new = board.as_ref() != Some(&services);
            if is_new {
                *board = Some(services);
            }
            is_new
        });
        some
    }
}
