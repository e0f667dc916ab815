//! Durations as counts in buckets that grow with their size, so that a million take a few
//! kilobytes.

use serde::Serialize;

/// Buckets for each doubling: a quantile is off by less than one part in this.
const PARTS: u64 = 64;
const PARTS_LOG2: u32 = PARTS.trailing_zeros();

/// Durations in milliseconds. The mean is exact, quantiles are within 1.6%.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: u128,
    most: u64,
}

/// What a histogram says, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Stats {
    /// Number of durations.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Half are no longer.
    pub p50: f64,
    /// Nine of ten are no longer.
    pub p90: f64,
    /// 99 of 100 are no longer.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Histogram {
    /// Counts one duration.
    pub fn add(&mut self, ms: u64) {
        let at = bucket(ms);
        if self.counts.len() <= at {
            self.counts.resize(at + 1, 0);
        }
        self.counts[at] += 1;
        self.count += 1;
        self.sum += u128::from(ms);
        self.most = self.most.max(ms);
    }

    /// Returns the least duration that the share `of` (0 to 1) does not exceed, rounded up within
    /// its bucket; 0 of none.
    #[must_use]
    pub fn quantile(&self, of: f64) -> u64 {
        let wanted = ((self.count as f64 * of).ceil() as u64).max(1);
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper(at).min(self.most);
            }
        }
        self.most
    }

    /// Returns what the report says.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let seconds = |ms: u64| ms as f64 / 1000.0;
        Stats {
            count: self.count,
            mean: if self.count == 0 { 0.0 } else { self.sum as f64 / self.count as f64 / 1000.0 },
            p50: seconds(self.quantile(0.5)),
            p90: seconds(self.quantile(0.9)),
            p99: seconds(self.quantile(0.99)),
            max: seconds(self.most),
        }
    }
}

fn bucket(ms: u64) -> usize {
    if ms < PARTS {
        return ms as usize;
    }
    let log = ms.ilog2();
    let part = (ms >> (log - PARTS_LOG2)) - PARTS;
    (u64::from(log - PARTS_LOG2 + 1) * PARTS + part) as usize
}

/// Returns the greatest duration of a bucket.
fn upper(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < PARTS {
        return bucket;
    }
    let (doubling, part) = (bucket / PARTS - 1, bucket % PARTS);
    (((PARTS + part + 1) as u128) << doubling).saturating_sub(1).min(u128::from(u64::MAX)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_its_durations_and_no_others() {
        let near = |at: u64| [at.saturating_sub(1), at, at.saturating_add(1)];
        for ms in (0..63).flat_map(|log| near(1 << log)).chain([100, 12_345, u64::MAX]) {
            let at = bucket(ms);
            assert!(ms <= upper(at), "{ms}");
            assert!(at == 0 || ms > upper(at - 1), "{ms}");
        }
    }

    #[test]
    fn quantiles_are_near_the_exact_ones_and_the_mean_is_exact() {
        let mut histogram = Histogram::default();
        for ms in 1..=100_000u64 {
            histogram.add(ms);
        }
        let stats = histogram.stats();
        assert_eq!(stats.mean, 50.0005);
        for (found, exact) in [(stats.p50, 50.0), (stats.p90, 90.0), (stats.p99, 99.0)] {
            assert!((found / exact - 1.0).abs() < 0.016, "{found} {exact}");
        }
        assert_eq!((stats.count, stats.max), (100_000, 100.0));
        assert_eq!(Histogram::default().stats(), Stats::default());
    }
}
