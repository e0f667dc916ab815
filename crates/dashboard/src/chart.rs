//! Line charts as SVG. Colours come from the page's style, so that both colour schemes fit.

use maud::{Markup, PreEscaped, html};

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;

/// One curve.
#[derive(Debug, Clone, Default)]
pub struct Curve {
    /// Its name, for readers who cannot see it.
    pub name: String,
    /// Points from left to right.
    pub points: Vec<(f64, f64)>,
    /// Drawn as dots as well: for measurements that are far apart.
    pub dots: bool,
}

/// How values of an axis are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Plain numbers, with k and M.
    Number,
    /// 0 to 1 as percent, the axis always from 0 to 100%.
    Share,
    /// Milliseconds since the epoch, as time before the last point.
    Ago,
}

/// Draws curves over a common x axis.
#[must_use]
pub fn lines(title: &str, curves: &[Curve], x_axis: Axis, y_axis: Axis) -> Markup {
    let all: Vec<(f64, f64)> = curves
        .iter()
        .flat_map(|curve| curve.points.iter().copied())
        .filter(|(x, y)| x.is_finite() && y.is_finite())
        .collect();
    if all.len() < 2 {
        return html! { p.nothing { "No points yet." } };
    }
    let (x_low, x_high) = span(all.iter().map(|point| point.0));
    let (mut y_low, mut y_high) = span(all.iter().map(|point| point.1));
    if y_axis == Axis::Share {
        (y_low, y_high) = (0.0, 1.0);
    }
    let y_ticks = ticks(y_low, y_high, 4);
    if let (Some(first), Some(last)) = (y_ticks.first(), y_ticks.last()) {
        y_low = y_low.min(*first);
        y_high = y_high.max(*last);
    }
    let x_at = |x: f64| LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT);
    let y_at = |y: f64| HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM);
    let names: Vec<&str> = curves.iter().map(|curve| curve.name.as_str()).collect();
    let last = all.iter().map(|point| point.1).next_back().unwrap_or_default();
    let label =
        format!("{title}: {}, last value {}", names.join(" and "), write(last, y_axis, 0.0));
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-label=(label) {
            @for tick in &y_ticks {
                line.gridline x1=(LEFT) x2=(WIDTH - RIGHT) y1=(round(y_at(*tick))) y2=(round(y_at(*tick))) {}
                text x=(LEFT - 6.0) y=(round(y_at(*tick) + 4.0)) text-anchor="end" {
                    (write(*tick, y_axis, x_high))
                }
            }
            @for tick in ticks(x_low, x_high, 5).iter().filter(|tick| (x_low..=x_high).contains(*tick)) {
                text x=(round(x_at(*tick))) y=(HEIGHT - 6.0) text-anchor="middle" {
                    (write(*tick, x_axis, x_high))
                }
            }
            @for (index, curve) in curves.iter().enumerate() {
                polyline class=(if index == 0 { "curve" } else { "curve second" })
                    points=(PreEscaped(path(&curve.points, x_at, y_at))) {}
                @if curve.dots {
                    @for (x, y) in curve.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite()) {
                        circle.dot cx=(round(x_at(*x))) cy=(round(y_at(*y))) r="3" {}
                    }
                }
            }
        }
    }
}

fn path(points: &[(f64, f64)], x_at: impl Fn(f64) -> f64, y_at: impl Fn(f64) -> f64) -> String {
    let mut text = String::new();
    for (x, y) in points.iter().filter(|(x, y)| x.is_finite() && y.is_finite()) {
        text.push_str(&format!("{},{} ", round(x_at(*x)), round(y_at(*y))));
    }
    text
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    if high - low > f64::EPSILON * high.abs().max(1.0) {
        (low, high)
    } else {
        // A flat line gets room above and below it.
        let room = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
        (low - room, high + room)
    }
}

/// Returns round values at which to mark an axis from `low` to `high`: about `count` of them.
fn ticks(low: f64, high: f64, count: u32) -> Vec<f64> {
    let rough = (high - low) / f64::from(count.max(1));
    if !(rough.is_finite() && rough > 0.0) {
        return vec![low];
    }
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * magnitude)
        .find(|step| *step >= rough)
        .unwrap_or(10.0 * magnitude);
    let first = (low / step).floor() as i64;
    let last = (high / step).ceil() as i64;
    (first..=last).take(20).map(|index| index as f64 * step).collect()
}

fn write(value: f64, axis: Axis, end: f64) -> String {
    match axis {
        Axis::Share => format!("{:.0}%", value * 100.0),
        Axis::Ago => {
            let seconds = ((end - value) / 1000.0).max(0.0);
            match seconds {
                s if s < 1.0 => "now".to_owned(),
                s if s < 120.0 => format!("-{s:.0}s"),
                s if s < 7200.0 => format!("-{:.0}m", s / 60.0),
                s => format!("-{:.0}h", s / 3600.0),
            }
        }
        Axis::Number => {
            let size = value.abs();
            let trim = |text: String| {
                if text.contains('.') {
                    text.trim_end_matches('0').trim_end_matches('.').to_owned()
                } else {
                    text
                }
            };
            match size {
                s if s >= 1e9 => trim(format!("{:.2}", value / 1e9)) + "G",
                s if s >= 1e6 => trim(format!("{:.2}", value / 1e6)) + "M",
                s if s >= 1e4 => trim(format!("{:.1}", value / 1e3)) + "k",
                s if s >= 1.0 || s == 0.0 => trim(format!("{value:.2}")),
                _ => trim(format!("{value:.4}")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_span() {
        assert_eq!(ticks(0.0, 1.0, 4), [0.0, 0.5, 1.0]);
        let marks = ticks(3.2, 8.4, 4);
        assert_eq!(marks, [2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(1.0, 1.0, 4), [1.0]);
    }

    #[test]
    fn no_series_panics() {
        for points in [
            vec![],
            vec![(0.0, 1.0)],
            vec![(0.0, f64::NAN), (1.0, f64::INFINITY)],
            vec![(0.0, 0.0), (0.0, 0.0)],
            vec![(1.0, 2.0), (2.0, 2.0)],
        ] {
            let curve = Curve { name: "x".to_owned(), points, dots: true };
            let text = lines("t", &[curve], Axis::Number, Axis::Number).into_string();
            assert!(!text.contains("NaN") && !text.contains("inf,"), "{text}");
        }
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [(0.0, "0"), (12_500.0, "12.5k"), (2.5e6, "2.5M"), (0.0125, "0.0125")]
        {
            assert_eq!(write(value, Axis::Number, 0.0), text);
        }
        assert_eq!(write(0.25, Axis::Share, 0.0), "25%");
        assert_eq!(write(0.0, Axis::Ago, 90_000.0), "-90s");
    }
}
