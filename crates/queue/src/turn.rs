//! Whose turn it is: at each level of the tree the queue with the first claim, down to one job.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;

use drumline_types::Timestamp;

use crate::amounts::Share;
use crate::tree::{Charge, QueueId, Tree};

/// What the first job of a queue is, as far as the turn depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// What it would hold.
    pub charge: Arc<Charge>,
    /// Its priority band.
    pub band: i32,
}

/// A child's claim against its siblings'; the least goes first. Queues that stay within what they
/// may always use go before borrowers; then the higher priority band; then the smaller share; then
/// the place in the tree, which follows the names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    borrows: bool,
    band: Reverse<i32>,
    share: Share,
}

#[derive(Debug, Clone, Default)]
struct Row {
    candidate: Option<Candidate>,
    claim: Option<Claim>,
    /// The children that have a candidate.
    children: BTreeSet<(Claim, QueueId)>,
}

/// The turn between queues during one cycle.
#[derive(Debug, Clone)]
pub struct Turn {
    now: Timestamp,
    rows: Vec<Row>,
}

impl Turn {
    /// Returns a turn in which no queue has a candidate.
    #[must_use]
    pub fn new(tree: &Tree, now: Timestamp) -> Self {
        Self { now, rows: vec![Row::default(); tree.len()] }
    }

    /// Tells the first job of a queue without children; `None`: it has none left.
    pub fn set(&mut self, tree: &Tree, leaf: QueueId, candidate: Option<Candidate>) {
        self.rows[tree.index(leaf)].candidate = candidate;
        self.touch(tree, leaf);
    }

    /// Takes note that the use of a queue, and so of those above it, has changed.
    pub fn touch(&mut self, tree: &Tree, leaf: QueueId) {
        let mut at = leaf;
        while let Some(parent) = tree.parent(at) {
            let row = &mut self.rows[tree.index(at)];
            let old = row.claim.take();
            row.claim = row.candidate.as_ref().map(|candidate| Claim {
                borrows: !tree.within(at, &candidate.charge),
                band: Reverse(candidate.band),
                share: tree.share(at, self.now),
            });
            let new = row.claim;
            let above = &mut self.rows[tree.index(parent)].children;
            if let Some(old) = old {
                above.remove(&(old, at));
            }
            if let Some(new) = new {
                above.insert((new, at));
            }
            let first = above.first().map(|(_, child)| *child);
            let candidate = first.and_then(|child| self.rows[tree.index(child)].candidate.clone());
            self.rows[tree.index(parent)].candidate = candidate;
            at = parent;
        }
    }

    /// Returns the queue without children whose first job goes next.
    #[must_use]
    pub fn next(&self, tree: &Tree) -> Option<QueueId> {
        let mut at = QueueId::FLEET;
        loop {
            match self.rows[tree.index(at)].children.first() {
                Some((_, child)) => at = *child,
                None => return (at != QueueId::FLEET).then_some(at),
            }
        }
    }
}
