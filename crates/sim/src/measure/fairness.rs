//! What each queue used against what it was entitled to.
//!
//! A queue's entitlement at a moment: of what its parent is entitled to, first its quota (as far
//! as it has demand), then by weight among its siblings what is left, as far as it has demand
//! (weighted max-min). Demand is what its jobs hold and what its waiting jobs want. It is looked
//! at in even steps of time.

use std::collections::BTreeMap;

use drumline_spec::{QueueSpec, WHOLE_DEVICE};
use drumline_types::QueueName;
use serde::Serialize;

use crate::measure::ledger::hours;

/// What one queue got.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Share {
    /// The queue.
    pub queue: String,
    /// Device-hours that its jobs held.
    pub used_hours: f64,
    /// Device-hours that it was entitled to.
    pub entitled_hours: f64,
    /// Device-hours that it was entitled to and did not get while it wanted them.
    pub short_hours: f64,
}

/// One queue of the tree.
#[derive(Debug, Clone, Default)]
struct Queue {
    name: String,
    parent: Option<usize>,
    children: Vec<usize>,
    weight: f64,
    /// Device thousandths that it may always use.
    quota: f64,
    /// Device thousandths that it may use at most.
    most: f64,
    held: u64,
    wanted: u64,
    used: f64,
    entitled: f64,
    short: f64,
}

/// The queues, what they hold and want, and what they were entitled to.
#[derive(Debug, Clone)]
pub struct Fairness {
    queues: Vec<Queue>,
    places: BTreeMap<QueueName, usize>,
    step: u64,
    next: u64,
}

impl Fairness {
    /// Starts to look at these queues every `step_ms`. `classes` are the names that quota of the
    /// counted devices goes by.
    #[must_use]
    pub fn new(specs: &[QueueSpec], classes: &[String], step_ms: u64) -> Self {
        let mut fair =
            Self { queues: Vec::new(), places: BTreeMap::new(), step: step_ms.max(1), next: 0 };
        let total = |quota: &BTreeMap<String, u32>| -> f64 {
            classes.iter().filter_map(|class| quota.get(class)).map(|&n| f64::from(n)).sum::<f64>()
                * f64::from(WHOLE_DEVICE)
        };
        for spec in specs {
            fair.places.insert(spec.name.clone(), fair.queues.len());
            let quota = total(&spec.quota);
            fair.queues.push(Queue {
                name: spec.name.to_string(),
                weight: f64::from(spec.weight),
                quota,
                most: spec
                    .borrowing_limit
                    .as_ref()
                    .map_or(f64::INFINITY, |limit| quota + total(limit)),
                ..Queue::default()
            });
        }
        for (at, spec) in specs.iter().enumerate() {
            let parent = spec.parent.as_ref().and_then(|name| fair.places.get(name)).copied();
            fair.queues[at].parent = parent;
            if let Some(parent) = parent {
                fair.queues[parent].children.push(at);
            }
        }
        fair
    }

    /// Returns a queue's place; a job of an unknown queue counts nowhere.
    #[must_use]
    pub fn place(&self, queue: &QueueName) -> Option<usize> {
        self.places.get(queue).copied()
    }

    /// Says that the jobs of a queue hold and want so much more or less.
    pub fn change(&mut self, queue: Option<usize>, held: i64, wanted: i64) {
        if let Some(queue) = queue.and_then(|queue| self.queues.get_mut(queue)) {
            queue.held = queue.held.saturating_add_signed(held);
            queue.wanted = queue.wanted.saturating_add_signed(wanted);
        }
    }

    /// Looks at the queues for every step up to `now`; nothing has changed since the last call.
    pub fn until(&mut self, now: u64, capacity: u64) {
        if self.next >= now {
            return;
        }
        let steps = (now - self.next).div_ceil(self.step);
        self.next += steps * self.step;
        let ms = (steps * self.step) as f64;
        let demand = self.demand();
        let roots: Vec<usize> =
            (0..self.queues.len()).filter(|&at| self.queues[at].parent.is_none()).collect();
        let mut entitled = vec![0.0; self.queues.len()];
        self.divide(&roots, capacity as f64, &demand, &mut entitled);
        for (queue, entitled) in self.queues.iter_mut().zip(entitled) {
            let held = queue.held as f64;
            queue.used += held * ms;
            queue.entitled += entitled * ms;
            queue.short += (entitled - held).max(0.0) * ms;
        }
    }

    fn demand(&self) -> Vec<f64> {
        let mut demand = vec![None; self.queues.len()];
        fn of(fair: &Fairness, at: usize, demand: &mut Vec<Option<f64>>, depth: usize) -> f64 {
            if let Some(known) = demand[at] {
                return known;
            }
            let queue = &fair.queues[at];
            let below: f64 = match depth {
                0 => 0.0,
                _ => queue.children.iter().map(|&child| of(fair, child, demand, depth - 1)).sum(),
            };
            let all = (below + (queue.held + queue.wanted) as f64).min(queue.most);
            demand[at] = Some(all);
            all
        }
        (0..self.queues.len()).map(|at| of(self, at, &mut demand, self.queues.len())).collect()
    }

    /// Divides an amount among siblings, and what each gets among its children.
    fn divide(&self, siblings: &[usize], amount: f64, demand: &[f64], entitled: &mut [f64]) {
        let mut left = amount;
        for &at in siblings {
            let sure = demand[at].min(self.queues[at].quota);
            entitled[at] = sure;
            left -= sure;
        }
        if left < 0.0 {
            // More was promised than there is: each gets its part.
            let promised = amount - left;
            siblings.iter().for_each(|&at| entitled[at] *= amount / promised);
        }
        let mut open: Vec<usize> =
            siblings.iter().copied().filter(|&at| demand[at] > entitled[at]).collect();
        while left > 0.5 && !open.is_empty() {
            let weights: f64 = open.iter().map(|&at| self.queues[at].weight).sum();
            let portion = left / weights.max(f64::MIN_POSITIVE);
            let fills = |at: usize, entitled: &[f64]| {
                entitled[at] + portion * self.queues[at].weight >= demand[at]
            };
            let full: Vec<usize> = open.iter().copied().filter(|&at| fills(at, entitled)).collect();
            if full.is_empty() {
                open.iter().for_each(|&at| entitled[at] += portion * self.queues[at].weight);
                break;
            }
            for &at in &full {
                left -= demand[at] - entitled[at];
                entitled[at] = demand[at];
            }
            open.retain(|at| !full.contains(at));
        }
        for &at in siblings {
            if !self.queues[at].children.is_empty() {
                let children = &self.queues[at].children;
                self.divide(children, entitled[at], demand, entitled);
            }
        }
    }

    /// Returns what every queue without children got.
    #[must_use]
    pub fn shares(&self) -> Vec<Share> {
        let leaves = self.queues.iter().filter(|queue| queue.children.is_empty());
        leaves
            .map(|queue| Share {
                queue: queue.name.clone(),
                used_hours: hours(queue.used as u128),
                entitled_hours: hours(queue.entitled as u128),
                short_hours: hours(queue.short as u128),
            })
            .collect()
    }
}

/// Returns Jain's index of what queues used over what they were entitled to: 1 when all got the
/// same part of it, 1/n when one got everything (Jain et al. 1984).
#[must_use]
pub fn jain(shares: &[Share]) -> f64 {
    let ratios: Vec<f64> = shares
        .iter()
        .filter(|share| share.entitled_hours > 0.0)
        .map(|share| share.used_hours / share.entitled_hours)
        .collect();
    let squares: f64 = ratios.iter().map(|ratio| ratio * ratio).sum();
    if squares == 0.0 {
        return 1.0;
    }
    ratios.iter().sum::<f64>().powi(2) / (squares * ratios.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(name: &str, parent: Option<&str>, quota: u32, weight: u32) -> QueueSpec {
        QueueSpec {
            parent: parent.map(|name| name.parse().unwrap()),
            quota: BTreeMap::from([("gpu".to_owned(), quota)]),
            weight,
            ..QueueSpec::open(name.parse().unwrap())
        }
    }

    /// Entitlements in devices of leaves that want so many, with 12 devices in all.
    fn entitled(specs: &[QueueSpec], wants: &[(&str, i64)]) -> Vec<(String, f64)> {
        let mut fair = Fairness::new(specs, &["gpu".to_owned()], 3_600_000);
        for (name, devices) in wants {
            let place = fair.place(&name.parse().unwrap());
            fair.change(place, 0, devices * 1000);
        }
        fair.until(1, 12_000);
        fair.shares().into_iter().map(|share| (share.queue, share.entitled_hours)).collect()
    }

    #[test]
    fn what_is_left_after_quotas_goes_by_weight_to_those_who_want_it() {
        let flat = [queue("a", None, 2, 1), queue("b", None, 0, 4), queue("c", None, 4, 1)];
        let of = |wants: &[(&str, i64)]| -> Vec<f64> {
            entitled(&flat, wants).into_iter().map(|(_, devices)| devices).collect()
        };
        assert_eq!(of(&[("a", 20), ("b", 20), ("c", 4)]), [3.2, 4.8, 4.0]);
        assert_eq!(of(&[("a", 1), ("b", 20), ("c", 0)]), [1.0, 11.0, 0.0]);
        assert_eq!(of(&[]), [0.0, 0.0, 0.0]);
    }

    #[test]
    fn children_divide_what_their_parent_is_entitled_to() {
        let tree = [
            queue("top", None, 6, 1),
            queue("x", Some("top"), 0, 1),
            queue("y", Some("top"), 0, 2),
            queue("other", None, 6, 1),
        ];
        let found = entitled(&tree, &[("x", 9), ("y", 9), ("other", 9)]);
        let found: Vec<f64> = found.into_iter().map(|(_, devices)| devices).collect();
        assert_eq!(found, [2.0, 4.0, 6.0]);
    }

    #[test]
    fn jains_index_is_one_when_all_get_their_part() {
        let share = |used, entitled| Share {
            queue: String::new(),
            used_hours: used,
            entitled_hours: entitled,
            short_hours: 0.0,
        };
        assert_eq!(jain(&[share(5.0, 10.0), share(1.0, 2.0)]), 1.0);
        assert_eq!(jain(&[share(5.0, 10.0), share(0.0, 2.0)]), 0.5);
        assert_eq!(jain(&[]), 1.0);
    }
}
