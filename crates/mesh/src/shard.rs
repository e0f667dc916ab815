//! Which part of a global tensor a rank holds.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A rectangular part of a global tensor, keyed by the tensor's global name.
///
/// Checkpoints are keyed by these, so that another split can read them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardSpec {
    /// Global name, as the Hugging Face layout has it for weights; optimizer moments have a
    /// prefix (`adam.m/`, `adam.v/`).
    pub name: String,
    /// Shape of the whole tensor.
    pub global_shape: Vec<usize>,
    /// Where this part begins, per dimension.
    pub offset: Vec<usize>,
    /// Extent of this part, per dimension.
    pub shape: Vec<usize>,
}

impl ShardSpec {
    /// Returns the number of elements of this part.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the part of the global tensor that both hold; none when they do not meet, are of
    /// different tensors, or either is not within its global shape.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        if self.name != other.name
            || self.global_shape != other.global_shape
            || !self.is_valid()
            || !other.is_valid()
        {
            return None;
        }
        let mut offset = Vec::with_capacity(self.offset.len());
        let mut shape = Vec::with_capacity(self.shape.len());
        for d in 0..self.offset.len() {
            let from = self.offset[d].max(other.offset[d]);
            let to = (self.offset[d] + self.shape[d]).min(other.offset[d] + other.shape[d]);
            if from >= to {
                return None;
            }
            offset.push(from);
            shape.push(to - from);
        }
        Some(Self {
            name: self.name.clone(),
            global_shape: self.global_shape.clone(),
            offset,
            shape,
        })
    }

    /// Returns whether the part lies within the global shape, all with the same dimensions.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.offset.len() == self.global_shape.len()
            && self.shape.len() == self.global_shape.len()
            && (0..self.shape.len()).all(|d| {
                self.offset[d]
                    .checked_add(self.shape[d])
                    .is_some_and(|end| end <= self.global_shape[d])
            })
    }

    /// Copies `part` out of `source`, which holds the elements of `self`, into `target`, which
    /// holds those of `into`, all row-major. `part` must lie in both: take it from
    /// [`ShardSpec::intersect`].
    ///
    /// # Panics
    /// When `part` is not part of both, or a slice is too short for its spec.
    pub fn copy_part<T: Copy>(&self, source: &[T], into: &Self, target: &mut [T], part: &Self) {
        let dims = part.shape.len();
        let Some(last) = dims.checked_sub(1) else {
            // A scalar.
            target[0] = source[0];
            return;
        };
        let run = part.shape[last];
        if part.elements() == 0 {
            return;
        }
        let mut index = vec![0; last];
        loop {
            let place = |spec: &Self| {
                (0..dims).fold(0, |place, d| {
                    let at = part.offset[d] + index.get(d).copied().unwrap_or(0) - spec.offset[d];
                    place * spec.shape[d] + at
                })
            };
            let (from, to) = (place(self), place(into));
            target[to..to + run].copy_from_slice(&source[from..from + run]);
            // The next row, counting from the innermost of the outer dimensions.
            let mut d = last;
            loop {
                if d == 0 {
                    return;
                }
                d -= 1;
                index[d] += 1;
                if index[d] < part.shape[d] {
                    break;
                }
                index[d] = 0;
            }
        }
    }
}

/// Returns the range of `0..total` that part `index` of `parts` holds: the first `total % parts`
/// parts have one more than the others, so that the parts are in order and leave nothing out.
///
/// # Panics
/// When `index >= parts`.
#[must_use]
pub fn split(total: usize, parts: usize, index: usize) -> Range<usize> {
    assert!(index < parts, "part {index} of {parts} does not exist");
    let (each, more) = (total / parts, total % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn seven_in_three_parts_are_three_two_two() {
        let parts: Vec<_> = (0..3).map(|i| split(7, 3, i)).collect();
        assert_eq!(parts, [0..3, 3..5, 5..7]);
        assert_eq!(split(1, 4, 3), 1..1);
    }

    fn shard(global: &[usize], offset: &[usize], shape: &[usize]) -> ShardSpec {
        ShardSpec {
            name: "w".into(),
            global_shape: global.into(),
            offset: offset.into(),
            shape: shape.into(),
        }
    }

    #[test]
    fn parts_of_different_tensors_or_out_of_bounds_do_not_meet() {
        let whole = shard(&[4, 4], &[0, 0], &[4, 4]);
        let mut other = whole.clone();
        other.name = "v".into();
        assert_eq!(whole.intersect(&other), None);
        assert_eq!(whole.intersect(&shard(&[4, 4], &[2, 0], &[4, 4])), None);
        assert_eq!(whole.intersect(&shard(&[4, 4], &[usize::MAX, 0], &[4, 4])), None);
        let corner = shard(&[4, 4], &[2, 3], &[2, 1]);
        assert_eq!(whole.intersect(&corner), Some(corner.clone()));
        let left = shard(&[4, 4], &[0, 0], &[4, 2]);
        assert_eq!(left.intersect(&corner), None);
    }

    #[test]
    fn a_scalar_meets_itself_and_is_copied() {
        let scalar = shard(&[], &[], &[]);
        let part = scalar.intersect(&scalar).unwrap();
        let mut target = [0.0f32];
        scalar.copy_part(&[7.0], &scalar, &mut target, &part);
        assert_eq!(target, [7.0]);
    }

    proptest! {
        #[test]
        fn split_covers_everything_once_in_order_and_evenly(
            total in 0usize..10_000, parts in 1usize..70,
        ) {
            let mut at = 0;
            for index in 0..parts {
                let range = split(total, parts, index);
                prop_assert_eq!(range.start, at);
                prop_assert!(range.len() == total / parts || range.len() == total / parts + 1);
                at = range.end;
            }
            prop_assert_eq!(at, total);
        }

        /// Shards of one grid, resharded into another grid through intersections, hold the same
        /// global tensor, each element written exactly once.
        #[test]
        fn resharding_through_intersections_is_exact(
            rows in 1usize..9, columns in 1usize..9,
            from in (1usize..5, 1usize..5), to in (1usize..5, 1usize..5),
        ) {
            let grid = |(r, c): (usize, usize)| {
                let mut shards = Vec::new();
                for i in 0..r {
                    for j in 0..c {
                        let (a, b) = (split(rows, r, i), split(columns, c, j));
                        shards.push(shard(
                            &[rows, columns], &[a.start, b.start], &[a.len(), b.len()],
                        ));
                    }
                }
                shards
            };
            let content = |s: &ShardSpec| -> Vec<usize> {
                (0..s.elements())
                    .map(|i| {
                        let (r, c) = (i / s.shape[1], i % s.shape[1]);
                        (s.offset[0] + r) * columns + s.offset[1] + c
                    })
                    .collect()
            };
            let old = grid(from);
            for target in grid(to) {
                let mut filled = vec![usize::MAX; target.elements()];
                let mut copied = 0;
                for source in &old {
                    if let Some(part) = source.intersect(&target) {
                        let mirrored = target.intersect(source);
                        prop_assert_eq!(Some(&part), mirrored.as_ref());
                        source.copy_part(&content(source), &target, &mut filled, &part);
                        copied += part.elements();
                    }
                }
                prop_assert_eq!(copied, target.elements());
                prop_assert_eq!(filled, content(&target));
            }
        }
    }
}
