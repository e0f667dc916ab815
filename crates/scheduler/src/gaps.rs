//! Gaps that are nearly big enough for a gang: the nodes and domains in which the fewest devices
//! lack, found by counts, so that only those who are in the way there are looked at.
//!
//! It moves nobody and judges nobody: `consolidate` decides who may be asked to move.

use drumline_cluster::{DomainAt, Health, LevelAt, NodeAt, Pool, Snapshot, Topology, state};
use drumline_spec::{Gang, is_mig_instance};
use drumline_types::JobId;

use crate::site;

/// Domains of one level that are looked at, those that lack least first.
const DOMAINS_MAX: usize = 4;

/// Nodes that are looked at in the domains of one level.
const NODES_MAX: usize = 256;

/// Where devices have to come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Per {
    Node,
    /// In a domain of this level.
    Level(LevelAt),
    /// In the domain that holds the whole gang.
    Whole,
}

/// What a gang needs to have together.
#[derive(Debug, Clone)]
pub(crate) struct Need {
    per: Per,
    /// Devices that have to be in one place.
    size: u64,
    /// How many such places.
    count: u64,
    ranks: u64,
    /// The whole gang must be in one domain of a level at least so deep.
    depth: u32,
}

/// A node or domain that lacks devices of a gap's size.
#[derive(Debug, Clone)]
pub(crate) struct Gap {
    /// A number made from its name.
    pub(crate) key: u64,
    /// Devices that lack.
    pub(crate) lack: u64,
    /// Who holds each device that could be freed.
    pub(crate) held: Vec<Vec<JobId>>,
}

/// A domain in which a gang would fit if gaps in it were closed.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    pub(crate) domain: DomainAt,
    /// How many gaps have to be closed, by the counts.
    pub(crate) missing: u64,
    pub(crate) gaps: Vec<Gap>,
}

impl Need {
    pub(crate) fn of(gang: &Gang, topology: &Topology) -> Self {
        let ranks = u64::from(gang.ranks.max(1));
        let mut need = Self {
            per: Per::Whole,
            size: u64::from(gang.node_group.max(1)).min(ranks),
            count: 1,
            ranks,
            depth: 0,
        };
        let mut runs: Option<(u32, LevelAt, u64)> = None;
        for rule in gang.topology.iter().filter(|rule| rule.required) {
            let whole = rule.ranks == 0 || u64::from(rule.ranks) >= ranks;
            if rule.level == "node" {
                let size = if whole { ranks } else { u64::from(rule.ranks) };
                need.size = need.size.max(size);
                continue;
            }
            let Some(level) = topology.level(&rule.level) else { continue };
            let depth = topology.level_depth(level);
            if whole {
                need.depth = need.depth.max(depth);
            } else if runs.is_none_or(|(deepest, ..)| depth > deepest) {
                runs = Some((depth, level, u64::from(rule.ranks)));
            }
        }
        if need.size > 1 {
            need.per = Per::Node;
        } else if let Some((_, level, run)) = runs {
            (need.per, need.size) = (Per::Level(level), run);
        } else {
            need.size = ranks;
        }
        need.count = ranks.div_ceil(need.size);
        need
    }

    /// Returns the levels in whose domains the whole gang may be, the innermost first. Where it is
    /// on one node, domains do not matter.
    pub(crate) fn levels(&self, topology: &Topology) -> Vec<LevelAt> {
        let mut levels = topology.levels_inside_out();
        if self.per == Per::Node && self.count == 1 {
            return levels.pop().into_iter().collect();
        }
        levels.retain(|level| topology.level_depth(*level) >= self.depth);
        levels
    }
}

/// A domain with what it lacks by the counts.
struct Nearly<'a> {
    domain: DomainAt,
    key: u64,
    lack: u64,
    missing: u64,
    pools: &'a [u32],
}

/// Returns the domains of a level that lack least, with their gaps. What is kept for `own` is free
/// for it: the caller lets go of it first. Returns also how many holders were looked at.
pub(crate) fn sites(
    fleet: &Snapshot,
    gang: &Gang,
    need: &Need,
    own: &JobId,
    level: LevelAt,
) -> (Vec<Site>, u64) {
    let models = models(fleet, gang);
    let topology = fleet.topology();
    let mut near: Vec<Nearly<'_>> = Vec::new();
    for &domain in topology.at_level(level) {
        let key = topology.place(domain).key();
        for pools in &models {
            if let Some((lack, missing)) = lacks(fleet, need, pools, domain) {
                near.push(Nearly { domain, key, lack, missing, pools });
            }
        }
    }
    // The models are in the order in which they are tried.
    near.sort_by_key(|near| (near.lack, near.key));
    near.truncate(DOMAINS_MAX);
    let each = NODES_MAX / near.len().max(1);
    let sites: Vec<Site> = near
        .into_iter()
        .map(|near| Site {
            domain: near.domain,
            missing: near.missing,
            gaps: gaps(fleet, need, near.pools, near.domain, own, each),
        })
        .collect();
    let looked = sites.iter().flat_map(|site| &site.gaps).map(|gap| gap.held.len() as u64).sum();
    (sites, looked)
}

/// Returns, for each model that will do, the pools that the gang may use.
fn models(fleet: &Snapshot, gang: &Gang) -> Vec<Vec<u32>> {
    let open = |model: u32| {
        let of =
            |(_, pool): &(u32, &Pool)| pool.model() == model && pool.open_to(&gang.tolerations);
        fleet.pools().filter(of).map(|(at, _)| at).collect::<Vec<u32>>()
    };
    let of_kind = fleet.stocks().filter(|(_, stock)| stock.kind() == gang.device);
    if gang.models.is_empty() {
        let whole = of_kind.filter(|(_, stock)| !is_mig_instance(stock.model()));
        return whole.map(|(model, _)| open(model)).collect();
    }
    let of_kind: Vec<(u32, &str)> = of_kind.map(|(at, stock)| (at, stock.model())).collect();
    let wanted = site::models(fleet, gang);
    let named = |wanted: &String| of_kind.iter().find(|(_, model)| model == wanted);
    wanted.iter().filter_map(named).map(|(model, _)| open(*model)).collect()
}

/// Returns the devices and the gaps that a domain lacks by the counts; `None`: even empty it would
/// not hold the gang.
fn lacks(fleet: &Snapshot, need: &Need, pools: &[u32], domain: DomainAt) -> Option<(u64, u64)> {
    let usable: u64 = pools.iter().map(|&pool| fleet.pool(pool).counts(domain).usable()).sum();
    if usable < need.ranks {
        return None;
    }
    // How many places lack how much to the next whole gap.
    let mut short: Vec<(u64, u64)> = Vec::new();
    let mut have = 0;
    match need.per {
        Per::Whole => {
            let free = free(fleet, pools, domain);
            have = free / need.size;
            short.push((need.size - free % need.size, 1));
        }
        Per::Level(level) => {
            for part in below(fleet.topology(), domain, level) {
                let free = free(fleet, pools, part);
                have += free / need.size;
                short.push((need.size - free % need.size, 1));
            }
        }
        Per::Node => {
            for &pool in pools {
                for (free, &nodes) in (0u64..).zip(fleet.pool(pool).counts(domain).by_free()) {
                    have += u64::from(nodes) * (free / need.size);
                    short.push((need.size - free % need.size, u64::from(nodes)));
                }
            }
        }
    }
    let missing = need.count.saturating_sub(have);
    short.sort_unstable();
    let (mut left, mut lack) = (missing, 0);
    for (devices, places) in short {
        let closed = left.min(places);
        lack += closed * devices;
        left -= closed;
    }
    Some((lack + left * need.size, missing))
}

fn free(fleet: &Snapshot, pools: &[u32], domain: DomainAt) -> u64 {
    pools.iter().map(|&pool| fleet.pool(pool).counts(domain).free()).sum()
}

/// Returns the domains of a level in or at `domain`, by name.
fn below(topology: &Topology, domain: DomainAt, level: LevelAt) -> Vec<DomainAt> {
    let mut found = Vec::new();
    let mut open = vec![domain];
    while let Some(at) = open.pop() {
        let place = topology.place(at);
        if place.level() == level {
            found.push(at);
            continue;
        }
        let from = open.len();
        open.extend(place.children());
        open[from..].reverse();
    }
    found
}

/// Returns the gaps of a domain that lack least, on so many nodes at most.
fn gaps(
    fleet: &Snapshot,
    need: &Need,
    pools: &[u32],
    domain: DomainAt,
    own: &JobId,
    nodes: usize,
) -> Vec<Gap> {
    let topology = fleet.topology();
    if need.per == Per::Node {
        let near = nodes_by_lack(fleet, need.size, pools, domain, nodes);
        return near
            .into_iter()
            .map(|(pool, node)| {
                let state = fleet.at(node);
                let free = u64::from(state.free_in_pool(pool));
                let mut held = Vec::new();
                take_held(fleet, pool, node, own, &mut held);
                Gap { key: state.key(), lack: need.size - free % need.size, held }
            })
            .collect();
    }
    let mut parts = match need.per {
        Per::Level(level) => below(topology, domain, level),
        Per::Node | Per::Whole => vec![domain],
    };
    let lack = |part: DomainAt| need.size - free(fleet, pools, part) % need.size;
    parts.sort_by_key(|part| (lack(*part), topology.place(*part).key()));
    let mut left = nodes;
    let mut gaps = Vec::new();
    for part in parts {
        if left == 0 {
            break;
        }
        let near = nodes_by_lack(fleet, u64::MAX, pools, part, left);
        left -= near.len();
        let mut held = Vec::new();
        for (pool, node) in near {
            take_held(fleet, pool, node, own, &mut held);
        }
        gaps.push(Gap { key: topology.place(part).key(), lack: lack(part), held });
    }
    gaps
}

/// Returns the nodes in a domain that lack least to the next multiple of `size` free devices, then
/// by domain and key.
fn nodes_by_lack(
    fleet: &Snapshot,
    size: u64,
    pools: &[u32],
    domain: DomainAt,
    most: usize,
) -> Vec<(u32, NodeAt)> {
    let mut classes: Vec<(u64, u32, u32)> = Vec::new();
    for &pool in pools {
        for (free, &nodes) in (0u32..).zip(fleet.pool(pool).counts(domain).by_free()) {
            if nodes > 0 {
                classes.push((size - u64::from(free) % size, free, pool));
            }
        }
    }
    // Of one model, so that the pools differ in taints only; their numbers decide nothing else.
    classes.sort_unstable();
    let mut found = Vec::new();
    for (_, free, pool) in classes {
        let counted = fleet.pool(pool);
        let mut open = vec![domain];
        while let Some(at) = open.pop() {
            let counts = counted.counts(at);
            if counts.by_free().get(free as usize).is_none_or(|&nodes| nodes == 0) {
                continue;
            }
            let right_here = counts
                .order()
                .range((free, 0, state::NODE_FIRST)..(free + 1, 0, state::NODE_FIRST));
            for (_, _, node) in right_here {
                if found.len() == most {
                    return found;
                }
                found.push((pool, *node));
            }
            let from = open.len();
            open.extend(fleet.topology().place(at).children());
            open[from..].reverse();
        }
    }
    found
}

/// Adds the holders of each device of a node that would be free if they left.
fn take_held(fleet: &Snapshot, pool: u32, node: NodeAt, own: &JobId, held: &mut Vec<Vec<JobId>>) {
    let state = fleet.at(node);
    for index in state.in_pool(pool) {
        let device = &state.node().devices[index as usize];
        let external = state.node().external.devices.get(&index).is_some_and(|used| *used > 0);
        let kept = state.reserved(index).is_some_and(|job| job != own);
        if device.health != Health::Healthy || external || kept {
            continue;
        }
        let mut holders: Vec<JobId> = state.holders(index).cloned().collect();
        holders.dedup();
        if !holders.is_empty() {
            held.push(holders);
        }
    }
}
