//! What drivers' devices ask of the core beside placing: claims that outlive their pods are deleted, and
//! gangs leave devices whose taints end what is on them.

use std::collections::BTreeMap;
use std::time::Instant;

use drumline_types::{Explanation, Reason};

use crate::core::{Core, Done, REST};
use crate::fleet::NodeNow;
use crate::job::Job;
use crate::launch::LaunchError;
use crate::wake::Wake;

impl Core {
    /// Deletes claims whose pods are gone or have ended: until then their devices are nobody else's. The
    /// pods of a gang that is being launched may not be shown yet.
    pub(crate) fn sweep_claims(&mut self, wake: &mut Wake) {
        if !self.writer.has_claims {
            return;
        }
        let dead = self.stores.ledger.open().dead_claims();
        self.sweeping.retain(|uid, _| dead.iter().any(|claim| claim.uid == *uid));
        for claim in dead {
            if self.promised.contains_key(&claim.job) {
                continue;
            }
            match self.sweeping.get(&claim.uid) {
                Some(None) => continue,
                Some(Some(until)) if *until > Instant::now() => {
                    wake.at(*until);
                    continue;
                }
                _ => {}
            }
            self.sweeping.insert(claim.uid.clone(), None);
            self.spawn(claim, move |writer, claim| async move {
                let answer = writer.sweep_claim(&claim).await;
                Done::Swept { uid: claim.uid, answer }
            });
        }
    }

    /// A claim was deleted, or its pod is there after all, or the API server did not answer: when the
    /// watches do not show that it is gone, it is looked at again.
    pub(crate) fn was_swept(&mut self, uid: String, answer: Result<bool, LaunchError>) {
        if let Err(error) = answer {
            tracing::warn!(claim = %uid, %error, "a claim could not be deleted yet");
        }
        self.sweeping.insert(uid, Some(Instant::now() + REST));
    }

    /// Takes in which gangs are on devices of a node whose taints end them.
    pub(crate) fn see_taints(&mut self, now: &NodeNow) {
        let mut ended = Vec::new();
        for device in now.published.iter().filter(|device| device.evicts) {
            let theirs = now.held.iter().filter(|held| held.resource.as_ref() == Some(&device.id));
            for held in theirs {
                let taint = device.taint.as_deref().unwrap_or("tainted");
                let why = format!(
                    "{} on {}, the device of rank {}, is {taint}",
                    device.id, now.name, held.rank
                );
                ended.push((held.job.clone(), held.attempt, why));
            }
        }
        if ended.is_empty() {
            self.ended_by_taints.remove(&now.name);
        } else {
            self.ended_by_taints.insert(now.name.clone(), ended);
        }
    }

    /// Asks the gangs to leave that taints of devices end.
    pub(crate) fn heed_taints(&mut self, jobs: &BTreeMap<String, Job>) {
        for (id, attempt, why) in self.ended_by_taints.values().flatten() {
            let Some(job) = jobs.values().find(|job| job.id == *id) else { continue };
            let why = Explanation::new(Reason::Moved, why.clone());
            self.leaving.entry(job.uid.clone()).or_insert((attempt.0, why));
        }
    }
}
