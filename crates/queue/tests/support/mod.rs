//! A second tree of queues, written from the rules of `docs/scheduling.md`: it keeps only what jobs
//! hold, and works out everything anew whenever it is asked.
#![allow(dead_code)]

use std::collections::BTreeMap;

use drumline_queue::{Charge, QueueId, Tree, means};
use drumline_spec::{DeviceKind, QueueSpec};
use drumline_types::{QueueName, Timestamp};

pub(crate) const T: Timestamp = Timestamp(0);

/// The models of the fleet: what their kind is, and how many devices there are.
pub(crate) const MODELS: [(DeviceKind, &str, u64); 5] = [
    (DeviceKind::Cpu, "", 0),
    (DeviceKind::Gpu, "", 0),
    (DeviceKind::Gpu, "NVIDIA H100", 20),
    (DeviceKind::Gpu, "NVIDIA A100", 12),
    (DeviceKind::Cpu, "EPYC", 9),
];

/// The queues and what their jobs hold, in thousandths by model.
#[derive(Debug, Clone, Default)]
pub(crate) struct Books {
    pub(crate) specs: BTreeMap<QueueName, QueueSpec>,
    pub(crate) held: BTreeMap<QueueName, [u64; MODELS.len()]>,
}

pub(crate) type At<'a> = Option<&'a QueueName>;

/// A limit that would be passed.
pub(crate) type Passed = (Option<QueueName>, String, u64, u64, u64, u64);

impl Books {
    pub(crate) fn charge(&mut self, queue: &QueueName, charge: &Charge, add: bool) {
        let held = self.held.entry(queue.clone()).or_default();
        for (model, amount) in charge {
            let of_model = &mut held[model.index()];
            *of_model = if add { *of_model + amount } else { of_model.saturating_sub(*amount) };
        }
    }

    /// The queue, those above it, and the fleet (`None`).
    pub(crate) fn way<'a>(&'a self, queue: At<'a>) -> Vec<At<'a>> {
        let mut way = vec![queue];
        let mut at = queue;
        while let Some(name) = at {
            at = self.specs[name].parent.as_ref();
            way.push(at);
        }
        way
    }

    pub(crate) fn children<'a>(&'a self, queue: At<'a>) -> Vec<&'a QueueName> {
        self.specs.values().filter(|s| s.parent.as_ref() == queue).map(|s| &s.name).collect()
    }

    pub(crate) fn used(&self, queue: At<'_>, model: usize) -> u64 {
        self.held
            .iter()
            .filter(|(name, _)| self.specs.contains_key(*name))
            .filter(|(name, _)| self.way(Some(name)).contains(&queue))
            .map(|(_, held)| held[model])
            .sum()
    }

    /// The classes of a queue, in their order: its entries, then the kinds that it has none for.
    pub(crate) fn classes(&self, queue: At<'_>) -> Vec<String> {
        let mut classes: Vec<String> =
            queue.map_or_else(Vec::new, |name| self.specs[name].quota.keys().cloned().collect());
        for kind in ["cpu", "gpu"] {
            if !classes.iter().any(|class| class == kind) {
                classes.push(kind.to_owned());
            }
        }
        classes
    }

    pub(crate) fn class_of(&self, queue: At<'_>, model: usize) -> String {
        let (kind, name, _) = MODELS[model];
        let named = |class: &&String| !["cpu", "gpu"].contains(&class.as_str());
        let classes = self.classes(queue);
        let own = classes.iter().filter(named).find(|class| means(class, name));
        own.cloned().unwrap_or_else(|| kind.as_str().to_owned())
    }

    pub(crate) fn used_class(&self, queue: At<'_>, class: &str) -> u64 {
        let of_class = (0..MODELS.len()).filter(|&model| self.class_of(queue, model) == class);
        of_class.map(|model| self.used(queue, model)).sum()
    }

    /// The class of the queue above that a class of a queue counts in.
    fn above(&self, parent: At<'_>, class: &str) -> String {
        if ["cpu", "gpu"].contains(&class) || self.classes(parent).iter().any(|c| c == class) {
            return class.to_owned();
        }
        let meant = MODELS.iter().find(|(_, name, _)| means(class, name));
        meant.map_or("gpu", |(kind, ..)| kind.as_str()).to_owned()
    }

    fn below<'a>(&'a self, queue: At<'a>, class: &'a str) -> Vec<(&'a QueueName, String)> {
        let mut below = Vec::new();
        for child in self.children(queue) {
            for of_child in self.classes(Some(child)) {
                if self.above(queue, &of_child) == class {
                    below.push((child, of_child));
                }
            }
        }
        below
    }

    fn limit_of(of: &Option<BTreeMap<String, u32>>, class: &str) -> Option<u64> {
        of.as_ref()?.get(class).map(|&devices| u64::from(devices) * 1000)
    }

    pub(crate) fn quota(&self, queue: At<'_>, class: &str) -> Option<u64> {
        self.specs[queue?].quota.get(class).map(|&devices| u64::from(devices) * 1000)
    }

    pub(crate) fn nominal(&self, queue: At<'_>, class: &str) -> u64 {
        self.quota(queue, class).unwrap_or_else(|| {
            self.below(queue, class).iter().map(|(q, c)| self.nominal(Some(q), c)).sum()
        })
    }

    fn kept(&self, queue: At<'_>, class: &str) -> u64 {
        let (Some(name), Some(quota)) = (queue, self.quota(queue, class)) else { return 0 };
        let lent = Self::limit_of(&self.specs[name].lending_limit, class);
        lent.map_or(0, |lent| quota.saturating_sub(lent))
    }

    /// What queues below keep and do not use.
    pub(crate) fn extra(&self, queue: At<'_>, class: &str) -> u64 {
        let out = |(child, of_child): &(&QueueName, String)| {
            let counts = self.counts(Some(child), of_child).max(self.kept(Some(child), of_child));
            counts - self.used_class(Some(child), of_child)
        };
        self.below(queue, class).iter().map(out).sum()
    }

    /// What a queue counts for: its use, and what queues below keep and do not use.
    pub(crate) fn counts(&self, queue: At<'_>, class: &str) -> u64 {
        self.used_class(queue, class) + self.extra(queue, class)
    }

    fn limit(&self, queue: At<'_>, class: &str) -> Option<u64> {
        match queue {
            Some(name) => {
                let borrow = Self::limit_of(&self.specs[name].borrowing_limit, class)?;
                Some(self.quota(queue, class)? + borrow)
            }
            None if self.extra(queue, class) > 0 => {
                let of_kind = MODELS.iter().filter(|(kind, ..)| kind.as_str() == class);
                Some(of_kind.map(|(.., devices)| devices * 1000).sum())
            }
            None => None,
        }
    }

    /// The first limit on the way to the root that a charge would pass: the queue, the class, the
    /// limit, by how much more the queue would count, what is used of it and what is kept.
    pub(crate) fn check(&self, queue: &QueueName, charge: &Charge) -> Result<(), Passed> {
        let mut after = self.clone();
        after.charge(queue, charge, true);
        for at in self.way(Some(queue)) {
            for class in self.classes(at) {
                let (was, is) = (self.counts(at, &class), after.counts(at, &class));
                if let Some(limit) = after.limit(at, &class)
                    && is > was
                    && is > limit
                {
                    let kept = after.extra(at, &class);
                    let used = was.saturating_sub(kept);
                    return Err((at.cloned(), class, limit, is - was, used, kept));
                }
            }
        }
        Ok(())
    }

    pub(crate) fn within(&self, queue: At<'_>, charge: &Charge) -> bool {
        charge.iter().all(|(model, _)| {
            let class = self.class_of(queue, model.index());
            let same = charge.iter().filter(|(m, _)| self.class_of(queue, m.index()) == class);
            let more: u64 = same.map(|(_, amount)| amount).sum();
            self.used_class(queue, &class) + more <= self.nominal(queue, &class)
        })
    }

    pub(crate) fn borrows(&self, queue: At<'_>, charge: &Charge) -> bool {
        charge.iter().any(|(model, _)| {
            let class = self.class_of(queue, model.index());
            self.used_class(queue, &class) > self.nominal(queue, &class)
        })
    }

    /// Where the ways of two queues to the root part.
    pub(crate) fn fork<'a>(
        &'a self,
        a: &'a QueueName,
        b: &'a QueueName,
    ) -> Option<(&'a QueueName, &'a QueueName)> {
        let (mut a, mut b) = (self.way(Some(a)), self.way(Some(b)));
        loop {
            match (a.pop()?, b.pop()?) {
                (x, y) if x == y => {}
                (x, y) => return Some((x?, y?)),
            }
        }
    }

    pub(crate) fn may_reclaim(
        &self,
        claimant: &QueueName,
        claim: &Charge,
        holder: &QueueName,
        held: &Charge,
    ) -> bool {
        let Some((mine, theirs)) = self.fork(claimant, holder) else { return false };
        let way = self.way(Some(holder));
        let end = way.iter().position(|at| *at == Some(theirs)).unwrap();
        self.within(Some(mine), claim) && way[..=end].iter().all(|at| self.borrows(*at, held))
    }

    /// The use beyond quota and the use, each of its dominant class, over the devices that there
    /// are and the weight; in 2^-32.
    pub(crate) fn share(&self, queue: &QueueName) -> (u64, u64) {
        let weight = u128::from(self.specs[queue].weight);
        let mut share = (0, 0);
        for class in self.classes(Some(queue)) {
            let of_class = (0..MODELS.len()).filter(|&m| self.class_of(Some(queue), m) == class);
            let all: u64 = of_class.map(|model| MODELS[model].2 * 1000).sum();
            let used = self.used_class(Some(queue), &class);
            let part = |amount: u64| {
                let part = (u128::from(amount) << 32) / u128::from(all.max(1)) / weight;
                u64::try_from(part).unwrap_or(u64::MAX)
            };
            let beyond = used.saturating_sub(self.nominal(Some(queue), &class));
            share = (share.0.max(part(beyond)), share.1.max(part(used)));
        }
        share
    }
}

/// Returns an empty tree that knows the models.
pub(crate) fn fleet(half_life_ms: u64) -> Tree {
    let mut tree = Tree::new(half_life_ms);
    for (kind, name, devices) in MODELS {
        let model = tree.model(kind, name, T);
        tree.resize(model, 0, devices * 1000);
    }
    tree
}

pub(crate) fn name(name: &str) -> QueueName {
    name.parse().unwrap()
}

pub(crate) fn spec(name: &str, parent: Option<&str>) -> QueueSpec {
    let mut spec = QueueSpec::open(name.parse().unwrap());
    spec.parent = parent.map(|parent| parent.parse().unwrap());
    spec
}

pub(crate) fn id(tree: &Tree, queue: At<'_>) -> QueueId {
    queue.map_or(QueueId::FLEET, |queue| tree.find(queue).unwrap())
}
