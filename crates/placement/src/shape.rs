//! A gang's rules in the one form that the search knows: groups on a node, runs of ranks inside
//! domains, and the domain of the whole.

use drumline_cluster::{LevelAt, Topology};
use drumline_spec::{Gang, TopologyRule};

/// Where the whole gang must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whole {
    Anywhere,
    /// In one domain of this level.
    Level(LevelAt),
    Node,
}

/// The rules for `ranks` workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) ranks: u64,
    /// Consecutive ranks that share a node.
    pub(crate) group: u64,
    /// Consecutive ranks that share a domain of a level, the innermost level first. Each number of
    /// ranks is a multiple of the one before, and of `group`.
    pub(crate) chain: Vec<(LevelAt, u64)>,
    pub(crate) whole: Whole,
}

/// A level that a required rule names and no node does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnknownLevel(pub(crate) String);

impl Shape {
    /// Brings the rules of `gang` at a size into form: the required ones and `preferred` others.
    ///
    /// Runs that do not nest are widened until they do: ranks 0 to 5 in one rack and groups of 4
    /// on one node make ranks 0 to 11 share a rack, as each group ties two runs together.
    pub(crate) fn new(
        gang: &Gang,
        ranks: u32,
        preferred: usize,
        topology: &Topology,
    ) -> Result<Self, UnknownLevel> {
        let ranks = u64::from(ranks);
        let mut shape = Self {
            ranks,
            group: u64::from(gang.node_group.max(1)),
            chain: Vec::new(),
            whole: Whole::Anywhere,
        };
        let mut left = preferred;
        let mut runs: Vec<(LevelAt, u64)> = Vec::new();
        for rule in &gang.topology {
            if !rule.required {
                if left == 0 {
                    continue;
                }
                left -= 1;
            }
            shape.add(rule, topology, &mut runs)?;
        }
        if shape.group >= ranks {
            shape.whole = Whole::Node;
        }
        runs.sort_by_key(|(level, _)| std::cmp::Reverse(topology.level_depth(*level)));
        let mut inner = shape.group;
        for (level, run) in runs {
            inner = lcm(inner, run);
            if inner >= ranks {
                shape.narrow(level, topology);
                break;
            }
            match shape.chain.last_mut() {
                Some(last) if last.0 == level => last.1 = inner,
                _ => shape.chain.push((level, inner)),
            }
        }
        match shape.whole {
            Whole::Anywhere => {}
            Whole::Node => shape.chain.clear(),
            Whole::Level(whole) => {
                let depth = topology.level_depth(whole);
                shape.chain.retain(|(level, _)| topology.level_depth(*level) > depth);
            }
        }
        Ok(shape)
    }

    fn add(
        &mut self,
        rule: &TopologyRule,
        topology: &Topology,
        runs: &mut Vec<(LevelAt, u64)>,
    ) -> Result<(), UnknownLevel> {
        let run = u64::from(rule.ranks);
        let whole = run == 0 || run >= self.ranks;
        if rule.level == "node" {
            if whole {
                self.whole = Whole::Node;
            } else {
                self.group = lcm(self.group, run);
            }
            return Ok(());
        }
        match topology.level(&rule.level) {
            Some(level) if whole => self.narrow(level, topology),
            Some(level) => runs.push((level, run)),
            None if rule.required => return Err(UnknownLevel(rule.level.clone())),
            None => {}
        }
        Ok(())
    }

    fn narrow(&mut self, level: LevelAt, topology: &Topology) {
        self.whole = match self.whole {
            Whole::Anywhere => Whole::Level(level),
            Whole::Level(other) if topology.level_depth(other) < topology.level_depth(level) => {
                Whole::Level(level)
            }
            kept => kept,
        };
    }

    /// Returns the part of the chain that is not settled by being inside one domain of `level`.
    pub(crate) fn chain_within(&self, level: LevelAt, topology: &Topology) -> usize {
        let depth = topology.level_depth(level);
        self.chain.iter().filter(|(inner, _)| topology.level_depth(*inner) > depth).count()
    }

    /// Returns the ranks of a run at step `step` of the chain; step 0 is the group on a node.
    pub(crate) fn run(&self, step: usize) -> u64 {
        match step.checked_sub(1) {
            Some(at) => self.chain[at].1,
            None => self.group,
        }
    }

    /// Returns the innermost level that every rank must be in some domain of.
    pub(crate) fn innermost(&self) -> Option<LevelAt> {
        match (self.chain.first(), self.whole) {
            (Some((level, _)), _) => Some(*level),
            (None, Whole::Level(level)) => Some(level),
            _ => None,
        }
    }
}

fn lcm(a: u64, b: u64) -> u64 {
    let (a, b) = (a.max(1), b.max(1));
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x).saturating_mul(b)
}
