//! The arrivals of one run: the trace's pods shuffled, then more of the same.

use std::str::FromStr;

use crate::openb::input::Trace;
use crate::openb::rng::Rng;

/// A range of seeds, both ends included; written `42..51`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seeds {
    /// The first seed.
    pub first: u64,
    /// The last seed.
    pub last: u64,
}

/// The most seeds in one experiment.
pub const SEEDS_MAX: u64 = 10_000;

impl Seeds {
    /// Returns the seeds in order.
    #[must_use]
    pub fn list(self) -> Vec<u64> {
        (self.first..=self.last).collect()
    }
}

/// Why a range of seeds was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "seeds {0:?} must be one number, or FIRST..LAST with FIRST not above LAST and at most 10000 seeds"
)]
pub struct SeedsError(pub String);

impl FromStr for Seeds {
    type Err = SeedsError;
    fn from_str(text: &str) -> Result<Self, SeedsError> {
        let number =
            |part: &str| part.trim().parse::<u64>().map_err(|_| SeedsError(text.to_owned()));
        let (first, last) = match text.split_once("..") {
            Some((first, last)) => (number(first)?, number(last.trim_start_matches('='))?),
            None => (number(text)?, number(text)?),
        };
        if first > last || last - first >= SEEDS_MAX {
            return Err(SeedsError(text.to_owned()));
        }
        Ok(Self { first, last })
    }
}

/// Returns the pods in the order of their arrival, as places in [`Trace::pods`].
///
/// The pods, sorted by name, are shuffled. Then pods drawn uniformly with replacement are appended
/// until the next would carry the GPU demand past `ratio` of the capacity. A trace that asks for
/// more than that from the start loses pods drawn uniformly instead.
#[must_use]
pub fn arrivals(trace: &Trace, ratio: f64, rng: &mut Rng) -> Vec<usize> {
    let demand = |pod: usize| trace.shapes[trace.pods[pod].shape].gpu_total();
    let mut order: Vec<usize> = (0..trace.pods.len()).collect();
    rng.shuffle(&mut order);
    let wanted = ratio * trace.gpu_capacity() as f64;
    let mut total: i64 = order.iter().map(|&pod| demand(pod)).sum();
    if total == 0 {
        return order;
    }
    while total as f64 > wanted && !order.is_empty() {
        let removed = order.remove(rng.below(order.len()));
        total -= demand(removed);
    }
    loop {
        let next = rng.below(trace.pods.len());
        if (total + demand(next)) as f64 > wanted {
            return order;
        }
        total += demand(next);
        order.push(next);
    }
}
