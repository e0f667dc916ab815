//! Costly searches that found nothing: which of them need not be made again, and for how long.
//!
//! A search that fails for a gang fails for a bigger one, and for one of lower priority, in the
//! same queue; a search for moves, whatever the queue. Within a cycle none of those is made again;
//! later ones wait in proportion to what the search cost, so that searches in vain never take more
//! than a small part of the time. Cost is counted in steps, not measured, so that the same changes
//! give the same decisions.

use std::collections::BTreeMap;

use drumline_spec::Gang;
use drumline_types::{QueueName, Timestamp};
use serde::{Deserialize, Serialize};

/// Steps that a cycle spends on searches; once they are spent, no further one begins.
pub(crate) const STEPS_MAX: u64 = 8_192;

/// A search that waits because this cycle has spent its steps is made so much later, in
/// milliseconds, unless something is freed before.
pub(crate) const PUT_OFF_MS: u64 = 1_000;

/// A try to place a gang costs as much as so many evictions in a trial.
pub(crate) const FIND_STEPS: u64 = 16;

/// Gangs that are looked at for as much as one eviction in a trial costs.
pub(crate) const LOOKS_A_STEP: u64 = 8;

/// Searches up to this cost rest until the next cycle only.
const FREE_STEPS: u64 = 512;

/// Rest for each step of a search in vain, in milliseconds, and the longest rest.
const REST_MS: (u64, u64) = (2, 60_000);

/// The same for a search for moves: nobody has a claim to one.
const REST_OF_MOVES_MS: (u64, u64) = (16, 300_000);

/// What was searched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Search {
    /// Gangs that would make room by leaving.
    Victims,
    /// Gangs that would make room by moving.
    Moves,
    /// The place where running gangs end first.
    Reservation,
}

/// A search that found nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vain {
    /// For what.
    pub search: Search,
    /// The queue of the job that it was for.
    pub queue: QueueName,
    /// The priority of that job.
    pub priority: i32,
    /// What it asked for.
    pub gang: Gang,
    /// The queue whose quota was short, if that was what it lacked.
    pub short: Option<QueueName>,
    /// Whether devices were kept for that job, which others cannot count on.
    pub kept: bool,
    /// Reservations that gave way to that job, which others may have to respect.
    #[serde(default)]
    pub yielding: u64,
    /// It is not made again before this moment.
    pub until: Timestamp,
}

impl Vain {
    /// Returns whether another search would fail because this one did.
    fn covers(&self, other: &Self) -> bool {
        self.search == other.search
            && (self.queue == other.queue || self.search == Search::Moves)
            && self.priority >= other.priority
            && (self.kept || !other.kept)
            && self.yielding >= other.yielding
            && (self.short.is_none() || self.short == other.short)
            && at_least(&other.gang, &self.gang)
    }
}

/// Returns whether a gang fits nowhere where another does not: it is the same, or only bigger.
fn at_least(gang: &Gang, other: &Gang) -> bool {
    gang == other
        || (other.elastic.is_none()
            && gang.ranks > other.ranks
            && gang.node_group == other.node_group
            && Gang { ranks: gang.ranks, ..other.clone() } == *gang)
}

/// A claim to what others hold that costs them more than it wins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Priced {
    /// The queue of the job that has it.
    pub queue: QueueName,
    /// The priority of that job.
    pub priority: i32,
    /// What it asks for.
    pub gang: Gang,
    /// From this moment on it takes at any price.
    pub enforced: Timestamp,
    /// It is not priced again before this moment.
    pub until: Timestamp,
}

/// Every search in vain that still keeps others from being made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Searches {
    vain: BTreeMap<QueueName, Vec<Vain>>,
    priced: BTreeMap<QueueName, Vec<Priced>>,
    /// Gangs that this cycle found no place for even where those may run that end by then.
    kept_out: Vec<(Gang, Timestamp)>,
    /// Steps that this cycle has spent.
    pub(crate) steps: u64,
}

impl Searches {
    /// Begins a cycle.
    pub(crate) fn begin(&mut self, now: Timestamp) {
        self.steps = 0;
        self.kept_out.clear();
        self.vain.retain(|_, of_queue| {
            of_queue.retain(|vain| vain.until > now);
            !of_queue.is_empty()
        });
        self.priced.retain(|_, of_queue| {
            of_queue.retain(|claim| claim.until > now);
            !of_queue.is_empty()
        });
    }

    /// Returns when a search may be made if it may not be made now.
    pub(crate) fn barred(&self, asked: &Vain) -> Option<Timestamp> {
        let of_queue = || self.vain.get(&asked.queue)?.iter().find(|vain| vain.covers(asked));
        // Who may be moved for a gang does not depend on its queue.
        let of_any = || self.vain.values().flatten().find(|vain| vain.covers(asked));
        let found = if asked.search == Search::Moves { of_any() } else { of_queue() };
        if let Some(vain) = found {
            return Some(vain.until);
        }
        (self.steps >= STEPS_MAX).then(|| asked.until.plus_ms(PUT_OFF_MS))
    }

    /// Takes note of a search in vain that began when so many steps had been spent. Its `until` is
    /// the present moment.
    pub(crate) fn failed(&mut self, mut vain: Vain, before: u64) {
        let steps = self.steps.saturating_sub(before);
        if steps > FREE_STEPS {
            let (a_step, most) = match vain.search {
                Search::Moves => REST_OF_MOVES_MS,
                Search::Victims | Search::Reservation => REST_MS,
            };
            vain.until = vain.until.plus_ms(steps.saturating_mul(a_step).min(most));
        }
        let list = self.vain.entry(vain.queue.clone()).or_default();
        list.retain(|old| !(vain.covers(old) && vain.until >= old.until));
        list.push(vain);
    }

    /// Returns when a claim may be priced again if it may not be now: one like it, of a job that
    /// has waited as long, was found to cost more than it wins.
    pub(crate) fn priced(&self, claim: &Priced) -> Option<Timestamp> {
        let of_queue = self.priced.get(&claim.queue)?;
        let found = of_queue.iter().find(|old| {
            old.gang == claim.gang
                && old.priority >= claim.priority
                && old.enforced <= claim.enforced
        });
        found.map(|old| old.until)
    }

    /// Takes note of a claim that costs more than it wins.
    pub(crate) fn costs_too_much(&mut self, claim: Priced) {
        self.priced.entry(claim.queue.clone()).or_default().push(claim);
    }

    /// Takes note that a gang that ends by `bound` fits nowhere, what is reserved for later included.
    pub(crate) fn kept_out(&mut self, gang: &Gang, bound: Timestamp) {
        self.kept_out.push((gang.clone(), bound));
    }

    /// Returns whether a gang that ends by `bound` fits nowhere because another did not: within a
    /// cycle less and less is free.
    pub(crate) fn is_kept_out(&self, gang: &Gang, bound: Timestamp) -> bool {
        self.kept_out.iter().any(|(of, by)| *by <= bound && at_least(gang, of))
    }

    pub(crate) fn clear(&mut self) {
        self.vain.clear();
        self.priced.clear();
    }

    /// Returns those that outlast the last cycle.
    pub(crate) fn saved(&self, now: Timestamp) -> (Vec<Vain>, Vec<Priced>) {
        let vain = self.vain.values().flatten().filter(|vain| vain.until > now);
        let priced = self.priced.values().flatten().filter(|claim| claim.until > now);
        (vain.cloned().collect(), priced.cloned().collect())
    }

    pub(crate) fn remember(&mut self, vain: Vec<Vain>, priced: Vec<Priced>) {
        for vain in vain {
            self.vain.entry(vain.queue.clone()).or_default().push(vain);
        }
        for claim in priced {
            self.priced.entry(claim.queue.clone()).or_default().push(claim);
        }
    }
}
