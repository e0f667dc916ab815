//! Devices taken from running gangs for one that has the better claim: who may be asked to leave,
//! who loses least, and whether the claimant surely fits afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumline_cluster::{DomainAt, Snapshot};
use drumline_placement::{Eviction, EvictionCause, Placed as Found};
use drumline_queue::{Charge, QueueId, Short};
use drumline_spec::{Gang, queue::Reclaim};
use drumline_types::{DeviceId, JobId, QueueName, Timestamp, format_duration_ms};

use crate::cycle::{Refusal, Work};
use crate::holds::Keep;
use crate::job::{Job, Placed, milli};
use crate::saved::Leaving;
use crate::scheduler::{Scheduler, Slot};
use crate::site;
use crate::vain::{FIND_STEPS, LOOKS_A_STEP, Search, Vain};

/// Devices are held so long for a job whose victims do not leave, in milliseconds.
pub(crate) const NOMINATED_MS: u64 = 15 * 60_000;

/// Domains of one level in which victims are sought, the cheapest first.
const DOMAINS_MAX: usize = 4;

/// Disruptions that are remembered of one job.
const REMEMBERED_MAX: usize = 64;

/// A claim that was found to cost too much is priced anew after so long, in milliseconds.
const PRICED_MS: u64 = 60_000;

/// Victims that are tried to be spared one by one.
const SPARED_MAX: usize = 16;

/// A gang that may be asked to leave.
#[derive(Debug, Clone)]
pub(crate) struct Victim {
    pub(crate) job: Arc<JobId>,
    pub(crate) queue: QueueId,
    charge: Arc<Charge>,
    cause: EvictionCause,
    /// What decides who goes first: band, loss per device in milliseconds, priority, and of equals
    /// who started last.
    pub(crate) loss: (i32, u64, i32, std::cmp::Reverse<Timestamp>),
    /// The whole loss, in device-milliseconds.
    pub(crate) whole: u128,
    pub(crate) devices: u32,
    /// The size that it could be shrunk to.
    least: Option<u32>,
}

impl Victim {
    /// Returns what it gives back when it keeps so many devices.
    fn freed(&self, kept: u32) -> Charge {
        let devices = u64::from(self.devices.max(1));
        let freed = u64::from(self.devices.saturating_sub(kept));
        self.charge.iter().map(|&(model, amount)| (model, amount * freed / devices)).collect()
    }
}

/// A job that asks for devices of others.
#[derive(Clone, Copy)]
struct Claimant<'a> {
    slot: Slot,
    gang: &'a Gang,
    leaf: QueueId,
    claim: &'a Charge,
    /// Waiting jobs whose reservations it need not respect.
    yielding: &'a [JobId],
}

/// What taking devices would come to.
struct Outcome {
    devices: Vec<DeviceId>,
    /// Victims, each with its next size if it only shrinks.
    victims: Vec<(Victim, Option<u32>)>,
    loss: u128,
    /// Whether it counts on what is reserved for others.
    yields: bool,
}

impl Scheduler {
    /// Asks gangs to leave, or to shrink, so that a job fits; keeps what they free for it, and what
    /// was reserved for borrowers who give way to it. Returns
    /// whether it did, and else when another look may help although nothing happens.
    pub(crate) fn preempt(
        &mut self,
        slot: Slot,
        gang: &Gang,
        leaf: QueueId,
        refusal: &Refusal,
        work: &mut Work,
    ) -> Result<(), Timestamp> {
        let mut again = Timestamp(u64::MAX);
        let claim: Charge = match self.choices(leaf, gang).first() {
            Some(choice) => vec![(choice.charged, milli(gang, gang.ranks))],
            None => return Err(again),
        };
        let mut asked = self.asked(Search::Victims, slot, gang, refusal.short.as_ref(), work.now);
        let mut price = self.priced(slot, gang);
        let yielding = if price.enforced <= work.now && self.holds.reserved() > 0 {
            self.giving_way(slot, leaf, gang)
        } else {
            Vec::new()
        };
        asked.yielding = yielding.len() as u64;
        let barred = self.searches.barred(&asked).or_else(|| self.searches.priced(&price));
        if let Some(until) = barred {
            return Err(until.max(work.now.plus_ms(1)));
        }
        let before = self.searches.steps;
        // Who has borrowed is judged by what is held, not by what is kept for later.
        let all: Vec<JobId> = self.holds.iter().map(|(job, _)| job.clone()).collect();
        let counted: Vec<JobId> = all.into_iter().filter(|job| self.suppose_without(job)).collect();
        let mut victims = self.victims(slot, gang, leaf, &claim, refusal, &mut again, work.now);
        victims.sort_by(|a, b| (a.loss, &a.job).cmp(&(b.loss, &b.job)));
        self.searches.steps += victims.len() as u64 / LOOKS_A_STEP;
        // What is reserved for borrowers is taken together with victims only where these alone will
        // not do.
        let mut outcome = None;
        if !victims.is_empty() {
            let alone = Claimant { slot, gang, leaf, claim: &claim, yielding: &[] };
            outcome = self.cheapest(alone, &victims);
            if outcome.is_none() && !yielding.is_empty() {
                outcome = self.cheapest(Claimant { yielding: &yielding, ..alone }, &victims);
            }
        }
        self.count_again(&counted);
        let own = self.uncount_own(slot);
        let lifted: Vec<JobId> = match &outcome {
            Some(outcome) if outcome.yields => {
                yielding.iter().filter(|owner| self.suppose_without(owner)).cloned().collect()
            }
            _ => Vec::new(),
        };
        let outcome = outcome.filter(|outcome| self.leaves_quota(outcome, leaf, &claim));
        self.count_again(&lifted);
        if let Some(outcome) = outcome.as_ref().filter(|outcome| outcome.yields) {
            // Its devices are taken from their reservations below; quota, from those who reserved
            // last.
            for owner in &yielding {
                if self.leaves_quota(outcome, leaf, &claim) {
                    break;
                }
                self.drop_hold(owner);
            }
            work.unfinished = true;
        }
        self.count_again(&own);
        let Some(outcome) = outcome else {
            self.searches.failed(asked, before);
            return Err(again);
        };
        // A higher band takes at once; within one, the price counts.
        let band = self.band(self.job(slot).priority());
        let outranks = outcome.victims.iter().all(|(victim, _)| victim.loss.0 < band);
        if !outranks && !self.is_worth(slot, gang, outcome.loss, refusal, work.now) {
            price.until = price.enforced.min(work.now.plus_ms(PRICED_MS));
            again = again.min(price.until);
            self.searches.costs_too_much(price);
            return Err(again);
        }
        self.carry_out(slot, outcome, work);
        Ok(())
    }

    /// Returns what a search for a job is known by.
    pub(crate) fn asked(
        &self,
        search: Search,
        slot: Slot,
        gang: &Gang,
        short: Option<&Short>,
        now: Timestamp,
    ) -> Vain {
        let job = self.job(slot);
        Vain {
            search,
            queue: job.request.settings.queue.clone(),
            priority: job.priority(),
            gang: gang.clone(),
            short: short.map(|short| self.tree.spec(short.queue).name.clone()),
            kept: self.holds.of(&job.id).is_some(),
            yielding: 0,
            until: now,
        }
    }

    /// Returns whether quota suffices for the claimant beside what is kept for others.
    fn leaves_quota(&mut self, outcome: &Outcome, leaf: QueueId, claim: &Charge) -> bool {
        let freed: Vec<(QueueId, Charge)> = outcome
            .victims
            .iter()
            .map(|(victim, size)| (victim.queue, victim.freed(size.unwrap_or(0))))
            .collect();
        for (queue, charge) in &freed {
            self.tree.suppose(*queue, charge, false);
        }
        let enough = self.tree.check(leaf, claim).is_ok();
        for (queue, charge) in &freed {
            self.tree.suppose(*queue, charge, true);
        }
        enough
    }

    /// Returns the gangs that a job has a better claim than, and that may be disrupted now.
    #[allow(clippy::too_many_arguments)]
    fn victims(
        &self,
        slot: Slot,
        gang: &Gang,
        leaf: QueueId,
        claim: &Charge,
        refusal: &Refusal,
        again: &mut Timestamp,
        now: Timestamp,
    ) -> Vec<Victim> {
        let claimant = self.job(slot);
        let mut victims = Vec::new();
        for (queue, jobs) in &self.placed {
            let Some(id) = self.tree.find(queue) else { continue };
            if !self.relieves(id, refusal.short.as_ref()) {
                continue;
            }
            let below = self.below(claimant, leaf, claim, id);
            if jobs.first().is_none_or(|(least, ..)| i64::from(*least) >= below) {
                continue;
            }
            // What a queue has borrowed in this very cycle is not taken back in it.
            if id != leaf
                && let Some((_, theirs)) = self.tree.fork(leaf, id)
                && self.grew.contains(&theirs)
            {
                *again = (*again).min(now.plus_ms(1));
                continue;
            }
            // A queue that has borrowed nothing gives nothing back.
            if id != leaf && !self.tree.names_models(id) && !self.tree.all_borrowed(leaf, id, claim)
            {
                continue;
            }
            let theirs = jobs.iter().take_while(|(priority, ..)| i64::from(*priority) < below);
            for &(.., holder) in theirs {
                let job = self.job(holder);
                let Some(placed) = job.placed() else { continue };
                if job.request.gang.device != gang.device || placed.cycle == self.cycles {
                    continue;
                }
                let Some(cause) = self.cause(claimant, leaf, claim, job, id, &placed.charge) else {
                    continue;
                };
                match disruptable(job, placed, now) {
                    Ok(()) => {}
                    Err(at) => {
                        *again = (*again).min(at);
                        continue;
                    }
                }
                victims.push(self.victim(job, placed, id, cause, now));
            }
        }
        victims
    }

    pub(crate) fn victim(
        &self,
        job: &Job,
        placed: &Placed,
        queue: QueueId,
        cause: EvictionCause,
        now: Timestamp,
    ) -> Victim {
        let lost_ms = now.since_ms(placed.safe).saturating_add(self.options.restart_cost_ms);
        let band = self.band(job.priority());
        let least = job
            .request
            .gang
            .elastic
            .map(|elastic| elastic.least.max(1))
            .filter(|least| *least < placed.ranks);
        Victim {
            job: job.id.clone(),
            queue,
            charge: placed.charge.clone(),
            cause,
            loss: (band, lost_ms, job.priority(), std::cmp::Reverse(placed.started)),
            whole: u128::from(lost_ms) * u128::from(placed.ranks),
            devices: placed.ranks,
            least,
        }
    }

    pub(crate) fn band(&self, priority: i32) -> i32 {
        i64::from(priority).div_euclid(i64::from(self.options.priority_band.max(1))) as i32
    }

    /// Returns whether what a queue gives back helps where quota is short.
    fn relieves(&self, queue: QueueId, short: Option<&Short>) -> bool {
        short.is_none_or(|short| {
            short.queue == QueueId::FLEET || self.tree.path(queue).any(|above| above == short.queue)
        })
    }

    /// Returns the priority below which jobs of a queue may have to leave for another: a bound that
    /// holds whatever they hold, so that those above it need no look.
    fn below(&self, claimant: &Job, leaf: QueueId, claim: &Charge, queue: QueueId) -> i64 {
        let above = i64::from(claimant.priority());
        let spec = self.tree.spec(leaf);
        if queue == leaf {
            return if spec.preempt_within { above } else { i64::MIN };
        }
        let lower_bands = i64::from(self.band(claimant.priority()))
            * i64::from(self.options.priority_band.max(1));
        let within =
            || self.tree.fork(leaf, queue).is_some_and(|(mine, _)| self.tree.within(mine, claim));
        match spec.reclaim {
            Reclaim::Any if within() => i64::MAX,
            Reclaim::LowerPriority if within() => above,
            _ => lower_bands,
        }
    }

    /// Returns by which rule a job may take the devices of another.
    pub(crate) fn cause(
        &self,
        claimant: &Job,
        leaf: QueueId,
        claim: &Charge,
        holder: &Job,
        queue: QueueId,
        held: &Charge,
    ) -> Option<EvictionCause> {
        let (above, below) = (claimant.priority(), holder.priority());
        let spec = self.tree.spec(leaf);
        if queue == leaf {
            return (spec.preempt_within && below < above).then_some(EvictionCause::Preempted);
        }
        let reclaims = match spec.reclaim {
            Reclaim::Never => false,
            Reclaim::LowerPriority => below < above,
            Reclaim::Any => true,
        };
        if reclaims && self.tree.may_reclaim(leaf, claim, queue, held) {
            return Some(EvictionCause::Reclaimed);
        }
        let outranks = self.band(below) < self.band(above);
        (outranks && self.tree.all_borrowed(leaf, queue, held)).then_some(EvictionCause::Preempted)
    }

    /// Finds the least loss that makes room: shrinking alone if that will do, in one domain if one
    /// will do.
    fn cheapest(&mut self, asks: Claimant<'_>, victims: &[Victim]) -> Option<Outcome> {
        let Claimant { slot, gang, .. } = asks;
        let shrinkable: Vec<Victim> =
            victims.iter().filter(|victim| victim.least.is_some()).cloned().collect();
        if !shrinkable.is_empty()
            && let Some(outcome) = self.make_room(asks, &shrinkable, None, true)
        {
            return Some(outcome);
        }
        let there = self.places(victims);
        let devices: u64 = victims.iter().map(|victim| u64::from(victim.devices)).sum();
        self.searches.steps += devices / LOOKS_A_STEP;
        let id = self.job(slot).id.clone();
        let mut kept = self.holds.unused(&id, &self.fleet);
        for owner in asks.yielding {
            kept += self.holds.unused(owner, &self.fleet);
        }
        let mut sure = false;
        for level in self.fleet.topology().levels_inside_out() {
            let mut best: Option<Outcome> = None;
            for (domain, here) in self.domains(gang, victims, &there, level, kept) {
                let all = victims;
                let victims: Vec<Victim> = here.into_iter().map(|at| victims[at].clone()).collect();
                let outcome = self.make_room(asks, &victims, Some(domain), false);
                // Before more of them are tried: would it do if everyone left?
                if outcome.is_none() && !sure {
                    if !self.would_fit(asks, all) {
                        return None;
                    }
                    sure = true;
                }
                if let Some(outcome) = outcome
                    && best.as_ref().is_none_or(|best| outcome.loss < best.loss)
                {
                    best = Some(outcome);
                }
            }
            if best.is_some() {
                return best;
            }
        }
        self.make_room(asks, victims, None, false)
    }

    /// Returns whether a gang finds a place when all of its possible victims have left.
    fn would_fit(&mut self, asks: Claimant<'_>, victims: &[Victim]) -> bool {
        let Claimant { slot, gang, yielding, .. } = asks;
        let Some(job) = self.jobs[slot.0].as_ref() else { return false };
        let (split, bounds) = (job.split(gang.ranks), self.bounds(Some(gang.ranks)));
        self.searches.steps += victims.len() as u64 + FIND_STEPS;
        let mut trial = self.fleet.trial();
        trial.unreserve(&job.id);
        for owner in yielding {
            trial.unreserve(owner);
        }
        for victim in victims {
            trial.evict(&victim.job);
        }
        site::fit(trial.snapshot(), gang, split, &bounds).is_some()
    }

    /// Returns the innermost domains that victims are in, each with its victims and how many devices
    /// they hold there.
    pub(crate) fn places(&self, victims: &[Victim]) -> BTreeMap<DomainAt, Vec<(usize, u32)>> {
        let mut there: BTreeMap<DomainAt, Vec<(usize, u32)>> = BTreeMap::new();
        for (at, victim) in victims.iter().enumerate() {
            let spots = self.fleet.spots(&victim.job);
            for on_node in spots.chunk_by(|a, b| a.0 == b.0) {
                let state = self.fleet.at(on_node[0].0);
                if !state.is_present() {
                    continue;
                }
                let (list, more) = (there.entry(state.place()).or_default(), on_node.len() as u32);
                match list.last_mut() {
                    Some((same, count)) if *same == at => *count += more,
                    _ => list.push((at, more)),
                }
            }
        }
        there
    }

    /// Returns the domains of a level whose free devices, with as many as are `kept` for the claimant
    /// itself, and victims would make enough room, the cheapest first, each with the victims in it.
    pub(crate) fn domains(
        &self,
        gang: &Gang,
        victims: &[Victim],
        there: &BTreeMap<DomainAt, Vec<(usize, u32)>>,
        level: drumline_cluster::LevelAt,
        kept: u64,
    ) -> Vec<(DomainAt, Vec<usize>)> {
        let topology = self.fleet.topology();
        let mut counts: BTreeMap<DomainAt, BTreeMap<usize, u32>> = BTreeMap::new();
        for (place, list) in there {
            let Some(domain) = topology.above(*place, level) else { continue };
            let of_domain = counts.entry(domain).or_default();
            for (at, count) in list {
                *of_domain.entry(*at).or_default() += count;
            }
        }
        let mut found: Vec<(u128, u64, DomainAt, Vec<usize>)> = Vec::new();
        for (domain, counts) in counts {
            let mut room = self.free_in(gang, domain) + kept;
            let mut loss = 0u128;
            for (at, count) in &counts {
                if room < u64::from(gang.ranks) {
                    room += u64::from(*count);
                    loss += victims[*at].whole;
                }
            }
            if room >= u64::from(gang.ranks) {
                let key = topology.place(domain).key();
                found.push((loss, key, domain, counts.into_keys().collect()));
            }
        }
        found.sort_by_key(|(loss, key, ..)| (*loss, *key));
        found.truncate(DOMAINS_MAX);
        found.into_iter().map(|(_, _, domain, here)| (domain, here)).collect()
    }

    pub(crate) fn free_in(&self, gang: &Gang, domain: DomainAt) -> u64 {
        free_in(&self.fleet, gang, domain)
    }

    /// Takes victims away in a trial, the least loss first, until the claimant has quota and
    /// devices; then gives back all that it does not need.
    fn make_room(
        &mut self,
        asks: Claimant<'_>,
        victims: &[Victim],
        within: Option<DomainAt>,
        shrink: bool,
    ) -> Option<Outcome> {
        let Claimant { leaf, claim, .. } = asks;
        let mut gone: Vec<Victim> = Vec::new();
        let mut found = self.try_room(asks, victims, within, shrink, &mut gone);
        if let Some(placed) = &found {
            gone = self.needed(gone, placed, leaf, claim);
            // Whoever costs most is spared first, if the others will do.
            for at in (0..gone.len()).rev().take(SPARED_MAX) {
                if gone.len() <= 1 || shrink {
                    break;
                }
                let mut fewer = gone.clone();
                fewer.remove(at);
                let mut left = Vec::new();
                let all = self.try_room(asks, &fewer, within, shrink, &mut left);
                if let Some(placed) = all {
                    gone = self.needed(left, &placed, leaf, claim);
                    found = Some(placed);
                    break;
                }
            }
        }
        let placed = found?;
        let loss = gone.iter().map(|victim| victim.whole).sum();
        let victims = gone
            .into_iter()
            .map(|victim| {
                let size = shrink.then(|| self.shrunk_size(&victim, &placed.devices));
                (victim, size)
            })
            .collect();
        let yields = !asks.yielding.is_empty();
        Some(Outcome { devices: placed.devices, victims, loss, yields })
    }

    fn try_room(
        &mut self,
        asks: Claimant<'_>,
        victims: &[Victim],
        within: Option<DomainAt>,
        shrink: bool,
        gone: &mut Vec<Victim>,
    ) -> Option<Found> {
        let Claimant { slot, gang, leaf, claim, yielding } = asks;
        let job = self.jobs[slot.0].as_ref()?;
        let (id, split) = (job.id.clone(), job.split(gang.ranks));
        let least = gang.elastic.map_or(gang.ranks, |elastic| elastic.least.max(1));
        let mut bounds = self.bounds(Some(gang.ranks));
        bounds.within = within;
        let mut supposed: Vec<(QueueId, Charge)> = Vec::new();
        let (tree, fleet) = (&mut self.tree, &mut self.fleet);
        let mut found = None;
        {
            let mut trial = fleet.trial();
            trial.unreserve(&id);
            for owner in yielding {
                trial.unreserve(owner);
            }
            // What is kept for the claimant itself counts for it.
            let mut room = free_in(trial.snapshot(), gang, within.unwrap_or(DomainAt::ROOT));
            let mut step = 1usize;
            let mut since = 0usize;
            for (at, victim) in victims.iter().enumerate() {
                // With each victim its queue has borrowed less.
                let right =
                    victim.queue == leaf || tree.all_borrowed(leaf, victim.queue, &victim.charge);
                if right {
                    let held = trial.snapshot().commitment(&victim.job).cloned();
                    trial.evict(&victim.job);
                    self.searches.steps += 1;
                    if shrink && let (Some(mut held), Some(least)) = (held, victim.least) {
                        held.devices.truncate(least as usize);
                        let _ = trial.hold(held);
                    }
                    let kept = if shrink { victim.least.unwrap_or(0) } else { 0 };
                    let freed = victim.freed(kept);
                    tree.suppose(victim.queue, &freed, false);
                    supposed.push((victim.queue, freed));
                    gone.push(victim.clone());
                    room += u64::from(victim.devices - kept);
                    since += 1;
                }
                let last = at + 1 == victims.len();
                if (since < step && !last) || room < u64::from(least) {
                    continue;
                }
                since = 0;
                if tree.check(leaf, claim).is_err() {
                    continue;
                }
                self.searches.steps += FIND_STEPS;
                if let Some(placed) = site::fit(trial.snapshot(), gang, split, &bounds) {
                    found = Some(placed);
                    break;
                }
                step += step.div_ceil(4);
            }
        }
        for (queue, charge) in supposed {
            self.tree.suppose(queue, &charge, true);
        }
        found
    }

    /// Returns those without whom the claimant has no devices, or no quota.
    fn needed(
        &mut self,
        gone: Vec<Victim>,
        placed: &Found,
        leaf: QueueId,
        claim: &Charge,
    ) -> Vec<Victim> {
        let holders = holders(&self.fleet, &placed.devices);
        let (mut needed, others): (Vec<Victim>, Vec<Victim>) =
            gone.into_iter().partition(|victim| holders.contains(&victim.job));
        for victim in &needed {
            self.tree.suppose(victim.queue, &victim.charge, false);
        }
        let mut more = Vec::new();
        for victim in others {
            if self.tree.check(leaf, claim).is_ok() {
                break;
            }
            self.tree.suppose(victim.queue, &victim.charge, false);
            more.push(victim);
        }
        needed.extend(more);
        for victim in &needed {
            self.tree.suppose(victim.queue, &victim.charge, true);
        }
        needed
    }

    /// Returns the size that a victim keeps: all that the claimant does not need, in whole steps.
    fn shrunk_size(&self, victim: &Victim, taken: &[DeviceId]) -> u32 {
        let least = victim.least.unwrap_or(victim.devices);
        let Some(held) = self.fleet.commitment(&victim.job) else { return least };
        let lost = held.devices.iter().filter(|device| taken.contains(device)).count() as u32;
        let step = self
            .known(&victim.job)
            .and_then(|job| job.request.gang.elastic)
            .map_or(1, |elastic| elastic.step.max(1));
        let left = victim.devices.saturating_sub(lost);
        (left / step * step).max(least)
    }

    fn carry_out(&mut self, slot: Slot, outcome: Outcome, work: &mut Work) {
        let claimant = self.job(slot);
        let (id, queue) = (claimant.id.clone(), claimant.request.settings.queue.clone());
        let priority = claimant.priority();
        for (victim, size) in &outcome.victims {
            let message = message(&id, &queue, priority, victim, *size);
            let beneficiary = Some(JobId::clone(&id));
            if let Some(size) = size
                && let Some(held) = self.fleet.commitment(&victim.job)
            {
                let taken = &outcome.devices;
                let mut kept = held.devices.clone();
                kept.retain(|device| !taken.contains(device));
                kept.truncate(*size as usize);
                let until = work.now.plus_ms(NOMINATED_MS);
                self.keep(&victim.job, kept, Keep::Nominated { until });
            }
            self.evict(&victim.job, victim.cause, beneficiary, *size, message, work);
        }
        let until = work.now.plus_ms(NOMINATED_MS);
        work.wake(until);
        self.keep(&id, outcome.devices, Keep::Nominated { until });
    }

    /// Asks one gang to leave.
    pub(crate) fn evict(
        &mut self,
        victim: &JobId,
        cause: EvictionCause,
        beneficiary: Option<JobId>,
        resize_to: Option<u32>,
        message: String,
        work: &mut Work,
    ) {
        let now = work.now;
        let Some(&slot) = self.ids.get(victim) else { return };
        // Who is asked to leave has no use for spares.
        if self.holds.of(victim).is_some_and(|hold| hold.keep == Keep::Spare) {
            self.drop_hold(victim);
        }
        let job = self.job_mut(slot);
        let attempt = job.attempt;
        let id = job.id.clone();
        let Some(placed) = job.placed_mut() else { return };
        placed.leaving =
            Some(Leaving { cause, beneficiary: beneficiary.clone(), resize_to, since: now });
        job.past.disrupted.push(now);
        if job.past.disrupted.len() > REMEMBERED_MAX {
            job.past.disrupted.remove(0);
        }
        self.leaving.insert((id, slot));
        let job = victim.clone();
        work.evictions.push(Eviction { job, attempt, cause, beneficiary, resize_to, message });
    }
}

/// Returns the whole devices in a domain that nobody uses and that are kept for nobody.
fn free_in(fleet: &Snapshot, gang: &Gang, domain: DomainAt) -> u64 {
    fleet
        .pools()
        .filter(|(_, pool)| fleet.stock(pool.model()).kind() == gang.device)
        .map(|(_, pool)| pool.counts(domain).free())
        .sum()
}

pub(crate) fn holders(fleet: &Snapshot, devices: &[DeviceId]) -> std::collections::BTreeSet<JobId> {
    let mut holders = std::collections::BTreeSet::new();
    for on_node in devices.chunk_by(|a, b| a.node == b.node) {
        let Some(state) = fleet.node(&on_node[0].node) else { continue };
        for holder in on_node.iter().flat_map(|device| state.holders(device.index)) {
            if !holders.contains(holder) {
                holders.insert(holder.clone());
            }
        }
    }
    holders
}

/// Returns whether a gang may be disrupted now, and else from when on, if time alone changes that.
pub(crate) fn disruptable(job: &Job, placed: &Placed, now: Timestamp) -> Result<(), Timestamp> {
    let never = Timestamp(u64::MAX);
    let settings = &job.request.settings;
    if !settings.preemptible || placed.leaving.is_some() {
        return Err(never);
    }
    let mut from = placed.started.plus_ms(settings.min_runtime_ms).max(job.past.immune);
    if let Some(budget) = settings.disruptions {
        let recent: Vec<&Timestamp> =
            job.past.disrupted.iter().filter(|at| now.since_ms(**at) < budget.per_ms).collect();
        if recent.len() >= budget.count as usize {
            let next = recent.len() - (budget.count as usize).min(recent.len());
            from = match recent.get(next) {
                Some(at) => from.max(at.plus_ms(budget.per_ms)),
                None => return Err(never),
            };
        }
    }
    if from > now { Err(from) } else { Ok(()) }
}

fn message(
    claimant: &JobId,
    queue: &QueueName,
    priority: i32,
    victim: &Victim,
    size: Option<u32>,
) -> String {
    let lost = format_duration_ms(victim.loss.1);
    let what = match (victim.cause, size) {
        (_, Some(size)) => format!("shrinks from {} to {size} ranks for", victim.devices),
        (EvictionCause::Reclaimed, None) => "gives borrowed devices back to".to_owned(),
        _ => "makes room for".to_owned(),
    };
    format!(
        "{what} {claimant} (queue {queue}, priority {priority}); {lost} of work and restart lost"
    )
}
