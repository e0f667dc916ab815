//! How the fleet stood over time: means over buckets that grow as the simulation goes on.

use serde::Serialize;

/// The most buckets; at twice this width there are half as many.
const BUCKETS: usize = 480;
/// The width of the first buckets, in milliseconds.
const WIDTH_MS: u64 = 60_000;

/// How the fleet stands. Device amounts are in thousandths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Level {
    /// Held by gangs.
    pub held: u64,
    /// Held by gangs whose ranks work.
    pub working: u64,
    /// Broken, and held by nobody.
    pub broken: u64,
    /// Idle.
    pub idle: u64,
    /// Idle, on machines that hold nothing else.
    pub untouched: u64,
    /// Wanted by jobs that wait.
    pub wanted: u64,
    /// Jobs that wait.
    pub waiting: u64,
    /// Jobs that hold devices.
    pub placed: u64,
}

impl Level {
    fn parts(&self) -> [u64; 8] {
        let Self { held, working, broken, idle, untouched, wanted, waiting, placed } = *self;
        [held, working, broken, idle, untouched, wanted, waiting, placed]
    }
}

/// The level over time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeline {
    width: u64,
    buckets: Vec<[u128; 8]>,
    now: u64,
    total: [u128; 8],
}

/// One bucket: means over its time. Device amounts are in devices.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Point {
    /// When it begins, in hours from the start.
    pub hours: f64,
    /// Held by gangs, over all devices.
    pub allocation: f64,
    /// Held by gangs whose ranks work, over all devices.
    pub utilization: f64,
    /// Broken and held by nobody, over all devices.
    pub broken: f64,
    /// Idle devices on machines that hold something else, over idle devices.
    pub fragmentation: f64,
    /// Devices that waiting jobs want, over all devices.
    pub wanted: f64,
    /// Jobs that wait.
    pub waiting: f64,
    /// Jobs that hold devices.
    pub placed: f64,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { width: WIDTH_MS, buckets: Vec::new(), now: 0, total: [0; 8] }
    }
}

impl Timeline {
    /// Says that the level was this from the last moment until `now`, in milliseconds.
    pub fn until(&mut self, now: u64, level: &Level) {
        let parts = level.parts();
        while self.now < now {
            let at = (self.now / self.width) as usize;
            if at >= BUCKETS {
                self.widen();
                continue;
            }
            let end = now.min((at as u64 + 1) * self.width);
            let ms = u128::from(end - self.now);
            if self.buckets.len() <= at {
                self.buckets.resize(at + 1, [0; 8]);
            }
            let bucket = &mut self.buckets[at];
            for ((sum, total), part) in bucket.iter_mut().zip(&mut self.total).zip(parts) {
                *sum += ms * u128::from(part);
                *total += ms * u128::from(part);
            }
            self.now = end;
        }
    }

    /// Makes buckets twice as wide until a time of `span` milliseconds fits.
    fn widen(&mut self) {
        self.width *= 2;
        self.buckets = self
            .buckets
            .chunks(2)
            .map(|pair| std::array::from_fn(|at| pair.iter().map(|bucket| bucket[at]).sum()))
            .collect();
    }

    /// Returns device thousandths held, times milliseconds, over all time.
    #[must_use]
    pub fn held(&self) -> u128 {
        self.total[0]
    }

    /// Returns the means over all time, `hours` being its length.
    #[must_use]
    pub fn mean(&self, capacity: u64) -> Point {
        let mut point = means(&self.total, u128::from(self.now), capacity);
        point.hours = self.now as f64 / 3_600_000.0;
        point
    }

    /// Returns every bucket.
    #[must_use]
    pub fn points(&self, capacity: u64) -> Vec<Point> {
        (0..self.buckets.len())
            .map(|at| {
                let start = at as u64 * self.width;
                let span = self.now.min(start + self.width) - start;
                let mut point = means(&self.buckets[at], u128::from(span), capacity);
                point.hours = start as f64 / 3_600_000.0;
                point
            })
            .collect()
    }
}

fn means(sums: &[u128; 8], span: u128, capacity: u64) -> Point {
    let over = |part: u128, whole: u128| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let all = span * u128::from(capacity);
    let [held, working, broken, idle, untouched, wanted, waiting, placed] = *sums;
    Point {
        hours: 0.0,
        allocation: over(held, all),
        utilization: over(working, all),
        broken: over(broken, all),
        fragmentation: over(idle.saturating_sub(untouched), idle),
        wanted: over(wanted, all),
        waiting: over(waiting, span),
        placed: over(placed, span),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_time_keeps_its_totals_in_few_buckets() {
        let mut timeline = Timeline::default();
        let day = 86_400_000;
        timeline.until(day, &Level { held: 1000, ..Level::default() });
        timeline.until(30 * day, &Level { held: 2000, idle: 2000, ..Level::default() });
        let points = timeline.points(4000);
        assert!(points.len() <= BUCKETS && points.len() > BUCKETS / 3, "{}", points.len());
        assert_eq!(points[0].allocation, 0.25);
        assert_eq!(points.last().unwrap().allocation, 0.5);
        assert_eq!(timeline.held(), u128::from(59 * 1000 * day));
        let mean = timeline.mean(4000);
        assert!((mean.allocation - 59.0 / 120.0).abs() < 1e-9);
        assert_eq!((mean.fragmentation, mean.hours), (1.0, 720.0));
    }
}
