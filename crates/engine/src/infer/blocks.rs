//! Cache blocks: which are free, who holds the others, and which hold a prefix that may come again.
//!
//! A full block is known by its tokens and by the block before it, compared in full: there is no
//! hash that could meet another. Blocks that nobody holds keep their contents until they are needed
//! for something else; the least recently used goes first, and of one sequence the last.

use std::collections::{BTreeMap, BTreeSet};

use drumline_tensor::KV_BLOCK;

/// Names what a block holds: the tokens from the beginning of a sequence to the block's end.
/// Never given twice.
type Content = u64;

/// What comes before a sequence's first block.
const NOTHING: Content = 0;

/// The tokens of a full block after what comes before it.
type Key = (Content, [u32; KV_BLOCK]);

#[derive(Debug, Clone, Default)]
struct Block {
    holders: usize,
    /// Set while the block can be found by its tokens.
    known: Option<(Key, Content)>,
    /// When it was last let go.
    stamp: u64,
}

/// Hands out cache blocks, lowest number first, so that the same requests get the same blocks.
#[derive(Debug, Clone)]
pub struct Blocks {
    blocks: Vec<Block>,
    /// Nobody holds them, and they hold nothing of use.
    free: BTreeSet<u32>,
    /// Nobody holds them, but they are known: by when they were let go.
    idle: BTreeMap<u64, u32>,
    known: BTreeMap<Key, u32>,
    next_content: Content,
    clock: u64,
}

impl Blocks {
    /// Creates `total` free blocks.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self {
            blocks: vec![Block::default(); total],
            free: (0..total as u32).collect(),
            idle: BTreeMap::new(),
            known: BTreeMap::new(),
            next_content: NOTHING + 1,
            clock: 0,
        }
    }

    /// Returns how many blocks a sequence of `tokens` takes.
    #[must_use]
    pub fn needed(tokens: usize) -> usize {
        tokens.div_ceil(KV_BLOCK)
    }

    /// Returns the number of all blocks.
    #[must_use]
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Returns the number of blocks that nobody holds.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Takes `count` blocks for a sequence that begins with `tokens`: first those that hold its
    /// beginning already, but never all of it, so that there is a token left to compute. Returns
    /// the blocks and how many of them are such; none when there are too few.
    pub fn take(&mut self, count: usize, tokens: &[u32]) -> Option<(Vec<u32>, usize)> {
        let mut taken = self.find(tokens);
        taken.truncate(count);
        for block in &taken {
            self.hold(*block);
        }
        let reused = taken.len();
        if count - reused > self.free() {
            self.give(&taken);
            return None;
        }
        while taken.len() < count {
            let block = self.free.pop_first().or_else(|| self.evict())?;
            self.hold(block);
            taken.push(block);
        }
        Some((taken, reused))
    }

    /// Returns the known blocks that hold the beginning of `tokens`, short of the last token.
    fn find(&self, tokens: &[u32]) -> Vec<u32> {
        let (mut before, mut found) = (NOTHING, Vec::new());
        let (whole, _) = tokens[..tokens.len().saturating_sub(1)].as_chunks::<KV_BLOCK>();
        for tokens in whole {
            let Some(block) = self.known.get(&(before, *tokens)) else { break };
            let Some((_, content)) = self.blocks[*block as usize].known else { break };
            before = content;
            found.push(*block);
        }
        found
    }

    /// Makes the `index`-th block of a sequence known, all of whose tokens up to there are in the
    /// cache. Another block with the same contents keeps its place.
    pub fn publish(&mut self, blocks: &[u32], index: usize, tokens: &[u32]) {
        let (whole, _) = tokens.as_chunks::<KV_BLOCK>();
        let (Some(tokens), Some(block)) = (whole.get(index), blocks.get(index)) else { return };
        let before = match index.checked_sub(1).and_then(|i| blocks.get(i)) {
            None => NOTHING,
            Some(before) => match self.blocks[*before as usize].known {
                Some((_, content)) => content,
                // The block before is a copy of one that is known under its own number.
                None => return,
            },
        };
        let key = (before, *tokens);
        if self.known.contains_key(&key) || self.blocks[*block as usize].known.is_some() {
            return;
        }
        self.known.insert(key, *block);
        self.blocks[*block as usize].known = Some((key, self.next_content));
        self.next_content += 1;
    }

    /// Takes back the blocks of one holder, in the order of its sequence.
    pub fn give(&mut self, blocks: &[u32]) {
        for block in blocks.iter().rev() {
            let entry = &mut self.blocks[*block as usize];
            debug_assert!(entry.holders > 0, "a block came back twice");
            entry.holders = entry.holders.saturating_sub(1);
            if entry.holders > 0 {
                continue;
            }
            if entry.known.is_some() {
                self.clock += 1;
                entry.stamp = self.clock;
                self.idle.insert(self.clock, *block);
            } else {
                self.free.insert(*block);
            }
        }
    }

    fn hold(&mut self, block: u32) {
        let entry = &mut self.blocks[block as usize];
        if entry.holders == 0 {
            self.idle.remove(&entry.stamp);
        }
        entry.holders += 1;
    }

    /// Forgets the contents of the block that nobody has held for longest.
    fn evict(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        if let Some((key, _)) = self.blocks[block as usize].known.take() {
            self.known.remove(&key);
        }
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(count: usize, from: u32) -> Vec<u32> {
        (0..count as u32).map(|i| i + from).collect()
    }

    /// Takes blocks for a sequence, as if it had been computed, and gives them back.
    fn run(b: &mut Blocks, tokens: &[u32]) -> (Vec<u32>, usize) {
        let taken = b.take(Blocks::needed(tokens.len()), tokens).unwrap();
        for i in 0..taken.0.len() {
            b.publish(&taken.0, i, tokens);
        }
        b.give(&taken.0);
        taken
    }

    #[test]
    fn a_prefix_is_found_again_up_to_where_it_differs() {
        let mut b = Blocks::new(8);
        let first = tokens(40, 0);
        assert_eq!(run(&mut b, &first), (vec![0, 1, 2], 0));
        assert_eq!((b.free(), b.total()), (8, 8));
        let mut other = first.clone();
        other[20] = 99;
        assert_eq!(run(&mut b, &other), (vec![0, 2, 3], 1));
        // Block 2 holds the other one's second block by now.
        assert_eq!(run(&mut b, &first), (vec![0, 1, 3], 2));
        // The last token is always computed: its logits are wanted.
        assert_eq!(run(&mut b, &first[..32]).1, 1);
        assert_eq!(run(&mut b, &first[..33]).1, 2);
        // The same tokens elsewhere are something else.
        assert_eq!(run(&mut b, &first[16..]).1, 0);
    }

    #[test]
    fn what_was_used_last_stays_longest_and_beginnings_outlive_ends() {
        let mut b = Blocks::new(4);
        run(&mut b, &tokens(33, 0));
        run(&mut b, &tokens(17, 100));
        // Blocks 0 and 1 hold the first, 2 the second: a third takes the free one, then the end of
        // the first.
        let (held, reused) = b.take(2, &tokens(17, 200)).unwrap();
        assert_eq!((held.as_slice(), reused), ([3, 1].as_slice(), 0));
        assert_eq!(b.take(3, &tokens(33, 0)), None);
        assert_eq!(b.free(), 2);
        b.give(&held);
        assert_eq!(b.take(3, &tokens(33, 0)), Some((vec![0, 1, 3], 1)));
        assert_eq!(b.take(1, &tokens(17, 100)), Some((vec![2], 1)));
        assert_eq!(b.free(), 0);
    }

    #[test]
    fn shared_blocks_stay_while_anyone_holds_them() {
        let mut b = Blocks::new(3);
        let text = tokens(20, 0);
        let (one, _) = b.take(2, &text).unwrap();
        b.publish(&one, 0, &text);
        let (two, reused) = b.take(2, &text).unwrap();
        assert_eq!((two[0], reused), (one[0], 1));
        assert_eq!(b.free(), 0);
        b.give(&one);
        assert_eq!(b.free(), 1);
        assert_eq!(b.take(2, &tokens(20, 50)), None);
        b.give(&two);
        assert_eq!(b.free(), 3);
        assert_eq!(b.take(3, &tokens(40, 50)).unwrap().1, 0);
    }
}
