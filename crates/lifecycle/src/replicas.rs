//! How many replicas a service should have, and which start or go.
//!
//! The rule of [`Autoscaler::wanted`], from what the ready replicas report (R replicas, each with a
//! batch of B sequences):
//!
//! ```text
//! busy   = ceil((running + waiting) / (B + autoscale.waiting))
//! cached = ceil(sum of KV use / autoscale.kvUsage)
//! wanted = max(busy, cached), within autoscale.min and max
//! ```
//!
//! - It is of totals, so it does not matter on how many replicas they are spread, and replicas that
//!   are still starting cause no further ones.
//! - More are started at once; fewer are kept only when none of the looks of the last
//!   `autoscale.downAfter` wanted more. Who has looked for less than that gives nothing up.
//! - While nobody reports, nothing changes.

use std::collections::{BTreeMap, VecDeque};

use drumline_spec::Autoscale;
use drumline_types::Timestamp;

/// A replica that has failed is replaced after so long, in milliseconds.
pub const REPLACE_MS: u64 = 300_000;
/// A replica that goes may take so long to finish its requests, in milliseconds.
pub const DRAIN_MS: u64 = 60_000;
/// Gateways are told so long before a replica may go, in milliseconds: no request is on its way.
const DRAIN_MIN_MS: u64 = 2_000;
/// Looks are kept this far apart, in milliseconds, the greatest of each span.
const SPAN_MS: u64 = 1_000;

/// What one ready replica reports.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Sequences in its batch.
    pub running: u32,
    /// Requests that wait for a place.
    pub waiting: u32,
    /// Most sequences of its batch.
    pub max_batch: u32,
    /// Share of its KV cache in use, 0 to 1.
    pub kv_usage: f64,
}

/// Remembers what was wanted of late.
#[derive(Debug, Clone, Default)]
pub struct Autoscaler {
    /// Start of each span and the most that was wanted in it, oldest first.
    looks: VecDeque<(Timestamp, u32)>,
    since: Option<Timestamp>,
}

impl Autoscaler {
    /// Returns how many replicas there should be, of `present` ones.
    pub fn wanted(
        &mut self,
        rule: &Autoscale,
        present: u32,
        loads: &[Load],
        now: Timestamp,
    ) -> u32 {
        let bounded = |count: u32| count.max(rule.min).min(rule.max.max(rule.min));
        let since = *self.since.get_or_insert(now);
        if loads.is_empty() {
            return bounded(present);
        }
        let wanted = bounded(ideal(rule, loads));
        match self.looks.back_mut() {
            Some((at, most)) if now.since_ms(*at) < SPAN_MS => *most = wanted.max(*most),
            _ => self.looks.push_back((now, wanted)),
        }
        while self.looks.front().is_some_and(|(at, _)| now.since_ms(*at) > rule.down_after_ms) {
            self.looks.pop_front();
        }
        if wanted >= present || now.since_ms(since) < rule.down_after_ms {
            return wanted.max(bounded(present));
        }
        let most = self.looks.iter().map(|(_, most)| *most).max().unwrap_or(wanted);
        most.min(bounded(present))
    }
}

/// Returns how many replicas these loads would fill.
fn ideal(rule: &Autoscale, loads: &[Load]) -> u32 {
    let requests: u64 =
        loads.iter().map(|load| u64::from(load.running) + u64::from(load.waiting)).sum();
    let batch = loads.iter().map(|load| load.max_batch).min().unwrap_or(1).max(1);
    let busy = requests.div_ceil(u64::from(batch) + u64::from(rule.waiting));
    let used: f64 = loads.iter().map(|load| load.kv_usage.clamp(0.0, 1.0)).sum();
    // Not ceil alone: three times 0.8 is a little more than 2.4.
    let cached = (used / rule.kv_usage.max(0.01) - 1e-9).ceil().max(0.0);
    u32::try_from(busy).unwrap_or(u32::MAX).max(cached as u32)
}

/// How one replica stands. The first one, number 0, is the service itself and never goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It serves, or is on the way there.
    Active {
        /// Requests that it has; `None`: it does not run, so it can have none.
        requests: Option<u32>,
    },
    /// It has failed for good, at this moment.
    Failed(Timestamp),
    /// It is being ended.
    Ending,
}

/// What is to be done about the replicas of one service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Steps {
    /// Numbers of replicas to start.
    pub start: Vec<u32>,
    /// Numbers of replicas to end.
    pub end: Vec<u32>,
    /// Look again at this moment, though nothing has changed.
    pub again: Option<Timestamp>,
}

/// Ends replicas gently: since when each is to go, by number.
#[derive(Debug, Clone, Default)]
pub struct Draining(BTreeMap<u32, Timestamp>);

impl Draining {
    /// Whether a replica gets no new requests.
    #[must_use]
    pub fn holds(&self, number: u32) -> bool {
        self.0.contains_key(&number)
    }

    /// Returns what brings a service to `wanted` replicas, number 0 included. `there` has every
    /// other one, by number.
    pub fn steps(&mut self, wanted: u32, there: &BTreeMap<u32, Standing>, now: Timestamp) -> Steps {
        let mut steps = Steps::default();
        let mut at = |at: Timestamp| {
            steps.again = Some(steps.again.map_or(at, |again: Timestamp| again.min(at)));
        };
        self.0.retain(|number, _| *number >= wanted && there.contains_key(number));
        for (number, standing) in there {
            match standing {
                Standing::Ending => {}
                // What is not wanted any more, or has failed long ago, goes.
                Standing::Failed(_) if *number >= wanted => steps.end.push(*number),
                Standing::Failed(since) => {
                    let due = since.plus_ms(REPLACE_MS);
                    if due <= now {
                        steps.end.push(*number);
                    } else {
                        at(due);
                    }
                }
                Standing::Active { .. } if *number < wanted => {}
                Standing::Active { requests } => {
                    let since = *self.0.entry(*number).or_insert(now);
                    let drained = since.plus_ms(DRAIN_MIN_MS);
                    let due = if *requests == Some(0) { drained } else { since.plus_ms(DRAIN_MS) };
                    if due <= now || requests.is_none() {
                        steps.end.push(*number);
                    } else {
                        at(drained.max(now.plus_ms(DRAIN_MIN_MS / 4)).min(due.max(drained)));
                    }
                }
            }
        }
        steps.start = (1..wanted).filter(|number| !there.contains_key(number)).collect();
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Autoscale =
        Autoscale { min: 1, max: 4, waiting: 4, kv_usage: 0.8, down_after_ms: 60_000 };

    fn load(running: u32, waiting: u32, kv_usage: f64) -> Load {
        Load { running, waiting, max_batch: 8, kv_usage }
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp(1_000_000 + seconds * 1000)
    }

    #[test]
    fn replicas_follow_requests_and_caches() {
        for (loads, expected) in [
            (vec![load(0, 0, 0.0)], 1),
            (vec![load(8, 4, 0.0)], 1),
            (vec![load(8, 5, 0.0)], 2),
            (vec![load(8, 64, 0.0)], 4),
            (vec![load(2, 0, 0.81)], 2),
            (vec![load(2, 0, 0.8); 3], 3),
            (vec![load(8, 5, 0.5), load(8, 0, 0.5)], 2),
        ] {
            assert_eq!(
                Autoscaler::default().wanted(&RULE, 1, &loads, at(0)),
                expected,
                "{loads:?}"
            );
        }
        let most = Autoscale { min: 2, max: 3, ..RULE };
        assert_eq!(Autoscaler::default().wanted(&most, 1, &[load(0, 0, 0.0)], at(0)), 2);
        assert_eq!(Autoscaler::default().wanted(&most, 2, &[load(8, 64, 1.0)], at(0)), 3);
        assert_eq!(Autoscaler::default().wanted(&most, 9, &[], at(0)), 3);
    }

    #[test]
    fn replicas_go_only_when_they_were_not_wanted_for_long() {
        let mut scaler = Autoscaler::default();
        assert_eq!(scaler.wanted(&RULE, 1, &[load(8, 20, 0.0)], at(0)), 3);
        let idle = [load(1, 0, 0.1); 3];
        for second in 1..=60 {
            // A short burst for two is remembered by itself.
            let burst = [load(8, 5, 0.0)];
            let loads = if second == 30 { &burst[..] } else { &idle };
            assert_eq!(scaler.wanted(&RULE, 3, loads, at(second)), 3, "{second}");
        }
        assert_eq!(scaler.wanted(&RULE, 3, &idle, at(61)), 2);
        assert_eq!(scaler.wanted(&RULE, 2, &idle, at(90)), 2);
        assert_eq!(scaler.wanted(&RULE, 2, &idle, at(91)), 1);
        // Nobody reports: nobody goes.
        assert_eq!(scaler.wanted(&RULE, 3, &[], at(500)), 3);
    }

    #[test]
    fn who_has_just_begun_to_look_gives_nothing_up() {
        let mut scaler = Autoscaler::default();
        let idle = [load(0, 0, 0.0); 3];
        assert_eq!(scaler.wanted(&RULE, 3, &idle, at(0)), 3);
        assert_eq!(scaler.wanted(&RULE, 3, &idle, at(59)), 3);
        assert_eq!(scaler.wanted(&RULE, 3, &idle, at(60)), 1);
    }

    fn active(requests: u32) -> Standing {
        Standing::Active { requests: Some(requests) }
    }

    #[test]
    fn missing_replicas_start_and_failed_ones_are_replaced_later() {
        let mut draining = Draining::default();
        let there = BTreeMap::from([(2, active(0))]);
        let steps = draining.steps(4, &there, at(0));
        assert_eq!((steps.start, steps.end), (vec![1, 3], vec![0u32; 0]));
        let there = BTreeMap::from([(1, Standing::Failed(at(0)))]);
        let steps = draining.steps(2, &there, at(1));
        assert_eq!((&*steps.start, &*steps.end), (&[][..], &[][..]));
        assert_eq!(steps.again, Some(at(300)));
        assert_eq!(draining.steps(2, &there, at(300)).end, [1]);
        assert_eq!(draining.steps(1, &there, at(1)).end, [1], "not wanted any more");
        let there = BTreeMap::from([(1, Standing::Ending)]);
        assert_eq!(draining.steps(2, &there, at(301)), Steps::default(), "its number is taken");
    }

    #[test]
    fn a_replica_that_goes_finishes_its_requests() {
        let mut draining = Draining::default();
        let with = |requests| BTreeMap::from([(1, active(0)), (2, requests)]);
        assert_eq!(draining.steps(2, &with(active(3)), at(0)).end, [0u32; 0]);
        assert!(draining.holds(2) && !draining.holds(1));
        assert_eq!(
            draining.steps(2, &with(active(0)), at(1)).end,
            [0u32; 0],
            "gateways may not know yet"
        );
        assert_eq!(draining.steps(2, &with(active(1)), at(30)).end, [0u32; 0]);
        assert_eq!(draining.steps(2, &with(active(0)), at(31)).end, [2]);
        assert_eq!(draining.steps(2, &with(active(1)), at(60)).end, [2], "not for ever");
        // Wanted again before it went.
        assert_eq!(draining.steps(3, &with(active(1)), at(61)), Steps::default());
        assert!(!draining.holds(2));
        // One that never came up has nothing to finish.
        let silent = Standing::Active { requests: None };
        assert_eq!(draining.steps(2, &with(silent), at(62)).end, [2]);
    }

    #[test]
    fn a_draining_replica_is_looked_at_again() {
        let mut draining = Draining::default();
        let there = BTreeMap::from([(1, active(2))]);
        let again = draining.steps(1, &there, at(0)).again.unwrap();
        assert!(again > at(0) && again <= at(2), "{again:?}");
        let again = draining.steps(1, &there, at(59)).again.unwrap();
        assert!(again > at(59) && again <= at(60), "{again:?}");
    }
}
