//! Gangs that are moved so that one that is scattered otherwise fits: only if each of them has a
//! place to go to, and less is lost than won.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumline_placement::EvictionCause;
use drumline_queue::QueueId;
use drumline_spec::Gang;
use drumline_types::{DeviceId, JobId, Reason, Timestamp};

use crate::cycle::{Refusal, Work};
use crate::gaps::{self, Gap, Need, Site};
use crate::holds::Keep;
use crate::job::milli;
use crate::preempt::{NOMINATED_MS, Victim, disruptable, holders};
use crate::scheduler::{Scheduler, Slot};
use crate::site;
use crate::vain::{FIND_STEPS, LOOKS_A_STEP, Search};

/// Gangs that are moved for one, at most.
const MOVED_MAX: usize = 64;

/// A wait of unknown length is thought to be so long, in milliseconds.
const UNKNOWN_MS: u64 = 3_600_000;

/// Gaps that are closed beyond those that lack by the counts, before a domain is given up: they
/// tell devices, and a place may need more than that.
const TRIES_MAX: usize = 8;

/// A gap, and who moves to close it.
struct Closed {
    loss: u128,
    key: u64,
    victims: Vec<Victim>,
}

/// Where a gang goes, and where those go that make room.
struct Move {
    devices: Vec<DeviceId>,
    moved: Vec<(Victim, Vec<DeviceId>)>,
}

impl Scheduler {
    /// Moves gangs so that a job fits for which enough devices are free. Returns whether it did.
    pub(crate) fn consolidate(
        &mut self,
        slot: Slot,
        gang: &Gang,
        leaf: QueueId,
        refusal: &Refusal,
        work: &mut Work,
    ) -> bool {
        if !self.options.consolidation || refusal.why.reason != Reason::TopologyDoesNotFit {
            return false;
        }
        let Some(choice) = self.choices(leaf, gang).into_iter().next() else { return false };
        let claim = vec![(choice.charged, milli(gang, gang.ranks))];
        if self.tree.check(leaf, &claim).is_err() {
            return false;
        }
        let asked = self.asked(Search::Moves, slot, gang, None, work.now);
        if let Some(until) = self.searches.barred(&asked) {
            work.wake(until);
            return false;
        }
        let before = self.searches.steps;
        if let Some(found) = self.best_move(slot, gang, work) {
            self.carry_out_move(slot, found, work);
            return true;
        }
        self.searches.failed(asked, before);
        false
    }

    /// Returns the move that loses least, if it is worth what it costs.
    fn best_move(&mut self, slot: Slot, gang: &Gang, work: &Work) -> Option<Move> {
        let job = self.job(slot);
        let (id, priority) = (job.id.clone(), job.priority());
        let need = Need::of(gang, self.fleet.topology());
        let mut best: Option<(u128, Move)> = None;
        for level in need.levels(self.fleet.topology()) {
            let (sites, looked) = {
                let mut trial = self.fleet.trial();
                trial.unreserve(&id);
                gaps::sites(trial.snapshot(), gang, &need, &id, level)
            };
            self.searches.steps += looked / LOOKS_A_STEP;
            for site in sites {
                let mut closed: Vec<Closed> = site
                    .gaps
                    .iter()
                    .filter_map(|gap| self.close(gap, priority, gang, work.now))
                    .collect();
                closed.sort_by_key(|closed| (closed.loss, closed.key));
                let Some(found) = self.try_move(slot, gang, &site, &closed) else { continue };
                let loss = found.moved.iter().map(|(victim, _)| victim.whole).sum();
                if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                    best = Some((loss, found));
                }
            }
            if best.is_some() {
                break;
            }
        }
        let (loss, found) = best?;
        // Device-time that the job would wait otherwise, against what those who move lose.
        let start = match self.holds.of(&id).map(|hold| hold.keep) {
            Some(Keep::Reserved { start }) => Some(start),
            _ => self.earliest(slot, gang, work.now).map(|(_, start)| start),
        };
        let wait_ms = start.map_or(UNKNOWN_MS, |start| start.since_ms(work.now));
        let won = u128::from(gang.ranks) * u128::from(wait_ms);
        (!found.moved.is_empty() && won > loss).then_some(found)
    }

    /// Chooses who would move to close a gap: those who lose least. `None`: those who may be moved
    /// do not suffice.
    fn close(&self, gap: &Gap, priority: i32, gang: &Gang, now: Timestamp) -> Option<Closed> {
        let mut judged: BTreeMap<&JobId, Option<Victim>> = BTreeMap::new();
        for holder in gap.held.iter().flatten() {
            judged.entry(holder).or_insert_with(|| self.movable(holder, priority, gang, now));
        }
        let mut victims: Vec<Victim> = judged.into_values().flatten().collect();
        victims.sort_by(|a, b| (a.loss, &a.job).cmp(&(b.loss, &b.job)));
        let places: BTreeMap<&JobId, usize> =
            victims.iter().enumerate().map(|(at, victim)| (&*victim.job, at)).collect();
        // Per device, who has to leave it; without those that somebody keeps who does not move.
        let held: Vec<Vec<usize>> = gap
            .held
            .iter()
            .filter_map(|holders| holders.iter().map(|job| places.get(job).copied()).collect())
            .collect();
        let mut leaves = vec![false; victims.len()];
        let enough = |leaves: &[bool]| {
            let free = |holders: &&Vec<usize>| holders.iter().all(|&at| leaves[at]);
            held.iter().filter(free).count() as u64 >= gap.lack
        };
        let mut last = (0..victims.len().min(MOVED_MAX)).find(|&at| {
            leaves[at] = true;
            enough(&leaves)
        })?;
        // Whoever costs most stays, if the others will do.
        while last > 0 {
            last -= 1;
            leaves[last] = false;
            leaves[last] = !enough(&leaves);
        }
        let victims: Vec<Victim> =
            victims.into_iter().zip(leaves).filter(|(_, leaves)| *leaves).map(|of| of.0).collect();
        let loss = victims.iter().map(|victim| victim.whole).sum();
        Some(Closed { loss, key: gap.key, victims })
    }

    /// Returns what a gang would lose by a move, if it may be moved for one of this priority:
    /// nobody who goes before it, and nobody bigger.
    fn movable(&self, id: &JobId, priority: i32, gang: &Gang, now: Timestamp) -> Option<Victim> {
        let job = self.known(id)?;
        let placed = job.placed()?;
        let queue = self.tree.find(&job.request.settings.queue)?;
        let alike = job.request.gang.device == gang.device && placed.ranks <= gang.ranks;
        let may = alike
            && job.priority() <= priority
            && placed.cycle != self.cycles
            && disruptable(job, placed, now).is_ok();
        may.then(|| self.victim(job, placed, queue, EvictionCause::Consolidated, now))
    }

    /// Tries to close enough gaps of a domain, and to find a place elsewhere for everyone who leaves
    /// them.
    fn try_move(
        &mut self,
        slot: Slot,
        gang: &Gang,
        near: &Site,
        closed: &[Closed],
    ) -> Option<Move> {
        let missing = usize::try_from(near.missing).unwrap_or(usize::MAX);
        if closed.len() < missing {
            return None;
        }
        let job = self.jobs[slot.0].as_ref()?;
        let (id, split) = (job.id.clone(), job.split(gang.ranks));
        let mut bounds = self.bounds(Some(gang.ranks));
        bounds.within = Some(near.domain);
        let anywhere = self.bounds(None);
        let mut gone: BTreeMap<Arc<JobId>, &Victim> = BTreeMap::new();
        let devices = {
            let mut trial = self.fleet.trial();
            trial.unreserve(&id);
            let mut found = None;
            let mut tries = 0;
            for (at, gap) in closed.iter().enumerate() {
                for victim in &gap.victims {
                    if gone.insert(victim.job.clone(), victim).is_none() {
                        trial.evict(&victim.job);
                        self.searches.steps += 1;
                    }
                }
                if gone.len() > MOVED_MAX || tries == TRIES_MAX {
                    break;
                }
                if at + 1 < missing {
                    continue;
                }
                tries += 1;
                self.searches.steps += FIND_STEPS;
                if let Some(placed) = site::fit(trial.snapshot(), gang, split, &bounds) {
                    found = Some(placed.devices);
                    break;
                }
            }
            found?
        };
        let holders = holders(&self.fleet, &devices);
        let mut leaving: Vec<&Victim> =
            gone.into_values().filter(|victim| holders.contains(&victim.job)).collect();
        // The biggest first: it has the fewest places to go to.
        leaving.sort_by_key(|victim| std::cmp::Reverse(victim.devices));
        let jobs: Vec<(&Victim, Gang, drumline_spec::Parallelism, drumline_types::Attempt)> =
            leaving
                .into_iter()
                .filter_map(|victim| {
                    let job = self.known(&victim.job)?;
                    let gang =
                        Gang { ranks: victim.devices, elastic: None, ..job.request.gang.clone() };
                    Some((victim, gang, job.split(victim.devices), job.attempt))
                })
                .collect();
        let mut trial = self.fleet.trial();
        trial.unreserve(&id);
        for (victim, ..) in &jobs {
            trial.evict(&victim.job);
        }
        trial.reserve(&id, devices.clone()).ok()?;
        let mut moved = Vec::new();
        for (victim, gang, split, attempt) in &jobs {
            self.searches.steps += 1 + FIND_STEPS;
            let placed = site::fit(trial.snapshot(), gang, *split, &anywhere)?;
            trial.hold(placed.commitment(&victim.job, *attempt)).ok()?;
            moved.push(((*victim).clone(), placed.devices));
        }
        Some(Move { devices, moved })
    }

    fn carry_out_move(&mut self, slot: Slot, found: Move, work: &mut Work) {
        let id = self.job(slot).id.clone();
        let until = work.now.plus_ms(NOMINATED_MS);
        work.wake(until);
        for (victim, devices) in found.moved {
            let message = format!("moves to other devices so that {id} fits");
            let beneficiary = Some(JobId::clone(&id));
            let cause = EvictionCause::Consolidated;
            self.evict(&victim.job, cause, beneficiary, None, message, work);
            self.keep(&victim.job, devices, Keep::Nominated { until });
        }
        self.keep(&id, found.devices, Keep::Nominated { until });
    }
}
