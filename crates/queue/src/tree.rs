//! The tree of queues: what each may use, what it uses, and what it has used lately.
//!
//! Amounts are thousandths of a device. `docs/scheduling.md` states the rules; nothing here knows
//! jobs or nodes.

use std::collections::BTreeMap;

use drumline_spec::{DeviceKind, QueueSpec};
use drumline_types::{QueueName, Timestamp};

use crate::amounts::{History, Share, Short};
use crate::decay::towards;
use crate::models::{ModelId, Models, means};

/// The deepest tree: a path longer than this is refused.
pub const DEPTH_MAX: usize = 32;

/// Thousandths of devices by model: what a gang holds, or would.
pub type Charge = Vec<(ModelId, u64)>;

/// A queue of the tree. It means nothing after the next change of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(usize);

impl QueueId {
    /// The fleet itself: the parent of every root queue.
    pub const FLEET: Self = Self(0);
}

/// Why a queue takes no job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Closed {
    /// There is no such queue.
    Missing,
    /// It has queues below it, this one among them.
    Inner(QueueName),
    /// It, or this queue above it, is held.
    Held(QueueName),
}

/// Fraction bits of a decayed mean.
const MEAN_BITS: u32 = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Cell {
    /// A model's short name, or `None` for what of `kind` has no cell of its own.
    model: Option<String>,
    kind: Option<DeviceKind>,
    quota: Option<u64>,
    /// The quota, or the sum of the children's where none is named.
    nominal: u64,
    borrow: Option<u64>,
    /// What it does not lend of its quota.
    kept: u64,
    used: u64,
    /// What queues below keep and do not use.
    extra: u64,
    /// The parent's cell that this one's unused quota counts in.
    up: usize,
}

impl Cell {
    fn effective(&self) -> u64 {
        self.used + self.extra
    }

    fn limit(&self) -> Option<u64> {
        Some(self.quota?.saturating_add(self.borrow?))
    }

    fn out(&self) -> u64 {
        self.effective().max(self.kept) - self.used
    }

    fn class(&self) -> &str {
        self.model.as_deref().unwrap_or_else(|| self.kind.map_or("", DeviceKind::as_str))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Queue {
    spec: QueueSpec,
    parent: Option<usize>,
    /// By name.
    children: Vec<usize>,
    depth: usize,
    cells: Vec<Cell>,
    /// Per model.
    cell_of: Vec<usize>,
    used: Vec<u64>,
    mean: Vec<u64>,
    at: Timestamp,
}

/// The queues of the fleet and their use.
#[derive(Debug, Clone)]
pub struct Tree {
    half_life_ms: u64,
    specs: BTreeMap<QueueName, QueueSpec>,
    models: Models,
    /// Per model.
    capacity: Vec<u64>,
    queues: Vec<Queue>,
    ids: BTreeMap<QueueName, usize>,
    /// What the jobs of each queue hold, also of queues that are gone.
    held: BTreeMap<QueueName, Vec<u64>>,
}

impl Tree {
    /// Returns a tree without queues.
    #[must_use]
    pub fn new(half_life_ms: u64) -> Self {
        let mut tree = Self {
            half_life_ms,
            specs: BTreeMap::new(),
            models: Models::default(),
            capacity: Vec::new(),
            queues: Vec::new(),
            ids: BTreeMap::new(),
            held: BTreeMap::new(),
        };
        // What is charged before its model is known.
        tree.models.intern(DeviceKind::Cpu, "");
        tree.models.intern(DeviceKind::Gpu, "");
        tree.rebuild(Timestamp(0));
        tree
    }

    /// Returns the models that were seen.
    #[must_use]
    pub fn models(&self) -> &Models {
        &self.models
    }

    /// Returns the number of a model.
    pub fn model(&mut self, kind: DeviceKind, name: &str, now: Timestamp) -> ModelId {
        let before = self.models.len();
        let id = self.models.intern(kind, name);
        if self.models.len() > before {
            self.rebuild(now);
        }
        id
    }

    /// Returns the number that stands for a device of a kind whose model is not known (yet).
    #[must_use]
    pub fn unknown(kind: DeviceKind) -> ModelId {
        Models::unknown(kind)
    }

    /// Returns whether a queue, or one above it, has a quota for a model by name.
    #[must_use]
    pub fn names_models(&self, queue: QueueId) -> bool {
        self.path(queue).any(|q| self.queues[q.0].cells.iter().any(|cell| cell.model.is_some()))
    }

    /// Counts devices of a model in or out of the fleet, in thousandths.
    pub fn resize(&mut self, model: ModelId, less: u64, more: u64) {
        if let Some(capacity) = self.capacity.get_mut(model.index()) {
            *capacity = (*capacity + more).saturating_sub(less);
        }
    }

    /// Returns the fleet's devices of a model, in thousandths.
    #[must_use]
    pub fn capacity(&self, model: ModelId) -> u64 {
        self.capacity.get(model.index()).copied().unwrap_or(0)
    }

    /// Returns every queue's settings, parents before their children, then by name.
    #[must_use]
    pub fn specs(&self) -> Vec<&QueueSpec> {
        let mut queues: Vec<&Queue> = self.queues.iter().skip(1).collect();
        queues.sort_by(|a, b| (a.depth, &a.spec.name).cmp(&(b.depth, &b.spec.name)));
        queues.into_iter().map(|queue| &queue.spec).collect()
    }

    /// Makes or changes a queue.
    ///
    /// # Errors
    /// What is wrong with it and what would help; nothing is changed then.
    pub fn set(&mut self, spec: QueueSpec, now: Timestamp) -> Result<(), String> {
        if spec.weight == 0 {
            return Err("its weight is 0; give it at least 1, or hold the queue".to_owned());
        }
        let mut above = spec.parent.as_ref();
        let mut depth = 1;
        while let Some(name) = above {
            if *name == spec.name {
                return Err(format!("it would be below itself, through {}", path_text(&spec)));
            }
            let Some(parent) = self.specs.get(name) else {
                return Err(format!("its parent {name} does not exist; create that queue first"));
            };
            above = parent.parent.as_ref();
            depth += 1;
        }
        let below = self.ids.get(&spec.name).map_or(0, |&id| self.height(id));
        if depth + below > DEPTH_MAX {
            return Err(format!("the tree would be deeper than {DEPTH_MAX} queues"));
        }
        self.age_all(now);
        self.specs.insert(spec.name.clone(), spec);
        self.rebuild(now);
        Ok(())
    }

    /// Takes a queue away. What its jobs hold is charged again if it comes back.
    ///
    /// # Errors
    /// When queues are below it.
    pub fn remove(&mut self, name: &QueueName, now: Timestamp) -> Result<(), String> {
        if let Some(child) = self.specs.values().find(|spec| spec.parent.as_ref() == Some(name)) {
            return Err(format!("queue {} is below it; delete that one first", child.name));
        }
        self.age_all(now);
        self.specs.remove(name);
        self.rebuild(now);
        Ok(())
    }

    /// Returns the queue that jobs name, if they may start from it.
    ///
    /// # Errors
    /// [`Closed`].
    pub fn leaf(&self, name: &QueueName) -> Result<QueueId, Closed> {
        let &at = self.ids.get(name).ok_or(Closed::Missing)?;
        if let Some(&child) = self.queues[at].children.first() {
            return Err(Closed::Inner(self.queues[child].spec.name.clone()));
        }
        match self.path(QueueId(at)).find(|&q| self.queues[q.0].spec.held) {
            Some(held) => Err(Closed::Held(self.queues[held.0].spec.name.clone())),
            None => Ok(QueueId(at)),
        }
    }

    /// Returns the queue of this name, open or not.
    #[must_use]
    pub fn find(&self, name: &QueueName) -> Option<QueueId> {
        self.ids.get(name).map(|&at| QueueId(at))
    }

    /// Returns the queue's settings.
    #[must_use]
    pub fn spec(&self, queue: QueueId) -> &QueueSpec {
        &self.queues[queue.0].spec
    }

    /// Returns how many queues there are, the fleet among them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queues.len()
    }

    /// Returns whether there is no queue.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queues.len() <= 1
    }

    /// Returns a queue's place in per-queue tables.
    #[must_use]
    pub fn index(&self, queue: QueueId) -> usize {
        queue.0
    }

    /// Returns the queue above; `None` for the fleet.
    #[must_use]
    pub fn parent(&self, queue: QueueId) -> Option<QueueId> {
        self.queues[queue.0].parent.map(QueueId)
    }

    /// Returns the queue and those above it up to the roots, without the fleet.
    pub fn path(&self, queue: QueueId) -> impl Iterator<Item = QueueId> + '_ {
        std::iter::successors(Some(queue), |&q| self.parent(q)).filter(|&q| q != QueueId::FLEET)
    }

    /// Returns what a queue and those below it use of a model, in thousandths.
    #[must_use]
    pub fn used(&self, queue: QueueId, model: ModelId) -> u64 {
        self.queues[queue.0].used.get(model.index()).copied().unwrap_or(0)
    }

    /// Returns what a queue may always use of the class that a model counts in, with that class.
    #[must_use]
    pub fn nominal(&self, queue: QueueId, model: ModelId) -> (u64, &str) {
        let cell = self.cell(queue.0, model);
        (cell.nominal, cell.class())
    }

    /// Counts devices as held by jobs of a queue, which may be one that does not exist.
    pub fn charge(&mut self, queue: &QueueName, charge: &Charge, now: Timestamp) {
        self.count(queue, charge, now, true);
    }

    /// Takes back what [`Tree::charge`] counted.
    pub fn release(&mut self, queue: &QueueName, charge: &Charge, now: Timestamp) {
        self.count(queue, charge, now, false);
    }

    fn count(&mut self, queue: &QueueName, charge: &Charge, now: Timestamp, add: bool) {
        let models = self.models.len();
        if !self.held.contains_key(queue) {
            self.held.insert(queue.clone(), Vec::new());
        }
        if let Some(held) = self.held.get_mut(queue) {
            held.resize(models.max(held.len()), 0);
            for &(model, amount) in charge {
                change(&mut held[model.index()], amount, add);
            }
        }
        if let Some(&at) = self.ids.get(queue) {
            self.age(at, now);
            self.shift(at, charge, add);
        }
    }

    /// Counts devices without a trace in the history: for a look at what would be, undone at once.
    pub fn suppose(&mut self, queue: QueueId, charge: &Charge, add: bool) {
        self.shift(queue.0, charge, add);
    }

    /// Returns whether the limits on the way to the root leave room for so much more.
    ///
    /// # Errors
    /// The [`Short`] limit nearest to the queue.
    pub fn check(&mut self, queue: QueueId, charge: &Charge) -> Result<(), Short> {
        let before: Vec<u64> = self.effective_on_path(queue.0);
        self.shift(queue.0, charge, true);
        let after = self.effective_on_path(queue.0);
        let mut found = None;
        let mut next = 0;
        let mut at = Some(queue.0);
        while let Some(q) = at {
            for cell in &self.queues[q].cells {
                let (was, is) = (before[next], after[next]);
                next += 1;
                if is <= was || found.is_some() {
                    continue;
                }
                let limit = if q == 0 { self.physical(cell) } else { cell.limit() };
                if let Some(limit) = limit.filter(|&limit| is > limit) {
                    found = Some(Short {
                        queue: QueueId(q),
                        class: cell.class().to_owned(),
                        used: was - cell.extra.min(was),
                        limit,
                        need: is - was,
                        kept: cell.extra,
                    });
                }
            }
            at = self.queues[q].parent;
        }
        self.shift(queue.0, charge, false);
        found.map_or(Ok(()), Err)
    }

    /// What the fleet has for a class, where queues keep some of it; `None`: nobody keeps any.
    fn physical(&self, cell: &Cell) -> Option<u64> {
        let of_kind = self.models.iter().filter(|(_, kind, _)| cell.kind == Some(*kind));
        (cell.extra > 0).then(|| of_kind.map(|(model, ..)| self.capacity(model)).sum())
    }

    fn effective_on_path(&self, queue: usize) -> Vec<u64> {
        let mut all = Vec::with_capacity(16);
        let mut at = Some(queue);
        while let Some(q) = at {
            all.extend(self.queues[q].cells.iter().map(Cell::effective));
            at = self.queues[q].parent;
        }
        all
    }

    /// Returns whether a queue stays within what it may always use with so much more.
    #[must_use]
    pub fn within(&self, queue: QueueId, charge: &Charge) -> bool {
        charge.iter().all(|&(model, _)| {
            let of_queue = &self.queues[queue.0];
            let at = of_queue.cell_of.get(model.index()).copied().unwrap_or(0);
            let more: u64 = charge
                .iter()
                .filter(|(other, _)| of_queue.cell_of.get(other.index()) == Some(&at))
                .map(|(_, amount)| amount)
                .sum();
            of_queue.cells[at].used + more <= of_queue.cells[at].nominal
        })
    }

    /// Returns whether a queue uses more than it may always use of the class of one of the models.
    #[must_use]
    pub fn borrows(&self, queue: QueueId, charge: &Charge) -> bool {
        charge.iter().any(|&(model, _)| {
            let cell = self.cell(queue.0, model);
            cell.used > cell.nominal
        })
    }

    /// Returns the two queues at which the ways of two queues to the root part; `None` when one
    /// is on the other's way.
    #[must_use]
    pub fn fork(&self, a: QueueId, b: QueueId) -> Option<(QueueId, QueueId)> {
        let (mut a, mut b) = (a.0, b.0);
        while self.queues[a].depth > self.queues[b].depth {
            a = self.queues[a].parent?;
        }
        while self.queues[b].depth > self.queues[a].depth {
            b = self.queues[b].parent?;
        }
        if a == b {
            return None;
        }
        while self.queues[a].parent != self.queues[b].parent {
            a = self.queues[a].parent?;
            b = self.queues[b].parent?;
        }
        Some((QueueId(a), QueueId(b)))
    }

    /// Returns whether a job of `claimant` may take back what a job of `holder` holds: where their
    /// ways to the root part, the claimant's side stays within its quota with the job, and every
    /// queue on the holder's side has borrowed.
    #[must_use]
    pub fn may_reclaim(
        &self,
        claimant: QueueId,
        claim: &Charge,
        holder: QueueId,
        held: &Charge,
    ) -> bool {
        self.all_borrowed(claimant, holder, held)
            && self.fork(claimant, holder).is_some_and(|(mine, _)| self.within(mine, claim))
    }

    /// Returns whether every queue on the holder's side, from where its way to the root parts from
    /// the claimant's, has borrowed.
    #[must_use]
    pub fn all_borrowed(&self, claimant: QueueId, holder: QueueId, held: &Charge) -> bool {
        let Some((_, theirs)) = self.fork(claimant, holder) else { return false };
        let mut at = holder;
        loop {
            if !self.borrows(at, held) {
                return false;
            }
            if at == theirs {
                return true;
            }
            let Some(parent) = self.parent(at) else { return false };
            at = parent;
        }
    }

    /// Returns how much a queue has against its siblings.
    #[must_use]
    pub fn share(&self, queue: QueueId, now: Timestamp) -> Share {
        let of_queue = &self.queues[queue.0];
        let elapsed = now.since_ms(of_queue.at);
        let mut share = Share::default();
        for (at, cell) in of_queue.cells.iter().enumerate() {
            let (mut used, mut capacity) = (0u64, 0u64);
            for model in (0..of_queue.used.len()).filter(|&m| of_queue.cell_of[m] == at) {
                used += self.recent(of_queue, model, elapsed);
                capacity += self.capacity[model];
            }
            if used == 0 {
                continue;
            }
            let weight = u128::from(of_queue.spec.weight.max(1));
            let part = |amount: u64| {
                let part = (u128::from(amount) << 32) / u128::from(capacity.max(1)) / weight;
                u64::try_from(part).unwrap_or(u64::MAX)
            };
            share.borrowed = share.borrowed.max(part(used.saturating_sub(cell.nominal)));
            share.used = share.used.max(part(used));
        }
        share
    }

    /// The mean of present and decayed past use, in thousandths.
    fn recent(&self, queue: &Queue, model: usize, elapsed_ms: u64) -> u64 {
        let used = queue.used[model];
        if self.half_life_ms == 0 {
            return used;
        }
        let level = used << MEAN_BITS;
        let mean = towards(queue.mean[model], level, elapsed_ms, self.half_life_ms) >> MEAN_BITS;
        used.midpoint(mean)
    }

    /// Returns what every queue has used lately.
    #[must_use]
    pub fn history(&self) -> Vec<History> {
        let mut all: Vec<History> = self
            .queues
            .iter()
            .enumerate()
            .map(|(at, queue)| History {
                queue: (at > 0).then(|| queue.spec.name.clone()),
                at: queue.at,
                mean: self
                    .models
                    .iter()
                    .map(|(model, kind, name)| {
                        let mean = queue.mean.get(model.index()).copied().unwrap_or(0);
                        (kind, name.to_owned(), mean)
                    })
                    .filter(|(.., mean)| *mean > 0)
                    .collect(),
            })
            .collect();
        all.sort_by(|a, b| a.queue.cmp(&b.queue));
        for queue in &mut all {
            queue.mean.sort();
        }
        all
    }

    /// Puts back what [`Tree::history`] returned, when everything else is in place.
    pub fn remember(&mut self, history: Vec<History>) {
        for past in &history {
            for (kind, name, _) in &past.mean {
                self.model(*kind, name, past.at);
            }
        }
        for past in history {
            let at = match &past.queue {
                None => 0,
                Some(name) => match self.ids.get(name) {
                    Some(&at) => at,
                    None => continue,
                },
            };
            self.queues[at].at = past.at;
            self.queues[at].mean.fill(0);
            for (kind, name, mean) in past.mean {
                let model = self.models.intern(kind, &name);
                self.queues[at].mean[model.index()] = mean;
            }
        }
    }

    fn cell(&self, queue: usize, model: ModelId) -> &Cell {
        let queue = &self.queues[queue];
        &queue.cells[queue.cell_of.get(model.index()).copied().unwrap_or(0)]
    }

    fn height(&self, at: usize) -> usize {
        self.queues[at].children.iter().map(|&child| 1 + self.height(child)).max().unwrap_or(0)
    }

    /// Brings the means of a queue and those above it up to `now`, before their use changes.
    fn age(&mut self, queue: usize, now: Timestamp) {
        let mut at = Some(queue);
        while let Some(q) = at {
            let half_life_ms = self.half_life_ms;
            let of_queue = &mut self.queues[q];
            let elapsed = now.since_ms(of_queue.at);
            if elapsed > 0 {
                for (mean, used) in of_queue.mean.iter_mut().zip(&of_queue.used) {
                    if *mean > 0 || *used > 0 {
                        *mean = towards(*mean, used << MEAN_BITS, elapsed, half_life_ms);
                    }
                }
                of_queue.at = now;
            }
            at = of_queue.parent;
        }
    }

    fn age_all(&mut self, now: Timestamp) {
        for at in 0..self.queues.len() {
            if self.queues[at].children.is_empty() {
                self.age(at, now);
            }
        }
    }

    fn shift(&mut self, queue: usize, charge: &Charge, add: bool) {
        // What the queue below keeps unused counts here, and changes with its use.
        let mut below: Vec<(usize, u64, u64)> = Vec::new();
        let mut at = Some(queue);
        while let Some(q) = at {
            let of_queue = &mut self.queues[q];
            let before: Vec<u64> = of_queue.cells.iter().map(Cell::out).collect();
            for &(model, amount) in charge {
                change(&mut of_queue.used[model.index()], amount, add);
                let cell = of_queue.cell_of[model.index()];
                change(&mut of_queue.cells[cell].used, amount, add);
            }
            for &(cell, less, more) in &below {
                let extra = &mut of_queue.cells[cell].extra;
                *extra = (*extra + more).saturating_sub(less);
            }
            below.clear();
            for (cell, &was) in of_queue.cells.iter().zip(&before) {
                let is = cell.out();
                if is != was {
                    below.push((cell.up, was, is));
                }
            }
            at = of_queue.parent;
        }
    }

    /// Makes the tables anew after a change of queues or models.
    fn rebuild(&mut self, now: Timestamp) {
        let past = self.history();
        self.capacity.resize(self.models.len(), 0);
        let mut root = QueueSpec::open(QueueName::default_queue());
        root.weight = 1;
        self.queues = vec![self.queue(root, None, 0, now)];
        self.ids.clear();
        // Parents first: each round adds the queues whose parent is there.
        for depth in 1..=DEPTH_MAX {
            let before = self.ids.len();
            let due: Vec<QueueSpec> = self
                .specs
                .values()
                .filter(|spec| !self.ids.contains_key(&spec.name))
                .filter(|spec| spec.parent.as_ref().is_none_or(|p| self.ids.contains_key(p)))
                .cloned()
                .collect();
            for spec in due {
                let parent = spec.parent.as_ref().and_then(|p| self.ids.get(p).copied());
                let parent = parent.unwrap_or(0);
                let id = self.queues.len();
                self.ids.insert(spec.name.clone(), id);
                let queue = self.queue(spec, Some(parent), depth, now);
                self.queues.push(queue);
                self.queues[parent].children.push(id);
            }
            if self.ids.len() == before {
                break;
            }
        }
        self.link();
        let held = std::mem::take(&mut self.held);
        for (name, amounts) in held {
            if amounts.iter().all(|&amount| amount == 0) {
                continue;
            }
            if let Some(&at) = self.ids.get(&name) {
                let charge: Charge = self
                    .models
                    .iter()
                    .filter_map(|(model, ..)| Some((model, *amounts.get(model.index())?)))
                    .filter(|(_, amount)| *amount > 0)
                    .collect();
                self.shift(at, &charge, true);
            }
            self.held.insert(name, amounts);
        }
        self.remember_known(past);
    }

    fn remember_known(&mut self, past: Vec<History>) {
        for history in past {
            let at = match &history.queue {
                None => Some(0),
                Some(name) => self.ids.get(name).copied(),
            };
            let Some(at) = at else { continue };
            self.queues[at].at = history.at;
            for (kind, name, mean) in history.mean {
                let model = self.models.intern(kind, &name);
                self.queues[at].mean[model.index()] = mean;
            }
        }
    }

    fn queue(&self, spec: QueueSpec, parent: Option<usize>, depth: usize, now: Timestamp) -> Queue {
        const MILLI: u64 = drumline_spec::gang::WHOLE_DEVICE as u64;
        let mut cells = Vec::new();
        let limit = |of: &Option<BTreeMap<String, u32>>, class: &str| {
            of.as_ref().and_then(|of| of.get(class)).map(|&devices| u64::from(devices) * MILLI)
        };
        let kind_of = |class: &str| match class {
            "cpu" => Some(DeviceKind::Cpu),
            "gpu" => Some(DeviceKind::Gpu),
            _ => None,
        };
        for (class, &devices) in &spec.quota {
            let quota = u64::from(devices) * MILLI;
            let kind = kind_of(class);
            cells.push(Cell {
                model: kind.is_none().then(|| class.clone()),
                kind,
                quota: Some(quota),
                nominal: quota,
                borrow: limit(&spec.borrowing_limit, class),
                kept: limit(&spec.lending_limit, class)
                    .map_or(0, |lent| quota.saturating_sub(lent)),
                used: 0,
                extra: 0,
                up: 0,
            });
        }
        for kind in [DeviceKind::Cpu, DeviceKind::Gpu] {
            if !cells.iter().any(|cell| cell.kind == Some(kind)) {
                cells.push(Cell {
                    model: None,
                    kind: Some(kind),
                    quota: None,
                    nominal: 0,
                    borrow: None,
                    kept: 0,
                    used: 0,
                    extra: 0,
                    up: 0,
                });
            }
        }
        let cell_of: Vec<usize> = self
            .models
            .iter()
            .map(|(_, kind, name)| {
                let own = cells.iter().position(|cell| {
                    cell.model.as_deref().is_some_and(|wanted| means(wanted, name))
                });
                let of_kind = || cells.iter().position(|cell| cell.kind == Some(kind));
                own.or_else(of_kind).unwrap_or(0)
            })
            .collect();
        let models = self.models.len();
        Queue {
            spec,
            parent,
            children: Vec::new(),
            depth,
            cells,
            cell_of,
            used: vec![0; models],
            mean: vec![0; models],
            at: now,
        }
    }

    /// Joins the cells of children to their parents': where unused quota counts, and the quota of
    /// a queue that names none.
    fn link(&mut self) {
        for child in (1..self.queues.len()).rev() {
            let Some(parent) = self.queues[child].parent else { continue };
            for cell in 0..self.queues[child].cells.len() {
                let of_child = &self.queues[child].cells[cell];
                // A model that the fleet has is counted by its kind where the parent does not name
                // it; one that it has not, as a GPU.
                let kind = of_child.kind.or_else(|| {
                    let named = of_child.model.as_deref()?;
                    self.models
                        .iter()
                        .find(|(.., name)| means(named, name))
                        .map(|(_, kind, _)| kind)
                });
                let kind = kind.unwrap_or(DeviceKind::Gpu);
                let cells = &self.queues[parent].cells;
                let up = of_child
                    .model
                    .as_ref()
                    .and_then(|model| cells.iter().position(|c| c.model.as_ref() == Some(model)))
                    .or_else(|| cells.iter().position(|c| c.kind == Some(kind)))
                    .unwrap_or(0);
                self.queues[child].cells[cell].up = up;
                let (nominal, out) = {
                    let cell = &self.queues[child].cells[cell];
                    (cell.nominal, cell.out())
                };
                let above = &mut self.queues[parent].cells[up];
                if above.quota.is_none() {
                    above.nominal += nominal;
                }
                above.extra += out;
            }
        }
    }
}

fn change(amount: &mut u64, by: u64, add: bool) {
    *amount = if add { *amount + by } else { amount.saturating_sub(by) };
}

fn path_text(spec: &QueueSpec) -> String {
    spec.parent.as_ref().map_or_else(String::new, ToString::to_string)
}
