//! What `top` shows: the last look at the fleet, and which job is chosen.

use drumline_wire::v1;

/// The curves of the chosen job, oldest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Curves {
    pub(crate) loss: Vec<f64>,
    pub(crate) tokens_per_second: Vec<f64>,
}

/// Everything that is on the screen.
#[derive(Debug, Clone, Default)]
pub(crate) struct Screen {
    pub(crate) address: String,
    pub(crate) fleet: v1::FleetView,
    pub(crate) curves: Curves,
    /// Why the last look failed; empty when it did not.
    pub(crate) lost: String,
    chosen: usize,
    chosen_id: String,
}

impl Screen {
    /// Returns the place of the chosen job in the list.
    pub(crate) fn chosen(&self) -> usize {
        self.chosen.min(self.fleet.jobs.len().saturating_sub(1))
    }

    /// Returns the chosen job.
    pub(crate) fn chosen_job(&self) -> Option<&v1::JobView> {
        self.fleet.jobs.get(self.chosen())
    }

    /// Returns the chosen job's id, or nothing.
    pub(crate) fn chosen_id(&self) -> String {
        self.chosen_job().map(|job| job.id.clone()).unwrap_or_default()
    }

    /// Moves the choice, within the list.
    pub(crate) fn choose(&mut self, by: isize) {
        let last = self.fleet.jobs.len().saturating_sub(1);
        self.chosen = self.chosen().saturating_add_signed(by).min(last);
        self.chosen_id = self.chosen_id();
    }

    /// Finds the chosen job again after the list has changed.
    pub(crate) fn keep_choice(&mut self) {
        let found = self.fleet.jobs.iter().position(|job| job.id == self.chosen_id);
        if let Some(found) = found {
            self.chosen = found;
        }
        self.chosen_id = self.chosen_id();
    }
}

/// Squeezes a curve into so many columns: each is the mean of its points.
pub(crate) fn squeeze(curve: &[f64], columns: usize) -> Vec<f64> {
    let points: Vec<f64> = curve.iter().copied().filter(|y| y.is_finite()).collect();
    if columns == 0 || points.len() <= columns {
        return points.into_iter().take(columns).collect();
    }
    (0..columns)
        .map(|column| {
            let from = column * points.len() / columns;
            let to = ((column + 1) * points.len() / columns).max(from + 1);
            let part = &points[from..to.min(points.len())];
            part.iter().sum::<f64>() / part.len() as f64
        })
        .collect()
}

/// Draws a curve in one line of block characters, lowest to highest.
pub(crate) fn sparkline(curve: &[f64], columns: usize) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let points = squeeze(curve, columns);
    let low = points.iter().copied().fold(f64::INFINITY, f64::min);
    let high = points.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    points
        .iter()
        .map(|y| {
            let share = if high > low { (y - low) / (high - low) } else { 0.5 };
            LEVELS[((share * 7.0).round() as usize).min(7)]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs(ids: &[&str]) -> v1::FleetView {
        let job = |id: &&str| v1::JobView { id: (*id).to_owned(), ..v1::JobView::default() };
        v1::FleetView { jobs: ids.iter().map(job).collect(), ..v1::FleetView::default() }
    }

    #[test]
    fn the_choice_follows_its_job() {
        let mut screen = Screen { fleet: jobs(&["a", "b"]), ..Screen::default() };
        screen.choose(1);
        assert_eq!(screen.chosen_id(), "b");
        screen.fleet = jobs(&["new", "a", "b"]);
        screen.keep_choice();
        assert_eq!(screen.chosen_id(), "b");
        screen.choose(100);
        screen.choose(-1000);
        assert_eq!(screen.chosen_id(), "new");
        screen.fleet = jobs(&[]);
        screen.keep_choice();
        screen.choose(1);
        assert_eq!(screen.chosen_id(), "");
    }

    #[test]
    fn a_curve_fits_its_columns() {
        assert_eq!(sparkline(&[1.0, 2.0, 3.0, f64::NAN], 10), "▁▅█");
        assert_eq!(sparkline(&(0..1000).map(f64::from).collect::<Vec<_>>(), 8).chars().count(), 8);
        assert_eq!(sparkline(&[], 8), "");
        assert_eq!(sparkline(&[5.0, 5.0], 0), "");
    }
}
