//! The tree of named domains that nodes are in: zones, spines, racks, or whatever they name.
//!
//! Domains come and go with the nodes that name them. The root is the fleet.

use std::collections::BTreeMap;

use crate::node::Domain;

/// A domain's number. Numbers are reused, and say nothing about order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainAt(pub(crate) u32);

impl DomainAt {
    /// The fleet itself.
    pub const ROOT: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A level's number. The fleet itself has level 0, which has no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LevelAt(pub(crate) u16);

/// One domain.
#[derive(Debug, Clone)]
pub struct Place {
    level: LevelAt,
    name: String,
    parent: Option<DomainAt>,
    children: BTreeMap<Domain, DomainAt>,
    /// Nodes and domains right below.
    below: u32,
    depth: u32,
    key: u64,
    /// The speeds of links that its nodes name, each with how many of them do.
    links: BTreeMap<u32, u32>,
}

impl Place {
    /// Returns its level.
    #[must_use]
    pub fn level(&self) -> LevelAt {
        self.level
    }

    /// Returns its name within the domain above it; empty for the fleet.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the domain above it.
    #[must_use]
    pub fn parent(&self) -> Option<DomainAt> {
        self.parent
    }

    /// Returns the domains right below it, by level and name.
    pub fn children(&self) -> impl ExactSizeIterator<Item = DomainAt> + '_ {
        self.children.values().copied()
    }

    /// Returns the number of steps from the fleet.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Returns a number made from the names on the way to it: the same in every history.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Returns what a device can send to another in the domain, in megabytes per second: the least
    /// that one of its nodes names; 0: none names any.
    #[must_use]
    pub fn link_mb_per_s(&self) -> u32 {
        self.links.first_key_value().map_or(0, |(speed, _)| *speed)
    }
}

/// The tree.
#[derive(Debug, Clone)]
pub struct Topology {
    places: Vec<Place>,
    vacant: Vec<DomainAt>,
    levels: Vec<String>,
    /// Per level, its domains, and the depth at which it was seen last.
    at_level: Vec<Vec<DomainAt>>,
    depth_of: Vec<u32>,
}

impl Default for Topology {
    fn default() -> Self {
        let root = Place {
            level: LevelAt(0),
            name: String::new(),
            parent: None,
            children: BTreeMap::new(),
            below: 1,
            depth: 0,
            key: mix(0),
            links: BTreeMap::new(),
        };
        Self {
            places: vec![root],
            vacant: Vec::new(),
            levels: vec![String::new()],
            at_level: vec![vec![DomainAt::ROOT]],
            depth_of: vec![0],
        }
    }
}

impl Topology {
    /// Returns a domain.
    #[must_use]
    pub fn place(&self, at: DomainAt) -> &Place {
        &self.places[at.index()]
    }

    /// Returns the number of the level of this name; `None`: no node has ever named it.
    #[must_use]
    pub fn level(&self, name: &str) -> Option<LevelAt> {
        (1u16..).zip(&self.levels[1..]).find(|(_, level)| *level == name).map(|(at, _)| LevelAt(at))
    }

    /// Returns a level's name.
    #[must_use]
    pub fn level_name(&self, level: LevelAt) -> &str {
        &self.levels[usize::from(level.0)]
    }

    /// Returns how far below the fleet the level's domains are.
    #[must_use]
    pub fn level_depth(&self, level: LevelAt) -> u32 {
        self.depth_of[usize::from(level.0)]
    }

    /// Returns the domains of a level, in no order that may decide anything.
    #[must_use]
    pub fn at_level(&self, level: LevelAt) -> &[DomainAt] {
        &self.at_level[usize::from(level.0)]
    }

    /// Returns every level with a domain, the innermost first; the fleet is the last.
    #[must_use]
    pub fn levels_inside_out(&self) -> Vec<LevelAt> {
        let mut levels: Vec<LevelAt> = (0u16..)
            .zip(&self.at_level)
            .filter(|(_, domains)| !domains.is_empty())
            .map(|(at, _)| LevelAt(at))
            .collect();
        levels.sort_by(|a, b| {
            let depth = |level: &LevelAt| self.depth_of[usize::from(level.0)];
            depth(b).cmp(&depth(a)).then_with(|| self.level_name(*a).cmp(self.level_name(*b)))
        });
        levels
    }

    /// Returns the domain of `level` that holds `at`, itself included.
    #[must_use]
    pub fn above(&self, at: DomainAt, level: LevelAt) -> Option<DomainAt> {
        let mut here = Some(at);
        while let Some(at) = here {
            let place = self.place(at);
            if place.level == level {
                return Some(at);
            }
            here = place.parent;
        }
        None
    }

    /// Returns the domains from `at` up to the fleet.
    pub fn path(&self, at: DomainAt) -> impl Iterator<Item = DomainAt> + '_ {
        std::iter::successors(Some(at), |at| self.place(*at).parent)
    }

    /// Returns what people call a domain, such as `rack r7`.
    #[must_use]
    pub fn title(&self, at: DomainAt) -> String {
        let place = self.place(at);
        if place.parent.is_none() {
            return "the fleet".to_owned();
        }
        format!("{} {}", self.level_name(place.level), place.name)
    }

    /// Enters a node into the domain that it names, which is made if need be.
    pub(crate) fn enter(&mut self, path: &[Domain]) -> DomainAt {
        let mut at = DomainAt::ROOT;
        for step in path {
            let named = Domain { link_mb_per_s: 0, ..step.clone() };
            at = match self.places[at.index()].children.get(&named) {
                Some(&child) => child,
                None => self.grow(at, named),
            };
            if step.link_mb_per_s > 0 {
                *self.places[at.index()].links.entry(step.link_mb_per_s).or_default() += 1;
            }
        }
        self.places[at.index()].below += 1;
        at
    }

    /// Takes a node out of its domain, and takes down the domains that nobody is in any more.
    pub(crate) fn leave(&mut self, at: DomainAt, path: &[Domain]) {
        let mut above = Some(at);
        for step in path.iter().rev() {
            let Some(at) = above else { break };
            let place = &mut self.places[at.index()];
            if let Some(nodes) = place.links.get_mut(&step.link_mb_per_s) {
                *nodes -= 1;
                if *nodes == 0 {
                    place.links.remove(&step.link_mb_per_s);
                }
            }
            above = place.parent;
        }
        let mut here = Some(at);
        while let Some(at) = here {
            let place = &mut self.places[at.index()];
            place.below -= 1;
            if place.below > 0 {
                return;
            }
            let (parent, level) = (place.parent, place.level);
            self.at_level[usize::from(level.0)].retain(|other| *other != at);
            self.vacant.push(at);
            if let Some(parent) = parent {
                self.places[parent.index()].children.retain(|_, child| *child != at);
            }
            here = parent;
        }
    }

    fn grow(&mut self, parent: DomainAt, step: Domain) -> DomainAt {
        let level = match self.level(&step.level) {
            Some(level) => level,
            None => {
                self.levels.push(step.level.clone());
                self.at_level.push(Vec::new());
                self.depth_of.push(0);
                LevelAt((self.levels.len() - 1) as u16)
            }
        };
        let above = &mut self.places[parent.index()];
        above.below += 1;
        let depth = above.depth + 1;
        let key = mix(above.key ^ text_key(&step.level)).wrapping_add(text_key(&step.name));
        let place = Place {
            level,
            name: step.name.clone(),
            parent: Some(parent),
            children: BTreeMap::new(),
            below: 0,
            depth,
            key: mix(key),
            links: BTreeMap::new(),
        };
        let at = match self.vacant.pop() {
            Some(at) => {
                self.places[at.index()] = place;
                at
            }
            None => {
                self.places.push(place);
                DomainAt((self.places.len() - 1) as u32)
            }
        };
        self.places[parent.index()].children.insert(step, at);
        self.at_level[usize::from(level.0)].push(at);
        self.depth_of[usize::from(level.0)] = depth;
        at
    }
}

/// Mixes the bits of a number (the finalizer of SplitMix64).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Makes a number from a text, the same everywhere (FNV-1a, then mixed).
pub(crate) fn text_key(text: &str) -> u64 {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    mix(text.bytes().fold(0xcbf2_9ce4_8422_2325, fnv))
}
