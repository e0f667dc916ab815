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

#[cfg(test)]
mod tests {
    use drumline_cluster::{Node, Snapshot};

    use super::*;

    /// Levels `zone`, `rack` and `leaf`, the innermost last.
    fn fleet() -> Snapshot {
        let mut fleet = Snapshot::new();
        let node = Node::new("a".parse().unwrap(), Vec::new());
        fleet.upsert_node(node.within("zone", "z").within("rack", "r").within("leaf", "l"));
        fleet
    }

    /// A shape in words: `group`, then each run as `RANKS/LEVEL`, then where the whole is.
    fn shape(ranks: u32, group: u32, rules: &[(&str, u32, bool)], wishes: usize) -> String {
        let fleet = fleet();
        let topology = fleet.topology();
        let rule = |&(level, ranks, required): &(&str, u32, bool)| TopologyRule {
            ranks,
            level: level.to_owned(),
            required,
        };
        let gang = Gang {
            ranks,
            node_group: group,
            topology: rules.iter().map(rule).collect(),
            ..Gang::default()
        };
        let shape = match Shape::new(&gang, ranks, wishes, topology) {
            Ok(shape) => shape,
            Err(UnknownLevel(level)) => return format!("no {level}"),
        };
        assert_eq!(shape.run(0), shape.group);
        let mut words = vec![shape.group.to_string()];
        for (step, (level, run)) in shape.chain.iter().enumerate() {
            assert_eq!(shape.run(step + 1), *run);
            assert_eq!(shape.chain_within(*level, topology), step);
            words.push(format!("{run}/{}", topology.level_name(*level)));
        }
        words.push(match shape.whole {
            Whole::Anywhere => "anywhere".to_owned(),
            Whole::Node => "node".to_owned(),
            Whole::Level(level) => topology.level_name(level).to_owned(),
        });
        let inner = shape.innermost().map_or("none", |level| topology.level_name(level));
        format!("{} innermost {inner}", words.join(" "))
    }

    #[test]
    fn rules_are_brought_into_one_form() {
        #[rustfmt::skip]
        let cases = [
            (8, 1, &[][..], 0, "1 anywhere innermost none"),
            (8, 8, &[], 0, "8 node innermost none"),
            (8, 9, &[], 0, "9 node innermost none"),
            (8, 7, &[], 0, "7 anywhere innermost none"),
            (8, 2, &[("rack", 0, true)], 0, "2 rack innermost rack"),
            (8, 2, &[("rack", 8, true)], 0, "2 rack innermost rack"),
            (8, 2, &[("rack", 9, true)], 0, "2 rack innermost rack"),
            (8, 2, &[("rack", 4, true)], 0, "2 4/rack anywhere innermost rack"),
            // Runs nest: what ties two runs together makes one of them.
            (24, 4, &[("rack", 6, true)], 0, "4 12/rack anywhere innermost rack"),
            (24, 2, &[("rack", 4, true), ("zone", 6, true)], 0, "2 4/rack 12/zone anywhere innermost rack"),
            (24, 2, &[("zone", 8, true), ("leaf", 4, true)], 0, "2 4/leaf 8/zone anywhere innermost leaf"),
            // Two rules of one level are one.
            (24, 1, &[("rack", 4, true), ("rack", 6, true)], 0, "1 12/rack anywhere innermost rack"),
            // A run as long as the gang is the whole, and settles the coarser ones.
            (12, 4, &[("rack", 6, true), ("zone", 0, true)], 0, "4 rack innermost rack"),
            (12, 1, &[("zone", 6, true), ("rack", 0, true)], 0, "1 rack innermost rack"),
            (12, 1, &[("rack", 0, true), ("leaf", 6, true)], 0, "1 6/leaf rack innermost leaf"),
            // Of two levels for the whole the inner one counts.
            (8, 1, &[("zone", 0, true), ("rack", 0, true)], 0, "1 rack innermost rack"),
            (8, 1, &[("rack", 0, true), ("zone", 0, true)], 0, "1 rack innermost rack"),
            // A node is a level too.
            (8, 1, &[("node", 0, true)], 0, "1 node innermost none"),
            (8, 1, &[("node", 8, true), ("rack", 0, true)], 0, "1 node innermost none"),
            (8, 2, &[("node", 3, true)], 0, "6 anywhere innermost none"),
            (8, 1, &[("rack", 2, true), ("node", 0, true)], 0, "1 node innermost none"),
            // Wishes count as far as they are asked for, the first ones first.
            (8, 1, &[("rack", 0, false), ("leaf", 0, false)], 0, "1 anywhere innermost none"),
            (8, 1, &[("rack", 0, false), ("leaf", 0, false)], 1, "1 rack innermost rack"),
            (8, 1, &[("rack", 0, false), ("leaf", 0, false)], 2, "1 leaf innermost leaf"),
            (8, 1, &[("pod", 0, false), ("leaf", 0, true)], 1, "1 leaf innermost leaf"),
            (8, 1, &[("pod", 0, true)], 0, "no pod"),
            (8, 1, &[("pod", 2, true)], 0, "no pod"),
        ];
        for (ranks, group, rules, wishes, wanted) in cases {
            assert_eq!(shape(ranks, group, rules, wishes), wanted, "{ranks} {group} {rules:?}");
        }
    }

    #[test]
    fn the_least_common_multiple() {
        for (a, b, wanted) in [(4, 6, 12), (6, 4, 12), (1, 7, 7), (8, 8, 8), (0, 5, 5), (5, 0, 5)] {
            assert_eq!(lcm(a, b), wanted, "{a} {b}");
        }
        assert_eq!(lcm(u64::MAX, u64::MAX - 1), u64::MAX);
    }
}
