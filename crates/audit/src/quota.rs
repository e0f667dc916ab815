//! What queues use and may use, added up anew for every question.

use std::collections::{BTreeMap, BTreeSet};

use drumline_spec::{DeviceKind, QueueSpec, WHOLE_DEVICE};
use drumline_types::QueueName;

use crate::gang::{is_called, kind_word};
use crate::ledger::Ledger;
use crate::violation::Violation;

/// Thousandths of devices by kind and model.
pub(crate) type Charge = BTreeMap<(DeviceKind, String), u64>;

/// A question about the queues: what if these used so much more?
pub(crate) struct Quota<'l> {
    ledger: &'l Ledger,
    below: BTreeMap<Option<&'l QueueName>, Vec<&'l QueueSpec>>,
    more: BTreeMap<QueueName, Charge>,
}

impl<'l> Quota<'l> {
    pub(crate) fn new(ledger: &'l Ledger) -> Self {
        let mut below: BTreeMap<Option<&QueueName>, Vec<&QueueSpec>> = BTreeMap::new();
        for queue in ledger.queues.values() {
            below.entry(queue.parent.as_ref()).or_default().push(queue);
        }
        Self { ledger, below, more: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, queue: &QueueName, charge: &Charge) {
        let more = self.more.entry(queue.clone()).or_default();
        for (class, amount) in charge {
            *more.entry(class.clone()).or_default() += amount;
        }
    }

    /// Returns the queue and those above it.
    pub(crate) fn path(&self, queue: &QueueName) -> Vec<&'l QueueSpec> {
        let mut path = Vec::new();
        let mut at = self.ledger.queues.get(queue);
        while let Some(queue) = at {
            path.push(queue);
            if path.len() > self.ledger.queues.len() {
                break;
            }
            at = queue.parent.as_ref().and_then(|parent| self.ledger.queues.get(parent));
        }
        path
    }

    /// Returns why jobs do not start from a queue.
    pub(crate) fn closed(&self, queue: &QueueName) -> Option<String> {
        let path = self.path(queue);
        if path.is_empty() {
            return Some("does not exist".to_owned());
        }
        if self.below.contains_key(&Some(queue)) {
            return Some("has queues below it".to_owned());
        }
        let held = path.iter().find(|above| above.held)?;
        Some(format!("is held at {}", held.name))
    }

    /// Returns every limit that the additions break, where they make it worse.
    pub(crate) fn broken(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        let mut asked: BTreeSet<&QueueName> = BTreeSet::new();
        for queue in self.more.keys() {
            for above in self.path(queue) {
                if asked.insert(&above.name) {
                    self.limits(above, &mut found);
                }
            }
        }
        if self.ledger.queues.values().any(|queue| queue.lending_limit.is_some()) {
            self.lent(&mut found);
        }
        found
    }

    fn limits(&self, queue: &QueueSpec, found: &mut Vec<Violation>) {
        for (class, quota) in &queue.quota {
            let borrow = queue.borrowing_limit.as_ref().and_then(|limits| limits.get(class));
            let Some(borrow) = borrow else { continue };
            let limit = (u64::from(*quota) + u64::from(*borrow)) * u64::from(WHOLE_DEVICE);
            let counts = |kind: DeviceKind, model: &str| class_of(queue, kind, model) == *class;
            let used = |after: bool| self.in_and_below(queue, class, &counts, after);
            let after = used(true);
            if after > limit && after > used(false) {
                let (queue, class) = (queue.name.clone(), class.clone());
                found.push(Violation::QuotaBroken { queue, class, used: after, limit });
            }
        }
    }

    /// Checks that nobody uses what others keep for themselves.
    fn lent(&self, found: &mut Vec<Violation>) {
        for kind in [DeviceKind::Cpu, DeviceKind::Gpu] {
            let word = kind_word(kind);
            let counts = |other: DeviceKind, _: &str| other == kind;
            let all = |after: bool| -> u64 {
                let roots = self.below.get(&None).into_iter().flatten();
                roots.map(|root| self.or_kept(root, word, &counts, after)).sum()
            };
            let has = self.ledger.devices.iter().filter(|((k, _), _)| *k == kind);
            let has = has.map(|(_, devices)| devices).sum::<u64>() * u64::from(WHOLE_DEVICE);
            let used = all(true);
            // Where nothing is kept at present, nothing that is kept can be taken; and jobs may hold
            // devices of nodes that are gone.
            let held = self.held(&counts);
            if used > has && used > all(false) && used > held {
                found.push(Violation::LentTooMuch { class: word.to_owned(), used, has });
            }
        }
    }

    /// Returns what the jobs of all queues would hold, with the additions.
    fn held(&self, counts: &dyn Fn(DeviceKind, &str) -> bool) -> u64 {
        let known = |queue: &QueueName| self.ledger.queues.contains_key(queue);
        let charges = self.ledger.used.iter().chain(&self.more).filter(|(queue, _)| known(queue));
        let all = charges.flat_map(|(_, charge)| charge);
        all.filter(|((kind, model), _)| counts(*kind, model)).map(|(_, amount)| amount).sum()
    }

    /// Returns what a queue takes from its parent: what it and those below use, or what it keeps.
    fn or_kept(
        &self,
        queue: &QueueSpec,
        class: &str,
        counts: &dyn Fn(DeviceKind, &str) -> bool,
        after: bool,
    ) -> u64 {
        let lent = queue.lending_limit.as_ref().and_then(|limits| limits.get(class));
        let kept = match (queue.quota.get(class), lent) {
            (Some(quota), Some(lent)) => u64::from(quota.saturating_sub(*lent)),
            _ => 0,
        };
        let used = self.in_and_below(queue, class, counts, after);
        used.max(kept * u64::from(WHOLE_DEVICE))
    }

    fn in_and_below(
        &self,
        queue: &QueueSpec,
        class: &str,
        counts: &dyn Fn(DeviceKind, &str) -> bool,
        after: bool,
    ) -> u64 {
        let sum = |charge: Option<&Charge>| -> u64 {
            let all = charge.into_iter().flatten();
            all.filter(|((kind, model), _)| counts(*kind, model)).map(|(_, amount)| amount).sum()
        };
        let own = sum(self.ledger.used.get(&queue.name));
        let more = if after { sum(self.more.get(&queue.name)) } else { 0 };
        let children = self.below.get(&Some(&queue.name)).into_iter().flatten();
        own + more + children.map(|child| self.or_kept(child, class, counts, after)).sum::<u64>()
    }

    /// Returns whether a queue surely keeps to its quota of a class, so that it has borrowed none.
    pub(crate) fn within_quota(&self, queue: &QueueSpec, kind: DeviceKind, model: &str) -> bool {
        let class = class_of(queue, kind, model);
        let Some(quota) = queue.quota.get(&class) else { return false };
        let counts = |kind: DeviceKind, model: &str| class_of(queue, kind, model) == class;
        let used = self.in_and_below(queue, &class, &counts, false);
        used <= u64::from(*quota) * u64::from(WHOLE_DEVICE)
    }
}

/// Returns the class of a queue's quota that a device counts in: its model's own, else its kind.
fn class_of(queue: &QueueSpec, kind: DeviceKind, model: &str) -> String {
    let own = queue.quota.keys().filter(|class| !["cpu", "gpu"].contains(&class.as_str()));
    let own = own.into_iter().find(|class| is_called(model, class));
    own.cloned().unwrap_or_else(|| kind_word(kind).to_owned())
}
