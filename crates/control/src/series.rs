//! Short histories of named figures, in memory only: they begin anew with the control plane.

use std::collections::BTreeMap;

/// Points kept per series; beyond it every second one is dropped.
const POINTS_MAX: usize = 2048;
/// Series kept; the one that was fed least recently goes first.
const SERIES_MAX: usize = 2000;

/// One figure over steps or time.
#[derive(Debug, Clone, Default)]
struct Line {
    points: Vec<(f64, f64)>,
    /// Of so many points offered, one is kept.
    stride: u32,
    skipped: u32,
    /// The newest point, whether kept or not: a chart should end where the run is.
    last: Option<(f64, f64)>,
    fed: u64,
}

/// All series.
#[derive(Debug, Default)]
pub(crate) struct SeriesStore {
    lines: BTreeMap<String, Line>,
    fed: u64,
}

impl SeriesStore {
    /// Adds a point. Points at or beyond `x` are overwritten: a restart repeats steps.
    pub(crate) fn push(&mut self, name: &str, x: f64, y: f64) {
        if !x.is_finite() || !y.is_finite() {
            return;
        }
        self.fed += 1;
        if !self.lines.contains_key(name) && self.lines.len() >= SERIES_MAX {
            let oldest = self.lines.iter().min_by_key(|(_, line)| line.fed);
            if let Some(name) = oldest.map(|(name, _)| name.clone()) {
                self.lines.remove(&name);
            }
        }
        let line = self.lines.entry(name.to_owned()).or_default();
        line.fed = self.fed;
        line.push(x, y);
    }

    /// Returns a series with at most `points_max` points, evenly thinned, its ends kept.
    pub(crate) fn get(&self, name: &str, points_max: usize) -> Vec<(f64, f64)> {
        let Some(line) = self.lines.get(name) else { return Vec::new() };
        let mut points = line.points.clone();
        if let Some(last) = line.last
            && points.last() != Some(&last)
        {
            points.push(last);
        }
        let (count, max) = (points.len(), points_max.max(2));
        if count <= max {
            return points;
        }
        (0..max).map(|at| points[at * (count - 1) / (max - 1)]).collect()
    }

    /// Forgets every series that starts with `prefix`.
    pub(crate) fn forget(&mut self, prefix: &str) {
        self.lines.retain(|name, _| !name.starts_with(prefix));
    }
}

impl Line {
    fn push(&mut self, x: f64, y: f64) {
        if self.last.is_some_and(|(last, _)| last >= x) {
            let keep = self.points.partition_point(|(at, _)| *at < x);
            self.points.truncate(keep);
            self.skipped = 0;
        }
        self.last = Some((x, y));
        self.stride = self.stride.max(1);
        if self.skipped > 0 {
            self.skipped -= 1;
            return;
        }
        self.points.push((x, y));
        self.skipped = self.stride - 1;
        if self.points.len() >= POINTS_MAX {
            let mut at = 0;
            self.points.retain(|_| {
                at += 1;
                at % 2 == 1
            });
            self.stride = self.stride.saturating_mul(2);
            self.skipped = self.stride - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_overwrites_the_steps_that_it_repeats() {
        let mut store = SeriesStore::default();
        for step in 1..=10 {
            store.push("loss", f64::from(step), 1.0);
        }
        for step in 6..=8 {
            store.push("loss", f64::from(step), 2.0);
        }
        let points = store.get("loss", 100);
        assert_eq!(points.len(), 8);
        assert_eq!(points[4..], [(5.0, 1.0), (6.0, 2.0), (7.0, 2.0), (8.0, 2.0)]);
    }

    #[test]
    fn a_long_series_is_thinned_evenly_and_keeps_its_ends() {
        let mut store = SeriesStore::default();
        for step in 0..100_000u32 {
            store.push("loss", f64::from(step), f64::from(step));
        }
        assert!(store.lines["loss"].points.len() < POINTS_MAX);
        let points = store.get("loss", 50);
        assert_eq!(points.len(), 50);
        assert_eq!((points[0].0, points[49].0), (0.0, 99_999.0));
        let gaps: Vec<f64> = points.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        assert!(gaps.iter().all(|gap| (1_500.0..2_600.0).contains(gap)), "{gaps:?}");
    }

    #[test]
    fn the_number_of_series_is_bounded_and_nonsense_is_left_out() {
        let mut store = SeriesStore::default();
        for index in 0..SERIES_MAX + 10 {
            store.push(&format!("job/{index}/loss"), 1.0, 1.0);
        }
        assert_eq!(store.lines.len(), SERIES_MAX);
        assert!(store.get("job/0/loss", 10).is_empty());
        store.push("x", f64::NAN, 1.0);
        assert!(store.get("x", 10).is_empty());
        store.forget("job/1");
        assert!(store.get("job/11/loss", 10).is_empty());
    }
}
