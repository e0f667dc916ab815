//! One gang on a fleet: models, sizes and wishes in turn, until something fits.

use drumline_cluster::{Commitment, Slice, Snapshot, Stock};
use drumline_spec::{Gang, Parallelism, WHOLE_DEVICE, is_mig_instance};
use drumline_types::{Attempt, DeviceId, JobId};

use crate::devices::pick;
use crate::fill::Part;
use crate::leader;
use crate::misfit::Misfit;
use crate::scoring::{Constraints, Scoring};
use crate::search::{Barred, Search};
use crate::shape::Shape;
use crate::survey::{Basis, Survey};

/// Where a gang goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// A device for each rank, in rank order.
    pub devices: Vec<DeviceId>,
    /// The split at this size.
    pub split: Parallelism,
    /// What each rank takes of its node.
    pub slice: Slice,
}

impl Placed {
    /// Returns what to hold for `job`.
    #[must_use]
    pub fn commitment(&self, job: &JobId, attempt: Attempt) -> Commitment {
        let (job, devices, slice) = (job.clone(), self.devices.clone(), self.slice);
        Commitment { job, attempt, devices, slice }
    }
}

/// Places one gang, whole.
///
/// The first of its models that holds it at the size that it wants goes before one that holds more;
/// of the sizes, the greatest that fits; of its wishes about topology, as many as can be had, the
/// first ones first. It costs about the domains looked at and the devices taken, and where ranks
/// need processor time, memory or parts of devices, at worst a look at each node.
///
/// # Errors
/// [`Misfit`], with what is missing. Nothing is placed in part.
pub fn place(
    fleet: &Snapshot,
    gang: &Gang,
    split: Parallelism,
    constraints: &Constraints,
) -> Result<Placed, Box<Misfit>> {
    try_place(fleet, gang, split, constraints)
        .ok_or_else(|| Box::new(Misfit::new(fleet, &sane(gang), split, constraints)))
}

/// Places one gang, whole, as [`place`] does; where it does not fit, it does not find out why.
#[must_use]
pub fn try_place(
    fleet: &Snapshot,
    gang: &Gang,
    split: Parallelism,
    constraints: &Constraints,
) -> Option<Placed> {
    let gang = &sane(gang);
    let mut best: Option<(u32, Vec<DeviceId>)> = None;
    for model in models(fleet, gang) {
        let attempt = Attempted { fleet, gang, split, constraints, model };
        let Some((ranks, devices)) = attempt.place() else { continue };
        let wanted = ranks.min(gang.ranks);
        if best.as_ref().is_none_or(|(most, _)| wanted > (*most).min(gang.ranks)) {
            let done = wanted == gang.ranks;
            best = Some((ranks, devices));
            if done {
                break;
            }
        }
    }
    let (ranks, devices) = best?;
    let split = resized(gang, split, ranks);
    Some(Placed { devices, split, slice: Slice::of(gang) })
}

/// Brings what cannot be into what can: every gang has a rank, and a rank some of its device.
fn sane(gang: &Gang) -> Gang {
    Gang {
        ranks: gang.ranks.max(1),
        node_group: gang.node_group.clamp(1, gang.ranks.max(1)),
        share_milli: gang.share_milli.clamp(1, WHOLE_DEVICE),
        ..gang.clone()
    }
}

/// Returns the numbers of the models that will do, in the order in which they are tried: as the
/// gang prefers, else the one with the least memory first. What MIG has divided is had by name alone:
/// who names nothing counts on a whole device.
pub(crate) fn models(fleet: &Snapshot, gang: &Gang) -> Vec<u32> {
    let mut of_kind: Vec<(u32, &Stock)> = fleet
        .stocks()
        .filter(|(_, stock)| stock.kind() == gang.device && stock.all() > 0)
        .collect();
    if gang.models.is_empty() {
        of_kind.retain(|(_, stock)| !is_mig_instance(stock.model()));
        of_kind.sort_by(|(_, a), (_, b)| (a.memory(), a.model()).cmp(&(b.memory(), b.model())));
        return of_kind.into_iter().map(|(at, _)| at).collect();
    }
    let named = |model: &String| {
        of_kind.iter().find(|(_, stock)| stock.model() == model).map(|(at, _)| *at)
    };
    gang.models.iter().filter_map(named).collect()
}

/// Returns the sizes that a gang may have, ascending; its wanted size is one of them.
pub(crate) fn sizes(gang: &Gang, split: Parallelism, most: Option<u32>) -> Vec<u32> {
    let Some(elastic) = gang.elastic else { return vec![gang.ranks] };
    let copy = split.tensor.saturating_mul(split.pipeline).max(1);
    let most = most.unwrap_or(u32::MAX).min(elastic.most);
    let step = elastic.step.max(1);
    let mut sizes: Vec<u32> = (elastic.least.max(1).div_ceil(step)..=most / step)
        .map(|copies| copies * step)
        .filter(|size| size % copy == 0)
        .collect();
    if gang.ranks <= most && !sizes.contains(&gang.ranks) {
        sizes.push(gang.ranks);
        sizes.sort_unstable();
    }
    sizes
}

/// Returns the split at another size: the copies of the model change.
fn resized(gang: &Gang, split: Parallelism, ranks: u32) -> Parallelism {
    if ranks == gang.ranks {
        return split;
    }
    let copy = split.tensor.saturating_mul(split.pipeline).max(1);
    Parallelism { data: ranks / copy, ..split }
}

/// The search on devices of one model.
struct Attempted<'a> {
    fleet: &'a Snapshot,
    gang: &'a Gang,
    split: Parallelism,
    constraints: &'a Constraints,
    model: u32,
}

impl Attempted<'_> {
    /// Returns the greatest size that fits, and its devices.
    fn place(&self) -> Option<(u32, Vec<DeviceId>)> {
        let sizes = sizes(self.gang, self.split, self.constraints.most);
        if let [only] = sizes.as_slice() {
            return self.at_size(*only).map(|devices| (*only, devices));
        }
        // What holds a size holds every smaller one.
        let fitting = sizes.partition_point(|size| self.holds(*size));
        sizes[..fitting].iter().rev().find_map(|size| Some((*size, self.at_size(*size)?)))
    }

    fn survey(&self) -> Survey<'_> {
        let (gang, slice) = (self.gang, Slice::of(self.gang));
        Survey::new(self.fleet, self.model, &gang.tolerations, slice, Basis::Free)
    }

    fn workers(&self, ranks: u32) -> u32 {
        ranks - u32::from(self.gang.leader.is_some())
    }

    fn holds(&self, ranks: u32) -> bool {
        let workers = self.workers(ranks);
        let Ok(shape) = Shape::new(self.gang, workers, 0, self.fleet.topology()) else {
            return false;
        };
        let mut survey = self.survey();
        survey.exact |= survey.needs_more_than_devices();
        let (constraints, barred) = (self.constraints, &Barred::default());
        workers == 0 || Search { survey: &survey, shape: &shape, constraints, barred }.holds()
    }

    fn at_size(&self, ranks: u32) -> Option<Vec<DeviceId>> {
        let workers = self.workers(ranks);
        if workers == 0 {
            return self.leader_alone();
        }
        let wishes = self.gang.topology.iter().filter(|rule| !rule.required).count();
        let mut last: Option<Shape> = None;
        for wishes in (0..=wishes).rev() {
            let shape = Shape::new(self.gang, workers, wishes, self.fleet.topology()).ok()?;
            if last.as_ref() == Some(&shape) {
                continue;
            }
            if let Some(devices) = self.shaped(&shape) {
                return Some(devices);
            }
            last = Some(shape);
        }
        None
    }

    /// Places a shape, with its leader.
    fn shaped(&self, shape: &Shape) -> Option<Vec<DeviceId>> {
        let mut survey = self.survey();
        // The baselines fill node by node and ask each, so a domain must be asked too.
        survey.exact |=
            self.constraints.scoring != Scoring::Drumline && survey.needs_more_than_devices();
        let mut barred = Barred::default();
        loop {
            let constraints = self.constraints;
            let search = Search { survey: &survey, shape, constraints, barred: &barred };
            let parts = search.parts()?;
            if !survey.exact && survey.needs_more_than_devices() {
                let fits = |part: &Part| {
                    survey.ranks_on(part.pool, self.fleet.at(part.node)) >= part.ranks
                };
                if !parts.iter().all(fits) {
                    survey.exact = true;
                    continue;
                }
            }
            let devices = self.devices(&parts);
            let Some(kind) = self.gang.leader else { return Some(devices) };
            match leader::near(self.fleet, self.gang, kind, &parts, &devices) {
                Ok(leader) => {
                    return Some(std::iter::once(leader).chain(devices).collect());
                }
                Err(leader::Nowhere::Inside(domain)) => barred.domains.insert(domain),
                Err(leader::Nowhere::On(node)) => barred.nodes.insert(node),
                Err(leader::Nowhere::Anywhere) => return None,
            };
        }
    }

    fn leader_alone(&self) -> Option<Vec<DeviceId>> {
        let kind = self.gang.leader?;
        leader::near(self.fleet, self.gang, kind, &[], &[]).ok().map(|leader| vec![leader])
    }

    fn devices(&self, parts: &[Part]) -> Vec<DeviceId> {
        let mut devices = Vec::with_capacity(self.gang.ranks as usize);
        for part in parts {
            let state = self.fleet.at(part.node);
            let picked = pick(state, part.pool, self.gang.share_milli, part.ranks, &[]);
            debug_assert_eq!(picked.len(), part.ranks as usize, "a node has what was counted");
            let name = &state.node().name;
            devices.extend(picked.into_iter().map(|index| DeviceId { node: name.clone(), index }));
        }
        devices
    }
}
