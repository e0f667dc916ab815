//! Finds the place for a gang under one set of rules: the innermost domain that holds it.

use std::collections::BTreeSet;

use drumline_cluster::{DomainAt, LevelAt, NodeAt, state::NODE_FIRST};
use drumline_spec::WHOLE_DEVICE;

use crate::baseline::Baseline;
use crate::fill::{Bin, Part, divide_in};
use crate::plan::mix;
use crate::scoring::{Constraints, Scoring};
use crate::shape::{Shape, Whole};
use crate::survey::{Room, Survey};

/// Places that were tried and will not do, for a reason that the counts do not know.
#[derive(Debug, Default)]
pub(crate) struct Barred {
    pub(crate) domains: BTreeSet<DomainAt>,
    pub(crate) nodes: BTreeSet<NodeAt>,
}

/// A place that holds the gang.
#[derive(Debug, Clone, Copy)]
enum Found {
    Node(Part),
    Domain(DomainAt, usize),
}

pub(crate) struct Search<'s, 'a> {
    pub(crate) survey: &'s Survey<'a>,
    pub(crate) shape: &'s Shape,
    pub(crate) constraints: &'s Constraints,
    pub(crate) barred: &'s Barred,
}

impl Search<'_, '_> {
    /// Returns whether some place holds the gang.
    pub(crate) fn holds(&self) -> bool {
        self.find().is_some()
    }

    /// Returns the ranks on each node, in rank order.
    pub(crate) fn parts(&self) -> Option<Vec<Part>> {
        let (at, step) = match self.find()? {
            Found::Node(part) => return Some(vec![part]),
            Found::Domain(at, step) => (at, step),
        };
        let need = Room::of(self.shape.ranks, self.shape.run(step));
        if self.constraints.scoring != Scoring::Drumline && step == 0 {
            return self.node_by_node(at, need);
        }
        let mut parts = Vec::new();
        self.survey.fill(self.shape, at, step, need, &mut parts);
        let given: u64 = parts.iter().map(|part| u64::from(part.ranks)).sum();
        debug_assert_eq!(given, self.shape.ranks, "a domain that holds a gang can be filled");
        (given == self.shape.ranks).then_some(parts)
    }

    fn find(&self) -> Option<Found> {
        let wanted = self.constraints.scoring;
        if matches!(wanted, Scoring::Drumline | Scoring::BestFit)
            || self.shape.whole == Whole::Node
            || self.shape.ranks == 1
        {
            let node = match wanted {
                Scoring::Drumline | Scoring::BestFit => self.best_node(),
                Scoring::Random
                | Scoring::FirstFit
                | Scoring::DotProduct
                | Scoring::GpuPacking
                | Scoring::FragmentationGradient => self.any_node(),
            };
            if node.is_some() || self.shape.whole == Whole::Node || self.shape.ranks == 1 {
                return node.map(Found::Node);
            }
        }
        self.domain()
    }

    /// Returns the innermost domain that holds the gang; of several, the one with the least free.
    fn domain(&self) -> Option<Found> {
        let topology = self.survey.fleet.topology();
        let stop = match self.shape.whole {
            Whole::Level(level) => topology.level_depth(level),
            Whole::Anywhere | Whole::Node => 0,
        };
        let stop = self.constraints.within.map_or(stop, |at| stop.max(topology.place(at).depth()));
        for level in topology.levels_inside_out() {
            if topology.level_depth(level) < stop {
                break;
            }
            if self.constraints.scoring != Scoring::Drumline && topology.level_depth(level) > stop {
                continue;
            }
            let step = self.shape.chain_within(level, topology);
            let need = Room::of(self.shape.ranks, self.shape.run(step));
            let holds = |at: &DomainAt| {
                (self.survey.exact || self.survey.devices(*at) >= self.shape.ranks)
                    && self.survey.nodes(*at) > 0
                    && self.allowed(*at, level, step)
                    && self.survey.room(self.shape, *at, step).holds(need)
            };
            let found = topology.at_level(level).iter().copied().filter(holds);
            let key = |at: DomainAt| mix(topology.place(at).key() ^ self.draw());
            let best = match self.constraints.scoring {
                Scoring::Drumline
                | Scoring::BestFit
                | Scoring::DotProduct
                | Scoring::GpuPacking
                | Scoring::FragmentationGradient => found.min_by_key(|&at| {
                    // Of those that are as full, the one whose slowest link is the fastest.
                    let link = topology.place(at).link_mb_per_s();
                    (self.survey.devices(at), std::cmp::Reverse(link), key(at))
                }),
                Scoring::Random => found.min_by_key(|&at| key(at)),
                Scoring::FirstFit => found.min_by_key(|&at| {
                    let mut path: Vec<&str> =
                        topology.path(at).map(|at| topology.place(at).name()).collect();
                    path.reverse();
                    path
                }),
            };
            if let Some(at) = best {
                return Some(Found::Domain(at, step));
            }
        }
        None
    }

    /// What decides among equals.
    fn draw(&self) -> u64 {
        let seed = self.constraints.seed.0;
        match self.constraints.scoring {
            Scoring::Random => mix(seed ^ mix(self.survey.fleet.revision().0)),
            _ => seed,
        }
    }

    fn allowed(&self, at: DomainAt, level: LevelAt, step: usize) -> bool {
        let topology = self.survey.fleet.topology();
        let within = |domain: DomainAt| topology.path(at).any(|above| above == domain);
        // In a fleet whose nodes name different levels, being deep is not being inside.
        let inside = |outer: LevelAt| outer == level || topology.above(at, outer).is_some();
        self.constraints.within.is_none_or(within)
            && self.shape.chain[step..].iter().all(|(outer, _)| inside(*outer))
            && match self.shape.whole {
                Whole::Level(outer) => inside(outer),
                Whole::Anywhere | Whole::Node => true,
            }
            && !topology.path(at).any(|above| self.barred.domains.contains(&above))
    }

    /// Returns the domains that a single node must be in one of.
    fn roots(&self) -> Vec<DomainAt> {
        let topology = self.survey.fleet.topology();
        let roots = match (self.shape.innermost(), self.constraints.within) {
            (None, Some(within)) => vec![within],
            (None, None) => vec![DomainAt::ROOT],
            (Some(level), _) => topology.at_level(level).to_vec(),
        };
        let step_free = |at: &DomainAt| {
            self.constraints.within.is_none_or(|w| topology.path(*at).any(|above| above == w))
                && !topology.path(*at).any(|above| self.barred.domains.contains(&above))
        };
        roots.into_iter().filter(step_free).collect()
    }

    /// Returns the node that holds the whole gang with the least left over; of several, one in the
    /// domain with the least free.
    fn best_node(&self) -> Option<Part> {
        let roots = self.roots();
        let need = u32::try_from(self.shape.ranks).ok()?;
        if self.survey.slice.share_milli < WHOLE_DEVICE {
            if need > 1 {
                return self.best_of_all(&roots, need);
            }
            if let Some(part) = self.shared_device(&roots) {
                return Some(part);
            }
        }
        let quick = self.quick_node(&roots, need)?;
        let state = self.survey.fleet.at(quick.node);
        let more = self.survey.needs_more_than_devices() || !self.barred.nodes.is_empty();
        if !more
            || (self.survey.ranks_on(quick.pool, state) >= need
                && !self.barred.nodes.contains(&quick.node))
        {
            return Some(quick);
        }
        self.best_of_all(&roots, need)
    }

    /// Returns a device that others use in part, with the least left over.
    fn shared_device(&self, roots: &[DomainAt]) -> Option<Part> {
        let fleet = self.survey.fleet;
        let least = self.survey.slice.share_milli;
        let everywhere = roots == [DomainAt::ROOT];
        let fits = |node: NodeAt| {
            let state = fleet.at(node);
            let inside =
                || fleet.topology().path(state.place()).any(|above| roots.contains(&above));
            state.ranks_left(&self.survey.slice) >= 1
                && (everywhere || inside())
                && !self.barred.nodes.contains(&node)
        };
        let first = |&(number, pool): &(u32, &drumline_cluster::Pool)| {
            let from = (least, 0, NODE_FIRST, 0);
            let found = pool.partial().range(from..).find(|(_, _, node, _)| fits(*node))?;
            Some(((found.0, found.1), Part { pool: number, node: found.2, ranks: 1 }))
        };
        self.survey.pools.iter().filter_map(first).min_by_key(|(key, _)| *key).map(|(_, part)| part)
    }

    /// Goes down the tree to a node with just enough whole devices free.
    fn quick_node(&self, roots: &[DomainAt], need: u32) -> Option<Part> {
        let topology = self.survey.fleet.topology();
        let mut best: Option<(usize, u64, u64, u32, DomainAt)> = None;
        for &(number, pool) in &self.survey.pools {
            for &root in roots {
                let counts = pool.counts(root);
                let by = counts.by_free();
                let Some(free) = (need as usize..by.len()).find(|&free| by[free] > 0) else {
                    continue;
                };
                let key = mix(topology.place(root).key() ^ self.draw());
                let found = (free, counts.free(), key, number, root);
                if best.is_none_or(|best| (found.0, found.1, found.2) < (best.0, best.1, best.2)) {
                    best = Some(found);
                }
            }
        }
        let (free, _, _, number, mut at) = best?;
        let pool = self.survey.fleet.pool(number);
        let exact = free as u32;
        loop {
            let order = pool.counts(at).order();
            let turn = mix(self.draw());
            let from = order.range((exact, turn, NODE_FIRST)..).next();
            let first = order.range((exact, 0, NODE_FIRST)..).next();
            let here = |found: Option<&(u32, u64, NodeAt)>| {
                found.filter(|found| found.0 == exact).map(|found| found.2)
            };
            if let Some(node) = here(from).or_else(|| here(first)) {
                return Some(Part { pool: number, node, ranks: need });
            }
            let fuller = |child: &DomainAt| {
                pool.counts(*child).by_free().get(free).is_some_and(|&nodes| nodes > 0)
            };
            at = topology.place(at).children().filter(fuller).min_by_key(|child| {
                (pool.counts(*child).free(), mix(topology.place(*child).key() ^ self.draw()))
            })?;
        }
    }

    fn best_of_all(&self, roots: &[DomainAt], need: u32) -> Option<Part> {
        let holding = self.holding(roots, need);
        let best = holding.into_iter().min_by_key(|&(ranks, part)| {
            let state = self.survey.fleet.at(part.node);
            (ranks, self.survey.devices(state.place()), mix(state.key() ^ self.draw()))
        });
        best.map(|(_, part)| part)
    }

    /// Returns any node that holds the gang: the first by name, or one drawn.
    fn any_node(&self) -> Option<Part> {
        let roots = self.roots();
        let need = u32::try_from(self.shape.ranks).ok()?;
        let fleet = self.survey.fleet;
        if self.constraints.scoring == Scoring::FirstFit && roots == [DomainAt::ROOT] {
            return fleet.numbered().find_map(|(node, state)| {
                let holds = |&&(number, _): &&(u32, &drumline_cluster::Pool)| {
                    self.survey.ranks_on(number, state) >= need
                };
                let pool = self.survey.pools.iter().find(holds)?.0;
                let open = !self.barred.nodes.contains(&node);
                open.then_some(Part { pool, node, ranks: need })
            });
        }
        let holding = self.holding(&roots, need).into_iter().map(|(_, part)| part);
        match self.constraints.scoring {
            scoring if scoring.costs_nodes() => {
                let rule = Baseline::new(fleet, scoring, self.survey.slice, need);
                holding.min_by_key(|part| {
                    let state = fleet.at(part.node);
                    (rule.cost(state, part.pool), mix(state.key() ^ self.draw()))
                })
            }
            Scoring::FirstFit => holding.min_by_key(|part| fleet.at(part.node).node().name.clone()),
            _ => holding.min_by_key(|part| mix(fleet.at(part.node).key() ^ self.draw())),
        }
    }

    fn holding(&self, roots: &[DomainAt], need: u32) -> Vec<(u32, Part)> {
        let nodes = roots.iter().flat_map(|root| self.survey.nodes_in(*root));
        nodes
            .filter(|(_, node)| !self.barred.nodes.contains(node))
            .filter_map(|(pool, node)| {
                let ranks = self.survey.ranks_on(pool, self.survey.fleet.at(node));
                (ranks >= need).then_some((ranks, Part { pool, node, ranks: need }))
            })
            .collect()
    }

    /// Fills nodes in the order of the scoring, whatever domains they are in.
    fn node_by_node(&self, at: DomainAt, need: Room) -> Option<Vec<Part>> {
        let fleet = self.survey.fleet;
        let mut nodes = self.survey.nodes_in(at);
        match self.constraints.scoring {
            Scoring::Random => {
                nodes.sort_by_key(|(_, node)| mix(fleet.at(*node).key() ^ self.draw()));
            }
            Scoring::BestFit => nodes.sort_by_key(|&(pool, node)| {
                let state = fleet.at(node);
                (self.survey.ranks_on(pool, state), state.key())
            }),
            scoring if scoring.costs_nodes() => {
                let ranks = u32::try_from(self.shape.group).unwrap_or(u32::MAX);
                let rule = Baseline::new(fleet, scoring, self.survey.slice, ranks);
                nodes.sort_by_cached_key(|&(pool, node)| {
                    let state = fleet.at(node);
                    (rule.cost(state, pool), mix(state.key() ^ self.draw()))
                });
            }
            _ => {
                nodes.sort_by(|a, b| fleet.at(a.1).node().name.cmp(&fleet.at(b.1).node().name));
            }
        }
        let mut bins: Vec<Bin> = (0u64..)
            .zip(&nodes)
            .map(|(key, &(pool, node))| {
                let ranks = u64::from(self.survey.ranks_on(pool, fleet.at(node)));
                let room = Room::of(ranks, self.shape.group);
                Bin { room, devices: 0, key, got: Room::default() }
            })
            .collect();
        let order: Vec<usize> = (0..bins.len()).collect();
        let host = divide_in(&order, &mut bins, need);
        let parts: Vec<Part> = order
            .iter()
            .copied()
            .filter(|&i| Some(i) != host)
            .chain(host)
            .filter(|&i| bins[i].got != Room::default())
            .map(|i| {
                let ranks = bins[i].got.full * self.shape.group + bins[i].got.tail;
                Part { pool: nodes[i].0, node: nodes[i].1, ranks: ranks as u32 }
            })
            .collect();
        let given: u64 = parts.iter().map(|part| u64::from(part.ranks)).sum();
        (given == self.shape.ranks).then_some(parts)
    }
}
