//! Gangs that are moved so that one that is scattered otherwise fits: only if each of them has a
//! place to go to, and less is lost than won.

use drumline_cluster::DomainAt;
use drumline_placement::EvictionCause;
use drumline_queue::QueueId;
use drumline_spec::Gang;
use drumline_types::{DeviceId, JobId, Reason, Timestamp};

use crate::cycle::{Refusal, Work};
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
        let mut movable = self.movable(self.job(slot).priority(), gang, work.now);
        self.searches.steps += movable.len() as u64 / LOOKS_A_STEP;
        movable.sort_by(|a, b| (a.loss, &a.job).cmp(&(b.loss, &b.job)));
        let there = self.places(&movable);
        let devices: u64 = movable.iter().map(|victim| u64::from(victim.devices)).sum();
        self.searches.steps += devices / LOOKS_A_STEP;
        let id = self.job(slot).id.clone();
        let kept = self.holds.unused(&id, &self.fleet);
        let mut best: Option<(u128, Move)> = None;
        for level in self.fleet.topology().levels_inside_out() {
            for (domain, here) in self.domains(gang, &movable, &there, level, kept) {
                let here: Vec<Victim> = here.into_iter().map(|at| movable[at].clone()).collect();
                let Some(found) = self.try_move(slot, gang, domain, &here) else { continue };
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
        let start = self.earliest(slot, gang, work.now).map(|(_, start)| start);
        let wait_ms = start.map_or(UNKNOWN_MS, |start| start.since_ms(work.now));
        let won = u128::from(gang.ranks) * u128::from(wait_ms);
        (!found.moved.is_empty() && won > loss).then_some(found)
    }

    /// Returns the gangs that may be moved for one of this priority: nobody who goes before it.
    fn movable(&self, priority: i32, gang: &Gang, now: Timestamp) -> Vec<Victim> {
        let mut movable = Vec::new();
        for (queue, jobs) in &self.placed {
            let Some(queue) = self.tree.find(queue) else { continue };
            for (_, id) in jobs.iter().take_while(|(of, _)| *of <= priority) {
                let Some(job) = self.known(id) else { continue };
                let Some(placed) = job.placed() else { continue };
                let alike = job.request.gang.device == gang.device && placed.ranks <= gang.ranks;
                if alike && placed.cycle != self.cycles && disruptable(job, placed, now).is_ok() {
                    let cause = EvictionCause::Consolidated;
                    movable.push(self.victim(job, placed, queue, cause, now));
                }
            }
        }
        movable
    }

    /// Tries to empty enough of a domain, and to find a place elsewhere for everyone who leaves it.
    fn try_move(
        &mut self,
        slot: Slot,
        gang: &Gang,
        domain: DomainAt,
        here: &[Victim],
    ) -> Option<Move> {
        let job = self.jobs[slot.0].as_ref()?;
        let (id, split) = (job.id.clone(), job.split(gang.ranks));
        let mut bounds = self.bounds(Some(gang.ranks));
        bounds.within = Some(domain);
        let anywhere = self.bounds(None);
        let devices = {
            let mut trial = self.fleet.trial();
            trial.unreserve(&id);
            let mut found = None;
            for victim in here.iter().take(MOVED_MAX) {
                trial.evict(&victim.job);
                self.searches.steps += 1 + FIND_STEPS;
                if let Some(placed) = site::fit(trial.snapshot(), gang, split, &bounds) {
                    found = Some(placed.devices);
                    break;
                }
            }
            found?
        };
        let holders = holders(&self.fleet, &devices);
        let mut leaving: Vec<&Victim> =
            here.iter().filter(|victim| holders.contains(&victim.job)).collect();
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
