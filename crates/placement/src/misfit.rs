//! Why a gang was not placed: the numbers that led to it, and the words for them.

use std::collections::BTreeMap;
use std::fmt;

use drumline_cluster::{DomainAt, Ineligible, Pool, Slice, Snapshot};
use drumline_spec::{DeviceKind, Gang, Parallelism};
use drumline_types::{Explanation, Reason};

use crate::place::{models, sizes};
use crate::scoring::Constraints;
use crate::shape::{Shape, Whole};
use crate::survey::{Basis, Survey};

/// What was missing for a gang, counted in devices unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Misfit {
    /// The ranks that it needs at least, and how many of them share a node.
    pub need: u32,
    /// Ranks of a group on one node.
    pub group: u32,
    /// The kind of device.
    pub kind: DeviceKind,
    /// The models that will do; empty: any.
    pub models: Vec<String>,
    /// What the required topology asks for, in words, such as `in one rack`.
    pub wanted: Vec<String>,
    /// A level that it requires and no node names.
    pub unknown_level: Option<String>,
    /// Devices there are, in whatever state, and the ranks that they could hold in groups.
    pub all: u64,
    /// Ranks that all devices could hold, were they idle, healthy and open.
    pub all_room: u64,
    /// Ranks that the eligible devices could hold under the rules, were they idle.
    pub idle_room: u64,
    /// Ranks that could be placed now, under the rules.
    pub room: u64,
    /// Free devices, and the nodes that they are on.
    pub free: u64,
    /// Nodes with free devices.
    pub free_nodes: u64,
    /// The most free devices on one node.
    pub most_free: u32,
    /// The domain that holds the most, where the whole gang must be in one: its level, and ranks.
    pub largest: Option<(String, u64)>,
    /// Eligible devices that jobs or others use, or that are kept for others.
    pub busy: u64,
    /// Healthy devices on nodes that take no new work of this gang, by cause.
    pub closed: BTreeMap<Ineligible, u64>,
    /// Failed devices, by evidence.
    pub failed: BTreeMap<String, u64>,
    /// Whether devices would do, and processor time or memory beside them is short.
    pub short_of_cpu_or_memory: bool,
    /// Whether what is missing is a device for the leader.
    pub leader: bool,
}

impl Misfit {
    /// Counts what the fleet has for a gang that does not fit.
    pub(crate) fn new(
        fleet: &Snapshot,
        gang: &Gang,
        split: Parallelism,
        constraints: &Constraints,
    ) -> Self {
        let least = sizes(gang, split, constraints.most).first().copied().unwrap_or(gang.ranks);
        let mut misfit = Self {
            need: least,
            group: gang.node_group,
            kind: gang.device,
            models: gang.models.clone(),
            ..Self::default()
        };
        let workers = least.saturating_sub(u32::from(gang.leader.is_some()));
        let shape = match Shape::new(gang, workers, 0, fleet.topology()) {
            Ok(shape) => shape,
            Err(unknown) => {
                misfit.unknown_level = Some(unknown.0);
                let all = models(fleet, gang).into_iter().map(|model| fleet.stock(model).all());
                misfit.all = all.sum();
                return misfit;
            }
        };
        misfit.wanted = wanted(gang);
        for model in models(fleet, gang) {
            misfit.count(fleet, gang, model, &shape);
        }
        misfit.leader = gang.leader.is_some() && misfit.room >= u64::from(workers);
        misfit
    }

    fn count(&mut self, fleet: &Snapshot, gang: &Gang, model: u32, shape: &Shape) {
        let stock = fleet.stock(model);
        let (slice, tolerations) = (Slice::of(gang), &gang.tolerations);
        let mut free = Survey::new(fleet, model, tolerations, slice, Basis::Free);
        let mut idle = Survey::new(fleet, model, tolerations, slice, Basis::Idle);
        let root = DomainAt::ROOT;
        let usable = idle.devices(root);
        self.all += stock.all();
        self.free += free.devices(root);
        self.busy += usable - free.devices(root);
        for (_, pool) in &free.pools {
            let by_free = pool.counts(root).by_free();
            self.free_nodes += by_free.iter().skip(1).map(|nodes| u64::from(*nodes)).sum::<u64>();
            let most = by_free.iter().rposition(|nodes| *nodes > 0).unwrap_or(0);
            self.most_free = self.most_free.max(most as u32);
        }
        for (cause, devices) in stock.closed() {
            *self.closed.entry(*cause).or_default() += devices;
        }
        let tainted: u64 = fleet
            .pools()
            .filter(|(_, pool)| pool.model() == model && !pool.open_to(tolerations))
            .map(|(_, pool)| pool.counts(root).usable())
            .sum();
        if tainted > 0 {
            *self.closed.entry(Ineligible::Tainted).or_default() += tainted;
        }
        for (evidence, devices) in stock.failed() {
            *self.failed.entry(evidence.clone()).or_default() += devices;
        }
        let per_device = u64::from(drumline_spec::WHOLE_DEVICE / slice.share_milli.max(1));
        let group = shape.group;
        let each = |(devices, nodes): (u64, &u32)| {
            devices * per_device / group * group * u64::from(*nodes)
        };
        let all_room: u64 = (0u64..).zip(stock.by_all()).map(each).sum();
        self.all_room = self.all_room.max(all_room);
        let by_devices = most_ranks(&free, shape).map_or(0, |most| most.1);
        let more = free.needs_more_than_devices();
        free.exact |= more;
        idle.exact |= more;
        self.idle_room = self.idle_room.max(most_ranks(&idle, shape).map_or(0, |most| most.1));
        if let Some((level, room)) = most_ranks(&free, shape) {
            self.short_of_cpu_or_memory |= by_devices >= shape.ranks && room < shape.ranks;
            if room >= self.room {
                self.room = room;
                self.largest = level.map(|level| (level, room));
            }
        }
    }

    /// Returns the reason in the one ordered list.
    #[must_use]
    pub fn reason(&self) -> Reason {
        let need = u64::from(self.need);
        let closed: u64 = self.closed.values().chain(self.failed.values()).sum();
        if self.all == 0 {
            Reason::NoMatchingDevice
        } else if self.unknown_level.is_some() {
            // Whatever ends or comes back, it does not fit the fleet as it is.
            Reason::ExceedsCluster
        } else if self.leader || self.short_of_cpu_or_memory {
            Reason::WaitingForDevices
        } else if self.padded(self.all_room) < need || self.idle_room + closed < need {
            Reason::ExceedsCluster
        } else if self.idle_room < need {
            Reason::NodesNotReady
        } else if self.free >= need {
            Reason::TopologyDoesNotFit
        } else {
            Reason::WaitingForDevices
        }
    }

    /// Returns the reason with its evidence.
    #[must_use]
    pub fn explanation(&self) -> Explanation {
        Explanation::new(self.reason(), self.to_string())
    }

    /// A gang whose last group is smaller is held where whole groups of its number are.
    fn padded(&self, room: u64) -> u64 {
        let group = u64::from(self.group.max(1));
        let padded = u64::from(self.need).div_ceil(group) * group;
        if room >= padded { room.max(u64::from(self.need)) } else { room }
    }

    /// Returns what people call the devices.
    fn devices(&self) -> String {
        if self.models.is_empty() {
            return format!("{} devices", self.kind.as_str());
        }
        format!("{} devices", self.models.join(" or "))
    }

    fn excluded(&self) -> Vec<String> {
        let mut causes = Vec::new();
        if self.busy > 0 {
            causes.push(format!("{} busy", self.busy));
        }
        for (cause, devices) in &self.closed {
            causes.push(format!("{devices} on nodes {cause}"));
        }
        for (evidence, devices) in &self.failed {
            causes.push(format!("{devices} failed ({evidence})"));
        }
        causes
    }

    fn in_nodes(&self, ranks: u64) -> String {
        let group = u64::from(self.group.max(1));
        if group > 1 && ranks.is_multiple_of(group) {
            format!("{} x {group}", ranks / group)
        } else {
            ranks.to_string()
        }
    }
}

impl fmt::Display for Misfit {
    /// Writes one line: what is needed, what is there, what does not count, what would fit.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = self.devices();
        write!(f, "needs {} {devices}", self.need)?;
        if self.group > 1 {
            write!(f, " in groups of {} on one node", self.group)?;
        }
        for wanted in &self.wanted {
            write!(f, ", {wanted}")?;
        }
        if self.all == 0 {
            return write!(f, "; no node has {devices}");
        }
        if let Some(level) = &self.unknown_level {
            return write!(f, "; no node says which {level} it is in");
        }
        if self.reason() == Reason::ExceedsCluster {
            let could = self.all_room.min(self.idle_room + self.closed_and_failed());
            write!(f, "; the fleet has {} and could hold {could}", self.all)?;
        }
        write!(f, "; {} free on {} nodes", self.free, self.free_nodes)?;
        if self.free > 0 {
            write!(f, ", at most {} on one", self.most_free)?;
        }
        if let Some((level, room)) = &self.largest {
            write!(f, ", largest {level} {}", self.in_nodes(*room))?;
        }
        if self.short_of_cpu_or_memory {
            write!(f, ", too little processor time or memory beside them")?;
        }
        if self.leader {
            write!(f, ", but none for the leader")?;
        }
        let causes = self.excluded();
        if !causes.is_empty() {
            write!(f, "; not eligible: {}", causes.join(", "))?;
        }
        let whole = self.room / u64::from(self.group.max(1)) * u64::from(self.group.max(1));
        if whole > 0 && whole < u64::from(self.need) {
            write!(f, "; would fit with {whole} ranks")?;
        }
        Ok(())
    }
}

impl Misfit {
    fn closed_and_failed(&self) -> u64 {
        self.closed.values().chain(self.failed.values()).sum()
    }
}

/// Returns the most ranks that some place holds under the rules, with the level of that place
/// where the whole gang must be in one.
fn most_ranks(survey: &Survey<'_>, shape: &Shape) -> Option<(Option<String>, u64)> {
    let topology = survey.fleet.topology();
    let root = DomainAt::ROOT;
    match shape.whole {
        Whole::Node if survey.exact => {
            let nodes = survey.nodes_in(root).into_iter();
            let most = nodes.map(|(pool, node)| survey.ranks_on(pool, survey.fleet.at(node))).max();
            Some((None, u64::from(most.unwrap_or(0))))
        }
        Whole::Node => {
            let by = |pool: &Pool| match survey.basis {
                Basis::Free => pool.counts(root).by_free().iter().rposition(|n| *n > 0),
                Basis::Idle => pool.counts(root).by_usable().iter().rposition(|n| *n > 0),
            };
            let most = survey.pools.iter().filter_map(|(_, pool)| by(pool)).max();
            Some((None, most.unwrap_or(0) as u64))
        }
        Whole::Anywhere => {
            let step = shape.chain.len();
            let room = survey.room(shape, root, step);
            Some((None, room.full * shape.run(step) + room.tail))
        }
        Whole::Level(level) => {
            let step = shape.chain_within(level, topology);
            let ranks = |at: &DomainAt| {
                let room = survey.room(shape, *at, step);
                room.full * shape.run(step) + room.tail
            };
            let most = topology.at_level(level).iter().map(ranks).max()?;
            Some((Some(topology.level_name(level).to_owned()), most))
        }
    }
}

fn wanted(gang: &Gang) -> Vec<String> {
    let word = |rule: &drumline_spec::TopologyRule| match rule.ranks {
        0 => format!("all in one {}", rule.level),
        ranks => format!("each {ranks} in one {}", rule.level),
    };
    gang.topology.iter().filter(|rule| rule.required).map(word).collect()
}
