//! The fleet at one moment, kept up to date by small changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drumline_spec::{DeviceKind, Gang, WHOLE_DEVICE};
use drumline_types::{Attempt, Bytes, DeviceId, JobId, NodeName};
use serde::{Deserialize, Serialize};

use crate::node::{Node, Taint};
use crate::pool::Pool;
use crate::state::{Lane, NodeAt, NodeState, Slot};
use crate::stock::Stock;
use crate::topology::{DomainAt, Topology, text_key};
use crate::trial::Trial;

/// Counts the changes of a snapshot. A plan names the revision that it was made from.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// Why a change was refused. The snapshot is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// A device is held by another job.
    #[error("{device} is held by {holder}, so {job} cannot have it")]
    Held {
        /// The device asked for.
        device: DeviceId,
        /// Who asked.
        job: JobId,
        /// Who has it.
        holder: JobId,
    },
    /// The job holds devices already.
    #[error("{job} holds devices of attempt {attempt} already")]
    Committed {
        /// The job.
        job: JobId,
        /// The attempt that holds them.
        attempt: Attempt,
    },
    /// The same device is named more often than it has room for.
    #[error("{device} is named twice for {job}")]
    Twice {
        /// The device.
        device: DeviceId,
        /// The job.
        job: JobId,
    },
    /// A device is kept for another job.
    #[error("{device} is kept for {holder}, so it cannot be kept for {job}")]
    Reserved {
        /// The device asked for.
        device: DeviceId,
        /// Who asked.
        job: JobId,
        /// Who it is kept for.
        holder: JobId,
    },
    /// A rank would get nothing of a device, or more than all of it.
    #[error("{job} asks for {share_milli} thousandths of a device; 1 to 1000 can be had")]
    Share {
        /// The job.
        job: JobId,
        /// What it asks for.
        share_milli: u32,
    },
}

/// What each rank of a gang takes of its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Slice {
    /// Thousandths of its device.
    pub share_milli: u32,
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Main memory.
    pub memory: Bytes,
}

impl Default for Slice {
    /// A whole device and nothing else.
    fn default() -> Self {
        Self { share_milli: WHOLE_DEVICE, cpu_milli: 0, memory: Bytes(0) }
    }
}

impl Slice {
    /// Returns what each rank of `gang` takes.
    #[must_use]
    pub fn of(gang: &Gang) -> Self {
        Self { share_milli: gang.share_milli, cpu_milli: gang.cpu_milli, memory: gang.memory }
    }
}

/// The devices that one attempt of a job holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commitment {
    /// The job.
    pub job: JobId,
    /// The attempt that they are held for.
    pub attempt: Attempt,
    /// The devices, in rank order; one that several ranks share is named for each.
    pub devices: Vec<DeviceId>,
    /// What each rank takes.
    #[serde(default)]
    pub slice: Slice,
}

/// A commitment with the places of its devices.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    /// Shared with the copies of the snapshot.
    pub(crate) commitment: Arc<Commitment>,
    spots: Arc<[(NodeAt, u32)]>,
}

impl Held {
    /// Returns the nodes that it is on, each once for a run of its devices.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeAt> + '_ {
        self.spots.chunk_by(|a, b| a.0 == b.0).map(|on_node| on_node[0].0)
    }
}

/// What is kept for a job, with its places.
pub(crate) type Kept = Vec<(DeviceId, NodeAt)>;

/// The fleet at one moment: nodes, their devices and who holds them.
///
/// Every change costs as much as it changes. A clone copies everything; to try something, use
/// [`Snapshot::trial`], which works in place.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    revision: Revision,
    /// The nodes of the fleet: the order of every walk over it.
    present: BTreeMap<NodeName, NodeAt>,
    /// Nodes that are not part of the fleet at present, with devices that are held.
    absent: BTreeMap<NodeName, NodeAt>,
    states: Vec<NodeState>,
    vacant: Vec<NodeAt>,
    commitments: BTreeMap<Arc<JobId>, Held>,
    reservations: BTreeMap<Arc<JobId>, Kept>,
    topology: Topology,
    stocks: Vec<Stock>,
    stock_of: BTreeMap<(DeviceKind, String), u32>,
    pools: Vec<Pool>,
    pool_of: BTreeMap<(u32, Vec<Taint>), u32>,
    /// While true, what becomes free is not news: it may be undone.
    pub(crate) trying: bool,
}

impl PartialEq for Snapshot {
    /// Compares what is there and who holds it.
    fn eq(&self, other: &Self) -> bool {
        self.revision == other.revision
            && self.nodes().map(NodeState::node).eq(other.nodes().map(NodeState::node))
            && self.commitments().eq(other.commitments())
            && self.reservations().eq(other.reservations())
    }
}

impl Eq for Snapshot {}

impl Snapshot {
    /// Returns an empty fleet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns how many changes led here.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub(crate) fn set_revision(&mut self, revision: Revision) {
        self.revision = revision;
    }

    /// Returns every node, by name.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = &NodeState> + Clone {
        self.present.values().map(|at| &self.states[at.index()])
    }

    /// Returns every node with its number, by name.
    pub fn numbered(&self) -> impl ExactSizeIterator<Item = (NodeAt, &NodeState)> + Clone {
        self.present.values().map(|at| (*at, &self.states[at.index()]))
    }

    /// Returns the node of this name.
    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&NodeState> {
        self.present.get(name).map(|at| &self.states[at.index()])
    }

    /// Returns the node of this number, as [`Counts::order`](crate::Counts::order) names it.
    #[must_use]
    pub fn at(&self, at: NodeAt) -> &NodeState {
        &self.states[at.index()]
    }

    /// Returns the tree of domains.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Returns every pool with its number, in no order that may decide anything.
    pub fn pools(&self) -> impl Iterator<Item = (u32, &Pool)> {
        (0u32..).zip(&self.pools)
    }

    /// Returns the pool of this number.
    #[must_use]
    pub fn pool(&self, pool: u32) -> &Pool {
        &self.pools[pool as usize]
    }

    /// Returns the device models there are or were, by kind and name, with their numbers.
    pub fn stocks(&self) -> impl Iterator<Item = (u32, &Stock)> {
        self.stock_of.values().map(|&at| (at, &self.stocks[at as usize]))
    }

    /// Returns the model of this number.
    #[must_use]
    pub fn stock(&self, model: u32) -> &Stock {
        &self.stocks[model as usize]
    }

    /// Returns a count that grows whenever something that a gang on `kind` and `models` could use
    /// may have become free, or usable. A gang that did not fit cannot fit while it stands still.
    /// What is freed in a [`Trial`] counts when the trial is committed.
    #[must_use]
    pub fn grown(&self, kind: DeviceKind, models: &[String]) -> u64 {
        self.stocks
            .iter()
            .filter(|stock| stock.kind() == kind)
            .filter(|stock| models.is_empty() || models.iter().any(|m| m == stock.model()))
            .map(|stock| stock.grown)
            .sum()
    }

    /// Returns every commitment, by job.
    pub fn commitments(&self) -> impl ExactSizeIterator<Item = &Commitment> {
        self.commitments.values().map(|held| &*held.commitment)
    }

    /// Returns what a job holds.
    #[must_use]
    pub fn commitment(&self, job: &JobId) -> Option<&Commitment> {
        self.commitments.get(job).map(|held| &*held.commitment)
    }

    /// Returns the nodes and indices of the devices that a job holds, in rank order: as
    /// [`Snapshot::commitment`] names them, without the names.
    #[must_use]
    pub fn spots(&self, job: &JobId) -> &[(NodeAt, u32)] {
        self.commitments.get(job).map_or(&[], |held| &held.spots)
    }

    /// Returns who holds a device, also when its node is not part of the fleet at present; of
    /// several, the first by name.
    #[must_use]
    pub fn holder(&self, device: &DeviceId) -> Option<&JobId> {
        let at = self.find(&device.node)?;
        self.states[at.index()].holder(device.index)
    }

    /// Returns every reservation, by job.
    pub fn reservations(&self) -> impl Iterator<Item = (&JobId, Vec<DeviceId>)> {
        self.reservations.iter().map(|(job, devices)| {
            (job.as_ref(), devices.iter().map(|(device, _)| device.clone()).collect())
        })
    }

    /// Returns the devices that are kept for a job.
    #[must_use]
    pub fn reservation(&self, job: &JobId) -> Option<Vec<DeviceId>> {
        let devices = self.reservations.get(job)?;
        Some(devices.iter().map(|(device, _)| device.clone()).collect())
    }

    /// Adds a node, or replaces what is known about it. Who holds its devices stays.
    pub fn upsert_node(&mut self, node: Node) {
        if self.node(&node.name).is_some_and(|known| *known.node() == node) {
            return;
        }
        let at = self.ensure(&node.name);
        let name = node.name.clone();
        if let Some(at) = self.absent.remove(&name) {
            self.present.insert(name, at);
        } else {
            self.withdraw(at);
        }
        self.settle(at, node);
        self.revision.0 += 1;
    }

    /// Takes a node out of the fleet. What jobs hold on it stays held until they release it, and
    /// is found again when the node comes back.
    pub fn remove_node(&mut self, name: &NodeName) -> Option<Node> {
        let at = self.present.remove(name)?;
        self.withdraw(at);
        let state = &mut self.states[at.index()];
        state.present = false;
        let gone = Arc::new(Node::new(name.clone(), Vec::new()));
        let node = std::mem::replace(&mut state.node, gone);
        self.absent.insert(name.clone(), at);
        self.forget_if_empty(at);
        self.revision.0 += 1;
        Some(Arc::unwrap_or_clone(node))
    }

    /// Gives whole devices to a job. A device of a node that is not known is accepted: after a
    /// restart of the control plane the jobs are read before their nodes are heard.
    ///
    /// # Errors
    /// [`ClusterError`] when a device is held or named twice, or the job holds devices already.
    pub fn commit(
        &mut self,
        job: &JobId,
        attempt: Attempt,
        devices: Vec<DeviceId>,
    ) -> Result<(), ClusterError> {
        let slice = Slice::default();
        self.hold(Commitment { job: job.clone(), attempt, devices, slice })
    }

    /// Gives devices, or parts of them, to a job, with the processor time and memory beside them.
    /// Only devices are refused: time and memory that are promised twice are `audit`'s to find.
    ///
    /// # Errors
    /// As [`Snapshot::commit`].
    pub fn hold(&mut self, commitment: Commitment) -> Result<(), ClusterError> {
        let (job, slice) = (&commitment.job, commitment.slice);
        if let Some(held) = self.commitments.get(job) {
            let attempt = held.commitment.attempt;
            return Err(ClusterError::Committed { job: job.clone(), attempt });
        }
        if !(1..=WHOLE_DEVICE).contains(&slice.share_milli) {
            let share_milli = slice.share_milli;
            return Err(ClusterError::Share { job: job.clone(), share_milli });
        }
        self.check_room(&commitment)?;
        let shared = Arc::new(job.clone());
        let mut spots = Vec::with_capacity(commitment.devices.len());
        let mut last: Option<(&NodeName, NodeAt)> = None;
        for device in &commitment.devices {
            let at = match last {
                Some((name, at)) if *name == device.node => at,
                _ => {
                    let at = self.ensure(&device.node);
                    if let Some((_, was)) = last.replace((&device.node, at)) {
                        self.refresh(was);
                    }
                    at
                }
            };
            spots.push((at, device.index));
            let held = shared.clone();
            self.touch(at, device.index, |slot| slot.add(held, slice.share_milli));
            let state = &mut self.states[at.index()];
            state.cpu_milli += slice.cpu_milli;
            state.memory += slice.memory.0;
        }
        if let Some((_, at)) = last {
            self.refresh(at);
        }
        let held = Held { commitment: Arc::new(commitment), spots: spots.into() };
        self.commitments.insert(shared, held);
        self.revision.0 += 1;
        Ok(())
    }

    fn check_room(&self, commitment: &Commitment) -> Result<(), ClusterError> {
        let share_milli = commitment.slice.share_milli;
        let mut asked: BTreeMap<(NodeAt, u32), u32> = BTreeMap::new();
        // Of nodes that nobody has heard of, nothing is held.
        let mut unheard: BTreeMap<&DeviceId, u32> = BTreeMap::new();
        let mut last: Option<(&NodeName, Option<NodeAt>)> = None;
        for device in &commitment.devices {
            let at = match last {
                Some((name, at)) if *name == device.node => at,
                _ => self.find(&device.node),
            };
            last = Some((&device.node, at));
            let (sum, slot) = match at {
                Some(at) => {
                    let slot = self.states[at.index()].slots.get(device.index as usize);
                    (asked.entry((at, device.index)).or_default(), slot)
                }
                None => (unheard.entry(device).or_default(), None),
            };
            *sum += share_milli;
            let held = slot.map_or(0, |slot| slot.held_milli);
            if held + *sum > WHOLE_DEVICE {
                let (device, job) = (device.clone(), commitment.job.clone());
                return Err(match slot.and_then(|slot| slot.first.as_deref()) {
                    Some(holder) => ClusterError::Held { device, job, holder: holder.clone() },
                    None => ClusterError::Twice { device, job },
                });
            }
        }
        Ok(())
    }

    /// Takes back everything that a job holds.
    pub fn release(&mut self, job: &JobId) -> Option<Commitment> {
        let Held { commitment, .. } = self.take(job)?;
        Some(Arc::unwrap_or_clone(commitment))
    }

    /// Takes back everything that a job holds. While trying, nodes that are no part of the fleet
    /// stay known, so that it can be given back.
    pub(crate) fn take(&mut self, job: &JobId) -> Option<Held> {
        let held = self.commitments.remove(job)?;
        let (slice, spots) = (held.commitment.slice, &held.spots);
        for (i, &(at, index)) in spots.iter().enumerate() {
            self.touch(at, index, |slot| slot.remove(job, slice.share_milli));
            let state = &mut self.states[at.index()];
            state.cpu_milli = state.cpu_milli.saturating_sub(slice.cpu_milli);
            state.memory = state.memory.saturating_sub(slice.memory.0);
            if spots.get(i + 1).is_none_or(|next| next.0 != at) {
                self.refresh(at);
                self.grow(at);
            }
        }
        self.revision.0 += 1;
        self.forget_empty(&held);
        Some(held)
    }

    /// Gives back what [`Snapshot::take`] has taken, when all is as it was then.
    pub(crate) fn give_back(&mut self, held: Held) {
        let slice = held.commitment.slice;
        let shared = Arc::new(held.commitment.job.clone());
        for (i, &(at, index)) in held.spots.iter().enumerate() {
            let holder = shared.clone();
            self.touch(at, index, |slot| slot.add(holder, slice.share_milli));
            let state = &mut self.states[at.index()];
            state.cpu_milli += slice.cpu_milli;
            state.memory += slice.memory.0;
            if held.spots.get(i + 1).is_none_or(|next| next.0 != at) {
                self.refresh(at);
            }
        }
        self.commitments.insert(shared, held);
        self.revision.0 += 1;
    }

    /// Forgets the nodes of what was taken that are no part of the fleet, unless this is a try.
    pub(crate) fn forget_empty(&mut self, held: &Held) {
        if !self.trying {
            for at in held.nodes().collect::<BTreeSet<_>>() {
                self.forget_if_empty(at);
            }
        }
    }

    /// Keeps devices for a job, whether or not others hold them now: they are not free for anybody
    /// else. Replaces what was kept for it before.
    ///
    /// # Errors
    /// [`ClusterError::Reserved`] when one is kept for another job.
    pub fn reserve(&mut self, job: &JobId, devices: Vec<DeviceId>) -> Result<(), ClusterError> {
        let mut last: Option<(&NodeName, Option<NodeAt>)> = None;
        for device in &devices {
            let at = match last {
                Some((name, at)) if *name == device.node => at,
                _ => self.find(&device.node),
            };
            last = Some((&device.node, at));
            let Some(at) = at else { continue };
            if let Some(holder) = self.states[at.index()].reserved(device.index)
                && holder != job
            {
                let (device, job, holder) = (device.clone(), job.clone(), holder.clone());
                return Err(ClusterError::Reserved { device, job, holder });
            }
        }
        self.unreserve(job);
        let mut kept = Kept::with_capacity(devices.len());
        for device in devices {
            let at = match kept.last() {
                Some((before, at)) if before.node == device.node => *at,
                _ => self.ensure(&device.node),
            };
            kept.push((device, at));
        }
        self.keep(job, kept);
        Ok(())
    }

    /// Keeps devices that are kept for nobody.
    pub(crate) fn keep(&mut self, job: &JobId, kept: Kept) {
        let shared = Arc::new(job.clone());
        for (i, (device, at)) in kept.iter().enumerate() {
            let holder = shared.clone();
            self.touch(*at, device.index, |slot| slot.reserved = Some(holder));
            if kept.get(i + 1).is_none_or(|next| next.1 != *at) {
                self.refresh(*at);
            }
        }
        self.reservations.insert(shared, kept);
        self.revision.0 += 1;
    }

    /// Lets go of the devices that are kept for a job, and returns them.
    pub fn unreserve(&mut self, job: &JobId) -> Option<Vec<DeviceId>> {
        let kept = self.let_go(job)?;
        Some(kept.into_iter().map(|(device, _)| device).collect())
    }

    /// Lets go of the devices that are kept for a job. While trying, nodes that are no part of the
    /// fleet stay known.
    pub(crate) fn let_go(&mut self, job: &JobId) -> Option<Kept> {
        let kept = self.reservations.remove(job)?;
        for (i, (device, at)) in kept.iter().enumerate() {
            self.touch(*at, device.index, |slot| slot.reserved = None);
            if kept.get(i + 1).is_none_or(|next| next.1 != *at) {
                self.refresh(*at);
                self.grow(*at);
            }
        }
        self.revision.0 += 1;
        self.forget_unkept(&kept);
        Some(kept)
    }

    /// Forgets the nodes of what was kept that are no part of the fleet, unless this is a try.
    pub(crate) fn forget_unkept(&mut self, kept: &Kept) {
        if !self.trying {
            for at in kept.iter().map(|(_, at)| *at).collect::<BTreeSet<_>>() {
                self.forget_if_empty(at);
            }
        }
    }

    /// Starts to try changes, in place. What is not committed is undone when the trial is dropped.
    #[must_use]
    pub fn trial(&mut self) -> Trial<'_> {
        Trial::new(self)
    }

    fn find(&self, name: &NodeName) -> Option<NodeAt> {
        self.present.get(name).or_else(|| self.absent.get(name)).copied()
    }

    fn ensure(&mut self, name: &NodeName) -> NodeAt {
        if let Some(at) = self.find(name) {
            return at;
        }
        let state = NodeState::absent(name.clone(), text_key(name.as_str()));
        let at = match self.vacant.pop() {
            Some(at) => {
                self.states[at.index()] = state;
                at
            }
            None => {
                self.states.push(state);
                NodeAt((self.states.len() - 1) as u32)
            }
        };
        self.absent.insert(name.clone(), at);
        at
    }

    pub(crate) fn forget_if_empty(&mut self, at: NodeAt) {
        let state = &self.states[at.index()];
        if !state.present && state.unheld() && self.absent.remove(&state.node.name).is_some() {
            self.vacant.push(at);
        }
    }

    /// Changes one device, and keeps count of the devices that are used in part.
    fn touch(&mut self, at: NodeAt, index: u32, change: impl FnOnce(&mut Slot)) {
        let state = &mut self.states[at.index()];
        let before = state.part_left(index);
        change(state.slot(index));
        let after = state.part_left(index);
        if before != after
            && let Some(lane) = state.lane_of.get(index as usize)
            && let Some(lane) = state.lanes.get(usize::from(*lane))
        {
            let partial = self.pools[lane.pool as usize].partial_mut();
            if let Some(left) = before {
                partial.remove(&(left, state.key, at, index));
            }
            if let Some(left) = after {
                partial.insert((left, state.key, at, index));
            }
        }
    }

    /// Counts a node's devices anew.
    fn refresh(&mut self, at: NodeAt) {
        let state = &mut self.states[at.index()];
        for lane in 0..state.lanes.len() {
            let is = state.amount(lane);
            let was = std::mem::replace(&mut state.lanes[lane].counted, is);
            if was != is {
                let pool = &mut self.pools[state.lanes[lane].pool as usize];
                pool.shift(&self.topology, state.place, (state.key, at), was, is);
            }
        }
    }

    pub(crate) fn grow(&mut self, at: NodeAt) {
        if self.trying {
            return;
        }
        for lane in &self.states[at.index()].lanes {
            self.stocks[self.pools[lane.pool as usize].model() as usize].grown += 1;
        }
    }

    /// Makes it last that a job holds no more of what it held.
    pub(crate) fn settle_taken(&mut self, held: &Held) {
        for at in held.nodes() {
            self.grow(at);
        }
        self.forget_empty(held);
    }

    /// Makes it last that devices are kept no more.
    pub(crate) fn settle_let_go(&mut self, kept: &Kept) {
        let mut last = None;
        for &(_, at) in kept {
            if last.replace(at) != Some(at) {
                self.grow(at);
            }
        }
        self.forget_unkept(kept);
    }

    /// Takes a node out of every count.
    fn withdraw(&mut self, at: NodeAt) {
        let state = &mut self.states[at.index()];
        if !state.present {
            return;
        }
        for index in 0..state.lane_of.len() as u32 {
            if let Some(left) = state.part_left(index) {
                let lane = usize::from(state.lane_of[index as usize]);
                let pool = state.lanes[lane].pool as usize;
                self.pools[pool].partial_mut().remove(&(left, state.key, at, index));
            }
        }
        for lane in std::mem::take(&mut state.lanes) {
            let pool = &mut self.pools[lane.pool as usize];
            self.stocks[pool.model() as usize].count(&state.node, -1);
            pool.shift(&self.topology, state.place, (state.key, at), lane.counted, None);
        }
        state.lane_of.clear();
        self.topology.leave(state.place, &state.node.topology);
    }

    /// Takes a node into every count.
    fn settle(&mut self, at: NodeAt, node: Node) {
        let place = self.topology.enter(&node.topology);
        let mut taints = node.taints.clone();
        taints.sort();
        taints.dedup();
        let mut lanes: Vec<Lane> = Vec::new();
        let mut lane_of = Vec::with_capacity(node.devices.len());
        for device in &node.devices {
            let model = self.model(device.kind, &device.model, device.memory);
            let pool = self.pool_for(model, &taints);
            let lane = lanes.iter().position(|lane| lane.pool == pool).unwrap_or_else(|| {
                lanes.push(Lane { pool, counted: None });
                lanes.len() - 1
            });
            lane_of.push(lane as u16);
        }
        for lane in &lanes {
            let model = self.pools[lane.pool as usize].model();
            self.stocks[model as usize].count(&node, 1);
        }
        let state = &mut self.states[at.index()];
        state.node = Arc::new(node);
        state.present = true;
        state.place = place;
        state.lanes = lanes;
        state.lane_of = lane_of;
        for index in 0..state.lane_of.len() as u32 {
            if let Some(left) = state.part_left(index) {
                let lane = usize::from(state.lane_of[index as usize]);
                let pool = state.lanes[lane].pool as usize;
                self.pools[pool].partial_mut().insert((left, state.key, at, index));
            }
        }
        self.refresh(at);
        self.grow(at);
    }

    fn model(&mut self, kind: DeviceKind, model: &str, memory: Bytes) -> u32 {
        let key = (kind, model.to_owned());
        if let Some(at) = self.stock_of.get(&key) {
            return *at;
        }
        let at = self.stocks.len() as u32;
        self.stocks.push(Stock::new(kind, model, memory));
        self.stock_of.insert(key, at);
        at
    }

    fn pool_for(&mut self, model: u32, taints: &[Taint]) -> u32 {
        let key = (model, taints.to_vec());
        if let Some(at) = self.pool_of.get(&key) {
            return *at;
        }
        let at = self.pools.len() as u32;
        self.pools.push(Pool::new(model, key.1.clone()));
        self.pool_of.insert(key, at);
        at
    }

    /// Returns the nodes in a domain that have devices of `pool`, in no order that may decide
    /// anything.
    pub fn nodes_in(&self, pool: u32, domain: DomainAt) -> Vec<NodeAt> {
        let mut found = Vec::new();
        let mut open = vec![domain];
        while let Some(at) = open.pop() {
            let counts = self.pool(pool).counts(at);
            if counts.nodes() == 0 {
                continue;
            }
            found.extend(counts.order().iter().map(|(_, _, node)| *node));
            open.extend(self.topology.place(at).children());
        }
        found
    }
}
