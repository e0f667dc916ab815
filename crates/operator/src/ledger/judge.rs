//! Who gets room on a node: gangs by promises, other schedulers' pods by the review of their bindings.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::{Books, LET_THROUGH, PodKey, Whose};
use crate::ask::Ask;
use crate::dra::is_claimable;
use crate::fleet::Held;

/// One pod of a gang that is about to be made.
pub(crate) struct Place {
    pub(crate) pod: PodKey,
    pub(crate) held: Held,
    pub(crate) ask: Arc<Ask>,
}

/// What is said to a binding by another scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may be stored.
    Allowed,
    /// It may not, and why.
    Refused(String),
    /// The pod is not shown yet.
    Unknown,
}

impl Books {
    /// Promises places to a gang: all of them, or none. `turn` is what its plan was made on; `extra` is
    /// what each pod asks that the plan knows nothing of.
    ///
    /// # Errors
    /// What leaves no room, in words.
    pub(crate) fn promise(
        &mut self,
        job: &str,
        places: Vec<Place>,
        extra: &Ask,
        turn: u64,
    ) -> Result<(), String> {
        let devices = places.iter().filter_map(|place| place.held.resource.as_deref());
        for device in devices.filter(|name| is_claimable(name)) {
            if let Some(claim) = self.claims.claim_of(device) {
                return Err(format!("{device} is allocated to the claim {claim}"));
            }
            if self.claims.class_of(device).is_none() {
                return Err(format!("{device} is not published any more"));
            }
        }
        let mut wanted: BTreeMap<&str, (Ask, Ask)> = BTreeMap::new();
        for place in &places {
            let (all, beside) = wanted.entry(&place.held.node).or_default();
            all.add(&place.ask);
            beside.add(extra);
        }
        for (node, (all, beside)) in wanted {
            // What the plan knew of was judged by the core, and checked.
            let is_new = self.taken(node).any(|taken| taken.turn > turn);
            if let Some(short) = self.short(node, if is_new { &all } else { &beside }, None) {
                return Err(short);
            }
            let offers = |name: &str| {
                self.nodes.get(node).is_some_and(|node| Ask::offered(node).names(name))
            };
            if let Some((name, _)) = extra.iter().find(|(name, _)| !offers(name)) {
                return Err(format!("{node} has no {name}"));
            }
        }
        for Place { pod, held, ask } in places {
            let node = held.node.clone();
            self.expect(pod, node, ask, Whose::Gang(job.to_owned(), held));
        }
        Ok(())
    }

    /// Drops what is left of a gang's promise.
    pub(crate) fn drop_promise(&mut self, job: &str) {
        let left = self.expected.iter().filter(
            |(_, expected)| matches!(&expected.whose, Whose::Gang(whose, _) if whose == job),
        );
        for key in left.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.unexpect(&key);
        }
    }

    /// Judges a binding by another scheduler, and enters it when it may be stored.
    ///
    /// A node on which no gang is or is promised anything is none of our business.
    pub(crate) fn review(
        &mut self,
        key: &PodKey,
        uid: Option<&str>,
        node: &str,
        is_dry: bool,
        now: Instant,
    ) -> Verdict {
        self.lapse(now);
        let shown = self.pods.get(key).filter(|pod| uid.is_none_or(|uid| uid == pod.uid));
        let Some(pod) = shown else { return Verdict::Unknown };
        if pod.member.is_some() {
            let why = format!("{} is a pod of a gang, which only the operator binds", key.1);
            return Verdict::Refused(why);
        }
        if pod.node.is_some() {
            // Bound already: the API server says so.
            return Verdict::Allowed;
        }
        let (ask, uid) = (pod.ask.clone(), pod.uid.clone());
        let has_gang = self.taken(node).any(|taken| taken.job.is_some());
        let wanted: BTreeSet<&str> = self.claims.of_pod(&uid).collect();
        let held = self.taken(node).filter_map(|taken| taken.held?.resource);
        if let Some(device) = held.into_iter().find(|device| wanted.contains(device.as_str())) {
            return Verdict::Refused(format!("{device} of {node} is a gang's"));
        }
        if has_gang && let Some(short) = self.short(node, &ask, Some(key)) {
            return Verdict::Refused(short);
        }
        if !is_dry {
            self.expect(key.clone(), node.to_owned(), ask, Whose::Other(uid, now + LET_THROUGH));
        }
        Verdict::Allowed
    }

    /// Says of which resource a node has not enough left. What it does not offer at all is not judged
    /// here, and neither is a node that is not shown.
    fn short(&self, node: &str, ask: &Ask, except: Option<&PodKey>) -> Option<String> {
        let offered = Ask::offered(self.nodes.get(node)?);
        let mut taken = Ask::default();
        for one in self.taken(node).filter(|taken| Some(taken.key) != except) {
            taken.add(one.ask);
        }
        ask.iter().filter(|(name, amount)| *amount > 0 && offered.names(name)).find_map(
            |(name, amount)| {
                let left = offered.get(name).saturating_sub(taken.get(name));
                (amount > left).then(|| {
                    format!(
                        "{} of {node} is promised: {} are left of {}, and {} are asked for",
                        name,
                        whole(left),
                        whole(offered.get(name)),
                        whole(amount)
                    )
                })
            },
        )
    }
}

/// Writes an amount of thousandths as people count.
fn whole(milli: u64) -> f64 {
    milli as f64 / 1000.0
}
