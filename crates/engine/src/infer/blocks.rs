//! The free list of cache blocks.

use drumline_tensor::KV_BLOCK;

/// Hands out cache blocks, lowest number first, so that the same requests get the same blocks.
#[derive(Debug, Clone)]
pub struct Blocks {
    free: std::collections::BTreeSet<u32>,
    total: usize,
}

impl Blocks {
    /// Creates `total` free blocks.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self { free: (0..total as u32).collect(), total }
    }

    /// Returns how many blocks a sequence of `tokens` takes.
    #[must_use]
    pub fn needed(tokens: usize) -> usize {
        tokens.div_ceil(KV_BLOCK)
    }

    /// Returns the number of all blocks.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// Returns the number of free blocks.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes `count` blocks, or none when there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        if count > self.free.len() {
            return None;
        }
        Some((0..count).filter_map(|_| self.free.pop_first()).collect())
    }

    /// Takes blocks back.
    pub fn give(&mut self, blocks: &[u32]) {
        self.free.extend(blocks);
        debug_assert!(self.free.len() <= self.total, "a block came back twice");
    }
}
